"""`summed`: Σ over the ranks of a group of what each of them holds, through peers' memory where the ranks have agreed upon that.

For the results of experts on a batch that all ranks share: at few tokens a collective is latency, most of which the peers' memory saves.
Which way a sum goes follows from its size and dtype alone, which are equal on all ranks. `moe_compile.peers` agrees upon the memory;
without it every sum is an all-reduce.
"""

from __future__ import annotations

import enum
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .schemas import library

ONE_SHOT = 1 << 19  # bytes up to which each rank reads all of its peers' parts
TWO_SHOT = 1 << 24  # bytes up to which each rank sums its share, and reads the others' sums; the memory that a group takes on each rank
ALIGNED = 16  # bytes: both kernels read vectors of them

library.define("summed(Tensor part, str group) -> Tensor")


def resolved(group: str) -> Any:
    """The process group of a name. Raises ValueError or RuntimeError where there is none."""
    return torch.distributed.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]


class Sum(enum.Enum):
    """How a sum over ranks is taken."""

    COLLECTIVE = "all-reduce"
    ONE_SHOT = "each rank reads its peers' parts"
    TWO_SHOT = "each rank sums a share and reads its peers' sums"


def way(shape: Sequence[int], dtype: torch.dtype) -> Sum:
    """How a sum of tensors of this shape and dtype is taken where there is memory for it."""
    size = math.prod(shape) * dtype.itemsize
    if dtype not in (torch.bfloat16, torch.float32) or not size or size % ALIGNED or size > TWO_SHOT:
        return Sum.COLLECTIVE
    return Sum.ONE_SHOT if size <= ONE_SHOT else Sum.TWO_SHOT


@dataclass
class Peers:
    """Memory of a group, of one size on all ranks, that each rank's peers read, and who waits for whom.

    handle: torch's, of the rendezvous. timeout: milliseconds for which a rank's kernel waits for its peers before it traps. What is called
    is in order behind what was called last, whichever streams that was on. Nobody writes again before all have read: everything below ends
    with a barrier.
    """

    group: weakref.ref[Any]
    name: str
    rank: int
    size: int
    memory: Tensor
    handle: Any
    timeout: int
    stream: Any = None
    buffers: dict[Any, Tensor] = field(default_factory=dict)

    def sum(self, part: Tensor, how: Sum) -> Tensor:
        """Σ over the ranks of part, contiguous, in the ranks' order in its own dtype; all ranks get the same bits."""
        self._in_order()
        own = self._own(0, part)
        self.wait()  # the kernels below wait without end: nobody goes there before all have come here
        if how is Sum.ONE_SHOT:
            aligned = part if part.data_ptr() % ALIGNED == 0 else part.clone()
            return torch.ops.symm_mem.one_shot_all_reduce_copy(own, aligned, "sum", self.name)  # type: ignore[no-any-return]
        own.copy_(part)
        torch.ops.symm_mem.two_shot_all_reduce_(own, "sum", self.name)
        return own.clone()

    def gather(self, *parts: tuple[int, Tensor]) -> list[Tensor]:
        """(byte at which it lies meanwhile, contiguous part [n, ...]) of each rank -> [ranks · n, ...] of all, by rank."""
        self._in_order()
        for at, part in parts:
            self._own(at, part).copy_(part)
        self.wait()
        out = [part.new_empty(self.size * len(part), *part.shape[1:]) for _, part in parts]
        for (at, part), whole in zip(parts, out, strict=True):
            for r, into in enumerate(whole.chunk(self.size) if len(part) else ()):
                into.copy_(part if r == self.rank else self._of(r, at, part.shape, part.dtype))
        self.wait()
        return out

    def scatter(self, at: int, part: Tensor) -> Tensor:
        """part [ranks · n, ...], contiguous -> Σ over the ranks of this rank's [n, ...], in the ranks' order in its own dtype."""
        self._in_order()
        each, own = part.chunk(self.size), self._own(at, part).chunk(self.size)
        for r in range(self.size):
            if r != self.rank:
                own[r].copy_(each[r])
        self.wait()
        at += self.rank * each[0].numel() * part.element_size()
        addends = [each[r] if r == self.rank else self._of(r, at, each[0].shape, part.dtype) for r in range(self.size)]
        out = addends[0] + addends[1]
        for more in addends[2:]:
            out += more
        self.wait()
        return out

    def wait(self) -> None:
        """Until all ranks have come here; a rank that does not is named on stderr when the time is up."""
        self.handle.barrier(0, self.timeout)

    def _own(self, at: int, like: Tensor) -> Tensor:
        return self.memory[at : at + like.numel() * like.element_size()].view(like.dtype).view(like.shape)

    def _of(self, rank: int, at: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        key = (rank, at, tuple(shape), dtype)
        if key not in self.buffers:
            self.buffers[key] = self.handle.get_buffer(rank, list(shape), dtype, at // dtype.itemsize)
        return self.buffers[key]

    def _in_order(self) -> None:
        if not self.memory.is_cuda:
            return
        now = torch.cuda.current_stream(self.memory.device)
        if self.stream is not None and now != self.stream and not torch.cuda.is_current_stream_capturing():
            now.wait_stream(self.stream)
        self.stream = now


_peers: dict[str, Peers] = {}


def set_peers(found: Peers) -> None:
    """Sums over this group go through peers' memory from now on, on every rank."""
    _peers[found.name] = found


def of_group(name: str) -> Peers | None:
    """What the ranks of the group of this name agreed upon; None where they did not, or that group is destroyed."""
    found = _peers.get(name)
    if found is None or found.group() is resolved(name):
        return found
    del _peers[name]
    return None


def summed(part: Tensor, group: str) -> Tensor:
    """Σ over the ranks of `group` of part, of one shape and dtype on all of them."""
    peers, how = of_group(group), way(part.shape, part.dtype)
    if peers is None or how is Sum.COLLECTIVE:
        out = torch.ops._c10d_functional.all_reduce(part.contiguous(), "sum", group)
        return torch.ops._c10d_functional.wait_tensor(out)  # type: ignore[no-any-return]
    return peers.sum(part.contiguous(), how)


library.impl("summed", summed, "CompositeExplicitAutograd")
torch.library.register_fake("moe_compile::summed", lambda part, group: part.new_empty(part.shape), lib=library)
# all ranks hold the sum's gradient alike, and it is that of each addend
torch.library.register_autograd("moe_compile::summed", lambda ctx, grad: (grad, None), lib=library)
