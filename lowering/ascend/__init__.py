"""The Ascend target: fused ops become calls of npu ops, for torchair's graph modes or the eager npu backend.

Checked without an NPU: laws (`law`), argument rules (`rules`), emulated numerics (`emulate`), the real
torch_npu wheel (tests/ascend/test_wheel.py).
"""

from __future__ import annotations

from .capability import can_lower, lowering_name

SCALED = True  # int8 weights with scales: npu_grouped_matmul takes both

__all__ = ["SCALED", "can_lower", "lowering_name"]
