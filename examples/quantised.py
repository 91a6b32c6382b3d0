"""Experts whose weights lie in few bits, and that make floats of them in their forward, in plain torch, as models are written.

`quantise(model, "fp8")` exchanges the experts of every MoE layer in place; what the compiler reads of them is ir.Stored.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
import trinity
from torch import Tensor, nn
from transformers import AfmoeForCausalLM

BLOCK = 128  # rows and columns, or inputs, that share a scale, where the experts' widths allow it
E4M3, E4M3_MAX = torch.float8_e4m3fn, 448.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = (*E2M1, *(-v for v in E2M1))  # by code: the highest of the four bits is the sign
E2M1_BETWEEN = tuple((a + b) / 2 for a, b in itertools.pairwise(E2M1))
SMALLEST = 2.0**-100  # the largest number of a block, so that a block of zeros has a scale too


class QuantisedExperts(nn.Module):
    """Experts with `gate_up_proj` and `down_proj` as codes, a scale for each block of them. Subclasses say how both lie in memory.

    experts: transformers', with weights [E, 2I, H] and [E, H, I]; each is quantised by itself, so that no more than one matrix
    is ever there in fp32. Raises ExampleError when its widths do not divide into blocks.
    """

    largest, multiple = BLOCK, 1  # what a block may have along a side

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.num_experts, self.act_fn = experts.num_experts, experts.act_fn
        h, i = experts.hidden_dim, experts.intermediate_dim
        self.block = math.gcd(self.largest, h // 2, i // 2)  # so that there are two or more each way, and none of gate and up both
        if self.block % self.multiple:
            raise trinity.ExampleError(f"experts of {h} and {i} inputs have no groups of a multiple of {self.multiple}")
        for name in ("gate_up_proj", "down_proj"):
            pairs = [self.encode(weight.detach().float()) for weight in getattr(experts, name)]
            self.register_buffer(name, torch.stack([codes for codes, _ in pairs]))
            self.register_buffer(f"{name}_scale", torch.stack([scales for _, scales in pairs]))

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 [N, K] -> (codes, scales)."""
        raise NotImplementedError

    def floats(self, codes: Tensor, scales: Tensor) -> Tensor:
        """What `encode` gave -> fp32 [N, K]."""
        raise NotImplementedError

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], ids and weights [T, K] -> [T, H]; floats are made of one expert at a time, and only of those that were hit."""
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, self.num_experts).permute(2, 1, 0)
        for hit in (mask.sum(dim=(-1, -2)) > 0).nonzero():
            e = hit[0]
            slot, token = torch.where(mask[e])
            up = self.floats(self.gate_up_proj[e], self.gate_up_proj_scale[e]).to(x.dtype)
            down = self.floats(self.down_proj[e], self.down_proj_scale[e]).to(x.dtype)
            gate, value = F.linear(x[token], up).chunk(2, dim=-1)
            y = F.linear(self.act_fn(gate) * value, down) * weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


class Float8Experts(QuantisedExperts):
    """e4m3, a scale for each block of 128 x 128, as DeepSeek-V3 and Qwen3-FP8 have them."""

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        blocks = weight.unflatten(1, (-1, self.block)).unflatten(0, (-1, self.block))
        scales = blocks.abs().amax((1, 3)).clamp(min=SMALLEST) / E4M3_MAX
        return (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1).to(E4M3), scales

    def floats(self, codes: Tensor, scales: Tensor) -> Tensor:
        n, k = scales.shape
        return (codes.float().view(n, self.block, k, self.block) * scales[:, None, :, None]).view(codes.shape)


class Mxfp4Experts(QuantisedExperts):
    """e2m1, two a byte, the low one first; for 32 inputs an exponent of two in a byte (e8m0), as gpt-oss has them."""

    largest, multiple = 32, 32

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        groups = weight.unflatten(-1, (-1, self.block))
        exponent = groups.abs().amax(-1).clamp(min=SMALLEST).log2().floor() - 2  # the largest code, 6, is 1.5 * 2^2
        scaled = torch.ldexp(groups, -exponent[..., None]).flatten(-2)
        between = torch.tensor(E2M1_BETWEEN, device=weight.device)
        codes = torch.bucketize(scaled.abs(), between) + 8 * (scaled < 0)
        return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8), (exponent + 127).to(torch.uint8)

    def floats(self, codes: Tensor, scales: Tensor) -> Tensor:
        table = torch.tensor(E2M1_VALUES, device=codes.device)
        values = torch.stack([table[(codes & 15).long()], table[(codes >> 4).long()]], -1).flatten(-2)
        return torch.ldexp(values.unflatten(-1, (-1, self.block)), scales.int()[..., None] - 127).flatten(-2)


class Int4Experts(QuantisedExperts):
    """Four bits less 8, eight in an int32, the lowest first; a scale for each 128 inputs, as compressed-tensors has them."""

    multiple = 8

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        groups = weight.unflatten(-1, (-1, self.block))
        scales = groups.abs().amax(-1).clamp(min=SMALLEST) / 7
        codes = ((groups / scales[..., None]).round() + 8).clamp(0, 15).to(torch.int32).flatten(-2)
        return (codes.unflatten(-1, (-1, 8)) << self.places(weight)).sum(-1, dtype=torch.int32), scales

    def floats(self, codes: Tensor, scales: Tensor) -> Tensor:
        values = ((codes[..., None] >> self.places(codes) & 15) - 8).flatten(-2).float()
        return (values.unflatten(-1, (-1, self.block)) * scales[..., None]).flatten(-2)

    @staticmethod
    def places(like: Tensor) -> Tensor:
        return torch.arange(0, 32, 4, dtype=torch.int32, device=like.device)


SCHEMES: dict[str, type[QuantisedExperts]] = {"fp8": Float8Experts, "mxfp4": Mxfp4Experts, "int4": Int4Experts}


@torch.no_grad()
def quantise(model: AfmoeForCausalLM, scheme: str) -> None:
    """Quantise the experts in place, layer by layer: floats of a layer are freed before the next one's codes are made."""
    for layer in model.model.layers:
        if layer.moe_enabled:
            layer.mlp.experts = SCHEMES[scheme](layer.mlp.experts).eval()
