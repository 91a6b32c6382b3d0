"""`summed`: Σ over the ranks of a group of what each of them holds, through peers' memory where the ranks have agreed upon that.

For the results of experts on a batch that all ranks share: at few tokens a collective is latency, most of which the peers' memory saves.
Which way a sum goes follows from its size and dtype alone, which are equal on all ranks. `moe_compile.peers` agrees upon the memory;
without it every sum is an all-reduce.
"""

from __future__ import annotations

import enum
import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .schemas import library

SUMS = 1 << 24  # bytes of a sum, at most, in the memory of a group whose batch is shared
ONE_SHOT = 1 << 19  # bytes up to which each of more than two ranks gets all parts
ALIGNED = 16  # bytes: kernels read vectors of them
FLAGS = 1 << 18  # bytes by which ranks wait for each other, in front of what they exchange
MESSAGE = 1 << 22  # bytes for ids and weights
MOST = 8  # ranks

library.define("summed(Tensor part, str group) -> Tensor")


def resolved(group: str) -> Any:
    """The process group of a name. Raises ValueError or RuntimeError where there is none."""
    return torch.distributed.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]


class Sum(enum.Enum):
    """How a sum over ranks is taken."""

    COLLECTIVE = "all-reduce"
    ONE_SHOT = "each rank gets all parts"
    TWO_SHOT = "each rank sums a share and gets its peers' sums"


def memory_of(rows: int) -> int:
    """Bytes of a group's memory on each rank, for so many bytes of rows (of all ranks) or of a sum: two halves, used in turn."""
    return FLAGS + 2 * (MESSAGE + rows)


