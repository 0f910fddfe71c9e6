"""`JointHead`: the last layer as if the data of all clients were in one place."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fl_rebasin.forward import inputs_of
from fl_rebasin.merging.clients import Clients, Cost, LocalClients, Request
from fl_rebasin.merging.finishing_step import Finish, Finished
from fl_rebasin.merging.heads import last_layer
from fl_rebasin.merging.joint_head.head_sums import (
    FEATURES,
    HEAD,
    FeatureSums,
    HeadSums,
    pooled_features,
    pooled_heads,
    read_features,
    read_head,
    share_of,
    with_usual_scale,
)
from fl_rebasin.merging.joint_head.solver import PENALTY, Point, Search
from fl_rebasin.state_dicts import StateDict, like

MESSAGES = 10


@dataclass(frozen=True)
class JointHead:
    """Finishing step: fits the last layer to the features and labels of all clients.

    The last linear layer of the merged model becomes the multinomial logistic regression on the
    merged features of all clients' data. The problem is convex. A client sends sums only: X^T X and
    X^T Y once, then X^T P for each head that the server tries; it computes its features once and
    keeps them in its context. Every tenth example is held back: of all heads that were tried, the
    one with the least held-back loss is taken. Rows of classes without examples are unchanged.

    Clients need labels in the batches that `load` returns (class numbers, one for each example).
    Use all training data there: with few images for each class the head overfits.

    Attributes:
        messages: number of messages to each client, at least 2.

    Source: Luo et al., CCVR (NeurIPS 2021) and Oh et al., FedBABU (ICLR 2022) for the idea that
    the classifier is what suffers from label skew.
    """

    messages: int = MESSAGES

    name: ClassVar[str] = "joint-head"
    needs_models: ClassVar[bool] = False

    def __post_init__(self) -> None:
        whole = isinstance(self.messages, int) and not isinstance(self.messages, bool)
        if not whole or self.messages < 2:
            raise ValueError(f"messages must be an integer of 2 or more, got {self.messages!r}")

    def bind(self, model: nn.Module, example_inputs: Any) -> Finish:
        """Return the step for a model; it is skipped if the model ends in something else."""
        try:
            weight, bias = last_layer(model, example_inputs)
        except ValueError as error:
            problem = f"the joint head is skipped: {error}"
            return lambda merged, clients: Finished(merged, problems=(problem,), applied=False)
        return _Fit(weight, bias, self.messages)


@dataclass(frozen=True)
class _Fit:
    """The fit of one architecture's last layer.

    Attributes:
        weight: key of its weight.
        bias: key of its bias; None if it has none.
        messages: number of messages.
    """

    weight: str
    bias: str | None
    messages: int

    def __call__(self, merged: StateDict, clients: Clients) -> Finished:
        """Fit the head to the clients' features and labels."""
        started = time.perf_counter()
        sent, cost = self._features(merged, clients)
        known, problems = with_usual_scale(sent)
        best: Point | None = None
        search: Search | None = None
        head = self._head(merged)
        tried = 0
        for _ in range(self.messages - 1 if known else 0):
            asked, spent, invalid = self._ask(head, known, clients)
            cost += spent
            problems += invalid
            if not asked:
                break
            if len(asked) < len(known):
                # The objective is another one without the clients that did not answer.
                known, search, best = {node: known[node] for node in asked}, None, None
            shares = [share_of(known[client], clients.examples(client)) for client in known]
            features = pooled_features(list(known.values()), shares)
            answers = [asked[client] for client in known]
            point = self._point(head, features, pooled_heads(answers, shares))
            tried += 1
            if best is None or point.held_back < best.held_back:
                best = point
            fresh, loss = self._uninformed(features, head)
            if tried == 1 and point.loss > loss:
                # A head that is worse than no features at all is a bad start.
                head = fresh
                continue
            search = self._begin(features, point) if search is None else search.after(point)
            head = search.next_head()
        cost = replace(cost, seconds=time.perf_counter() - started)
        report = f"joint head: {tried} heads tried on the data of {len(known)} clients"
        if best is None:
            return Finished(merged, {JointHead.name: cost}, report, tuple(problems), applied=False)
        state = self._with_head(merged, best.head)
        return Finished(state, {JointHead.name: cost}, report, tuple(problems))

    def _features(self, merged: StateDict, clients: Clients) -> tuple[dict[int, FeatureSums], Cost]:
        """Let clients compute and keep their features; return the sums over them."""
        classes, features = merged[self.weight].shape
        layer = self.weight.rpartition(".")[0]
        request = Request({"merged": merged}, {"layer": layer, "classes": classes})
        answers = clients.ask(
            FEATURES,
            dict.fromkeys(clients.ids, request),
            lambda tensors: read_features(tensors, features, classes),
        )
        return answers.by_client, answers.cost

    def _ask(
        self, head: Tensor, known: dict[int, FeatureSums], clients: Clients
    ) -> tuple[dict[int, HeadSums], Cost, list[str]]:
        """Return the clients' sums for a head, their cost, and what was wrong with others."""
        requests = dict.fromkeys(known, Request({"head": {"weight": head}}))
        answers = clients.ask(HEAD, requests, lambda tensors: tensors)
        valid, problems = {}, []
        for client, tensors in answers.by_client.items():
            try:
                valid[client] = read_head(tensors, known[client])
            except Exception as error:  # A client may send anything.
                problems.append(f"{HEAD.subject} of client {client} dropped: {error}")
        return valid, answers.cost, problems

    def _head(self, merged: StateDict) -> Tensor:
        """Return weight and bias as one matrix, float64, shape `(features + 1, classes)`."""
        weight = merged[self.weight].detach().double().T.cpu()
        bias = weight.new_zeros(weight.shape[1])
        if self.bias is not None:
            bias = merged[self.bias].detach().double().cpu()
        return torch.cat([weight, bias[None]])

    def _uninformed(self, features: FeatureSums, head: Tensor) -> tuple[Tensor, float]:
        """Return the head that ignores the features, and its loss, -sum_c p_c log p_c.

        p is the label prior of all clients; without a bias the best such head is uniform. Rows of
        classes without examples are those of `head`.
        """
        counts = features.class_sums[-1]
        seen = counts > 0
        prior = counts / counts.sum()
        logs = torch.where(seen, prior.clamp_min(1e-300).log(), 0.0)
        if self.bias is None:
            logs = torch.zeros_like(logs)
        fresh = torch.cat([torch.zeros_like(head[:-1]), logs[None]])
        loss = math.log(int(seen.sum())) if self.bias is None else -float((prior * logs).sum())
        return torch.where(seen, fresh, head), loss

    def _with_head(self, merged: StateDict, head: Tensor) -> dict[str, Tensor]:
        new = {**merged, self.weight: head[:-1].T.contiguous().to(merged[self.weight])}
        if self.bias is not None:
            new[self.bias] = head[-1].to(merged[self.bias])
        return like(merged, new)

    def _point(self, head: Tensor, features: FeatureSums, sums: HeadSums) -> Point:
        """Return what the pooled sums say about a head."""
        count = float(features.gram[-1, -1])
        penalty = _penalty(features)
        decayed = torch.cat([head[:-1], torch.zeros_like(head[-1:])])
        gradient = (sums.probability_sums - features.class_sums) / count + penalty * decayed
        loss = float(sums.losses[0]) / count + penalty / 2 * float(decayed.square().sum())
        held_back = float(sums.losses[1]) / sums.held_back if sums.held_back else loss
        curvature = (sums.probability_sums[-1] - sums.squares) / count
        return Point(head, loss, gradient, curvature, held_back)

    def _begin(self, features: FeatureSums, point: Point) -> Search:
        count = float(features.gram[-1, -1])
        gram = features.gram / count
        free = (features.class_sums[-1:] > 0).double().expand_as(point.head).clone()
        if self.bias is None:
            free[-1] = 0
            gram = gram.clone()
            gram[-1, :-1] = gram[:-1, -1] = 0
        ridge = _penalty(features) * torch.eye(len(gram), dtype=gram.dtype)
        return Search(torch.linalg.inv(gram + ridge), free, point)


