"""What this processor can do at best: bytes a second from memory, multiply-adds a second in registers.

Products are timed in a loop of nothing but multiply-adds in registers: `torch.mm` is no ceiling, kernels in the field reach 1.9 times its
fp32 rate. Half precision is multiplied as floats where the processor has no instruction for it.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moe_compile.lowering.cpu import build as cpu_build

_LOOP = r"""
#include <cstdint>
#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int VL = 16, N = 24;
#elif defined(__AVX2__)
constexpr int VL = 8, N = 12;
#else
constexpr int VL = 4, N = 12;
#endif
#if defined(__AVX512F__)
#define REG "v"  // all 32 registers
#else
#define REG "x"
#endif
typedef float vf __attribute__((vector_size(VL * 4)));

template <bool BF16>
static float work(int64_t rounds, float seed) {
  vf acc[N], a = seed - vf{}, b = seed * 0.5f - vf{};
#pragma GCC unroll 24
  for (int i = 0; i < N; i++) acc[i] = a * float(i);
  for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 24
    for (int i = 0; i < N; i++) {
#if defined(__AVX512BF16__)
      if (BF16) acc[i] = (vf)_mm512_dpbf16_ps((__m512)acc[i], (__m512bh)a, (__m512bh)b);
      else
#endif
        acc[i] += a * b;
      asm volatile("" : "+" REG(a), "+" REG(b));
    }
#pragma GCC unroll 24
    for (int i = 0; i < N; i++) asm volatile("" : "+" REG(acc[i]));
  }
  vf sum{};
#pragma GCC unroll 24
  for (int i = 0; i < N; i++) sum += acc[i];
  return sum[0];
}

// FLOPs of `rounds` on each of `threads`.
extern "C" double flops(int64_t rounds, int threads, int bf16) {
  float sink = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sink)
  sink += bf16 ? work<true>(rounds, 1e-3f) : work<false>(rounds, 1e-3f);
#if defined(__AVX512BF16__)
  const int per = bf16 ? 4 : 2;
#else
  const int per = 2;
#endif
  return sink == 1234.5f ? 0 : double(rounds) * N * VL * per * threads;
}
"""


def least(f: Callable[[], object], repeats: int = 100) -> float:
    """Seconds of the fastest of some calls (one thread: of its own time): a limit is what the machine does when nothing disturbs it."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    f()
    seen = []
    for _ in range(repeats):
        start = clock()
        f()
        seen.append(clock() - start)
    return min(seen)


def measured(threads: int) -> dict[str, float]:
    """Bytes a second, and FLOPs a second by dtype."""
    torch.set_num_threads(threads)
    x = torch.ones(1 << 26)
    rates = {dtype: _flops(threads, dtype == "bfloat16") for dtype in ("bfloat16", "float32")}
    return {
        "bytes": x.numel() * 4 / least(x.sum),
        "torch.bfloat16": rates["bfloat16"],
        "torch.float16": rates["float32"],
        "torch.float32": rates["float32"],
    }


def _flops(threads: int, bf16: bool, rounds: int = 1 << 17) -> float:
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "loop.cpp", Path(folder) / "loop.so"
        source.write_text(_LOOP)
        command = [
            cpu_build._compiler(),
            "-O3",
            "-std=c++17",
            "-march=native",
            "-fopenmp",
            "-fPIC",
            "-shared",
            str(source),
            "-o",
            str(built),
        ]
        subprocess.run(command, check=True)
        function = ctypes.CDLL(str(built)).flops
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int64, ctypes.c_int, ctypes.c_int]
        return float(function(rounds, threads, bf16)) / least(lambda: function(rounds, threads, bf16))
