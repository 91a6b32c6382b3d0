"""Packed expert weights by the tensors they were made of: shared by every compiled graph, made on first use, gone when the weights go.

No tensor is referred to weakly: `torch.utils.swap_tensors` refuses those that are. A storage is, and where one has gone, so have its
weights, or they have got other memory: which of both is looked up among the objects that the garbage collector knows, when it has run and
before anything is packed. A view is not kept, because it would keep the model's memory: it is made on every call.

Graph modes capture weights by address. A copy that was written to since is therefore made again in the memory that it has; where an operand
is a view of the model's own memory, and that memory changes, so does the address, and a graph captures it anew.
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .formats import to_nz
from .weights import Recipe

log = logging.getLogger("moe_compile")


@dataclass
class _Kept:
    """A packed operand, None where it is a view of its weights; `owners`: ids of the tensors it was made of; `bytes`: what it takes."""

    owners: tuple[int, ...]
    memory: tuple[weakref.ref[torch.UntypedStorage], ...]
    versions: tuple[Any, ...]
    packed: Tensor | None
    bytes: int

    @property
    def lost(self) -> bool:
        """Whether some of the memory that it was made of is gone."""
        return any(r() is None for r in self.memory)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it is of what these tensors, whose ids are the owners', hold now."""
        same = all(r() is t.untyped_storage() for r, t in zip(self.memory, tensors))
        return same and self.versions == versions(tensors)

    def takes(self, plain: Tensor) -> bool:
        """Whether these values can be written into the memory that is there."""
        old = self.packed
        return old is not None and old.shape == plain.shape and old.dtype == plain.dtype and old.device == plain.device


def versions(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What changes when a weight is written to, gets other memory, or lies in it otherwise (`p.data = p.data.transpose(1, 2)`)."""
    return tuple((0 if t.is_inference() else t._version, t.data_ptr(), t.shape, t.stride()) for t in tensors)


class Store:
    """Packed operands of one process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: dict[tuple[Any, ...], _Kept] = {}

    @property
    def copied(self) -> int:
        """Bytes of the copies that are alive."""
        self.sweep()
        return sum(k.bytes for k in list(self.kept.values()))

    def get(self, recipe: Recipe, tensors: Sequence[Tensor]) -> Tensor:
        """The packed operand made of `tensors`, in its format."""
        key = (recipe.plain(), *map(id, tensors))
        found = self.kept.get(key)
        if found is not None and found.holds(tensors):
            return _view(recipe, tensors) if found.packed is None else found.packed
        # a copy made under inference mode could not be written again outside of it
        with self.lock, torch.inference_mode(False), torch.no_grad():
            return self._make(key, recipe, tensors)

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """What was made of these is made again, in its own memory: for who has written past the versions (`p.data.copy_`)."""
        written = set(map(id, tensors))
        for k in list(self.kept.values()):
            if written & set(k.owners):
                k.versions = ()

    def sweep(self) -> None:
        """Drops what was made of tensors that are gone. One that has only got other memory keeps its copy, and the copy its address."""
        lost = {key: k.owners for key, k in list(self.kept.items()) if k.lost}
        if lost:
            wanted = {i for owners in lost.values() for i in owners}
            alive = {id(o) for o in gc.get_objects() if id(o) in wanted and issubclass(type(o), Tensor)}
            for key, owners in lost.items():
                if not alive.issuperset(owners):
                    self.kept.pop(key, None)

    def _make(self, key: tuple[Any, ...], recipe: Recipe, tensors: Sequence[Tensor]) -> Tensor:
        self.sweep()
        old, plain = self.kept.get(key), recipe.pack(tensors)
        memory = tuple(weakref.ref(t.untyped_storage()) for t in tensors)
        if recipe.is_free(tensors):
            self.kept[key] = _Kept(tuple(map(id, tensors)), memory, versions(tensors), None, 0)
            return _view(recipe, tensors)
        if old is not None and old.packed is not None and old.takes(plain):
            old.packed.copy_(plain)  # a graph holds this address
            old.memory, old.versions = memory, versions(tensors)
            return old.packed
        packed = to_nz(plain) if recipe.nz else plain
        size = packed.numel() * packed.element_size()
        log.info("an expert weight was copied into the layout of grouped matmul: %.1f MiB", size / 2**20)
        packed = nn.Parameter(packed.detach(), requires_grad=False) if packed.is_floating_point() else packed.detach()
        self.kept[key] = _Kept(tuple(map(id, tensors)), memory, versions(tensors), packed, size)
        return packed


def _view(recipe: Recipe, tensors: Sequence[Tensor]) -> Tensor:
    """The operand where packing copies nothing."""
    with torch.no_grad():
        return recipe.pack(tensors)


STORE = Store()


def _after_collection(phase: str, info: dict[str, int]) -> None:
    if phase == "stop" and info["generation"] == 2:
        STORE.sweep()


gc.callbacks.append(_after_collection)
