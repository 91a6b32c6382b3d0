"""Processor seconds of the passes on every zoo model at its real widths: nothing is computed, all tensors are on the meta device.

A model is its default configuration (or that of a well-known checkpoint: `widths.WIDTHS`) with few layers, compiled with one MoE layer
and with three: the first block of a kind is what the one costs, an equal block half of the rest. `tokens`: a plain number, a power of
two, and the model's hidden size, which is what sizes that are told by value would be confused by. Each model is a process of its own,
forked after a small model has been compiled, so that modules loaded on first use count for nobody. Plans kept on disk are not replayed.
Rows taken before stay in the table until they are taken anew. Other work on the machine makes processor seconds longer: a row over a bar
is taken again, `TURNS` times in all, and the least counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from widths import WIDTHS

ROOT = Path(__file__).resolve().parents[1]
TURNS = 3  # in which a row that is over a bar is taken
LIMIT = 240  # processor seconds after which a model is given up: Dynamo alone takes 30 a layer of some with dynamic sizes
BARS = {"first": 2.0, "validate": 0.7, "equal": 0.15}
FIRST, MORE = 1, 3  # MoE layers compiled
KEPT = ("n_group", "topk_group", "shared_expert_intermediate_size")  # sizes whose default makes no model
EVERY_LAYER = {  # what makes every layer one with experts
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "expert_layer_offset", "pad_token_id"), 0),
    **dict.fromkeys(("decoder_sparse_step", "expert_layer_period", "interleave_moe_layer_step", "moe_layer_freq"), 1),
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers"), 0),
    "mlp_only_layers": [],
}
HIDDEN = 0  # tokens: as many as the hidden size
CASES = (  # (tokens, dynamic sizes?, transformers' implementation of the experts), most telling first
    (HIDDEN, False, ""),
    (HIDDEN, True, ""),
    (HIDDEN, False, "eager"),
    (1000, False, ""),
    (1000, True, ""),
    (1024, False, ""),
)
HEAD = f"{'model':<26}{'tokens':>7}  {'sizes':<8}{'loop':<5}{'blocks':>7}{'left':>5}{'first':>8}{'validate':>9}{'equal':>7}  over the bar"


def zoo() -> Any:
    sys.path.insert(0, str(ROOT / "tests"))
    import zoo

    return zoo


def real_config(entry: Any, layers: int, sized: bool = True) -> Any:
    """The default configuration of an architecture with `layers` layers, all of them MoE; what is no size is the zoo's, and what has no
    default where there is no model without (`sized` is false)."""
    z = zoo()
    cls = getattr(z._module(entry.package, "configuration"), entry.config)
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    known = {*defaults, *cls.attribute_map}
    given = entry.kwargs
    values = {k: v for k, v in given.items() if isinstance(v, (str, bool)) or k in KEPT}
    unset = {k: v for k, v in {**z.COMMON, **given}.items() if defaults.get(cls.attribute_map.get(k, k), "") is None}
    values |= {k: v for k, v in unset.items() if not sized or k in given or k == "num_experts_per_tok"}
    blocks = given.get("layers_block_type", ())
    if len(set(blocks)) > 1:  # layers of attention alone stand between those with experts
        values["layers_block_type"] = blocks[:2] * layers
    else:
        values |= dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers"), layers)
    values |= {k: v[-1:] * layers for k, v in given.items() if isinstance(v, list) and len(v) == 2 and k != "layers_block_type"}
    widths = WIDTHS.get(entry.name, {})
    return cls(**{k: v for k, v in {**EVERY_LAYER, **values, **widths}.items() if k in {*known, *given, *widths}})


def build(entry: Any, layers: int, experts: str) -> tuple[Any, int]:
    """The model on the meta device in bf16, and its hidden size. `experts`: which of transformers' implementations ("": its default)."""
    import torch

    for sized in (True, False):
        try:
            config = real_config(entry, layers, sized)
            if experts:
                config._experts_implementation = experts
            with torch.device("meta"):
                model = getattr(zoo()._module(entry.package, "modeling"), entry.model)(config).to(torch.bfloat16).eval()
            break
        except (TypeError, AttributeError):
            if not sized:
                raise
    hidden = next(v for n in ("hidden_size", "d_model") if (v := getattr(config, n, None)))
    return model, int(hidden)


