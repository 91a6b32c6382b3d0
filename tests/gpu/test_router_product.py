"""The router's product for a few tokens, in a kernel of its own: against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from moe_compile import ir, ops
from moe_compile.lowering.triton import router

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]
SIZES = [(1, 8, 64), (3, 20, 96), (2, 70, 40), (3, 1, 17), (1, 2, 4100)]
SIZES += [(8, 60, 96), (2, 300, 40), (1, 16, 4100), (1, 128, 2048), (4, 256, 7168)] if ON_GPU else []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "experts", "hidden"), SIZES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("wide", [None, torch.float32], ids=["", "float32"])
def test_product(tokens: int, experts: int, hidden: int, bias: bool, dtype: torch.dtype, wide: torch.dtype | None) -> None:
    """Any sizes: rows longer than one load, odd ends, an odd number of experts; in the operands' dtype and in float32."""
    x, w = torch.randn(tokens, hidden, device=DEVICE).to(dtype), torch.randn(experts, hidden, device=DEVICE).to(dtype)
    b = torch.randn(experts, device=DEVICE).to(dtype) if bias else None
    got = router.product(x, w, b, wide or dtype)
    want = F.linear(x.double(), w.double(), None if b is None else b.double())
    assert got.dtype == (wide or dtype) and got.shape == want.shape
    assert float((got.double() - want).abs().max()) <= (2e-6 if (wide or dtype) == torch.float32 else torch.finfo(dtype).eps) * float(
        want.abs().max() + 1
    )


def test_strides() -> None:
    """Rows of a wider tensor are read in place; columns are torch's."""
    x, w = torch.randn(2, 128, device=DEVICE), torch.randn(8, 128, device=DEVICE)
    torch.testing.assert_close(router.product(x[:, :64], w[:, 64:], None, x.dtype), x[:, :64] @ w[:, 64:].T)
    torch.testing.assert_close(router.product(x, w.T.contiguous().T, None, x.dtype), x @ w.T)


def test_beyond() -> None:
    """More tokens than the kernel is for, none at all, another dtype: torch's product."""
    w = torch.randn(8, 32, device=DEVICE)
    for x in (torch.randn(9, 32, device=DEVICE), torch.randn(0, 32, device=DEVICE)):
        assert torch.equal(router.product(x, w, None, x.dtype), F.linear(x, w))
    x = torch.randn(2, 32, device=DEVICE, dtype=torch.float64)
    assert torch.equal(router.product(x, w.double(), None, x.dtype), F.linear(x, w.double()))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_graph_replays() -> None:
    """Launched early behind kernels that are launched early: a thousand replays with changing tokens are bitwise the calls one by one."""
    gating = ir.Gating(128, 8, ir.Score.SIGMOID, bias=ir.BiasOn.SCORE, norm=ir.Normaliser(ir.Norm.SUM), scale=2.5)
    w, bias = torch.randn(128, 2048, device=DEVICE).bfloat16(), torch.randn(128, device=DEVICE)
    x = torch.zeros(1, 2048, device=DEVICE, dtype=torch.bfloat16)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor] = torch.ops.moe_compile.route_linear(x, w, None, bias, None, *ops.route_args(gating))
        return found

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = both()
    for seed in range(1000):
        x.copy_(torch.randn(1, 2048, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed)))
        graph.replay()
        again = both()
        assert torch.equal(weights, again[0]) and torch.equal(ids, again[1])
