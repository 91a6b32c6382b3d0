"""The way to the device: which graph mode compiles the lowered graph, and what each needs."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ...errors import OptionError
from ..target import Chosen, Rest
from . import mega, over_ranks, register, schemas, sharding, streams, workarounds
from .experts_call import EXPERTS, ops
from .operands import Choices
from .options import MODES, AscendOptions, refuse_in_ge
from .rewrite import Lowered, lower, needs_gradients
from .store import STORE
from .weights import Recipe

log = logging.getLogger("moe_compile")


def own(options: Chosen) -> AscendOptions:
    return options.of("ascend")  # type: ignore[no-any-return]


def finish(rest: Rest, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Lower the fused ops of `gm`, hand it to a graph mode, and give back a function of the original inputs.

    A graph that cannot be lowered keeps its fused ops, which run on any device; the report says why. With `strict=True` it raises.
    """
    if not any(n.target in (ops.route.default, *EXPERTS) or over_ranks.travels(n) for n in gm.graph.nodes):
        return _inner(rest, gm, example_inputs, False)
    register.ensure()
    options, mine = rest.options, own(rest.options)
    train = needs_gradients(gm)
    if mine.mega_moe and (lacks := mega.missing()):
        raise OptionError(f"option 'mega_moe' is True: {lacks}; allowed here: False")
    if train and mine.quantize is not None:
        raise OptionError("option 'quantize' is for inference: quantised experts have no gradients")
    if train and schemas.wheel() and not _on_npu(example_inputs):
        rest.tell(["tensors are on the CPU, where torch_npu's ops have no gradients: the fused ops run as they are"])
        return _inner(rest, gm, example_inputs, train)
    try:
        lowered = lower(gm, Choices.of(mine, train))
    except Exception as e:
        if options.strict:
            raise
        log.warning("the fused ops were not lowered to npu ops: %s: %s", type(e).__name__, e)
        rest.tell([f"not lowered to npu ops, the fused ops run as they are, op by op: {type(e).__name__}: {e}"])
        return _inner(rest, gm, example_inputs, True)  # in plain torch they read counts back, which no graph mode captures
    inputs, one_by_one = inputs_of(lowered, example_inputs), train or any(map(over_ranks.travels, lowered.module.graph.nodes))
    chosen = graph_mode(rest, inputs, one_by_one)
    if chosen == "ge":
        refuse_in_ge(mine.combine)
    alone = mine.mega_moe and not any(map(over_ranks.travels, gm.graph.nodes))
    idle = ["mega_moe: no block of this graph has its experts over ranks, so that it has nothing to do"] if alone else []
    rest.tell([*lowered.notes, *idle, *_sharding(lowered, example_inputs), *_remarks(lowered, inputs, rest, chosen)])
    for sink in SINKS:
        sink(lowered)
    inner = _inner(rest, lowered.module, inputs, one_by_one)
    _let_go(lowered.module.graph)
    return _with_packed(inner, lowered)


def _let_go(graph: fx.Graph) -> None:
    """A compiled graph that runs as it is refers to no tensor of the model, not even weakly: `torch.utils.swap_tensors` refuses those.

    Dynamo leaves with each input what it was made of.
    """
    for n in graph.nodes:
        n.meta.pop("grapharg", None)


def _remarks(lowered: Lowered, inputs: Sequence[Any], rest: Rest, chosen: str) -> list[str]:
    """What the way to the device means for this graph."""
    if lowered.training:
        traced = own(rest.options).weight_format == "nz" and rest.options.inner not in ("auto", "eager")
        why = "the inner compiler traces the backward pass, and the cast cannot be traced"
        return [f"weight_format='nz': {why}: weights stay as they are"] if traced else []
    if chosen != "npugraph_ex" and not rest.explaining:
        return []
    copied = sum(_bytes(t) for i, t in zip(lowered.inputs, inputs) if isinstance(i, int) and isinstance(t, Tensor) and not is_static(t))
    return [f"npugraph_ex: a replayed step copies {_size(copied)} of inputs and {_size(lowered.made)} of expert weights"]


def is_static(t: Tensor) -> bool:
    """Whether npugraph_ex captures an input by its address; it copies any other on every replay."""
    return isinstance(t, torch.nn.Parameter) or hasattr(t, "_dynamo_static_input_type")


def _bytes(t: Tensor) -> int:
    n: Any = t.numel() * t.element_size()
    return n if isinstance(n, int) else int(n.node.hint or 0)  # a symbolic size, as it is now


def _size(n: int) -> str:
    return f"{n} bytes" if n < 1024 else f"{n / 1024:.1f} KiB" if n < 2**20 else f"{n / 2**20:.1f} MiB"


def _sharding(lowered: Lowered, example_inputs: Sequence[Any]) -> list[str]:
    """What there is to say of weights in training that are spread over ranks."""
    recipes = [i for i in lowered.inputs if isinstance(i, Recipe)] if lowered.training else []
    return [n for r in recipes for n in sharding.notes(r, [example_inputs[s.position] for s in r.sources])]


def _on_npu(example_inputs: Sequence[Any]) -> bool:
    return any(isinstance(t, Tensor) and t.device.type == "npu" for t in example_inputs)


SINKS: list[Callable[[Lowered], None]] = []  # who wants to see lowered graphs (`dry_run`)


def inputs_of(lowered: Lowered, old: Sequence[Any]) -> list[Any]:
    """Example values of the lowered graph's inputs.

    Packed weights are told to be static, as Dynamo tells it of parameters: npugraph_ex copies any other input on every replay.
    """
    placeholders = lowered.module.graph.find_nodes(op="placeholder")
    values = [old[i] if isinstance(i, int) else n.meta["example_value"] for i, n in zip(lowered.inputs, placeholders)]
    for i, v in zip(lowered.inputs, values):
        if isinstance(i, Recipe) and not lowered.training:
            v._dynamo_static_input_type = "unguarded"
    return values


