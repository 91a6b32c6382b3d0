"""Compiling an entry and holding what came out against its verdict. Each check returns what is wrong, or nothing."""

from __future__ import annotations

import copy
import enum
import functools
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import golden
import torch
from torch import Tensor

from moe_compile.ir import BiasOn, Score
from moe_compile.ir.operands import ADAPTED, CHAINED, CODED, PLAIN
from moe_compile.report import Report, collecting

from . import naive
from .base import AsWritten, Case, Fused, Rejected, Sound, Untouched
from .compare import experts_differences, fields_of, gating_differences, shared_differences
from .layouts import layout_of

OPTIONS = {"inner": "aot_eager"}
OTHERS = {*CODED, *ADAPTED, *CHAINED} - {*PLAIN}
BARE = {"inner": "eager"}
TOKENS = 7

# What costs is Dynamo's tracing: with symbolic sizes it takes half as long again, and AOTAutograd traces once more. So of four entries,
# always the same ones, one has symbolic sizes, and three have sizes of their own, as users' first calls do; whatever the sizes, one in six
# goes through AOTAutograd. Both at once meets, of each kind (a value of a field of the IR that is a choice), the first entry at the least.
# One token is a graph of its own: of one entry in twelve, and of those that it makes a difference to. In `make zoo` and `make golden` all
# have symbolic sizes and the graph of one token.
EVERY = any(name in os.environ for name in ("ZOO_ALL", "GOLDEN_WRITE"))
TELLING = {key for key, line in golden.rows().items() if "|| one token" in line}

# Loops that stay as written become many graphs of Dynamo's, 2 to 25 s an entry: one of each reason stays, others are left to `make zoo`
LONG = frozenset(
    """TutorialOverTokens TutorialFirstChoice TutorialOtherScore TutorialNotChosen TutorialPut LoraActivated LoraOtherExpert LoraSomeExperts
    RowsByOtherScales ResidualOfAnother Overwrites OtherDestination AccumulatorFromOnes WeightOfOtherSlot RoomForTen FirstSlotOnly
    RowsWeighedFirst AddsTwice SwitchPutElsewhere SwitchNotChosen OneGridForTwo Mxfp4OtherBias WeightOnGateOnly TutorialOnes
    AccumulatorDecays LoraTwoOtherInput LoraTwoOtherExpert LoraTwoSomeExperts LoraScaledToo LoraOfAnotherExpert WrittenBetween
    WrittenInLoop RowsByANumber TutorialPutRead AccumulatorReadByExpert WrittenAfter WrittenBefore WrittenOldView SwitchTwoPuts
    TutorialOtherScoreRead Int4GroupsLessOne Int4GroupsAlongInputs Int4GroupsHit LoraDora TutorialEvery OddEven OtherConstant
    OtherClampLimit CapacityFirstRows SwitchArgmax StaticRowsOfAnother StaticRowsThatWrap MaskOrderByToken CodedResultsInFloat8
    WeightMaskOfOthers AddedAtMapped NormOfRouted OntoItself OntoSharedHalfRead LoraDeltaLast Dropped CentredOverTokens WrittenWeights
    OneBias SwappedHalves WeightOnHiddenWithBias ClampedGroupedBias PickedFromTheLast NanoCapacity WeightMaskAbove""".split()
)


def compiled_here(cls: type[Case]) -> bool:
    return EVERY or in_ci(cls)


def in_ci(cls: type[Case]) -> bool:
    return not cls.zoo_only and cls.__name__ not in LONG and cls.__name__ not in _spelled_elsewhere()


@functools.cache
def _spelled_elsewhere() -> frozenset[str]:
    """Two in three of the spellings of one IR that has more than three, if one token of them says nothing new: `make zoo` runs them."""
    from . import entries

    groups: dict[str, list[str]] = {}
    for name, cls in sorted(entries().items()):
        if cls.group and f"catalogue/{name}" not in TELLING:
            groups.setdefault(cls.group, []).append(name)
    return frozenset(name for names in groups.values() if len(names) > 3 for i, name in enumerate(names) if i % 3)


def one_token_too(cls: type[Case]) -> bool:
    return EVERY or f"catalogue/{cls.__name__}" in TELLING or _turn(cls, 12) == 2 and cls.dtype is torch.float32


