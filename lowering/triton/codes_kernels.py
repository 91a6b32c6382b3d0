"""Codes to numbers inside a kernel, and few tokens' products on them: every byte of a weight is read once, no floats of a matrix exist.

    up    a[s] = act(W_g[e] x[t] + b_g, W_u[e] x[t] + b_u)
    down  out[t] = add[t] + Σ_j w[t, j] (W_d[e_j] a[t·k + j] + b_d)
    W[i, :] · v = Σ_g s[i, g] (Σ_{j in g} value(code[i, j]) v[j] - z[i, g] Σ_{j in g} v[j])

Programs are as small and as many as in `decode`. A group g is what a thread loads at once of a row, 16 bytes, whatever a block is:
sums over it stay in the thread, and a scale costs one multiplication a group, not one a weight.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from .decode import _by_slot
from .gemm import DUAL

INT8, E4M3, E5M2, NUMBER, E2M1, TABLED = (tl.constexpr(i) for i in range(6))  # as `codes` numbers them
NO_SCALE, PLAIN, EXPONENT, BITS = (tl.constexpr(i) for i in range(4))
UNROLLED = tl.constexpr(4)  # steps whose loads may be under way together


# Four bytes to two pairs of bf16 from low halves and two from high ones. A byte permutation looks up both bytes of |e2m1| for four codes at
# once, and their signs; plain codes are digits of 128 + q
_E2M1 = tl.constexpr("""{ .reg .b32 s, g, t, n, h, l, k;
and.b32 s, $4, 0x77777777; shr.u32 g, $4, 3; and.b32 g, g, 0x11111111; mov.b32 k, 0;
prmt.b32 h, 0x3F3F3F00, 0x40404040, s; prmt.b32 l, 0xC0800000, 0xC0804000, s; prmt.b32 n, 0x00008000, k, g;
or.b32 h, h, n; prmt.b32 $0, l, h, 0x6240; prmt.b32 $2, l, h, 0x7351; shr.u32 t, s, 16; shr.u32 g, g, 16;
prmt.b32 h, 0x3F3F3F00, 0x40404040, t; prmt.b32 l, 0xC0800000, 0xC0804000, t; prmt.b32 n, 0x00008000, k, g;
or.b32 h, h, n; prmt.b32 $1, l, h, 0x6240; prmt.b32 $3, l, h, 0x7351; }""")
_PLAIN = tl.constexpr("""{ .reg .b32 t, k;
mov.b32 k, 0; prmt.b32 t, $4, k, 0x4140; lop3.b32 $0, t, 0x000F000F, 0x43004300, 0xEA;
shr.u32 t, t, 4; lop3.b32 $2, t, 0x000F000F, 0x43004300, 0xEA; prmt.b32 t, $4, k, 0x4342;
lop3.b32 $1, t, 0x000F000F, 0x43004300, 0xEA; shr.u32 t, t, 4; lop3.b32 $3, t, 0x000F000F, 0x43004300, 0xEA; }""")


@triton.jit
def number(b, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """What bytes stand for, in fp32. NATIVE: the card converts e4m3. Else its digits are an fp32 of 2^-120 times the value."""
    if KIND == INT8:
        return b.to(tl.int8, bitcast=True).to(tl.float32)
    if KIND == E4M3:
        if NATIVE:
            return b.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        c = b.to(tl.int32)
        small = (((c & 0x80) << 24) | ((c & 0x7F) << 20)).to(tl.float32, bitcast=True)
        return tl.where((c & 0x7F) == 0x7F, float("nan"), small * 1.329227995784916e36)
    if KIND == E5M2:
        return (b.to(tl.int32) << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return b.to(tl.float32)


@triton.jit
def _half(q, table, KIND: tl.constexpr):
    """What half bytes stand for, in fp32."""
    if KIND == E2M1:
        return (((q & 8) << 28) | ((q & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37
    if KIND == TABLED:
        return tl.load(table + q).to(tl.float32)
    return q.to(tl.float32)


@triton.jit
def halves(b, table, KIND: tl.constexpr, HIGH: tl.constexpr, ASSEMBLY: tl.constexpr):
    """What the first and the second code of bytes stand for: in bf16, which has them all, or in fp32."""
    if ASSEMBLY and KIND != TABLED:
        lo, hi = tl.inline_asm_elementwise(
            _E2M1 if KIND == E2M1 else _PLAIN, "=r,=r,=r,=r,r", [b], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
        if KIND != E2M1:
            lo, hi = lo - 128.0, hi - 128.0
    else:
        c = b.to(tl.int32)
        lo, hi = _half(c & 15, table, KIND), _half(c >> 4, table, KIND)
    if HIGH:
        return hi, lo
    else:
        return lo, hi


@triton.jit
def scaling(s, SCALE: tl.constexpr):
    """Scales in fp32: numbers, or exponents: 2^(b - 127), 255 is no number; or the same bits of an fp32 whatever b is."""
    if SCALE == BITS:
        return (s.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    if SCALE == EXPONENT:
        b = s.to(tl.int32)
        two = (b << 23).to(tl.float32, bitcast=True)
        return tl.where(b == 0, 5.877471754111438e-39, tl.where(b == 255, float("nan"), two))
    else:
        return s.to(tl.float32)


@triton.jit
def base_of(p, e, stride_e, TABLE: tl.constexpr, DTYPE: tl.constexpr):
    """Where expert e's begin: of a stack, or by a table of pointers."""
    if TABLE:
        return tl.load(p + e).to(tl.pointer_type(DTYPE), bitcast=False)
    else:
        return p + e.to(tl.int64) * stride_e


