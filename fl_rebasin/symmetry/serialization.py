"""Specs as JSON: derived once for an architecture, and loaded without tracing it again."""

from __future__ import annotations

import itertools
import json
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fl_rebasin.symmetry.axes import Axis, Cat, Fixed, Group, Parted, Prod, cut_axis, groups_of
from fl_rebasin.symmetry.fingerprint import fingerprint
from fl_rebasin.symmetry.spec import PermutationSpec, SpecError

FORMAT = "fl_rebasin.spec/1"
_DEEPEST = 50
"""Maximum nesting depth of the expression of an axis."""
_LARGEST = 2**63 - 1
"""Maximum size of an axis of a tensor."""


def spec_to_json(spec: PermutationSpec) -> str:
    """Return a spec as JSON text, which `spec_from_json` reads.

    An axis is written as the number of its fixed positions, the name of its group,
    `{"cat": [...]}`, `{"prod": [...]}`, or `{"across": axis number, "cases": [[size, axis], ...]}`.

    Example:
        >>> import torch
        >>> from fl_rebasin import derive_spec
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> json.loads(spec_to_json(derive_spec(net, torch.zeros(1, 2))))["groups"]
        {'0': 3}
    """
    content = {
        "format": FORMAT,
        "fingerprint": spec.fingerprint,
        "groups": dict(spec.groups),
        "within": dict(spec.within),
        "axes": {key: [_to_json(axis) for axis in axes] for key, axes in spec.axes.items()},
        "pinned": dict(spec.pinned),
        "learnable": list(spec.learnable),
    }
    return json.dumps(content, indent=1)


def spec_from_json(text: str, model: nn.Module | None = None) -> PermutationSpec:
    """Read a spec that `spec_to_json` wrote.

    Args:
        text: the JSON text.
        model: if given, the spec must belong to the architecture of this model.

    Raises:
        SpecError: the text is not a spec, or it is the spec of another architecture.

    Example:
        >>> import torch
        >>> from fl_rebasin import derive_spec
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> spec = derive_spec(net, torch.zeros(1, 2))
        >>> spec_from_json(spec_to_json(spec), net) == spec
        True
    """
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            found = reprlib.repr(content["format"])
            raise SpecError(
                f"the spec has format {found}, but this version reads {FORMAT}: derive it again"
            )
        spec = _read(content)
    except SpecError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SpecError(
            f"not a permutation spec ({type(error).__name__}: {error}): derive it again"
        ) from error
    if model is not None:
        spec.check(model.state_dict())
        if spec.fingerprint != fingerprint(model):
            raise SpecError(
                f"the spec was derived from another architecture (fingerprint "
                f"{spec.fingerprint[:12]}..., the model's is {fingerprint(model)[:12]}...): "
                "derive it again"
            )
    return spec


def _to_json(axis: Axis) -> Any:
    """Return an axis as nested lists, dicts, numbers and strings."""
    match axis:
        case Group(name):
            return name
        case Fixed(size):
            return size
        case Cat(parts):
            return {"cat": [_to_json(part) for part in parts]}
        case Prod(factors):
            return {"prod": [_to_json(part) for part in factors]}
        case Parted(across, cases):
            return {"across": across, "cases": [[size, _to_json(part)] for size, part in cases]}


def _read(content: Any) -> PermutationSpec:
    groups = _read_groups(content)
    axes: dict[str, tuple[Axis, ...]] = {}
    for key, each in _items(content, "axes"):
        axes[key] = tuple(_read_axis(found, groups) for found in _list(each, f"axes of {key}"))
        for axis in axes[key]:
            _check_parts(key, axis, axes[key])
        _check_within(key, axes[key])
    used = {group.name for each in axes.values() for axis in each for group in groups_of(axis)}
    if unused := [name for name in groups if name not in used]:
        raise SpecError(f"the spec's groups {unused[:3]} are on no axis: derive it again")
    pinned = {axis: _text(reason, "pinned") for axis, reason in _items(content, "pinned")}
    return PermutationSpec(
        axes,
        {name: group.size for name, group in groups.items()},
        pinned,
        _read_learnable(content, axes),
        {name: group.within for name, group in groups.items() if group.within is not None},
        _text(content["fingerprint"], "fingerprint"),
    )


