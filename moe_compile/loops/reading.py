"""Readings: what an expert loop means, found by example, tried on routings it was not read from, and put into one call.

A loop such as ``for e in hit: ...`` cannot be traced, but its function can be run. `read` records one run on probes (`record`), asks the
passes for the meaning, writes the function that Dynamo may inline instead (`regenerate`), and compares the two on other routings
(`confirm`). Whatever fails on the way is a `Rejection`, and the user's function stays.
"""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from ..ir import Experts, Rejection
from ..passes.aten.names import op_name
from ..passes.prove.region import one_thread
from ..passes.recorded import NO_SUM
from ..passes.recover.rounding import IN_PART
from ..passes.terms.budget import BUDGET
from .bench import NoExperts, Unrolls
from .call import Call, Roles, roles_of
from .confirm import confirm, holds_for_repeats
from .fewer import LIMIT, Fewer
from .flags import MATHS
from .neutral import neutral
from .places import FUNCTION, MODULE, Place, find, mark
from .readers import APART, DRAWS, Block, Dispatch
from .record import INSTEAD
from .regenerate import Regenerated
from .rows import FirstCall

log = logging.getLogger("moe_compile")

Recover = Callable[[fx.GraphModule], Any]
_NEVER = {"hooks", "shared", "tensors"}  # refusals that rest on one module and on no question that its code asked
_ANYWAY = {*_NEVER, "effects", "random", "values", "rows", "draw"}  # those that fewer experts do not cause
_ANY_WIDTH = MATHS | {BUDGET, IN_PART}  # codes of what more experts, and wider ones, do not change


@dataclass(frozen=True)
class Reading:
    """What a function does with its arguments, proved on probes.

    `run(*arguments, *parameters)` is what may be inlined in its place: `arguments` by name in that order, then the module's
    parameters at `params`. `reads`: the places that the function read beside its arguments, with a mark of what it found.
    `distinct`: the ids, if it holds only where no token has an expert twice.
    """

    experts: Experts
    run: types.FunctionType
    arguments: tuple[str, ...]
    params: tuple[str, ...]
    reads: Mapping[Place, Any]
    source: str
    distinct: str | None = None


@dataclass
class Trial:
    """The outcome of one attempt at reading, with everything it depended on.

    `about_experts`: ids did choose something. `lasting`: it may be remembered for other calls that answer alike.
    """

    outcome: Reading | Rejection
    reads: Mapping[Place, Any] = field(default_factory=dict)
    about_experts: bool = True
    lasting: bool = True


@neutral()
@one_thread()
def read(call: Call, recover: Recover) -> Trial:
    """Read a call's function. Never raises for what the function does: the outcome is then a `Rejection` with its source."""
    reads: set[Place] = set()
    outcome: Reading | Rejection = NoExperts("no tensors are tokens, ids and weights", stage="read")
    for roles in roles_of(call.tensors) or (None,):
        outcome, first = _try(call, roles, reads, recover), outcome
        if isinstance(outcome, Reading):
            break
        outcome = outcome if isinstance(first, NoExperts) else first
    marks = {r: mark(find(r, roots(call))) for r in reads}
    if isinstance(outcome, Reading):
        outcome = replace(outcome, reads=marks)
    # a refusal before anything was asked rests on the module at hand, and no mark would tell another one from it
    lasting = isinstance(outcome, Reading) or outcome.stage not in _NEVER and bool(marks)
    return Trial(outcome, marks, not isinstance(outcome, NoExperts), lasting)


def _try(call: Call, roles: Roles | None, reads: set[Place], recover: Recover, draw: int = 0) -> Reading | Rejection:
    try:
        return _cheapest(call, Block(call, reads, draw) if roles is None else Dispatch(call, roles, reads), recover)
    except NoExperts as r:
        return r
    except Rejection as r:
        if r.stage == "draw" and roles is None and draw < DRAWS - 1:
            return _try(call, roles, reads, recover, draw + 1)
        return Rejection(r.reason, None, "rows" if r.stage == "draw" else r.stage, r.source or call.source, code=r.code, part=r.part)
    except Exception as e:
        return Rejection(f"reading it failed: {type(e).__name__}: {e}", stage="read", source=call.source)


