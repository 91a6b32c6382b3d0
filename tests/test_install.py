"""A wheel made of the sdist, in a clean environment: found by its name, with all that it needs. And the documentation site."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

import moe_compile

ROOT = Path(__file__).parents[1]
PROGRAM = """
import importlib.metadata, pathlib, torch, moe_compile
assert pathlib.Path(moe_compile.__file__).is_relative_to(pathlib.Path({venv!r}).resolve()), moe_compile.__file__
assert importlib.metadata.version("moe-compile") == moe_compile.__version__
assert "moe_fused" in torch._dynamo.list_backends()
import torch.nn.functional as F
up, down, gate = torch.randn(3, 8, 4), torch.randn(3, 4, 8), torch.randn(3, 4)
def block(x):
    w, ids = F.linear(x, gate).softmax(-1).topk(2, -1)
    h = F.silu(torch.einsum("th,tkih->tki", x, up[ids]))
    return (torch.einsum("tki,tkhi->tkh", h, down[ids]) * w[..., None]).sum(1)
x = torch.randn(5, 4)
torch.testing.assert_close(torch.compile(block, backend="moe_fused", options={{"inner": "eager", "strict": True}})(x), block(x))
print(len(moe_compile.last_report().blocks), "fused")
"""


def _run(*args: object, cwd: Path) -> str:
    done = subprocess.run([str(a) for a in args], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_sdist_wheel_and_a_clean_environment(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    tree = tmp_path / "tree"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("no checkout")
    for name in filter(None, files.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("benchmarks/", "tests/", "examples/")):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    build = "import setuptools.build_meta as b, sys; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    _run(sys.executable, "-c", build, "build_sdist", tmp_path, cwd=tree)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    _run(sys.executable, "-c", build, "build_wheel", tmp_path, cwd=next((tmp_path / "unpacked").iterdir()))
    venv = tmp_path / "venv"
    _run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python, wheel = venv / "bin" / "python", next(tmp_path.glob("*.whl"))
    _run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # torch comes from here: what is tested is this package
    site = next((venv / "lib").glob("python*/site-packages"))
    borrowed = [p for p in dict.fromkeys([sysconfig.get_paths()["purelib"], *sys.path]) if p.endswith("site-packages")]
    (site / "zz_torch.pth").write_text("\n".join(borrowed))
    assert _run(python, "-P", "-c", PROGRAM.format(venv=str(venv)), cwd=tmp_path).strip().endswith("1 fused")


def test_the_documentation_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    _run(sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path, cwd=ROOT)  # with -q it would count no warnings
    assert (tmp_path / "declined" / "index.html").is_file()
    page = (tmp_path / "performance" / "index.html").read_text(encoding="utf-8")
    for link in re.findall(r'(?:href|src)="([^":]+[.](?:json|png))"', page):
        assert (tmp_path / "performance" / link).is_file(), link
    assert "cpu.png" in page


def test_every_public_name_has_a_section() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^### `(\w+)", text, re.M)) == sorted(moe_compile.__all__)


def test_every_page_is_in_the_site() -> None:
    listed = set(re.findall(r"(\w+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert listed == {p.name for p in (ROOT / "docs").glob("*.md")}


def test_the_citation_has_the_version() -> None:
    assert f"version: {moe_compile.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
