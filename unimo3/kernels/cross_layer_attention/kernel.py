"""Triton kernels of cross-layer attention: fp16, bf16 and float32 in and out, sums in float32.

    C_i = softmax(q K_i^T / sqrt(d) + padding) V_i          out = sum_i g_i C_i

Forward walks all levels of a block of queries in one program: an online softmax a level, the gate in registers, and the
log-sum-exp (base 2) of each level as the one thing kept. Backward makes the probabilities P_i again from it, in two
kernels without atomics, so two runs give the same bits:

    dP_i = r o (dO V_i^T)            dg_i = D_i = sum_j P_ij dP_ij
    dq   = scale sum_i g_i (sum_j P_ij (dP_ij - c) k_j - (D_i - c) sum_j P_ij k_j)
    dS_i = g_i P_i o (dP_i - D_i)    dk_i = scale dS_i^T q             dv_i = (g_i r o P_i)^T dO

r is dropout's mask over 1 - p, the same at all levels. dq takes one pass over the keys, in which D_i is found as well.
Any c gives the same sum; the mean over the first block of keys is near D_i, so that little cancels in half precision.

A level is a tensor of its own, of any strides; a program unrolls them. Levels may differ in length. A level without a
readable key gives zeros.

Source: FlashAttention-2, arXiv 2307.08691, for online softmax and log-sum-exp; Philox by triton.language.rand.
"""

# Shapes: B batch, H heads, T queries, V keys of a level, S levels, d head width. Tables are [queries, keys] blocks.

import triton
import triton.language as tl


@triton.jit
def _kept(seed, pair, t, v, num_keys, dropout_p):
    """Dropout's mask over 1 - p for queries t and keys v of a (sample, head) pair: a function of the place alone."""
    # The pair has a counter of its own: 64-bit counters would take twice the registers.
    drawn, _, _, _ = tl.philox(seed, t * num_keys + v, pair.to(tl.int32), 0, 0)
    return tl.where(tl.uint_to_uniform_float(drawn) >= dropout_p, 1.0 / (1.0 - dropout_p), 0.0)


