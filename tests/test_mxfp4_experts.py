"""transformers' `Mxfp4GptOssExperts` as it stands after a checkpoint is loaded beside the `kernels` package: weights are objects of
triton_kernels', swizzled, and its `matmul_ogs` multiplies them. A stand-in for that package is an op that nothing looks into."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_compile.report import collecting

mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")

E, H, I, K = 4, 32, 32, 2


@torch.library.custom_op("triton_kernels_here::matmul_ogs", mutates_args=())
def products(x: Tensor, codes: Tensor, scales: Tensor, counts: Tensor) -> Tensor:
    """Rows in the order of their experts, times codes as they lie: any function of both does."""
    return (x.sum(-1, keepdim=True) * codes.float().mean((0, 1)) * scales.float().mean((0, 1)))[: counts.sum()]


@products.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[-1])


@dataclass
class Indx:
    src_indx: Tensor
    dst_indx: Tensor


@dataclass
class RoutingData:
    gate_scal: Tensor
    expt_hist: Tensor
    n_expts_tot: int
    n_expts_act: int
    expt_data: object = None


class Swizzled:
    """As triton_kernels' Tensor: no tensor of torch's, the bytes in its storage."""

    def __init__(self, data: Tensor) -> None:
        self.storage, self.shape = SimpleNamespace(data=data), data.shape


def matmul_ogs(x: Tensor, w: Any, bias: Tensor, routing: RoutingData, **how: Any) -> Tensor:
    if (gather := how.get("gather_indx")) is not None:
        x = x[(gather.src_indx // K).long()]
    y = products(x, w.storage.data, how["precision_config"].weight_scale.storage.data, routing.expt_hist)
    y = y[:, ::2] if how.get("fused_activation") is not None else y
    y = y if how["gammas"] is None else y * how["gammas"][:, None]
    return y if (scatter := how.get("scatter_indx")) is None else y[scatter.src_indx.long()].unflatten(0, (-1, K)).sum(1)


def hub() -> SimpleNamespace:
    routing = SimpleNamespace(GatherIndx=Indx, ScatterIndx=Indx, RoutingData=RoutingData, compute_expt_data_torch=lambda *_: None)
    ogs = SimpleNamespace(FnSpecs=lambda *a: a, FusedActivation=lambda *a: a, matmul_ogs=matmul_ogs)
    return SimpleNamespace(routing=routing, matmul_ogs=ogs, swiglu=SimpleNamespace(swiglu_fn=None))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(H, E)
        self.experts = mxfp4.Mxfp4GptOssExperts(SimpleNamespace(num_local_experts=E, intermediate_size=I, hidden_size=H))
        for name, (inner, out) in {"gate_up_proj": (H, 2 * I), "down_proj": (I, H)}.items():
            del self.experts._parameters[name]  # as transformers' loading does
            setattr(self.experts, name, Swizzled(torch.randint(0, 256, (E, inner // 2, out)).to(torch.uint8)))
            scale = SimpleNamespace(weight_scale=Swizzled(torch.full((E, inner // 32, out), 2, dtype=torch.uint8)))
            setattr(self.experts, f"{name}_precision_config", scale)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).topk(K)
        return self.experts(x, ids, weights.softmax(-1))


def test_left_for_what_multiplies_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdict: left as written, in one graph, the reason being the op; its results are eager's."""
    counted = torch.histc  # the CPU has none of whole numbers
    monkeypatch.setattr(torch, "histc", lambda t, **how: counted(t.float(), **how).int())
    monkeypatch.setattr(mxfp4, "triton_kernels_hub", hub(), raising=False)
    torch._dynamo.reset()
    m, x = Block().eval(), torch.randn(5, H)
    with torch.no_grad(), collecting() as report:
        got = torch.compile(m, backend="moe_fused", options={"inner": "eager"})(x)
        torch.testing.assert_close(got, m(x))
    (left,) = report.rejected
    assert report.graph_count == 1 and "custom op (triton_kernels_here::matmul_ogs) computes is told by nothing" in left.reason