def symbolic(cls: type[Case]) -> bool:
    """Whether an entry is compiled for any number of tokens. So are those that their number makes a difference to, and all in 16 bits,
    where errors are held against eager's, on many tokens."""
    return EVERY or _symbolic_in_turn(cls) or cls.__name__ in _firsts()


def _symbolic_in_turn(cls: type[Case]) -> bool:
    return _turn(cls, 4) == 1 or cls.dtype is not torch.float32 or f"catalogue/{cls.__name__}" in TELLING


def options_of(cls: type[Case]) -> dict[str, str]:
    return OPTIONS if _aot_in_turn(cls) or cls.__name__ in _firsts() else BARE


def _aot_in_turn(cls: type[Case]) -> bool:
    return _turn(cls, 24) // 4 == 0  # another digit than that of symbolic sizes


@functools.cache
def _firsts() -> frozenset[str]:
    """Entries whose turn it is not, and which bring a kind to symbolic sizes and AOTAutograd at once that no other does."""
    from . import entries

    here = {name: cls for name, cls in entries().items() if in_ci(cls)}  # `make golden` compiles with the same options
    met = {kind for cls in here.values() if _symbolic_in_turn(cls) and _aot_in_turn(cls) for kind in kinds_of(cls)}
    out = []
    for name, cls in here.items():
        if not met.issuperset(kinds_of(cls)):
            out.append(name)
            met.update(kinds_of(cls))
    return frozenset(out)


def kinds_of(cls: type[Case]) -> set[tuple[str, Any]]:
    """Fields of the expected IR that are choices, with what is chosen: (path, value)."""
    return {(path, value) for path, value in fields_of(cls.expect) if isinstance(value, (bool, enum.Enum))}


def _turn(cls: type[Case], of: int) -> int:
    return zlib.crc32(cls.__name__.encode()) // 4 % of  # the last two bits give the layout


@dataclass
class Run:
    """One compiled entry: the reports of the first graph and of the one-token graph, outputs beside eager's."""

    case: Case
    report: Report
    one_token: Report = field(default_factory=Report)
    outputs: list[tuple[str, Any, Any, tuple[Any, ...]]] = field(default_factory=list)


class Host(torch.nn.Module):
    """The model around the block: users compile a model, and Dynamo inlines the block's forward. A batch of sequences becomes rows."""

    def __init__(self, block: Case, batch: bool = False) -> None:
        super().__init__()
        self.block, self.batch = block, batch

    def forward(self, x: Tensor, *rest: Any) -> Any:
        return self.block(x.reshape(-1, x.shape[-1]) if self.batch else x, *rest)


