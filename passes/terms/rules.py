"""Rules as values: laws that one can list, compose, trace and test (each has a test in tests/laws)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from .facts import Facts
from .term import Term, show

Fire = Callable[[Term, Facts], "Term | None"]


@dataclass(frozen=True)
class Rule:
    """`fire(t, facts)`: the right side of the law where t is its left side, else None. `heads`: the ops that a left side may have.

    The subterms of t are in normal form. What comes back need not be: whoever applies the rule brings it there.
    """

    name: str
    law: str
    heads: tuple[str, ...]
    fire: Fire


def rule(law: str, *heads: str) -> Callable[[Fire], Rule]:
    """A rule from a function, named like it."""

    def made(f: Fire) -> Rule:
        return Rule(f.__name__.strip("_").replace("_", " "), law, heads, f)

    return made


class Rules:
    """Rules in the order in which they are tried. `a + b` tries those of a first."""

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self.all = tuple(rules)
        self.by_head: dict[str, tuple[Rule, ...]] = {}
        for r in self.all:
            for head in r.heads:
                self.by_head[head] = (*self.by_head.get(head, ()), r)

    @classmethod
    def of(cls, module: Mapping[str, object]) -> Rules:
        """The rules that a module defines, by its names, in the order in which they stand there."""
        return cls(r for r in module.values() if isinstance(r, Rule))

    def __add__(self, more: Rules) -> Rules:
        return Rules((*self.all, *more.all))

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def __str__(self) -> str:
        width = max((len(r.name) for r in self.all), default=0)
        return "\n".join(f"{r.name:<{width}}  {r.law}" for r in self.all)


@dataclass
class Trace:
    """What was rewritten: how often each rule fired and, for the first `keep` times, what it was given and what it made of it."""

    keep: int = 0
    fired: Counter[str] = field(default_factory=Counter)
    steps: list[tuple[str, str, str]] = field(default_factory=list)

    def note(self, rule: Rule, before: Term, after: Term) -> None:
        self.fired[rule.name] += 1
        if len(self.steps) < self.keep:
            self.steps.append((rule.name, show(before), show(after)))

    def __str__(self) -> str:
        return "\n".join(f"{n:>7}  {name}" for name, n in self.fired.most_common())
