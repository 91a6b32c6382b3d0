"""The ops under autocast: matrix products take its dtype, as `F.linear` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ir.operands import ADAPTED, CODED, PLAIN
from .records import bundled
from .schemas import library

_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "privateuseone": "AutocastPrivateUse1"}
_ops = torch.ops.moe_compile


def _autocast(device_type: str, key: str, name: str) -> Callable[..., Tensor]:
    def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        eligible = t is not None and t.is_floating_point() and t.dtype != torch.float64 and t.dtype.itemsize > 1  # or codes
        return t.to(dtype) if eligible and t is not None else t

    def experts(*args: Any) -> Tensor:
        """Matrix products take the autocast dtype, as `F.linear` does; routing weights and scales keep theirs."""
        dtype = torch.get_autocast_dtype(device_type)
        names = ADAPTED if name == "experts_adapted" else PLAIN
        x, ids, weights, p, rest = bundled(args, names)
        lists = p.map(lambda t: cast(t, dtype)).lists(names)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            if name in ("experts_shared", "experts_stored_shared"):
                own = len(CODED) - len(PLAIN) if name == "experts_stored_shared" else 0  # scales and the like of the routed experts
                rest = (*rest[:own], *([cast(t, dtype) for t in a] if _tensor_list(a) else a for a in rest[own:]))
            return getattr(_ops, name)(cast(x, dtype), ids, weights, *lists, *rest)  # type: ignore[no-any-return]

    return experts


def _tensor_list(a: Any) -> bool:
    return isinstance(a, (list, tuple)) and bool(a) and isinstance(a[0], Tensor)


for _device, _key in _AUTOCAST.items():
    if hasattr(torch._C.DispatchKey, _key):
        for _what in ("", "_shared", "_stored_shared", "_adapted", "_stored", "_stored_adapted"):
            library.impl(f"experts{_what}", _autocast(_device, _key, f"experts{_what}"), _key)
