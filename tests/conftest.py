"""Shared by all tests: one thread (two test processes share two cores), no leftovers of Dynamo, no hub."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import sys
import types
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import lean
import pytest
import sampled
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run on the CPU in tests/gpu
lean.time_no_guards()
lean.seed_without_stacks()
lean.fake_once()
lean.trace_without_modules()
lean.sleep_longer()

collect_ignore_glob = [] if "COMPAT" in os.environ else ["compat/*"]  # other versions of transformers: `make test-compat`
if (
    "ASCEND_APART" in os.environ
):  # these run against the real wheel (`make test-ascend`), which has no gradients: what needs them stays here
    parts = ("antiquant", "documents", "documents_catalogue", "dry_run", "exchange", "exchange_graphs", "formats", "int8", "law",
             "lowering", "quant", "recorder", "rules", "smooth", "static", "streams", "weights")  # fmt: skip
    collect_ignore_glob += [f"ascend/test_{part}.py" for part in parts]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one catalogue entry in eight and three zoo models of what is asked for")


def pytest_configure(config: pytest.Config) -> None:
    lean.log_warnings_only(config)


QUICK_MODELS = ("mixtral-default-", "gpt_oss-eager-", "deepseek_v3-batched_mm-")


def is_quick(item: pytest.Item) -> bool:
    """Whether `make quick` runs a test of the catalogue (one entry in eight, always the same) or of the zoo."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    if isinstance(params.get("name"), str) and item.path.name == "test_catalogue.py":
        return zlib.crc32(params["name"].encode()) % 8 == 3
    return item.path.name != "test_zoo.py" or item.name.split("[")[-1].startswith(QUICK_MODELS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.option.keyword or any("::" in a for a in config.args)  # what is asked for by its name runs
    if left := set() if asked else set(sampled.left_out(items)):
        config.hook.pytest_deselected(items=list(left))
        items[:] = [i for i in items if i not in left]
    if config.getoption("--quick"):
        config.hook.pytest_deselected(items=[i for i in items if not is_quick(i)])
        items[:] = [i for i in items if is_quick(i)]
    for item in items:
        if item.path.parent.name == "gpu":  # the interpreter is numpy, which warns of infinities that a kernel masks
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one catalogue entry share one compilation: one worker runs them. (`--dist loadgroup` does nothing with pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByEntry(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            if file.endswith(("test_sharded.py", "test_fsdp.py")):  # one start of processes for all of a file
                return file
            return test[test.index("[") :] if file.endswith("test_catalogue.py") and "[" in test else nodeid

    return ByEntry(config, log)


@pytest.fixture(autouse=True, scope="session")
def own_plans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plans of earlier runs are not replayed: the passes run. Kernels and Inductor's caches stay the user's, they are keyed by sources."""
    from moe_compile.passes.rewrite import recall

    folder, own = recall.folder, tmp_path_factory.mktemp("plans")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall, "folder", lambda: own if folder() is not None else None)
        yield


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Every test starts without compiled code and with one seed, whatever compilers the tests before it broke."""
    torch._dynamo.reset()
    native = sys.modules.get("moe_compile.lowering.cpu.native")
    if native is not None and native._state.failed:
        native._state = native._State()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@dataclass
class Outcome:
    """The shape of what `moe_compile.passes.pipeline.run` returns."""

    blocks: list[Any] = field(default_factory=list)
    rejected: list[Any] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Recovered:
    """One block of an `Outcome`."""

    ir: Any
    source: str = "model.py:1"
    validated: bool = True
    lowering: str = "generic"
    note: str = ""


@pytest.fixture
def fake_passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Put a function in the place of the passes, to test the frame around them on its own."""

    def install(run: Callable[..., Any]) -> None:
        import moe_compile.passes

        module = types.ModuleType("moe_compile.passes.pipeline")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(moe_compile.passes, "pipeline", module, raising=False)

    return install


def bundle(t: Mapping[str, Any]) -> tuple[Any, ...]:
    """The tensors of a call of routed experts by name, in the order of the op's schema, with the parameters in one bundle."""
    from moe_compile.ops import bundled

    x, ids, weights, parameters, rest = bundled([*t.values()])
    return x, ids, weights, parameters, *rest


def pytest_collection_finish(session: pytest.Session) -> None:
    lean.find_builtins_once()
    lean.name_dtypes_once()
    lean.collect_seldom()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """What there is to collect is collected while xdist waits for it: a worker that takes 5 s afterwards gets a SIGINT from execnet."""
    gc.collect()
    gc.freeze()


def have_compiler() -> bool:
    """Whether kernels can be built here. Where they can, one that does not build fails its tests instead of leaving them out."""
    from moe_compile.lowering.cpu import build

    try:
        return bool(build._compiler())
    except Exception:
        return False


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A store of packed Ascend weights for this test alone: what other tests leave is collected at any time, and the shared count falls."""
    from moe_compile.lowering.ascend import modes, rearrange
    from moe_compile.lowering.ascend.store import Store

    own = Store()
    monkeypatch.setattr(modes, "STORE", own)
    monkeypatch.setattr(rearrange, "STORE", own)
    return own
