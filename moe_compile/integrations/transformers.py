"""Expert parallelism for transformers: `DistributedConfig(ep_size=..., ep_implementation="moe_compile")` once this module is imported.

    import moe_compile.integrations.transformers
    config = DistributedConfig(tp_size=2, tp_plan="auto", ep_size=2, ep_implementation="moe_compile")
    model = AutoModelForCausalLM.from_pretrained(name, distributed_config=config)
    model = torch.compile(model, backend="moe_fused")

Placement, loading, saving and FSDP stay transformers'. What is brought is how rows reach the experts: every rank gathers ids, weights and
rows of its group, runs its own experts on them, and gets the sums for its own rows back by a reduce-scatter. With k of E experts a token
needs a certain other one of P ranks with probability 1 - C(E - E/P, k) / C(E, k): 0.997 for two ranks and 0.91 for four with 8 of 128,
so that little is gathered in vain, nothing is read back to the host, and all shapes are known beforehand (one graph, CUDA graphs).
Where all ranks hold the same batch nothing is gathered, and the results are summed by one all-reduce.

`ep_implementation="moe_compile_rows"` sends a row to the ranks whose experts it chose, by all-to-all: batches may differ in length.
"moe_compile_rows_static" does so for batches of one length, in one graph.

Needs transformers 5.23 or newer. Raises ImportError where it has no registry for implementations.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

try:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
except ImportError as e:
    raise ImportError("moe_compile.integrations.transformers needs transformers 5.23 or newer: its registry of EP implementations") from e

from .. import agreement, exchange, peers
from ..ops.peer_rows import MEMORY
from ..ops.summed import SUMS, memory_of

NAME, ROWS, STATIC = "moe_compile", "moe_compile_rows", "moe_compile_rows_static"
UNEVEN = (
    'ep_implementation="moe_compile": the ranks of a group have different numbers of tokens; pad the batches, or use "moe_compile_rows"'
)


class GatherEP(EPImplementation):  # type: ignore[misc]
    """Rows of all ranks to all ranks, sums back. hidden [T, H], ids and weights [T, k] -> [T, H], with the same T on all ranks.

    The ranks agree upon what they fuse, and refuse to start with different versions of this package (`moe_compile.agreement`).
    Where batches differ in length every rank raises RuntimeError; pad them, or use `RowsEP`. Ids outside of this rank's experts are
    `num_local_experts` with weight 0, as transformers' experts take them.
    """

    gathers = True  # where batches are the ranks' own

    def __init__(self, experts: torch.nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        agreement.join(ep_mesh.get_group())
        memory = memory_of(SUMS) if self.shares_batch else MEMORY
        self.peers = (self.shares_batch or self.gathers) and peers.join(ep_mesh.get_group(), ep_mesh.device_type, memory)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        group = self.ep_mesh.get_group()
        batch = (hidden_states, top_k_index, top_k_weights)
        own = (self.experts_forward, dist.get_rank(group) * self.num_local_experts, self.num_local_experts, group)
        way = exchange.shared if self.shares_batch else functools.partial(exchange.gathered, uneven=UNEVEN)
        return way(*batch, *own, peers=self.peers)


class RowsEP(GatherEP):
    """A row to each rank whose experts it chose, once, and its results back. hidden [T, H], ids and weights [T, k] -> [T, H], T of any
    number on each rank. Split sizes are read back to the host, so that a compiled layer is several graphs and no CUDA graph."""

    gathers = False

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self.shares_batch:
            return super().__call__(hidden_states, top_k_index, top_k_weights)
        batch = (hidden_states, top_k_index, top_k_weights)
        return exchange.by_rows(*batch, self.experts_forward, self.num_local_experts, self.ep_mesh.get_group())


class StaticRowsEP(GatherEP):
    """As `RowsEP` for one T on all ranks, in one graph: every rank's experts get P T rows, of which those that nobody sent are none's.
    Where batches differ in length every rank raises RuntimeError. The host reads how many rows travel inside of an op: no CUDA graph."""

    gathers = False

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self.shares_batch:
            return super().__call__(hidden_states, top_k_index, top_k_weights)
        batch = (hidden_states, top_k_index, top_k_weights)
        return exchange.sent(*batch, self.experts_forward, self.num_local_experts, self.ep_mesh.get_group())


EPImplementationInterface.register(NAME, GatherEP)
EPImplementationInterface.register(ROWS, RowsEP)
EPImplementationInterface.register(STATIC, StaticRowsEP)
