"""Specs as JSON: kept once for an architecture, loaded without tracing again."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from fl_rebasin.axes import Axis, Cat, Fixed, Group, Parted, Prod, cut_axis, groups_of
from fl_rebasin.fingerprint import fingerprint
from fl_rebasin.spec import PermutationSpec, SpecError

FORMAT = "fl_rebasin.spec/1"


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
            raise SpecError(f"a spec of format {content['format']!r}; this version reads {FORMAT}")
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


def _read(content: Mapping[str, Any]) -> PermutationSpec:
    groups = {str(name): _size(size) for name, size in content["groups"].items()}
    within = {str(name): str(blocks) for name, blocks in content["within"].items()}
    for name, blocks in within.items():
        if name not in groups or blocks not in groups or blocks in within:
            raise SpecError(f"the spec's group {name!r} lies within {blocks!r}, which cannot be")

    def axis(found: Any) -> Axis:
        match found:
            case str() as name:
                if name not in groups:
                    raise SpecError(f"the spec has an axis of group {name!r}, which it lacks")
                return Group(name, groups[name], within.get(name))
            case {"cat": [*parts], **rest} if not rest:
                return Cat(tuple(map(axis, parts)))
            case {"prod": [*factors], **rest} if not rest:
                return Prod(tuple(map(axis, factors)))
            case {"across": across, "cases": [*cases], **rest} if cases and not rest:
                return Parted(_size(across), tuple((_size(n), axis(part)) for n, part in cases))
            case _:
                return Fixed(_size(found))

    axes = {str(key): tuple(map(axis, each)) for key, each in content["axes"].items()}
    learnable = tuple(map(str, content["learnable"]))
    if unknown := [key for key in learnable if key not in axes]:
        raise SpecError(f"the spec counts {unknown[:3]} as learnable, and has no axes for it")
    for key, each in axes.items():
        for expression in each:
            _check_parts(key, expression, each)
        names = {group.name for expression in each for group in groups_of(expression)}
        if torn := [name for name in names if name in within and within[name] not in names]:
            raise SpecError(f"{key} has units within {within[torn[0]]!r}, and no axis of it")
    pinned = {str(place): str(reason) for place, reason in content["pinned"].items()}
    return PermutationSpec(axes, groups, pinned, learnable, within, str(content["fingerprint"]))


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
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise SpecError(f"the spec has the size {value!r}: sizes are whole numbers")
    return value
