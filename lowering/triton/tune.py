"""The choice of tiles for a call: the user's own measurements, measured defaults shipped for a card, or a rule.

Choosing never measures and never waits, so it is safe inside a CUDA graph capture; `tuner` measures, when asked to.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .launch import plans

SHIPPED = Path(__file__).parent / "tuned"
PROCESSORS = 132  # of a card with the warp-specialised kernel
LONG = 4096  # of a depth, beside which one more epilogue is little


@dataclass(frozen=True)
class Tile:
    """A grouped GEMM's tile and launch: rows, columns (of each projection), depth, warps, pipeline stages, programs an SM (0: one a tile).

    `tma`: weights through the copy engine.
    `hopper`: the warp-specialised kernel where it fits (128 rows and `bn` columns twice, or 64 and four times), else the plain one
    (`experts.runnable`).
    `group`: row tiles that are walked together, rows fastest.
    `split`: parts of the down projection's depth, each a tile of its own in the warp-specialised kernel; elsewhere there is one.
    `together`: steps of depth that the warp-specialised kernel asks for at a time, 1 or 2, where the depth divides.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    per_sm: int = 0
    tma: bool = False
    hopper: bool = False
    group: int = 1
    split: int = 1
    together: int = 1


@dataclass(frozen=True)
class Vector:
    """Tiles of the few-token path: columns and depth of a program, warps."""

    bn: int
    bk: int
    warps: int


@dataclass(frozen=True)
class Choice:
    """How a call runs. `decode` None: through the grouped GEMM."""

    up: Tile
    down: Tile
    decode: tuple[Vector, Vector] | None


@dataclass(frozen=True)
class Problem:
    """What a choice depends on, besides the number of tokens and the card."""

    experts: int
    hidden: int
    intermediate: int
    k: int
    dtype: torch.dtype
    gated: bool

    @property
    def key(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"E{self.experts}-H{self.hidden}-I{self.intermediate}-k{self.k}-{name}{'' if self.gated else '-plain'}"


def choose(problem: Problem, tokens: int, device: torch.device) -> Choice:
    """By what was measured for this problem, bucket of tokens and card, else by the rule."""
    if device.type != "cuda":
        tile = Tile(16, 16, 16, 4, 1)
        return Choice(tile, tile, (Vector(16, 16, 4), Vector(16, 16, 4)) if tokens <= 2 else None)
    measured = _table(card(device)).get(problem.key)
    return measured[bucket(tokens, measured)] if measured else rule(problem, tokens)


def bucket(tokens: int, measured: Collection[int]) -> int:
    """The measured number of tokens nearest to this one, by ratio; of two as near the larger."""
    return min(measured, key=lambda t: (abs(math.log2(t / max(tokens, 1))), -t))


def rule(p: Problem, tokens: int) -> Choice:
    """By the rows an expert sees on average; what was best on an H100 for the shapes measured there."""
    rows = tokens * p.k / p.experts
    if p.dtype == torch.float32:
        tile = Tile(16 if rows <= 16 else 64, 64, 32, 4, 3)
        return Choice(tile, tile, _decode(p, tokens))
    if rows <= 1:  # 2 % faster than the next on an H200, for all four shapes measured there
        up = down = Tile(16, 64, 128, 4, 4)
    elif rows <= 10:
        up, down = Tile(16, 32, 256, 4, 3), Tile(16, 64, 128, 4, 4)
    elif rows <= 20:
        up = down = Tile(32, 64, 128, 4, 3, tma=True)
    elif rows <= 48:
        up = down = Tile(64, 64, 128, 8, 2, tma=True, hopper=True, group=8)
    elif rows <= 90:
        up = down = Tile(128, 64, 64, 8, 6, tma=True, hopper=True, group=8, together=2)
    else:
        up = Tile(128, 128, 64, 8, 4, tma=True, hopper=True, group=8)
        down = dataclasses.replace(up, split=_parts(p, tokens, up))
    return Choice(up, down, _decode(p, tokens))


def waves(p: Problem, tokens: int, tile: Tile) -> float:
    """How often the down projection's tiles of two blocks of columns fill a card's processors; every expert has half a tile of padding."""
    rows = tokens * p.k / p.experts / tile.bm
    return p.experts * (rows + 0.5) * p.hidden / (2 * tile.bn) / PROCESSORS


def _parts(p: Problem, tokens: int, tile: Tile) -> int:
    """Parts of the down projection's depth: two where tiles of half the depth, still long ones, waste a tenth less of the time.

    8 experts of 4096 x 14336, two for each of 1,024 tokens: 2.4 waves are paid as 3, 4.8 of half the length as 5. Measured there alone, 5 %
    of the call on an H100 and on an H200.
    """
    whole = waves(p, tokens, tile)
    saved = math.ceil(whole) - math.ceil(2 * whole) / 2
    return 2 if saved >= 0.1 * whole and p.intermediate >= 2 * LONG else 1


def _decode(p: Problem, tokens: int) -> tuple[Vector, Vector] | None:
    """A program's weights: 4 to 8 KB a projection, all of a row under way at once. A row a little longer than a load is cut, not one that
    fills more than half of the next longer load. Of the down projection a program has one column: the rows of all slots are as much."""
    if tokens > 4:
        return None
    scale = p.dtype.itemsize // 2
    up = Vector(1, 4096 // scale, 4) if 0.6 * 4096 < p.hidden * scale <= 4096 else Vector(2, 2048 // scale, 2)
    return up, Vector(1, 4096 // scale, 4)


# ---- what was measured -------------------------------------------------------------------------------------------


@functools.cache
def card(device: torch.device) -> str:
    """A card's name as a file name: nvidia_h100_80gb_hbm3."""
    return re.sub(r"\W+", "_", torch.cuda.get_device_name(device)).strip("_").lower()


def user_file(card_name: str) -> Path:
    """The user's measurements: in MOE_COMPILE_CACHE_DIR, else the cache folder of the system."""
    given = os.environ.get("MOE_COMPILE_CACHE_DIR")
    root = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_compile"
    return root / "tuned" / f"{card_name}.json"


def remember(card_name: str, problem: Problem, found: dict[int, Choice]) -> Path:
    """Add measurements to the user's file, atomically; later choices of this process see them."""
    path = user_file(card_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = read(path)
    known.setdefault(problem.key, {}).update(found)
    plain = {key: {str(t): dataclasses.asdict(c) for t, c in sorted(by.items())} for key, by in known.items()}
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    _table.cache_clear()
    plans.forget()
    return path


def read(path: Path) -> dict[str, dict[int, Choice]]:
    """Measurements of a file; a file that is missing or of another version holds none."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return {key: {int(t): _choice(c) for t, c in by.items()} for key, by in plain.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


@functools.cache
def _table(card_name: str) -> dict[str, dict[int, Choice]]:
    """Shipped measurements, overridden by the user's."""
    table = read(SHIPPED / f"{card_name}.json")
    for key, by in read(user_file(card_name)).items():
        table.setdefault(key, {}).update(by)
    return table


def _choice(plain: dict[str, Any]) -> Choice:
    decode = plain["decode"]
    pair = (Vector(**decode[0]), Vector(**decode[1])) if decode else None
    return Choice(Tile(**plain["up"]), Tile(**plain["down"]), pair)
