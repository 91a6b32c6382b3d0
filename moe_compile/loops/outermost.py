"""Expert loops that are frames of their own, because what calls them runs in Python: a model around them that breaks in a loop, DDP, FSDP.

Dynamo inlines, and a loop is read where it is inlined: the first frame itself never is. In its place a frame is compiled that takes the
same arguments and calls the same method, ``def forward(self, x): return self.forward(x)``, whole or not at all: with a break in it
the compiled code would call itself.

Where the loop was declined and the frame cannot be compiled as it is either, it runs as written for the modules that answer as this one
did: Dynamo would give its code up for good, and with it later and earlier modules of the class whose loops can be read.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import logging
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.types import FrameAction, FrameExecStrategy
from torch._dynamo.utils import orig_code_map

from . import declined, flags, lines
from .looks import asks, is_candidate
from .places import of_class

log = logging.getLogger("moe_compile")


def in_versions(compile_frame: Callable[..., Any], signature: inspect.Signature, given: Mapping[str, Any], way: Callable[[], Any]) -> Any:
    """What `convert_frame._compile` makes of a frame: a whole where it may hold an expert loop, the `way` it goes otherwise, or as written.

    Where Dynamo gives it up, its code is compiled no more, and what it was compiled to for other modules goes on."""
    try:
        return whole(compile_frame, signature, given) or way()
    except Unsupported as e:
        found = as_written(compile_frame, signature, given)
        lines.given_up(given["code"], e, for_good=found is None)
        if found is not None:
            return found
        if e.frame_exec_strategy is None:
            e.frame_exec_strategy = FrameExecStrategy(FrameAction.RUN_ONLY, FrameAction.DEFAULT)
        raise


def whole(compile_frame: Callable[..., Any], signature: inspect.Signature, given: Mapping[str, Any]) -> Any:
    """What `convert_frame._compile` makes of such a frame as a whole; None where it is to be compiled as it is."""
    other = in_place_of(given)
    if other is None:
        return None
    bound = inspect.BoundArguments(signature, OrderedDict(other))
    outer = functools.cache(lambda: flags.whole_blocks((given.get("locals") or {}).values()))
    for last in (False, True):
        try:
            with flags.on(outer, last) as tried:
                found = compile_frame(*bound.args, **bound.kwargs)
            return None if getattr(found, "guarded_code", found) is None else found  # skipped: what it calls need not be
        except Exception as e:
            log.info("capture: a frame cannot be compiled as a whole: %s", e)
            if not flags.from_data_dependence(e) or not outer() - tried.for_good():
                break
    return None


def in_place_of(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Other arguments of `convert_frame._compile` for a frame that may hold an expert loop; None where it is to be compiled as it is."""
    code, values = given["code"], given.get("locals") or {}
    module = values.get(code.co_varnames[0]) if code.co_argcount else None
    if not isinstance(module, nn.Module) or code.co_freevars or given.get("one_graph") or given.get("export") or given.get("package"):
        return None
    forward = of_class(type(module), "forward")
    if getattr(forward, "__code__", None) is not code or "forward" in vars(module):
        return None
    if not (is_candidate(code) and asks(code) or code in flags.whole_blocks([module])):
        return None
    return {**given, "code": _frame(code, calls=True), "one_graph": True}


def as_written(compile_frame: Callable[..., Any], signature: inspect.Signature, given: Mapping[str, Any]) -> Any:
    """A version of such a frame that runs what the user wrote, for modules that answer what the declined reading asked as this one does.

    None where no reading was declined in it, or it has versions enough."""
    other = in_place_of(given) if declined.keeps_apart() else None
    if other is None:
        return None
    other["code"] = _frame(given["code"], calls=False)
    bound = inspect.BoundArguments(signature, OrderedDict(other))
    try:
        found = compile_frame(*bound.args, **bound.kwargs)
        guarded, code = found.guarded_code, given["code"]
        # of the frame that did nothing, only its guards are of use: they live as long as its code does
        own = code.replace(co_consts=(*code.co_consts, guarded.code))
        orig_code_map[own] = code
        return dataclasses.replace(found, guarded_code=dataclasses.replace(guarded, code=own))
    except Exception as e:
        log.info("capture: a frame is given up for all modules: %s", e)
        return None


@functools.cache
def _frame(code: types.CodeType, calls: bool) -> types.CodeType:
    """A function of the same arguments, in the same place, that calls the method ``forward`` of its first, or does nothing."""
    kinds = inspect.CO_VARARGS, inspect.CO_VARKEYWORDS
    names, n, k = code.co_varnames, code.co_argcount, code.co_kwonlyargcount
    rest = list(names[n + k :])
    star, double = (rest.pop(0) if code.co_flags & kind else None for kind in kinds)
    given, named = [ast.arg(x) for x in names[:n]], [ast.arg(x) for x in names[n : n + k]]
    only = code.co_posonlyargcount
    arguments = ast.arguments(
        given[:only],
        given[only:],
        None if star is None else ast.arg(star),
        named,
        [None] * k,
        None if double is None else ast.arg(double),
        [],
    )

    def load(x: str) -> ast.expr:
        return ast.Name(x, ast.Load())

    handed: list[ast.expr] = [load(x) for x in names[1:n]]
    handed += [ast.Starred(load(star), ast.Load())] if star else []
    by_name = [ast.keyword(x, load(x)) for x in names[n : n + k]] + ([ast.keyword(None, load(double))] if double else [])
    call = ast.Call(ast.Attribute(load(names[0]), "forward", ast.Load()), handed, by_name)
    body = ast.Return(call if calls else None)
    tree = ast.fix_missing_locations(ast.Module([ast.FunctionDef("forward", arguments, [body], [])], []))
    space: dict[str, Any] = {}
    exec(compile(tree, code.co_filename, "exec"), space)
    own: types.CodeType = space["forward"].__code__
    return own.replace(co_name=code.co_name, co_firstlineno=code.co_firstlineno)
