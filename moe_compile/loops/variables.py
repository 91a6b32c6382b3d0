"""From Dynamo's variables for a call's arguments to a `Call`: trees of tensors, constants and objects, and back."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..ir import Rejection
from ..passes.aten.sharded import is_sharded
from .call import Call, Fields, Given, Leaf, Made, Owner, Spec
from .places import MODULE, Place


@dataclass
class Arguments:
    """What hangs on the arguments of one call. `unread`: why they cannot be read, in the user's words, or ""."""

    owner: Any = None  # Dynamo's variable of the module
    tensors: dict[str, Spec] = field(default_factory=dict)
    leaves: dict[str, Any] = field(default_factory=dict)  # tensor -> Dynamo's variable
    roots: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)
    device: torch.device | None = None
    unread: str = ""

    @property
    def module(self) -> nn.Module | None:
        return None if self.owner is None else module_of(self.owner)

    def call(self, tx: Any, fn: types.FunctionType, bound: Mapping[str, Any]) -> Call | None:
        """The call as `reading` wants it; None where no tensor is handed in."""
        effects = tx.output.side_effects
        self.owner = next((v for v in bound.values() if module_of(v) is not None), None)
        trees = {n: self._tree(v, n, effects) for n, v in bound.items()}
        if self.device is None:
            return None
        kind = self.device.type
        autocast = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
        return Call(fn, self.module, trees, self.tensors, self.device, autocast, torch.is_grad_enabled(), self.roots)

    def _tree(self, variable: Any, label: str, effects: Any) -> Any:
        if isinstance(variable, tuple):  # what `*args` of the signature takes, as `bind` gives it
            return tuple(self._tree(v, f"{label}[{i}]", effects) for i, v in enumerate(variable))
        if isinstance(variable, dict):
            return {k: self._tree(v, f"{label}[{k!r}]", effects) for k, v in variable.items()}
        variable = variable.realize()
        if self.owner is not None and variable is self.owner.realize():
            return Owner()
        value = example_value(variable)
        if isinstance(value, torch.Tensor):
            return self._leaf(variable, value, label)
        if variable.is_python_constant() and not _holds(variable):
            return Given(variable.as_python_constant(), self._place(variable, label, variable.as_python_constant()))
        items = _items(variable)
        if items is not None:
            trees = [self._tree(v, f"{label}[{i}]", effects) for i, v in enumerate(items)]
            cls = getattr(variable, "tuple_cls", None) or variable.python_type()
            return Fields(cls, trees, Place(f"argument {label}")) if issubclass(cls, tuple) and cls is not tuple else cls(trees)
        pairs = _pairs(variable)
        if pairs is not None:
            return {k: self._tree(v, f"{label}[{k!r}]", effects) for k, v in pairs}
        return self._object(variable, label, effects)

    def _leaf(self, variable: Any, value: torch.Tensor, label: str) -> Leaf:
        if is_sharded(value):
            self.unread = self.unread or f"{label} is a DTensor, no plain tensor"
        wide = value.shape[-1:] if value.ndim > 1 else ()  # the only dim of a list counts its rows
        rows = value.shape[: value.ndim - len(wide)]
        name = re.sub(r"\W+", "_", label).strip("_")
        while name in self.tensors:
            name += "_"
        self.tensors[name] = Spec(value.dtype, (*(_size(s) for s in rows), *(_width(s) for s in wide)))
        self.leaves[name] = variable
        self.device = self.device or value.device
        return Leaf(name)

    def fix_widths(self) -> None:
        """Have Dynamo fix the widths that were read as numbers: an operation on no rows at all would not make it do so."""
        for name, variable in self.leaves.items():
            shape = self.tensors[name].shape
            if shape and isinstance(shape[-1], int):
                int(example_value(variable).shape[-1])

    def _object(self, variable: Any, label: str, effects: Any) -> Any:
        """An object of the user's, that was there before the graph or that the graph made."""
        value = getattr(variable, "value", None)
        if variable.source is not None and value is not None:
            return Given(value, self._place(variable, label, value))
        cls = variable.python_type() if type(variable).__name__.startswith(("UserDefinedObject", "FrozenDataClass")) else None
        made = effects.store_attr_mutations.get(variable)
        if cls is None or not made or type(variable.mutation_type).__name__ != "AttributeMutationNew":
            self.unread = self.unread or f"{label} is a {_kind(variable)}, which no probe can stand for"
            return Given(None, Place(f"argument {label}"))
        self.roots[f"argument {label}"] = value
        return Made(cls, {k: self._tree(v, f"{label}.{k}", effects) for k, v in made.items()}, Place(f"argument {label}"))

    def _place(self, variable: Any, label: str, value: Any) -> Place:
        root = f"argument {label}"
        self.roots[root], self.sources[root] = value, variable.source
        return Place(root)


