"""Tests of which CI runs a part: grids of parameters, each of which pays for a compilation or a build of its own.

One in n, always the same ones, on the diagonal of the grid: where n is the size of the inner parameters, each of the outer ones is met
once, the inner ones in turn. `make zoo` (ZOO_ALL) runs all. What finds another fault than its neighbours does not belong here.

    python tests/sampled.py        # the files, for the Makefile
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ONE_IN: dict[tuple[str, str], int] = {
    ("ascend/test_ids.py", "test_a_write_after_the_experts_changes_nothing"): 3,  # in the next one each write is met
    ("ascend/test_ids.py", "test_ids_written_in_place"): 2,
    ("ascend/test_ids.py", "test_ids_written_in_place_in_training"): 3,
    ("ascend/test_lowering.py", "test_models_give_eagers_outputs"): 2,
    ("ascend/test_quant.py", "test_a_block_in_int8"): 4,
    ("ascend/test_static.py", "test_no_change_of_a_weight_is_missed"): 2,
    ("ascend/test_streams.py", "test_the_stream_program_is_sound"): 2,
    ("gpu/test_experts.py", "test_layouts"): 2,
    ("gpu/test_experts.py", "test_routings"): 2,
    ("gpu/test_few_bits.py", "test_decoded_in_the_loop"): 2,
    ("gpu/test_pairs.py", "test_values_and_gradients"): 2,
    ("gpu/test_router_product.py", "test_product"): 5,
    ("gpu/test_side_stream.py", "test_one_pair_of_kernels"): 3,
    ("gpu/test_side_stream.py", "test_values"): 6,
    ("test_autograd_contract.py", "test_what_a_step_changes_before_backward"): 3,
    ("test_capture.py", "test_eager_loops_of_transformers_give_one_graph"): 2,  # the zoo has them all
    ("test_capture_guards.py", "test_a_change_is_seen"): 2,
    ("test_cpu_packed.py", "test_values"): 6,
    ("test_layouts.py", "test_strides_are_eagers"): 2,
    ("test_ops.py", "test_experts_opcheck"): 2,
    ("test_ops.py", "test_route_opcheck"): 2,
    ("test_router.py", "test_few_tokens"): 6,
    ("test_zoo.py", "test_decoding_with_a_kv_cache"): 2,
    ("test_zoo_training.py", "test_auxiliary_loss_on_the_router_logits"): 3,
    ("test_zoo_training.py", "test_token_counts_make_no_more_graphs_than_without_us"): 3,
    ("test_zoo_training.py", "test_zero_tokens"): 3,
}


def left_out(items: list[Any]) -> list[Any]:
    """Those of the collected tests that CI leaves to `make zoo`; on a GPU nothing is left out of its own tests."""
    if "ZOO_ALL" in os.environ:
        return []
    met: Counter[tuple[str, str]] = Counter()
    out = []
    for item in items:
        key = (item.path.relative_to(HERE).as_posix(), getattr(item, "originalname", item.name)) if HERE in item.path.parents else ("", "")
        if key not in ONE_IN or key[0].startswith("gpu/") and "TRITON_INTERPRET" not in os.environ:
            continue
        if (met[key] + met[key] // ONE_IN[key]) % ONE_IN[key]:
            out.append(item)
        met[key] += 1
    return out


if __name__ == "__main__":
    print(*sorted({f"tests/{file}" for file, _ in ONE_IN}))
