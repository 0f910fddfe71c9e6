"""The fingerprint of an architecture: a hash of its modules, their settings and tensor shapes."""

from __future__ import annotations

import functools
import hashlib
import types

from torch import Tensor, nn

_PLAIN = (bool, int, float, str, type(None))
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType)
_NOT_SETTINGS = {*vars(nn.Module()), "_compiled_call_impl"}
"""Attributes that every module has: submodules, tensors, hooks, the training mode."""


def fingerprint(model: nn.Module) -> str:
    """Return a hash that is equal for models of the same architecture, whatever their weights.

    It covers the tree of modules with their classes and plain settings, and the keys and shapes of
    the state dict. Plain settings are numbers, strings, flags, functions and classes (by name), and
    containers of these, but not hooks or the training mode.
    """
    lines = []
    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        settings = {
            key: text
            for key, value in sorted(vars(module).items())
            if key not in _NOT_SETTINGS and (text := _plain(value)) is not None
        }
        lines.append(f"{name}: {kind.__module__}.{kind.__qualname__} {settings}")
    for key, value in model.state_dict().items():
        lines.append(f"{key} {tuple(value.shape) if isinstance(value, Tensor) else value}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _plain(value: object) -> str | None:
    """Return a setting as text that is the same in every process; None if it is not plain."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, _NAMED):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, functools.partial):
        parts: list[object] = [value.func, value.args, value.keywords]
    elif isinstance(value, dict):
        parts = [part for item in value.items() for part in item]
    elif isinstance(value, (tuple, list, set, frozenset)):
        parts = list(value)
    else:
        return None
    texts = [text for part in parts if (text := _plain(part)) is not None]
    if len(texts) < len(parts):
        return None
    if isinstance(value, (set, frozenset)):
        texts.sort()
    return f"{type(value).__name__}[{', '.join(texts)}]"
