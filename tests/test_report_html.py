"""The page of a report: self-contained, with drawings, lines of code and reasons; looked at in a browser where there is one."""

from __future__ import annotations

import html.parser
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from test_declined import Hit, SoftmaxInside, T, told

from moe_compile.__main__ import main
from moe_compile.report import Report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def report() -> Report:
    torch._dynamo.reset()
    both = told(Hit())
    torch._dynamo.reset()
    both.add(told(SoftmaxInside()))
    return both


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[Any] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href") and not str(v).startswith("#")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(report: Report) -> None:
    page, tags = report.to_html(), _Tags()
    tags.feed(page)
    assert not tags.open and not tags.loads and "script" not in tags.seen
    assert tags.seen.count("figure") == 2 and "w = softmax(l)[top2]" in page
    drawn = ("router", "selection", "dispatch", "3 experts", "combine")
    for words in (*drawn, "a softmax over features stands inside the expert", "F.softmax(g, -1)", "[inside]"):
        assert words in page, words
    assert report._repr_html_() and "<html" not in report._repr_html_()


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_a_browser_shows_it(report: Report, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(report.to_html(), encoding="utf-8")
    shot, cmd = tmp_path / "shot.png", [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,1200"]
    subprocess.run([*cmd, f"--screenshot={shot}", f"file://{tmp_path}/report.html"], check=True, capture_output=True, timeout=120)
    image = pytest.importorskip("PIL.Image").open(shot).convert("RGB")
    colours = {c for _, c in image.getcolors(1 << 24)}
    assert (26, 127, 75) in colours and len(colours) > 20  # the frame of what is fused


def test_an_artifact_for_tlparse(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Any] = []
    monkeypatch.setattr("torch._logging.trace_structured", lambda kind, *_, **kw: left.append((kind, kw)))
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Hit(), backend="moe_fused", options={"inner": "eager"})(torch.randn(T, 8))
    found = [kw for kind, kw in left if kind == "artifact" and kw["metadata_fn"]()["name"] == "moe_compile_report"]
    assert len(found) == 1 and len(json.loads(found[0]["payload_fn"]())["blocks"]) == 1


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert main(["explain", "--model", "mixtral", "--html", str(tmp_path / "r.html")]) == 0
    assert "<svg" in (tmp_path / "r.html").read_text(encoding="utf-8") and "MoE blocks fused" in capsys.readouterr().out
    assert main(["explain", "--model", "mixtral", "--html", str(tmp_path / "no" / "r.html")]) == 2
