"""What the CUDA target can run, from the IR alone, and what it says of it."""

from __future__ import annotations

import importlib.util

import torch

from ...ir import MoeBlock
from ...ir import scalar as act

ROUTER_TOKENS = 4  # as the few-token kernels of the experts
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def missing() -> str:
    """What keeps the target from running on this machine; "" for nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "" if torch.cuda.is_available() else "no CUDA device"


def refuses(ir: MoeBlock) -> str | None:
    """None when the CUDA ops can run this block, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    experts = ir.experts
    if experts.dtype not in (*_KERNEL_DTYPES, torch.float64):
        return f"expert weights of {experts.dtype} have no CUDA lowering"
    try:
        act.encode(experts.activation)
    except act.UnknownActivation as e:
        return f"activation: {e}"
    if experts.num_identity and experts.hidden != experts.out_features:
        return "identity experts need as many outputs as inputs"
    return None


def says(ir: MoeBlock) -> str:
    """What runs the block and the dtype of its products."""
    dtype = str(ir.experts.dtype).removeprefix("torch.")
    if ir.experts.adapted and ir.experts.dtype in _KERNEL_DTYPES:
        return f"triton ({dtype}, low-rank pairs)"
    return f"triton ({dtype})" if ir.experts.dtype in _KERNEL_DTYPES else f"torch ({dtype})"
