"""N weighted models to be merged, and the measures of how well they are aligned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fl_rebasin.matching.certificate import Reference, margins
from fl_rebasin.matching.objective import inner, precision_of
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec


class Models:
    """N models with weights; permuted copies are made one at a time.

    With permutations `p_i`, shares `w_i` that sum to 1, and the mean
    `m = sum_i w_i p_i(theta_i)`, alignment maximises

        sum_{i<j} w_i w_j <p_i(theta_i), p_j(theta_j)>

    which is `|m|^2 / 2` up to a constant, as permutations keep norms. It is the same as to minimise
    the weighted variance `sum_i w_i |p_i(theta_i) - m|^2 = sum_i w_i |theta_i|^2 - |m|^2`.

    Args:
        spec: spec of all models.
        models: their learnable tensors.
        shares: their weights, which sum to 1.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        models: Sequence[Mapping[str, Tensor]],
        shares: Sequence[float],
    ) -> None:
        self.spec = spec
        self.models = models
        self.shares = shares

    def __len__(self) -> int:
        return len(self.models)

    @cached_property
    def _measured(self) -> tuple[torch.dtype, list[float]]:
        return precision_of(self.models)

    @property
    def precision(self) -> torch.dtype:
        """Dtype of all products."""
        return self._measured[0]

    @cached_property
    def order(self) -> list[int]:
        """Indices of the models by weight, then by norm, in ascending order.

        Algorithms that follow this order do not depend on the order in which the models are given.
        """
        _, squares = self._measured
        return sorted(range(len(self)), key=lambda place: (self.shares[place], squares[place]))

    def identities(self) -> list[Permutation]:
        """Return the identity permutation for each model."""
        return [self.spec.identity() for _ in self.models]

    def permuted(self, place: int, permutation: Permutation) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of one model after a permutation, one at a time."""
        unmoved = permutation.is_identity
        for key in self.spec.learnable:
            value = self.models[place][key]
            value = value if unmoved else self.spec.move(key, value, permutation)
            yield key, value.to(self.precision)

    def mean(
        self, permutations: Sequence[Permutation], places: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Return the weighted sum of the permuted models.

        Args:
            permutations: one for each model.
            places: indices of the models to sum; by default all, which gives their mean.
        """
        total: dict[str, Tensor] = {}
        for place in self.order if places is None else places:
            share = self.shares[place]
            for key, part in self.permuted(place, permutations[place]):
                total[key] = total[key].add_(part, alpha=share) if key in total else share * part
        return total

    def objective(self, permutations: Sequence[Permutation]) -> float:
        """Return the squared norm of the mean of the permuted models: higher is better."""
        mean = self.mean(permutations)
        return inner(mean, mean, self.precision)

    def similarity(self, permutations: Sequence[Permutation]) -> float:
        """Return the weighted mean cosine between the permuted models and their mean."""
        precision, squares = self._measured
        centre = self.mean(permutations)
        norm = inner(centre, centre, precision)
        total = 0.0
        for place, permutation in enumerate(permutations):
            product = sum(
                inner({key: part}, centre, precision)
                for key, part in self.permuted(place, permutation)
            )
            total += self.shares[place] * product / (math.sqrt(norm * squares[place]) or 1.0)
        return total

    def margins(
        self, reference: Reference, permutations: Sequence[Permutation]
    ) -> dict[str, float]:
        """Return the margins of the permuted models (see `certificate.margins`)."""
        moved = (dict(self.permuted(place, each)) for place, each in enumerate(permutations))
        return margins(reference, moved, self.shares)
