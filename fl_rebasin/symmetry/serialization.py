"""Specs as JSON: kept once for an architecture, loaded without tracing again."""

from __future__ import annotations

import itertools
import json
import reprlib
from collections.abc import Iterable
from typing import Any

from torch import nn

from fl_rebasin.symmetry.axes import Axis, Cat, Fixed, Group, Parted, Prod, cut_axis, groups_of
from fl_rebasin.symmetry.fingerprint import fingerprint
from fl_rebasin.symmetry.spec import PermutationSpec, SpecError

FORMAT = "fl_rebasin.spec/1"
_DEEPEST = 50
"""How deep the expression of an axis may be nested."""
_LARGEST = 2**63 - 1
"""No axis of a tensor is longer."""


def spec_to_json(spec: PermutationSpec) -> str:
    """Return a spec as JSON text.

    An axis is a number (of fixed places), the name of a group, `{"cat": [...]}`,
    `{"prod": [...]}`, or `{"across": number, "cases": [[places, axis], ...]}`.
    """
    content = {
        "format": FORMAT,
        "fingerprint": spec.fingerprint,
        "groups": dict(spec.groups),
        "within": dict(spec.within),
        "axes": {key: [_written(axis) for axis in axes] for key, axes in spec.axes.items()},
        "pinned": dict(spec.pinned),
        "learnable": list(spec.learnable),
    }
    return json.dumps(content, indent=1)


def spec_from_json(text: str, model: nn.Module | None = None) -> PermutationSpec:
    """Read a spec that `spec_to_json` has written.

    Args:
        text: the JSON text.
        model: if given, the spec must have been derived from a model built like this one.

    Raises:
        SpecError: the text is not such a spec, or that of another architecture.

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
                f"a spec of format {found}; this version reads {FORMAT}: derive it anew"
            )
        spec = _read(content)
    except SpecError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SpecError(
            f"not a permutation spec ({type(error).__name__}: {error}): derive it anew"
        ) from error
    if model is not None:
        spec.check(model.state_dict())
        if spec.fingerprint != fingerprint(model):
            raise SpecError(
                f"the spec was derived from another architecture (fingerprint "
                f"{spec.fingerprint[:12]}..., the model's is {fingerprint(model)[:12]}...): "
                "derive it anew"
            )
    return spec


def _written(axis: Axis) -> Any:
    match axis:
        case Group(name):
            return name
        case Fixed(size):
            return size
        case Cat(parts):
            return {"cat": [_written(part) for part in parts]}
        case Prod(factors):
            return {"prod": [_written(part) for part in factors]}
        case Parted(across, cases):
            return {"across": across, "cases": [[size, _written(part)] for size, part in cases]}


def _read(content: Any) -> PermutationSpec:
    groups = {name: _size(size) for name, size in _items(content, "groups")}
    within = {name: _text(blocks, "within") for name, blocks in _items(content, "within")}
    for name, blocks in within.items():
        if name not in groups or blocks not in groups or blocks in within:
            raise SpecError(f"the spec's group {name!r} lies within {blocks!r}, which cannot be")

    def axis(found: Any, depth: int = 0) -> Axis:
        if depth > _DEEPEST:
            raise SpecError("the spec has an axis nested too deeply: derive it anew")
        match found:
            case str() as name:
                if name not in groups:
                    raise SpecError(f"the spec has an axis of group {name!r}, which it lacks")
                return Group(name, groups[name], within.get(name))
            case {"cat": [_, *_] as parts, **rest} if not rest:
                return Cat(tuple(axis(part, depth + 1) for part in parts))
            case {"prod": [_, *_] as factors, **rest} if not rest:
                return Prod(tuple(axis(part, depth + 1) for part in factors))
            case {"across": across, "cases": [_, *_] as cases, **rest} if not (rest or depth):
                each = [_list(case, "cases") for case in cases]
                if all(len(case) == 2 for case in each):
                    parts = tuple((_size(n), axis(part, depth + 1)) for n, part in each)
                    return Parted(_size(across), parts)
            case int() | float():
                return Fixed(_size(found))
        raise SpecError(f"the spec has the axis {reprlib.repr(found)}: derive it anew")

    axes: dict[str, tuple[Axis, ...]] = {}
    for key, each in _items(content, "axes"):
        axes[key] = tuple(map(axis, _list(each, f"axes of {key}")))
        for one in axes[key]:
            _check_parts(key, one, axes[key])
        _check_within(key, axes[key])
    used = {group.name for each in axes.values() for one in each for group in groups_of(one)}
    if unused := [name for name in groups if name not in used]:
        raise SpecError(f"the spec's groups {unused[:3]} are on no axis: derive it anew")
    learnable = tuple(
        _text(key, "learnable") for key in _list(content["learnable"], "learnable keys")
    )
    if unknown := [key for key in learnable if key not in axes]:
        raise SpecError(f"the spec counts {unknown[:3]} as learnable, and has no axes for it")
    if twice := [key for key in dict.fromkeys(learnable) if learnable.count(key) > 1]:
        raise SpecError(f"the spec counts {twice[:3]} as learnable twice: derive it anew")
    pinned = {place: _text(reason, "pinned") for place, reason in _items(content, "pinned")}
    mark = _text(content["fingerprint"], "fingerprint")
    return PermutationSpec(axes, groups, pinned, learnable, within, mark)


def _check_within(key: str, axes: Iterable[Axis]) -> None:
    """Raise `SpecError` for units within blocks that are not there, or twice in one product."""
    groups = {group.name: group for axis in axes for group in groups_of(axis)}
    for group in groups.values():
        if group.within is not None and group.within not in groups:
            raise SpecError(f"{key} has units within {group.within!r}, and no axis of it")

    def check(axis: Axis) -> None:
        match axis:
            case Prod(factors):
                blocks = [factor.name for factor in factors if isinstance(factor, Group)]
                for group in groups_of(axis):
                    if group.within is not None and blocks.count(group.within) > 1:
                        raise SpecError(f"{key} has units within {group.within!r}, which is twice")
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
    """Raise `SpecError` unless the parts of a parted axis are parts of the other one."""
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
    raise SpecError(f"{key} has an axis in parts that do not fit the spec's axis {axis.across}")


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
        raise SpecError(f"the spec has the size {reprlib.repr(value)}: sizes are whole numbers")
    return value


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise SpecError(f"the spec's {field} has {reprlib.repr(value)}, which is not a text")
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