@triton.jit
def _load_rows(start, rows, row_stride, columns, num_rows, WIDTH: tl.constexpr):
    """[rows, columns] of a matrix with dense rows; zeros outside."""
    inside = (rows[:, None] < num_rows) & (columns[None, :] < WIDTH)
    return tl.load(start + rows[:, None].to(tl.int64) * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _readable(mask, v, num_keys, HAS_MASK: tl.constexpr):
    """Which keys v exist and may be read."""
    inside = v < num_keys
    if HAS_MASK:
        inside = inside & (tl.load(mask + v, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _of_level(values, level, LEVELS: tl.constexpr):
    """The entry of a tuple at a place known at run time alone: unrolled loops over levels would spill."""
    chosen = values[0]
    for place in tl.static_range(1, LEVELS):
        chosen = tl.where(level == place, values[place], chosen)
    return chosen


@triton.jit
def _level_rows(starts, strides, level, sample, head, LEVELS: tl.constexpr):
    """Where a level's matrix of this (sample, head) starts, and its row stride."""
    batch_stride, head_stride, row_stride = strides[0][0], strides[0][1], strides[0][2]
    for place in tl.static_range(1, LEVELS):
        batch_stride = tl.where(level == place, strides[place][0], batch_stride)
        head_stride = tl.where(level == place, strides[place][1], head_stride)
        row_stride = tl.where(level == place, strides[place][2], row_stride)
    return _of_level(starts, level, LEVELS) + sample * batch_stride + head * head_stride, row_stride


@triton.jit
def _open_level(
    ks, vs, masks, lengths, k_strides, v_strides, mask_strides, level, sample, head, LEVELS: tl.constexpr
):  # fmt: skip
    """A level's keys and values for this (sample, head), each with its row stride, its mask, and its number of keys."""
    k, k_row = _level_rows(ks, k_strides, level, sample, head, LEVELS)
    v, v_row = _level_rows(vs, v_strides, level, sample, head, LEVELS)
    mask = _of_level(masks, level, LEVELS) + sample * _of_level(mask_strides, level, LEVELS)
    return k, k_row, v, v_row, mask, _of_level(lengths, level, LEVELS)


@triton.jit
def _shares(gate, strides, sample, t, head, level, num_queries, HAS_GATE: tl.constexpr, LEVELS: tl.constexpr):
    """How much a level counts for queries t."""
    if HAS_GATE:
        place = sample * strides[0] + t * strides[1] + head * strides[2] + level * strides[3]
        shares = tl.load(gate + place, mask=t < num_queries, other=0.0).to(tl.float32)
    else:
        shares = tl.full(t.shape, 1.0 / LEVELS, dtype=tl.float32)
    return shares


@triton.jit
def cross_layer_attention_fwd_kernel(
    q, ks, vs, gate, masks, out, lse,
    q_strides, k_strides, v_strides, gate_strides, mask_strides, out_strides,
    lengths, longest, num_heads, num_queries, scale, seed, dropout_p,
    LEVELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T queries of one (sample, head), all levels. lse is [B, H, S, T], dense."""
    pair = tl.program_id(0).to(tl.int64)
    sample, head = pair // num_heads, pair % num_heads
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_D)
    in_queries = t < num_queries
    queries = _load_rows(q + sample * q_strides[0] + head * q_strides[1], t, q_strides[2], columns, num_queries, WIDTH)
    result = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for level in range(LEVELS):
        k, k_row, v, v_row, mask, num_keys = _open_level(
            ks, vs, masks, lengths, k_strides, v_strides, mask_strides, level, sample, head, LEVELS
        )
        most = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_T], dtype=tl.float32)
        mixed = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
        for first in range(0, num_keys, BLOCK_V):
            rows = first + tl.arange(0, BLOCK_V)
            keys = _load_rows(k, rows, k_row, columns, num_keys, WIDTH)
            values = _load_rows(v, rows, v_row, columns, num_keys, WIDTH)
            readable = _readable(mask, rows, num_keys, HAS_MASK)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * 1.4426950408889634)
            scores = tl.where(readable[None, :], scores, float("-inf"))
            new_most = tl.maximum(most, tl.max(scores, 1))
            # Where nothing was readable yet, the difference of two infinities would be no number.
            base = tl.where(new_most == float("-inf"), 0.0, new_most)
            weights = tl.exp2(scores - base[:, None])
            shrunk = tl.exp2(most - base)
            total = total * shrunk + tl.sum(weights, 1)
            if DROPOUT:
                weights *= _kept(tl.load(seed), pair, t[:, None], rows[None, :], longest, dropout_p)
            mixed = tl.dot(weights.to(values.dtype), values, acc=mixed * shrunk[:, None], input_precision=PRECISION)
            most = new_most
        some = total > 0
        shares = _shares(gate, gate_strides, sample, t, head, level, num_queries, HAS_GATE, LEVELS)
        result += mixed * (shares / tl.where(some, total, 1.0))[:, None]
        place = (pair * LEVELS + level) * num_queries + t
        tl.store(lse + place, tl.where(some, most + tl.log2(tl.where(some, total, 1.0)), 0.0), mask=in_queries)
    start = out + sample * out_strides[0] + head * out_strides[1]
    inside = in_queries[:, None] & (columns[None, :] < WIDTH)
    place = start + t[:, None].to(tl.int64) * out_strides[2] + columns[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def cross_layer_attention_bwd_query_kernel(
    q, ks, vs, gate, masks, grad_out, lse, grad_q, offsets,
    q_strides, k_strides, v_strides, gate_strides, mask_strides, grad_out_strides, grad_q_strides,
    lengths, longest, num_heads, num_queries, scale, seed, dropout_p,
    LEVELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: grad_q and D of BLOCK_T queries. offsets, which is D and the gate's gradient, is [B, H, S, T]."""
    pair = tl.program_id(0).to(tl.int64)
    sample, head = pair // num_heads, pair % num_heads
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_D)
    in_queries = t < num_queries
    queries = _load_rows(q + sample * q_strides[0] + head * q_strides[1], t, q_strides[2], columns, num_queries, WIDTH)
    start = grad_out + sample * grad_out_strides[0] + head * grad_out_strides[1]
    slopes = _load_rows(start, t, grad_out_strides[2], columns, num_queries, WIDTH)
    result = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for level in range(LEVELS):
        k, k_row, v, v_row, mask, num_keys = _open_level(
            ks, vs, masks, lengths, k_strides, v_strides, mask_strides, level, sample, head, LEVELS
        )
        saved = tl.load(lse + (pair * LEVELS + level) * num_queries + t, mask=in_queries, other=0.0)
        centre = tl.zeros([BLOCK_T], dtype=tl.float32)
        offset = tl.zeros([BLOCK_T], dtype=tl.float32)
        seen = tl.zeros([BLOCK_T], dtype=tl.float32)
        sloped = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
        plain = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
        for first in range(0, num_keys, BLOCK_V):
            rows = first + tl.arange(0, BLOCK_V)
            keys = _load_rows(k, rows, k_row, columns, num_keys, WIDTH)
            values = _load_rows(v, rows, v_row, columns, num_keys, WIDTH)
            readable = _readable(mask, rows, num_keys, HAS_MASK)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * 1.4426950408889634)
            weights = tl.where(readable[None, :], tl.exp2(scores - saved[:, None]), 0.0)
            slope = tl.dot(slopes, tl.trans(values), input_precision=PRECISION)
            if DROPOUT:
                slope *= _kept(tl.load(seed), pair, t[:, None], rows[None, :], longest, dropout_p)
            if first == 0:
                weight = tl.sum(weights, 1)
                centre = tl.sum(weights * slope, 1) / tl.where(weight > 0, weight, 1.0)
            centred = weights * (slope - centre[:, None])
            offset += tl.sum(centred, 1)
            seen += tl.sum(weights, 1)
            sloped = tl.dot(centred.to(keys.dtype), keys, acc=sloped, input_precision=PRECISION)
            plain = tl.dot(weights.to(keys.dtype), keys, acc=plain, input_precision=PRECISION)
        shares = _shares(gate, gate_strides, sample, t, head, level, num_queries, HAS_GATE, LEVELS)
        result += (sloped - offset[:, None] * plain) * shares[:, None]
        place = (pair * LEVELS + level) * num_queries + t
        # Of a level without a readable key the weights sum to zero, and so does D.
        tl.store(offsets + place, offset + centre * seen, mask=in_queries)
    start = grad_q + sample * grad_q_strides[0] + head * grad_q_strides[1]
    inside = in_queries[:, None] & (columns[None, :] < WIDTH)
    place = start + t[:, None].to(tl.int64) * grad_q_strides[2] + columns[None, :]
    tl.store(place, (result * scale).to(grad_q.dtype.element_ty), mask=inside)


@triton.jit
def cross_layer_attention_bwd_key_kernel(
    q, ks, vs, gate, masks, grad_out, lse, offsets, grad_ks, grad_vs,
    q_strides, k_strides, v_strides, gate_strides, mask_strides, grad_out_strides,
    lengths, longest, num_heads, num_queries, scale, seed, dropout_p,
    LEVELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: grad_k and grad_v of BLOCK_V keys, for all levels in turn; both are dense [B, H, V, d] a level."""
    pair = tl.program_id(0).to(tl.int64)
    sample, head = pair // num_heads, pair % num_heads
    rows = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = tl.arange(0, BLOCK_D)
    q_start = q + sample * q_strides[0] + head * q_strides[1]
    slope_start = grad_out + sample * grad_out_strides[0] + head * grad_out_strides[1]
    for level in range(LEVELS):
        k, k_row, v, v_row, mask, num_keys = _open_level(
            ks, vs, masks, lengths, k_strides, v_strides, mask_strides, level, sample, head, LEVELS
        )
        keys = _load_rows(k, rows, k_row, columns, num_keys, WIDTH)
        values = _load_rows(v, rows, v_row, columns, num_keys, WIDTH)
        readable = _readable(mask, rows, num_keys, HAS_MASK)
        grad_key = tl.zeros([BLOCK_V, BLOCK_D], dtype=tl.float32)
        grad_value = tl.zeros([BLOCK_V, BLOCK_D], dtype=tl.float32)
        for first in range(0, num_queries, BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)
            in_queries = t < num_queries
            queries = _load_rows(q_start, t, q_strides[2], columns, num_queries, WIDTH)
            slopes = _load_rows(slope_start, t, grad_out_strides[2], columns, num_queries, WIDTH)
            place = (pair * LEVELS + level) * num_queries + t
            saved = tl.load(lse + place, mask=in_queries, other=0.0)
            offset = tl.load(offsets + place, mask=in_queries, other=0.0)
            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * 1.4426950408889634)
            weights = tl.exp2(scores - saved[None, :])
            weights = tl.where(readable[:, None] & in_queries[None, :], weights, 0.0)
            slope = tl.dot(values, tl.trans(slopes), input_precision=PRECISION)
            shares = _shares(gate, gate_strides, sample, t, head, level, num_queries, HAS_GATE, LEVELS)
            gated = weights * shares[None, :]
            mixed = gated
            if DROPOUT:
                kept = _kept(tl.load(seed), pair, t[None, :], rows[:, None], longest, dropout_p)
                slope *= kept
                mixed = gated * kept
            grad_value = tl.dot(mixed.to(slopes.dtype), slopes, acc=grad_value, input_precision=PRECISION)
            change = gated * (slope - offset[None, :])
            grad_key = tl.dot(change.to(queries.dtype), queries, acc=grad_key, input_precision=PRECISION)
        inside = (rows[:, None] < num_keys) & (columns[None, :] < WIDTH)
        place = (pair * num_keys + rows[:, None]) * WIDTH + columns[None, :]
        grad_k, grad_v = _of_level(grad_ks, level, LEVELS), _of_level(grad_vs, level, LEVELS)
        tl.store(grad_k + place, (grad_key * scale).to(keys.dtype), mask=inside)
        tl.store(grad_v + place, grad_value.to(values.dtype), mask=inside)
