"""`ReBasinStrategy`: permutation-aligned replies for any Flower strategy."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from logging import INFO, WARNING

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log
from torch import Tensor, nn

from fl_rebasin.flower.aggregation import Aggregate, adopt, aggregate, check_copyable, copy_of
from fl_rebasin.flower.align import Aligned, AlignmentMethod, Metrics, WeightMatching
from fl_rebasin.flower.clients import RoundClients
from fl_rebasin.flower.finishing import Variant, bind_steps, finished, variants
from fl_rebasin.flower.guard import Guard
from fl_rebasin.flower.lazy_grid import LazyGrid
from fl_rebasin.flower.limits import Limits, update_norm
from fl_rebasin.flower.replies import (
    ClientModel,
    Inbox,
    have_usual_records,
    log_dropped,
    reply_with_model,
    unchanged_reply,
    valid_evaluations,
)
from fl_rebasin.flower.round import Round
from fl_rebasin.flower.streaming import RunningMean, takes_only_the_mean
from fl_rebasin.flower.wrapper import WrappedStrategy, levels
from fl_rebasin.merging.batchnorm import BatchNorm
from fl_rebasin.merging.clients import Costs, total_costs
from fl_rebasin.merging.finishing import FinishingStep
from fl_rebasin.state_dicts import StateDict
from fl_rebasin.symmetry.derive import ExampleInputs, derive_spec
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec


@dataclass(frozen=True)
class Candidate:
    """A model that a round may end with.

    Attributes:
        arrays: the model; None if the strategy aggregated none, or one that is not finite.
        metrics: what the strategy aggregated of the replies' metrics.
        strategy: the strategy that aggregated it, in the state that goes with the model.
    """

    arrays: ArrayRecord | None
    metrics: MetricRecord | None
    strategy: Strategy


class ReBasinStrategy(WrappedStrategy):
    """Aligns the hidden units of the clients' models, then lets any strategy aggregate them.

    Each round the replies are permuted into one basin, ordered as the global model's units are, and
    handed on to the wrapped strategy, with the global model's key order. Then the finishing steps
    work on the aggregated model. Clients answer the questions of some options after
    `add_rebasin_handlers`. Where no unit moves, they are not asked about alignment.

    Finishing steps use the clients' own models: clipping, noise or a median of the wrapped strategy
    does not cover what they add.

    Args:
        strategy: any Flower strategy; `FedAvg()` by default.
        model: a module of the federation's architecture, any weights; not changed.
        example_inputs: inputs that `model` runs on; only shapes and dtypes matter.
        align: `WeightMatching()`, `ActivationMatching()` or `StraightThrough()`; None to average
            the replies unaligned.
        finish: the finishing steps in order, such as `BatchNorm()`, `LeastSquares()`, `RegMean()`,
            `Repair()` and `ClassAwareHead(...)`; empty for none.
        guard: `Guard()` lets the clients choose among several models; None for one model.
        limits: limits on the replies.

    Attributes:
        spec: the permutation spec of the model.

    Raises:
        SpecError: no spec can be derived from model and inputs.
        TypeError: an option is of the wrong kind.
        ValueError: an option does not fit the model or the wrapped strategy.

    Aggregated training metrics gain `rebasin-margin`: a factor by which the clients' distances from
    the global model could grow without any unit having to move, smallest over all groups (1 or more
    proves that alignment changes nothing, and none is computed); `rebasin-similarity-before` and
    `rebasin-similarity-after` (weighted mean cosine of the clients' models to their mean, where the
    margin is below 1); `rebasin-units-moved`, `rebasin-sweeps`, `rebasin-seconds`,
    `rebasin-dropped` (invalid replies). Each question X to the clients adds `X-clients`,
    `X-seconds`, `X-bytes` and `X-messages`; X is `matching`, `guard` or the name of a finishing
    step. `guard-loss-NAME` is the held-back loss of each candidate.

    Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin (ICLR 2023), Algorithms 1 to 3.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> strategy = ReBasinStrategy(model=net, example_inputs=torch.zeros(1, 4))
        >>> strategy.spec.groups
        {'0': 8}
    """

    transient = frozenset({"_round", "_steps", "_baseline"})

    def __init__(
        self,
        strategy: Strategy | None = None,
        *,
        model: nn.Module,
        example_inputs: ExampleInputs,
        align: AlignmentMethod | None = WeightMatching(),  # noqa: B008 (frozen)
        finish: Sequence[FinishingStep] = (BatchNorm(),),
        guard: Guard | None = None,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(strategy)
        _check_kind("align", align, "WeightMatching()", hasattr(align, "align") or align is None)
        _check_kind("guard", guard, "Guard()", isinstance(guard, Guard) or guard is None)
        _check_kind("limits", limits, "Limits(min_replies=2)", isinstance(limits, Limits))
        if isinstance(finish, str) or not isinstance(finish, Sequence):
            raise TypeError(f"finish is {finish!r}: give a list of steps, such as [BatchNorm()]")
        self.align = align
        self.finish = tuple(finish)
        self.guard = guard
        self.limits = limits
        self.spec: PermutationSpec = derive_spec(model, example_inputs)
        self._steps = bind_steps(self.finish, model, example_inputs)
        self._baseline = bind_steps([BatchNorm()] if self.finish else [], model, example_inputs)
        self._keeps_models = any(step.needs_models for step in self.finish)
        if guard is not None:
            check_copyable(self.strategy)
        self._round: Round | None = None

    def grid_for_rounds(self, grid: Grid) -> Grid:
        """Return a grid that releases each reply once it is read."""
        return LazyGrid(grid, lazy=self._streams)

    @property
    def _streams(self) -> bool:
        """Whether the server needs to hold only one client's model at a time."""
        return (
            self.align is not None
            and self.align.one_by_one
            and self.guard is None
            and not self._keeps_models
            and takes_only_the_mean(self.strategy)
        )

    @property
    def weighted_by_key(self) -> str:
        """Name of the metric that weights a reply: that of the innermost wrapped strategy."""
        return str(getattr(levels(self.strategy)[-1], "weighted_by_key", "num-examples"))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Keep the global model, then let the wrapped strategy choose clients.

        Raises:
            SpecError: the global model does not have the architecture that the spec was derived
                from, or holds NaN or infinite values.
        """
        self._round = Round.begin(self.spec, arrays, grid)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Align the replies, let the wrapped strategy aggregate them, and run the finishing steps.

        Replies that do not fit the global model are dropped, with a line in the log.
        """
        if self._round is None:
            raise RuntimeError("aggregate_train was called before configure_train")
        current = self._round
        inbox = Inbox(self.spec, current.arrays, self.weighted_by_key, self.limits.max_examples)
        if self._streams:
            return self._aggregate_one_by_one(current, server_round, inbox, replies)
        clients, aligned = self._align(current, inbox, replies)
        if len(clients) < self.limits.min_replies:
            return self._no_result(server_round, inbox, len(clients))
        alignments = {"aligned": aligned.permutations}
        if self.guard is not None:
            alignments = self.guard.alignments(current, clients, aligned.permutations)
        nodes = RoundClients(current.grid, {client.node: client.reply for client in clients})
        candidates, costs = self._candidates(
            current, server_round, inbox, clients, alignments, nodes
        )
        models = {
            name: candidate.arrays
            for name, candidate in candidates.items()
            if candidate.arrays is not None
        }
        if not models:
            last = list(candidates.values())[-1]
            adopt(self.strategy, last.strategy, current.grid)
            return None, last.metrics
        name, judged = next(iter(models)), Metrics()
        if self.guard is not None:
            choice = self.guard.choose(current.grid, nodes.ids, models)
            name, judged = choice.name, choice.metrics
        chosen = candidates[name]
        adopt(self.strategy, chosen.strategy, current.grid)
        own = {**aligned.metrics, "rebasin-dropped": inbox.dropped, **_as_metrics(costs), **judged}
        return chosen.arrays, MetricRecord({**(chosen.metrics or {}), **own})

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Delegate to the wrapped strategy, without the invalid replies."""
        key = getattr(levels(self.strategy)[-1], "weighted_by_key", None)
        valid = valid_evaluations(replies, key, self.limits.max_examples)
        return super().aggregate_evaluate(server_round, valid)

    def summary(self) -> None:
        """Log what may move and which options are set, then the wrapped strategy's summary."""
        log(
            INFO,
            "\t├──> Re-Basin: %s groups of units, %.1f %% of the parameters may move",
            len(self.spec.groups),
            100 * self.spec.freedom,
        )
        steps = ", ".join(map(str, self.finish)) or "none"
        log(INFO, "\t├──> align: %s; finish: %s; guard: %s", self.align, steps, self.guard)
        super().summary()

    def _align(
        self, current: Round, inbox: Inbox, replies: Iterable[Message]
    ) -> tuple[list[ClientModel], Aligned]:
        """Read the replies, and align those that are within the limits."""
        clients = list(inbox.read(replies))
        clients = inbox.kept(clients, have_usual_records([client.reply for client in clients]))
        # A model that is too far away in any unit order has no say in how others are aligned.
        clients = inbox.kept(clients, [self._is_near(current, client, None) for client in clients])
        if len(clients) < self.limits.min_replies:
            return clients, Aligned([])
        if self.align is None:
            aligned = Aligned([self.spec.identity() for _ in clients])
        else:
            aligned = self.align.align(current, clients)
        pairs = list(zip(clients, aligned.permutations, strict=True))
        near = [self._is_near(current, client, permutation) for client, permutation in pairs]
        kept = [pair[1] for pair, is_near in zip(pairs, near, strict=True) if is_near]
        return inbox.kept(clients, near), replace(aligned, permutations=kept)

    def _is_near(
        self, current: Round, client: ClientModel, permutation: Permutation | None
    ) -> bool:
        """Whether a model is within `max_update_norm` of the global one; log it if not."""
        most = self.limits.max_update_norm
        if most is None:
            return True
        norm = update_norm(self.spec, current.global_model, client.state_dict, permutation)
        if norm <= most:
            return True
        least = "at least " if permutation is None else ""
        log_dropped(
            client.reply, f"its update has norm {least}{norm:.4g}, at most {most:.4g} is allowed"
        )
        return False

    def _candidates(
        self,
        current: Round,
        server_round: int,
        inbox: Inbox,
        clients: list[ClientModel],
        alignments: Mapping[str, Sequence[Permutation]],
        nodes: RoundClients,
    ) -> tuple[dict[str, Candidate], list[Costs]]:
        """Aggregate each alignment, and finish the results.

        Returns:
            The candidates by name, and what the questions to the clients cost.
        """
        candidates: dict[str, Candidate] = {}
        costs: list[Costs] = []
        for place, (name, permutations) in enumerate(alignments.items(), 1):
            alone, last = len(alignments) == 1, place == len(alignments)
            # The wrapped strategy may keep state: each candidate has a copy of its own.
            trial = self.strategy if alone else copy_of(self.strategy, current.grid)
            rebuilt, models = self._rebuilt(current, clients, permutations, last=last)
            arrays, metrics = aggregate(
                trial, current.arrays, server_round, [*inbox.failed, *rebuilt]
            )
            del rebuilt
            # Flower's views of records are reference cycles, which would keep all the models.
            gc.collect(1)
            if arrays is None:
                candidates[name] = Candidate(None, metrics, trial)
                continue
            found, spent = self._finished(arrays, replace(nodes, models=models), server_round)
            costs += spent
            for variant in found:
                candidates[name + variant.name] = Candidate(variant.arrays, metrics, trial)
        return candidates, costs

    def _finished(
        self, arrays: ArrayRecord, nodes: RoundClients, server_round: int
    ) -> tuple[list[Variant], list[Costs]]:
        """Return the models to choose from, and what the questions to the clients cost."""
        if self.guard is None:
            steps = list(finished(self._steps, arrays, nodes, server_round))
            return (steps or [Variant("", arrays, {})])[-1:], [step.costs for step in steps]
        found = list(variants(self._steps, self._baseline, arrays, nodes, server_round))
        usable = [variant for variant in found if variant.applied or not variant.name]
        return usable, [variant.costs for variant in found]

    def _rebuilt(
        self,
        current: Round,
        clients: list[ClientModel],
        permutations: Sequence[Permutation],
        *,
        last: bool,
    ) -> tuple[list[Message], dict[int, StateDict]]:
        """Return replies with permuted models, and the models by node if a step needs them.

        The last time each model is released as soon as its reply is rebuilt.
        """
        rebuilt: list[Message] = []
        models: dict[int, StateDict] = {}
        for place, (client, permutation) in enumerate(zip(clients, permutations, strict=True)):
            model: StateDict = client.state_dict
            if permutation.is_identity:
                rebuilt.append(unchanged_reply(client, current.arrays))
            elif self._keeps_models:
                model = self.spec.apply(permutation, model)
                rebuilt.append(
                    reply_with_model(client, ((key, model[key]) for key in current.arrays))
                )
            else:
                rebuilt.append(reply_with_model(client, _moved(current, client, permutation)))
            if self._keeps_models:
                models[client.node] = model
            elif last:
                clients[place] = replace(client, state_dict={}, record=None)
        return rebuilt, models

    def _aggregate_one_by_one(
        self, current: Round, server_round: int, inbox: Inbox, replies: Iterable[Message]
    ) -> Aggregate:
        """Align each reply to the global model as it arrives, and keep only the sum."""
        assert self.align is not None
        started = time.perf_counter()
        mean = RunningMean(current.arrays)
        units = 0
        for client in inbox.read(replies):
            permutation = self.align.align_one(current, client)
            if inbox.kept([client], [self._is_near(current, client, permutation)]):
                mean.add(client, self.spec.apply(permutation, client.state_dict))
                units += permutation.moved
            del client  # Before the next one is read.
        if mean.count < self.limits.min_replies:
            return self._no_result(server_round, inbox, mean.count)
        seconds = time.perf_counter() - started
        log(
            INFO,
            "aligned %s models one by one: %s units moved, %.2f s",
            mean.count,
            units,
            seconds,
        )
        nodes = RoundClients(current.grid, mean.replies)
        reply, metrics = mean.finish(self.strategy)
        arrays, _ = aggregate(self.strategy, current.arrays, server_round, [*inbox.failed, reply])
        if arrays is None:
            return None, metrics
        (variant,), costs = self._finished(arrays, nodes, server_round)
        own: Metrics = {
            "rebasin-units-moved": units,
            "rebasin-seconds": seconds,
            "rebasin-dropped": inbox.dropped,
        }
        return variant.arrays, MetricRecord({**metrics, **own, **_as_metrics(costs)})

    def _no_result(self, server_round: int, inbox: Inbox, count: int) -> Aggregate:
        """Log why a round has no result; the wrapped strategy gets the failed replies."""
        log(
            WARNING,
            "round %s: %s valid replies, %s are needed: the global model stays unchanged",
            server_round,
            count,
            self.limits.min_replies,
        )
        self.strategy.aggregate_train(server_round, inbox.failed)
        return None, None


def _moved(
    current: Round, client: ClientModel, permutation: Permutation
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a permuted model in the global model's key order, one at a time."""
    for key in current.arrays:
        yield key, current.spec.move(key, client.state_dict[key], permutation)


def _as_metrics(costs: Sequence[Costs]) -> Metrics:
    """Return the sum of costs as metrics."""
    return {
        key: value
        for name, cost in total_costs(costs).items()
        for key, value in cost.metrics(name).items()
    }


def _check_kind(name: str, value: object, example: str, valid: bool) -> None:
    if isinstance(value, type) or not valid:
        raise TypeError(f"{name} is {value!r}: give an object such as {example}")
