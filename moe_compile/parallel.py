"""`moe_compile.parallelize`: the experts of a model divided over the ranks of a mesh, for models that no framework has a plan for."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import agreement, divided, kinds, peers
from .explain import explained
from .loops.probe import WHOLE
from .lowering import target_for
from .ops import bundled, peer_rows, summed
from .report import collecting

log = logging.getLogger("moe_compile")


@dataclass(frozen=True)
class _Stack:
    """A parameter that holds one part of all experts; `reader`: the module in whose forward it is read."""

    name: str
    reader: str
    experts: int

    def within(self, path: str) -> _Stack:
        """The same of a module that stands at `path` in another one."""
        return _Stack(f"{path}.{self.name}", f"{path}.{self.reader}".rstrip("."), self.experts)


def parallelize(
    model: nn.Module,
    mesh: Any,
    *args: Any,
    shared_batch: bool = False,
    rows: bool = False,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Divide the experts of `model` over the ranks of `mesh`, in place; returns the model. Every rank calls this, with equal models.

    mesh: a DeviceMesh of one dimension, whose size divides the number of experts. args, kwargs: an example that `explain` runs the
    model on to find its experts (by default transformers' `dummy_inputs`); both may be on the meta device. shared_batch: all ranks
    will get the same batch, as under tensor parallelism; else each rank gets its own, all of one length. rows: where batches are the ranks'
    own, a row travels to the ranks whose experts it chose, by all-to-all, in place of to all of them (docs/distributed.md has when that is
    cheaper); the host reads how many. options: of `explain`.

    Each stack [E, ...] of expert weights becomes a DTensor, Shard(0): state_dict and optimisers (made after this) see DTensors. Then
    compile: `torch.compile(model, backend="moe_fused")`. Where a block is fused its rows travel and weights stay; where it is not, and
    without compiling, its weights are gathered each time, with the same results. Gradients are sums over the ranks' own batches.

    Raises ValueError, with the reason and before anything is changed, where some experts cannot be divided; RuntimeError, on every rank,
    where ranks found different experts, run different versions, or do not answer, and at the first call where shared batches differ.
    """
    _asked(mesh, shared_batch, rows)
    from .ops import whole  # noqa: F401 (defines the op)

    if not (options or {}).get("target") and any(p.is_meta for p in model.parameters()):
        options = {**(options or {}), "target": target_for({mesh.device_type})}
    stacks = _stacks(model, args, kwargs, options)
    for s in stacks:
        if s.experts % mesh.size():
            raise ValueError(f"parallelize: {s.name} holds {s.experts} experts, which {mesh.size()} ranks cannot share equally")
    _untied(model, stacks)
    _together(mesh, stacks, shared_batch, rows)
    for s in stacks:
        _place(model, s.name, mesh)
    for reader in dict.fromkeys(s.reader for s in stacks):
        _read_whole(model, reader, [s.name for s in stacks if s.reader == reader], mesh, (shared_batch, rows))
    return model


def _asked(mesh: Any, shared_batch: bool, rows: bool) -> None:
    if getattr(mesh, "ndim", None) != 1:
        raise ValueError(f"parallelize: mesh must be a DeviceMesh of one dimension (mesh['ep']), got {mesh!r}")
    if rows and shared_batch:
        raise ValueError("parallelize: rows=True is for batches of the ranks' own; with shared_batch=True no row travels")


# ---- what holds experts ----------------------------------------------------------------------------------------------------


def _stacks(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Mapping[str, Any] | None) -> list[_Stack]:
    """The stacks of expert weights that `explain` finds. Raises ValueError where some experts are not fused or not in stacks."""
    if not args and not kwargs:
        kwargs = getattr(model, "dummy_inputs", None) or {}
        if not kwargs:
            raise ValueError("parallelize: give an example of the model's arguments behind the mesh, as for moe_compile.explain")
        device = next(model.parameters()).device
        kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    found = _of_kinds(model, args, kwargs, options)
    if found:
        return found
    out, why = _explained(model, model, args, kwargs, options)[1:]
    if why or not out:
        told = "; ".join(dict.fromkeys(why)) or "no experts were found in what the example ran"
        raise ValueError(f"parallelize: the model's experts cannot be divided: {told}")
    return out


