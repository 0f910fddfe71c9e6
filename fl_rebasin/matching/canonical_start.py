"""A start for coordinate descent that does not depend on the order of the moving model's units.

The similarity matrix of a group means something only for tensors whose other groups are matched
already: in the others, the products follow an arbitrary order. So groups are matched one by one,
each by the tensors that are already meaningful, beginning with the group for which these make up
the largest share of its weights.
"""

from __future__ import annotations

from collections.abc import Iterable

from fl_rebasin.matching.coordinate_descent import Matcher


def start_canonical(matcher: Matcher, groups: Iterable[str] | None = None) -> None:
    """Match each group once, by the tensors whose other groups are matched already.

    Args:
        matcher: a matcher that has not moved anything yet; it is changed.
        groups: groups to match, all by default; the others count as matched.
    """
    names = list(matcher.spec.groups if groups is None else groups)
    # Units within blocks are matched together with their blocks.
    names = [name for name in names if name not in matcher.spec.within]
    evidence = _Evidence(matcher, names)
    while names:
        best = max(names, key=evidence.share)
        names.remove(best)
        move = matcher.best_move(best, evidence.usable[best])
        if not move.is_identity:
            # No update: this group's tensors count for no other group yet.
            matcher.apply_move(best, move, update=False)
        evidence.mark_matched(best)


class _Evidence:
    """The tensors by which each group can be matched so far.

    Args:
        matcher: the matcher.
        names: the groups that are not matched yet.

    Attributes:
        usable: for each group, the tensors whose other groups are matched.
    """

    def __init__(self, matcher: Matcher, names: list[str]) -> None:
        self.matcher = matcher
        self.usable: dict[str, list[str]] = {name: [] for name in names}
        self._unmatched = {
            key: {*names} & found.keys() for key, found in matcher.incidence.groups.items()
        }
        # Numbers of weights: those of all tensors of a group, and those of its usable ones.
        self._total = dict.fromkeys(names, 1)
        self._known = dict.fromkeys(names, 0)
        matcher.similarities.reset(names)
        for key, waiting in self._unmatched.items():
            for name in waiting:
                self._total[name] += matcher.target[key].numel()
            if len(waiting) == 1:
                self._make_usable(key)

    def share(self, group: str) -> float:
        """Return the share of a group's weights that is in usable tensors."""
        return self._known[group] / self._total[group]

    def mark_matched(self, group: str) -> None:
        """Record that a group is matched; its tensors become usable for its neighbours."""
        for key in self.matcher.incidence.keys[group]:
            self._unmatched[key].remove(group)
            if len(self._unmatched[key]) == 1:
                self._make_usable(key)
            elif not self._unmatched[key]:
                self._add(key, self.matcher.incidence.groups[key].keys() - {group})

    def _make_usable(self, key: str) -> None:
        """Let a tensor count for the last one of its groups that is not matched."""
        (last,) = self._unmatched[key]
        # A group on two axes of one tensor: its products follow an arbitrary order themselves.
        incidence = self.matcher.incidence
        if incidence.groups[key][last] == 1 or last in incidence.linear:
            self._known[last] += self.matcher.target[key].numel()
            self.usable[last].append(key)
            self._add(key, {last})

    def _add(self, key: str, groups: set[str]) -> None:
        self.matcher.similarities.add_tensor(key, self.matcher.weights[key], groups)