@triton.jit
def block_of(i, SIZE: tl.constexpr):
    """The block that an index lies in; all in one where the size is 0."""
    return i // SIZE if SIZE != 0 else i * 0


@triton.jit
def _slots(ids, t, j, slots_per_token, num_experts):
    """(slot, its expert or 0, whether it has one) of a token's slots j."""
    slot = t * slots_per_token + j
    e = tl.load(ids + slot, mask=j < slots_per_token, other=-1)
    known = (e >= 0) & (e < num_experts)
    return slot.to(tl.int64), tl.where(known, e, 0), known


@triton.jit
def _vector(v, row, k0, k, live, BB: tl.constexpr, PACKED: tl.constexpr):
    """Elements of some rows of v that meet bytes [k0, k0 + BB) of codes: of the first codes, of the second ones."""
    at = k0 + tl.arange(0, BB)
    if PACKED:
        both = 2 * at[:, None] + tl.arange(0, 2)[None, :]
        inside = live[:, None, None] & (both < k)[None, :, :]
        return tl.split(tl.load(v + row[:, None, None] + both[None, :, :], mask=inside, other=0.0).to(tl.float32))
    else:
        one = tl.load(v + row[:, None] + at[None, :], mask=live[:, None] & (at < k)[None, :], other=0.0).to(tl.float32)
        return one, one


