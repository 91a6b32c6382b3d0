"""Expert parallelism for torchtitan: rows by all-gather, sums by reduce-scatter, in place of its all-to-all.

    --override.imports moe_compile.integrations.torchtitan.gather --compile.enable --compile.backend moe_fused

or `token_dispatcher=GatherTokenDispatcher.Config(num_experts=..., top_k=...)` in the configuration of a layer. Placement of weights,
FSDP, loading and saving stay torchtitan's. A layer is one graph, with static shapes and nothing read back to the host, where torchtitan's
own all-to-all reads its split sizes. `moe_compile.exchange` says what travels.

As written, T tokens on each of P ranks and k experts a token make P · T · k rows on every rank, whoever's experts they are of: rows of
other ranks' experts stand behind the last group, and are zeros. Under `moe_fused` the experts between the two halves are fused, and no
such rows are made.

Needs torchtitan 0.3 or newer. Raises ImportError where its token dispatchers or its overrides are not found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

try:
    from torchtitan.config import override
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, BaseEPTokenDispatcher, LocalTokenDispatcher
except ImportError as e:
    raise ImportError("moe_compile.integrations.torchtitan needs torchtitan 0.3 or newer: its token dispatchers and overrides") from e

from .. import agreement, exchange

UNEVEN = "GatherTokenDispatcher: the ranks of an expert-parallel group have different numbers of tokens; torchtitan's all-to-all takes them"


@dataclass(frozen=True, kw_only=True)
class GatherMetadata:
    """What `combine` has to know of the rows that `dispatch` made, R = P · T · k of them.

    token [R]: which of the group's P · T tokens a row is of. weight [R]: of its choice. own [R]: whether it is of this rank's experts.
    tokens: P · T.
    """

    token: Tensor
    weight: Tensor
    own: Tensor
    tokens: int


class GatherTokenDispatcher(BaseEPTokenDispatcher):  # type: ignore[misc]
    """Every rank takes the tokens of its expert-parallel group, all of one number, and gives each rank the sums for its own ones.

    Without such a group it is torchtitan's local dispatch. The ranks agree upon what they fuse, and refuse to start with different
    versions of this package (`moe_compile.agreement`). Raises RuntimeError on every rank where the numbers of tokens differ.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseEPTokenDispatcher.Config):  # type: ignore[misc]
        """num_experts: of all ranks. top_k: experts a token."""

    def wire_meshes(self, *, ep_mesh: Any) -> None:
        """Raises ValueError where the ranks cannot share the experts equally."""
        super().wire_meshes(ep_mesh=ep_mesh)
        if ep_mesh is None:
            return
        if self.num_experts % ep_mesh.size():
            raise ValueError(f"{self.num_experts} experts cannot be shared equally by {ep_mesh.size()} ranks")
        agreement.join(ep_mesh.get_group())

    def dispatch(self, x: Tensor, scores: Tensor, ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Any]:
        """x [T, D], scores and ids [T, k] of this rank -> rows [R, D] in the order of this rank's experts, rows of each of them
        [E / P], and what `combine` needs. `counts` [E], how often this rank's tokens chose each expert, is not used under a group."""
        if self.ep_mesh is None:
            return LocalTokenDispatcher.dispatch(self, x, scores, ids, counts)  # type: ignore[no-any-return]
        group = self.ep_mesh.get_group()
        held = self.num_experts // group.size()
        rows, chosen, weights = exchange.arriving(x, ids, scores, group, UNEVEN)
        chosen, weights = exchange.among_own(chosen, weights, dist.get_rank(group) * held, held)
        choices = chosen.view(-1)
        order = choices.argsort(stable=True)
        token = order // self.top_k
        own = (choices[order] < held).unsqueeze(-1)
        # every choice counts, an expert that a token chose twice as well: of gathered ids nobody can prove that there is none
        each = choices.new_zeros(held + 1).scatter_add(0, choices, torch.ones_like(choices))[:held]
        # rows behind the last group are nobody's: products leave them, and their gradients, undefined
        made = torch.where(own, rows[token], 0)
        return made, each, GatherMetadata(token=token, weight=weights.view(-1)[order], own=own, tokens=len(rows))

    def combine(self, routed: Tensor, metadata: Any, x: Tensor) -> Tensor:
        """Results [R, D] of `dispatch`'s rows -> [T, D], summed in float32 on each rank, in x's dtype between ranks."""
        if self.ep_mesh is None:
            return LocalTokenDispatcher.combine(self, routed, metadata, x)  # type: ignore[no-any-return]
        weighed = torch.where(metadata.own, routed.float() * metadata.weight.unsqueeze(-1), 0)
        part = routed.new_zeros(metadata.tokens, routed.shape[-1], dtype=torch.float32).index_add(0, metadata.token, weighed)
        return exchange.leaving(part.to(x.dtype), self.ep_mesh.get_group())


@override(
    target=AllToAllTokenDispatcher.Config, exact=True, description="moe_compile: rows by all-gather, one graph, nothing read by the host"
)
def gather(config: Any) -> Any:
    """The all-to-all of a configuration replaced by `GatherTokenDispatcher`."""
    return GatherTokenDispatcher.Config(num_experts=config.num_experts, top_k=config.top_k)
