"""Readings: what an expert loop means, found by example, tried on routings it was not read from, and put into one call.

A loop such as ``for e in hit: ...`` cannot be traced, but its function can be run. `read` records one run on probes (`record`), asks the
passes for the meaning, writes the function that Dynamo may inline instead (`regenerate`), and compares the two on other routings
(`confirm`). Whatever fails on the way is a `Rejection`, and the user's function stays.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from ..ir import Experts, Rejection
from ..passes.prove.region import one_thread
from .bench import NoExperts
from .call import Call, Roles, roles_of
from .confirm import confirm, holds_for_repeats
from .fewer import LIMIT
from .neutral import neutral
from .places import FUNCTION, MODULE, Place, find, mark
from .readers import DRAWS, Block, Dispatch
from .regenerate import Regenerated

log = logging.getLogger("moe_compile")

Recover = Callable[[fx.GraphModule], Any]
_NEVER = {"hooks", "shared", "tensors"}  # refusals that rest on one module and on no question that its code asked
_ANYWAY = {*_NEVER, "effects", "random", "values", "rows", "draw"}  # those that fewer experts do not cause


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
    lasting = isinstance(outcome, Reading) or outcome.stage not in _NEVER
    return Trial(outcome, marks, not isinstance(outcome, NoExperts), lasting)


def _try(call: Call, roles: Roles | None, reads: set[Place], recover: Recover, draw: int = 0) -> Reading | Rejection:
    try:
        return _fewer(call, Block(call, reads, draw) if roles is None else Dispatch(call, roles, reads), recover)
    except NoExperts as r:
        return r
    except Rejection as r:
        if r.stage == "draw" and roles is None and draw < DRAWS - 1:
            return _try(call, roles, reads, recover, draw + 1)
        return Rejection(r.reason, None, "rows" if r.stage == "draw" else r.stage, r.source or call.source, code=r.code, part=r.part)
    except Exception as e:
        return Rejection(f"reading it failed: {type(e).__name__}: {e}", stage="read", source=call.source)


def _fewer(call: Call, reader: Dispatch | Block, recover: Recover) -> Reading:
    """Read few experts in place of many; all of them where that does not tell, up to a limit."""
    if reader.few():
        try:
            return _read(call, reader, recover)
        except Exception as e:
            if isinstance(e, NoExperts) or isinstance(e, Rejection) and e.stage in _ANYWAY:
                raise
            if reader.all > LIMIT:
                why = f"it has {reader.all} experts, too many to be read one by one, and with fewer of them it is another function: {e}"
                raise Rejection(why, stage="budget") from e
            log.debug("capture: %s with fewer experts: %s: %s", call.source, type(e).__name__, e)
        reader.lay(None)
    return _read(call, reader, recover)


def _read(call: Call, reader: Dispatch | Block, recover: Recover) -> Reading:
    gm = reader.record()
    with torch.set_grad_enabled(call.grad):  # the passes read functions as they are where no gradient is wanted
        found = recover(gm)
    if isinstance(found, Rejection):
        raise found
    found_experts = found.ir.experts.num_experts + found.ir.experts.num_identity
    if found_experts < reader.experts:
        raise Rejection(f"only {found_experts} of {reader.experts} experts were recovered", stage="read")
    reader.follow()
    written = Regenerated(call, gm, found.ir.experts, found.ir.boundary, reader.primes, reader.reshaped, reader.fewer)
    confirm(written, reader)
    ids = reader.ids if not holds_for_repeats(written, reader) else None
    return Reading(written.experts, written.by_op, tuple(call.tensors), tuple(written.params), {}, call.source, ids)


def roots(call: Call) -> dict[str, Any]:
    """What is at the roots of places in a call."""
    return {MODULE: call.module, FUNCTION: call.fn, **call.roots}


def matches(trial: Trial, call: Call) -> bool:
    """A trial holds for another call if that answers everything the function asked in the same way."""
    return all(mark(find(place, roots(call))) == m for place, m in trial.reads.items())
