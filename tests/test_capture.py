"""moe_compile/capture.py: loops reach the backend whole, nothing else changes, and what is not proved stays as written."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile import activation as act
from moe_compile import backend, capture, reading
from moe_compile.bench import Roles, Spec, primes, roles_of
from moe_compile.ir import Experts, Form, MoeBlock, Rejection

E, K, H, I = 6, 2, 16, 8


class Loop(nn.Module):
    """Router and `for e in hit` in two functions, as most models have them."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.act = act
        self.gate = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, 2 * I, H) * 0.3)
        self.down = nn.Parameter(torch.randn(E, H, I) * 0.3)
        self.num_experts, self.limit = E, 7.0

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        return self.dispatch(x, ids, w)

    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, (self.expert(e, x[t]) * w[t, j, None]).to(out.dtype))
        return out

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e]).chunk(2, -1)
        return F.linear(self.act(g.clamp(max=self.limit)) * u, self.down[e])


class Counter:
    """An inner compiler that keeps the graphs it gets and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any, **kw: Any) -> Any:
        self.graphs.append(gm)
        return gm.forward

    @property
    def ops(self) -> int:
        """How many experts calls the graphs hold."""
        return sum(n.target is torch.ops.moe_compile.experts.default for g in self.graphs for n in g.graph.nodes)


def compiled(m: Any, counter: Counter, **kw: Any) -> Any:
    return torch.compile(m, backend="moe_fused", options={"inner": counter}, **kw)


@pytest.fixture(autouse=True)
def nothing_pending() -> Iterator[None]:
    capture.pending()
    yield
    capture.pending()


# ---- what is captured ------------------------------------------------------------------------------------------------


def _tiny(name: str) -> nn.Module:
    tf = pytest.importorskip("transformers")
    base = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    latent = dict(kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    configs: dict[str, Callable[[], Any]] = {
        "afmoe": lambda: tf.AfmoeConfig(
            **base, intermediate_size=32, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2, num_dense_layers=0, head_dim=16
        ),
        "mixtral": lambda: tf.MixtralConfig(**base, intermediate_size=16, num_local_experts=8, num_experts_per_tok=2),
        "gpt_oss": lambda: tf.GptOssConfig(**base, intermediate_size=16, num_local_experts=8, num_experts_per_tok=2, head_dim=16),
        "dbrx": lambda: tf.DbrxConfig(
            d_model=32,
            n_heads=2,
            n_layers=2,
            vocab_size=64,
            max_seq_len=32,
            ffn_config=dict(ffn_hidden_size=16, moe_num_experts=8, moe_top_k=2, hidden_size=32),
            attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0),
        ),
        "longcat_flash": lambda: tf.LongcatFlashConfig(
            hidden_size=32,
            ffn_hidden_size=32,
            num_layers=2,
            num_attention_heads=2,
            vocab_size=64,
            expert_ffn_hidden_size=16,
            n_routed_experts=8,
            zero_expert_num=4,
            moe_topk=2,
            head_dim=8,
            **latent,
        ),
        "deepseek_v3": lambda: tf.DeepseekV3Config(
            **base,
            intermediate_size=32,
            moe_intermediate_size=16,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=0,
            **latent,
        ),
    }
    kw = dict(attn_implementation="eager")
    if name not in ("dbrx", "longcat_flash"):  # these have no other implementation and refuse the argument's name
        kw["experts_implementation"] = "eager"
    m = tf.AutoModelForCausalLM.from_config(configs[name](), **kw).eval()
    for p in m.parameters():
        nn.init.normal_(p, std=0.2)
    return m  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["afmoe", "mixtral", "gpt_oss", "dbrx", "longcat_flash", "deepseek_v3"])
def test_eager_loops_of_transformers_give_one_graph(name: str) -> None:
    m, counter, x = _tiny(name), Counter(), torch.randint(0, 64, (2, 7))
    with torch.no_grad():
        expected = m(x).logits
        torch.testing.assert_close(compiled(m, counter)(x).logits, expected, rtol=1e-5, atol=1e-6)
    assert len(counter.graphs) == 1
    assert counter.ops >= 2


def test_the_user_s_line_is_named() -> None:
    """The call stands, for stack traces and the report, where the user's function stands."""
    m, found = Loop(), []
    compiled(m, Counter())(torch.randn(9, H))
    found = capture.pending()
    trial = capture._trials[Loop.dispatch][0][1]
    assert not found or found[0] is trial.outcome  # the backend may have taken it already
    assert isinstance(trial.outcome, reading.Reading)
    assert trial.outcome.source == f"{__file__}:{Loop.dispatch.__code__.co_firstlineno}"
    assert trial.outcome.run.__code__.co_filename == __file__


