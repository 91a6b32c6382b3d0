"""Dispatch, both products, activation and combine over ranks in one kernel: `mega_moe` of cann_ops_transformer, a package beside CANN 9.1.

By option only. It is known from how it is called elsewhere and from the limits that are told there; no hardware has run it here. A list
of [in, out] matrices goes in for each projection, one for each of this rank's experts, and a buffer that all ranks of the group see.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from .calls import Packed

MODULE = "cann_ops_transformer.ops.mega_moe"
HIDDEN, INNER, STEP, MAX_TOKENS = (1024, 8192), (1024, 3072), 512, 4096


def missing() -> str:
    """Why there is no such kernel on this machine; "" where it is importable."""
    try:
        importlib.import_module(MODULE)
    except Exception as e:  # a package of another CANN fails in any way
        return f"{MODULE} cannot be imported: {type(e).__name__}: {e}"
    return ""


@functools.lru_cache(maxsize=16)
def _buffer(group: str, experts: int, tokens: int, k: int, hidden: int, inner: int) -> Any:
    """Memory that all ranks of a group see; every rank asks for it at the same place of its program, and keeps it."""
    own = torch.distributed.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    return importlib.import_module(MODULE).get_symm_buffer_for_mega_moe(own, experts, tokens, k, hidden, inner)


@torch.library.custom_op("moe_compile::ascend_mega_moe", mutates_args=())
def one_kernel(
    x: Tensor, ids: Tensor, weights: Tensor, up: list[Tensor], down: list[Tensor], group: str, num_experts: int, active: Tensor | None
) -> Tensor:
    """x [T, H] bf16, ids [T, k] int32, weights [T, k] fp32, up E/W x [H, 2I], down E/W x [I, H], active int8 [T] -> [T, H].

    An op of its own, because the package has no shape function that a graph could be made with.
    """
    buffer = _buffer(group, num_experts, x.shape[0], ids.shape[1], x.shape[1], down[0].shape[0])
    run = importlib.import_module(MODULE).mega_moe
    out: Tensor = run(x, ids, weights, up, down, buffer, x_active_mask=active, activation="swiglu", activation_clamp=None)[0]
    return out


@one_kernel.register_fake
def _(
    x: Tensor, ids: Tensor, weights: Tensor, up: list[Tensor], down: list[Tensor], group: str, num_experts: int, active: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], down[0].shape[1])


def experts(x: Tensor, ids: Tensor, weights: Tensor, p: Packed, num_experts: int, group: str, active: Tensor | None) -> Tensor:
    """As `exchange.experts`, whose laws say when."""
    mask = None if active is None else active.to(torch.int8)
    out: Tensor = one_kernel(x, ids, weights, list(p.up[0].matrix.unbind(0)), list(p.down.matrix.unbind(0)), group, num_experts, mask)
    return out
