"""`whole`: a stack of experts' parameters of which each rank of a group holds its own part, put together.

What `moe_compile.parallelize` has a model read in place of a divided parameter. As it stands it is an all-gather along the experts, so that
a model gives the same whatever becomes of it; where the experts of a compiled graph are fused the weights stay and the rows travel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .peer_rows import UNEVEN, hello
from .schemas import library

AS_WRITTEN = -1  # where an exchange of rows begins with the number of this rank's tokens

library.define("whole(Tensor local, SymInt size, str group, bool shared, bool rows=False) -> Tensor")


def whole(local: Tensor, size: int, group: str, shared: bool, rows: bool = False) -> Tensor:
    """local [E / size, ...] of each rank -> [E, ...], by rank. `shared`: all ranks hold the same batch, so each has the whole gradient.
    `rows`: where rows travel they do so by all-to-all.

    Raises RuntimeError, on every rank, where one of them exchanges rows meanwhile (`exchange.gathered`, `exchange.sent`): all begin with
    one message, of one number or, for `rows`, of size + 1.
    """
    if not shared:
        said = None if rows else hello(group, AS_WRITTEN, local.device)
        if said is None:
            own = torch.full((size + 1 if rows else 1,), AS_WRITTEN, dtype=torch.int64, device=local.device)
            said = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_gather_into_tensor(own, size, group))
        torch._assert_async((said == AS_WRITTEN).all(), UNEVEN)
    out = torch.ops._c10d_functional.all_gather_into_tensor(local.contiguous(), size, group)
    return torch.ops._c10d_functional.wait_tensor(out)  # type: ignore[no-any-return]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.how = inputs[1:4]
    ctx.arguments = len(inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The rank's part of a gradient that all hold alike, or of the sum of the ranks' gradients."""
    size, group, shared = ctx.how
    if shared:
        own = torch.distributed.distributed_c10d._resolve_process_group(group).rank()
        return grad.chunk(size)[own], *(None,) * (ctx.arguments - 1)
    part = torch.ops._c10d_functional.reduce_scatter_tensor(grad.contiguous(), "sum", size, group)
    return torch.ops._c10d_functional.wait_tensor(part), *(None,) * (ctx.arguments - 1)


library.impl("whole", whole, "CompositeExplicitAutograd")
torch.library.register_fake(
    "moe_compile::whole", lambda local, size, *_, **__: local.new_empty(local.shape[0] * size, *local.shape[1:]), lib=library
)
torch.library.register_autograd("moe_compile::whole", _backward, setup_context=_keep, lib=library)
