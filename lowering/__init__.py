"""What each target can run. Installed as `moe_compile.lowering`.

Semantics and capability are two questions: `can_lower` reads the IR and nothing else. A target is a module with
`can_lower(ir) -> str | None` and `lowering_name(ir) -> str`, imported when it is first asked for; `SCALED = True` says that it is ready
for experts with scales (integer weights), `ROUTER_TOKENS = n` that its routing op takes the router's product in for up to n tokens.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from ..ir import MoeBlock

# target -> module (relative to this package); a target without its module installed is not lowered
TARGETS = {"cpu": ".cpu", "cuda": ".triton", "ascend": ".ascend"}


def can_lower(ir: MoeBlock, target: str) -> str | None:
    """None when `target` can run this block, else the reason, one sentence for the report."""
    module = _module(target)
    if module is None:
        return f"no lowering for target {target!r} is installed"
    if ir.experts.scaled and not getattr(module, "SCALED", False):
        kind = "scaled" if ir.experts.weight_dtype is None else str(ir.experts.weight_dtype).removeprefix("torch.")
        return f"{kind} expert weights: target {target!r} has no kernel for them"
    reason: str | None = module.can_lower(ir)
    return reason


def lowering_name(ir: MoeBlock, target: str = "cpu") -> str:
    """What runs the block on `target`, for the report. Raises ValueError where `can_lower` gives a reason."""
    reason = can_lower(ir, target)
    if reason is not None:
        raise ValueError(reason)
    module = _module(target)
    assert module is not None
    name: str = module.lowering_name(ir)
    return name


def prepare(ir: MoeBlock, target: str) -> None:
    """Let a target start getting ready for a block (build its kernels) while the rest of the graph still compiles; never waits."""
    module = _module(target)
    if module is not None and hasattr(module, "prepare"):
        module.prepare(ir)


def router_tokens(target: str) -> int:
    """Up to how many tokens a target wants the router's product inside the routing op."""
    return getattr(_module(target), "ROUTER_TOKENS", 0)


def _module(target: str) -> ModuleType | None:
    name = TARGETS.get(target)
    if name is None or importlib.util.find_spec(name, __name__) is None:
        return None
    return importlib.import_module(name, __name__)
