"""What a trace shows: every pass, before and after, rules, the first predicate that failed; as text, as a page, on the command line."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import catalogue.combine
import catalogue.dispatch
import catalogue.expert_near_misses
import catalogue.loops
import catalogue.router_near_misses
import pytest
import torch
from catalogue.base import Case
from small import Block, H, T
from torch import Tensor

import moe_compile
from moe_compile.__main__ import main
from moe_compile.loops import capture
from moe_compile.lowering.target import Target
from moe_compile.passes import shown, terms
from moe_compile.passes import trace as recorder
from moe_compile.passes.aten.effects import Memory
from moe_compile.passes.pipeline import PASSES
from moe_compile.passes.recover.find import Finder
from moe_compile.passes.terms.text import line, pretty
from moe_compile.trace import Traced
from moe_compile.trace_text import difference, laws, refusals, stage_names


class Crossed(Block):
    """Verdict: rejected. The down projection is another expert's than the up projection."""

    def gathered(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        h = torch.einsum("th,tkih->tki", x, self.up[ids]).relu()
        return (torch.einsum("tki,tkhi->tkh", h, self.down[torch.gcd(ids, torch.full_like(ids, 3))]) * w[..., None]).sum(1)


class Sorted(Block):
    """Verdict: fused. Rows of equal experts stand together."""

    def gathered(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        order = ids.flatten().argsort()
        expert, token = ids.flatten()[order], order // ids.shape[1]
        h = torch.einsum("rh,rih->ri", x[token], self.up[expert]).relu()
        y = torch.einsum("ri,rhi->rh", h, self.down[expert]) * w.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, token, y)


class Loop(Block):
    """Verdict: fused. The loop is read by example."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return self.loop(x, ids, w)


class MixedLoop(Loop):
    """Verdict: rejected. Expert 1 has another activation."""

    def expert(self, x: Tensor, e: int) -> Tensor:
        h = x @ self.up[e].T
        return (torch.relu(h) if e == 1 else torch.nn.functional.silu(h)) @ self.down[e].T


def traced(module: torch.nn.Module, **options: object) -> Traced:
    with torch.no_grad():
        return moe_compile.trace(module, torch.randn(T, H), options=options)


def test_every_pass_is_shown_with_what_it_was_given_and_made():
    t = traced(Block())
    text = str(t)
    (unit,) = t.trace.units
    assert [s.name for s in unit.stages] == [p.name for p in PASSES] and t.report.blocks
    assert all(f"── {p.name}: {p.says}" in text for p in PASSES)
    find = next(s for s in unit.stages if s.name == "find")
    term = find.entries[-1].after
    assert "self.up[topk[t, " in term and "x[t, " in term and "Σ[" in term, term  # an element of the result, in the user's names
    assert "claim: experts, " in text and "claim: routing, " in text and "does not hold" not in text and "✗" not in text.split("── find")[0]
    rewrite = unit.stages[-1].entries[-1]
    assert "= softmax(" in rewrite.before and "= experts(" in rewrite.after and "= softmax(" not in rewrite.after
    assert text.rstrip().endswith(str(t.report).splitlines()[-1])


def test_rules_are_counted():
    t = traced(Sorted())
    find = next(s for s in t.trace.units[0].stages if s.name == "find")
    assert t.report.blocks and find.rules["over a sorted order"] == 1, find.rules
    assert re.search(r"rules fired: .*over a sorted order ×1", str(t))
    assert set(find.rules) <= set(laws())


def test_one_pass_in_full():
    t = traced(Block())
    text = t.text("shadow")
    assert "── shadow" in text and "── find" not in text and "more lines" not in text
    assert all(line in text for e in t.trace.units[0].stages[0].entries for line in e.after.splitlines())
    with pytest.raises(ValueError, match=r"^stage: there is no pass 'shadows'; the passes are record, shadow, find, "):
        t.text("shadows")


def test_the_first_failing_predicate():
    t = traced(Crossed())
    ((stage, reason, source),) = refusals(t.trace.units[0])
    (rejected,) = t.report.rejected
    assert (stage, reason, source) == ("find", rejected.reason, rejected.source) and "different ids" in reason
    text = str(t)
    assert f"✗ find: {reason}" in text.split("── shadow")[0]  # told first, then shown where it happened
    assert f"✗ first failing predicate: {reason}" in text.split("── find")[1]
    assert "self.up[topk[t, s], i, h2]" in text and "self.down[(gcd[t, s] % 4), h, i]" in text
    assert "not looked into: gcd: no rule for aten.gcd.default" in text  # what would have to be known
    assert "── assemble" not in text and "no block came this far" in t.text("assemble")


def test_a_block_that_is_refused_by_a_later_pass(monkeypatch):
    monkeypatch.setattr(Target, "reason", lambda target, ir: "no kernel for it")
    t = traced(Block())
    assert [r[:2] for r in refusals(t.trace.units[0])] == [("lower", "no kernel for it")]
    entry = next(s for s in t.trace.units[0].stages if s.name == "lower").entries[0]
    assert entry.refusal == "no kernel for it" and entry.before and not entry.after


def test_routing_that_stays_as_written_says_why():
    class Odd(Block):
        def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
            w, ids = self.router(x).softmax(-1).topk(2)
            return w.erfinv(), ids

    t = traced(Odd())
    assert t.report.blocks and "routing  as written: " in t.text("assemble")


def test_a_loop_read_by_example():
    t = traced(Loop())
    loop, graph = t.trace.units
    assert loop.title == "a loop, read by example" and [s.name for s in loop.stages] == ["record", "find", "prove"]
    assert "index_add" in loop.stages[0].entries[0].after and loop.stages[1].rules and not refusals(loop)
    assert "claim: experts, " in t.text("prove") and graph.title.startswith("graph 1")


def test_a_loop_that_is_left_as_written():
    t = traced(MixedLoop())
    loop = t.trace.units[0]
    ((stage, reason, _),) = refusals(loop)
    assert stage == "find" and "not the same function" in reason and reason in {r.reason for r in t.report.rejected}
    assert f"✗ find: {reason}" in str(t)


def test_a_model_without_experts_has_a_report_only():
    t = traced(torch.nn.Linear(H, H))
    assert not t.trace.units and "0 MoE blocks fused" in str(t) and "No graph reached the passes" in t.to_html()


# ---- nothing for those who do not look ------------------------------------------------------------------------------------

ENTRIES = [
    catalogue.combine,
    catalogue.dispatch,
    catalogue.expert_near_misses,
    catalogue.loops,
    catalogue.router_near_misses,
]


def entries() -> list[type[Case]]:
    """A few of each kind: fused, near misses, loops."""
    found = []
    for module in ENTRIES:
        own = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Case) and c.__module__ == module.__name__]
        found += [c for c in own if hasattr(c, "expect") and not c.__name__.startswith("_")][:2]
    return found


@pytest.mark.parametrize("case", entries(), ids=lambda c: c.__name__)
def test_a_trace_changes_no_verdict(case, monkeypatch):
    """The report is explain's, and the search had as many elements left as without a trace."""
    left: list[dict[int, int]] = []
    run = Finder.run

    def noted(self: Finder) -> object:
        out = run(self)
        left.append(self.left)
        return out

    monkeypatch.setattr(Finder, "run", noted)
    reports, budgets = [], []
    for look in (moe_compile.explain, moe_compile.trace):
        torch._dynamo.reset()
        torch.manual_seed(0)
        left.clear()
        monkeypatch.setattr(capture, "_trials", type(capture._trials)())
        monkeypatch.setattr("moe_compile.passes.rewrite.recall.load", lambda key: None)
        module = case()
        with torch.no_grad():
            out = look(module, *module.example_inputs())
        reports.append((out.report if isinstance(out, Traced) else out).to_dict() | {"seconds": {}})
        budgets.append(list(left))
    assert reports[0] == reports[1] and budgets[0] == budgets[1]


def test_nothing_is_written_down_for_those_who_do_not_look(monkeypatch):
    for name in ("graph", "element", "read", "match", "block", "plan"):
        monkeypatch.setattr(shown, name, lambda *_: pytest.fail("something was made for a trace"))
    for module in (Block(), Crossed(), Loop()):
        with torch.no_grad():
            moe_compile.explain(module, torch.randn(T, H))
    assert not recorder.on()
    graph = torch.fx.Graph()
    assert type(recorder.finder(graph, set(), Memory(graph))) is Finder


def test_a_trace_runs_the_passes_though_a_plan_is_kept():
    module = Block()
    for _ in range(2):
        torch._dynamo.reset()
        assert {s.name for s in traced(module).trace.units[0].stages} == {p.name for p in PASSES}


def test_it_ends_with_an_error():
    class Wrong(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :-1])

    with pytest.raises(Exception, match=r"shape|size"):
        traced(Wrong())
    assert not recorder.on()


