"""Two emulations of the npu ops against each other, and lowered blocks through the one that `documents` holds."""

from __future__ import annotations

from typing import Any

import documents
import pytest
import torch
from ascend_blocks import block, compiled, first, relative, zoo
from torch import Tensor, nn

from moe_compile.lowering.ascend import emulate, register, rules

register.ensure()
T, E, K, H = 5, 8, 3, 6
TRAINING = {"npu_swiglu_backward", "npu_moe_token_permute", "npu_moe_token_permute_grad_v2", "_npu_moe_token_unpermute",
            "npu_moe_token_unpermute_grad_v2"}  # fmt: skip
EXCHANGE = {"npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"}  # against a whole block: test_exchange.py
ROUTING = dict(active_num=-1, expert_num=E, expert_tokens_num_type=1, expert_tokens_num_flag=True, drop_pad_mode=0, row_idx_type=0)
LIST = dict(split_item=3, group_type=0, group_list_type=1)


def ids() -> Tensor:
    return torch.stack([torch.randperm(E)[:K] for _ in range(T)]).int()


def int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape).to(torch.int8)


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape).int()


def counts(n: int = 3) -> Tensor:
    return torch.tensor([2, 0, 4][:n])


def places() -> Tensor:
    """[E, 1 + 3]: one to three places of each expert."""
    return torch.cat([torch.randint(1, 4, (E, 1)), torch.randint(0, 12, (E, 3))], 1).int()


