"""`ReBasinStrategy`: permutation-aligned replies for any Flower strategy."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from logging import INFO, WARNING
from typing import get_args

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log
from torch import Tensor, nn

from fl_rebasin.flower.align import Aligner, AlignTo, Matching, Metrics
from fl_rebasin.flower.finishing import Finisher, LeastSquares
from fl_rebasin.flower.guard import choose_on_clients
from fl_rebasin.flower.lazy_grid import LazyGrid
from fl_rebasin.flower.replies import (
    MAX_EXAMPLES,
    ClientModel,
    Inbox,
    all_finite,
    have_usual_records,
    like_global,
    log_dropped,
    reply_with_model,
    unchanged_reply,
    valid_evaluations,
)
from fl_rebasin.flower.streaming import RunningMean, needs_only_the_mean
from fl_rebasin.flower.wrapper import WrappedStrategy, levels
from fl_rebasin.matching.many import all_still
from fl_rebasin.matching.objective import check_finite
from fl_rebasin.merging.heads import last_layer
from fl_rebasin.merging.least_squares import MAX_FEATURES, plan
from fl_rebasin.state_dicts import StateDict
from fl_rebasin.symmetry.derive import ExampleInputs, derive_spec
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec


class ReBasinStrategy(WrappedStrategy):
    """Aligns the hidden units of the clients' models, then lets any strategy aggregate them.

    Each round the replies are permuted into one basin (MergeMany with the replies' example counts
    as weights, then to the unit order of the global model) and handed on, in the global model's
    key order, to the wrapped strategy. The wrapped strategy does everything else.

    What else can be switched on asks the round's clients, who have the data; they answer after
    `add_rebasin_handlers`. Where no unit moves, nobody is asked about alignment.

    Least squares and class-aware heads go by the clients' own models: clipping, noise or a median
    of the wrapped strategy does not cover what they add.

    Args:
        strategy: any Flower strategy; `FedAvg()` by default.
        model: a module of the federation's architecture, any weights; not changed.
        example_inputs: inputs that `model` runs on; only shapes and dtypes matter.
        matching: `"weights"`, on the server; `"activations"`: each client matches its model to
            that of the client with the most examples, by correlated activations on its own data;
            `"activations-then-weights"`: and MergeMany goes on from there; `"straight-through"`:
            each client learns the permutation by the merged model's loss; `"none"`: no alignment,
            for the sake of what follows.
        least_squares: fit the layers of the merged model to what the clients' own models compute:
            `"layerwise"` (a message a layer), `"one-pass"` (RegMean, one message) or
            `"rescaling"` (only mean and deviation of each unit: REPAIR).
        max_features: inputs of a unit up to which a layer is fitted by least squares; the units of
            larger layers are rescaled.
        recalibrate_batchnorm: re-estimate the BatchNorm statistics of the merged model on the
            round's clients. A model without BatchNorm skips it; so does one fitted by least
            squares, which has the statistics that fit it.
        label_counts: name of a metric of the replies that lists the client's training examples of
            each class. The rows of the last layer are averaged by these counts, and its bias is
            corrected for the label prior; with least squares, what the clients' own models compute
            is corrected instead.
        align_to: what the models are aligned to: `"joint"`, one another, wherever they lie;
            `"global"`, each to the global model, by itself. The latter is for rounds that go on
            from a trained model: no client has a say in how another one is aligned, and unless
            least squares, heads, the guard or the wrapped strategy need them all at once, replies
            are taken one by one, and their sum is all that is kept.
        min_replies: with fewer good replies the global model stays as it is.
        max_examples: a reply that claims more training examples is dropped.
        max_update_norm: a reply whose aligned model lies farther from the global model (Euclidean
            norm over all floating-point tensors) is dropped; None: any is taken.
        guard: form several models (naive; aligned; aligned to the client with the most examples;
            each with least squares and class-aware heads where these are on), let the round's
            clients evaluate them on held-back data, and keep the best by the example-weighted
            loss, each at the temperature that suits it. The wrapped strategy aggregates once for
            each; it keeps the state of the one that is chosen.

    Attributes:
        spec: the permutation spec of the model.

    Raises:
        SpecError: no spec can be derived from model and inputs.
        ValueError: an unknown option, or options that exclude each other.

    Aggregated training metrics gain `rebasin-margin`: the factor, or less, by which the clients'
    distances from the global model could grow and still no unit would have to move, smallest over
    all groups (of 1 or more it proves that alignment changes nothing, and none is computed);
    `rebasin-similarity-before`, `rebasin-similarity-after` (weighted mean cosine of the clients'
    models to their mean, where the margin is below 1), `rebasin-units-moved`, `rebasin-sweeps`,
    `rebasin-seconds`, `rebasin-dropped` (replies that were no good); and for what
    the clients are asked, `X-clients`, `X-seconds` and `X-bytes`, X being `matching`,
    `least-squares`, `batchnorm` or `guard`; `guard-loss-NAME` is the held-back loss of each
    candidate.

    Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin (ICLR 2023), Algorithms 1 to 3.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> strategy = ReBasinStrategy(model=net, example_inputs=torch.zeros(1, 4))
        >>> strategy.spec.groups
        {'0': 8}
    """

    transient = frozenset({"_aligner", "_arrays", "_grid"})

    def __init__(
        self,
        strategy: Strategy | None = None,
        *,
        model: nn.Module,
        example_inputs: ExampleInputs,
        matching: Matching = "weights",
        least_squares: LeastSquares = "none",
        max_features: int = MAX_FEATURES,
        recalibrate_batchnorm: bool = True,
        label_counts: str | None = None,
        guard: bool = False,
        align_to: AlignTo = "joint",
        min_replies: int = 1,
        max_examples: float = MAX_EXAMPLES,
        max_update_norm: float | None = None,
    ) -> None:
        super().__init__(strategy)
        for name, value, known in (
            ("matching", matching, get_args(Matching)),
            ("least_squares", least_squares, get_args(LeastSquares)),
            ("align_to", align_to, get_args(AlignTo)),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(known)}")
        if align_to == "global" and matching not in ("none", "weights"):
            raise ValueError(f"align_to='global' matches weights, matching={matching!r} does not")
        if min_replies < 1:
            raise ValueError(f"min_replies must be at least 1, got {min_replies}")
        if not 0 < max_examples < float("inf"):
            raise ValueError(f"max_examples must be positive and finite, got {max_examples}")
        if max_update_norm is not None and not max_update_norm > 0:
            raise ValueError(f"max_update_norm must be positive, got {max_update_norm}")
        self.align_to = align_to
        self.min_replies = min_replies
        self.max_examples = max_examples
        self.max_update_norm = max_update_norm
        self.model = model
        self.matching = matching
        self.least_squares = least_squares
        self.recalibrate_batchnorm = recalibrate_batchnorm
        self.label_counts = label_counts
        self.guard = guard
        self.spec: PermutationSpec = derive_spec(model, example_inputs)
        limit = 0 if least_squares == "rescaling" else max_features
        self._steps = plan(model, example_inputs, limit) if least_squares != "none" else []
        self._head = last_layer(model, example_inputs) if label_counts is not None else None
        if guard:
            try:
                copy.deepcopy(self.strategy)
            except Exception as error:
                raise ValueError(
                    "the guard needs a wrapped strategy that can be copied, "
                    f"{type(self.strategy).__name__} cannot: {error}"
                ) from error
        self._arrays: ArrayRecord | None = None
        self._grid: Grid | None = None
        self._aligner: Aligner | None = None

    def grid_for_rounds(self, grid: Grid) -> Grid:
        """Return a grid that releases each reply once it is read."""
        return LazyGrid(grid, lazy=self._streams)

    @property
    def _streams(self) -> bool:
        """Whether nothing needs more than one client's model at a time."""
        return (
            self.align_to == "global"
            and not self.guard
            and self.least_squares == "none"
            and self._head is None
            and needs_only_the_mean(self.strategy)
        )

    @property
    def _finisher(self) -> Finisher:
        return Finisher(
            model=self.model,
            grid=self._grid,
            least_squares=self.least_squares,
            steps=self._steps,
            recalibrate_batchnorm=self.recalibrate_batchnorm,
            label_counts=self.label_counts,
            head=self._head,
            every=self.guard,
        )

    @property
    def weighted_by_key(self) -> str:
        """Name of the metric that weighs a reply: that of the innermost wrapped strategy."""
        return str(getattr(levels(self.strategy)[-1], "weighted_by_key", "num-examples"))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Keep the global model, then let the wrapped strategy choose clients.

        Raises:
            SpecError: the global model is not of the architecture that the spec was derived from,
                or holds NaN or infinite values.
        """
        gauge = arrays.to_torch_state_dict()
        check_finite(self.spec, gauge, "global model")
        self._arrays = arrays
        self._grid = grid
        self._aligner = Aligner(self.spec, gauge, self.matching, self.align_to, grid)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Align the replies, aggregate them with the wrapped strategy, fit what is switched on.

        Replies that do not fit the global model are dropped, with a line in the log.
        """
        if self._arrays is None or self._aligner is None:
            raise RuntimeError("aggregate_train was called before configure_train")
        inbox = Inbox(self.spec, self._arrays, self.weighted_by_key, self.max_examples)
        if self._streams:
            return self._stream(server_round, inbox, replies)
        clients = list(inbox.read(replies))
        clients = inbox.kept(clients, have_usual_records([client.reply for client in clients]))
        # What is far away at first sight has no say in how the others are aligned.
        clients = inbox.kept(clients, [self._is_near(client, None) for client in clients])
        orders: list[Permutation] = []
        own: Metrics = {}
        if len(clients) >= self.min_replies:
            orders, own = self._aligner.align(clients)
            near = [self._is_near(*pair) for pair in zip(clients, orders, strict=True)]
            orders = [order for order, kept in zip(orders, near, strict=True) if kept]
            clients = inbox.kept(clients, near)
        if len(clients) < self.min_replies:
            return self._nothing(server_round, inbox, len(clients))
        own["rebasin-dropped"] = inbox.dropped
        candidates = {"aligned": orders}
        if self.guard and not all_still(orders):
            candidates |= self._aligner.alternatives(clients, orders)
        finisher = self._finisher
        counts = finisher.counts(clients)
        nodes = [client.node for client in clients]
        results: dict[str, tuple[ArrayRecord, MetricRecord | None, Strategy]] = {}
        for place, (name, order) in enumerate(candidates.items(), 1):
            # Each candidate is aggregated by a strategy of its own, which may have a memory.
            trial = self.strategy if len(candidates) == 1 else self._copied()
            remade, aligned = self._remade(clients, order, last=place == len(candidates))
            arrays, metrics = self._aggregated(trial, server_round, [*inbox.failed, *remade])
            del remade
            # Flower's views of records are cycles, young ones, which would keep all the models.
            gc.collect(1)
            if arrays is None:
                continue
            for variant, made in finisher.variants(nodes, aligned, arrays, counts, own).items():
                # The aggregate itself has been looked at.
                usable = made is arrays or self._is_usable(made, server_round)
                made = made if usable else arrays
                results[name + variant] = made, metrics, trial
        if not results:
            self._adopt(trial)
            return None, metrics
        best = next(iter(results))
        if len(results) > 1 and self._grid is not None:
            models = {name: arrays for name, (arrays, _, _) in results.items()}
            best, judged = choose_on_clients(self._grid, nodes, models)
            own |= judged
        arrays, metrics, chosen = results[best]
        self._adopt(chosen)
        return arrays, MetricRecord({**(metrics or {}), **own})

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """As the wrapped strategy, without the replies that are no good."""
        key = getattr(levels(self.strategy)[-1], "weighted_by_key", None)
        return super().aggregate_evaluate(
            server_round, valid_evaluations(replies, key, self.max_examples)
        )

    def _nothing(
        self, server_round: int, inbox: Inbox, count: int
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Say why a round has no result; the wrapped strategy hears of the clients that failed."""
        log(
            WARNING,
            "round %s: %s good replies, %s are needed: the global model stays as it was",
            *(server_round, count, self.min_replies),
        )
        self.strategy.aggregate_train(server_round, inbox.failed)
        return None, None

    def _aggregated(
        self, strategy: Strategy, server_round: int, replies: list[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let a strategy aggregate; where the result is not finite, it never happened."""
        assert self._arrays is not None
        # Flower's strategies bind new values to their attributes and do not write into old ones.
        before = [dict(vars(each)) for each in levels(strategy)]
        with np.errstate(over="ignore", invalid="ignore"):  # What overflows is found below.
            arrays, metrics = strategy.aggregate_train(server_round, replies)
        if arrays is None:
            return None, metrics
        arrays = like_global(arrays, self._arrays)
        if self._is_usable(arrays, server_round):
            return arrays, metrics
        for each, attributes in zip(levels(strategy), before, strict=True):
            vars(each).clear()
            vars(each).update(attributes)
        return None, metrics

    def _is_usable(self, arrays: ArrayRecord, server_round: int) -> bool:
        """Whether an aggregated model is finite; say so if not."""
        usable = all_finite(arrays)
        if not usable:
            log(
                WARNING,
                "round %s: the aggregated model holds NaN or infinite values and is not taken",
                server_round,
            )
        return usable

    def _is_near(self, client: ClientModel, permutation: Permutation | None) -> bool:
        """Whether a model is within `max_update_norm` of the global one; say so if not.

        As long as no permutation is known, only the lengths of its tensors can tell: no
        permutation changes them.
        """
        if self.max_update_norm is None:
            return True
        assert self._aligner is not None
        squares = 0.0
        for key, home in self._aligner.gauge.items():
            value = client.state_dict[key]
            if not value.is_floating_point():
                continue
            if permutation is None:
                squares += (_length(value) - _length(home)) ** 2
            else:
                squares += _length(self.spec.move(key, value, permutation).double() - home) ** 2
        if squares**0.5 <= self.max_update_norm:
            return True
        most = f"at most {self.max_update_norm:.4g} is allowed"
        least = "at least " if permutation is None else ""
        log_dropped(client.reply, f"its update has norm {least}{squares**0.5:.4g}, {most}")
        return False

    def _remade(
        self, clients: list[ClientModel], orders: Sequence[Permutation], *, last: bool
    ) -> tuple[list[Message], dict[int, StateDict]]:
        """Return replies with permuted models, and these by node where they are asked for again.

        The last time each model is let go as soon as its reply is made.
        """
        assert self._arrays is not None
        again = self.least_squares != "none" or self._head is not None
        remade: list[Message] = []
        models: dict[int, StateDict] = {}
        for place, (client, permutation) in enumerate(zip(clients, orders, strict=True)):
            model: StateDict = client.state_dict
            if permutation.is_identity:
                remade.append(unchanged_reply(client, self._arrays))
            else:
                moved = (
                    (key, self.spec.move(key, client.state_dict[key], permutation))
                    for key in self._arrays
                )
                model = dict(moved) if again else {}
                remade.append(reply_with_model(client, model.items() if again else moved))
            if again:
                models[client.node] = model
            elif last:
                clients[place] = replace(client, state_dict={}, record=None)
        return remade, models

    def _stream(
        self, server_round: int, inbox: Inbox, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Align one reply after the other to the global model, and keep only their sum."""
        assert self._arrays is not None
        assert self._aligner is not None
        started = time.perf_counter()
        mean = RunningMean(self._arrays)
        units = 0
        for client in inbox.read(replies):
            permutation = self._aligner.to_global(client)
            if inbox.kept([client], [self._is_near(client, permutation)]):
                mean.add(client, self.spec.apply(permutation, client.state_dict))
                units += permutation.moved
            del client  # Before the next one is read.
        if mean.count < self.min_replies:
            return self._nothing(server_round, inbox, mean.count)
        seconds = time.perf_counter() - started
        log(
            INFO,
            "aligned %s models one by one: %s units moved, %.2f s",
            *(mean.count, units, seconds),
        )
        nodes = mean.nodes
        reply, metrics = mean.finish(self.strategy)
        arrays, _ = self._aggregated(self.strategy, server_round, [*inbox.failed, reply])
        if arrays is None:
            return None, metrics
        own: Metrics = {
            "rebasin-units-moved": units,
            "rebasin-seconds": seconds,
            "rebasin-dropped": inbox.dropped,
        }
        made = self._finisher.recalibrated(nodes, arrays, own)
        if made is not arrays and not self._is_usable(made, server_round):
            made = arrays
        return made, MetricRecord({**metrics, **own})

    def _copied(self) -> Strategy:
        """Return a copy of the wrapped strategy and its memory; a grid that it keeps is shared."""
        return copy.deepcopy(self.strategy, {id(self._grid): self._grid})

    def _adopt(self, chosen: Strategy) -> None:
        """Give the wrapped strategies the memory of their copies; they stay the same objects."""
        if chosen is self.strategy:
            return
        pairs = list(zip(levels(self.strategy), levels(chosen), strict=True))
        memo = {id(self._grid): self._grid, **{id(copied): old for old, copied in pairs}}
        for old, copied in pairs:
            vars(old).update(copy.deepcopy(vars(copied), memo))

    def summary(self) -> None:
        """Log what may move, then what the wrapped strategy has to say."""
        log(
            INFO,
            "\t├──> Re-Basin: %s groups of units, %.1f %% of the parameters may move",
            *(len(self.spec.groups), 100 * self.spec.freedom),
        )
        log(
            INFO,
            "\t├──> matching: %s; least squares: %s; guard: %s",
            *(self.matching, self.least_squares, "on" if self.guard else "off"),
        )
        super().summary()


def _length(values: Tensor) -> float:
    """Return the Euclidean norm of a tensor, in float64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
