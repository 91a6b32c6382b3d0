"""Weights that `moe_compile.prepare` froze: which they are, and whether they still are what they were.

A weight is known by its memory, because compiled graphs read views of parameters. It is looked at through the parameter that its module
holds, whose version counts what is written to it, and through a spot of each expert that the kernel compares (kernels/packed.h), for
writes past that count (`.data`, numpy). One that was written to, or that another one stands for now, is frozen no longer. No tensor is
referred to weakly: `torch.utils.swap_tensors` refuses those that are.
"""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ...errors import OptionError
from ..reference.generic import Layout
from .build import STORAGE

log = logging.getLogger("moe_compile")

COLUMNS = 32  # of a packed panel (kernels/plan.h)


@dataclass(frozen=True)
class _Held:
    """A parameter or buffer by the module that holds it, with its version when it was frozen."""

    module: weakref.ref[nn.Module]
    name: str
    version: int

    def tensor(self) -> Tensor | None:
        """What stands there now."""
        module = self.module()
        return None if module is None else module._parameters.get(self.name, module._buffers.get(self.name))


@dataclass
class _Weight:
    """Memory of frozen parameters, and where these are. The weak reference keeps the address from being used again."""

    memory: StorageWeakRef
    parameters: list[_Held]

    def held(self) -> list[tuple[Tensor, int]]:
        """The parameters that still stand in this memory, and their versions when they were frozen."""
        now = ((h.tensor(), h.version) for h in self.parameters)
        return [(p, v) for p, v in now if p is not None and _address(p) == self.memory.cdata]

    def unchanged(self) -> bool:
        held = self.held()
        return bool(held) and all(p._version == v for p, v in held)


_frozen: dict[int, _Weight] = {}  # by address of the storage
changed: list[Callable[[int | None], None]] = []  # told of memory that is frozen no longer; of None when some newly is


def freeze(model: nn.Module) -> dict[str, int]:
    """Let inference on the CPU read packed copies of the expert weights of `model`, made at the first call.

    Returns {name: bytes of the copy} of parameters that look like experts' (several matrices of a kind); what is packed in the end is what
    an experts op reads. Raises `OptionError` where a parameter cannot be watched.
    """
    own = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    tensors = [(n, t) for n, t in own if _can_be_read(t)]
    modules = dict(model.named_modules(remove_duplicate=False))
    blind = next((n for n, t in tensors if t.is_inference()), None)
    if blind is not None:
        raise OptionError(f"{blind!r} was made under torch.inference_mode(), where writes leave no trace: make the model outside of it")
    others = {a for a, w in _frozen.items() if not w.unchanged()}  # parameters that other ones stand for now
    for address in {_address(t) for _, t in tensors} | others:
        _drop(address)
    for path, t in tensors:
        weight = _frozen.setdefault(_address(t), _Weight(StorageWeakRef(t.untyped_storage()), []))
        owner, _, name = path.rpartition(".")
        module = weakref.ref(modules[owner], functools.partial(_gone, _address(t)))
        weight.parameters.append(_Held(module, name, t._version))
    _tell(None)
    return {n: t.numel() * t.element_size() for n, t in _look_like_experts(model)}


def _can_be_read(t: Tensor) -> bool:
    plain = type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided
    return plain and t.device.type == "cpu" and t.dtype in STORAGE and t.ndim >= 2 and t.numel() > 0


def _look_like_experts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Stacks of matrices that stand beside each other in a module, and matrices of equal members of a list."""
    for prefix, module in model.named_modules():
        own = [(f"{prefix}.{n}" if prefix else n, p) for n, p in module.named_parameters(recurse=False) if _can_be_read(p)]
        stacks = [(n, p) for n, p in own if p.ndim == 3 and p.shape[0] > 1]
        if len(stacks) > 1:
            yield from stacks
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            members = [dict(m.named_parameters()) for m in module.children()]
            shapes = [{n: p.shape for n, p in m.items()} for m in members]
            matrices = [n for n, shape in (shapes[0] if shapes else {}).items() if len(shape) == 2]
            if len(members) > 1 and len(matrices) in (2, 3) and len(shapes[0]) <= 6 and all(s == shapes[0] for s in shapes):
                at = f"{prefix}." if prefix else ""
                for (child, _), member in zip(module.named_children(), members, strict=True):
                    yield from ((f"{at}{child}.{n}", member[n]) for n in matrices)


class Sources:
    """The frozen weights that packed panels were made of."""

    def __init__(self, weights: dict[int, _Weight]) -> None:
        self.weights = weights

    def unchanged(self) -> bool:
        return all(w.unchanged() for w in self.weights.values())

    def parameters(self) -> list[tuple[Tensor, int]]:
        """The parameters and their versions when they were frozen."""
        return [x for w in self.weights.values() for x in w.held()]

    def thaw(self) -> None:
        """They were written to or replaced: from now on they are read as the model holds them."""
        log.warning(
            "expert weights were written to or replaced after moe_compile.prepare: read as the model holds them until it is called again"
        )
        for address in self.weights:
            _drop(address)


def sources(*lists: Sequence[Tensor]) -> Sources | None:
    """What the tensors of an op are frozen as; None unless all of them are, and unchanged."""
    if not _frozen:
        return None
    found = {a: _frozen.get(a) for a in {_address(t) for ts in lists for t in ts}}
    weights = {a: w for a, w in found.items() if w is not None}
    if len(weights) < len(found):
        replaced = {a: w for a, w in _frozen.items() if not w.unchanged()}
        if replaced:  # what other parameters stand for now is kept by nobody but us
            Sources(replaced).thaw()
        return None
    made = Sources(weights)
    if made.unchanged():
        return made
    made.thaw()
    return None


def any_frozen() -> bool:
    return bool(_frozen)


def packed_bytes(layout: Layout, hidden: int, down: Sequence[Tensor]) -> int:
    """Bytes of packed up and down weights: whole panels of columns, and for bf16 whole pairs along the depth."""
    inter, out, dtype = layout.intermediate(down), layout.out_features(down), down[0].dtype
    even = 2 if dtype == torch.bfloat16 else 1

    def panels(columns: int, depth: int) -> int:
        return -(-columns // COLUMNS) * COLUMNS * (-(-depth // even) * even)

    return layout.num_experts * dtype.itemsize * (panels(inter, hidden) * (2 if layout.gated else 1) + panels(out, inter))


def _address(t: Any) -> int:
    return int(t.untyped_storage()._cdata)


def _gone(address: int, _: object) -> None:
    weight = None if sys.is_finalizing() else _frozen.get(address)  # whom to tell may be gone, too
    if weight is not None and not weight.held():
        _drop(address)


def _drop(address: int) -> None:
    if _frozen.pop(address, None) is not None:
        _tell(address)


def _tell(address: int | None) -> None:
    for listener in changed:
        listener(address)