def inputs_of(entry: Any, model: Any, hidden: int, tokens: int) -> dict[str, Any]:
    """No key or value is kept: `use_cache=False`, or a cache that forgets where the model takes nothing else."""
    import torch
    from transformers import DynamicCache

    class Forgets(DynamicCache):  # type: ignore[misc]
        def update(self, key: Any, value: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            return key, value

    takes = inspect.signature(model.forward).parameters
    if "past_key_values" in takes and "use_cache" not in takes:
        ids = {"input_ids": torch.zeros(1, tokens, device="meta", dtype=torch.int64)}
        return {**ids, "past_key_values": Forgets()}
    if entry.inputs == "embeds":
        return {"inputs_embeds": torch.zeros(1, tokens, hidden, device="meta", dtype=torch.bfloat16), "use_cache": False}
    ids = {"input_ids": torch.zeros(1, tokens, device="meta", dtype=torch.int64)}
    return ids if entry.inputs == "tokens_only" else {**ids, "use_cache": False}


@contextlib.contextmanager
def clocked(room: Any, name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Adds up the processor seconds that a function of a module takes."""
    real = getattr(room, name)

    def timed(*args: Any) -> Any:
        start = time.process_time()
        try:
            return real(*args)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - start

    setattr(room, name, timed)
    try:
        yield
    finally:
        setattr(room, name, real)


def spent(model: Any, inputs: dict[str, Any], dynamic: bool) -> dict[str, Any]:
    """Processor seconds of the passes in one compilation, loops read by example included, and what they found; nothing is known before."""
    import torch

    import moe_compile
    from moe_compile.loops import capture
    from moe_compile.passes import pipeline
    from moe_compile.passes.prove import engine

    torch._dynamo.reset()
    capture._trials.clear()
    engine.forget()
    seconds: dict[str, float] = {}
    start = time.process_time()
    before = moe_compile.last_report()
    with torch.no_grad(), clocked(pipeline, "run", seconds), clocked(capture, "read", seconds):
        try:
            torch.compile(model, backend="moe_fused", dynamic=dynamic, options={"inner": "eager", "target": "cpu"})(**inputs)
        except (NotImplementedError, RuntimeError):  # what was compiled asks for a value, which tensors on the meta device have none of
            if moe_compile.last_report() is before:
                raise
    report = moe_compile.last_report()
    return {
        "passes": sum(seconds.values()), "reading": seconds.get("read", 0.0), "total": time.process_time() - start,
        "blocks": len(report.blocks),
        "left": [r.reason for r in report.rejected if r.stage != "find"],
        "parts": {k: round(v, 3) for k, v in report.seconds.items()}, "validate": report.seconds.get("validate", 0.0),
    }  # fmt: skip


def row_of(entry: Any, tokens: int, dynamic: bool, experts: str) -> dict[str, Any]:
    models = {n: build(entry, n, experts) for n in (FIRST, MORE)}
    hidden = models[FIRST][1]
    tokens = tokens or hidden
    one, three = (spent(m, inputs_of(entry, m, hidden, tokens), dynamic) for m, hidden in models.values())
    more = max(len(three["left"]) + three["blocks"] - len(one["left"]) - one["blocks"], 1)
    row = {"model": entry.name, "tokens": tokens, "dynamic": dynamic, "hidden": hidden, "experts": experts}
    row |= {"first": one["passes"], "validate": one["validate"], "equal": (three["passes"] - one["passes"]) / more}
    return {**row, "blocks": three["blocks"], "left": len(three["left"]), "one": one, "three": three}


def told(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['model']:<26}{row['failed']}"
    over = ", ".join(k for k, bar in BARS.items() if row[k] > bar)
    sizes, form = "dynamic" if row["dynamic"] else "static", "loop" if row["experts"] else ""
    cells = f"{row['tokens']:>7}  {sizes:<8}{form:<5}{row['blocks']:>7}{row['left']:>5}"
    return f"{row['model']:<26}{cells}{row['first']:>8.2f}{row['validate']:>9.2f}{row['equal']:>7.2f}  {over}".rstrip()


def in_a_fork(entry: Any, *case: Any) -> dict[str, Any]:
    """`row_of(entry, *case)`, computed in a child process that ends after LIMIT seconds: nothing proved for one row helps another."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        used = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + LIMIT, used + LIMIT))
        with os.fdopen(write, "w") as out:
            try:
                row = row_of(entry, *case)
            except BaseException as e:
                last = traceback.extract_tb(e.__traceback__)[-1]
                row = failed(entry, case, f"{type(e).__name__}: {str(e)[:150]} ({last.name})")
            json.dump(row, out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else failed(entry, case, f"not done in {LIMIT} s")


def failed(entry: Any, case: Sequence[Any], why: str) -> dict[str, Any]:
    return {"model": entry.name, "case": case[0], "dynamic": case[1], "experts": case[2], "failed": why}


def case_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Which model and case a row is of."""
    tokens = row.get("tokens")
    return (
        row["model"],
        row.get("case", HIDDEN if tokens == row.get("hidden") else tokens),
        row.get("dynamic", False),
        row.get("experts", ""),
    )


def kept_rows(out: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The rows taken before, by what they are of."""
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    return {case_of(r): r for r in rows}


def least(entry: Any, case: Sequence[Any]) -> dict[str, Any]:
    """The row of a case, taken anew while it is over a bar: of each figure the least."""
    row = in_a_fork(entry, *case)
    for _ in range(TURNS - 1):
        if "failed" not in row and any(row[k] > bar for k, bar in BARS.items()):
            again = in_a_fork(entry, *case)
            row = {**again, **{k: min(row[k], again[k]) for k in BARS}} if "failed" not in again else row
    return row


def main(names: Sequence[str], out: Path, machine: dict[str, Any], first: bool = False) -> int:
    """Takes and prints the rows of the models (of all), and writes the table. `first`: of the most telling case alone."""
    import torch

    from moe_compile.passes import pipeline

    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True
    pipeline.time = SimpleNamespace(perf_counter=time.process_time)  # what it tells of each pass are processor seconds here
    entries = [e for e in zoo().ENTRIES if not names or e.name in names]
    warm_up()
    print(HEAD, flush=True)
    rows = kept_rows(out)
    for case, e in itertools.product(CASES[:1] if first else CASES, entries):
        row = {**least(e, case), "load": round(os.getloadavg()[0], 1)}
        rows[case_of(row)] = row
        print(told(row), flush=True)
        out.write_text(json.dumps({"machine": machine, "bars": BARS, "rows": list(rows.values())}, indent=1) + "\n")
    over = sum("failed" in r or any(r[k] > bar for k, bar in BARS.items()) for r in rows.values())
    print(f"{len(rows)} rows, {over} over the bar; written to {out}")
    return 0


def warm_up() -> None:
    """Loads what compiling loads on first use."""
    import torch

    from moe_compile.tiny import build as small

    model, inputs = small("qwen3_moe")
    with torch.no_grad():
        torch.compile(model, backend="moe_fused", options={"inner": "eager"})(**inputs)