def _with_packed(inner: Callable[..., Any], lowered: Lowered) -> Callable[..., Any]:
    """The compiled function on the inputs that Dynamo gives: weights go in as packed operands."""
    inputs, training = lowered.inputs, lowered.training

    def operand(i: int | Recipe, args: Sequence[Any]) -> Any:
        if isinstance(i, int):
            return args[i]
        tensors = [args[s.position] for s in i.sources]
        return i.view(tensors, differentiable=True) if training else STORE.get(i, tensors)

    def run(*args: Any) -> Any:
        return inner(*[operand(i, args) for i in inputs])

    return run


def _inner(rest: Rest, gm: fx.GraphModule, example_inputs: Sequence[Any], one_by_one: bool) -> Callable[..., Any]:
    """The compiler behind: what the user named, else a graph mode of torch_npu, else (no NPU) the emulated ops, one by one."""
    options = rest.options
    if options.inner != "auto":
        return rest.compile_with(gm, example_inputs, None if rest.mode in MODES else rest.mode)
    chosen = graph_mode(rest, example_inputs, one_by_one)
    if chosen == "ge":
        return ge_backend(options)(gm, example_inputs)  # type: ignore[no-any-return]
    if chosen == "npugraph_ex":
        return npugraph_ex_backend(options)(gm, example_inputs)  # type: ignore[no-any-return]
    if overlaps(options) and not one_by_one:
        streams.overlap(gm.graph, streams.Eager, own(options).core_limit)
        gm.recompile()
    return gm


def graph_mode(rest: Rest, example_inputs: Sequence[Any], one_by_one: bool) -> str:
    """Which mode compiles. What runs op by op has none: training, because neither takes a backward pass with these ops, and fused ops that
    were not lowered; nor has a machine without an NPU."""
    asked = rest.mode if rest.mode in MODES else own(rest.options).mode
    if one_by_one or not _on_npu(example_inputs):
        return "eager"
    return "npugraph_ex" if asked in ("auto", None) else asked


def overlaps(options: Chosen) -> bool:
    return options.overlap_shared is not False


def load(package: str, defines: str) -> Any:
    """A graph mode's package, and the module of it that defines its stream ops.

    Both packages are lazy objects until an attribute is asked for; a submodule imported before that is loaded twice.
    """
    module = importlib.import_module(package)
    assert module.CompilerConfig is not None
    importlib.import_module(defines)
    return module


def ge_backend(options: Chosen) -> Callable[..., Any]:
    """torchair in max-autotune mode: a GE graph."""
    config = ge_config(options)
    import torchair

    return torchair.get_npu_backend(compiler_config=config)  # type: ignore[no-any-return]


def ge_config(options: Chosen) -> Any:
    """The compiler config of GE mode, with the stream pass in it."""
    torchair = load("torchair", "torchair.scope._wait_tensor")
    workarounds.install()
    config = torchair.CompilerConfig()
    config.mode = "max-autotune"
    config.post_grad_custom_pre_pass = stream_pass(options, streams.Ge)
    return _with_inner_options(config, options)


def npugraph_ex_backend(options: Chosen) -> Callable[..., Any]:
    """The npugraph_ex package where the wheel has it (2.13 on), else torchair's own aclgraph mode without a side stream."""
    import torch_npu  # noqa: F401

    try:
        import npugraph_ex
    except ImportError:
        log.warning("this torch_npu has no npugraph_ex: GE compiles instead")
        return ge_backend(options)
    return npugraph_ex.get_npu_backend(compiler_config=npugraph_ex_config(options))  # type: ignore[no-any-return]


def npugraph_ex_config(options: Chosen) -> Any:
    """The compiler config of npugraph_ex, with the stream pass in it.

    `frozen_parameter` stays off, here and in GE: with it a weight that gets other memory (`p.data = ...`, `load_state_dict(assign=True)`,
    `prepare` after the first call) is read where it was. Without it addresses are part of what a captured graph is looked up by.
    """
    npugraph_ex = load("npugraph_ex", "npugraph_ex.ops._tagged_event")
    config = npugraph_ex.CompilerConfig()
    config.post_grad_custom_pre_pass = stream_pass(options, streams.NpugraphEx)
    return _with_inner_options(config, options)


def _with_inner_options(config: Any, options: Chosen) -> Any:
    """`inner_options` set attributes of the config; a dotted name goes into a part of it. Raises `OptionError` on one that it has not."""
    for path, value in options.inner_options.items():
        part = config
        *parents, name = path.split(".")
        for p in parents:
            part = _known(part, p, path) and getattr(part, p)
        _known(part, name, path)
        setattr(part, name, value)
    return config


def _known(part: Any, name: str, path: str) -> bool:
    """True where a part of a config has the attribute that a path names. Raises `OptionError` where it has not."""
    if not hasattr(part, name):
        allowed = ", ".join(k for k in vars(part) if not k.startswith("_"))
        raise OptionError(f"option 'inner_options' holds {path!r}: {type(part).__name__} has no {name!r}; allowed: {allowed}")
    return True


def stream_pass(options: Chosen, dialect: Callable[..., streams.Dialect]) -> Callable[..., None]:
    """torchair's form of a custom pass: works on the ATen graph in place."""

    def shared_expert_overlap(gm: fx.GraphModule, example_inputs: Any = None, config: Any = None) -> None:
        if overlaps(options):
            streams.overlap(gm.graph, dialect, own(options).core_limit)
            gm.recompile()

    return shared_expert_overlap
