"""Expert loops that Dynamo is about to inline: read by example, and put into one call if that is proved.

The function of a loop (with the router outside of it or inside) is read once for each way in which it is called (`reading`). If that is
proved, Dynamo inlines the same function with one call of ``torch.ops.moe_compile.experts`` for the loop, and guards on what was read
(`guards`). Otherwise it inlines what the user wrote, and the reason is in `pending()`.
"""

from __future__ import annotations

import functools
import logging
import threading
import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..ir import Rejection
from ..passes.aten.sharded import is_sharded
from ..passes.recover.rows import NO_EXPERTS
from ..passes.terms.budget import TOO_MANY
from . import declined, flags
from .bench import Unrolls
from .call import Call, bind, roles_of
from .guards import Guards, Unguarded, or_unguarded
from .lines import span
from .looks import asks, distinct, effect, has_loop, is_collective, line_of_effect, selects
from .places import of_class
from .probe import own_part
from .reading import Reading, Trial, matches, read, roots
from .sealed_code import codes
from .variables import Arguments, attribute, function_of, refuse_modes, sources_of

log = logging.getLogger("moe_compile")
RESUMED = "torch_dynamo_resume_in_"  # Dynamo's name for the rest of a function
APART = "give the loop over the experts a function of its own, of tokens, ids and weights"

_lock = threading.RLock()
_trials: weakref.WeakKeyDictionary[types.FunctionType, list[tuple[Any, Trial]]] = weakref.WeakKeyDictionary()
_pending: list[tuple[Rejection | Reading, Call | None]] = []
_taken: list[tuple[Rejection | Reading, Call | None]] = []  # what was pending before
_spans: dict[str, tuple[int, int]] = {}  # file:line of a loop's function -> its first and last line


def met(code: types.CodeType, names: Mapping[str, Any], values: Sequence[Any]) -> None:
    """A frame of its own is compiled: a block whose loop does what someone outside can notice is not even tried. (The rest of a frame that
    broke is told by its beginning.)"""
    if code.co_name.startswith(RESUMED):
        return
    if has_loop(code) and asks(code) and effect(code) and flags.chooses(code, names, values, inside=False):
        source = f"{code.co_filename}:{line_of_effect(code)}"
        with _lock:
            _spans[source] = span(code)
            _pending.append((Rejection(effect(code), stage="effects", source=source), None))


def pending() -> list[Rejection | Reading]:
    """What came of the loops met since the last call: a `Reading` for each one captured, a `Rejection` for each one left.

    A loop may be met by several functions, such as a block's own and that of its experts: what was captured by one of them is not
    left, and what was left is told once, by the innermost.
    """
    with _lock:
        found, _pending[:] = list(_pending), []
        _taken[:] = found
    read = {id(c.module) for o, c in found if isinstance(o, Reading) and c is not None}
    inner = {id(c.module) for _, c in found if c is not None and c.module is not None and roles_of(c.tensors)}
    kept: list[Rejection | Reading] = []
    for outcome, call in found:
        if call is None or isinstance(outcome, Reading):
            kept.append(outcome)
            continue
        parts = [] if call.module is None or roles_of(call.tensors) else [id(m) for m in call.module.modules()]
        if id(call.module) not in read and not inner.intersection(parts):
            kept.append(outcome)
    return kept


def not_told() -> None:
    """What was `pending` last is so again: the graph that was to tell of it will not run, and its frame may do without one."""
    with _lock:
        _pending[:0] = [p for p in _taken if not any(p[0] is q for q, _ in _pending)]
        _taken.clear()


def holds(loop: str, source: str) -> bool:
    """Whether file:line `source` lies in the function of a loop that was met, which file:line `loop` is a line of."""
    (path, _, at), (other, _, line) = loop.rpartition(":"), source.rpartition(":")
    if path != other or not line.isdigit() or not at.isdigit():
        return False
    spans = [s for known, s in _spans.items() if known.rpartition(":")[0] == path and s[0] <= int(at) <= s[1]]
    return any(first <= int(line) <= last for first, last in spans)


def _note(outcome: Rejection | Reading, call: Call) -> None:
    with _lock:
        _spans[call.source] = span(call.fn.__code__)
        if not any(p is outcome for p, _ in _pending):  # layers share an outcome, and Dynamo may trace a call twice
            _pending.append((outcome, call))


def _recover(gm: fx.GraphModule) -> Any:
    """The passes' answer to a recorded graph: looked up late, because the passes are only needed when a loop was found."""
    from ..passes.pipeline import recover_recorded

    return recover_recorded(gm)