def _read_groups(content: Any) -> dict[str, Group]:
    sizes = {name: _size(size) for name, size in _items(content, "groups")}
    within = {name: _text(blocks, "within") for name, blocks in _items(content, "within")}
    for name, blocks in within.items():
        if name not in sizes or blocks not in sizes or blocks in within:
            raise SpecError(
                f"the spec puts the group {name!r} within {blocks!r}, which is invalid: derive it "
                "again"
            )
    return {name: Group(name, size, within.get(name)) for name, size in sizes.items()}


def _read_axis(found: Any, groups: Mapping[str, Group], depth: int = 0) -> Axis:
    if depth > _DEEPEST:
        raise SpecError("the spec has an axis nested too deeply: derive it again")

    def read_each(parts: list[Any]) -> tuple[Axis, ...]:
        return tuple(_read_axis(part, groups, depth + 1) for part in parts)

    match found:
        case str() as name:
            if name not in groups:
                raise SpecError(
                    f"the spec has an axis of the unknown group {name!r}: derive it again"
                )
            return groups[name]
        case {"cat": [_, *_] as parts, **rest} if not rest:
            return Cat(read_each(parts))
        case {"prod": [_, *_] as factors, **rest} if not rest:
            return Prod(read_each(factors))
        case {"across": across, "cases": [_, *_] as cases, **rest} if not (rest or depth):
            each = [_list(case, "cases") for case in cases]
            if all(len(case) == 2 for case in each):
                sizes = [_size(size) for size, _ in each]
                axes = read_each([axis for _, axis in each])
                return Parted(_size(across), tuple(zip(sizes, axes, strict=True)))
        case int() | float():
            return Fixed(_size(found))
    raise SpecError(f"the spec has the axis {reprlib.repr(found)}: derive it again")


def _read_learnable(content: Any, axes: Mapping[str, Any]) -> tuple[str, ...]:
    found = _list(content["learnable"], "learnable keys")
    learnable = tuple(_text(key, "learnable") for key in found)
    if unknown := [key for key in learnable if key not in axes]:
        raise SpecError(
            f"the spec lists {unknown[:3]} as learnable but has no axes for them: derive it again"
        )
    if twice := [key for key in dict.fromkeys(learnable) if learnable.count(key) > 1]:
        raise SpecError(f"the spec lists {twice[:3]} as learnable twice: derive it again")
    return learnable


def _check_within(key: str, axes: Iterable[Axis]) -> None:
    """Raise `SpecError` for units within missing blocks, or within two blocks of one product."""
    groups = {group.name: group for axis in axes for group in groups_of(axis)}
    for group in groups.values():
        if group.within is not None and group.within not in groups:
            raise SpecError(f"{key} has units within {group.within!r}, but no axis of that group")

    def check(axis: Axis) -> None:
        match axis:
            case Prod(factors):
                blocks = [factor.name for factor in factors if isinstance(factor, Group)]
                for group in groups_of(axis):
                    if group.within is not None and blocks.count(group.within) > 1:
                        raise SpecError(
                            f"{key} has units within {group.within!r}, which is twice in a product"
                        )
                for part in factors:
                    check(part)
            case Cat(parts):
                for part in parts:
                    check(part)
            case Parted(_, cases):
                for _, part in cases:
                    check(part)

    for axis in axes:
        check(axis)


def _check_parts(key: str, axis: Axis, axes: tuple[Axis, ...]) -> None:
    """Raise `SpecError` unless the parts of a parted axis match the axis that it depends on."""
    if not isinstance(axis, Parted):
        return
    sizes = [size for size, _ in axis.cases]
    if axis.across < len(axes) and sum(sizes) == axes[axis.across].size:
        try:
            for start, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False):
                cut_axis(axes[axis.across], start, size)
        except ValueError:
            pass
        else:
            if len({part.size for _, part in axis.cases}) == 1:
                return
    raise SpecError(f"{key} has an axis whose parts do not match its axis {axis.across}")


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
        raise SpecError(
            f"the spec has the size {reprlib.repr(value)}: sizes are non-negative integers"
        )
    return value


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise SpecError(f"the spec's {field} has {reprlib.repr(value)}, which is not a string")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise SpecError(f"the spec's {what} are {reprlib.repr(value)}, which is not a list")
    return value


def _items(content: Any, field: str) -> Iterable[tuple[str, Any]]:
    value = content[field]
    if not isinstance(value, dict):
        raise SpecError(f"the spec's {field} is {reprlib.repr(value)}, which is not a dict")
    return value.items()
