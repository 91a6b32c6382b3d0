"""The emulated ops against what their documents say, written down a second time and naively."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_compile.lowering.ascend import register, schemas

register.ensure()
npu = torch.ops.npu
T, E, K, H = 7, 4, 2, 6


def routed(ids: Tensor, x: Tensor, **kwargs):
    args = dict(active_num=-1, expert_num=E, expert_tokens_num_type=1, expert_tokens_num_flag=True, active_expert_range=[0, E])
    return npu.npu_moe_init_routing_v2(x, ids, **{**args, **kwargs})


@pytest.fixture
def ids() -> Tensor:
    return torch.stack([torch.randperm(E)[:K] for _ in range(T)]).int()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, H)


def test_rows_come_by_expert_and_the_index_says_where_they_went(ids: Tensor, x: Tensor) -> None:
    rows, index, counts, _ = routed(ids, x)
    expected = [(e, t, j) for e in range(E) for t in range(T) for j in range(K) if ids[t, j] == e]
    assert torch.equal(rows, torch.stack([x[t] for _, t, _ in expected]))
    assert [int(index[t * K + j]) for _, t, j in expected] == list(range(T * K))
    assert counts.tolist() == [sum(e == x[0] for x in expected) for e in range(E)] and counts.dtype == torch.int64
    order = routed(ids, x, row_idx_type=1)[1]
    assert order.tolist() == [t * K + j for _, t, j in expected]


def test_ids_outside_the_range_get_no_row(ids: Tensor, x: Tensor) -> None:
    ids[0, 0], ids[3, 1] = -1, E
    rows, index, counts, _ = routed(ids, x)
    assert int(counts.sum()) == T * K - 2 and index[0] == -1 and index[3 * K + 1] == -1
    assert rows[-2:].isnan().all(), "what lies behind the rows is undefined"


def test_combine_reads_rows_by_mode(ids: Tensor, x: Tensor) -> None:
    rows, index, _, _ = routed(ids, x)
    w, skip = torch.rand(T, K), torch.randn(T, H)
    expected = torch.stack([skip[t] + sum(w[t, j] * x[t] for j in range(K)) for t in range(T)])
    out = npu.npu_moe_finalize_routing(rows, skip, None, None, w, index, None, 2)
    torch.testing.assert_close(out, expected)
    by_columns = index.view(T, K).t().reshape(-1).contiguous()
    torch.testing.assert_close(npu.npu_moe_finalize_routing(rows, skip, None, None, w, by_columns, None, 0), expected)
    wrong = npu.npu_moe_finalize_routing(rows * torch.arange(T * K)[:, None], None, None, None, w, index, None, 0)
    assert not torch.allclose(wrong, expected)


def test_grouped_matmul_by_rows_and_by_the_inner_dim(ids: Tensor, x: Tensor) -> None:
    rows, _, counts, _ = routed(ids, x)
    weight, bias = torch.randn(E, H, 5), torch.randn(E, 5)
    args = dict(group_list=counts, split_item=3, group_list_type=1)
    (out,) = npu.npu_grouped_matmul([rows], [weight], bias=[bias], group_type=0, **args)
    parts = rows.split(counts.tolist())
    torch.testing.assert_close(out, torch.cat([p @ weight[e] + bias[e] for e, p in enumerate(parts)]))
    (dw,) = npu.npu_grouped_matmul([rows.t()], [out], group_type=2, **args)
    torch.testing.assert_close(dw, torch.stack([p.t() @ o for p, o in zip(parts, out.split(counts.tolist()))]))
    cumulative = dict(args, group_list=counts.cumsum(0), group_list_type=0)
    torch.testing.assert_close(npu.npu_grouped_matmul([rows], [weight], bias=[bias], group_type=0, **cumulative)[0], out)


def test_gating_ties_go_to_the_lower_expert_and_half_sums_in_fp32() -> None:
    logits = torch.zeros(2, 16, dtype=torch.bfloat16)
    w, i, _ = npu.npu_moe_gating_top_k(logits, 3, norm_type=1)
    assert i.tolist() == [[0, 1, 2]] * 2 and w.dtype == torch.bfloat16
    assert npu.npu_moe_gating_top_k(logits, 3)[2].isnan().all(), "scores are filled only when asked for"
    assert npu.npu_moe_gating_top_k(logits, 3, k_group=1, group_count=4)[1].tolist() == [[0, 1, 2]] * 2


def test_activations() -> None:
    h = torch.randn(5, 8) * 4
    g, u = h.chunk(2, -1)
    torch.testing.assert_close(npu.npu_swiglu(h, -1), torch.nn.functional.silu(g) * u)
    g, u = h[:, ::2].clamp(max=2.0), h[:, 1::2].clamp(-2.0, 2.0)
    torch.testing.assert_close(npu.npu_clipped_swiglu(h, limit=2.0, alpha=1.5), g * torch.sigmoid(1.5 * g) * (u + 1))


def test_quantised_rows() -> None:
    v = torch.randn(5, 128, dtype=torch.bfloat16)
    q, s = npu.npu_dynamic_quant(v)
    assert q.dtype == torch.int8 and s.dtype == torch.float32 and int(q.abs().max()) == 127
    assert float((q.float() * s[:, None] - v.float()).abs().max()) <= float(s.max()) / 2 + 1e-6
    acc = torch.randint(-1000, 1000, (5, 128), dtype=torch.int32)
    counts, ws, rs = torch.tensor([2, 3]), torch.rand(2, 128), torch.rand(5)
    q, s = npu.npu_dequant_swiglu_quant(acc, weight_scale=ws, activation_scale=rs, group_index=counts, activate_left=True, quant_mode=1)
    g, u = (acc * ws.repeat_interleave(counts, 0) * rs[:, None]).chunk(2, -1)
    y = torch.nn.functional.silu(g) * u
    assert float((q.float() * s[:, None] - y).abs().max()) <= float(s.max()) / 2 + 1e-4


def test_gradients_of_the_differentiable_ops(ids: Tensor, x: Tensor) -> None:
    if schemas.wheel():
        pytest.skip("torch_npu has these gradients on its own device only")
    x.requires_grad_()
    w = torch.rand(T, K, requires_grad=True)
    rows, index = npu.npu_moe_token_permute(x, ids)
    out = npu.npu_moe_token_unpermute(npu.npu_swiglu(rows, -1), index, w)
    grads = torch.autograd.grad(out.square().sum(), (x, w))
    g, u = x.chunk(2, -1)
    expected = (w.sum(-1, keepdim=True) * torch.nn.functional.silu(g) * u).square().sum()
    for a, b in zip(grads, torch.autograd.grad(expected, (x, w))):
        torch.testing.assert_close(a, b)
