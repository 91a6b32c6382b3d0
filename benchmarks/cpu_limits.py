"""What this processor can do at best: bytes a second from memory, multiply-adds a second in registers."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def least(f: Callable[[], object], repeats: int = 9) -> float:
    """Seconds of the fastest of some calls: a limit is what the machine does when nothing disturbs it."""
    f()
    seen = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        seen.append(time.perf_counter() - start)
    return min(seen)


def measured(threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    x = torch.ones(1 << 26)
    return {
        "bytes": x.numel() * 4 / least(x.sum),
        "torch.bfloat16": 235e9 * threads,
        "torch.float16": 118e9 * threads,
        "torch.float32": 118e9 * threads,
    }