def instead(tx: Any, func: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, list[Any]] | None:
    """(function, arguments) to inline in place of this call, as Dynamo's variables; None to leave it alone."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return None  # inside torch.func.grad or vmap no probe can be run, and what was read elsewhere is told by nobody
    fn = function_of(func)
    if fn is None or not (has_loop(fn.__code__) or fn.__code__ in flags.blocks()) or is_collective(fn.__code__):
        return None
    bound, arguments = bind(fn, args, kwargs), Arguments()
    call = arguments.call(tx, fn, bound) if bound else None
    if call is not None and _has_more(call):
        flags.tried(fn.__code__)
        said = f"its function takes {len(call.tensors)} tensors ({', '.join(call.tensors)}), which are not tokens, ids and weights: {APART}"
        _leave(Rejection(said, stage="arguments", source=call.source), call)
    if call is None or not (roles_of(call.tensors) or _may_be_block(call)):
        return None
    flags.tried(fn.__code__)
    try:
        reading = _read(tx, func, call, arguments)
        return None if reading is None else _captured(tx, func, call, arguments, reading)
    except Rejection as r:
        _leave(Rejection(r.reason, None, r.stage, r.source or call.source, code=r.code), call)
    except Unguarded as e:
        _leave(Rejection(f"it reads {e}", stage="guards", source=call.source), call)
    return None


def _leave(r: Rejection, call: Call) -> None:
    log.info("capture: left as written: %s: %s", r.source, r.reason)
    _note(r, call)


def _read(tx: Any, func: Any, call: Call, arguments: Arguments) -> Reading | None:
    """The reading of a call; None if it is no expert loop. Raises `Rejection` if it is one that stays as written."""
    code = call.fn.__code__
    wrong = effect(code) or arguments.unread
    if wrong:
        if roles_of(call.tensors) and asks(code):
            if not effect(code):
                raise Rejection(wrong, stage="arguments")
            raise Rejection(wrong, stage="effects", source=f"{code.co_filename}:{line_of_effect(code)}")
        return None
    trial = trial_of(call)
    if not trial.about_experts:
        log.debug("capture: no expert loop: %s: %s", call.source, trial.outcome)
        if isinstance(trial.outcome, Unrolls):
            flags.spared(code)
        return None
    if isinstance(trial.outcome, Rejection):
        if _is_of_experts(trial.outcome, call):  # a block read around them would be left for it too
            for around in _frames(tx):
                flags.tried(around)
        declined.note(tx, roots(call), dict(sources_of(func, call.fn, arguments)), trial.reads, trial.outcome)
        _leave(trial.outcome, call)
        return None
    refuse_modes(tx)
    return trial.outcome


def _is_of_experts(r: Rejection, call: Call) -> bool:
    """Whether a function of tokens, ids and weights alone was left for what its experts compute, which nothing outside of it changes."""
    alone = len(call.tensors) == 3 and bool(roles_of(call.tensors))
    return alone and r.stage == "experts" and r.code != NO_EXPERTS and TOO_MANY not in r.reason


def _frames(tx: Any) -> Iterator[types.CodeType]:
    """The code that is being traced, and that of all who called it."""
    while tx is not None:
        yield tx.f_code
        tx = getattr(tx, "parent", None)


def _captured(tx: Any, func: Any, call: Call, arguments: Arguments, reading: Reading) -> tuple[Any, list[Any]]:
    """What Dynamo inlines for a call that was read, guarded. Raises `Unguarded`, and `Rejection` for ids that may repeat."""
    from torch._dynamo.variables import UserFunctionVariable

    if reading.distinct is not None and not distinct(arguments.leaves[reading.distinct].as_proxy().node):
        raise Rejection("a token that had an expert twice would get another result", stage="repeats")
    params = [attribute(tx, arguments.owner, p) for p in reading.params]
    for path, seen in zip(reading.params, params, strict=True):
        value = seen.realize().as_proxy().node.meta.get("example_value")
        if is_sharded(value):
            raise Rejection(f"{path} is a DTensor, no plain tensor: run the loop on `to_local()` of its parameters", stage="tensors")
        held = functools.reduce(getattr, path.split("."), call.module)
        if isinstance(held, Tensor) and is_sharded(held) and own_part(held).shape != value.shape:
            raise Rejection(f"{path} is a DTensor whose part here is read in another shape, {list(value.shape)}", stage="tensors")
    arguments.fix_widths()
    with or_unguarded():
        Guards(tx, roots(call), dict(sources_of(func, call.fn, arguments))).install(reading.reads)
    _note(reading, call)
    return UserFunctionVariable(reading.run), [*(arguments.leaves[n] for n in reading.arguments), *params]


def _may_be_block(call: Call) -> bool:
    """Whether a function may be a whole MoE block: its tokens are its only tensor, and its code asks for rows that depend on data."""
    specs = list(call.tensors.values())
    if call.module is None or len(specs) != 1 or not (asks(call.fn.__code__) or call.fn.__code__ in flags.blocks()):
        return False
    return specs[0].dtype.is_floating_point and 2 <= len(specs[0].shape) <= 3 and isinstance(specs[0].shape[-1], int)


def _has_more(call: Call) -> bool:
    """Whether a function chooses experts and loops over them, and has other tensors than its tokens: no probe knows what they mean."""
    code = call.fn.__code__
    if call.module is None or len(call.tensors) < 2 or roles_of(call.tensors) or not (has_loop(code) and asks(code)):
        return False
    called = {n for c in codes(code) for n in c.co_names}
    near = [f for n in called for f in (call.fn.__globals__.get(n), of_class(type(call.module), n)) if isinstance(f, types.FunctionType)]
    return any(selects(c) for c in (code, *(f.__code__ for f in near)))


def trial_of(call: Call) -> Trial:
    """The reading of a call's function, made once per function and configuration."""
    mark = call.mark(), call.fn.__code__ in flags.blocks()
    with _lock:
        known = _trials.setdefault(call.fn, [])
        for m, trial in known:
            if m == mark and matches(trial, call):
                return trial
        trial = read(call, _recover)
        if trial.lasting:
            known.append((mark, trial))
        return trial
