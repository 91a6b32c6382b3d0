"""Tests of which CI runs a part, always the same: grids of parameters, each entry of which pays for a compilation or a build of its own.

Of a grid every value of every parameter is met. Where half as much again as its share is enough for it, so is every pair of values of two
parameters; else its share is filled with pairs, those of parameters with few values (dtype, path) first. A parameter that is a record or a
dict counts with its fields as well. `make zoo` (ZOO_ALL) runs all. A list whose entries each find another fault does not belong here.

    python tests/sampled.py        # the files, for the Makefile
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Key = tuple[str, str]
Goal = tuple[int, object]  # of pairs, how many of this kind there are (of values: 0), and what is to be met
GRIDS: dict[Key, int] = {  # one in n
    ("ascend/test_ids.py", "test_ids_written_in_place"): 4,
    ("ascend/test_quant.py", "test_a_block_in_int8"): 4,
    ("ascend/test_static.py", "test_no_change_of_a_weight_is_missed"): 2,
    ("ascend/test_streams.py", "test_the_stream_program_is_sound"): 2,
    ("gpu/test_experts.py", "test_layouts"): 2,
    ("gpu/test_experts.py", "test_routings"): 2,
    ("gpu/test_experts.py", "test_strides"): 2,
    ("gpu/test_few_bits.py", "test_decoded_in_the_loop"): 2,
    ("gpu/test_pairs.py", "test_values_and_gradients"): 4,
    ("gpu/test_router_product.py", "test_product"): 5,
    ("gpu/test_side_stream.py", "test_one_pair_of_kernels"): 3,
    ("gpu/test_side_stream.py", "test_values"): 3,
    ("test_autograd_contract.py", "test_what_a_step_changes_before_backward"): 3,
    ("test_capture_guards.py", "test_a_change_is_seen"): 2,
    ("test_cpu_packed.py", "test_values"): 12,
    ("test_layouts.py", "test_constants_that_overflow"): 2,
    ("test_layouts.py", "test_strides_are_eagers"): 2,
    ("test_local_ids.py", "test_own_experts"): 2,
    ("test_router.py", "test_few_tokens"): 6,
}
LISTS: dict[Key, int] = {  # the first of n: the same on other models, or what another test that runs in full meets as well
    ("ascend/test_ids.py", "test_a_write_after_the_experts_changes_nothing"): 3,
    ("ascend/test_ids.py", "test_ids_written_in_place_in_training"): 3,
    ("ascend/test_lora.py", "test_pairs_are_grouped_products"): 2,
    ("ascend/test_places.py", "test_spellings"): 2,
    ("ascend/test_lowering.py", "test_models_give_eagers_outputs"): 2,
    ("gpu/test_backward.py", "test_padded"): 2,
    ("test_capture.py", "test_eager_loops_of_transformers_give_one_graph"): 3,  # the zoo has them all
    ("test_catalogue.py", "test_gradients_are_eagers"): 2,
    ("test_loops_few.py", "test_few_stand_for_all"): 2,
    ("test_loops_few.py", "test_what_few_do_not_tell"): 3,
    ("test_ops.py", "test_experts_opcheck"): 2,
    ("test_ops.py", "test_route_opcheck"): 3,
    ("test_zoo.py", "test_decoding_with_a_kv_cache"): 3,
    ("test_shared_stored.py", "test_emitted"): 2,
    ("test_trace.py", "test_a_trace_changes_no_verdict"): 2,
    ("test_zoo_training.py", "test_auxiliary_loss_on_the_router_logits"): 3,
    ("test_zoo_training.py", "test_gradient_checkpointing"): 2,
    ("test_zoo_training.py", "test_gradients"): 6,
    ("test_zoo_training.py", "test_token_counts_make_no_more_graphs_than_without_us"): 2,
    ("test_zoo_training.py", "test_zero_tokens"): 3,
}


def left_out(items: list[Any]) -> list[Any]:
    """Those of the collected tests that CI leaves to `make zoo`; on a GPU nothing is left out of its own tests."""
    if "ZOO_ALL" in os.environ:
        return []
    tests: dict[Key, list[Any]] = defaultdict(list)
    for item in items:
        key = key_of(item)
        if (key in GRIDS or key in LISTS) and not (key[0].startswith("gpu/") and "TRITON_INTERPRET" not in os.environ):
            tests[key].append(item)
    out = []
    for key, them in tests.items():
        kept = set(chosen(key, them))
        out += [item for i, item in enumerate(them) if i not in kept]
    return out


def key_of(item: Any) -> Key:
    """File and name of a collected test, without its parameters."""
    inside = HERE in item.path.parents
    return (item.path.relative_to(HERE).as_posix(), getattr(item, "originalname", item.name)) if inside else ("", "")


def chosen(key: Key, items: Sequence[Any]) -> Sequence[int]:
    """Places of the items of one test that CI runs."""
    if key in LISTS:
        return range(0, len(items), LISTS[key])
    return cover([item.callspec.params for item in items], math.ceil(len(items) / GRIDS[key]))


def cover(grid: Sequence[Mapping[str, Any]], share: int) -> list[int]:
    """Places of entries that meet all pairs, if 1.5 `share` of them do; else `share`, or as many as all values need.

    Greedy: the next entry is the first of those with most new values, then most new pairs of the smallest two parameters, and so on,
    then of what was taken least.
    """
    goals = [set(goal) for goal in goals_of(grid)]
    ranks = sorted({rank for goal in goals for rank, _ in goal})
    left: set[Goal] = set().union(*goals)
    used: Counter[Goal] = Counter()
    taken: list[int] = []
    needed = 0  # by the values
    while left:
        fresh = {i: Counter(rank for rank, _ in goals[i] & left) for i in range(len(grid)) if i not in taken}
        best = max(fresh, key=lambda i: ([fresh[i][r] for r in ranks], -sum(used[g] for g in goals[i])))
        taken.append(best)
        left -= goals[best]
        used.update(g for g in goals[best] if not g[0])
        if not needed and all(rank for rank, _ in left):
            needed = len(taken)
    return taken if 2 * len(taken) <= 3 * share else taken[: max(share, needed)]


def goals_of(grid: Sequence[Mapping[str, Any]]) -> Iterator[list[Goal]]:
    """What each entry meets: its parameters' values, and pairs of values (or of fields of them) of two parameters."""
    values = [[factor for name in entry for factor in factors((name,), entry[name])] for entry in grid]
    pairs = [[(a, b) for a, b in combinations(them, 2) if a[0][0] != b[0][0]] for them in values]
    kinds: dict[object, set[object]] = defaultdict(set)
    for a, b in (pair for them in pairs for pair in them):
        kinds[a[0], b[0]].add((a[1], b[1]))
    for them, two in zip(values, pairs, strict=True):
        yield [(0, v) for v in them if len(v[0]) == 1] + [(len(kinds[a[0], b[0]]), (a, b)) for a, b in two]


def factors(name: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """A value and the fields of it, by name."""
    yield name, repr(value)
    fields = value if isinstance(value, dict) else {}
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    for field, inner in fields.items():
        yield from factors((*name, str(field)), inner)


if __name__ == "__main__":
    print(*sorted({f"tests/{file}" for file, _ in (GRIDS | LISTS)}))
