"""Experts spread over ranks: which ops bring rows to them and back, as a table of laws, and a block written with them (inference).

`npu_moe_distribute_dispatch_v2` sends each token to the ranks of its experts, whose rows come out by expert;
`npu_moe_distribute_combine_v2` sends the results back and sums them. Limits: op-plugin's pages of the two. Every rank calls both, in every
layer with the same group. No hardware and no process group has run this; `emulate_exchange` does, with ranks in threads. `over_ranks` puts
it into graphs. `mega`: all of it in one kernel, by option only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir import scalar as act
from ..reference import generic
from . import calls, law, mega
from .calls import Packed, call, cast

MAX_EXPERTS, MAX_K = 1024, 16
A2_WORLDS = (16, 32, 64, 128, 256)
SHARED_BEHIND: dict[str, int] = {"shared_expert_num": 0, "shared_expert_rank_num": 0}  # its result is added by whoever calls


@dataclass(frozen=True)
class Spread:
    """A block whose experts are spread evenly over the `world` ranks of a group.

    tokens: of this rank, None where the number is not fixed. known: the ids of a row are distinct experts, whole top-k's that nobody has
    written to. identity: experts that give their input back, with ids behind the others'. device: a family of `device.family`. inner: the
    experts' own width, swiglu: whether they are SwiGLU of [gate | up] without biases. one_kernel: what `AscendOptions.mega_moe` says.
    shared: all ranks hold the same tokens. widens: experts have another number of outputs than inputs.
    """

    device: str
    world: int
    experts: int
    k: int
    hidden: int
    tokens: int | None
    dtype: torch.dtype
    known: bool = True
    identity: int = 0
    weight_on_input: bool = False
    training: bool = False
    inner: int = 0
    swiglu: bool = False
    one_kernel: bool = False
    shared: bool = False
    widens: bool = False

    @classmethod
    def of(cls, family: str, world: int, x: Tensor, ids: Tensor, layout: generic.Layout, inner: int, biases: bool, **said: bool) -> Spread:
        """Of the values at a block: x [T, H], ids [T, k]; `layout` counts the experts of all ranks; said: other fields."""
        tokens, hidden = x.shape
        swiglu = law.swiglu(act.decode(layout.act_ops, layout.act_consts), layout.form) and not biases
        return cls(
            family, world, layout.num_experts, ids.shape[1], int(hidden), tokens if type(tokens) is int else None, x.dtype,
            identity=layout.num_identity, weight_on_input=layout.weight_on_input, inner=inner, swiglu=swiglu, **said,
        )  # fmt: skip


Check = Callable[[Spread], str | None]


@dataclass(frozen=True)
class Row:
    """One way to exchange rows. `holds`: why it is exact where nothing in `checks` objects."""

    name: str
    calls: str
    holds: str
    checks: tuple[Check, ...]

    def refuses(self, s: Spread) -> str | None:
        """The first objection, or None."""
        return next((why for c in self.checks if (why := c(s)) is not None), None)


def _inference(s: Spread) -> str | None:
    return "the ops have no gradients" if s.training else None


def _static(s: Spread) -> str | None:
    return "the number of tokens is not fixed, and the ops are for static graphs" if s.tokens is None else None


def _halves(s: Spread) -> str | None:
    return None if s.dtype in (torch.float16, torch.bfloat16) else f"rows of {s.dtype}: the ops take fp16 and bf16"


def _known(s: Spread) -> str | None:
    """An id twice in a row, or outside of the experts, hangs or crashes the kernels: a slot of no expert cannot go to expert 0 here."""
    return None if s.known else "ids of a row are not known to be distinct experts"


def _combined_by_weight(s: Spread) -> str | None:
    return "the routing weight is applied to the input, the op applies it to the output" if s.weight_on_input else None


def _own_tokens(s: Spread) -> str | None:
    return "all ranks hold the same tokens, whose results are summed" if s.shared else None


def _as_wide(s: Spread) -> str | None:
    return "the experts have another number of outputs than inputs" if s.widens else None


def _sizes(s: Spread) -> str | None:
    if not 1 <= s.experts <= MAX_EXPERTS or s.experts % s.world:
        return f"{s.experts} experts over {s.world} ranks: the op takes {MAX_EXPERTS}, evenly"
    return None if 1 <= s.k <= min(MAX_K, s.experts + s.identity) else f"{s.k} experts a token, the op takes {MAX_K}"


def _a2(s: Spread) -> str | None:
    if s.device != "A2":
        return "not an A2"
    if s.world not in A2_WORLDS or s.experts // s.world > 24:
        return f"{s.experts} experts over {s.world} ranks: an A2 takes 16, 32 .. 256 ranks with up to 24 experts each"
    if s.identity:
        return "identity experts, which an A2 has not"
    if s.hidden % 32 or not 0 < s.hidden <= 7168:
        return f"a hidden size of {s.hidden}: an A2 takes multiples of 32 up to 7168"
    return None if 0 < (s.tokens or 0) <= 256 else f"{s.tokens} tokens a rank, an A2 takes 256"


def _a3(s: Spread) -> str | None:
    if s.device != "A3":
        return "not an A3"
    if not 2 <= s.world <= 768:
        return f"{s.world} ranks, an A3 takes 2 to 768"
    if not 1024 <= s.hidden <= 8192:
        return f"a hidden size of {s.hidden}, an A3 takes 1024 to 8192"
    return None if 0 < (s.tokens or 0) <= 512 else f"{s.tokens} tokens a rank, an A3 takes 512"


def _asked(s: Spread) -> str | None:
    return (mega.missing() or None) if s.one_kernel else "one kernel for everything is not asked for (mega_moe=True)"


def _one_kernel(s: Spread) -> str | None:
    if not s.swiglu or s.identity or s.dtype != torch.bfloat16:
        return "the kernel has bf16 experts that are SwiGLU of [gate | up] without biases, and no identities"
    low, high = mega.HIDDEN
    if s.hidden % mega.STEP or not low <= s.hidden <= high:
        return f"a hidden size of {s.hidden}: the kernel takes multiples of {mega.STEP} from {low} to {high}"
    low, high = mega.INNER
    if s.inner % mega.STEP or not low <= s.inner <= high:
        return f"an intermediate size of {s.inner}: the kernel takes multiples of {mega.STEP} from {low} to {high}"
    most = mega.MAX_TOKENS
    return None if 0 < (s.tokens or 0) <= most else f"{s.tokens} tokens a rank, the kernel takes {most}"


_COMMON: tuple[Check, ...] = (_inference, _static, _halves, _own_tokens, _as_wide, _known, _combined_by_weight, _sizes)
EXCHANGES: tuple[Row, ...] = (
    Row(
        "one kernel",
        "mega_moe",
        "dispatch, both products, SwiGLU and combine over memory that all ranks see; known from its callers only",
        (_asked, *_COMMON, _one_kernel),
    ),
    Row(
        "dispatch and combine, A3",
        "npu_moe_distribute_dispatch_v2, npu_moe_distribute_combine_v2",
        "Σ_j w · y over the slots of a token, identity experts as copy experts; weights go into the combine",
        (*_COMMON, _a3),
    ),
    Row(
        "dispatch and combine, A2",
        "npu_moe_distribute_dispatch_v2(expert_scales=w), npu_moe_distribute_combine_v2(expand_scales=)",
        "the same; an A2 sums within a node first, so that weights travel with the rows",
        (*_COMMON, _a2),
    ),
    Row("collectives", "all_to_all of rows and counts", "anything: counts come to the host, so no graph captures it", ()),
)
MEGA, A3, A2, COLLECTIVES = EXCHANGES


def choose(s: Spread) -> tuple[Row, list[tuple[Row, str]]]:
    """The row that is taken, and what every row above it objected to."""
    refused: list[tuple[Row, str]] = []
    for row in EXCHANGES:
        why = row.refuses(s)
        if why is None:
            return row, refused
        refused.append((row, why))
    raise AssertionError("the last row takes everything")


# ---- a block -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where this rank stands: the name of HCCL's group, its size, the rank."""

    group: str
    world: int
    rank: int

    @classmethod
    def of(cls, group: str) -> Place:
        """Of the group that functional collectives call so: on an NPU HCCL has a name of its own for it."""
        found: Any = torch.distributed.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
        npu = any(d.type == "npu" for d in found._device_types)
        name = found._get_backend(torch.device("npu")).get_hccl_comm_name(found.rank()) if npu else group
        return cls(str(name), int(found.size()), int(found.rank()))


