"""`ReBasinStrategy`: permutation-aligned replies for any Flower strategy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from logging import INFO, WARNING

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log
from torch import nn

from fl_rebasin.flower.aggregation import Aggregate, adopt, aggregate, check_copyable
from fl_rebasin.flower.align import Aligned, AlignmentMethod, Metrics, OneByOne, WeightMatching
from fl_rebasin.flower.candidates import form_candidates
from fl_rebasin.flower.finishing import Finishing
from fl_rebasin.flower.guard import Guard
from fl_rebasin.flower.lazy_grid import LazyGrid
from fl_rebasin.flower.limits import Limits, update_norm
from fl_rebasin.flower.replies import (
    ClientModel,
    Inbox,
    have_usual_records,
    log_dropped,
    valid_evaluations,
)
from fl_rebasin.flower.round import Round
from fl_rebasin.flower.round_clients import RoundClients
from fl_rebasin.flower.streaming import needs_only_the_mean, sum_one_by_one
from fl_rebasin.flower.wrapper import WrappedStrategy, levels
from fl_rebasin.merging.batchnorm import BatchNorm
from fl_rebasin.merging.clients import Costs, total_costs
from fl_rebasin.merging.finishing_step import FinishingStep
from fl_rebasin.symmetry.derive import ExampleInputs, derive_spec
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec


class ReBasinStrategy(WrappedStrategy):
    """Aligns the hidden units of the clients' models, then lets any strategy aggregate them.

    Each round it permutes the replies into one basin, in the global model's unit order and key
    order, and hands them to the wrapped strategy. Then the finishing steps work on the aggregated
    model. Some options ask the clients questions, which they answer after `add_rebasin_handlers`.
    If no unit moves, they are not asked about alignment.

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

    Aggregated training metrics gain:

    - `rebasin-dropped`: number of invalid replies;
    - `rebasin-units-moved` and `rebasin-seconds`, unless `align` is None;
    - `rebasin-margin` and `rebasin-sweeps`, if the models are aligned to one another: the margin is
      a factor by which the clients' distances from the global model could grow without any unit
      having to move, smallest over all groups. 1 or more proves that alignment changes nothing;
    - `rebasin-similarity-before` and `rebasin-similarity-after`, unless the margin is at least 1 or
      the server holds one model at a time: weighted mean cosine of the models to their mean;
    - `X-clients`, `X-seconds`, `X-bytes` and `X-messages` for each question X to the clients:
      `matching`, `guard` or the name of a finishing step;
    - `guard-loss-NAME`: the held-back loss of each candidate.

    Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin (ICLR 2023), Algorithms 1 to 3.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> strategy = ReBasinStrategy(model=net, example_inputs=torch.zeros(1, 4))
        >>> strategy.spec.groups
        {'0': 8}
    """

    transient = frozenset({"_round", "_finishing"})

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
        self.model = model
        self.align = align
        self.finish = tuple(finish)
        self.guard = guard
        self.limits = limits
        self.spec: PermutationSpec = derive_spec(model, example_inputs)
        self._finishing = Finishing.bind(
            self.finish, model, example_inputs, keep_all=guard is not None
        )
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
            isinstance(self.align, OneByOne)
            and self.align.one_by_one
            and self.guard is None
            and not self._finishing.needs_models
            and needs_only_the_mean(self.strategy)
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
        self._round = Round.begin(server_round, self.spec, arrays, grid)
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
            return self._aggregate_one_by_one(current, inbox, replies)
        clients, aligned = self._align(current, inbox, replies)
        if len(clients) < self.limits.min_replies:
            return self._no_result(current, inbox, len(clients))
        alignments = {"aligned": aligned.permutations}
        if self.guard is not None:
            alignments = self.guard.alignments(current, clients, aligned.permutations)
        candidates, costs = form_candidates(
            self.strategy, current, clients, inbox.failed, alignments, self._finishing
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
            choice = self.guard.choose(current.grid, [c.node for c in clients], models)
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
        # A model that is too far away in every unit order must not affect how others are aligned.
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

    def _aggregate_one_by_one(
        self, current: Round, inbox: Inbox, replies: Iterable[Message]
    ) -> Aggregate:
        """Align each reply to the global model as it arrives, and keep only the sum."""
        assert isinstance(self.align, OneByOne)
        align_one = self.align.align_one

        def is_near(client: ClientModel, permutation: Permutation) -> bool:
            return self._is_near(current, client, permutation)

        mean, own = sum_one_by_one(current, inbox, replies, align_one, is_near)
        if mean.count < self.limits.min_replies:
            return self._no_result(current, inbox, mean.count)
        reply, metrics = mean.finish(self.strategy)
        replies = [*inbox.failed, reply]
        arrays, _ = aggregate(self.strategy, current.arrays, current.number, replies)
        if arrays is None:
            return None, metrics
        round_clients = RoundClients(current.grid, mean.replies, weights=mean.weights)
        (variant,), costs = self._finishing.apply(arrays, round_clients, current.number)
        return variant.arrays, MetricRecord({**metrics, **own, **_as_metrics(costs)})

    def _no_result(self, current: Round, inbox: Inbox, count: int) -> Aggregate:
        """Log why a round has no result; the wrapped strategy gets the failed replies."""
        log(
            WARNING,
            "round %s: %s valid replies, %s are needed: the global model stays unchanged",
            current.number,
            count,
            self.limits.min_replies,
        )
        self.strategy.aggregate_train(current.number, inbox.failed)
        return None, None


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
