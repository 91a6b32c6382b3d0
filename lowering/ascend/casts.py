"""Expert weights in the fractal format for training: cast where they are used, kept while they can be used again.

A cast reads and writes the weight once. It serves the forward pass, the gradient of the rows, and the next micro steps; an optimiser step
ends it, and so does whoever frees the weight's memory (FSDP2 does after a layer, unless it is told not to).
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .formats import is_nz, refuses_nz, to_nz


@dataclass
class _Cast:
    memory: weakref.ref[torch.UntypedStorage]  # and not the tensor, which could not be swapped then
    state: tuple[int, int, tuple[int, ...]]
    nz: Tensor

    def alive(self) -> bool:
        memory = self.memory()
        return memory is not None and memory.nbytes() > 0


class Casts:
    """The casts of one process, by the tensor whose memory they were made of."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, tuple[int, ...]], _Cast] = {}

    def get(self, weight: Tensor, owner: Tensor) -> Tensor:
        """`weight` [E, K, N], a view of `owner` or itself, in the fractal format; as it is where it cannot be, or is already."""
        if refuses_nz(weight.shape, weight.dtype) is not None or is_nz(weight):
            return weight
        _until_the_optimiser_steps(self)
        key = (id(owner), tuple(weight.shape))
        state = (owner._version, weight.data_ptr(), tuple(weight.stride()))
        found = self.kept.get(key)
        if found is not None and found.memory() is owner.untyped_storage() and found.state == state and found.alive():
            return found.nz
        self.kept = {k: c for k, c in self.kept.items() if c.alive() and k != key}
        self.kept[key] = _Cast(weakref.ref(owner.untyped_storage()), state, to_nz(weight.detach()))
        return self.kept[key].nz

    def clear(self) -> None:
        self.kept = {}


@functools.cache
def _until_the_optimiser_steps(casts: Casts) -> None:
    """No cast outlives the values it was made of, nor takes memory from an optimiser's step."""
    register_optimizer_step_pre_hook(lambda *_: casts.clear())


CASTS = Casts()