def experts(
    x: Tensor, ids: Tensor, weights: Tensor, p: Packed, layout: generic.Layout, row: Row, at: Place, active: Tensor | None = None
) -> Tensor:
    """x [T, H], ids [T, k] of all experts, weights [T, k]; `p` holds this rank's experts -> [T, H_out].

    active: bool [T], tokens that take part, all of them before those that do not; what these get is zero.
    """
    wide = cast(weights, torch.float32)
    if row is MEGA:
        out = mega.experts(x, cast(ids, torch.int32), wide, p, layout.num_experts, at.group, active)
        return out if active is None else torch.where(active[:, None], out, torch.zeros_like(out))
    plain = dict(x_active_mask=active, **SHARED_BEHIND, copy_expert_num=layout.num_identity)
    given = (at.group, at.world, at.rank, layout.num_experts)
    travels = {"expert_scales": wide} if row is A2 else {}
    ids = cast(ids, torch.int32)
    rows, _, info, counts, received, _, scales = call("npu_moe_distribute_dispatch_v2", x, ids, *given, **plain, **travels)
    y = calls.product(calls.activate([calls.product(rows, w, counts) for w in p.up], layout), p.down, counts)
    back: dict[str, Any] = {"expand_scales": scales} if row is A2 else {}
    if layout.num_identity:
        back["ori_x"] = x
    out = call("npu_moe_distribute_combine_v2", y, ids, info, received, wide, *given, **plain, **back)
    return out if active is None else torch.where(active[:, None], out, torch.zeros_like(out))