def test_layers_share_one_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = capture.read, []
    monkeypatch.setattr(capture, "read", lambda *a: seen.append(a) or read(*a))
    monkeypatch.setattr(capture, "_trials", type(capture._trials)())
    m, counter, x = nn.Sequential(Loop(), Loop(), Loop()), Counter(), torch.randn(9, H)
    torch.testing.assert_close(compiled(m, counter)(x), m(x))
    assert len(seen) == 1 and counter.ops == 3 and len(counter.graphs) == 1


def test_different_activations_do_not_share_a_reading() -> None:
    x = torch.randn(9, H)
    for f in (F.silu, F.gelu, F.relu, nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh")):
        m, counter = Loop(f), Counter()
        torch.testing.assert_close(compiled(m, counter)(x), m(x))
        assert counter.ops == 1
    m = Loop()
    m.limit = 0.5
    torch.testing.assert_close(compiled(m, Counter())(x), m(x))


def test_changes_after_compilation_are_seen() -> None:
    """Dynamo guards on what the function asked its module for, although the function itself is gone from the graph."""

    m, counter, x = Loop(nn.SiLU()), Counter(), torch.randn(9, H)
    c = compiled(m, counter)
    torch.testing.assert_close(c(x), m(x))
    m.limit = 0.5
    torch.testing.assert_close(c(x), m(x))
    m.act = nn.ReLU()
    torch.testing.assert_close(c(x), m(x))
    assert counter.ops == 3
    with torch.no_grad():
        m.down.mul_(2)
    torch.testing.assert_close(c(x), m(x))
    assert counter.ops == 3


def test_no_more_graphs_for_other_token_counts() -> None:
    m, counter = Loop(), Counter()
    c = compiled(m, counter)
    for n in (5, 1, 2, 64, 17):
        x = torch.randn(n, H)
        torch.testing.assert_close(c(x), m(x), rtol=1e-4, atol=1e-5)
    assert len(counter.graphs) <= 3


def test_batched_tokens_and_flat_ids() -> None:
    class Batched(Loop):
        def forward(self, x: Tensor) -> Tensor:
            w, ids = self.gate(x.flatten(0, 1)).softmax(-1).topk(K, dim=-1)
            return self.batched(x, routing_weights=w, ids=ids)

        def batched(self, x: Tensor, *, ids: Tensor, routing_weights: Tensor) -> Tensor:
            b = x.shape[0]
            x, out = x.reshape(-1, H), torch.zeros(x.shape[0] * x.shape[1], H)
            for e in ids.unique().tolist():
                t, j = torch.where(ids == e)
                out[t] += self.expert(e, x[t]) * routing_weights[t, j, None]
            return out.view(b, -1, H)

    m, counter, x = Batched(), Counter(), torch.randn(3, 5, H)
    torch.testing.assert_close(compiled(m, counter)(x), m(x))
    assert counter.ops == 1


def test_weights_handed_in_as_arguments() -> None:
    class Stateless(Loop):
        def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
            return dispatch(x, self.up, self.down, w, ids)

    def dispatch(x: Tensor, up: Tensor, down: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(up.shape[0]):
            t, j = (ids == e).nonzero(as_tuple=True)
            if t.numel() == 0:
                continue
            g, u = (x[t] @ up[e].t()).chunk(2, -1)
            out[t] += (F.silu(g) * u) @ down[e].t() * w[t, j, None]
        return out

    m, counter, x = Stateless(), Counter(), torch.randn(9, H)
    torch.testing.assert_close(compiled(m, counter)(x), m(x))
    assert counter.ops == 1


def test_ids_that_leave_torch() -> None:
    """Counts in numpy, slices of the sorted tokens, one cat: nothing of the loop is left."""

    class Numpy(Loop):
        @torch.no_grad()
        def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
            counts = ids.new_zeros((ids.shape[0], self.num_experts)).scatter_(1, ids, 1).sum(dim=0)
            order = ids.view(-1).argsort()
            rows, outs, start = x[order // ids.shape[1]], [], 0
            for e, n in enumerate(counts.cpu().numpy()):
                if n == 0:
                    continue
                outs.append(self.expert(e, rows[start : start + n]))
                start += n
            y = torch.cat(outs)
            back = torch.empty_like(y)
            back[order] = y
            return (back.view(*ids.shape, -1) * w.unsqueeze(-1)).sum(dim=1)

    m, counter = Numpy(), Counter()
    c = compiled(m, counter)
    for n in (9, 2):
        x = torch.randn(n, H)
        torch.testing.assert_close(c(x), m(x))
    assert counter.ops == len(counter.graphs) <= 2


def test_an_accumulator_that_starts_from_the_residual() -> None:
    class Residual(Loop):
        def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
            out = x.clone()
            for e in ids.unique().tolist():
                t, j = torch.where(ids == e)
                out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
            return out

    m, counter, x = Residual(), Counter(), torch.randn(9, H)
    torch.testing.assert_close(compiled(m, counter)(x), m(x))
    assert counter.ops == 1


def test_a_loop_compiled_alone() -> None:
    """The frame that Dynamo starts with is never inlined; one of its own is put around it."""

    def dispatch(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, F.silu(x[t] @ up[e].t()) @ down[e].t() * w[t, j, None])
        return out

    counter = Counter()
    given = torch.randn(9, H), torch.randint(0, E, (9, 1)), torch.rand(9, 1), torch.randn(E, I, H), torch.randn(E, H, I)
    torch.testing.assert_close(compiled(dispatch, counter)(*given), dispatch(*given))
    assert counter.ops == 1 and len(counter.graphs) == 1


# ---- whole blocks ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Router and loop in one function, an in-place normalisation between them, the logits handed out too."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, I), nn.SiLU(), nn.Linear(I, H)) for _ in range(E))
        self.shared = nn.Linear(H, H)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, s, h = x.shape
        x = x.view(-1, h)
        logits = self.gate(x)
        w, ids = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), K, dim=-1)
        w /= w.sum(dim=-1, keepdim=True)
        out = torch.zeros((b * s, h), dtype=x.dtype, device=x.device)
        mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            j, t = torch.where(mask[e].squeeze(0))
            out.index_add_(0, t, self.experts[e](x[None, t].reshape(-1, h)) * w[t, j, None])
        return out.reshape(b, s, h) + self.shared(x).view(b, s, h), logits


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            y, logits = layer(x)
            x = x + y
        return x, logits


@pytest.mark.parametrize(("cls", "ops"), [(Block, 1), (Stack, 2)])
def test_router_and_loop_in_one_function(cls: type[nn.Module], ops: int) -> None:
    """Inlined, and compiled alone; other sizes make no more graphs than Dynamo's own shapes do."""
    m, counter = cls(), Counter()
    c = compiled(m, counter, dynamic=True)
    for shape in ((2, 7), (3, 5), (4, 9)):
        x = torch.randn(*shape, H)
        torch.testing.assert_close(c(x), m(x), rtol=1e-4, atol=1e-5)
    assert len(counter.graphs) == 1 and counter.ops == ops


def test_training_through_a_whole_block() -> None:
    m, x = Block().train(), torch.randn(2, 7, H)
    c = torch.compile(m, backend="moe_fused", options={"inner": "aot_eager"})
    found = []
    for f in (c, m):
        m.zero_grad()
        y, logits = f(x)
        (y.square().sum() + logits.logsumexp(-1).sum()).backward()
        found.append([p.grad.clone() for p in m.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_functions_without_experts_are_not_reported() -> None:
    class Search(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.n = nn.ModuleList(nn.Linear(H, H) for _ in range(3)), 3

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                if (x[0] > 0).any().item():
                    x = part(x)
            return x

    m, x = Search(), torch.randn(9, H)
    with torch.no_grad():
        torch.testing.assert_close(compiled(m, Counter())(x), m(x))
    assert capture.pending() == []


# ---- training ----------------------------------------------------------------------------------------------------------


def _gradients(f: Any, m: nn.Module, x: Tensor) -> list[Tensor]:
    m.zero_grad()
    f(x).square().sum().backward()
    return [p.grad.clone() for p in m.parameters() if p.grad is not None]


def test_training() -> None:
    m, counter, x = Loop().train(), Counter(), torch.randn(9, H)
    for a, b in zip(_gradients(compiled(m, counter), m, x), _gradients(m, m, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert counter.ops == 1


def test_gradient_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    class Wrapped(Loop):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]

    m, x = Wrapped().train(), torch.randn(9, H)
    c = torch.compile(m, backend="moe_fused", options={"inner": "aot_eager"})
    for a, b in zip(_gradients(c, m, x), _gradients(m, m, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast() -> None:
    m, counter, x = Loop(), Counter(), torch.randn(9, H)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out, expected = compiled(m, counter)(x), m(x)
    assert out.dtype == expected.dtype and counter.ops == 1
    assert (out - expected).abs().max() < 0.03 * expected.abs().max()


def test_lower_precision() -> None:
    m, counter = Loop().to(torch.bfloat16), Counter()
    x = torch.randn(9, H, dtype=torch.bfloat16)
    with torch.no_grad():
        out, expected = compiled(m, counter)(x), m(x)
    assert out.dtype == expected.dtype and counter.ops == 1
    assert (out - expected).abs().max() < 0.03 * expected.abs().max()


# ---- scope -------------------------------------------------------------------------------------------------------------


def _plain(m: nn.Module, x: Tensor, **kw: Any) -> int:
    """How many graphs another backend gets; they must hold nothing of ours."""
    torch._dynamo.reset()
    counter = Counter()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(m, backend=counter, **kw)(x), m(x))
    assert counter.ops == 0
    return len(counter.graphs)


def test_other_backends_see_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    m, x = Loop(), torch.randn(9, H)
    with_hooks = _plain(m, x)
    with torch.no_grad():
        compiled(m, ours := Counter())(x)
    assert _plain(m, x) == with_hooks > 1 and len(ours.graphs) == 1
    monkeypatch.setenv("MOE_COMPILE_CAPTURE", "0")
    assert _plain(m, x) == with_hooks


def test_two_backends_on_one_model() -> None:
    m, x, ours, other = Loop(), torch.randn(9, H), Counter(), Counter()
    a, b = compiled(m, ours), torch.compile(m, backend=other)
    with torch.no_grad():
        for f in (b, a, b, a):
            torch.testing.assert_close(f(x), m(x))
    assert ours.ops == 1 and other.ops == 0 and len(ours.graphs) == 1 and len(other.graphs) > 1


def test_environment_variable_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    m, x, counter = Loop(), torch.randn(9, H), Counter()
    plain = _plain(m, x)
    torch._dynamo.reset()
    monkeypatch.setenv("MOE_COMPILE_CAPTURE", "0")
    with torch.no_grad():
        torch.testing.assert_close(compiled(m, counter)(x), m(x))
    assert len(counter.graphs) == plain and counter.ops == 0


def test_reset_changes_nothing() -> None:
    m, x = Loop(), torch.randn(9, H)
    for _ in range(2):
        counter = Counter()
        with torch.no_grad():
            torch.testing.assert_close(compiled(m, counter)(x), m(x))
        assert counter.ops == 1
        torch._dynamo.reset()


def test_export_is_left_alone() -> None:
    class Static(Loop):
        def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
            dense = torch.zeros(x.shape[0], E).scatter(1, ids, w)
            return sum(self.expert(e, x) * dense[:, e, None] for e in range(E))  # type: ignore[return-value]

    m, x = Static(), torch.randn(9, H)
    compiled(m, Counter())(x)
    exported = torch.export.export(m, (x,))
    assert not any("moe_compile" in str(n.target) for n in exported.graph.nodes)


def test_threads() -> None:
    errors: list[BaseException] = []

    def work(m: nn.Module) -> None:
        try:
            x = torch.randn(9, H)
            with torch.no_grad():
                torch.testing.assert_close(compiled(m, counter := Counter())(x), m(x))
            assert counter.ops == 1
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(m,)) for m in (Loop(), Loop(F.gelu), Loop())]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors


def test_scope_follows_wrapped_compilers() -> None:
    wrapper = types.SimpleNamespace(_torchdynamo_orig_backend=types.SimpleNamespace(compiler_fn=backend.moe_fused))
    assert capture.for_us(wrapper) and capture.for_us(backend.moe_fused)
    assert not capture.for_us(None) and not capture.for_us(Counter()) and not capture.for_us(types.SimpleNamespace(compiler_fn=None))


def test_user_state_is_untouched() -> None:
    """Reading draws no random numbers of the user's and leaves the module as it was."""
    m, x = Loop(), torch.randn(9, H)
    before = {k: (v.data_ptr(), v._version) for k, v in m.state_dict(keep_vars=True).items()}
    attributes = dict(vars(m))
    state = torch.get_rng_state()
    with torch.no_grad():
        compiled(m, Counter())(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert {k: (v.data_ptr(), v._version) for k, v in m.state_dict(keep_vars=True).items()} == before
    assert {k: v for k, v in vars(m).items() if k in attributes and k != "_compiled_call_impl"} == attributes


# ---- what is left as written -------------------------------------------------------------------------------------------


class Dropout(Loop):
    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, F.dropout(self.expert(e, x[t]), 0.5, self.training) * w[t, j, None])
        return out


class Capacity(Loop):
    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            t, j = t[:3], j[:3]
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


class LoneTokenDoubled(Loop):
    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            y = self.expert(e, x[t])
            out.index_add_(0, t, (y * 2 if t.numel() == 1 else y) * w[t, j, None])
        return out


class BranchOnValues(Loop):
    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            y = self.expert(e, x[t])
            out.index_add_(0, t, (y * 2 if x.max().item() > 1e6 else y) * w[t, j, None])
        return out


class Detached(Loop):
    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(e, x.detach())


class Counting(Loop):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(E))

    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            self.load[e] += t.numel()
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


@pytest.mark.parametrize("cls", [Dropout, Capacity, LoneTokenDoubled, BranchOnValues, Detached, Counting])
def test_near_misses_run_as_written(cls: type[Loop]) -> None:
    m, twin, counter, x = cls(), cls(), Counter(), torch.randn(9, H)
    twin.load_state_dict(m.state_dict())
    c = compiled(m, counter)
    for _ in range(2):
        torch.manual_seed(3)
        out = c(x)
        torch.manual_seed(3)
        torch.testing.assert_close(out, twin(x))
    assert counter.ops == 0
    for a, b in zip(m.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    rejected = [t.outcome for _, t in capture._trials[cls.dispatch] if isinstance(t.outcome, Rejection)]
    assert rejected and all(r.reason and r.source.startswith(__file__) for r in rejected)


def test_dropout_is_read_again_in_evaluation() -> None:
    m, counter, x = Dropout().eval(), Counter(), torch.randn(9, H)
    with torch.no_grad():
        torch.testing.assert_close(compiled(m, counter)(x), m(x))
    assert counter.ops == 1


def test_hooks_of_experts_still_run() -> None:
    class Modules(Loop):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(H, H) for _ in range(E))

        def expert(self, e: int, x: Tensor) -> Tensor:
            return self.experts[e](x)  # type: ignore[no-any-return]

    m, x, calls = Modules(), torch.randn(9, H), []
    m.experts[0].register_forward_hook(lambda *a: calls.append(1))
    with torch.no_grad():
        c = compiled(m, counter := Counter())
        torch.testing.assert_close(c(x), m(x))
    assert counter.ops == 0 and len(calls) == 2


def test_disabled_functions_stay_disabled() -> None:
    class Disabled(Loop):
        @torch.compiler.disable
        def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
            return super().dispatch(x, ids, w)

    m, x, counter = Disabled(), torch.randn(9, H), Counter()
    with torch.no_grad():
        torch.testing.assert_close(compiled(m, counter)(x), m(x))
    assert counter.ops == 0


def test_code_with_side_effects_is_no_candidate() -> None:
    def prints(x: Tensor) -> None:
        for _ in x:
            print("x")

    def writes(self: Any, x: Tensor) -> None:
        for self.last in x:
            pass

    def generates(x: Tensor) -> Any:
        for r in x:
            yield r + 1

    assert capture.is_candidate(Loop.dispatch.__code__)
    assert not any(capture.is_candidate(f.__code__) for f in (prints, writes, generates, Loop.forward))


CLAMPED = act.silu(act.clamp(act.G, -sympy.oo, 7)) * act.U


def _meaning(gm: torch.fx.GraphModule, **changes: Any) -> Any:
    """What the passes say of `Loop.dispatch`, with changes that make it wrong."""
    at = {n.meta.get("arg") or n.meta.get("param_path"): n for n in gm.graph.nodes if n.op == "placeholder"}
    out = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    experts = Experts(**{**dict(num_experts=E, hidden=H, intermediate=I, out_features=H, form=Form.CONCAT, activation=CLAMPED), **changes})
    boundary = dict(tokens=at["x"], ids=at["ids"], weights=at["w"], up=[at["up"]], down=[at["down"]], out=out)
    return types.SimpleNamespace(ir=MoeBlock(None, experts, boundary=boundary))


@pytest.mark.parametrize(
    ("changes", "ops"),
    [
        ({}, 1),
        (dict(activation=act.gelu(act.G) * act.U), 0),
        (dict(activation=CLAMPED * sympy.Rational(1001, 1000)), 0),
        (dict(activation=act.SWIGLU), 0),
        (dict(form=Form.INTERLEAVED), 0),
        (dict(num_experts=E - 1), 0),
        (dict(weight_on_input=True), 0),
    ],
)
def test_a_wrong_reading_is_caught(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], ops: int) -> None:
    monkeypatch.setattr(capture, "_recover", lambda gm: _meaning(gm, **changes))
    monkeypatch.setattr(capture, "_trials", type(capture._trials)())
    m, counter, x = Loop(), Counter(), torch.randn(9, H)
    with torch.no_grad():
        torch.testing.assert_close(compiled(m, counter)(x), m(x))
    assert counter.ops == ops


def test_a_fault_of_ours_is_a_rejection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_recover", lambda gm: 1 / 0)
    monkeypatch.setattr(capture, "_trials", type(capture._trials)())
    m, counter, x = Loop(), Counter(), torch.randn(9, H)
    with torch.no_grad():
        torch.testing.assert_close(compiled(m, counter)(x), m(x))
    (_, trial), *_ = capture._trials[Loop.dispatch]
    assert counter.ops == 0 and "ZeroDivisionError" in trial.outcome.reason


# ---- arguments -----------------------------------------------------------------------------------------------------------

f32, i64, s = torch.float32, torch.int64, sympy.Symbol("s", positive=True, integer=True)


@pytest.mark.parametrize(
    ("tensors", "roles"),
    [
        (dict(x=Spec(f32, (9, 16)), i=Spec(i64, (9, 2)), w=Spec(f32, (9, 2))), Roles("x", "i", "w", (), 2)),
        (dict(w=Spec(f32, (s, 2)), i=Spec(i64, (s, 2)), x=Spec(f32, (s, 16))), Roles("x", "i", "w", (), 2)),
        (dict(x=Spec(f32, (3, s, 16)), i=Spec(i64, (3 * s, 2)), w=Spec(f32, (3 * s, 2))), Roles("x", "i", "w", (), 2)),
        (dict(x=Spec(f32, (s, 16)), i=Spec(i64, (4 * s,)), w=Spec(f32, (4 * s, 1))), Roles("x", "i", "w", (), 4)),
        (
            dict(x=Spec(f32, (9, 16)), u=Spec(f32, (6, 8, 16)), i=Spec(i64, (9, 2)), w=Spec(f32, (9, 2))),
            Roles("x", "i", "w", ("u",), 2),
        ),
        (dict(x=Spec(f32, (9, 16)), i=Spec(i64, (8, 2)), w=Spec(f32, (8, 2))), None),  # other tokens
        (dict(x=Spec(f32, (9, 16)), i=Spec(f32, (9, 2)), w=Spec(f32, (9, 2))), None),  # no ids
        (dict(x=Spec(f32, (9, 16)), i=Spec(i64, (9, 2))), None),  # no weights
        (dict(x=Spec(f32, (9, 16)), y=Spec(f32, (9, 16)), i=Spec(i64, (9, 2)), w=Spec(f32, (9, 2))), None),  # two of them
    ],
)
def test_roles_of_arguments(tensors: dict[str, Spec], roles: Roles | None) -> None:
    assert roles_of(tensors) == roles


def test_token_counts_are_told_from_all_other_sizes() -> None:
    small, large = primes(17, taken={16, 5 * 64, 19}, count=2)
    assert (small, large) == (7, 17)
    assert primes(17, taken={17 * 8, 19, 64}) == [23]
