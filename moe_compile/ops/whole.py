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
from .summed import resolved

AS_WRITTEN = -1  # where an exchange of rows begins with the number of this rank's tokens

# No number of ranks among the arguments: with dynamic sizes Dynamo would make a symbol of it, and so of the number of experts.
library.define("whole(Tensor local, str group, bool shared, bool rows=False) -> Tensor")


def whole(local: Tensor, group: str, shared: bool, rows: bool = False) -> Tensor:
    """local [E / P, ...] of each of P ranks -> [E, ...], by rank. `shared`: all ranks hold the same batch, so each has the whole gradient.
    `rows`: where rows travel they do so by all-to-all.

    Raises RuntimeError, on every rank, where one of them exchanges rows meanwhile (`exchange.gathered`, `exchange.sent`): all begin with
    one message, of one number or, for `rows`, of P + 1.
    """
    size = resolved(group).size()
    if not shared:
        said = None if rows else hello(group, AS_WRITTEN)
        if said is None:
            own = torch.full((size + 1 if rows else 1,), AS_WRITTEN, dtype=torch.int64, device=local.device)
            said = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_gather_into_tensor(own, size, group))
        torch._assert_async((said == AS_WRITTEN).all(), UNEVEN)
    out = torch.ops._c10d_functional.all_gather_into_tensor(local.contiguous(), size, group)
    return torch.ops._c10d_functional.wait_tensor(out)  # type: ignore[no-any-return]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.how = inputs[1:3]
    ctx.arguments = len(inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The rank's part of a gradient that all hold alike, or of the sum of the ranks' gradients."""
    group, shared = ctx.how
    own = resolved(group)
    if shared:
        return grad.chunk(own.size())[own.rank()], *(None,) * (ctx.arguments - 1)
    part = torch.ops._c10d_functional.reduce_scatter_tensor(grad.contiguous(), "sum", own.size(), group)
    return torch.ops._c10d_functional.wait_tensor(part), *(None,) * (ctx.arguments - 1)


library.impl("whole", whole, "CompositeExplicitAutograd")
torch.library.register_fake(
    "moe_compile::whole",
    lambda local, group, *_, **__: local.new_empty(local.shape[0] * resolved(group).size(), *local.shape[1:]),
    lib=library,
)
torch.library.register_autograd("moe_compile::whole", _backward, setup_context=_keep, lib=library)
