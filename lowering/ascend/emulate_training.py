"""CPU kernels of permute and unpermute and their gradients, from their documented semantics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def token_permute(tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False) -> tuple[Tensor, Tensor]:
    k = 1 if indices.ndim == 1 else indices.shape[1]
    order = indices.reshape(-1).argsort(stable=True)
    total = order.numel()
    wanted = total if not num_out_tokens else num_out_tokens if num_out_tokens > 0 else total + num_out_tokens
    return tokens[order[:wanted] // k], order.argsort().int()


def token_permute_grad_v2(
    grad_permuted_tokens: Tensor, sorted_indices: Tensor, tokens_size_0: int, tokens_dtype: torch.dtype, num_topK: int,
    padded_mode: bool = False,
) -> Tensor:  # fmt: skip
    picked = grad_permuted_tokens.float()[sorted_indices.long()]
    return picked.view(tokens_size_0, num_topK, -1).sum(1).to(tokens_dtype)


def token_unpermute_pair(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """out[i] = Σ_j probs[i, j] · rows[sorted_indices[i k + j]]; the second result is what the gradient wants to see again."""
    return token_unpermute(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape), permuted_tokens.clone()


def token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:
    rows = permuted_tokens[sorted_indices.long()]
    if probs is None:
        return rows
    out = rows.float().view(*probs.shape, -1) * probs.float()[..., None]
    return out.sum(1).to(permuted_tokens.dtype)


def token_unpermute_grad_v2(
    grad_unpermuted_tokens: Tensor,
    sorted_indices: Tensor,
    permuted_tokens_size_0: int,
    permuted_tokens_dtype: torch.dtype,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
    permuted_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grad, index = grad_unpermuted_tokens.float(), sorted_indices.long()
    out = torch.zeros(permuted_tokens_size_0, grad.shape[-1])
    if probs is None:
        return out.index_copy(0, index, grad).to(permuted_tokens_dtype), torch.empty(0)
    by_slot = (grad[:, None] * probs.float()[..., None]).flatten(0, 1)
    assert permuted_tokens is not None
    d_probs = (permuted_tokens.float()[index].view(*probs.shape, -1) * grad[:, None]).sum(-1)
    return out.index_copy(0, index, by_slot).to(permuted_tokens_dtype), d_probs.to(probs.dtype)
