"""A type of half precision that code names stands for a wider one: ``w.to(torch.bfloat16)`` in a trial on float32 tokens.

Trials run in float32 for the sake of their accuracy. Code that casts to the type that its tokens have at the call means "to their type".
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Widened(TorchDispatchMode):
    """Every operation that asks for `narrow` gets `wide`."""

    def __init__(self, narrow: torch.dtype, wide: torch.dtype) -> None:
        super().__init__()
        self.narrow, self.wide = narrow, wide

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(self._widened, args), **{k: self._widened(v) for k, v in (kwargs or {}).items()})

    def _widened(self, v: Any) -> Any:
        return self.wide if v is self.narrow else v  # types are arguments of their own, in no list
