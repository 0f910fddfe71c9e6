"""Activation matching: permute one model until its units fire when another's do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fl_rebasin.forward import evaluating
from fl_rebasin.matching.assignment import assign, assign_blocks
from fl_rebasin.matching.coordinate_descent import MAX_SWEEPS, Matcher
from fl_rebasin.matching.objective import (
    check_finite,
    check_module,
    cosine,
    weights_of,
    with_weights,
)
from fl_rebasin.matching.weights import Match, best_match
from fl_rebasin.state_dicts import StateDict
from fl_rebasin.symmetry.axes import Axis, Fixed, Group, Parted, groups_of, pieces
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec

Key = tuple[str, ...]
"""A group's name; for units within blocks the names of both, the blocks first."""
HINT = 1e-4
"""Correlation that the best-fitting weights are worth: they decide between equals, up to noise."""


@dataclass(frozen=True)
class _Site:
    """Where a module shows activations: of its input or its output, and on which axes.

    Attributes:
        module: name of the module.
        at_input: whether the units are those of its input.
        dim: the axis of the units; negative ones count from the end.
        axes: expressions of this axis and of those that follow it in the weight (LayerNorm).
    """

    module: str
    at_input: bool
    dim: int
    axes: tuple[Axis, ...]


def _sites(spec: PermutationSpec, model: nn.Module) -> Iterator[_Site]:
    """Yield every place where a layer of torch.nn shows units that may move."""
    for name, module in model.named_modules():
        axes = spec.axes.get(f"{name}.weight" if name else "weight")
        if axes is None:
            continue
        if isinstance(module, nn.Linear):
            yield _Site(name, False, -1, axes[:1])
            yield _Site(name, True, -1, axes[1:])
        elif isinstance(module, nn.Embedding):
            yield _Site(name, False, -1, axes[1:])
        elif isinstance(module, _ConvNd):
            channels = -len(module.kernel_size) - 1
            across = isinstance(module, _ConvTransposeNd)
            if module.groups == 1:
                yield _Site(name, False, channels, axes[across : across + 1])
                yield _Site(name, True, channels, axes[1 - across : 2 - across])
            elif not across:
                yield _Site(name, False, channels, axes[:1])
        elif isinstance(module, (_BatchNorm, nn.GroupNorm)):
            yield _Site(name, False, 1, axes)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            yield _Site(name, False, -len(axes), axes)


def _may_move(site: _Site) -> bool:
    """Whether units of a site are free; axes that depend on another one of the weight do not count.

    The activations have no such other axis.
    """
    if any(isinstance(axis, Parted) for axis in site.axes):
        return False
    return any(True for axis in site.axes for _ in groups_of(axis))


