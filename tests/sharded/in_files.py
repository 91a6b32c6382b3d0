"""Peers' memory that is files which all processes of a machine map: the kernels that exchange through it run in Triton's interpreter."""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import torch
import torch.distributed as dist

from moe_compile.lowering.triton import peers as kernels
from moe_compile.ops import summed

SIZE = summed.memory_of(1 << 16)


@contextlib.contextmanager
def peers(rank: int, group: Any, size: int = SIZE, **how: Any) -> Iterator[summed.Peers]:
    with tempfile.TemporaryDirectory() as mine:
        folder = [mine]
        dist.broadcast_object_list(folder, 0, group=group)
        each = []
        for r in range(group.size()):
            each.append(torch.from_file(str(Path(folder[0]) / str(r)), shared=True, size=size, dtype=torch.uint8))
        dist.barrier(group)
        name = group.group_name
        found = summed.Peers(weakref.ref(group), name, rank, group.size(), each, 1000, kernels, **{"workers": 2, "chunks": 2, **how})
        summed.set_peers(found)
        try:
            yield found
        finally:
            summed._peers.clear()
            dist.barrier(group)