def _of_kinds(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Mapping[str, Any] | None) -> list[_Stack]:
    """The stacks of a model of layers, of which one of each kind is explained; [] where the whole model must be."""
    found = kinds.kinds(model)
    layers = [layer for k in found for layer in k.layers]
    if not layers or not kinds.rest_is_dense(model, layers):
        return []
    stacks: list[_Stack] = []
    clear = True

    def look(k: kinds.Kind, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        nonlocal clear
        first = k.layers[0].module
        out, of_first, why = _explained(first, first.forward, given, named, options)
        clear = clear and not why
        stacks.extend(s.within(layer.path) for layer in k.layers for s in of_first)
        return out

    try:
        with kinds.one_of_each(found, look), torch.no_grad():
            model(*args, **kwargs)
    except Exception as e:  # whatever a shortened run meets, the whole one tells
        log.info("the layers of %s cannot be looked at one by one (%s: %s)", type(model).__name__, type(e).__name__, e)
        return []
    known = dict(model.named_parameters())  # under one name each: layers that share one are looked at with the whole model
    return list(dict.fromkeys(stacks)) if clear and all(s.name in known for s in stacks) else []


def _explained(
    owner: nn.Module, called: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: Mapping[str, Any] | None
) -> tuple[Any, list[_Stack], list[str]]:
    """What `called` gives, the stacks of `owner` in it, and why some of its experts cannot be divided."""
    names = {id(p): n for n, p in owner.named_parameters()}
    modules = dict(owner.named_modules())
    found: dict[str, _Stack] = {}
    why: list[str] = []

    def look(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        for n in gm.graph.nodes:
            if str(n.target).startswith("moe_compile.experts"):
                why.extend(filter(None, [divided.why_not(n)]))
                if not why:
                    found.update({s.name: s for s in _of_op(n, names, modules, why)})
        return gm.forward

    chosen = {"overlap_shared": False, **(options or {}), "inner": look}
    with collecting(), torch.no_grad():
        report, out = explained(called, args, kwargs, chosen)
    torch._dynamo.reset()
    missed = [f"{r.source or 'unknown source'}: {r.reason} [{r.code}]" for r in report.rejected if r.stage != "find"]
    return out, list(found.values()), [*missed, *why]


def _of_op(n: torch.fx.Node, names: Mapping[int, str], modules: Mapping[str, nn.Module], why: list[str]) -> Iterator[_Stack]:
    for w in bundled(n.args)[3]:
        at = divided.source(w)
        value = None if at is None or "grapharg" not in at.meta else at.meta["grapharg"].example
        if value is None or id(value) not in names:
            why.append("a stack of weights is no parameter of the model")
            return
        name = names[id(value)]
        yield _Stack(name, _reader(n, name, modules), value.shape[0])


def _reader(n: torch.fx.Node, name: str, modules: Mapping[str, nn.Module]) -> str:
    """The innermost module in whose forward an op stands and that holds the parameter somewhere; the model itself if none is known."""
    known = {""}
    for path, _ in (n.meta.get("nn_module_stack") or {}).values():
        parts = [p for p in re.findall(r"\w+", re.sub(r"^L\['\w+'\]", "", str(path))) if p != "_modules"]
        known.add(".".join(parts))
    return max((k for k in known if k in modules and (not k or name.startswith(k + "."))), key=len)


def _untied(model: nn.Module, stacks: list[_Stack]) -> None:
    """Raises ValueError where a stack is a parameter of another module, or of another name, as well: divided, they would be two."""
    held = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for s in stacks:
        if held[id(model.get_parameter(s.name))] > 1:
            raise ValueError(f"parallelize: {s.name} is shared with another module of the model (tied weights), which cannot be divided")


def _together(mesh: Any, stacks: list[_Stack], shared_batch: bool, rows: bool) -> None:
    """What the ranks settle before anything is changed. Raises RuntimeError where they found different experts."""
    group = mesh.get_group()
    _alike(agreement.join(group), stacks)
    if not rows:
        peers.join(group, mesh.device_type, summed.memory_of(summed.SUMS) if shared_batch else peer_rows.MEMORY)


def _alike(talk: agreement.Talk | None, stacks: list[_Stack]) -> None:
    if talk is None:
        return
    told = talk.round("stacks", {"found": [[s.name, s.experts] for s in stacks]}, talk.timeout)
    for rank, word in enumerate(told):
        if word != told[talk.rank]:
            what = "did not answer" if word is None else "found other experts in its model than the others"
            raise RuntimeError(f"parallelize: rank {rank} {what}")


# ---- the model -----------------------------------------------------------------------------------------------------------


def _place(model: nn.Module, name: str, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    old = owner._parameters[last]
    assert old is not None
    new = nn.Parameter(distribute_tensor(old.detach(), mesh, [Shard(0)], src_data_rank=None), requires_grad=old.requires_grad)
    setattr(new, WHOLE, True)
    owner._parameters[last] = new


def _read_whole(model: nn.Module, reader: str, names: list[str], mesh: Any, batch: tuple[bool, bool]) -> None:
    """Let a module's forward see whole stacks in place of divided ones."""
    module = model.get_submodule(reader)
    prefix = len(reader) + 1 if reader else 0
    places = [(path, last) for path, _, last in (name[prefix:].rpartition(".") for name in names)]
    original = module.forward
    how = (mesh.get_group().group_name, *batch)  # no numbers: dynamic=True makes symbols of them

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _whole(module, places, how):
            return original(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]


@contextlib.contextmanager
def _whole(module: nn.Module, places: list[tuple[str, str]], how: tuple[Any, ...]) -> Iterator[None]:
    owners = [(module.get_submodule(path) if path else module, last) for path, last in places]
    kept = [owner._parameters[last] for owner, last in owners]
    for (owner, last), p in zip(owners, kept, strict=True):
        owner._parameters[last] = torch.ops.moe_compile.whole(p.to_local(), *how)  # type: ignore[union-attr, assignment]
    try:
        yield
    finally:
        for (owner, last), p in zip(owners, kept, strict=True):
            owner._parameters[last] = p
