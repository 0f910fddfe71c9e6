"""The values that a twin's tensors start from, in which any two units differ.

A fresh model holds ones and zeros (norms, biases), with which a wrong axis would go unnoticed. So
noise is added to them, computed row by row from a table: no tensor is held twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fl_rebasin.symmetry.axes import Axis, Fixed, Parted, axis_index, groups_of, move_tensor

_CHUNK = 1 << 22
"""Number of values that are moved at a time, to save memory."""
_FRESH = 0.15
"""Scale of the noise for gains and biases that are all equal."""


class Noise:
    """Standard normal numbers from a table: cheap, and the same for the same position.

    The length of the table is prime, so that the rows of a matrix differ.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._table = torch.randn(65_537, generator=generator)

    def rows(self, rows: Tensor, width: int, start: int) -> Tensor:
        """Return the numbers for some rows of a matrix: shape `(len(rows), width)`, float32."""
        length = len(self._table)
        table = self._table.repeat(1 + -(-width // length))
        windows = table.as_strided((length, width), (1, 1))
        return windows.index_select(0, (rows * width + start) % length)


class StartValues:
    """The start values of a model's tensors, which `write` copies, permuted or not.

    Args:
        originals: the model's parameters and buffers.
    """

    def __init__(self, originals: Sequence[Tensor]) -> None:
        self._originals = originals
        self._noise = Noise(seed=1)
        self._scales: dict[int, float] = {}

    def write(
        self,
        number: int,
        copied: Tensor,
        axes: Sequence[Axis] | None = None,
        permutation: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the start value of a tensor into a copy of it, chunk by chunk.

        Args:
            number: index of the original tensor.
            copied: where to write.
            axes: the axes by which to permute the value; None for an unpermuted value.
            permutation: the index tensor of each group.
        """
        original = self._originals[number].detach()
        if not has_rows(copied):
            if original.is_meta:
                copied.zero_()
            elif copied.layout == torch.strided and not copied.is_quantized:
                copied.copy_(original)
            if copied.ndim == 0 and isinstance(self._originals[number], nn.Parameter):
                copied += _FRESH  # A gain of zero would hide what it multiplies.
            return
        moves = {} if axes is None or permutation is None else permutation
        axes = axes or [Fixed(size) for size in copied.shape]
        if any(isinstance(axis, Parted) or g.within for axis in axes for g in groups_of(axis)):
            # One axis may depend on another: move the whole tensor.
            value = self._rows(number, torch.arange(len(copied)))
            copied.copy_(move_tensor(value, axes, moves))
            return
        rows = axis_index(axes[0], moves)
        start = 0
        for chunk in rows.split(max(1, _CHUNK // copied[0].numel())):
            value = self._rows(number, chunk)
            copied[start : start + len(chunk)] = move_tensor(
                value, (Fixed(len(chunk)), *axes[1:]), moves
            )
            start += len(chunk)

    def _rows(self, number: int, rows: Tensor) -> Tensor:
        """Return some rows of a start value, in the precision of the original or in float32."""
        tensor = self._originals[number].detach()
        if tensor.is_meta:
            value = torch.zeros(len(rows), *tensor.shape[1:], dtype=tensor.dtype)
        else:
            value = tensor.index_select(0, rows.to(tensor.device))
        if not value.is_floating_point():
            return value
        if value.itemsize < 4:
            value = value.float()
        if number not in self._scales:
            self._scales[number] = self._scale(number)
        if scale := self._scales[number]:
            noise = self._noise.rows(rows, math.prod(tensor.shape[1:]), number)
            noise = noise.reshape(value.shape)
            if not isinstance(self._originals[number], nn.Parameter):
                noise = torch.special.ndtr(noise)  # Variances must stay positive.
            value += scale * noise.to(value)
        return value

    def _scale(self, number: int) -> float:
        """Return the scale of the noise that makes a tensor's values differ between units."""
        tensor = self._originals[number]
        sample = torch.zeros(2)
        if not tensor.is_meta:
            sample = tensor.detach().reshape(len(tensor), -1)[:: max(1, len(tensor) // 64)]
            sample = sample.flatten()[:: max(1, sample.numel() // 4096)].double()
        spread = float(sample.std()) if len(sample) > 1 else 0.0
        if not isinstance(tensor, nn.Parameter):
            # Only statistics that have not been estimated yet need noise.
            return 0.0 if spread else 0.3
        fan_in = tensor.numel() / len(tensor)
        return 0.3 * spread or (_FRESH if tensor.ndim == 1 else fan_in**-0.5)


def has_rows(tensor: Tensor) -> bool:
    """Whether a tensor has rows that can be written one at a time."""
    strided = tensor.layout == torch.strided and not tensor.is_quantized
    return strided and tensor.ndim > 0 and tensor.numel() > 0
