"""Kernels compiled beside the compiler of the rest: as soon as a compiler traces an op with its sizes known, so are its launches.

Nothing is launched or loaded here; Triton keeps what it compiles, and the first call finds it. That call waits for what is still being
compiled for it, and does itself what could not be foreseen, such as an address of another alignment.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import driver, packing, plans
from .later import NotRecorded
from .tape import Launch

log = logging.getLogger(__name__)

_THREADS = 4


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, "moe_compile kernels")


def start(build: plans.Build, how: Any, tensors: Sequence[Tensor | None]) -> None:
    """Begin to compile what the call of these (fake) operands will launch, unless that is known already. Never waits."""
    sizes = [n for t in tensors if t is not None for n in (*t.shape, *t.stride())]
    if driver.found() is None or not all(isinstance(n, int) for n in sizes):
        return
    key = plans.key_of(build, how, tensors)
    if plans.known(key):
        return
    plans.expect(key, ())
    try:
        tape, _ = plans.record(build, how, tensors, [0] * len(tensors))
    except NotRecorded:
        return
    except Exception as e:  # what is wrong with the call is for the call to say
        log.debug("%s is not compiled ahead: %s: %s", getattr(build, "__name__", build), type(e).__name__, e)
        return
    index = tape.device.index or 0
    plans.expect(key, [_pool().submit(_compile, step, index) for step in tape.steps if isinstance(step, Launch)])


def _compile(step: Launch, index: int) -> None:
    try:
        with torch.cuda.device(index):
            packing.compiled(step)
    except Exception as e:
        log.debug("%s is not compiled ahead: %s: %s", step.kernel, type(e).__name__, e)
