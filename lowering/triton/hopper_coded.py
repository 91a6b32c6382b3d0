"""The grouped GEMM for many rows on weights in few bits on Hopper, by hand (Gluon): `hopper`'s kernel with two warp groups that decode.

    producer (4 warps)      claims a tile; codes by TMA into a ring of their own, rows into the ring of stages
    decoder 0, 1 (4 each)   codes -> bf16 in the ring of stages, with their scales, ahead of the products; they take steps in turns
    consumer 0, 1 (4 each)  `hopper`'s

So a tile is multiplied while the next one is decoded. A number is code times scale with one rounding. Tiles have 128 rows; matrices are
[n, k], rows bf16; a step of 64 of depth has one scale a row of the matrix (e4m3), or two of 2^(b - 127) (e2m1, blocks of 32).
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .codes_kernels import _E2M1
from .hopper_consumer import DUAL, INTERLEAVED, consume
from .hopper_producer import produce
from .hopper_tiles import HALF_ROWS, channel, eights, hear

# Eight e4m3 bytes to bf16, times hi + lo. A byte's digits are a bf16 of 2^-120 times the value. A NaN code is NaN for the seven beside it
# as well: they are of the same row of the matrix, whose products are all NaN
_E4M3 = gl.constexpr("""{ .reg .b32 t, m, c, z; .reg .pred p; mov.b32 z, 0;
and.b32 t, $4, 0x7F7F7F7F; add.u32 t, t, 0x01010101; and.b32 m, $5, 0x7F7F7F7F; add.u32 m, m, 0x01010101;
or.b32 t, t, m; and.b32 t, t, 0x80808080; setp.ne.u32 p, t, 0; selp.b32 c, 0x7FC07FC0, 0x7B807B80, p;
prmt.b32 t, $4, z, 0x1404; shr.u32 m, t, 4; and.b32 m, m, 0x07F007F0; lop3.b32 m, t, 0x80008000, m, 0xEA;
mul.bf16x2 m, m, c; mul.bf16x2 t, m, $10; fma.rn.bf16x2 $0, m, $6, t;
prmt.b32 t, $4, z, 0x3424; shr.u32 m, t, 4; and.b32 m, m, 0x07F007F0; lop3.b32 m, t, 0x80008000, m, 0xEA;
mul.bf16x2 m, m, c; mul.bf16x2 t, m, $10; fma.rn.bf16x2 $1, m, $6, t;
prmt.b32 t, $5, z, 0x1404; shr.u32 m, t, 4; and.b32 m, m, 0x07F007F0; lop3.b32 m, t, 0x80008000, m, 0xEA;
mul.bf16x2 m, m, c; mul.bf16x2 t, m, $10; fma.rn.bf16x2 $2, m, $6, t;
prmt.b32 t, $5, z, 0x3424; shr.u32 m, t, 4; and.b32 m, m, 0x07F007F0; lop3.b32 m, t, 0x80008000, m, 0xEA;
mul.bf16x2 m, m, c; mul.bf16x2 t, m, $10; fma.rn.bf16x2 $3, m, $6, t; }""")


@gluon.jit
def _power(b):
    """2^(b - 127) in bf16; 255 is no number."""
    bits = gl.where(b == 255, 0x7FC0, gl.where(b == 0, 0x0040, b.to(gl.int32) << 7))
    return bits.to(gl.int16).to(gl.bfloat16, bitcast=True)


@gluon.jit
def _decoded(codes, s, PACKED: gl.constexpr):
    """bf16 [BN, 64] of a block of codes in shared memory and its scales: [BN] for bytes, [BN, 2] for half bytes."""
    BN: gl.constexpr = codes.shape[0]
    if PACKED:
        three: gl.constexpr = gl.BlockedLayout([1, 1, 16], [16, 2, 1], [4, 1, 1], [2, 1, 0])
        b = codes.load(gl.BlockedLayout([1, 16], [16, 2], [4, 1], [1, 0]))
        b = gl.convert_layout(gl.reshape(b, [BN, 2, 16]), three, assert_trivial=True)
        lo, hi = gl.inline_asm_elementwise(_E2M1, "=r,=r,=r,=r,r", [b], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=4)
        scale = gl.expand_dims(_power(s), 2)
        return gl.reshape(gl.join(lo * scale, hi * scale), [BN, 64])
    else:
        layout: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
        b = codes.load(layout)
        high = s.to(gl.bfloat16)
        low = (s - high.to(gl.float32)).to(gl.bfloat16)
        wide, fine = (gl.expand_dims(high, 1).broadcast_to(b.shape), gl.expand_dims(low, 1).broadcast_to(b.shape))
        return gl.inline_asm_elementwise(_E4M3, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [b, wide, fine], dtype=gl.bfloat16, is_pure=True, pack=8)


@gluon.jit
def _scale_rows(scales, e, row, n, scale_e, scale_n, FIRST: gl.constexpr, STEP: gl.constexpr, ROWS: gl.constexpr):
    """(pointers to the first scale of each row of a block, which rows there are)."""
    at = row * STEP + FIRST
    if ROWS == 0:
        at = at * 0
    else:
        at = at // ROWS
    return scales + e.to(gl.int64) * scale_e + at * scale_n, row < n


@gluon.jit
def _scales_at(pointers, live, k, steps, scale_k, BLOCK: gl.constexpr, PACKED: gl.constexpr):
    """The scales of step k, of the last one beyond it."""
    k = gl.minimum(k, steps - 1)
    if PACKED:
        three: gl.constexpr = gl.BlockedLayout([1, 1, 16], [16, 2, 1], [4, 1, 1], [2, 1, 0])
        pair: gl.constexpr = gl.SliceLayout(2, three)
        half = gl.arange(0, 2, layout=gl.SliceLayout(0, pair))
        at = gl.expand_dims(pointers, 1) + gl.expand_dims((k * 2 + half) * scale_k, 0)
        return gl.load(at, mask=gl.expand_dims(live, 1), other=0)
    else:
        at = k * 0 if BLOCK == 0 else k // BLOCK
        return gl.load(pointers + at * scale_k, mask=live, other=0.0).to(gl.float32)


@gluon.jit
def _decode(
    scales0, scales1, steps, n, scale_e, scale_n, scale_k, ring_c, ring_w, full_c, empty_c, full, empty, news, told, heard,
    TURN: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr, NEXT: gl.constexpr, FIRST0: gl.constexpr, FIRST1: gl.constexpr,
    STEP: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """The weights of every second step, in the order in which the producer asks for codes.

    A step's scales are asked for behind the fence of the one before it, which waits for every load under way.
    """
    CODES: gl.constexpr = ring_c.shape[0] // 2
    BN: gl.constexpr = ring_c.shape[1]
    three: gl.constexpr = gl.BlockedLayout([1, 1, 16], [16, 2, 1], [4, 1, 1], [2, 1, 0])
    two: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    rows_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, three) if PACKED else two)
    at_n = gl.arange(0, BN, layout=rows_layout)
    before = 0  # steps of the tiles before
    number = 0
    e, first, _, block, _ = hear(news, told, heard, number)
    while first >= 0:
        row = block * WIDE + at_n
        from0, live0 = _scale_rows(scales0, e, row, n, scale_e, scale_n, FIRST0, STEP, ROWS)
        from1, live1 = _scale_rows(scales1, e, row + NEXT, n, scale_e, scale_n, FIRST1, STEP, ROWS)
        mine = (before + TURN) % 2
        s0 = _scales_at(from0, live0, mine, steps, scale_k, BLOCK, PACKED)
        s1 = _scales_at(from1, live1, mine, steps, scale_k, BLOCK, PACKED)
        for k in range(mine, steps, 2):
            c = (before + k) % CODES
            s = (before + k) % STAGES
            # in this order: a free stage tells that the other decoder has done its step, and that the codes' barrier is in the phase before
            mbarrier.wait(empty.index(s), (((before + k) // STAGES) & 1) ^ 1)
            mbarrier.wait(full_c.index(c), ((before + k) // CODES) & 1)
            ring_w.index(2 * s).store(_decoded(ring_c.index(2 * c), s0, PACKED))
            ring_w.index(2 * s + 1).store(_decoded(ring_c.index(2 * c + 1), s1, PACKED))
            fence_async_shared()
            mbarrier.arrive(full.index(s))
            mbarrier.arrive(empty_c.index(c))
            s0 = _scales_at(from0, live0, k + 2, steps, scale_k, BLOCK, PACKED)
            s1 = _scales_at(from1, live1, k + 2, steps, scale_k, BLOCK, PACKED)
        before += steps
        number += 1
        e, first, _, block, _ = hear(news, told, heard, number)


@gluon.jit(do_not_specialize=["num_slots"])
def coded_gemm(
    a, a_tma, codes0, codes1, scales0, scales1, bias0, bias1, row_weights, out, out_tma, order, offsets, tiles, tile_starts, num_tiles,
    counter, num_slots, n, k, slots_per_token, rows_per_expert, stride_a, scale_e, scale_n, scale_k, stride_be, stride_bn, stride_out,
    MODE: gl.constexpr, ACT: gl.constexpr, GATHER: gl.constexpr, BIAS: gl.constexpr, WEIGHTED: gl.constexpr,
    FIRST0: gl.constexpr, FIRST1: gl.constexpr, STEP: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, CODES: gl.constexpr, GROUP: gl.constexpr, EVEN_K: gl.constexpr,
):  # fmt: skip
    """As `hopper.grouped_gemm`, tiles of 128 rows and two blocks of BN columns. `codes0`, `codes1`: descriptors, boxes of 64 or 32 bytes.

    `scales0`, `scales1`: of the first matrix of each part; a row's scale i lies at (row · STEP + FIRST) // ROWS (0: the first), i by
    steps // BLOCK (0: the first), or two a step. CODES: stages of codes.
    """
    n, k = eights(n), eights(k)
    stride_a, stride_out = eights(stride_a), eights(stride_out)
    DTYPE: gl.constexpr = out.dtype.element_ty
    BM: gl.constexpr = 2 * HALF_ROWS
    BK: gl.constexpr = 64
    PACKED: gl.constexpr = codes0.block_shape[1] < BK
    GATED: gl.constexpr = (MODE == DUAL) | (MODE == INTERLEAVED)
    ring_a = gl.allocate_shared_memory(DTYPE, [STAGES, BM, BK], gl.NVMMASharedLayout.get_default_for([BM, BK], DTYPE))
    ring_w = gl.allocate_shared_memory(DTYPE, [2 * STAGES, BN, BK], gl.NVMMASharedLayout.get_default_for([BN, BK], DTYPE))
    ring_c = gl.allocate_shared_memory(gl.uint8, [2 * CODES] + codes0.block_shape, codes0.layout)
    stages_out = gl.allocate_shared_memory(DTYPE, [2] + out_tma.block_shape, out_tma.layout)
    news, told, heard = channel(4)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full_c = gl.allocate_shared_memory(gl.int64, [CODES, 1], mbarrier.MBarrierLayout())
    empty_c = gl.allocate_shared_memory(gl.int64, [CODES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=129 if GATHER else 2)  # rows: every producer thread's copies, or bytes; weights: a decoder
        mbarrier.init(empty.index(s), count=2)
    for s in gl.static_range(CODES):
        mbarrier.init(full_c.index(s), count=1)
        mbarrier.init(empty_c.index(s), count=1)
    fence_async_shared()
    WIDE: gl.constexpr = BN if MODE == DUAL else 2 * BN
    NEXT: gl.constexpr = 0 if MODE == DUAL else BN
    blocks = gl.cdiv(n, BN if GATED else 2 * BN)
    steps = gl.cdiv(k, BK)
    rows = 2 * n if MODE == INTERLEAVED else n
    gl.static_assert(CODES <= STAGES)
    gl.warp_specialize([
        (consume, (bias0, bias1, row_weights, out, out_tma, None, None, None, order, steps, n,
                   stride_be, stride_bn, stride_out, 0, ring_a, ring_w, stages_out, full, empty, news, told, heard,
                   0, True, GATHER, MODE, ACT, False, BIAS, WEIGHTED, BN, 1, True)),
        (consume, (bias0, bias1, row_weights, out, out_tma, None, None, None, order, steps, n,
                   stride_be, stride_bn, stride_out, 0, ring_a, ring_w, stages_out, full, empty, news, told, heard,
                   1, True, GATHER, MODE, ACT, False, BIAS, WEIGHTED, BN, 1, True)),
        (produce, (a, a_tma, codes0, codes1, order, offsets, None, tiles, tile_starts, num_tiles, counter, num_slots, blocks, steps, k,
                   slots_per_token, stride_a, rows_per_expert, ring_a, ring_c, full, empty, full_c, empty_c, news, told, heard,
                   EVEN_K, WIDE, NEXT, True, GATHER, 0, GROUP, 1, 1)),
        (_decode, (scales0, scales1, steps, rows, scale_e, scale_n, scale_k, ring_c, ring_w, full_c, empty_c, full, empty,
                   news, told, heard, 0, STAGES, WIDE, NEXT, FIRST0, FIRST1, STEP, ROWS, BLOCK, PACKED)),
        (_decode, (scales0, scales1, steps, rows, scale_e, scale_n, scale_k, ring_c, ring_w, full_c, empty_c, full, empty,
                   news, told, heard, 1, STAGES, WIDE, NEXT, FIRST0, FIRST1, STEP, ROWS, BLOCK, PACKED)),
    ], [4, 4, 4, 4], [160, 48, 56, 56])  # fmt: skip