@triton.jit
def coded_tile(
    codes, e, live, n0, k0, n, k, stride_e, stride_n, stride_k, WEIGHTS: tl.constexpr, PACKED: tl.constexpr,
    BN: tl.constexpr, BB: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Of several experts e [J]: bytes of W[e][n0:n0+BN, k0:k0+BB], [J, BN, BB]; zero where an expert is not `live`."""
    PER: tl.constexpr = 2 if PACKED else 1
    at_n = n0 + tl.arange(0, BN)
    at_b = k0 + tl.arange(0, BB)
    base = base_of(codes, e, stride_e, WEIGHTS, tl.uint8)
    at = at_n[:, None] * stride_n + at_b[None, :] * stride_k
    if EVEN:
        mask = live[:, None, None]
    else:
        mask = live[:, None, None] & ((at_n < n)[:, None] & (at_b < k // PER)[None, :])[None, :, :]
    return tl.load(base[:, None, None] + at[None, :, :], mask=mask, other=0)


@triton.jit
def coded_sums(
    b, scales, zeros, table, e, live, v, row, weight, n0, k0, n, k, offset, scale_e, scale_n, scale_k,
    FIRST: tl.constexpr, STEP: tl.constexpr,
    WEIGHTS: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr, PACKED: tl.constexpr, HIGH: tl.constexpr, ASSEMBLY: tl.constexpr,
    SCALE: tl.constexpr, SDTYPE: tl.constexpr, ZERO: tl.constexpr, ZDTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Of a `coded_tile`: Σ_J weight[J] W[e][n0:n0+BN, bytes k0:k0+BB] · v[row[J]], apart for each group: [BN, BB / GROUP]."""
    J: tl.constexpr = b.shape[0]
    BN: tl.constexpr = b.shape[1]
    BB: tl.constexpr = b.shape[2]
    GROUPS: tl.constexpr = BB // GROUP
    PER: tl.constexpr = 2 if PACKED else 1
    at_n = n0 + tl.arange(0, BN)
    first, second = _vector(v, row, k0, k, live, BB, PACKED)
    if PACKED:
        lo, hi = halves(b, table, KIND, HIGH, ASSEMBLY)
        product = lo.to(tl.float32) * first[:, None, :] + hi.to(tl.float32) * second[:, None, :]
    else:
        product = number(b, KIND, NATIVE) * first[:, None, :]
    part = tl.sum(product.reshape(J, BN, GROUPS, GROUP), 3)
    g = k0 // GROUP + tl.arange(0, GROUPS)
    column = g if COLUMNS == GROUP * PER else block_of(g * (GROUP * PER), COLUMNS)
    place = (block_of(at_n * STEP + FIRST, ROWS) * scale_n)[:, None] + (column * scale_k)[None, :]
    inside = live[:, None, None] & ((at_n < n)[:, None] & (g < tl.cdiv(k, GROUP * PER))[None, :])[None, :, :]
    if ZERO or KIND == NUMBER:
        total = tl.sum((first + second if PACKED else first).reshape(J, 1, GROUPS, GROUP), 3)
        part += offset * total
        if ZERO:
            z = base_of(zeros, e, scale_e, WEIGHTS, ZDTYPE)[:, None, None] + place[None, :, :]
            part -= tl.load(z, mask=inside, other=0.0).to(tl.float32) * total
    if SCALE != NO_SCALE:
        s = base_of(scales, e, scale_e, WEIGHTS, SDTYPE)[:, None, None] + place[None, :, :]
        part *= scaling(tl.load(s, mask=inside, other=0), SCALE)
    return tl.sum(part * weight[:, None, None], 0)


@triton.jit
def coded_products(
    codes, scales, zeros, table, e, live, v, row, weight, n0, k0, n, k, offset,
    stride_e, stride_n, stride_k, scale_e, scale_n, scale_k, FIRST: tl.constexpr, STEP: tl.constexpr,
    WEIGHTS: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr, PACKED: tl.constexpr, HIGH: tl.constexpr, ASSEMBLY: tl.constexpr,
    SCALE: tl.constexpr, SDTYPE: tl.constexpr, ZERO: tl.constexpr, ZDTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BN: tl.constexpr, BB: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A `coded_tile` and its `coded_sums`."""
    b = coded_tile(codes, e, live, n0, k0, n, k, stride_e, stride_n, stride_k, WEIGHTS, PACKED, BN, BB, EVEN)
    return coded_sums(b, scales, zeros, table, e, live, v, row, weight, n0, k0, n, k, offset, scale_e, scale_n, scale_k, FIRST, STEP,
                      WEIGHTS, KIND, NATIVE, PACKED, HIGH, ASSEMBLY, SCALE, SDTYPE, ZERO, ZDTYPE, ROWS, COLUMNS, GROUP)  # fmt: skip


@triton.jit
def coded_pair(
    x, row, e, codes0, codes1, scales0, scales1, zeros0, zeros1, table, n0, n, k, offset,
    stride_e, stride_n, stride_k, scale_e, scale_n, scale_k,
    FIRST0: tl.constexpr, FIRST1: tl.constexpr, STEP: tl.constexpr, MODE: tl.constexpr, WEIGHTS: tl.constexpr,
    KIND: tl.constexpr, NATIVE: tl.constexpr, PACKED: tl.constexpr, HIGH: tl.constexpr, ASSEMBLY: tl.constexpr,
    SCALE: tl.constexpr, SDTYPE: tl.constexpr, ZERO: tl.constexpr, ZDTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BN: tl.constexpr, BB: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Of one expert: W_g x[row], W_u x[row] at columns n0.., or the only product twice; [BN] each. row: where x's begins."""
    PER: tl.constexpr = 2 if PACKED else 1
    e = e + tl.zeros((1,), tl.int32)
    live = e >= 0
    row = row + tl.zeros((1,), tl.int64)
    one = tl.full((1,), 1.0, tl.float32)
    g = tl.zeros((BN, BB // GROUP), tl.float32)
    u = tl.zeros((BN, BB // GROUP), tl.float32)
    for k0 in tl.range(0, tl.cdiv(k, PER), BB, loop_unroll_factor=UNROLLED):
        g += coded_products(codes0, scales0, zeros0, table, e, live, x, row, one, n0, k0, n, k, offset, stride_e, stride_n, stride_k,
                            scale_e, scale_n, scale_k, FIRST0, STEP, WEIGHTS, KIND, NATIVE, PACKED, HIGH, ASSEMBLY,
                            SCALE, SDTYPE, ZERO, ZDTYPE, ROWS, COLUMNS, BN, BB, GROUP, EVEN)  # fmt: skip
        if MODE == DUAL:
            u += coded_products(codes1, scales1, zeros1, table, e, live, x, row, one, n0, k0, n, k, offset, stride_e, stride_n, stride_k,
                                scale_e, scale_n, scale_k, FIRST1, STEP, WEIGHTS, KIND, NATIVE, PACKED, HIGH, ASSEMBLY,
                                SCALE, SDTYPE, ZERO, ZDTYPE, ROWS, COLUMNS, BN, BB, GROUP, EVEN)  # fmt: skip
    total = tl.sum(g, 1)
    return total, tl.sum(u, 1) if MODE == DUAL else total


@triton.jit
def _weight_of(weights, slot, known, WEIGHTED: tl.constexpr):
    """Routing weights of slots, 0 of those that have no expert; 1 where they went to the input."""
    if WEIGHTED:
        return tl.load(weights + slot, mask=known, other=0.0).to(tl.float32)
    else:
        return known.to(tl.float32)


@triton.jit
def coded_mixture(
    a, ids, weights, codes, scales, zeros, table, t, n0, n, k, slots_per_token, num_experts, offset,
    stride_e, stride_n, stride_k, scale_e, scale_n, scale_k,
    WEIGHTS: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr, PACKED: tl.constexpr, HIGH: tl.constexpr, ASSEMBLY: tl.constexpr,
    SCALE: tl.constexpr, SDTYPE: tl.constexpr, ZERO: tl.constexpr, ZDTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WEIGHTED: tl.constexpr, AT_ONCE: tl.constexpr,
    BN: tl.constexpr, BB: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Σ_j w[t, j] W[e_j][n0:n0+BN] · a[t·k + j] in fp32, [BN]; AT_ONCE slots have their codes under way together.

    Launched early, the first codes are asked for before the kernel before has ended: it writes no weights, and had waited for ids.
    """
    PER: tl.constexpr = 2 if PACKED else 1
    depth = tl.cdiv(tl.cdiv(k, PER), BB)
    slot, e, known = _slots(ids, t, tl.arange(0, AT_ONCE), slots_per_token, num_experts)
    first = coded_tile(codes, e, known, n0, 0, n, k, stride_e, stride_n, stride_k, WEIGHTS, PACKED, BN, BB, EVEN)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    weight = _weight_of(weights, slot, known, WEIGHTED)
    acc = coded_sums(first, scales, zeros, table, e, known, a, slot * k, weight, n0, 0, n, k, offset,
                     scale_e, scale_n, scale_k, 0, 1, WEIGHTS, KIND, NATIVE, PACKED, HIGH, ASSEMBLY,
                     SCALE, SDTYPE, ZERO, ZDTYPE, ROWS, COLUMNS, GROUP)  # fmt: skip
    for step in tl.range(1, tl.cdiv(slots_per_token, AT_ONCE) * depth, loop_unroll_factor=UNROLLED):
        slot, e, known = _slots(ids, t, step // depth * AT_ONCE + tl.arange(0, AT_ONCE), slots_per_token, num_experts)
        weight = _weight_of(weights, slot, known, WEIGHTED)
        acc += coded_products(codes, scales, zeros, table, e, known, a, slot * k, weight, n0, step % depth * BB, n, k, offset,
                              stride_e, stride_n, stride_k, scale_e, scale_n, scale_k, 0, 1, WEIGHTS, KIND, NATIVE, PACKED, HIGH, ASSEMBLY,
                              SCALE, SDTYPE, ZERO, ZDTYPE, ROWS, COLUMNS, BN, BB, GROUP, EVEN)  # fmt: skip
    return tl.sum(acc, axis=1)


@triton.jit
def up_coded(
    x, ids, weights, codes0, codes1, scales0, scales1, zeros0, zeros1, table, bias0, bias1, out,
    n: tl.constexpr, k: tl.constexpr, slots_per_token, num_experts, offset, stride_x: tl.constexpr,
    stride_e: tl.constexpr, stride_n: tl.constexpr, stride_k: tl.constexpr,
    scale_e: tl.constexpr, scale_n: tl.constexpr, scale_k: tl.constexpr, stride_be, stride_bn,
    FIRST0: tl.constexpr, FIRST1: tl.constexpr, STEP: tl.constexpr, MODE: tl.constexpr, ACT: tl.constexpr, WEIGHTS: tl.constexpr,
    KIND: tl.constexpr, NATIVE: tl.constexpr, PACKED: tl.constexpr, HIGH: tl.constexpr, ASSEMBLY: tl.constexpr,
    SCALE: tl.constexpr, SDTYPE: tl.constexpr,
    ZERO: tl.constexpr, ZDTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    BN: tl.constexpr, BB: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program per (token, slot) pair and block of columns."""
    slot = tl.program_id(0)
    n0 = tl.program_id(1) * BN
    columns = n0 + tl.arange(0, BN)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    known = tl.load(ids + slot)
    if (known >= 0) & (known < num_experts):
        g, u = coded_pair(x, (slot // slots_per_token).to(tl.int64) * stride_x, known, codes0, codes1, scales0, scales1, zeros0, zeros1,
                          table, n0, n, k, offset, stride_e, stride_n, stride_k, scale_e, scale_n, scale_k, FIRST0, FIRST1, STEP, MODE,
                          WEIGHTS, KIND, NATIVE, PACKED, HIGH, ASSEMBLY, SCALE, SDTYPE, ZERO, ZDTYPE, ROWS, COLUMNS,
                          BN, BB, GROUP, EVEN)  # fmt: skip
        if WEIGHTED:
            scale = tl.load(weights + slot).to(tl.float32)
            g, u = g * scale, u * scale
        if BIAS:
            at = known.to(tl.int64) * stride_be + columns * stride_bn
            g += tl.load(bias0 + at, mask=columns < n, other=0.0).to(tl.float32)
            if MODE == DUAL:
                u += tl.load(bias1 + at, mask=columns < n, other=0.0).to(tl.float32)
        tl.store(out + slot.to(tl.int64) * n + columns, ACT(g, u).to(out.dtype.element_ty), mask=columns < n)


@triton.jit
def down_coded(
    a, ids, weights, codes, scales, zeros, table, bias, add, out,
    n: tl.constexpr, k: tl.constexpr, slots_per_token: tl.constexpr, num_experts, offset,
    stride_e: tl.constexpr, stride_n: tl.constexpr, stride_k: tl.constexpr,
    scale_e: tl.constexpr, scale_n: tl.constexpr, scale_k: tl.constexpr, stride_be, stride_bn, stride_add,
    WEIGHTS: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr, PACKED: tl.constexpr, HIGH: tl.constexpr, ASSEMBLY: tl.constexpr,
    SCALE: tl.constexpr, SDTYPE: tl.constexpr, ZERO: tl.constexpr, ZDTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BIAS: tl.constexpr, WEIGHTED: tl.constexpr, ADD: tl.constexpr, AT_ONCE: tl.constexpr,
    BN: tl.constexpr, BB: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program per token and block of columns; AT_ONCE slots have their codes under way together."""
    t = tl.program_id(0)
    n0 = tl.program_id(1) * BN
    columns = n0 + tl.arange(0, BN)
    total = coded_mixture(a, ids, weights, codes, scales, zeros, table, t, n0, n, k, slots_per_token, num_experts, offset,
                          stride_e, stride_n, stride_k, scale_e, scale_n, scale_k, WEIGHTS, KIND, NATIVE, PACKED, HIGH, ASSEMBLY,
                          SCALE, SDTYPE, ZERO, ZDTYPE, ROWS, COLUMNS, WEIGHTED, AT_ONCE, BN, BB, GROUP, EVEN, PDL)  # fmt: skip
    if BIAS:
        total = _by_slot(total, ids, weights, bias, a, t, columns, n, slots_per_token, num_experts, 0, stride_be, stride_bn, 0,
                         True, WEIGHTED, False)  # fmt: skip
    if ADD:
        total += tl.load(add + t.to(tl.int64) * stride_add + columns, mask=columns < n, other=0.0).to(tl.float32)
    tl.store(out + t.to(tl.int64) * n + columns, total.to(out.dtype.element_ty), mask=columns < n)
