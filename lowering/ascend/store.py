"""Packed expert weights by the tensors they were made of: shared by every compiled graph, made on first use, gone when the weights go.

Graph modes capture weights by address. A copy that was written to since is therefore made again in the memory that it has; where an operand
is a view of the model's own memory, and that memory changes, so does the address, and a graph captures it anew.
"""

from __future__ import annotations

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
    """A packed operand; `bytes`: what it takes beside the weights, 0 for a view of them."""

    sources: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    packed: Tensor
    bytes: int

    def of(self, tensors: Sequence[Tensor]) -> bool:
        return all(r() is t for r, t in zip(self.sources, tensors))

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        return self.of(tensors) and self.versions == versions(tensors)

    def takes(self, plain: Tensor) -> bool:
        """Whether these values can be written into the memory that is there."""
        old = self.packed
        return self.bytes > 0 and old.shape == plain.shape and old.dtype == plain.dtype and old.device == plain.device


def versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """What changes when a weight is written to, or gets other memory."""
    return tuple(v for t in tensors for v in (0 if t.is_inference() else t._version, t.data_ptr()))


class Store:
    """Packed operands of one process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: dict[tuple[Any, ...], _Kept] = {}

    @property
    def copied(self) -> int:
        """Bytes of the copies that are alive."""
        return sum(k.bytes for k in list(self.kept.values()))

    def get(self, recipe: Recipe, tensors: Sequence[Tensor]) -> Tensor:
        """The packed operand made of `tensors`, in its format."""
        key = (recipe.plain(), *map(id, tensors))
        found = self.kept.get(key)
        if found is not None and found.holds(tensors):
            return found.packed
        # a copy made under inference mode could not be written again outside of it
        with self.lock, torch.inference_mode(False), torch.no_grad():
            return self._make(key, recipe, tensors)

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """What was made of these is made again, in its own memory: for who has written past the versions (`p.data.copy_`)."""
        written = set(map(id, tensors))
        for k in list(self.kept.values()):
            if any(id(r()) in written for r in k.sources):
                k.versions = ()

    def _make(self, key: tuple[Any, ...], recipe: Recipe, tensors: Sequence[Tensor]) -> Tensor:
        old = self.kept.get(key)
        plain = recipe.pack(tensors)
        free = recipe.is_free(tensors)
        if old is not None and old.of(tensors) and not free and old.takes(plain):
            old.packed.copy_(plain)  # a graph holds this address
            old.versions = versions(tensors)
            return old.packed
        packed = to_nz(plain) if recipe.nz else plain
        size = 0 if free and packed is plain else packed.numel() * packed.element_size()
        if size:
            log.info("an expert weight was copied into the layout of grouped matmul: %.1f MiB", size / 2**20)
        packed = nn.Parameter(packed.detach(), requires_grad=False) if packed.is_floating_point() else packed.detach()
        if old is None:
            weakref.finalize(tensors[0], self.kept.pop, key, None)
        self.kept[key] = _Kept(tuple(map(weakref.ref, tensors)), versions(tensors), packed, size)
        return packed


STORE = Store()
