"""Layers that are alike: of a model with many, one of each kind is looked at, and what is found there holds for the others.

alike(a, b) <=> the same classes, parameters of the same shapes, the same attributes and no hooks, but for numbers that count the layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

_PARTS = {"_parameters", "_buffers", "_modules", "_compiled_call_impl"}  # compared by themselves, or no part of what a module is
_MOST = 10_000  # calls of layers of a kind: a loop that ends once what a layer gives is large enough goes on forever
_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class Layer:
    """`path`: in the model; `place`: its number in the list that holds it."""

    path: str
    place: int
    module: nn.Module


@dataclass
class Kind:
    """Layers that are alike, the first of which stands for all."""

    layers: list[Layer]


def kinds(model: nn.Module) -> list[Kind]:
    """The kinds of layers of a model: children of its outermost lists of modules, and blocks that stand outside of them, each once."""
    found: list[Kind] = []
    once = {id(layer.module): layer for layer in reversed([*_layers(model), *_blocks(model)])}
    for layer in reversed(once.values()):
        known = next((k for k in found if alike(k.layers[0], layer)), None)
        if known is None:
            found.append(Kind([layer]))
        else:
            known.layers.append(layer)
    return found


def _layers(model: nn.Module, path: str = "") -> Iterator[Layer]:
    for name, child in model.named_children():
        below = f"{path}{name}"
        if isinstance(child, nn.ModuleList):
            yield from (Layer(f"{below}.{i}", i, m) for i, m in enumerate(child) if m is not None)
        else:
            yield from _layers(child, f"{below}.")


def _blocks(model: nn.Module) -> Iterator[Layer]:
    """Parts of a model, outside of lists, that could hold experts: what owns parameters of three dimensions, with the router beside it.

    Of a block inside of another one the outer one alone. Convolutions hold none.
    """
    outside = dict(_outside_of_lists(model))
    wide = (path for path, m in outside.items() if path and not isinstance(m, _ConvNd) and any(p.dim() > 2 for p in _own(m)))
    above = {_with_router(path, outside) for path in wide}
    for path in sorted(above):
        if not any(path.startswith(other + ".") for other in above):
            yield Layer(path, 0, outside[path])


def _with_router(path: str, outside: Mapping[str, nn.Module]) -> str:
    """The module at a path, or the one that holds it where it holds stacks alone; never the whole model."""
    parent = path.rpartition(".")[0]
    stacks_alone = all(p.dim() > 2 for p in outside[path].parameters())
    return parent if stacks_alone and parent and not any(isinstance(m, nn.ModuleList) for m in outside[parent].modules()) else path


def _outside_of_lists(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    yield path, model
    for name, child in model.named_children():
        if not isinstance(child, nn.ModuleList):
            yield from _outside_of_lists(child, f"{path}.{name}".lstrip("."))


def _own(m: nn.Module) -> Iterator[nn.Parameter]:
    return m.parameters(recurse=False)


def rest_is_dense(model: nn.Module, layers: list[Layer]) -> bool:
    """Whether nothing outside of the layers could hold experts: no parameter of three dimensions, no other collection of parts."""
    inside = {id(m) for layer in layers for m in layer.module.modules()}
    parents = {layer.path.rpartition(".")[0] for layer in layers}
    lists = {path for path in parents if isinstance(model.get_submodule(path), nn.ModuleList)}
    for path, m in model.named_modules():
        if id(m) in inside:
            continue
        if any(p.dim() > 2 for p in _own(m)):
            return False
        if isinstance(m, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)) and path not in lists:
            return False
    return True


def alike(a: Layer, b: Layer) -> bool:
    """Whether two layers are the same but for the values of their weights and the numbers that count them."""
    ours, others = (dict(x.module.named_modules()) for x in (a, b))
    return ours.keys() == others.keys() and all(_same_module(m, others[n], (a.place, b.place)) for n, m in ours.items())


def _same_module(a: nn.Module, b: nn.Module, places: tuple[int, int]) -> bool:
    if type(a) is not type(b) or any(_tensors(a, name) != _tensors(b, name) for name in ("_parameters", "_buffers")):
        return False
    ours, others = ({k: v for k, v in vars(m).items() if k not in _PARTS} for m in (a, b))
    return ours.keys() == others.keys() and all(_same(v, others[k], places) for k, v in ours.items())


def _tensors(m: nn.Module, which: str) -> list[Any]:
    return [(k, None if t is None else (t.shape, t.dtype, t.device, t.requires_grad)) for k, t in getattr(m, which).items()]


def _same(a: Any, b: Any, places: tuple[int, int]) -> bool:
    """Whether two attributes are the same, or are the numbers of their layers."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) is int and (a, b) == places:
        return True
    if isinstance(a, _PLAIN):
        return bool(a == b)
    if isinstance(a, Tensor):
        return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    if isinstance(a, (list, tuple, set, frozenset)):
        return len(a) == len(b) and (all(map(_same, a, b, [places] * len(a))) if isinstance(a, (list, tuple)) else bool(a == b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(v, b[k], places) for k, v in a.items())
    return False  # what cannot be compared may differ: another kind


Look = Callable[[Kind, tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def one_of_each(found: list[Kind], look: Look) -> Iterator[None]:
    """While this lasts the first layer of a kind is called through `look`, and the others give what it gave: a value of the same form."""
    kept = [(layer.module, vars(layer.module).get("forward")) for k in found for layer in k.layers]
    for k in found:
        stand = _stand(k, look)
        for layer in k.layers:
            layer.module.forward = stand  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, own in kept:
            _put_back(module, own)


def _put_back(module: nn.Module, own: Any) -> None:
    vars(module).pop("forward", None)
    if own is not None:
        module.forward = own  # type: ignore[method-assign]


def _stand(k: Kind, look: Look) -> Callable[..., Any]:
    """In place of the forward of a kind's layers; what they give is kept by the form of their arguments."""
    first, given = k.layers[0].module, {}
    own, calls = vars(first).get("forward"), itertools.count()

    def forward(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= _MOST:
            raise RuntimeError("the model calls its layers on and on")
        form = repr(_form((args, kwargs)))
        if form not in given:
            _put_back(first, own)
            try:
                given[form] = look(k, args, kwargs)
            finally:
                first.forward = forward  # type: ignore[method-assign]
        return given[form]

    return forward


def _form(x: Any) -> Any:
    if isinstance(x, Tensor):
        return (tuple(x.shape), x.dtype, x.device)
    if isinstance(x, (list, tuple)):
        return [_form(v) for v in x]
    if isinstance(x, dict):
        return {k: _form(v) for k, v in x.items()}
    return x if isinstance(x, (int, float, bool, str, type(None))) else type(x).__name__
