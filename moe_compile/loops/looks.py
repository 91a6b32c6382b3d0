"""Looks at code that cost nothing: may this be an expert loop, does it ask its tensors for what depends on data?"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
import types
from collections.abc import Container

import torch
from torch import fx

from .sealed_code import codes

# names in code that does more than compute
ASKS = {"nonzero", "where", "item", "tolist", "numpy", "any", "unique", "bincount", "numel"}  # what an expert loop asks its ids
_ROWS = {"numel", "nelement", "len", "shape", "size"}  # what tells a number of rows
_OF_ROWS = (".shape[0]", ".size(0)", ".size(dim=0)", ".size()[0]", ".numel()", ".nelement()")
_MASKS = {"bool", "eq", "ne", "gt", "ge", "lt", "le", "isin", "logical_and"}  # what gives a mask
_EFFECTS = {"print", "breakpoint", "exec", "setattr", "delattr", "logger", "logging", "warnings", "warn"}
_COLLECTIVES = {"dist", "distributed", "all_reduce", "all_gather", "all_to_all", "all_to_all_single", "reduce_scatter", "broadcast"}
_WRITES = {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL"}
_VIEWS = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "contiguous", "to", "long", "detach"}  # of ids that repeat none
_INTO = {"setitem", "iadd", "isub", "imul", "ifloordiv", "imod", "iand", "ior", "ixor"}
_UNUSUAL = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


@functools.cache
def is_candidate(code: types.CodeType) -> bool:
    """Whether code may be an expert loop: it has a loop, and does nothing that anyone outside could notice."""
    return has_loop(code) and not effect(code)


@functools.cache
def has_loop(code: types.CodeType) -> bool:
    return not code.co_flags & _UNUSUAL and any(i.opname == "FOR_ITER" for c in codes(code) for i in dis.get_instructions(c))


@functools.cache
def loops(code: types.CodeType) -> int:
    """How many loops there are in code."""
    return sum(i.opname == "FOR_ITER" for c in codes(code) for i in dis.get_instructions(c))


@functools.cache
def effect(code: types.CodeType) -> str:
    """What code itself does that someone outside could notice, or ""."""
    found = sorted({n for c in codes(code) for n in c.co_names} & _EFFECTS)
    who = "the loop" if _in_loop(code, line_of_effect(code)) else "the function of the loop"
    if found:
        return f"{who} calls {found[0]}, which someone outside can notice"
    instructions = [i for c in codes(code) for i in dis.get_instructions(c)]
    writes = [str(i.argval) for i in instructions if i.opname in _WRITES]
    outer = {i.argval for i in instructions if i.opname == "STORE_DEREF"} & set(code.co_freevars)
    return next((f"{who} sets {n}, which someone outside can notice" for n in [*writes, *sorted(outer)]), "")


def _in_loop(code: types.CodeType, line: int) -> bool:
    """Whether a line is one of a loop, as far as the source tells."""
    tree = _tree(code)
    loops = [n for n in ast.walk(tree) if isinstance(n, ast.For)] if tree is not None else []
    spans = [(n.lineno, n.end_lineno or n.lineno) for n in loops]
    return not spans or any(first <= line - code.co_firstlineno + 1 <= last for first, last in spans)


@functools.cache
def line_of_loop(code: types.CodeType) -> int:
    """The line of the first loop in code itself that asks for what depends on data, or of its first; where it has none, its own."""
    tree = _tree(code)
    if tree is None:
        lines = (i.positions.lineno for i in dis.get_instructions(code) if i.opname == "FOR_ITER" and i.positions is not None)
        return next((n for n in lines if n is not None), code.co_firstlineno)
    loops = sorted((n for n in ast.walk(tree) if isinstance(n, ast.For)), key=lambda n: n.lineno)
    asking = [n for n in loops if any(getattr(x, "attr", getattr(x, "id", "")) in ASKS for x in ast.walk(n))]
    return code.co_firstlineno + next((n.lineno for n in (*asking, *loops)), 1) - 1


@functools.cache
def branches_on_rows(code: types.CodeType) -> bool:
    """Whether code may branch on how many rows a tensor has, as in ``if rows.shape[0] == 0``, inside of a loop if it has one."""
    tree = _tree(code)
    if tree is None:
        return bool(_ROWS & set(code.co_names))
    loops: list[ast.AST] = [n for n in ast.walk(tree) if isinstance(n, ast.For)]
    inside = [n for loop in loops or [tree] for n in ast.walk(loop)]
    named = {t.id for n in inside if isinstance(n, ast.Assign) and _holds_rows(n.value) for t in n.targets if isinstance(t, ast.Name)}
    return any(_holds_rows(n.test, named) for n in inside if isinstance(n, (ast.If, ast.IfExp, ast.While, ast.Assert)))


def _holds_rows(of: ast.expr, named: Container[str] = ()) -> bool:
    """Whether an expression holds a number of rows: ``x.shape[0]``, ``x.size(0)``, ``x.numel()``, ``len(x)`` or a name of one."""
    parts = [n for n in ast.walk(of) if isinstance(n, (ast.Name, ast.Subscript, ast.Call))]
    if any(isinstance(n, ast.Name) and n.id in named for n in parts):
        return True
    return any(ast.unparse(n).endswith(_OF_ROWS) or isinstance(n, ast.Call) and ast.unparse(n.func) == "len" for n in parts)


def _tree(code: types.CodeType) -> ast.Module | None:
    """The source of code, parsed; None where it has none of its own, such as a lambda."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, SyntaxError):
        return None