def half(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


# op -> calls; random numbers are drawn when a test runs
CALLS: dict[str, list[Any]] = {
    "npu_moe_gating_top_k": [
        lambda: ((torch.randn(T, E), K), dict(bias=torch.randn(E), norm_type=1, routed_scaling_factor=2.5)),
        lambda: ((torch.randn(T, E), K), dict(norm_type=0, out_flag=True)),
        lambda: ((torch.randn(T, E), K), dict(norm_type=1, bias=torch.randn(E), k_group=2, group_count=4, group_select_mode=1, eps=0.5)),
        lambda: ((torch.randn(T, E), 2), dict(norm_type=0, k_group=2, group_count=4, group_select_mode=0)),
        lambda: ((torch.zeros(T, E), K), dict(norm_type=1)),
    ],
    "npu_moe_gating_top_k_softmax": [lambda: ((torch.randn(T, E), None, K), {})],
    "npu_moe_gating_top_k_softmax_v2": [
        lambda: ((torch.randn(T, E),), dict(k=K, renorm=0)), lambda: ((torch.randn(T, E),), dict(k=K, renorm=1))],
    "npu_moe_init_routing_v2": [
        lambda: ((torch.randn(T, H), ids()), dict(ROUTING, active_expert_range=[0, E])),
        lambda: ((half(T, H), ids()), dict(ROUTING, active_expert_range=[0, E], quant_mode=1)),
        lambda: ((half(T, H), ids()), dict(ROUTING, active_expert_range=[0, E], quant_mode=1, scale=torch.rand(E, H) + 0.5)),
        lambda: ((torch.randn(T, H), ids()), dict(ROUTING, active_expert_range=[2, 6])),
    ],
    "npu_moe_finalize_routing": [
        lambda: ((torch.randn(T * K, H), torch.randn(T, H), None, None, torch.rand(T, K), torch.randperm(T * K).int(), None, 2), {}),
        lambda: ((half(T * K, H), half(T, H), half(T, H), None, torch.rand(T, K), torch.randperm(T * K).int(), None, 2), {}),
        lambda: ((torch.randn(T * K, H), None, None, None, torch.rand(T, K), torch.randperm(T * K).int(), None, 0), {}),
    ],
    "npu_moe_token_unpermute": [lambda: ((torch.randn(T * K, H), torch.randperm(T * K).int(), torch.rand(T, K)), {})],
    "npu_grouped_matmul": [
        lambda: (([torch.randn(6, H)], [torch.randn(3, H, 4)]), dict(LIST, group_list=counts(), bias=[torch.randn(3, 4)])),
        lambda: (([torch.randn(6, H)], [torch.randn(3, H, 4)]), dict(LIST, group_list=counts().cumsum(0), group_list_type=0)),
        lambda: (([half(6, H)], [int8(3, H, 4)]), dict(
            LIST, group_list=counts(), antiquant_scale=[half(3, 4)], antiquant_offset=[torch.randint(-8, 8, (3, 4)).bfloat16()])),
        lambda: (([half(6, 8)], [words(3, 8, 1)]), dict(
            LIST, group_list=counts(), antiquant_scale=[half(3, 2, 8)], antiquant_offset=[torch.zeros(3, 2, 8).bfloat16()])),
        lambda: (([int8(6, H)], [int8(3, H, 4)]), dict(LIST, group_list=counts(), output_dtype=3)),
        lambda: (([int8(6, H)], [int8(3, H, 4)]), dict(
            LIST, group_list=counts(), output_dtype=15, scale=[half(3, 4)], per_token_scale=[torch.rand(6)])),
    ],
    "npu_swiglu": [lambda: ((torch.randn(T, H) * 3, -1), {})],
    "npu_clipped_swiglu": [
        lambda: ((torch.randn(T, H) * 5,), dict(limit=2.0, alpha=1.5)),
        lambda: ((torch.randn(T, H) * 5,), dict(interleaved=False, bias=0.5))],
    "npu_dynamic_quant": [
        lambda: ((half(T, H),), {}),
        lambda: ((half(6, H),), dict(smooth_scales=torch.rand(3, H).bfloat16() + 0.5, group_index=counts().cumsum(0).int()))],
    "npu_dequant_swiglu_quant": [
        lambda left=left, smooth=smooth: ((torch.randint(-999, 999, (6, 8)).int(),), dict(
            weight_scale=torch.rand(3, 8), activation_scale=torch.rand(6), group_index=counts(), activate_left=left, quant_mode=1,
            quant_scale=torch.rand(3, 4) + 0.5 if smooth else None))
        for left in (True, False) for smooth in (True, False)],
    "npu_grouped_matmul_swiglu_quant_v2": [
        lambda: ((int8(6, H), [int8(3, H, 8)], [torch.rand(3, 8)], torch.rand(6), counts()), dict(group_list_type=1)),
        lambda: ((int8(6, H), [int8(3, H, 8)], [torch.rand(3, 8)], torch.rand(6), counts().cumsum(0)), dict(group_list_type=0))],
    "npu_moe_update_expert": [
        lambda: ((ids(), places()), dict(balance_mode=1)), lambda: ((ids(), places()), dict(local_rank_id=3, world_size=6))],
}  # fmt: skip


def test_every_op_of_inference_is_written_twice() -> None:
    assert set(CALLS) == set(documents.OPS) == set(emulate.KERNELS) - TRAINING - EXCHANGE
    assert set(CALLS) <= set(rules.RULES)


@pytest.mark.parametrize(("name", "case"), [(n, i) for n, calls in CALLS.items() for i in range(len(calls))])
def test_both_emulations_say_the_same(name: str, case: int) -> None:
    """To the last number of an int; floats within what fp32 (bf16) rounds, undefined where the other is; bytes may be one step apart."""
    args, kwargs = CALLS[name][case]()
    ours, theirs = emulate.KERNELS[name](*args, **kwargs), documents.OPS[name](*args, **kwargs)
    both = [[o] if isinstance(o, Tensor) else list(o) for o in (ours, theirs)]
    assert len(both[0]) == len(both[1])
    for a, b in zip(*both):
        assert a.shape == b.shape and a.dtype == b.dtype
        near = dict(rtol=1e-5, atol=1e-5) if a.dtype == torch.float32 else {}
        if a.dtype == torch.bfloat16:  # A sum's terms may be rounded on the way, and documents do not say which: measured by the largest.
            near = dict(rtol=0.01, atol=0.005 * float(a.float().nan_to_num().abs().max()))
        if a.dtype == torch.int8:
            assert int((a.int() - b.int()).abs().max()) <= 1 and float((a != b).float().mean()) <= 0.02
        else:
            torch.testing.assert_close(a, b, equal_nan=True, **(near or dict(rtol=0, atol=0)))


class Small(nn.Module):
    """Routed SwiGLU in bf16 with sizes that the int8 ops take."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(4, 16))
        self.up, self.down = nn.Parameter(torch.randn(4, 512, 16) / 4), nn.Parameter(torch.randn(4, 16, 256) / 16)
        self.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        w, chosen = (x @ self.gate.t()).float().softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e in range(4):
            g, u = (x @ self.up[e].t()).chunk(2, -1)
            y = (nn.functional.silu(g) * u) @ self.down[e].t()
            out = out + y * (w * (chosen == e)).sum(-1, keepdim=True).to(x.dtype)
        return out


def through_documents(module: nn.Module, x: Tensor, **options: Any) -> tuple[Tensor, list[str]]:
    """The output of a lowered block whose npu calls are done by `documents`, and which they were."""
    found: list[documents.Interpreter] = []

    def inner(gm: Any, example_inputs: Any) -> Any:
        found.append(documents.Interpreter(gm))
        return found[-1].run

    with torch.no_grad():
        out = first(compiled(module, strict=True, inner=inner, **options)(x))
    return out, found[0].called


@pytest.mark.parametrize(("name", "combine"), [("afmoe", "finalize"), ("deepseek_v3", "finalize"), ("mixtral", "unpermute")])
def test_blocks_give_eagers_outputs(name: str, combine: str) -> None:
    """Sigmoid with a bias and a shared expert, groups, softmax renormalised behind the op."""
    module, x = block(name), torch.randn(1, 2, zoo.HIDDEN)
    out, called = through_documents(module, x, combine=combine)
    assert relative(out, first(module(x)).detach()) <= 1e-5
    assert called[-1] == ("npu_moe_finalize_routing" if combine == "finalize" else "npu_moe_token_unpermute")


@pytest.mark.parametrize(("weight_format", "product"), [
    ("nd", "npu_dequant_swiglu_quant"), ("nz", "npu_grouped_matmul_swiglu_quant_v2")])  # fmt: skip
def test_an_int8_block_is_the_float_block_in_eight_bits(weight_format: str, product: str) -> None:
    module, x = Small(), half(3, 16)
    out, called = through_documents(module, x, quantize="w8a8", weight_format=weight_format)
    want = module(x).float()
    assert product in called and float((out.float() - want).norm() / want.norm()) <= 0.03
