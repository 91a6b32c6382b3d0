"""Graphs that DistributedDataParallel's optimizer has cut at the ends of its buckets before any backend sees them."""

from __future__ import annotations

import sys

_MODULE, _FUNCTION = "torch._dynamo.backends.distributed", "compile_submod"
_FRAMES = 80

ADVICE = (
    "this graph is a part: the optimizer of DistributedDataParallel cuts where its buckets end; set "
    "torch._dynamo.config.optimize_ddp = False, or shard with FSDP2 (fully_shard)"
)


def is_part() -> bool:
    """Whether what is compiled now is one of several parts: that is known by who called only."""
    frame = sys._getframe()
    for _ in range(_FRAMES):
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if frame.f_code.co_name == _FUNCTION and frame.f_globals.get("__name__") == _MODULE:
            return True
    return False
