"""Simulates a stream program: which op runs on which stream, what happens before what, and which buffer may be used again when.

Works on FX graphs with npugraph_ex's scopes and tagged events, or with the eager helpers' nodes. Memory follows the caching allocator:
a tensor belongs to the stream its producer runs on and is free after its last use in program order; any later op of that stream may then
write over it. So every reader on another stream must happen before every later op of the owner's stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.fx as fx

from moe_compile.lowering.ascend.streams import name_of

MAIN = "main"
VIEWS = ("view", "reshape", "t", "transpose", "getitem", "permute", "expand", "slice", "unsqueeze", "squeeze", "detach", "alias", "view_as")


@dataclass
class Step:
    """One node as the device sees it."""

    node: fx.Node
    stream: str
    index: int
    before: set[int] = field(default_factory=set)  # steps known to be done when this one starts


@dataclass
class Program:
    steps: dict[fx.Node, Step]
    order: list[fx.Node]

    def happens_before(self, a: fx.Node, b: fx.Node) -> bool:
        return self.steps[a].index in self.steps[b].before


def simulate(graph: fx.Graph) -> Program:
    """Vector clocks as sets: what each step may rely on."""
    stack = [MAIN]
    done: dict[str, set[int]] = {MAIN: set()}  # by stream: everything that is ordered before its next step
    events: dict[str, set[int]] = {}
    steps: dict[fx.Node, Step] = {}
    order: list[fx.Node] = []
    for i, n in enumerate(graph.nodes):
        name = name_of(n) if n.op in ("call_function", "call_method") else n.op
        here = done.setdefault(stack[-1], set())
        if name in ("scope_enter", "enter_side"):
            stack.append(_label(n, stack[-1]))
        elif name in ("scope_exit", "exit_side"):
            stack.pop()
        elif name in ("tagged_event_record", "record_event"):
            events[n.args[0]] = set(here)
        elif name in ("tagged_event_wait", "wait_event"):
            if n.args[0] not in events:
                raise AssertionError(f"{n.args[0]} is waited for before it is recorded")
            here |= events[n.args[0]]
        elif n.op in ("placeholder", "get_attr"):
            steps[n] = Step(n, MAIN, i)  # there before the graph starts
        else:
            steps[n] = Step(n, stack[-1], i, set(here))
            order.append(n)
            here.add(i)
    assert stack == [MAIN], "a scope is left open"
    return Program(steps, order)


def _label(n: fx.Node, current: str) -> str:
    keys = n.args[0] if n.args and isinstance(n.args[0], (list, tuple)) else ()
    if "_user_stream_label" in keys:
        return str(n.args[1][list(keys).index("_user_stream_label")])
    return "moe_shared" if name_of(n) == "enter_side" else current  # a scope of core limits changes no stream


def owner(n: fx.Node) -> fx.Node:
    """The node that made the memory a node looks at."""
    while n.op in ("call_function", "call_method") and name_of(n) in VIEWS and isinstance(n.args[0], fx.Node):
        n = n.args[0]
    return n


def hazards(graph: fx.Graph) -> list[str]:
    """Everything that could go wrong, as text; empty for a sound program."""
    p = simulate(graph)
    found = [
        f"{n.name} on {p.steps[n].stream} reads {a.name} of {p.steps[a].stream} without an event between"
        for n in p.order
        for a in n.all_input_nodes
        if a.op not in ("placeholder", "get_attr") and a in p.steps and not p.happens_before(a, n)
    ]
    readers: dict[fx.Node, list[fx.Node]] = {}
    for n in graph.nodes:
        for a in n.all_input_nodes:
            readers.setdefault(owner(a), []).append(n)
    for made, users in readers.items():
        if made in p.steps and made.op not in ("placeholder", "get_attr"):
            found += _early_reuse(p, made, users)
    return found


def _early_reuse(p: Program, made: fx.Node, users: list[fx.Node]) -> list[str]:
    stream, last = p.steps[made].stream, max((p.steps[u].index for u in users if u in p.steps), default=0)
    if any(u.op == "output" for u in users):
        return []
    later = [n for n in p.order if p.steps[n].stream == stream and p.steps[n].index > last and name_of(n) not in VIEWS]
    return [
        f"{later[0].name} may write over {made.name} while {u.name} on {p.steps[u].stream} reads it"
        for u in users
        if later and u in p.steps and p.steps[u].stream != stream and not p.happens_before(u, later[0])
    ]
