"""moe_compile/capture.py: loops reach the backend whole, in inference and in training."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import Counter, E, H, I, K, Loop, compiled
from torch import Tensor, nn

from moe_compile.loops import capture, reading
from moe_compile.report import collecting


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
    """For the report the call stands at the user's `for`, for stack traces in the user's file."""
    m, found = Loop(), []
    compiled(m, Counter())(torch.randn(9, H))
    found = capture.pending()
    trial = capture._trials[Loop.dispatch][0][1]
    assert not found or found[0] is trial.outcome  # the backend may have taken it already
    assert isinstance(trial.outcome, reading.Reading)
    path, _, line = trial.outcome.source.rpartition(":")
    assert path == Loop.dispatch.__code__.co_filename and linecache.getline(path, int(line)).lstrip().startswith("for ")
    assert trial.outcome.run.__code__.co_filename == Loop.dispatch.__code__.co_filename


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


class AnyArguments(Loop):
    """The loop's own signature takes `*args`: it is read as one that names them."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        return self.among(x, ids, w)

    def among(self, x: Tensor, *args: Tensor) -> Tensor:
        ids, w = args
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


@torch.no_grad()
def test_a_loop_that_takes_any_arguments() -> None:
    m, counter, x = AnyArguments(), Counter(), torch.randn(9, H)
    torch.testing.assert_close(compiled(m, counter)(x), m(x))
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


@torch.no_grad()
def test_no_token_under_symbolic_sizes() -> None:
    """An empty product leaves the width symbolic in Dynamo: the loop was read with the number, which is made a guard."""
    m, counter = Block(), Counter()
    c = compiled(m, counter, dynamic=True)
    with collecting() as report:
        for tokens in (0, 5):
            x = torch.randn(1, tokens, H)
            torch.testing.assert_close(c(x), m(x), rtol=1e-4, atol=1e-5)
    assert counter.ops == len(counter.graphs) == 2 and not report.rejected


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


class Padded(nn.Module):
    """Rows split by counts in another function, and rows of zeros, none here, stacked behind by `join`."""

    def __init__(self, join: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.join = join
        self.router = nn.Linear(H, E, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(E, H, I) * 0.3), nn.Parameter(torch.randn(E, I, H) * 0.3)

    def experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        n = counts.tolist()
        outs = [F.silu(part @ self.up[e]) @ self.down[e] for e, part in enumerate(torch.split(rows, n))]
        out = torch.cat(outs)
        return self.join([out, out.new_zeros((rows.shape[0] - sum(n), H))])

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x).sigmoid().topk(K)
        order = ids.view(-1).argsort(stable=True)
        y = self.experts(x[order // K], F.one_hot(ids.view(-1), E).sum(0)) * w.view(-1)[order, None]
        return torch.zeros_like(x).index_add(0, order // K, y)


def test_rows_of_zeros_stacked_behind() -> None:
    """The loop is in another function than the selection: the whole block is read, also where it is compiled by itself."""
    m, counter, x = Padded(torch.vstack), Counter(), torch.randn(12, H)
    torch.testing.assert_close(compiled(m, counter)(x), m(x))
    assert counter.ops == 1 and len(counter.graphs) == 1


class InPython(nn.Module):
    """What calls the block cannot be traced: the block is a frame of its own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1):
            torch._dynamo.graph_break()
            x = self.block(x)
        return x


def test_a_whole_block_in_a_frame_of_its_own_is_tried_again() -> None:
    m, counter, x = InPython(Padded(torch.vstack)), Counter(), torch.randn(12, H)
    torch.testing.assert_close(compiled(m, counter)(x), m(x))
    assert counter.ops == 1


def test_rows_stacked_in_front_are_not_dropped() -> None:
    """A near miss: every row is another one's."""
    m, counter, x = Padded(lambda parts: torch.vstack([parts[0][1:], parts[1], parts[0][:1]])), Counter(), torch.randn(12, H)
    torch.testing.assert_close(compiled(m, counter)(x), m(x))
