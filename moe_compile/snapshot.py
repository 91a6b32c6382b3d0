"""A way back: the graph as Dynamo gave it, should a pass fail half-way through a rewrite."""

from __future__ import annotations

from torch import fx


class Snapshot:
    """Remembers the graph of `gm`; `restore` puts it back if it was changed. Linear in the number of nodes."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.copy = fx.Graph(gm)
        self.copy._codegen = gm.graph._codegen
        self.print_ = _fingerprint(gm.graph)
        mapping: dict[fx.Node, fx.Node] = {}
        output = self.copy.graph_copy(gm.graph, mapping, return_output_node=True)
        if output is not None:
            value, old = output  # type: ignore[misc]
            mapping[old] = self.copy.output(value, old.type)
            mapping[old].meta = dict(old.meta)
        for old, new in mapping.items():
            new.name = old.name
            # Dynamo hangs the source of an input on its placeholder as an attribute, which a copy does not take along
            if hasattr(old, "_dynamo_source"):
                new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]

    def restore(self) -> bool:
        """Put the graph back. Returns whether there was anything to undo."""
        if _fingerprint(self.gm.graph) == self.print_:
            return False
        self.gm.graph = self.copy
        self.gm.recompile()
        return True


def _fingerprint(graph: fx.Graph) -> list[tuple[object, ...]]:
    """Enough to see any change: the nodes by identity, what they call, and what they call it with."""
    return [(n, n.op, n.target, n.args, n.kwargs) for n in graph.nodes]