# ---- text and page --------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Tags that are open, links, and what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base"), tag
        given = dict(attrs)
        assert not {k for k in given if k == "src" or k.startswith("on")}, given
        self.links += [str(given["href"])] if "href" in given else []
        self.ids |= {str(given["id"])} if "id" in given else set()
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.parametrize("module", [Block, Crossed, Loop, MixedLoop])
def test_the_page_is_self_contained(module):
    t = traced(module())
    page = t.to_html()
    reader = Reader()
    reader.feed(page)
    assert not reader.open and "url(" not in page and "@import" not in page
    assert reader.links and all(link.startswith("#") and link[1:] in reader.ids for link in reader.links)
    text = "".join(reader.words)  # what it says is what the trace holds, whatever signs are in it
    for u in t.trace.units:
        for s in u.stages:
            assert s.name in text and all(name in text and laws()[name] in text for name in s.rules)
            for e in s.entries:
                assert all(part in text for part in (e.title, e.before if e.before != e.after else "", e.after, e.refusal, *e.notes))
        assert all(f"✗ {stage}: {reason}" in text for stage, reason, _ in refusals(u))


def test_difference():
    assert difference("a\nb\nc\nd\n", "a\nB\nc\nd\n").splitlines() == ["  ⋮", " a", "-b", "+B", " c"]
    assert difference("a", "a") == ""


