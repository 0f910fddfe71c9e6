"""The self-check of every derivation: permuted models must compute the same function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fl_rebasin.symmetry.spec import Permutation, PermutationSpec
from fl_rebasin.symmetry.twin import Run, Twin

TOLERANCE = 1e-9
"""Largest relative error of outputs and buffers in float64."""
SINGLE_TOLERANCE = 1e-4
"""The same in float32, for models that cannot run in float64."""
DRAWS = 2
"""Number of random permutations that a spec has to pass."""


def _difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the largest relative error between two lists of tensors; NaN counts as 1."""
    if [tensor.shape for tensor in left] != [tensor.shape for tensor in right]:
        return 1.0
    worst = 0.0
    for one, other in zip(left, right, strict=True):
        if not one.numel():
            continue
        one, other = one.detach(), other.detach()
        if one.layout != torch.strided:
            one, other = one.to_dense(), other.to_dense()
        if not (one.is_floating_point() or one.is_complex()):
            worst = max(worst, float(not torch.equal(one, other)))
            continue
        error = (one - other).abs().max() / one.abs().max().clamp_min(1e-30)
        worst = max(worst, float(error.nan_to_num(nan=1.0)))
    return worst


class SelfCheck:
    """Compares permuted models with the model itself, in each mode with a function of its own.

    Args:
        twin: private copy of the model.
        runs: the runs of the unpermuted copy, by mode.
        tolerance: largest relative error that passes.
    """

    def __init__(self, twin: Twin, runs: Mapping[bool, Run], tolerance: float = TOLERANCE) -> None:
        self._twin, self._runs, self._tolerance = twin, runs, tolerance

    def error(self, spec: PermutationSpec, permutation: Permutation) -> float:
        """Return the largest relative error of outputs and written buffers under a permutation.

        A wrong permutation has an error of about 1.
        """
        worst = 0.0
        self._twin.permute(spec, permutation)
        for training, expected in self._runs.items():
            try:
                found = self._twin.run(training)
            except Exception:  # The forward pass is the user's code, and has run unpermuted.
                return 1.0
            if expected.written.keys() != found.written.keys():
                return 1.0
            worst = max(
                worst,
                _difference(expected.outputs, found.outputs),
                _difference(
                    [spec.move(key, value, permutation) for key, value in expected.written.items()],
                    [found.written[key] for key in expected.written],
                ),
            )
        return worst

    def is_repeatable(self, spec: PermutationSpec) -> bool:
        """Whether the unpermuted model passes."""
        return self.error(spec, spec.identity()) < self._tolerance

    def check(self, spec: PermutationSpec) -> tuple[float, Permutation | None]:
        """Try random permutations; return the largest relative error, and the first failing one."""
        worst = 0.0
        for draw in _draws(spec):
            worst = max(worst, self.error(spec, draw))
            if not worst < self._tolerance:
                return worst, draw
        return worst, None

    def failing_groups(self, spec: PermutationSpec, draw: Permutation) -> list[str]:
        """Return the groups that make a permutation fail."""
        return self._failing(spec, draw, list(spec.groups))

    def _failing(self, spec: PermutationSpec, draw: Permutation, names: list[str]) -> list[str]:
        """Find by bisection the groups without which the others pass.

        If groups pass one by one but fail together, all of them count as failing.
        """
        if len(names) < 2:
            return names
        half = len(names) // 2
        found: list[str] = []
        for part in (names[:half], names[half:]):
            if not self._error_of(spec, draw, part) < self._tolerance:
                found += self._failing(spec, draw, part)
        rest = [name for name in names if name not in found]
        if len(found) < len(names) and not self._error_of(spec, draw, rest) < self._tolerance:
            return names
        return found

    def _error_of(self, spec: PermutationSpec, draw: Permutation, names: Sequence[str]) -> float:
        """Return the error of a permutation that moves the named groups alone."""
        indices = dict(spec.identity().indices) | {name: draw[name] for name in names}
        return self.error(spec, Permutation(indices, spec.within))


def _draws(spec: PermutationSpec) -> Iterator[Permutation]:
    """Yield random permutations; a group that the draw leaves in place is shifted by one."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(DRAWS):
        drawn = spec.random(generator)
        indices = {}
        for name, index in drawn.indices.items():
            unmoved = bool((index == torch.arange(index.shape[-1])).all())
            indices[name] = index.roll(1, -1) if unmoved else index
        yield Permutation(indices, spec.within)