def routings(case: Case, times: int = 1, tokens: int = 0) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Inputs after the first: peaked scores, every token alike (most experts empty), many tokens with faint scores, huge logits.

    Logits past 88 overflow an exponential that is not shifted, as softmax is. There are multiples of `times` tokens, or always `tokens`
    times as many.
    """
    torch.manual_seed(3)
    x, *rest = case.example_inputs((tokens or 5) * times)
    yield "peaked", (x * 6, *rest)
    x, *rest = case.example_inputs((tokens or 6) * times)
    alike = x.reshape(-1, x.shape[-1])[:1].expand(x.numel() // x.shape[-1], -1).reshape(x.shape).contiguous()
    yield "all tokens alike", (alike, *rest)
    if case.dtype is torch.float32 and case.faint_logits:  # in bf16 faint scores tie
        x, *rest = case.example_inputs((tokens or 17) * times)
        yield "many tokens, faint", (x * 0.01, *rest)
    expect = case.expect
    if case.huge_logits and isinstance(expect, Fused) and expect.gating.score is Score.SOFTMAX and expect.gating.bias is BiasOn.NONE:
        x, *rest = case.example_inputs((tokens or 9) * times)
        yield "huge logits", (x * 50, *rest)


@functools.cache
def compiled(cls: Any) -> Run:
    """Compile, run on every routing, then on one token; the tokens lie as `layouts` has it."""
    from . import build

    torch._dynamo.reset()
    case = build(cls).eval()
    layout = layout_of(case)
    host = Host(case, batch=layout.times > 1)
    eager = copy.deepcopy(host)
    fused = torch.compile(host, backend="moe_fused", dynamic=symbolic(cls), options=options_of(cls))
    run = Run(case, Report())

    def both(name: str, inputs: tuple[Any, ...]) -> None:
        laid = layout.inputs(inputs)
        run.outputs.append((name, fused(*copy.deepcopy(laid)), eager(*copy.deepcopy(laid)), inputs))

    torch.manual_seed(1)
    with torch.no_grad():
        with collecting() as run.report:
            both("first", case.example_inputs(TOKENS * layout.times))
        for name, inputs in routings(case, layout.times, 0 if symbolic(cls) else TOKENS):
            both(name, inputs)
        if one_token_too(cls):
            with collecting() as run.one_token:
                both("one token", case.example_inputs(1))
    return run


def verdict_problem(cls: type[Case], report: Report) -> str:
    """What the report says against what the docstring says."""
    expect, told = cls.expect, [f"{r.stage}: {r.reason}" for r in report.rejected]
    internal = [t for t in told if t.startswith("internal")]
    if internal:
        return f"internal error: {internal}"
    if isinstance(expect, Sound):
        return _taken_for_neighbour(cls, report)
    if isinstance(expect, (Rejected, Untouched)):
        if report.blocks:
            return f"fused: {report.blocks[0].formula} | {report.blocks[0].experts}"
        if isinstance(expect, Rejected) and not any(all(w in t.lower() for w in expect.reason.lower().split()) for t in told):
            return f"no rejection says {expect.reason!r}; told: {told}, graph breaks: {[b.reason for b in report.graph_breaks]}"
        return ""
    wanted = getattr(cls, "blocks", 1)
    if len(report.blocks) != wanted:
        breaks = [f"{b.reason} ({b.source})" for b in report.graph_breaks]
        return f"{len(report.blocks)} blocks instead of {wanted}; rejected: {told}; graph breaks: {breaks}"
    for block in report.blocks:
        problem = _meaning_problem(cls, expect, block)
        if problem:
            return problem
    return ""


def _taken_for_neighbour(cls: type[Case], report: Report) -> str:
    """Whether a near miss was recovered as the very thing it is near."""
    from . import entries

    if not cls.near or not report.blocks or report.blocks[0].ir.gating is None:
        return ""
    ir, neighbour = report.blocks[0].ir, entries()[cls.near].expect
    assert isinstance(neighbour, Fused)
    found = gating_differences(ir.gating, neighbour.gating) | experts_differences(ir.experts, neighbour.experts)
    return "" if found else f"recovered as {cls.near}: {report.blocks[0].formula}"


def _meaning_problem(cls: type[Case], expect: Fused | AsWritten, block: Any) -> str:
    ir = block.ir
    wrong = experts_differences(ir.experts, expect.experts, getattr(cls, "any_layout", False), getattr(cls, "any_mapped", False))
    if not getattr(cls, "any_shared", False):
        wrong |= shared_differences(ir.shared, expect.shared)
    if isinstance(expect, Fused):
        wrong |= gating_differences(ir.gating, expect.gating)
    elif ir.gating is not None:
        if ir.gating.score is not Score.IDENTITY:
            wrong.add("gating (should be as written)")
    elif expect.note.lower() not in ir.routing_note.lower():
        wrong.add(f"routing_note {ir.routing_note!r}")
    if wrong:
        return f"IR differs in {sorted(wrong)}: got {ir.gating} {ir.routing_note} {ir.experts} {ir.shared}"
    return "" if block.validated else "not validated"


def tensors(output: Any) -> list[Tensor]:
    return [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)]


def output_problem(run: Run) -> str:
    """Outputs against eager's: 1e-5 of the largest value in float32, and never worse than 1.25 x eager's own error.

    The second half alone counts in bf16, and where the user's spelling is itself less exact than 1e-5 (log(1 + exp(l)) for l << 0).
    """
    for name, got, want, inputs in run.outputs:
        for i, (a, b) in enumerate(zip(tensors(got), tensors(want), strict=True)):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{name}: output {i} is {a.dtype}{list(a.shape)} instead of {b.dtype}{list(b.shape)}"
            problem = difference_problem(a, b)
            if problem and i == 0 and isinstance(run.case.expect, Fused) and run.case.routes_all:
                problem = contract_problem(run.case, a, b, inputs)
            if problem:
                return f"{name}: output {i}: {problem}"
    return ""


def loose_problem(a: Tensor, b: Tensor, relative: float) -> str:
    """As `difference_problem`, for four tokens of five: rounded scores may tie where exact ones do not."""
    worst = (a - b).abs().amax(-1).flatten().sort().values
    largest = b.abs().max().item()
    return "" if worst[int(0.8 * (len(worst) - 1))] <= relative * largest else f"differs by {worst.tolist()} of {largest:.3g}"


def difference_problem(a: Tensor, b: Tensor, relative: float = 1e-5) -> str:
    if not a.dtype.is_floating_point:
        return "" if torch.equal(a, b) else "integers differ"
    known = b.isfinite()  # where the user's own spelling overflows there is nothing to compare with
    a, b = a[known], b[known]
    worst = (a - b).abs().max().item() if a.numel() else 0.0
    largest = b.abs().max().item() if b.numel() else 0.0
    if a.numel() and not a.isfinite().all():
        return "not finite where eager is"
    return "" if worst <= relative * max(largest, 1e-30) else f"differs by {worst:.3g} of {largest:.3g}"


def contract_problem(case: Case, a: Tensor, b: Tensor, inputs: tuple[Any, ...]) -> str:
    """Root mean square error of `a` against the naive float64 reading, in terms of eager's (`b`) own."""
    expect = case.expect
    assert isinstance(expect, Fused)
    return worse_than(a, b, naive.block(expect.gating, expect.experts, case.parts(*inputs)))


