"""What the ranks of a group tell each other while models are placed and compiled: versions, and what became of each graph.

Words go through the group's store, never through a collective: a rank that is still compiling, has compiled already or has died is a key
that does not come, not an operation of the group that nobody answers. Nothing here runs while a compiled model runs,
but for its first call on a batch that is to be shared (`batches`).
"""

from __future__ import annotations

import datetime
import json
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .ops import sources
from .passes.aten.sharded import takes_part

Word = Mapping[str, Any]
NAMING = 5.0  # seconds in which a rank that saw an exchange fail answers the others


@dataclass
class Talk:
    """A group whose ranks talk, which may be destroyed meanwhile.

    `timeout`: of its collectives, in seconds. `said`: how often on each topic; `settled`: the stacks whose rows travel in place of them, by
    what the ranks have agreed upon (`alike.key_of`).
    """

    known: weakref.ref[Any]
    rank: int
    size: int
    timeout: float
    said: Counter[str] = field(default_factory=Counter)
    settled: dict[str, list[str]] = field(default_factory=dict)

    @property
    def store(self) -> Any:
        """None when the group is destroyed."""
        found = torch.distributed.distributed_c10d._world.pg_map.get(self.known())
        return None if found is None else found[1]

    def round(self, topic: str, word: Word, patience: float) -> list[Word | None]:
        """What each rank says on a topic, by rank; None: nothing within `patience` seconds. A topic that comes again is another round."""
        self.said[topic] += 1
        topic = f"moe_compile/{topic}/{self.said[topic]}"
        until = time.monotonic() + patience
        store = self.store
        try:
            store.set(f"{topic}/{self.rank}", json.dumps(word))
        except RuntimeError:
            return [word if r == self.rank else None for r in range(self.size)]
        return [word if r == self.rank else _hear(store, f"{topic}/{r}", until) for r in range(self.size)]


def _hear(store: Any, key: str, until: float) -> Word | None:
    try:
        store.wait([key], datetime.timedelta(seconds=max(until - time.monotonic(), 0.01)))
        return json.loads(store.get(key))  # type: ignore[no-any-return]
    except RuntimeError:  # torch.distributed's errors are of this kind: no answer, or no store any more
        return None


_talks: dict[str, Talk] = {}  # by the group's name; a group made anew under the name of a destroyed one takes its place


def join(group: Any) -> Talk | None:
    """Let the ranks of a process group talk; every rank calls this. None where there is nobody to talk to.

    Raises RuntimeError, on every rank, where their versions of this package or of torch differ, or where a rank does not answer.
    """
    import torch.distributed as dist

    if group.size() == 1 or dist.get_backend(group) == "fake":
        return None
    known = _talks.get(group.group_name)
    if known is not None and known.known() is group:
        return known
    talk = Talk(weakref.ref(group), group.rank(), group.size(), _timeout(group))
    _same_versions(talk)
    _talks[group.group_name] = talk
    return talk


def _timeout(group: Any) -> float:
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        found = getattr(options, "_timeout", None)
        if found is not None:
            return float(found.total_seconds())
    return 600.0


def _version() -> dict[str, str]:
    here = Path(__file__).parent
    found = [here, *(p for name in ("passes", "lowering") for p in (here / name, here.parent / name) if p.is_dir())]
    return {"moe_compile": __version__, "its files": sources.digest(*map(str, found))[:12], "torch": torch.__version__}


def _same_versions(talk: Talk) -> None:
    told = talk.round("version", _version(), talk.timeout)
    silent = [r for r, word in enumerate(told) if word is None]
    if silent:
        raise RuntimeError(f"{ranks(silent)} did not answer within {talk.timeout:.0f} s while experts were divided over {talk.size} ranks")
    keys = dict.fromkeys(k for word in told if word is not None for k in word)
    different = [k for k in keys if len({word.get(k) for word in told if word is not None}) > 1]
    if different:
        each = "; ".join(
            f"rank {r}: {', '.join(f'{k} {word.get(k)}' for k in different)}" for r, word in enumerate(told) if word is not None
        )
        raise RuntimeError(f"ranks that divide experts must run the same code, and they differ: {each}")


def ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


# ---- a graph -------------------------------------------------------------------------------------------------------------


def of_graph(gm: torch.fx.GraphModule) -> list[Talk]:
    """The groups whose collectives a graph holds, and whose ranks talk."""
    if not _talks:
        return []
    graphs = [m.graph for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]
    names = {str(a) for g in graphs for n in g.nodes if takes_part(n) for a in n.args}
    return [t for name, t in _talks.items() if name in names and t.store is not None]


def first_of_its_code() -> bool:
    """Whether the graph that is being compiled is the first of its code. Later ones come with a rank's own shapes and modes, when other
    ranks may have nothing to compile."""
    current = torch._guards.CompileContext.current_compile_id()
    return current is None or current.frame_compile_id in (None, 0)


def topic_of(gm: torch.fx.GraphModule) -> str:
    """Where a graph is from, in words that are the same on every machine."""
    stack = next((n.stack_trace for n in gm.graph.nodes if n.stack_trace), "")
    line = next((x.strip() for x in stack.splitlines() if x.strip().startswith("File ")), "File")
    return "graph " + Path(line.split('"')[1]).name + line.split('"')[2].replace("/", "|") if '"' in line else "graph"


def agree(talks: Iterable[Talk], topic: str, word: Word) -> tuple[list[Word], list[str]]:
    """What the other ranks made of a graph, and whom nothing was heard of: each with its half of the time that a collective may take."""
    others: list[Word] = []
    silent: list[str] = []
    for talk in talks:
        told = talk.round(topic, word, talk.timeout / 2)
        others += [{**w, "rank": r} for r, w in enumerate(told) if w is not None and r != talk.rank]
        missing = [r for r, w in enumerate(told) if w is None]
        if missing:
            silent.append(f"{ranks(missing)} compiled nothing of {topic} within {talk.timeout / 2:.0f} s")
    return others, silent


# ---- an exchange that fails ------------------------------------------------------------------------------------------------


def naming(compiled: Callable[..., Any], talks: Sequence[Talk]) -> Callable[..., Any]:
    """`compiled`, whose errors of torch.distributed say which ranks do not answer any more."""
    import torch.distributed as dist

    def run(*args: Any) -> Any:
        try:
            return compiled(*args)
        except RuntimeError as e:
            if not isinstance(e, dist.DistError) and "gloo" not in str(e) and "NCCL" not in str(e):
                raise
            raise type(e)(f"{_missing(talks)}: {e}") from e

    return run


def _missing(talks: Sequence[Talk]) -> str:
    """Who does not answer, told by those who saw the failure."""
    told = []
    for t in talks:
        if t.store is None:
            told.append("the process group is destroyed")
            continue
        silent = [r for r, word in enumerate(t.round("failed", {}, NAMING)) if word is None]
        name = f"the group of {t.size} ranks that divides the experts"
        told.append(
            f"in {name}, {ranks(silent)} did not answer within {NAMING:.0f} s" if silent else f"in {name}, every rank saw the exchange fail"
        )
    return "; ".join(told)
