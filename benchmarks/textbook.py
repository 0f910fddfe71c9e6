"""Git Re-Basin exactly as in the paper: Algorithms 1 and 3, in plain torch and SciPy.

Each step forms the whole similarity matrix of one group from all permuted tensors and solves the
assignment from scratch. Only the axes of the tensors come from the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fl_rebasin import Permutation, PermutationSpec
from fl_rebasin.symmetry.axes import groups_of, named_pieces, pieces

ROUNDING = 1e-6
"""A relative gain below this is rounding in float32; without a threshold the loop may not end."""
MAX_SWEEPS = 100


def match(
    spec: PermutationSpec,
    target: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    generator: torch.Generator,
) -> tuple[Permutation, int]:
    """Return the permutation of Algorithm 1 and its number of sweeps over the groups."""
    keys: dict[str, list[str]] = {name: [] for name in spec.groups}
    for key in spec.learnable:
        for name in {group.name for axis in spec.axes[key] for group in groups_of(axis)}:
            keys[name].append(key)
    found, names = spec.identity(), list(spec.groups)
    for sweep in range(1, MAX_SWEEPS + 1):
        progress = False
        for place in torch.randperm(len(names), generator=generator).tolist():
            group = names[place]
            move, gain, scale = _best_move(spec, target, weights, found, group, keys[group])
            if gain > ROUNDING * scale:
                progress = True
                found = move.compose(found)
        if not progress:
            return found, sweep
    return found, MAX_SWEEPS


def _best_move(
    spec: PermutationSpec,
    target: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    found: Permutation,
    group: str,
    keys: Sequence[str],
) -> tuple[Permutation, float, float]:
    """Return the best permutation of one group, its gain, and the scale of the gain's rounding."""
    size, blocks = spec.groups[group], spec.within.get(group)
    count = 1 if blocks is None else spec.groups[blocks]
    similarity = torch.zeros(count, size, size)
    for key in keys:
        moved = spec.move(key, weights[key], found)
        pairs = zip(
            named_pieces(target[key], spec.axes[key]), pieces(moved, spec.axes[key]), strict=True
        )
        for (left, names), (right, _) in pairs:
            for dim in (dim for dim, name in enumerate(names) if name == group):
                first = [dim] if blocks is None else [names.index(blocks), dim]
                rows, columns = (
                    side.movedim(first, list(range(len(first)))).reshape(count, size, -1)
                    for side in (left, right)
                )
                similarity += rows @ columns.mT
    solved = [linear_sum_assignment(each.numpy(), maximize=True)[1] for each in similarity]
    orders = torch.stack([torch.from_numpy(order) for order in solved])
    best = similarity.double().gather(2, orders[..., None]).sum()
    gain = float(best - similarity.double().diagonal(dim1=1, dim2=2).sum())
    order = orders[0] if blocks is None else orders
    move = Permutation({**spec.identity().indices, group: order}, spec.within)
    return move, gain, float(similarity.abs().max()) * size * count


def merge_many(
    spec: PermutationSpec, models: Sequence[Mapping[str, Tensor]], generator: torch.Generator
) -> tuple[list[Permutation], int]:
    """Return the permutations of Algorithm 3 and its number of passes over the models."""
    found = [spec.identity() for _ in models]
    moved = [dict(model) for model in models]
    for sweep in range(1, MAX_SWEEPS + 1):
        progress = False
        for place in torch.randperm(len(models), generator=generator).tolist():
            others = [model for other, model in enumerate(moved) if other != place]
            mean = {key: torch.stack([each[key] for each in others]).mean(0) for key in moved[0]}
            permutation, _ = match(spec, mean, moved[place], generator)
            if not permutation.is_identity:
                progress = True
                found[place] = permutation.compose(found[place])
                moved[place] = {
                    key: spec.move(key, value, permutation) for key, value in moved[place].items()
                }
        if not progress:
            return found, sweep
    return found, MAX_SWEEPS