def _penalty(features: FeatureSums) -> float:
    square = float(features.gram.diagonal()[:-1].mean() / features.gram[-1, -1])
    return PENALTY * (square if square > 0 else 1.0)


def fit_joint_head(
    model: nn.Module,
    state_dict: StateDict,
    data: Sequence[Sequence[Any]],
    method: JointHead | None = None,
) -> dict[str, Tensor]:
    """Return a model whose last layer is fitted to all data by logistic regression.

    Args:
        model: a module of the architecture, any weights; not changed.
        state_dict: the merged model.
        data: for each client its batches of inputs and labels (class numbers).
        method: the options; `JointHead()` by default.

    Raises:
        ValueError: there are no data, the labels are not class numbers, or the model does not end
            in a linear layer of its own.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> inputs = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> batches = [(inputs, (inputs[:, 0] > 0).long())]
        >>> net.load_state_dict(fit_joint_head(net, net.state_dict(), [batches]))
        <All keys matched successfully>
        >>> float((net(inputs).argmax(1) == batches[0][1]).float().mean()) > 0.8
        True
    """
    if not data or any(not len(batches) for batches in data):
        raise ValueError("no example to fit the head on")
    method = JointHead() if method is None else method
    finish = method.bind(model, (inputs_of(next(iter(data[0]))),))
    finished = finish(state_dict, LocalClients(model, [state_dict] * len(data), data))
    if finished.problems:
        raise ValueError("; ".join(finished.problems))
    return dict(like(state_dict, finished.state_dict))
