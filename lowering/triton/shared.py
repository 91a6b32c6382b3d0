"""Routed experts and shared expert in one op: the shared MLP runs on a side stream while the routed up projection streams its weights.

    main   event ── dispatch ── up GEMM ──────────── down GEMM ── combine(add = shared)
    side       └─ shared up ── (act) ── shared down ────────────┘

One to a few tokens go without a stream: `decode_shared` runs both in the same two kernels. More go through the grouped GEMMs, with one
expert, whose activation is in the epilogue, until products by torch are faster.

One side stream a device for all layers, or two: our GEMMs are on one whose kernels come first. The main branch is issued first. All that
the side branch writes and the main stream reads is allocated on the main stream before the event, and the main stream waits for the side
branch before it reads the result: so memory that is handed out again later, on the main stream, is never still in use. Events only,
nothing waits on the host, and a CUDA graph captures both branches.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ir import Overlap
from ...ir.operands import Operands
from ...ir.records import Storage
from ..reference.generic import Layout
from . import tune
from .call import Call, Late, read
from .dispatch import dispatch
from .experts import few_down, few_up, forward, grouped_gemm, runnable
from .host import cdiv, power_of_2
from .launch.tape import Beside, empty, fill, launch, product
from .pointwise import activate
from .tune import Choice, Tile, Vector
from .weights import Biases

if TYPE_CHECKING:
    from .decode_shared import Shared

MOST_BY_OURS = 1 << 19  # activations [T, I] of a shared expert that our GEMMs make; beyond, torch's are faster and the host has time
_MOST_BESIDE = 4096  # tokens; a side stream gains 2 to 4 % up to 1,024, 0 to 3 % at 4,096 (docs/kernels.md); beyond nothing was measured


@dataclass(frozen=True)
class Few:
    """One to a few tokens: the decode kernels with one expert. Buffers: activations, ids and weights (both filled when run)."""

    call: Call
    a: Tensor
    out: Tensor
    add: Tensor | None
    tiles: tuple[Vector, Vector]
    gated: bool

    def run(self) -> Tensor:
        fill(self.call.ids, 0)
        if not self.gated:
            fill(self.call.weights, 1)
        few_up(self.call, self.a, self.tiles[0])
        few_down(self.call, self.a, self.add, self.out, self.tiles[1], early=True)
        return self.out


@dataclass(frozen=True)
class Many:
    """More tokens: dense products by torch, the activation and what comes after the last product as one small kernel each."""

    call: Call
    up: list[Tensor]  # [H, rows]
    down: Tensor  # [I, H]
    pre: list[Tensor]  # [T, rows]
    a: Tensor
    y: Tensor
    out: Tensor | None  # fp32; None: y is the result
    gate: Tensor | None
    add: Tensor | None

    def run(self) -> Tensor:
        c = self.call
        for w, pre in zip(self.up, self.pre, strict=True):
            product(c.x, w, pre)
        activate(c.layout, self.pre, c.up_bias, self.a)
        product(self.a, self.down, self.y)
        if self.out is None:
            return self.y
        return _finished(self.y, self.gate, c.down_bias, self.add, self.out)


@dataclass(frozen=True)
class One:
    """Up to some thousand tokens: the grouped GEMMs of the routed experts, whose one expert has all tokens.

    A launch by a plan costs the host less than a product by torch. Buffers: ids (filled when run), activations, products.
    """

    call: Call
    a: Tensor  # [T, I]
    y: Tensor  # [T, H]
    out: Tensor | None  # fp32; None: y is the result
    gate: Tensor | None
    add: Tensor | None
    tiles: tuple[Tile, Tile]

    def run(self) -> Tensor:
        c, (up, down) = self.call, self.tiles
        fill(c.ids, 0)
        rows = dispatch(c.ids, 1, tuple(dict.fromkeys((up.bm, down.bm))))
        grouped_gemm(c.x, c.up, c.up_bias, rows, self.a, up, c.layout)
        grouped_gemm(self.a, c.down, c.down_bias, rows, self.y, down, None)
        return self.y if self.out is None else _finished(self.y, self.gate, None, self.add, self.out)


class Side:
    """A branch on the side stream, from what the main stream has at this point on."""

    def __init__(self, branch: Few | One | Many, device: torch.device) -> None:
        self.branch, self.beside = branch, Beside(device, first=isinstance(branch, One))
        self.result: Tensor | None = None

    def issue(self) -> None:
        with self.beside.issue():
            self.result = self.branch.run()

    def join(self) -> Tensor:
        """The main stream waits; the result may be read on it from here on."""
        assert self.result is not None
        self.settle()
        return self.result

    def settle(self) -> None:
        self.beside.join()


def experts_shared(routed: Sequence[Any], layout: Layout, shared: Sequence[Any], storage: Storage | None = None) -> Tensor | None:
    """routed + [gate ·] shared_down act(shared_up x) + add -> [T, H]; the arguments of the op in three parts. None: beyond the kernels.

    `storage`: of routed experts in few bits.
    """
    x, ids, weights, p, add = routed
    mlp, gate, *how, overlap = shared
    branch = _branch(x, add, mlp, gate, *how)
    run: Run | None
    if branch is None:
        return None
    if storage is None:
        together = _together(routed, layout, branch) if isinstance(branch, Few) else None
        run = lambda add, late: forward(x, ids, weights, p, add, layout, save=False, late=late)[0]  # noqa: E731
    else:
        together, run = _in_few_bits(routed, layout, storage, branch)
    if together is not None or run is None:
        return together
    beside = x.is_cuda and (overlap == Overlap.SIDE or (overlap == Overlap.BY_TOKENS and x.shape[0] <= _MOST_BESIDE))
    return _beside(run, branch, x.device) if beside else run(branch.run(), None)


Run = Callable[[Tensor | None, Late | None], Tensor]


def _beside(run: Run, branch: Few | One | Many, device: torch.device) -> Tensor:
    side = Side(branch, device)
    try:
        return run(None, side)
    except BaseException:
        side.settle()  # the branch's buffers go back to the main stream's pool now
        raise


def _in_few_bits(routed: Sequence[Any], layout: Layout, storage: Storage, branch: Few | One | Many) -> tuple[Tensor | None, Run | None]:
    """The result where both are in the few-token kernels; else how to run the routed experts, None where there are none to run."""
    from . import coded, coded_shared  # few models have them, and kernels take time to import

    if routed[1].numel() == 0:
        return None, None
    c = coded.operands(*routed, layout, storage)
    choice = None if c is None else coded.choose(c)
    if c is None or choice is None:
        return None, lambda add, late: _in_workspace(routed, layout, storage, add, late)
    if choice.few is not None and isinstance(branch, Few):
        shared = _shared(branch)
        if coded_shared.fits(c, shared):
            return coded_shared.few_together(c, shared, branch.tiles[0], *choice.few), None
    out = empty(c.x, c.x.shape[0], c.down.at.n)
    return None, lambda add, late: coded.run(replace(c, add=add), choice, out, late)


def _in_workspace(routed: Sequence[Any], layout: Layout, storage: Storage, add: Tensor | None, late: Late | None) -> Tensor:
    """Routed experts whose codes no kernel decodes: floats of them in turns, and what is added when all are done."""
    from . import stored

    x, ids, weights, p, _ = routed
    if late is not None:
        late.issue()  # first: the turns are dozens of launches
    out = stored.forward(x, ids, weights, p, None, layout, storage)
    more = add if late is None else late.join()
    return out if more is None else (out.float() + more).to(x.dtype)


def _shared(branch: Few) -> Shared:
    from .decode_shared import Shared

    return Shared(branch.call, branch.call.weights if branch.gated else None)


def _together(routed: Sequence[Any], layout: Layout, branch: Few) -> Tensor | None:
    """Both in the few-token kernels; None where the routed experts take others."""
    from .decode_shared import few_together, fits

    call = read(*routed, layout)
    if call is None or call.slots == 0:
        return None
    shared = _shared(branch)
    problem = tune.Problem(layout.num_experts, call.up.k, call.up.n, call.ids.shape[1], call.x.dtype, layout.gated)
    tiles = tune.choose(problem, call.x.shape[0], call.x.device).decode
    return few_together(call, shared, *tiles) if tiles is not None and fits(call, shared) else None


def _branch(
    x: Tensor,
    add: Tensor | None,
    p: Operands[Tensor],
    gate: Tensor | None,
    act_ops: Sequence[int],
    act_consts: Sequence[float],
    form: int,
    up_transposed: bool,
    down_transposed: bool,
) -> Few | One | Many | None:
    """The shared MLP ready to run: operands read, every buffer allocated on the stream that is current now."""
    tokens = x.shape[0]
    if tokens == 0:
        return None
    layout = Layout(tuple(act_ops), tuple(act_consts), form, 1, True, up_transposed, down_transposed, False, 0)
    ids = empty(x, tokens, 1, dtype=torch.int64)
    weights = empty(x, tokens, 1, dtype=torch.float32) if gate is None else gate.contiguous()
    call = read(x, ids, weights, p.map(lambda t: t[None]), add, layout)
    if call is None:
        return None
    add, out = call.add, empty(x, tokens, call.down.n, dtype=torch.float32)
    choice = tune.choose(tune.Problem(1, call.up.k, call.up.n, 1, x.dtype, layout.gated), tokens, x.device)
    if choice.decode is not None:
        return Few(call, empty(x, tokens, call.up.n), out, add, choice.decode, gate is not None)
    a, y = empty(x, tokens, call.up.n), empty(x, tokens, call.down.n)
    if tokens * call.up.n <= MOST_BY_OURS and (own := _tiles(call, a, choice)) is not None:
        return One(call, a, y, None if gate is None and add is None else out, None if gate is None else weights, add, own)
    up_in = [t if up_transposed else t.t() for t in p.up]
    pre = [empty(x, tokens, w.shape[1]) for w in up_in]
    plain = gate is None and add is None and not p.down_bias
    down_in = p.down[0] if down_transposed else p.down[0].t()
    return Many(call, up_in, down_in, pre, a, y, None if plain else out, None if gate is None else weights, add)


def _tiles(c: Call, a: Tensor, choice: Choice) -> tuple[Tile, Tile] | None:
    """Of both products, as they can be run; None where torch's are faster, or the kernels do not take the rows."""
    apart = c.x.stride(0) >= c.x.shape[1]  # rows that overlap, as of one token expanded, are no tensor map's
    if c.x.dtype == torch.float32 or not apart:
        return None
    up, down = runnable(c.x, c.up, choice.up), runnable(a, c.down, choice.down)
    return (up, down) if (up.hopper, down.hopper) == (choice.up.hopper, choice.down.hopper) else None


def _finished(y: Tensor, gate: Tensor | None, bias: Biases | None, add: Tensor | None, out: Tensor) -> Tensor:
    """out = gate · (y + bias) + add, in fp32."""
    tokens, width = y.shape
    columns = min(1024, power_of_2(width))
    launch(
        _finish, (tokens, cdiv(width, columns)),
        y, gate, None if bias is None else bias.parts[0], add, out, width, 0 if add is None else add.stride(0),
        0 if bias is None else bias.stride_n,
        GATED=gate is not None, BIAS=bias is not None, ADD=add is not None, BN=columns, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _finish(
    y, gate, bias, add, out, width, stride_add, stride_bias, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, BN: tl.constexpr
):
    """out = gate · (y + bias) + add, in fp32."""
    t = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = columns < width
    total = tl.load(y + t * width + columns, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + columns * stride_bias, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        total *= tl.load(gate + t).to(tl.float32)
    if ADD:
        total += tl.load(add + t * stride_add + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * width + columns, total, mask=inside)
