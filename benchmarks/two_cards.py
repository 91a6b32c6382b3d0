"""Experts over 2, 4 or 8 cards of one host: every row of a table of targets, stage by stage, each with a limit of its own.

    python benchmarks/two_cards.py --cards 2 --out results.json            # all stages; those that results.json holds already are left out
    python benchmarks/two_cards.py --cards 4 --out results.json --stages travel training
    python benchmarks/two_cards.py --cards 2 --out /tmp/t.json --tiny      # gloo, CPU, tiny sizes: whether every stage runs at all
    python benchmarks/two_cards.py --out results.json --table              # the table of what was found

A stage is a group of processes of its own, one a card, that is ended when its limit or `--seconds` is up; what it had found until then is
kept. Where there are fewer cards than ranks all share one, which says whether what goes through peers' memory is right, and no time. With
`--beside n` n stages compile at a time, of which one at a time is timed. What a stage measures: `two_cards_stages.py`. Times are in µs of
replays of a CUDA graph where "graph" is said, else of calls: the least of five medians, the slower rank's. Under --tiny they mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FILE = threading.Lock()  # of the file with what was found
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
SHARED = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}  # of use where ranks share a card
# seconds that a stage may take; in the order of what is missed most
STAGES = {
    "one": 200,
    "few": 200,
    "decode_own": 300,
    "prefill_own": 300,
    "sums": 120,
    "travel": 120,
    "travel_few": 120,
    "chosen": 90,
    "decode_ways": 300,
    "prefill_ways": 300,
    "training": 420,
    "correct": 200,
    "block": 200,
    "theirs": 240,
    "block_grad": 200,
    "travel_deepseek": 120,
    "dead": 60,
    "block_deepseek": 240,
    "layers": 480,
    "big": 240,
    "example": 300,
    "training_alone": 420,
}
ALONE = {"training_alone"}  # begin to time when all others of a run have ended
# (stage, what, side, cards) -> µs, or x of another row's time ("ratio"); set for H100s
TARGETS: dict[tuple[str, str, str, int], tuple[str, float]] = {
    ("travel", "dispatch + combine", "gather", 2): ("us", 140),
    ("travel", "dispatch + combine", "gather", 4): ("us", 400),
    ("travel_deepseek", "dispatch + combine", "gather", 4): ("us", 1300),
    ("few", "block, shared, T=64", "divided", 2): ("us", 310),
    ("few", "block, shared, T=64", "divided", 4): ("us", 190),
    ("one", "block, shared, T=1", "divided", 2): ("us", 42),
    ("layers", "decode", "divided", 2): ("ratio", 0.60),
    ("layers", "prefill", "divided", 2): ("ratio", 0.62),
    ("decode_own", "decode", "divided, half of the batch on each rank", 2): ("ratio", 0.60),
    ("prefill_own", "prefill", "divided, half of the batch on each rank", 2): ("ratio", 0.62),
    ("training", "FSDP2 x EP2, tokens/s", "transformers all_to_all, inductor", 4): ("ours over theirs", 1.25),
}


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--cards", type=int, default=2)
    p.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    p.add_argument("--seconds", type=float, default=1e9, help="for all stages together: what does not fit is left for the next run")
    p.add_argument(
        "--limit", type=float, default=1e9, help="seconds for a stage, at most; not for one that is timed when all others have ended"
    )
    p.add_argument("--beside", type=int, default=1, help="stages at a time: they compile side by side, and are timed one by one")
    p.add_argument("--turn", type=Path, help="a file that runs beside this one are given too: all of them are timed one by one")
    p.add_argument("--again", action="store_true", help="stages that are there already, too")
    p.add_argument("--tiny", action="store_true")
    p.add_argument("--table", action="store_true")
    args = p.parse_args()
    until = time.monotonic() + args.seconds
    if not args.table:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.beside) as several:
            turn, alone = args.turn or Path(folder) / "turn", Path(folder) / "alone"
            turn.touch()
            ended = {n: several.submit(stage, args, n, until, str(turn), str(alone)) for n in sorted(args.stages, key=ALONE.__contains__)}
            for name in set(ended) - ALONE - {"example"}:
                ended[name].result()
            alone.with_name("alone.but").touch()
            if "example" in ended:
                ended["example"].result()
            alone.touch()
    if args.table or len(args.stages) > 1:
        table(load(args.out)["rows"])


def stage(args: argparse.Namespace, name: str, until: float, turn: str, alone: str) -> None:
    """One stage, unless it is there already or no time is left."""
    with FILE:
        known = done(load(args.out), name, args.cards)
    if known and not args.again:
        return
    left = until - time.monotonic()
    if left < 20:
        print(f"{name}: no time left", flush=True)
        return
    limit = left if name in (*ALONE, "example") else min(left, args.limit)
    run(args, name, min(limit, STAGES[name]), {"TURN": turn, "ALONE": alone})


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"rows": [], "stages": {}}


def done(found: dict[str, Any], name: str, cards: int) -> bool:
    return bool(found["stages"].get(f"{name}, {cards}", {}).get("done"))


def run(args: argparse.Namespace, name: str, limit: float, files: dict[str, str]) -> None:
    """One stage in processes of its own; what it says, line by line, goes into the file. files: TURN, whose lock a timing holds, and ALONE,
    which is there when all other stages have ended."""
    port, lines = free_port(), args.out.with_suffix(f".{name}.jsonl")
    lines.unlink(missing_ok=True)
    started = time.monotonic()
    command = [sys.executable, str(HERE / "two_cards_stages.py"), name, str(lines), *(["--tiny"] if args.tiny else [])]
    env = {
        **os.environ,
        **NO_MULTICAST,
        **SHARED,
        "MOE_COMPILE_PEERS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(args.cards),
        **files,
    }
    if args.tiny:
        env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    each = [subprocess.Popen(command, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, start_new_session=True) for r in range(args.cards)]
    why = wait(each, started + limit)
    with FILE:
        kept = keep(args, name, lines, {"done": not why, "why": why, "seconds": round(time.monotonic() - started, 1)})
    print(f"{name}, {args.cards} cards: {why or 'done'}, {time.monotonic() - started:.0f} s", flush=True)
    table(kept)


def keep(args: argparse.Namespace, name: str, lines: Path, became: dict[str, Any]) -> list[dict[str, Any]]:
    """What a stage has said into the file, in place of what was there of it."""
    found = load(args.out)
    found["rows"] = [r for r in found["rows"] if (r["stage"], r["cards"]) != (name, args.cards)]
    said = [json.loads(line) for line in lines.read_text().splitlines() if line.endswith("}")] if lines.exists() else []
    found |= {k: v for row in said for k, v in row.pop("machine", {}).items()}
    rows = [{"stage": name, "cards": args.cards, **row} for row in said if row]
    found["rows"] += rows
    found["stages"][f"{name}, {args.cards}"] = became
    args.out.write_text(json.dumps(found, indent=1))
    lines.unlink(missing_ok=True)
    return rows


def wait(each: list[subprocess.Popen[bytes]], until: float) -> str:
    """Why a stage did not end well; "" where it did. One rank that fails ends all."""
    try:
        while time.monotonic() < until:
            codes = [p.poll() for p in each]
            if any(codes):
                return f"a rank failed ({[c for c in codes if c]})"
            if all(c == 0 for c in codes):
                return ""
            time.sleep(0.2)
        return "its time was up"
    finally:
        for p in each:
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)
                p.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def table(rows: list[dict[str, Any]]) -> None:
    for r in rows:
        if "what" not in r:
            continue
        unit, goal = TARGETS.get((r["stage"], r["what"], r.get("side", ""), r["cards"]), ("", 0.0))
        target = f"   target {goal:g}{' µs' if unit == 'us' else ' x'}" if unit else ""
        found = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in r.items() if k in SHOWN)
        print(f"  {r['cards']} | {r['what']:34} | {r.get('side', ''):34} | {found}{target}", flush=True)


SHOWN = (
    "us",
    "ratio",
    "ours over theirs",
    "off",
    "how",
    "speed",
    "tokens_per_second",
    "ms",
    "peers",
    "gib",
    "grads",
    "losses",
    "failed",
    "fused",
    "same_bits",
    "seconds",
)

if __name__ == "__main__":
    main()
