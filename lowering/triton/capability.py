"""What the CUDA target can run, from the IR alone, and what it says of it."""

from __future__ import annotations

import importlib.util

import torch

from ...ir import Experts, MoeBlock
from ...ir import scalar as act
from ...ir.text import rows_text, stored_text
from . import codes

ROUTER_TOKENS = 8  # a program of `router` reads a row of the matrix for each: beyond, a library's product is as fast
CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)  # that a kernel makes floats of
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
    if experts.coded and (why := _refuses_stored(experts)) is not None:
        return why
    if experts.num_identity and experts.hidden != experts.out_features:
        return "identity experts need as many outputs as inputs"
    return None


def _refuses_stored(e: Experts) -> str | None:
    """Why weights in few bits have no kernel here, None where they have."""
    if any(s is not None and s.bits > 8 for s in (e.up_stored, e.down_stored)):
        return "float expert weights with scales have no CUDA lowering"
    if e.rounded:
        return None  # what no kernel takes runs in plain torch
    if e.dtype not in _KERNEL_DTYPES or e.num_identity:
        return f"expert weights in few bits with {'identity experts' if e.num_identity else f'rows of {e.dtype}'} have no CUDA lowering"
    return None


def decodes(ir: MoeBlock) -> str:
    """Why one expert in few bits that all tokens use is left to Inductor, "" where the kernels read its codes."""
    e = ir.experts
    if any(r is not None and (r.smooth or r.static) for r in (e.up_rows, e.down_rows)):
        return "rows by a calibrated number run in plain torch"
    both = ((e.up_stored, e.up_transposed), (e.down_stored, e.down_transposed))
    if not all(how is not None and codes.takes(how, transposed) for how, transposed in both):
        return "the Triton kernels do not decode such weights"
    return ""


def says(ir: MoeBlock) -> str:
    """What runs the block and the dtype of its products."""
    dtype = str(ir.experts.dtype).removeprefix("torch.")
    stored = dict.fromkeys(stored_text(s) for s in (ir.experts.up_stored, ir.experts.down_stored) if s is not None)
    if stored and ir.experts.adapted:
        return f"triton ({dtype}, low-rank pairs beside floats made of {', '.join(stored)}, in turns)"
    if stored and ir.experts.rounded:
        smooth = any(r is not None and (r.smooth or r.static) for r in (ir.experts.up_rows, ir.experts.down_rows))
        how = "torch" if smooth else "triton"  # no kernel rounds rows with smooth scales, or by a calibrated number
        return f"{how} ({dtype}, weights {', '.join(stored)}, {rows_text(ir.experts.down_rows or ir.experts.up_rows)})"
    if stored:
        both = ((ir.experts.up_stored, ir.experts.up_transposed), (ir.experts.down_stored, ir.experts.down_transposed))
        decoded = all(how is not None and codes.takes(how, transposed) for how, transposed in both)
        what = f"weights {', '.join(stored)}" if decoded else f"floats made of {', '.join(stored)}, in turns"
        return f"triton ({dtype}, {what})"
    if ir.experts.adapted and ir.experts.dtype in _KERNEL_DTYPES:
        return f"triton ({dtype}, low-rank pairs)"
    return f"triton ({dtype})" if ir.experts.dtype in _KERNEL_DTYPES else f"torch ({dtype})"