def worse_than(a: Tensor, b: Tensor, exact: Any) -> str:
    ours, eager = ((t.double() - torch.from_numpy(exact).reshape(t.shape)).square().mean().sqrt().item() for t in (a, b))
    return "" if ours <= 1.25 * eager else f"error {ours:.3g}, eager's own {eager:.3g}"


def oracle_problem(run: Run) -> str:
    """The recovered IR, evaluated in float64 on the block's own values, against eager."""
    expect = run.case.expect
    if not isinstance(expect, Fused) or not run.report.blocks or run.report.blocks[0].ir.gating is None:
        return ""
    ir = run.report.blocks[0].ir
    for name, _, want, inputs in run.outputs:
        p = run.case.parts(*inputs)
        if p.table is not None or p.padding is not None:
            return ""
        others = {name: getattr(p, name) for name in OTHERS}
        exact = ir.evaluate(p.x, p.logits, p.up, p.down, p.up_bias, p.down_bias, p.bias, p.expert_scale, p.add, **others)
        reference = tensors(want)[0].double().reshape(exact.shape)
        exactly = run.case.dtype is torch.float32
        problem = difference_problem(exact, reference) if exactly else loose_problem(exact, reference, 3e-2)
        if problem:
            return f"{name}: {problem}"
    return ""


def gradient_problem(cls: type[Case]) -> str:
    """Gradients of every parameter and of the tokens, compiled for training, against eager's."""
    from . import build

    torch._dynamo.reset()
    case = build(cls).train()
    eager = copy.deepcopy(case)
    fused = torch.compile(Host(case), backend="moe_fused", options=OPTIONS if EVERY else options_of(cls))
    torch.manual_seed(2)
    inputs = case.example_inputs()
    both: list[dict[str, Tensor | None]] = []
    counts: list[int] = []
    for model, module in ((fused, case), (eager, eager)):
        x = inputs[0].clone().requires_grad_()
        outs = [o for o in tensors(model(x, *inputs[1:])) if o.dtype.is_floating_point and o.requires_grad]
        torch.manual_seed(4)
        if outs:  # an expert loop under no_grad has no gradient to give
            torch.stack([(o * torch.randn_like(o)).sum() for o in outs]).sum().backward()
        counts.append(len(outs))
        both.append({"tokens": x.grad} | {n: p.grad for n, p in module.named_parameters()})
    mine, theirs = both
    if counts[0] != counts[1]:
        return f"{counts[0]} outputs with a gradient instead of {counts[1]}"
    for name, want in theirs.items():
        got = mine[name]
        if (got is None) != (want is None):
            # a zero gradient and none are the same to an optimiser's result only if nothing is missing
            if got is None and want is not None and want.abs().max() > 0:
                return f"{name}: no gradient"
            continue
        if want is not None and got is not None:
            problem = difference_problem(got, want, 2e-5 if case.dtype is torch.float32 else 3e-2)
            if problem:
                return f"{name}: {problem}"
    return ""
