"""A target from outside of the repository: a device written in Python, whose kernels take its tensors apart and run on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from moe_compile import OptionError
from moe_compile.ir import MoeBlock
from moe_compile.lowering.target import Target

_setup_privateuseone_for_python_backend("toy")
RAN: list[str] = []  # ops whose kernels of this target ran, in order


class Toy(Tensor):
    """A tensor on device "toy"; `raw` holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> Toy:
        t: Any = torch._C._acc.create_empty_tensor(raw.shape, raw.dtype)
        t.__class__ = Toy
        return t

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw.contiguous()  # as its strides say


def on_cpu(a: Any) -> Any:
    if isinstance(a, torch.device):
        return torch.device("cpu")
    return a.raw if isinstance(a, Toy) else [on_cpu(x) for x in a] if isinstance(a, (list, tuple)) else a


def to_toy(a: Any) -> Any:
    return Toy(a) if isinstance(a, Tensor) else type(a)(map(to_toy, a)) if isinstance(a, (list, tuple)) else a


def kernel(name: str) -> Any:
    def run(*args: Any) -> Any:
        RAN.append(name)
        return to_toy(getattr(torch.ops.moe_compile, name)(*on_cpu(args)))

    return run


def anything_else(op: Any, *args: Any, **kwargs: Any) -> Any:
    return to_toy(op(*on_cpu(args), **{k: on_cpu(v) for k, v in kwargs.items()}))


_any_op = torch.library.Library("_", "IMPL")
_any_op.fallback(anything_else, "PrivateUse1")


@dataclass(frozen=True)
class ToyOptions:
    toy_speed: str = "slow"

    def __post_init__(self) -> None:
        if self.toy_speed not in ("slow", "fast"):
            raise OptionError(f"option 'toy_speed' is {self.toy_speed!r}; allowed: 'slow', 'fast'")


def refuses(ir: MoeBlock) -> str | None:
    return f"{ir.experts.num_experts} experts: a toy takes 8" if ir.experts.num_experts > 8 else None


TARGET = Target(
    name="toy",
    devices=("toy",),
    refuses=refuses,
    says=lambda ir: f"toy kernel ({ir.experts.num_experts} experts)",
    dispatch_key="PrivateUse1",
    kernels={name: kernel(name) for name in ("route", "experts")},
    options=ToyOptions,
)