def function_of(func: Any) -> types.FunctionType | None:
    if type(func).__name__ not in ("UserFunctionVariable", "UserMethodVariable"):
        return None
    fn = func.get_function()
    return fn if isinstance(fn, types.FunctionType) and not getattr(fn, "_torchdynamo_disable", False) else None


def module_of(variable: Any) -> nn.Module | None:
    """The module behind one of Dynamo's variables."""
    if isinstance(variable, (tuple, dict)):
        return None  # of `*args` and `**kwargs`
    variable = variable.realize()
    if not type(variable).__name__.endswith("ModuleVariable"):
        return None  # other variables may refuse even the look
    value = getattr(variable, "value", None)
    return value if isinstance(value, nn.Module) else None


def attribute(tx: Any, owner: Any, path: str) -> Any:
    """The variable of ``owner.path``, with Dynamo's guards and sources."""
    from torch._dynamo.variables.builder import SourcelessBuilder

    look_up = SourcelessBuilder.create(tx, getattr)  # a variable's own method for it has another name in torch 2.14
    variable = owner
    for part in path.split("."):
        variable = look_up.call_function(tx, [variable.realize(), SourcelessBuilder.create(tx, part)], {})
    return variable


def refuse_modes(tx: Any) -> None:
    """Raise `Rejection` where a mode of the user's sees every call: it would see none of a captured loop's."""
    for variable in tx.symbolic_torch_function_state.mode_stack:
        mode = getattr(variable.realize(), "value", None)
        if not isinstance(mode, torch.utils._device.DeviceContext):
            raise Rejection(f"it runs under a {type(mode).__name__}, a mode that sees each of its calls", stage="modes")


def example_value(variable: Any) -> Any:
    return variable.as_proxy().node.meta.get("example_value") if type(variable).__name__ == "TensorVariable" else None


def _items(variable: Any) -> list[Any] | None:
    if type(variable).__name__ in ("TupleVariable", "ListVariable", "NamedTupleVariable", "StructSequenceVariable"):
        return list(variable.items)
    return None


def _pairs(variable: Any) -> list[tuple[Any, Any]] | None:
    if type(variable).__name__ != "ConstDictVariable" or variable.user_cls is not dict:
        return None
    keys = [k.vt.realize() for k in variable.items]
    if not all(k.is_python_constant() for k in keys):
        return None
    return list(zip((k.as_python_constant() for k in keys), variable.items.values(), strict=True))


def _holds(variable: Any) -> bool:
    """Whether a variable is a container: its items are looked at one by one, for they have sources of their own."""
    return _items(variable) is not None or type(variable).__name__ == "ConstDictVariable"


def _kind(variable: Any) -> str:
    try:
        return str(variable.python_type().__name__)
    except NotImplementedError:
        return type(variable).__name__.removesuffix("Variable")


def _size(s: Any) -> Any:
    if isinstance(s, torch.SymInt):
        e = s.node.expr
        return int(e) if e.is_Integer else e
    return s


def _width(s: Any) -> Any:
    """The last dim: a number if there is any to be had, for the weights that it meets make it one anyway."""
    size = _size(s)
    if isinstance(size, int) or len(size.free_symbols) != 1 or getattr(s.node, "hint", None) is None:
        return size
    return int(s.node.hint)


def sources_of(func: Any, fn: types.FunctionType, arguments: Arguments) -> Iterator[tuple[str, Any]]:
    """Dynamo's sources at the roots of places: the module, the function, objects among the arguments."""
    from torch._dynamo.source import AttrSource, TypeSource

    from .places import FUNCTION, of_class

    owner = None if arguments.owner is None else arguments.owner.realize().source
    if owner is not None:
        yield MODULE, owner
    source = func.get_source() if hasattr(func, "get_source") else func.source
    if source is None and owner is not None and of_class(type(arguments.module), fn.__name__) is fn:
        source = AttrSource(TypeSource(owner), fn.__name__)
    if source is not None:
        yield FUNCTION, source
    yield from ((k, s) for k, s in arguments.sources.items() if s is not None)