@dataclass
class Peers:
    """Memory of a group, of one size on all ranks, that each rank's peers write to, and who waits for whom.

    each: the ranks' memory, zero when they meet. timeout: milliseconds for which a kernel waits for a peer before it traps. kernels: what
    exchanges (`lowering.triton.peers`). workers (at most; `least`: at least), chunks (at most), words of a tile (few: where
    there are fewer tiles than workers): how, on all ranks alike.
    What is called is in order behind what was called last, whichever streams that was on; every rank makes the same calls.
    """

    group: weakref.ref[Any]
    name: str
    rank: int
    size: int
    each: Sequence[Tensor]
    timeout: int
    kernels: Any
    workers: int = 264
    chunks: int = 2
    tile: int = 4096
    few: int = 2048
    least: int = 1
    stream: Any = None
    told: bool = False  # that a rank was lost
    message = MESSAGE

    def __post_init__(self) -> None:
        own = self.each[self.rank]
        self.half = (len(own) - FLAGS) // 2 // ALIGNED * ALIGNED
        self.bases = torch.tensor([m.data_ptr() for m in self.each], dtype=torch.int64, device=own.device)
        self.count = torch.zeros(2, dtype=torch.int64, device=own.device)
        # which the host reads when the device is lost, whatever torch makes tensors on (models are placed under `torch.device("meta")`)
        self.lost = torch.zeros(self.size, dtype=torch.int32, device="cpu", pin_memory=own.is_cuda)

    def holds(self, rows: int, message: int = 0) -> bool:
        """Whether a half takes so many bytes of rows, or of addends, of all ranks, and of ids and weights; vectors are of whole ranks."""
        return 0 < rows <= self.half - MESSAGE and rows % (ALIGNED * self.size) == 0 and message <= MESSAGE

    def way(self, shape: Sequence[int], dtype: torch.dtype) -> Sum:
        """How a sum of tensors of this shape and dtype is taken."""
        size = math.prod(shape) * dtype.itemsize
        if not dtype.is_floating_point or not self.holds(size):
            return Sum.COLLECTIVE
        one_shot = size <= ONE_SHOT or self.size == 2
        return Sum.ONE_SHOT if one_shot and self.holds(size * self.size) else Sum.TWO_SHOT  # a place for each rank's part

    def sum(self, part: Tensor, how: Sum) -> Tensor:
        """Σ over the ranks of part, contiguous, in the ranks' order; all ranks get the same bits."""
        self._before()
        if how is Sum.ONE_SHOT:
            return self.kernels.added(self, part, False)  # type: ignore[no-any-return]
        return self.gather(self.scatter(part.view(-1)), *self._nothing)[0].view(part.shape)

    def gather(self, x: Tensor, ids: Tensor, weights: Tensor, said: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x [n, ...], ids and weights, contiguous, of each rank -> those of all by rank, what each says [ranks], whether all say the same.

        Where they do not the rest is undefined."""
        self._before()
        return self.kernels.gathered(self, x, ids, weights, said)  # type: ignore[no-any-return]

    def say(self, said: int) -> Tensor:
        """Only what each rank says [ranks]: other ranks may be in a `gather` meanwhile, and hear it."""
        return self.gather(*self._nothing[:1] * 3, said=said)[3]

    def scatter(self, part: Tensor) -> Tensor:
        """part [ranks · n, ...], contiguous -> Σ over the ranks of this rank's [n, ...], in the ranks' order."""
        self._before()
        return self.kernels.added(self, part, True)  # type: ignore[no-any-return]

    @property
    def _nothing(self) -> tuple[Tensor, Tensor]:
        nothing = torch.empty(0, dtype=torch.int64, device=self.count.device)
        return nothing, nothing

    def _before(self) -> None:
        """In order behind the last call. Raises RuntimeError where a rank was lost."""
        if told := self.missing():
            raise RuntimeError(told)
        if not self.count.is_cuda:
            return
        last, now = self.stream, torch.cuda.current_stream(self.count.device)
        self.stream = now
        # streams of one capture wait for each other as streams of none do; neither may wait for the other kind
        if last is not None and now != last and _captured(last) == _captured(now):
            now.wait_stream(last)

    def missing(self) -> str:
        """Whom a kernel has waited for in vain, and what to do; "" for nobody. Nothing of the device's is asked, which is lost then."""
        who = ", ".join(f"rank {r}" for r, lost in enumerate(self.lost.tolist()) if lost)
        if not who:
            return ""
        return (
            f"moe_compile: {who} did not come to an exchange of group {self.name} within {self.timeout / 1000:g} s (dead, or still busy): "
            f"rank {self.rank} of {self.size} cannot go on, and CUDA reports a launch failure there. See what ended {who}, and start all "
            "ranks again; where it was only late, a longer timeout of init_process_group helps"
        )


def _captured(stream: Any) -> bool:
    if stream.cuda_stream == 0:  # the legacy stream never is, and may not be asked during some captures
        return False
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


_peers: dict[str, Peers] = {}


def set_peers(found: Peers) -> None:
    """Sums over this group go through peers' memory from now on, on every rank."""
    _peers[found.name] = found


def known() -> Iterable[Peers]:
    """The memory of all groups, of those that are destroyed too."""
    return _peers.values()


def of_group(name: str) -> Peers | None:
    """What the ranks of the group of this name agreed upon; None where they did not, or that group is destroyed."""
    found = _peers.get(name)
    if found is None or found.group() is resolved(name):
        return found
    del _peers[name]
    return None


def summed(part: Tensor, group: str) -> Tensor:
    """Σ over the ranks of `group` of part, of one shape and dtype on all of them."""
    peers = of_group(group)
    how = Sum.COLLECTIVE if peers is None else peers.way(part.shape, part.dtype)
    if peers is None or how is Sum.COLLECTIVE:
        out = torch.ops._c10d_functional.all_reduce(part.contiguous(), "sum", group)
        return torch.ops._c10d_functional.wait_tensor(out)  # type: ignore[no-any-return]
    return peers.sum(part.contiguous(), how)


library.impl("summed", summed, "CompositeExplicitAutograd")
torch.library.register_fake("moe_compile::summed", lambda part, group: part.new_empty(part.shape), lib=library)
# all ranks hold the sum's gradient alike, and it is that of each addend
torch.library.register_autograd("moe_compile::summed", lambda ctx, grad: (grad, None), lib=library)
