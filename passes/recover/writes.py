"""Writes through another view, such as x[:, 0] = 0, that a block does not notice.

Those to its tokens that are over before anything the result is made of reads them, or come after the result; those to its result that
come after it and go through it, so that they go to what takes its place.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.fx as fx

from ..aten.effects import Memory, aliased_arg, mutated_args
from ..aten.node import reached
from .match import ExpertsMatch


def harmless(memory: Memory, nodes: Iterable[fx.Node], m: ExpertsMatch) -> bool:
    """Whether every one of these nodes that is stale is the block's tokens or its result, and is written when that does not matter."""
    root = memory.root
    for n in memory.stale.intersection(nodes):
        if n is m.out:
            fine = written_after(memory, m.out)
        else:
            fine = root[n] is root[m.tokens] is not root[m.out] and settled(memory, m.tokens, m.out)
        if not fine:
            return False
    return True


def first_write(memory: Memory, nodes: Iterable[fx.Node]) -> fx.Node | None:
    """The first write to one of these nodes that not all names of its memory know of."""
    roots = {memory.root[n] for n in memory.stale.intersection(nodes)}
    return min((w for r in roots for w in memory.writers.get(r, ())), key=memory.order.__getitem__, default=None)


def feeds_by_writes(memory: Memory, choice: fx.Node, selections: Iterable[fx.Node]) -> bool:
    """Whether what is made of one selection is written to what a later one chooses from, under another name of its memory."""
    order, root = memory.order, memory.root
    if not memory.stale:
        return False
    made = set(reached([choice], lambda n: n.users))
    for s in selections:
        read = {root[n] for n in memory.stale & made_of(s)} if order[s] > order[choice] else set()
        if any(w in made and order[w] < order[s] for r in read for w in memory.writers.get(r, ())):
            return True
    return False


def touched(memory: Memory, m: ExpertsMatch) -> bool:
    """Whether tokens or result are written through another view at all."""
    root = memory.root
    return any(root[n] in (root[m.out], root[m.tokens]) for n in memory.stale)


def settled(memory: Memory, tokens: fx.Node, out: fx.Node) -> bool:
    """Whether no write lies between the first read of the tokens on the way to `out` and `out` itself."""
    from .region import data_inputs

    root = memory.root[tokens]
    readers = [n for n in made_of(out) if memory.root[n] is not root and any(memory.root[x] is root for x in data_inputs(n))]
    first = min((memory.order[n] for n in readers), default=memory.order[out])
    return memory.written(tokens, first - 1, memory.order[out] + 1) is None


def reads(memory: Memory, n: fx.Node, outs: Iterable[fx.Node]) -> list[int]:
    """When the value of n is read on the way to some results: by its own name or one of its views, where it is written at all."""
    if not memory.writers.get(memory.root[n]):
        return []
    way = set().union(*map(made_of, outs))
    shown, found = [n], []
    for x in shown:
        for u in x.users:
            if u in way and aliased_arg(u) is not None and not mutated_args(u):
                shown.append(u)
            elif u in way:
                found.append(memory.order[u])
    return found


def written_after(memory: Memory, out: fx.Node) -> bool:
    """Whether all that writes to the memory of `out` later, or reads what was written there, knows it through `out`."""
    if memory.root[out].op != "call_function":
        return False
    later = [w for w in memory.writers.get(memory.root[out], ()) if memory.order[w] > memory.order[out]]
    own = made_of(out)
    others = [n for n in memory.shared(out) if n is not out and not _through(n, out)]
    return all(_through(x, out) for w in later for x in mutated_args(w)) and all(u in own for n in others for u in n.users)


def _through(n: fx.Node | None, out: fx.Node) -> bool:
    while n is not None and n is not out:
        n = aliased_arg(n)
    return n is out


def made_of(n: fx.Node) -> set[fx.Node]:
    """n, and all that it is computed from."""
    return set(reached([n], lambda x: x.all_input_nodes))