def test_bound_variables_are_numbered_from_the_top_of_what_is_printed():
    for _ in range(3):  # however many were made before
        u, v = terms.var(4, "m"), terms.var(5, "m")
        node = torch.fx.Graph().placeholder("w1")
        t = terms.reduce_("sum", u, terms.fn("exp", terms.reduce_("sum", v, terms.fn("exp", terms.atom(node, (u, v))))))
        assert pretty(t) == line(t) == "Σ[m<4](exp(Σ[m2<5](exp(w1[m, m2]))))"


def test_long_terms_take_several_lines():
    u = terms.var(40, "m")
    nodes = [torch.fx.Graph().placeholder(name) for name in ("weights", "tokens")]
    nodes[0].meta["moe_said"] = "self.experts.up"
    t = terms.reduce_("sum", u, terms.mul(*(terms.fn("exp", terms.atom(n, (terms.add(u, terms.const(-3)),))) for n in nodes)))
    wide, narrow = pretty(t), pretty(t, 40)
    assert "self.experts.up[(m - 3)]" in wide and "\n" not in wide
    assert len(narrow.splitlines()) > 3 and narrow.startswith("Σ[m<40]\n  (") and max(map(len, narrow.splitlines())) <= 40
    assert re.sub(r"\s", "", narrow) == re.sub(r"\s", "", wide)


