"""Writes through another view, such as x[:, 0] = 0, that a block does not notice.

Those to its tokens that are over before anything the result is made of reads them, or come after the result; those to its result that
come after it and go through it, so that they go to what takes its place.
"""

from __future__ import annotations

import torch.fx as fx

from ..aten.shadow import aliased_arg, mutated_args
from .match import ExpertsMatch


def harmless(stale: set[fx.Node], m: ExpertsMatch) -> bool:
    """Whether every one of these nodes is the block's tokens or its result, and is written when that does not matter."""
    if not stale:
        return True
    graph = _Storage(m.out.graph)
    for n in stale:
        if n is m.out:
            fine = graph.written_after(m.out)
        else:
            fine = graph.root[n] is graph.root[m.tokens] is not graph.root[m.out] and graph.settled(m.tokens, m.out)
        if not fine:
            return False
    return True


def touched(stale: set[fx.Node], m: ExpertsMatch) -> bool:
    """Whether tokens or result are written through another view at all."""
    root = _Storage(m.out.graph).root if stale else {}
    return any(root[n] in (root[m.out], root[m.tokens]) for n in stale)


class _Storage:
    """Who shares memory with whom, and when it is written."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.root: dict[fx.Node, fx.Node] = {}
        self.writers: dict[fx.Node, list[fx.Node]] = {}
        for n in graph.nodes:
            base = aliased_arg(n)
            self.root[n] = n if base is None else self.root[base]
            for x in mutated_args(n):
                self.writers.setdefault(self.root[x], []).append(n)

    def settled(self, tokens: fx.Node, out: fx.Node) -> bool:
        """Whether no write lies between the first read of the tokens on the way to `out` and `out` itself."""
        from .region import data_inputs

        root = self.root[tokens]
        readers = [n for n in made_of(out) if self.root[n] is not root and any(self.root[x] is root for x in data_inputs(n))]
        first = min((self.order[n] for n in readers), default=self.order[out])
        return all(self.order[w] < first or self.order[w] > self.order[out] for w in self.writers.get(root, ()))

    def written_after(self, out: fx.Node) -> bool:
        """Whether all that writes to the memory of `out` later, or reads what was written there, knows it through `out`."""
        root = self.root[out]
        if root.op != "call_function":
            return False
        later = [w for w in self.writers.get(root, ()) if self.order[w] > self.order[out]]
        own = made_of(out)
        others = [n for n, r in self.root.items() if r is root and n is not out and not self._through(n, out)]
        return all(self._through(x, out) for w in later for x in mutated_args(w)) and all(u in own for n in others for u in n.users)

    def _through(self, n: fx.Node | None, out: fx.Node) -> bool:
        while n is not None and n is not out:
            n = aliased_arg(n)
        return n is out


def made_of(n: fx.Node) -> set[fx.Node]:
    """n, and all that it is computed from."""
    needed, stack = {n}, [n]
    while stack:
        new = set(stack.pop().all_input_nodes) - needed
        needed |= new
        stack.extend(new)
    return needed