def line_of_effect(code: types.CodeType) -> int:
    """The line of what `effect` tells of."""
    outer = set(code.co_freevars)
    for c in codes(code):
        for i in dis.get_instructions(c):
            writes = i.opname in _WRITES or i.opname == "STORE_DEREF" and i.argval in outer
            named = i.argval in _EFFECTS and not i.opname.startswith(("IMPORT", "STORE"))  # not where a name is bound
            if (writes or named) and i.positions is not None and i.positions.lineno is not None:
                return i.positions.lineno
    return code.co_firstlineno


@functools.cache
def asks(code: types.CodeType) -> bool:
    """Whether code asks its tensors for something that depends on data; `where(mask, a, b)` does not, `where(mask)` does."""
    found = {n for c in codes(code) for n in c.co_names} & ASKS
    if not found:
        return has_loop(code) and (compares(code) and branches_on_rows(code) or _reads_ends(code))
    if found != {"where"}:
        return True
    tree = _tree(code)
    if tree is None:
        return True
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call))
    return any(getattr(n.func, "attr", getattr(n.func, "id", "")) == "where" and len(n.args) + len(n.keywords) < 2 for n in calls)


def selects(code: types.CodeType) -> bool:
    """Whether code chooses experts itself."""
    return any({"topk", "argmax", "argsort", "multinomial"} & set(c.co_names) for c in codes(code))


@functools.cache
def compares(code: types.CodeType) -> bool:
    """Whether code compares and subscripts, as in ``x[ids == e]`` and ``x[chosen.bool()[:, e]]``."""
    found = {i.opname.replace("BINARY_OP", "BINARY_SUBSCR") for i in dis.get_instructions(code)}
    return "BINARY_SUBSCR" in found and ("COMPARE_OP" in found or bool(_MASKS & set(code.co_names)))


def _reads_ends(code: types.CodeType) -> bool:
    """Whether a loop makes a number of an element, ``int(ends[e])``, where something was counted: the rows of each expert lie together."""
    names = {n for c in codes(code) for n in c.co_names}
    tree = _tree(code) if "int" in names and names & {"histc", "cumsum", "sum", "searchsorted", "one_hot"} else None
    calls = (n for loop in ast.walk(tree) if isinstance(loop, ast.For) for n in ast.walk(loop) if isinstance(n, ast.Call)) if tree else ()
    return any(isinstance(n.func, ast.Name) and n.func.id == "int" and any(isinstance(a, ast.Subscript) for a in n.args) for n in calls)


def is_collective(code: types.CodeType) -> bool:
    """Whether code may exchange something between the processes that there are."""
    d = torch.distributed
    many = d.is_available() and d.is_initialized() and d.get_world_size() > 1
    return many and bool(set(code.co_names) & _COLLECTIVES)


def distinct(ids: fx.Node) -> bool:
    """Whether a row of ids repeats none: they come out of a top-k or a sort, and nothing is written into them on the way."""
    first = ids
    while (name := _called(first)) in _VIEWS or name == "getitem" and first.args[1] != 1:
        first = first.args[0]  # type: ignore[assignment]
    sources = {"argsort"}
    if _called(first) == "getitem":
        first, sources = first.args[0], {"topk", "sort"}  # type: ignore[assignment]
    if _called(first) not in sources:
        return False
    same = {first}
    for n in ids.graph.nodes:
        if n.args and isinstance(n.args[0], fx.Node) and n.args[0] in same:
            if _called(n).endswith("_") or _called(n) in _INTO or "out" in n.kwargs:
                return False
            same.add(n)
    return True


def _called(n: object) -> str:
    """The name of what a node of Dynamo's graph calls."""
    if not isinstance(n, fx.Node) or n.op not in ("call_function", "call_method"):
        return ""
    return n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
