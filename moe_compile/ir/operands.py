"""The parameters of experts in one bundle, whatever stands for them on the way: terms' nodes, names in a plan, nodes, tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")

# Which parameters an op takes, in the order of its lists
PLAIN = ("up", "down", "up_bias", "down_bias")
CODED = (*PLAIN, "up_scale", "down_scale", "up_zero", "down_zero", "up_table", "down_table", "up_second", "down_second")
ADAPTED = (*PLAIN, "up_a", "up_b", "down_a", "down_b")
STORED_ADAPTED = (*CODED, *ADAPTED[len(PLAIN) :])
CHAINED = ("parts",)


@dataclass(frozen=True)
class Operands(Generic[T]):
    """One stack (two for `Form.SEPARATE`), or as many matrices as there are experts, for each parameter; nothing where there is none.

    A table is one for all. Low-rank pairs stand beside the projections that have one: `a` [E, r, in] and `b` [E, out, r], whatever way
    the weights are stored. `parts`: all parameters of experts that are a chain, as its kinds say (`ir.chain`); there are no others then.
    """

    up: tuple[T, ...] = ()
    down: tuple[T, ...] = ()
    up_bias: tuple[T, ...] = ()
    down_bias: tuple[T, ...] = ()
    up_scale: tuple[T, ...] = ()
    down_scale: tuple[T, ...] = ()
    up_zero: tuple[T, ...] = ()
    down_zero: tuple[T, ...] = ()
    up_table: tuple[T, ...] = ()
    down_table: tuple[T, ...] = ()
    up_second: tuple[T, ...] = ()
    down_second: tuple[T, ...] = ()
    up_a: tuple[T, ...] = ()
    up_b: tuple[T, ...] = ()
    down_a: tuple[T, ...] = ()
    down_b: tuple[T, ...] = ()
    parts: tuple[T, ...] = ()

    @classmethod
    def of(cls, holder: Any) -> Operands[T]:
        """Those of an object that has them as lists of the same names."""
        return cls(**{f.name: tuple(getattr(holder, f.name, ())) for f in fields(cls)})

    @classmethod
    def named(cls, **groups: Iterable[T]) -> Operands[T]:
        """Of lists by name. Raises TypeError where there is no such parameter."""
        return cls(**{name: tuple(group) for name, group in groups.items()})

    @classmethod
    def read(cls, lists: Iterable[Iterable[T]], names: Sequence[str] = PLAIN) -> Operands[T]:
        """Of an op's lists: the inverse of `lists`."""
        return cls(**{name: tuple(group) for name, group in zip(names, lists, strict=True)})

    def lists(self, names: Sequence[str] = PLAIN) -> list[list[T]]:
        """As an op takes them."""
        return [list(getattr(self, name)) for name in names]

    def map(self, f: Callable[[T], U]) -> Operands[U]:
        """Each through `f`, in the order of the iteration."""
        return Operands(*(tuple([f(x) for x in group]) for group in self.groups()))

    def filled(self, values: Iterable[U]) -> Operands[U]:
        """The first of `values`, in the order of the iteration, in the places of these."""
        rest = iter(values)
        return self.map(lambda _: next(rest))

    def groups(self) -> tuple[tuple[T, ...], ...]:
        """Up, down, their biases, their scales, their low-rank pairs."""
        return tuple(getattr(self, f.name) for f in fields(self))

    def by_name(self) -> dict[str, tuple[T, ...]]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __iter__(self) -> Iterator[T]:
        return (x for group in self.groups() for x in group)
