"""What identifies an architecture: a hash of its modules, their settings and tensor shapes."""

from __future__ import annotations

import hashlib

from torch import Tensor, nn

_PLAIN = (bool, int, float, str, type(None))


def fingerprint(model: nn.Module) -> str:
    """Return a hash that two models share if they are built alike, whatever their weights.

    It covers the tree of modules with their classes, their plain settings (numbers, texts, flags
    and tuples of these; not the training mode), and keys and shapes of the state dict.
    """
    lines = []
    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        settings = {
            key: value
            for key, value in sorted(vars(module).items())
            if key != "training" and _is_plain(value)
        }
        lines.append(f"{name}: {kind.__module__}.{kind.__qualname__} {settings}")
    for key, value in model.state_dict().items():
        lines.append(f"{key} {tuple(value.shape) if isinstance(value, Tensor) else value}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
