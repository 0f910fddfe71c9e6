"""Where a module exposes activations of units that may move: inputs and outputs of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fl_rebasin.forward import Hook, forward_hooks
from fl_rebasin.symmetry.axes import Axis, Fixed, Group, Parted, groups_of, pieces
from fl_rebasin.symmetry.spec import PermutationSpec

Key = tuple[str, ...]
"""Name of a group; for units within blocks, the names of the blocks and of the units."""


@dataclass(frozen=True)
class Site:
    """The input or the output of one layer, and the groups on its axes.

    Attributes:
        module: name of the layer.
        at_input: whether this is the layer's input.
        dim: axis of the units; negative numbers count from the end.
        axes: expressions of this axis, and of those that follow it in the weight (for LayerNorm).
    """

    module: str
    at_input: bool
    dim: int
    axes: tuple[Axis, ...]

    @property
    def may_move(self) -> bool:
        """Whether any units of the site may move.

        An axis that depends on another axis of the weight does not count: the activations do not
        have that other axis.
        """
        if any(isinstance(axis, Parted) for axis in self.axes):
            return False
        return any(True for axis in self.axes for _ in groups_of(axis))

    def units(self, activations: Tensor, within: Mapping[str, str]) -> Iterator[tuple[Key, Tensor]]:
        """Yield the activations of each group, shape `(units, samples)`.

        Units within blocks count as `blocks * units` units, block by block.

        Args:
            activations: the layer's input or output.
            within: `within` of the spec.
        """
        dim = self.dim % activations.ndim
        axes: list[Axis] = [Fixed(size) for size in activations.shape]
        axes[dim : dim + len(self.axes)] = self.axes
        for piece, atoms in pieces(activations, axes):
            names = [atom.name if isinstance(atom, Group) else "" for atom in atoms]
            for place, name in enumerate(names):
                if not name:
                    continue
                blocks = within.get(name)
                if blocks is not None:
                    if blocks in names:
                        front = piece.movedim((names.index(blocks), place), (0, 1))
                        yield (blocks, name), front.flatten(0, 1).flatten(1)
                elif not any(within.get(other) == name for other in names):
                    yield (name,), piece.movedim(place, 0).flatten(1)


def sites_of(spec: PermutationSpec, model: nn.Module) -> list[Site]:
    """Return the sites of all layers of torch.nn at which units may move."""
    return [
        site
        for name, module in model.named_modules()
        if (axes := spec.axes.get(f"{name}.weight" if name else "weight")) is not None
        for site in _sites_of_layer(name, module, axes)
        if site.may_move
    ]


def _sites_of_layer(name: str, module: nn.Module, axes: tuple[Axis, ...]) -> Iterator[Site]:
    if isinstance(module, nn.Linear):
        yield Site(name, False, -1, axes[:1])
        yield Site(name, True, -1, axes[1:])
    elif isinstance(module, nn.Embedding):
        yield Site(name, False, -1, axes[1:])
    elif isinstance(module, _ConvNd):
        channels = -len(module.kernel_size) - 1
        transposed = isinstance(module, _ConvTransposeNd)
        outputs, inputs = (1, 0) if transposed else (0, 1)
        if module.groups == 1:
            yield Site(name, False, channels, axes[outputs : outputs + 1])
            yield Site(name, True, channels, axes[inputs : inputs + 1])
        elif not transposed:
            yield Site(name, False, channels, axes[:1])
    elif isinstance(module, (_BatchNorm, nn.GroupNorm)):
        yield Site(name, False, 1, axes)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        yield Site(name, False, -len(axes), axes)


@contextmanager
def recording(model: nn.Module, sites: Sequence[Site]) -> Iterator[list[tuple[Site, Tensor]]]:
    """Record the activations at some sites while the model runs, in the order of the calls."""
    records: list[tuple[Site, Tensor]] = []
    modules = dict(model.named_modules())
    with forward_hooks([(modules[site.module], _recorder(site, records)) for site in sites]):
        yield records


def _recorder(site: Site, records: list[tuple[Site, Tensor]]) -> Hook:
    def record(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        inputs = args[0] if args else kwargs["input"]
        records.append((site, (inputs if site.at_input else output).detach()))

    return record
