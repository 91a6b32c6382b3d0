"""Peers' memory that is files which all processes of a machine map, with a barrier of the group's: what it holds is read as on a card."""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_compile.ops import peer_rows, summed

SIZE = peer_rows.MESSAGE + (1 << 16)


class Files:
    """The handle of a rendezvous. waits: how often the ranks have met."""

    def __init__(self, folder: Path, group: Any, size: int) -> None:
        self.group, self.waits = group, 0
        own = str(folder / str(group.rank()))
        self.own = torch.from_file(own, shared=True, size=size, dtype=torch.uint8)
        dist.barrier(group)
        self.each = [torch.from_file(str(folder / str(r)), shared=True, size=size, dtype=torch.uint8) for r in range(group.size())]

    def barrier(self, channel: int, timeout: int) -> None:
        self.waits += 1
        dist.barrier(self.group)

    def get_buffer(self, rank: int, shape: list[int], dtype: torch.dtype, at: int) -> Tensor:
        return self.each[rank].view(dtype)[at:][: torch.Size(shape).numel()].view(shape)


@contextlib.contextmanager
def peers(rank: int, group: Any, size: int = SIZE) -> Iterator[Files]:
    with tempfile.TemporaryDirectory() as mine:
        folder = [mine]
        dist.broadcast_object_list(folder, 0, group=group)
        files = Files(Path(folder[0]), group, size)
        name = group.group_name
        summed.set_peers(summed.Peers(weakref.ref(group), name, rank, group.size(), files.own, files, 1000))
        try:
            yield files
        finally:
            summed._peers.clear()
            dist.barrier(group)
