"""The contract for bf16 over ranks: each exchange's error against float64 beside that of the undivided experts as written, in bf16 too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_compile import exchange

E, K, H, I, T = 8, 4, 32, 32, 64
WAYS = ("shared", "gathered", "sent", "by_rows")


def experts(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Weights gathered by ids; the number behind the last one is no expert."""
    e = ids.clamp(max=len(up) - 1)
    g, u = torch.einsum("th,tkih->tki", x, up[e]).chunk(2, -1)
    return torch.einsum("tki,tkhi,tk->th", torch.nn.functional.silu(g) * u, down[e], w)


def table(rank: int, world: int) -> Iterator[tuple[str, Any]]:
    """The worst ratio of errors, of the result and each gradient, by way; in `make zoo` compiled as well."""
    for compiled in (False, True) if "ZOO_ALL" in os.environ else (False,):
        for way in WAYS if not compiled else WAYS[:3]:
            yield f"{way}{', compiled' * compiled}", ratios(rank, world, way, compiled)


def ratios(rank: int, world: int, way: str, compiled: bool) -> dict[str, float]:
    g = torch.Generator().manual_seed(3)
    shape = (1 if way == "shared" else world, T)
    xs, ws = torch.randn(*shape, H, generator=g).bfloat16(), torch.rand(*shape, K, generator=g).bfloat16() / K
    ids = torch.rand(*shape, E, generator=g).topk(K).indices
    up, down = (torch.randn(*s, generator=g).mul(s[-1] ** -0.5).bfloat16() for s in ((E, 2 * I, H), (E, H, I)))
    own, n = (0 if way == "shared" else rank), E // world
    mine = slice(rank * n, rank * n + n)
    eager, exact = (undivided([t.to(dtype) for t in (xs, ws, up, down)], ids) for dtype in (torch.bfloat16, torch.float64))
    leaves = [t.clone().requires_grad_() for t in (xs[own], ws[own], up[mine], down[mine])]
    f: Callable[..., Tensor] = torch.compile(exchanged, backend="moe_fused", options={"inner": "eager"}) if compiled else exchanged
    torch._dynamo.reset()
    out = f(way, leaves[0], ids[own], leaves[1], leaves[2], leaves[3])
    (out * along(out)).sum().backward()
    found = [out, *(t.grad for t in leaves)]
    pick = (lambda t: t[own], lambda t: t[own], lambda t: t[own], lambda t: t[mine], lambda t: t[mine])
    names = ("out", "x", "weights", "up", "down")
    return {k: error(a, p(c)) / error(p(b), p(c)) for k, a, b, c, p in zip(names, found, eager, exact, pick, strict=True)}


def exchanged(way: str, x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    group, n = dist.group.WORLD, len(up)
    assert group is not None

    def local(*rows: Tensor) -> Tensor:
        return experts(*rows, up, down)

    if way in ("sent", "by_rows"):
        return getattr(exchange, way)(x, ids, w, local, n, group)  # type: ignore[no-any-return]
    return getattr(exchange, way)(x, ids, w, local, group.rank() * n, n, group)  # type: ignore[no-any-return]


def undivided(given: list[Tensor], ids: Tensor) -> list[Tensor]:
    """The result [ranks, T, H] of all batches and the gradients of x, weights, up, down."""
    x, w, up, down = (t.clone().requires_grad_() for t in given)
    out = experts(x.flatten(0, 1), ids.flatten(0, 1), w.flatten(0, 1), up, down).view_as(x)
    (out * along(out)).sum().backward()
    return [out, *(t.grad for t in (x, w, up, down))]  # type: ignore[misc]


def along(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, H, dtype=torch.float64).to(torch.bfloat16).to(out.dtype)


def error(a: Any, b: Tensor) -> float:
    return float((a.detach().double() - b.detach()).norm())
