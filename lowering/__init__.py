"""What each target can run. Installed as `moe_compile.lowering`.

A target is a folder here whose package holds `TARGET`, a `Target` record; or an entry point in the group `moe_compile.targets` of any
installed package, which names such a record. Semantics and capability are two questions: a target reads the IR, never the graph.
"""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import torch

from .. import ops
from .target import Target, absent

GROUP = "moe_compile.targets"
log = logging.getLogger("moe_compile")


@functools.cache
def own() -> Mapping[str, Target]:
    """The targets of this package, by name, their kernels registered."""
    found = {}
    _never_traced()
    for module in pkgutil.iter_modules(__path__):
        target = getattr(importlib.import_module(f".{module.name}", __name__), "TARGET", None) if module.ispkg else None
        if target is not None:
            found[target.name] = _registered(target)
    return found


@functools.cache
def targets() -> Mapping[str, Target]:
    """All targets by name. Entry points are read once, when first asked for; one that cannot be had is left out, with a warning."""
    found = dict(own())
    for entry in entry_points(group=GROUP):
        try:
            target = _loaded(entry)
            if target.name in found:
                raise ValueError(f"there is a target {target.name!r} already")
            found[target.name] = _registered(target, _home(entry))
        except Exception as e:
            log.warning("the target of entry point %r (%s) is left out: %s: %s", entry.name, entry.value, type(e).__name__, e)
    return found


def target(name: str) -> Target:
    """The target of a name; one that refuses every block where there is none."""
    return targets().get(name) or absent(name)


def target_for(devices: set[str]) -> str:
    """The name of the target for tensors on these types of devices: an accelerator's if there is one, else the CPU's; a device that no
    target takes is a name of its own. Tensors without numbers ("meta") stand for such that would be where this machine's would."""
    if devices == {"meta"}:
        devices = {getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")}
    taken = [t.name for t in targets().values() if devices & {*t.devices} - {"cpu"}]
    if taken:
        return taken[0]
    return "cpu" if "cpu" in devices or not devices else min(devices)


def _loaded(entry: EntryPoint) -> Target:
    target = entry.load()
    if not isinstance(target, Target):
        raise TypeError(f"it is a {type(target).__name__}, not a moe_compile.lowering.target.Target")
    return target


def _home(entry: EntryPoint) -> str:
    """The top package of an entry point's module, or the module itself where it stands alone."""
    top = importlib.import_module(entry.module.partition(".")[0])
    return str(top.__path__[0] if hasattr(top, "__path__") else top.__file__)


def _never_traced() -> None:
    """Kernels in Python are no code of the user's: in `loss.backward()` of a compiled training step Dynamo would compile them.

    Those of Ascend stay open: beside them are modules that hold a model's weights (`ascend.physical`), and they are emulated only."""
    from torch._dynamo import trace_rules

    own = (f"{__name__}.{folder}" for folder in ("cpu", "reference", "triton"))
    for module in (*own, ops.autograd.__name__, ops.anywhere.__name__):
        trace_rules.add(module)


def _registered(target: Target, *home: str) -> Target:
    """The target with its kernels behind the ops. Raises ValueError where it has a kernel for an op that there is not."""
    unknown = set(target.kernels) - set(ops.shapes.SHAPES)
    if unknown:
        raise ValueError(f"target {target.name!r} has kernels for unknown ops: {', '.join(sorted(unknown))}")
    for name, kernel in target.kernels.items():
        ops.library.impl(name, kernel, target.dispatch_key)
    if target.straight is not None:
        ops.straight_on_cuda(target.straight)
    return replace(target, homes=(*home, *__path__, str(Path(ops.__file__).parent)))
