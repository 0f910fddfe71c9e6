"""Which groups lie on which tensors: what coordinate descent needs to know of a spec."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fl_rebasin.symmetry.axes import groups_of, named_pieces
from fl_rebasin.symmetry.spec import PermutationSpec


@dataclass(frozen=True)
class Incidence:
    """The relation between the groups of a spec and its learnable tensors.

    Attributes:
        groups: for each tensor, how often each group lies on its axes.
        keys: for each group, the tensors that it lies on.
        inside: for each group, the groups of units within its units (within attention heads, for
            example); they are matched together.
        linear: groups whose moves change the objective linearly, so that one similarity matrix
            describes all of them. Not linear are groups on two axes of one tensor, and blocks
            with the units inside them.
    """

    groups: Mapping[str, Counter[str]]
    keys: Mapping[str, list[str]]
    inside: Mapping[str, list[str]]
    linear: frozenset[str]

    @classmethod
    def of(cls, spec: PermutationSpec, tensors: Mapping[str, Tensor]) -> Incidence:
        """Return the incidence of a spec.

        Args:
            spec: the spec.
            tensors: learnable tensors of a model; only their shapes matter.
        """
        inside: dict[str, list[str]] = {name: [] for name in spec.groups}
        for name, blocks in spec.within.items():
            inside[blocks].append(name)
        groups = {
            key: Counter(group.name for axis in spec.axes[key] for group in groups_of(axis))
            for key in spec.learnable
        }
        keys: dict[str, list[str]] = {name: [] for name in spec.groups}
        for key, names in groups.items():
            for name in names:
                keys[name].append(key)
        twice = {
            name
            for key in spec.learnable
            for _, names in named_pieces(tensors[key], spec.axes[key])
            for name in names
            if names.count(name) > 1
        }
        linear = {
            name
            for name in spec.groups
            if name not in spec.within and name not in twice and not inside[name]
        }
        return cls(groups, keys, inside, frozenset(linear))

    def neighbours(self, group: str) -> set[str]:
        """Return the groups whose best move depends on the order of one group's units."""
        names = {name for key in self.keys[group] for name in self.groups[key]}
        names |= {*self.inside[group]}
        return names - {group} if group in self.linear else names
