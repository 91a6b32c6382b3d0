"""Simulates a stream program: which op runs on which stream, what happens before what, and which buffer may be used again when.

Works on FX graphs with npugraph_ex's scopes and tagged events, or with the eager helpers' nodes. Memory follows the caching allocator:
a tensor belongs to the stream its producer runs on and is free after its last use in program order; any later op of that stream may then
write over it. So every reader on another stream must happen before every later op of the owner's stream.

Stages are checked apart: a program without the event between them is sound, but overlaps other things than it should.
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


def stages(graph: fx.Graph) -> list[str]:
    """What is wrong with the two stages of each scope of the side stream, as text; empty where

    ids < gate, up; gate, up beside dispatch and first GEMM; activation < down; down beside the second GEMM; all < combine.
    """
    p = simulate(graph)
    found: list[str] = []
    begin = 0
    for join in [n for n in p.order if name_of(n) in ("npu_moe_finalize_routing", "npu_moe_distribute_combine_v2")]:
        if name_of(join) == "npu_moe_distribute_combine_v2":  # the shared expert is added behind it
            join = next(n for n in p.order if p.steps[n].index > p.steps[join].index and name_of(n) == "add")
        layer = [n for n in p.order if begin < p.steps[n].index < p.steps[join].index]
        begin = p.steps[join].index
        up, down = _shared([n for n in layer if p.steps[n].stream != MAIN])
        ids, dispatch, first, activated, second = _routed(p, layer)
        for name, ok in {
            "gate and up begin before the ids are there": all(p.happens_before(ids, n) for n in up),
            "gate and up wait for the dispatch": not any(p.happens_before(dispatch, n) for n in up),
            "gate and up wait for the first GEMM": not any(p.happens_before(first, n) for n in up),
            "down begins before the activation is there": p.happens_before(activated, down),
            "down waits for the second GEMM": not p.happens_before(second, down),
            "the combine begins before down": p.happens_before(down, join),
        }.items():
            found += [] if ok else [f"{join.name}: {name}"]
    return found


def _shared(side: list[fx.Node]) -> tuple[list[fx.Node], fx.Node]:
    """The products that the one product of products is made of, and that one."""
    above: dict[fx.Node, set[fx.Node]] = {}
    for n in side:
        above[n] = set().union(*(above[a] | {a} for a in n.all_input_nodes if a in above))
    products = {n: [a for a in above[n] if name_of(a) in ("mm", "addmm")] for n in side if name_of(n) in ("mm", "addmm")}
    (down,) = [n for n, of in products.items() if of]
    return products[down], down


def _routed(p: Program, layer: list[fx.Node]) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node, fx.Node]:
    """ids, dispatch, first GEMM, activation, second GEMM of one layer."""
    main = [n for n in layer if p.steps[n].stream == MAIN]
    (dispatch,) = [n for n in main if name_of(n) in ("npu_moe_init_routing_v2", "npu_moe_distribute_dispatch_v2")]
    *_, first, second = [n for n in main if name_of(n) in ("npu_grouped_matmul", "npu_grouped_matmul_swiglu_quant_v2")]
    return dispatch.args[1], dispatch, first, second.args[0][0], second  # type: ignore[return-value,index]