# ---- the command line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_model(monkeypatch):
    monkeypatch.setattr("moe_compile.models.build", lambda name: (Crossed(), {"x": torch.randn(T, H)}))


def test_command(small_model, capsys):
    assert main(["trace", "--model", "small"]) == 0
    out = capsys.readouterr().out
    assert "── shadow" in out and "✗ find: expert weights are indexed by different ids" in out and "1 left as written" in out


def test_command_for_one_pass(small_model, capsys):
    assert main(["trace", "--model", "small", "--stage", "find", "--no-validate"]) == 0
    out = capsys.readouterr().out
    assert "── find" in out and "── shadow" not in out and "first failing predicate" in out


def test_command_writes_a_page(small_model, capsys, tmp_path):
    file = tmp_path / "trace.html"
    assert main(["trace", "--model", "small", "--html", str(file)]) == 0
    out = capsys.readouterr().out
    assert str(file) in out and "1 left as written" in out and "── shadow" not in out
    assert "different ids" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("given", "told"),
    [(["--stage", "finds"], ("--stage", "'finds'", "shadow, find")), (["--html", "nowhere/at/all.html"], ("--html", "nowhere/at"))],
)
def test_wrong_usage_is_told_before_anything_is_built(given, told, monkeypatch, capsys):
    monkeypatch.setattr("moe_compile.models.build", lambda name: pytest.fail("a model was built"))
    assert main(["trace", "--model", "small", *given]) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in told) and "Traceback" not in err


def test_names_of_passes_are_what_stage_takes():
    assert stage_names() == ["record", *(p.name for p in PASSES)] and len(set(stage_names())) == len(stage_names())


# ---- the document that follows one block ---------------------------------------------------------------------------------

DOCUMENT = Path(__file__).parents[1] / "docs" / "architecture.md"
SHOWN = re.compile(r"(<!-- trace: (\w+)\.(\w+) -->\n```text\n)(.*?)(\n```)", re.DOTALL)


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="graphs of other versions of torch differ in a few ops")  # type: ignore[operator]
def test_the_document_prints_what_a_trace_prints(tmp_path, monkeypatch):
    """docs/architecture.md follows its own code through the passes; DOCS_WRITE=1 writes what is printed there anew (`make docs`)."""
    text = DOCUMENT.read_text(encoding="utf-8")
    code = re.search(r"<!-- trace: the block -->\n```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    (tmp_path / "block.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    import block

    with torch.no_grad():
        t = moe_compile.trace(block.Block(), torch.randn(6, 16))
    found: list[str] = []

    def now(m: re.Match[str]) -> str:
        found.append(m[2])
        return m[1] + part(t, m[2], m[3]) + m[5]

    new = SHOWN.sub(now, text)
    assert {"shadow", "find", "assemble", "prove", "plan", "emit", "rewrite"} <= set(found)
    if "DOCS_WRITE" in os.environ:
        DOCUMENT.write_text(new, encoding="utf-8")
    assert DOCUMENT.read_text(encoding="utf-8") == new, "run `make docs` and read the diff of docs/architecture.md"


def part(t: Traced, stage: str, what: str) -> str:
    """What a pass says of the block, or of the whole graph; `attempts`: of each place where experts were looked for."""
    if stage == "passes":
        return "\n".join(f"{p.name:<10}{p.says}" for p in PASSES)
    s = next(s for s in t.trace.units[0].stages if s.name == stage)
    e = s.entries[-1]
    if what == "attempts":
        return "\n".join(f"{e.title}: {e.refusal or 'experts'}" for e in s.entries)
    if what == "rules":
        return "\n".join(f"{name} ×{n}:  {laws()[name]}" for name, n in sorted(s.rules.items(), key=lambda x: (-x[1], x[0])))
    return {"after": e.after, "notes": "\n".join(e.notes), "changes": difference(e.before, e.after)}[what]