def _cheapest(call: Call, reader: Dispatch | Block, recover: Recover) -> Reading:
    """Read few experts in place of many, and narrow ones; more of them where that does not tell, up to a limit."""
    told: Exception | None = None
    for fewer in reader.cuts():
        if told is not None and reader.heavy() and not _of_running(told):
            break
        if told is not None and reader.all > LIMIT and not (fewer and fewer.cuts):
            why = f"it has {reader.all} experts, too many to be read one by one, and with fewer of them it is another function: {told}"
            raise Rejection(why, stage="budget") from told
        reader.lay(fewer)
        try:
            return _read(call, reader, recover)
        except Exception as e:
            if reader.spare and not isinstance(e, NoExperts):
                raise Unrolls(f"Dynamo can unroll it, and reading it failed: {e}", stage="read") from e
            if fewer is None or _for_good(e, fewer):
                raise
            log.debug("capture: %s as %s: %s: %s", call.source, fewer, type(e).__name__, e)
            told = e
    assert told is not None
    raise told


def _for_good(e: Exception, fewer: Fewer) -> bool:
    """Whether a failure has nothing to do with how many experts there are, and how wide."""
    if isinstance(e, NoExperts):
        return not fewer.widths or not _of_running(e)
    return isinstance(e, Rejection) and (e.stage in _ANYWAY or e.code in _ANY_WIDTH)


def _of_running(e: BaseException) -> bool:
    """Whether the code itself could not do with other sizes."""
    if isinstance(e, NoExperts):
        return e.__cause__ is not None and _of_running(e.__cause__)
    return not isinstance(e, Rejection) or e.__cause__ is not None


def _read(call: Call, reader: Dispatch | Block, recover: Recover) -> Reading:
    gm = reader.record()
    with torch.set_grad_enabled(call.grad):  # the passes read functions as they are where no gradient is wanted
        found = recover(gm)
    if isinstance(found, Rejection) and reader.partial and (found.code or found.stage) == "experts":
        raise Rejection(f"no example was found on which its router chooses every expert{APART}", stage="record")
    if isinstance(found, Rejection):
        raise _by_rows(reader, _with_line(reader, gm, found))
    found_experts = found.ir.experts.num_experts + found.ir.experts.num_identity
    if found_experts < reader.experts:
        raise Rejection(f"only {found_experts} of {reader.experts} experts were recovered", stage="read")
    reader.follow()

    def written(fewer: Fewer | None) -> Regenerated:
        return Regenerated(call, gm, found.ir.experts, found.ir.boundary, reader.primes, reader.reshaped, fewer)

    real, fewer = written(reader.fewer), reader.fewer
    as_read = real if fewer is None or not fewer.widths else written(fewer._replace(widths=()))
    confirm(real, as_read, reader)
    ids = reader.ids if not holds_for_repeats(as_read, reader) else None
    return Reading(real.experts, real.by_op, tuple(call.tensors), tuple(real.params), {}, call.source, ids)


def _with_line(reader: Dispatch | Block, gm: fx.GraphModule, found: Rejection) -> Rejection:
    """What stands inside an expert with its line, which a recording does not tell: `source` is the loop's."""
    if found.reason == NO_SUM and gm.meta["numbered"]:
        return Rejection(f"which rows an expert gets is read back into Python, one by one: {INSTEAD}", None, "record")
    if found.code != "inside" or not isinstance(found.node, fx.Node):
        return found
    seen = FirstCall(op_name(found.node))
    with contextlib.suppress(Exception):
        reader.small.run(reader.usual(reader.small), listener=seen)
    said = f"{found.reason} (at {seen.at})" if seen.at else found.reason
    return Rejection(said, found.node, found.stage, found.source, code=found.code, part=found.part)


def _by_rows(reader: Dispatch | Block, found: Rejection) -> Rejection:
    """What is told of a recording that was not read: experts that got more rows than others may have gone another way for that alone."""
    if (found.stage in ("record", "find") or found.code == "unlike") and not reader.spare:
        try:
            reader.follow()
        except Rejection as r:
            if r.stage == "rows" and r.__cause__ is None:
                return r
    return found


def roots(call: Call) -> dict[str, Any]:
    """What is at the roots of places in a call."""
    return {MODULE: call.module, FUNCTION: call.fn, **call.roots}


def matches(trial: Trial, call: Call) -> bool:
    """A trial holds for another call if that answers everything the function asked in the same way."""
    return all(mark(find(place, roots(call))) == m for place, m in trial.reads.items())
