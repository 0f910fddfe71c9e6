"""Watching the operators of a forward pass, and stating their equations between axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from fl_rebasin.symmetry.rules import RULES, pointwise
from fl_rebasin.symmetry.rules.protocol import Rule
from fl_rebasin.symmetry.terms import Term, Unknown, pin
from fl_rebasin.symmetry.unify import limit_to_tensor


class RuleError(Exception):
    """A rule failed: a bug in this package, not in the model."""


@dataclass
class _Record:
    """What the tracer knows of a tensor.

    Attributes:
        terms: the term of each axis.
        number: identifies the tensor in the log.
        constant: whether it belongs to the model but neither to its state nor to its inputs.
        computed: whether an operator that is not just a view has used it.
        pins_if_used: axes to pin, with reasons, as soon as an operator uses it.
    """

    terms: tuple[Term, ...]
    number: int | str
    constant: bool = False
    computed: bool = False
    pins_if_used: list[tuple[Term, str]] = field(default_factory=list)


class Tracer(TorchDispatchMode):
    """Watches the operators of a forward pass, and applies the rule of each.

    Args:
        known: tensors of the model's state with the terms of their axes.

    Attributes:
        layout: sizes, strides and offset of the first argument before the call.
        touched: ids of the tensors of the state that an operator has used.
        statistics: ids of buffers that describe units.
        computed: axes of the tensors that an operator other than a view has used.
        log: the operators with their arguments, tensors by number. Two runs with equal logs
            compute the same function.
    """

    def __init__(self, known: Iterable[tuple[Tensor, tuple[Term, ...]]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Weak references: the activations would take more memory than the model.
        self._records = WeakTensorKeyDictionary()
        self._count = 0
        self._state: set[int] = set()
        for tensor, terms in known:
            self._state.add(id(tensor))
            self.assign(tensor, terms)
        self.layout: Any = None
        self.touched: set[int] = set()
        self.statistics: set[int] = set()
        self.computed: list[tuple[Term, ...]] = []
        self.log: list[Any] = []

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._records

    def _record(self, tensor: Tensor) -> _Record:
        if tensor not in self._records:
            terms = [Unknown(n, "constant of the model") for n in tensor.shape]
            self._records[tensor] = _Record(tuple(terms), f"constant {id(tensor)}", constant=True)
        record: _Record = self._records[tensor]
        return record

    def axes(self, tensor: Tensor) -> tuple[Term, ...]:
        """Return the term of each axis; a tensor seen for the first time is a pinned constant."""
        return self._record(tensor).terms

    def assign(self, tensor: Tensor, terms: Sequence[Term]) -> None:
        """Set the axes of a new tensor."""
        assert tuple(term.size for term in terms) == tuple(tensor.shape), (terms, tensor.shape)
        limit_to_tensor(terms)
        self._count += 1
        constant = tensor in self._records and self._records[tensor].constant
        self._records[tensor] = _Record(tuple(terms), self._count, constant)

    def pin_all(self, tensors: Any, reason: str) -> None:
        """Pin every axis of every tensor in a nested structure."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self.use(tensor)
                for term in self.axes(tensor):
                    pin(term, reason)

    def pin_if_used(self, tensor: Tensor, term: Term, reason: str) -> None:
        """Pin an axis as soon as an operator uses a tensor whose values depend on its order."""
        self._record(tensor).pins_if_used.append((term, reason))

    def mark_statistic(self, tensor: Tensor) -> None:
        """Record that a buffer describes units, and moves with them even if no run updates it."""
        self.statistics.add(id(tensor))

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor belongs to the model but neither to its state nor to its inputs."""
        return self._record(tensor).constant

    def use(self, tensor: Tensor, by_view: bool = False) -> None:
        """Record that an operator uses a tensor, or that it just makes a view of it."""
        record = self._record(tensor)
        for term, reason in record.pins_if_used:
            pin(term, reason)
        if id(tensor) in self._state:
            self.touched.add(id(tensor))
        if not by_view and not record.computed:
            record.computed = True
            self.computed.append(record.terms)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # An operator can change the shape of a view in place: take the axes before the call.
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.use(tensor, by_view=func.is_view)
        rule = _rule_of(func, kwargs)
        if rule is None and _is_composite(func):
            # In inference mode, composite operators arrive undecomposed.
            with self:
                return func.decompose(*args, **kwargs)
        self.layout = _layout(args[0]) if args else None
        self.log.append((str(func), tree_map(self._number, (args, kwargs))))
        out = func(*args, **kwargs)
        try:
            if rule is not None and rule(self, func, args, kwargs, out):
                return out
        except Exception as error:
            raise RuleError(f"the rule for {func} failed, which is a bug in it: {error}") from error
        known = "no rule for" if rule is None else "no rule for these arguments of"
        reason = f"{known} {func.overloadpacket}"
        self.pin_all((args, kwargs), reason)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.assign(tensor, [Unknown(n, reason) for n in tensor.shape])
        return out

    def _number(self, leaf: Any) -> Any:
        """Return what identifies an argument in the log."""
        if isinstance(leaf, Tensor):
            return self._record(leaf).number, tuple(leaf.shape)
        return str(leaf)


class ReadTracer(TorchFunctionMode):
    """Notifies a tracer of values that are read without an operator, as by `Tensor.tolist`."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            self._tracer.use(args[0])
        return func(*args, **(kwargs or {}))


def _rule_of(func: Any, kwargs: dict[str, Any]) -> Rule | None:
    # The tracer does not follow a result that is written into a view of another tensor.
    rule = None if "out" in kwargs else RULES.get(func.overloadpacket.__name__)
    return pointwise if rule is None and _is_pointwise(func) else rule


def _layout(argument: Any) -> Any:
    if isinstance(argument, Tensor) and argument.layout == torch.strided:
        return argument.shape, argument.stride(), argument.storage_offset()
    return None


def _is_pointwise(func: Any) -> bool:
    """Whether PyTorch tags an operator, or its out-of-place variant, as pointwise."""
    if torch.Tag.pointwise in func.tags:
        return True
    name = func.overloadpacket.__name__
    if not name.endswith("_") or func.namespace != "aten":
        return False
    packet = getattr(torch.ops.aten, name[:-1], None)
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def _is_composite(func: Any) -> bool:
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    )
