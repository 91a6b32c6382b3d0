"""A neutral place to run code of the user's in: apart from whatever is being traced, with nothing of the process moved by it."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..ir import Rejection
from ..passes.aten.conditions import no_saving_hooks


@contextlib.contextmanager
def neutral(grad: bool = True, noting: bool = True) -> Iterator[None]:
    """Run user code apart from whatever is being traced: no modes, no hooks of autograd, no autocast, no random number drawn.

    grad: whether gradients are on, as they are at the call that is read: code may ask. noting: whether a graph is made in it.

    Raises `Rejection` if the code moved a random generator; the generators are put back in every case.
    """
    with contextlib.ExitStack() as stack:
        # a context of its own, with one fake mode for all the values noted down: without it make_fx makes one per node
        stack.enter_context(torch._guards.tracing(torch._guards.TracingContext(FakeTensorMode() if noting else None)))
        stack.enter_context(torch.utils._python_dispatch._disable_current_modes())
        stack.enter_context(_no_function_modes())
        for device in {"cpu", *(() if (a := torch.accelerator.current_accelerator()) is None else (a.type,))}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(no_saving_hooks())
        stack.enter_context(_no_random_numbers())
        yield


@contextlib.contextmanager
def _no_function_modes() -> Iterator[None]:
    from torch.overrides import _len_torch_function_stack, _pop_mode, _push_mode

    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
    try:
        yield
    finally:
        for m in reversed(modes):
            _push_mode(m)


@contextlib.contextmanager
def _no_random_numbers() -> Iterator[None]:
    """Put every global generator back as it was, and raise `Rejection` if one was used."""
    numpy = sys.modules.get("numpy")
    accelerator = torch.get_device_module() if torch.accelerator.is_available() else None
    if accelerator is not None and not getattr(accelerator, "is_initialized", lambda: False)():
        accelerator = None

    def states() -> list[Any]:
        found = [torch.get_rng_state(), random.getstate()]
        if accelerator is not None:
            found.append(accelerator.get_rng_state())
        if numpy is not None:
            found.append(numpy.random.get_state())
        return found

    before, refused = states(), None
    try:
        yield
    except Rejection as e:
        refused = e
    finally:
        used = not all(_same_state(a, b) for a, b in zip(before, states(), strict=True))
        if used:
            torch.set_rng_state(before[0])
            random.setstate(before[1])
            if accelerator is not None:
                accelerator.set_rng_state(before[2])
            if numpy is not None:
                numpy.random.set_state(before[-1])
    if used:
        raise Rejection("it draws random numbers", stage="random")
    if refused is not None:
        raise refused


def _same_state(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple) and {*map(type, a)} != {int}:  # the 625 words of Python's own are compared at once
        return len(a) == len(b) and all(_same_state(x, y) for x, y in zip(a, b, strict=True))
    if type(a).__name__ == "ndarray":
        return bool((a == b).all())
    return bool(a == b)