@contextmanager
def _recording(model: nn.Module, sites: Sequence[_Site]) -> Iterator[list[tuple[_Site, Tensor]]]:
    """Collect what the sites show while the model runs."""
    seen: list[tuple[_Site, Tensor]] = []
    modules = dict(model.named_modules())

    def watch(site: _Site) -> Callable[..., None]:
        def record(
            module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any
        ) -> None:
            given = args[0] if args else keywords["input"]
            seen.append((site, (given if site.at_input else output).detach()))

        return record

    handles = [
        modules[site.module].register_forward_hook(watch(site), with_kwargs=True) for site in sites
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _units(
    site: _Site, activations: Tensor, within: Mapping[str, str]
) -> Iterator[tuple[Key, Tensor]]:
    """Yield the activations of each group at a site, shape `(units, samples)`."""
    dim = site.dim % activations.ndim
    shape = activations.shape
    axes: list[Axis] = [Fixed(size) for size in shape]
    axes[dim : dim + len(site.axes)] = site.axes
    for piece, atoms in pieces(activations, axes):
        names = [atom.name if isinstance(atom, Group) else "" for atom in atoms]
        for place, name in enumerate(names):
            if not name:
                continue
            blocks = within.get(name)
            if blocks is not None:
                if blocks in names:
                    front = piece.movedim((names.index(blocks), place), (0, 1))
                    yield (blocks, name), front.flatten(0, 1).flatten(1)
            elif not any(within.get(other) == name for other in names):
                yield (name,), piece.movedim(place, 0).flatten(1)


def _telling(
    spec: PermutationSpec, model: nn.Module, sites: Sequence[_Site], inputs: Any
) -> dict[_Site, set[Key]] | None:
    """Return the sites to go by, with the groups that each shows; None for a batch of no samples.

    Sites are what a layer takes in; for units that no layer takes in, results. What goes into the
    next layer has passed norm and nonlinearity, which is what the units do.

    Whether a site shows a group is tried: the model runs with all its units moved, which must then
    be seen to have moved there. It is not so where another axis of the activations moves too, as
    the heads over which multi-query attention has the same units, or the channels in a layer
    across patches.
    """
    turn = Permutation(
        {name: still.roll(1, -1) for name, still in spec.identity().indices.items()}, spec.within
    )
    state = {key: value.detach() for key, value in model.state_dict().items()}
    moved = spec.apply(turn, state)
    # Of a tensor with two names only one may be given.
    names = [key for key, _ in (*model.named_parameters(), *model.named_buffers()) if key in moved]
    with _recording(model, sites) as plain:
        model(inputs)
    with _recording(model, sites) as turned:
        functional_call(model, {key: moved[key] for key in names}, (inputs,))
    if plain and not any(shown.numel() for _, shown in plain):
        return None
    found: dict[_Site, dict[Key, bool]] = {}
    for (site, left), (_, right) in zip(plain, turned, strict=True):
        keys = found.setdefault(site, {})
        for (key, one), (_, two) in zip(
            _units(site, left, spec.within), _units(site, right, spec.within), strict=True
        ):
            keys[key] = keys.get(key, True) and _follows(site, one, two, _places(turn, key))
    taken_in = {
        key for site, keys in found.items() if site.at_input for key in keys if keys[key]
    }  # fmt: skip
    telling = {
        site: {key for key in keys if keys[key] and (site.at_input or key not in taken_in)}
        for site, keys in found.items()
    }
    return {site: keys for site, keys in telling.items() if keys}


def _places(permutation: Permutation, key: Key) -> Tensor:
    """Return where the units of `_units` come from."""
    if len(key) == 1:
        return permutation[key[0]]
    blocks, units = (permutation[name] for name in key)
    return (blocks[:, None] * units.shape[1] + units).flatten()


def _follows(site: _Site, before: Tensor, after: Tensor, index: Tensor) -> bool:
    """Whether units, shape `(units, samples)`, went where an index says, up to rounding."""
    rounding = (10 * torch.finfo(before.dtype).eps) ** 2
    one, two = before.double(), after.double()
    spread = (one - one.mean(1, keepdim=True)).square().sum()
    left_over = (two - one[index.to(one.device)]).square().sum()
    _check(site, left_over)
    return bool(left_over <= 1e-3 * spread + rounding * one.square().sum())


def _check(site: _Site, sums: Tensor) -> None:
    if not bool(torch.isfinite(sums).all()):
        raise ValueError(f"{site.module}: an activation is NaN or infinite")


@dataclass
class _Moments:
    """Running sums of one group: count, means, and centred sums of squares and products."""

    count: int
    means: tuple[Tensor, Tensor]
    squares: tuple[Tensor, Tensor]
    products: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> _Moments:
        """Return the sums of one batch; each side has shape `(units, samples)`."""
        sides = left.float(), right.float()
        means = sides[0].mean(1), sides[1].mean(1)
        one, other = (side - mean[:, None] for side, mean in zip(sides, means, strict=True))
        return cls(
            left.shape[1],
            (means[0].double(), means[1].double()),
            (one.square().sum(1).double(), other.square().sum(1).double()),
            (one @ other.T).double(),
        )

    def __add__(self, more: _Moments) -> _Moments:
        # Chan, Golub, LeVeque (1979): pairwise update, exact and stable.
        total = self.count + more.count
        steps = [b - a for a, b in zip(self.means, more.means, strict=True)]
        between = self.count * more.count / total
        means = [
            mean + step * (more.count / total) for mean, step in zip(self.means, steps, strict=True)
        ]
        squares = [
            a + b + step.square() * between
            for a, b, step in zip(self.squares, more.squares, steps, strict=True)
        ]
        products = self.products + more.products + torch.outer(*steps) * between
        return _Moments(total, (means[0], means[1]), (squares[0], squares[1]), products)

    @property
    def correlation(self) -> Tensor:
        """Pearson's correlation of every pair of units; 0 where one of them never varies."""
        scale = torch.outer(*(squares.sqrt() for squares in self.squares))
        # What rounding leaves of a constant is no variance.
        floors = [self.count * (1e-6 * mean).square() for mean in self.means]
        dead = [squares <= floor for squares, floor in zip(self.squares, floors, strict=True)]
        alive = ~(dead[0][:, None] | dead[1][None, :])
        return torch.where(alive, self.products / scale.clamp_min(1e-300), 0.0)


def correlations(
    spec: PermutationSpec, reference: nn.Module, other: nn.Module, batches: Iterable[Any]
) -> dict[Key, Tensor]:
    """Return how the units of two models correlate on some data, group by group.

    Args:
        spec: spec of both models.
        reference: the first model; rows of the result.
        other: the second model; columns.
        batches: inputs, or tuples and lists whose first item is the input.

    Raises:
        ValueError: there is no batch, or an activation is not finite.
    """
    sites = [site for site in _sites(spec, reference) if _may_move(site)]
    sums: dict[Key, _Moments] = {}
    telling: dict[_Site, set[Key]] | None = None
    with evaluating(reference, other), torch.no_grad():
        for batch in batches if sites else ():
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            if telling is None:
                telling = _telling(spec, reference, sites, inputs)
            if not telling:
                continue
            shown = []
            for model in (reference, other):
                with _recording(model, list(telling)) as seen:
                    model(inputs)
                shown.append(seen)
            for (site, left), (_, right) in zip(*shown, strict=True):
                for (key, one), (_, two) in zip(
                    _units(site, left, spec.within), _units(site, right, spec.within), strict=True
                ):
                    if key in telling[site] and one.shape[1]:
                        new = _Moments.of(one, two)
                        _check(site, new.products)
                        sums[key] = sums[key] + new if key in sums else new
    if sites and telling is None:
        raise ValueError("no batch to match the activations on")
    return {key: moments.correlation.cpu() for key, moments in sums.items()}


def assign_correlated(
    spec: PermutationSpec, correlated: Mapping[Key, Tensor]
) -> tuple[Permutation, list[str]]:
    """Return the permutation that maximises correlation, and the groups that no data speak of."""
    indices = dict(spec.identity().indices)
    silent = []
    for name, size in spec.groups.items():
        inside = [
            unit for unit, blocks in spec.within.items()
            if blocks == name and (name, unit) in correlated
        ]  # fmt: skip
        if name in spec.within:
            if (spec.within[name], name) not in correlated:
                silent.append(name)
        elif inside:
            gain = correlated.get((name,), torch.zeros(size, size, dtype=torch.float64))
            pairs = {
                unit: correlated[name, unit].unflatten(0, (size, -1)).unflatten(2, (size, -1))
                .transpose(1, 2)
                for unit in inside
            }  # fmt: skip
            indices[name], orders = assign_blocks(gain, pairs)
            indices |= orders
        elif (name,) in correlated:
            indices[name] = assign(correlated[name,])
        else:
            silent.append(name)
    return Permutation(indices, spec.within), silent


def settle(
    spec: PermutationSpec,
    reference: StateDict,
    other: StateDict,
    found: Permutation,
    correlated: Mapping[Key, Tensor],
    silent: Sequence[str],
) -> Matcher:
    """Let the weights decide what the data do not: silent groups, and between equal correlations.

    On little data many units of a net never fire: any order of them would do, but on other data.
    """
    target, weights = weights_of(spec, reference), weights_of(spec, other)
    matcher, _ = best_match(spec, target, weights, found, silent)
    blocks = {*spec.within.values()}
    plain = [key[0] for key in correlated if len(key) == 1 and key[0] not in blocks]
    for _ in range(MAX_SWEEPS):
        before = matcher.permutation
        for name in plain:
            order = matcher.permutation[name]
            alike = matcher.similarity(name, spec.learnable).cpu()
            hint = alike / alike.abs().max().clamp_min(torch.finfo(alike.dtype).tiny)
            matcher.place(name, assign(correlated[name,][:, order] + HINT * hint))
        if matcher.permutation == before:
            break
    return matcher


def match_activations(
    spec: PermutationSpec,
    model: nn.Module,
    reference: StateDict,
    other: StateDict,
    batches: Iterable[Any],
) -> Match:
    """Find the permutation of `other` whose units correlate best with those of `reference`.

    Only running sums are kept, `n x n` for a group of `n` units. Units are watched where they go
    into a linear or convolutional layer, else where a layer or norm puts them out. Groups that no
    layer of torch.nn shows (inside `nn.LSTM` and `nn.MultiheadAttention`), or none without another
    group that moves (heads over the same units), are matched by their weights, given the others.
    These also decide between equal correlations, as of units that never vary. Both models run in
    evaluation mode.

    Args:
        spec: spec of both models.
        model: a module of the architecture; it is copied, and its weights do not matter.
        reference: state dict that stays.
        other: state dict to be permuted; neither is changed.
        batches: unlabelled inputs, or tuples and lists whose first item is the input.

    Raises:
        TypeError: `model` is not a module.
        SpecError: a model does not fit the spec, or holds NaN or infinite weights.
        ValueError: there is no batch, or an activation is not finite.

    Source: Git Re-Basin, section 3.1; Li et al. (2015).

    Example:
        >>> from fl_rebasin import derive_spec
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> spec = derive_spec(net, torch.zeros(1, 2))
        >>> state, batches = net.state_dict(), [torch.randn(64, 2)]
        >>> match_activations(spec, net, state, state, batches).permutation.is_identity
        True
    """
    check_module(spec, model)
    check_finite(spec, reference, "reference")
    check_finite(spec, other, "other")
    left, right = with_weights(model, reference), with_weights(model, other)
    fixed, moving = left.state_dict(), right.state_dict()
    correlated = correlations(spec, left, right, batches)
    found, silent = assign_correlated(spec, correlated)
    matcher = settle(spec, fixed, moving, found, correlated, silent)
    before = cosine(weights_of(spec, fixed), weights_of(spec, moving))
    return Match(
        permutation=matcher.permutation,
        similarity=cosine(matcher.target, matcher.weights),
        similarity_before=before,
        sweeps=0,
    )
