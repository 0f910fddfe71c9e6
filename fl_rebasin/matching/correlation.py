"""Correlations between the units of two models on data, from running sums."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_rebasin.forward import Moments, evaluating, inputs_of
from fl_rebasin.matching.sites import Key, Site, recording, sites_of
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec

MAX_RESIDUAL = 1e-3
"""Activations count as permuted if the squared error is at most this share of their variance."""


@dataclass(frozen=True)
class CrossMoments:
    """Moments of the units of two models, and the cross products between them.

    Two of them add up exactly: with delta = mean_b - mean_a on either side and n = n_a + n_b,

        products = products_a + products_b + delta_left delta_right^T * n_a * n_b / n

    Attributes:
        left: moments of the first model's units.
        right: moments of the second model's units, over the same samples.
        products: `sum (x_i - mean x_i) (y_j - mean y_j)` over the samples, shape `(left, right)`.

    Source: Chan, Golub, LeVeque (1979).
    """

    left: Moments
    right: Moments
    products: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> CrossMoments:
        """Return the moments of one batch, computed in float32 and stored in float64.

        Args:
            left: activations of the first model, shape `(units, samples)`.
            right: activations of the second model, likewise.
        """
        left, right = left.float(), right.float()
        products = (left - left.mean(1)[:, None]) @ (right - right.mean(1)[:, None]).T
        return cls(_in_double(Moments.of(left)), _in_double(Moments.of(right)), products.double())

    def __add__(self, other: CrossMoments) -> CrossMoments:
        left, right = self.left + other.left, self.right + other.right
        deltas = other.left.mean - self.left.mean, other.right.mean - self.right.mean
        between = self.left.count * other.left.count / left.count
        products = self.products + other.products + torch.outer(*deltas) * between
        return CrossMoments(left, right, products)

    @property
    def correlation(self) -> Tensor:
        """Pearson's correlation of every pair of units; 0 where one of them is constant.

        corr[i, j] = products[i, j] / sqrt(squares_i * squares_j)
        """
        scale = torch.outer(self.left.squares.sqrt(), self.right.squares.sqrt())
        alive = ~(_constant(self.left)[:, None] | _constant(self.right)[None, :])
        return torch.where(alive, self.products / scale.clamp_min(1e-300), 0.0)


def _in_double(moments: Moments) -> Moments:
    return Moments(moments.count, moments.mean.double(), moments.squares.double())


def _constant(moments: Moments) -> Tensor:
    """Return which units are constant up to the rounding of their mean, shape `(units,)`."""
    return moments.squares <= moments.count * (1e-6 * moments.mean).square()


def correlations(
    spec: PermutationSpec, reference: nn.Module, other: nn.Module, batches: Iterable[Any]
) -> dict[Key, Tensor]:
    """Return the correlations between the units of two models for each observable group.

    Args:
        spec: spec of both models.
        reference: the first model; its units are the rows.
        other: the second model; its units are the columns.
        batches: inputs, or tuples and lists whose first item is the input.

    Raises:
        ValueError: there is no batch, or an activation is not finite.
    """
    sites = sites_of(spec, reference)
    sums: dict[Key, CrossMoments] = {}
    observable: dict[Site, set[Key]] | None = None
    with evaluating(reference, other), torch.no_grad():
        for batch in batches if sites else ():
            inputs = inputs_of(batch)
            if observable is None:
                observable = _observable_groups(spec, reference, sites, inputs)
            for key, moments in _batch_moments(spec, reference, other, observable or {}, inputs):
                sums[key] = sums[key] + moments if key in sums else moments
    if sites and observable is None:
        raise ValueError("no batch to match the activations on")
    return {key: moments.correlation.cpu() for key, moments in sums.items()}


def _batch_moments(
    spec: PermutationSpec,
    reference: nn.Module,
    other: nn.Module,
    observable: Mapping[Site, set[Key]],
    inputs: Any,
) -> Iterator[tuple[Key, CrossMoments]]:
    """Yield the moments of each group at each of its sites on one batch."""
    if not observable:
        return
    with recording(reference, list(observable)) as at_reference:
        reference(inputs)
    with recording(other, list(observable)) as at_other:
        other(inputs)
    for (site, left), (_, right) in zip(at_reference, at_other, strict=True):
        pairs = zip(site.units(left, spec.within), site.units(right, spec.within), strict=True)
        for (key, one), (_, two) in pairs:
            if key in observable[site] and one.shape[1]:
                moments = CrossMoments.of(one, two)
                _check_finite(site, moments.products)
                yield key, moments


def _observable_groups(
    spec: PermutationSpec, model: nn.Module, sites: Sequence[Site], inputs: Any
) -> dict[Site, set[Key]] | None:
    """Return the sites to use, with the groups to observe at each; None for an empty batch.

    A group is observed at the inputs of layers, since these have passed norm and nonlinearity;
    a group that no layer takes as an input is observed at outputs.

    To find out whether a site shows a group, the model runs once more with all its units shifted
    by one place, and the activations must shift likewise. They do not if another axis of the
    activations moves too: the heads over which multi-query attention has the same units, or the
    channels in a layer across patches.
    """
    identity = spec.identity().indices
    shift = Permutation({name: index.roll(1, -1) for name, index in identity.items()}, spec.within)
    state = {key: value.detach() for key, value in model.state_dict().items()}
    shifted = spec.apply(shift, state)
    # A tensor with two names is given under one of them only.
    names = [key for key, _ in (*model.named_parameters(), *model.named_buffers()) if key in state]
    with recording(model, sites) as plain:
        model(inputs)
    with recording(model, sites) as moved:
        functional_call(model, {key: shifted[key] for key in names}, (inputs,))
    if plain and not any(activations.numel() for _, activations in plain):
        return None
    follows: dict[Site, dict[Key, bool]] = {}
    for (site, left), (_, right) in zip(plain, moved, strict=True):
        of_site = follows.setdefault(site, {})
        pairs = zip(site.units(left, spec.within), site.units(right, spec.within), strict=True)
        for (key, one), (_, two) in pairs:
            index = _unit_index(shift, key)
            of_site[key] = of_site.get(key, True) and _is_permuted(site, one, two, index)
    at_inputs = {
        key for site in follows if site.at_input for key in follows[site] if follows[site][key]
    }
    observable = {
        site: {key for key in keys if keys[key] and (site.at_input or key not in at_inputs)}
        for site, keys in follows.items()
    }
    return {site: keys for site, keys in observable.items() if keys}


def _unit_index(permutation: Permutation, key: Key) -> Tensor:
    """Return the index tensor that permutes the units of `Site.units`."""
    if len(key) == 1:
        return permutation[key[0]]
    blocks, units = (permutation[name] for name in key)
    return (blocks[:, None] * units.shape[1] + units).flatten()


def _is_permuted(site: Site, before: Tensor, after: Tensor, index: Tensor) -> bool:
    """Return whether activations, shape `(units, samples)`, are permuted by an index tensor."""
    rounding = (10 * torch.finfo(before.dtype).eps) ** 2
    one, two = before.double(), after.double()
    spread = (one - one.mean(1, keepdim=True)).square().sum()
    residual = (two - one[index.to(one.device)]).square().sum()
    _check_finite(site, residual)
    return bool(residual <= MAX_RESIDUAL * spread + rounding * one.square().sum())


def _check_finite(site: Site, sums: Tensor) -> None:
    if not bool(torch.isfinite(sums).all()):
        raise ValueError(f"{site.module}: an activation is NaN or infinite")
