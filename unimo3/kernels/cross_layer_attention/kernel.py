"""Triton kernels of cross-layer attention: fp16, bf16 and float32 in and out, sums in float32.

    C_i = softmax(q K_i^T / sqrt(d) + padding) V_i          out = sum_i g_i (r o P_i) V_i

Forward reads all levels of a block of queries in one program: a softmax a level, the gate in registers, and the
log-sum-exp (base 2) of each level as the one thing saved. Backward computes the probabilities P_i from it, without
atomics, so two runs give the same bits:

    dP_i = r o (dO V_i^T)            dg_i = D_i = sum_j P_ij dP_ij
    dS_i = g_i P_i o (dP_i - D_i)    dq = scale sum_i dS_i K_i
    dk_i = scale dS_i^T q            dv_i = (g_i r o P_i)^T dO

r is dropout's mask over 1 - p, the same at all levels. Which kernels run, by the lengths, is in blocks.py:

- `forward` and `backward_query` take any lengths. `backward_query` finds D and dq in one pass over the keys:
  dq = scale sum_i g_i (sum_j P_ij (dP_ij - c) k_j - (D_i - c) sum_j P_ij k_j). Any c gives the same sum; the mean over
  the first block of keys is near D_i, so that little cancels in half precision.
- `forward_short` and `backward_query_short` take levels of one length whose keys are one block. Their one loop runs
  over levels, so that the next level is copied while this one is computed, and D is exact.
- `backward_key` has a program for each level and block of keys.
- `backward_fused` takes queries that are one block. A program reads its keys twice: for D, and for all gradients.

A level is one tensor with keys and values as a linear map gives them. A level without a readable key gives zeros.

Source: FlashAttention-2, arXiv 2307.08691, for online softmax, log-sum-exp and D.
"""

# Shapes: B batch, H heads, T queries, V keys of a level, S levels, d head width. q, out and their gradients are
# [B, T, H, d]; a level and its gradient are [B, V, 2, H, d]; the gate is [B, T, H, S]; a mask is [B, V]; lse and
# offsets are [B, H, S, T]; dropout's bits are [B, H, words], 32 a word: of each query, then of each key. All are
# contiguous.

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _program(num_blocks, num_heads):
    """This program's (sample, head) pair, sample, head and block. Blocks of a pair run together, as they share keys."""
    program = tl.program_id(0)
    pair = program // num_blocks
    return pair.to(tl.int64), (pair // num_heads).to(tl.int64), pair % num_heads, program % num_blocks


@triton.jit
def _offsets(rows, row_stride, num_rows, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets [rows, columns] of a matrix with dense rows, and which exist. A sample has less than 2^31 elements."""
    columns = tl.arange(0, BLOCK_D)
    inside = rows[:, None] < num_rows
    if WIDTH < BLOCK_D:
        inside = inside & (columns[None, :] < WIDTH)
    return rows[:, None] * row_stride + columns[None, :], inside


@triton.jit
def _load_rows(start, rows, row_stride, num_rows, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, columns] of such a matrix; zeros outside."""
    offsets, inside = _offsets(rows, row_stride, num_rows, WIDTH, BLOCK_D)
    return tl.load(start + offsets, mask=inside, other=0.0)


@triton.jit
def _store_rows(start, rows, row_stride, num_rows, values, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    offsets, inside = _offsets(rows, row_stride, num_rows, WIDTH, BLOCK_D)
    tl.store(start + offsets, values.to(start.dtype.element_ty), mask=inside)


@triton.jit
def _readable(mask, keys, num_keys, HAS_MASK: tl.constexpr):
    """Which keys exist and may be read."""
    inside = keys < num_keys
    if HAS_MASK:
        inside = inside & (tl.load(mask + keys, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _of_level(values, level, LEVELS: tl.constexpr):
    """The entry of a tuple at an index known at run time alone: unrolled loops over levels would spill."""
    chosen = values[0]
    for index in tl.static_range(1, LEVELS):
        chosen = tl.where(level == index, values[index], chosen)
    return chosen


@triton.jit
def _open_level(kvs, masks, lengths, level, sample, head, num_heads, WIDTH: tl.constexpr, LEVELS: tl.constexpr):
    """A level's keys and values for this (sample, head), its mask, and its number of keys."""
    num_keys = _of_level(lengths, level, LEVELS)
    keys = _of_level(kvs, level, LEVELS) + (sample * num_keys * 2 * num_heads + head) * WIDTH
    return keys, keys + num_heads * WIDTH, _of_level(masks, level, LEVELS) + sample * num_keys, num_keys


@triton.jit
def _gates(gate, sample, t, head, level, num_heads, num_queries, HAS_GATE: tl.constexpr, LEVELS: tl.constexpr):
    """The gate of a level for queries t."""
    if HAS_GATE:
        start = gate + (sample * num_queries * num_heads + head) * LEVELS + level + t * (num_heads * LEVELS)
        gates = tl.load(start, mask=t < num_queries, other=0.0).to(tl.float32)
    else:
        gates = tl.full(t.shape, 1.0 / LEVELS, dtype=tl.float32)
    return gates


@triton.jit
def _test_bits(words, rows, num_rows, num_words, first, BLOCK: tl.constexpr):
    """[rows, BLOCK] bits from `first` on, of `num_words` words a row. `first` is a multiple of the block."""
    columns = tl.arange(0, BLOCK)
    start, inside = words + rows * num_words + first // 32, rows < num_rows
    word = tl.load(start, mask=inside, other=0)[:, None]
    if BLOCK > 32:
        # The number of words is even.
        tl.static_assert(BLOCK == 64)
        word = tl.where(columns[None, :] < 32, word, tl.load(start + 1, mask=inside, other=0)[:, None])
    return (word & (1 << (first + columns) % 32)[None, :]) != 0


@triton.jit
def _retained(bits, pair, t, first, num_queries, longest, BLOCK_V: tl.constexpr):
    """Which keys, from `first` on, dropout retains for queries t: [queries, keys]."""
    words = tl.cdiv(longest, 64) * 2
    words_of_pair = num_queries * words + words * 32 * (tl.cdiv(num_queries, 64) * 2)
    return _test_bits(bits + pair * words_of_pair, t, num_queries, words, first, BLOCK_V)


@triton.jit
def _retained_by(bits, pair, keys, first, num_queries, longest, BLOCK_T: tl.constexpr):
    """The queries, from `first` on, for which dropout retains these keys: [keys, queries]."""
    words, words_by_key = tl.cdiv(longest, 64) * 2, tl.cdiv(num_queries, 64) * 2
    start = bits + pair * (num_queries * words + words * 32 * words_by_key) + num_queries * words
    return _test_bits(start, keys, words * 32, words_by_key, first, BLOCK_T)


@triton.jit
def draw_bits_kernel(bits, seed, longest, num_queries, pairs, threshold, BLOCK: tl.constexpr):
    """Dropout's bits of all pairs: by query [T, W], then by key [32 W, ...]; dropout.py has the function."""
    words, words_by_key = tl.cdiv(longest, 64) * 2, tl.cdiv(num_queries, 64) * 2
    words_of_pair = num_queries * words + words * 32 * words_by_key
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pair, word = index // words_of_pair, (index % words_of_pair).to(tl.int32)
    by_key = word >= num_queries * words
    word = tl.where(by_key, word - num_queries * words, word)
    per_row = tl.where(by_key, words_by_key, words)
    row, first = word // per_row, (word % per_row) * 32
    seeds = tl.load(seed)
    low, high = seeds.to(tl.uint32), (seeds >> 32).to(tl.uint32)
    of_pair = _mixed(pair.to(tl.uint32) + low)
    drawn = tl.zeros([BLOCK], dtype=tl.uint32)
    for bit in tl.static_range(32):
        key = tl.where(by_key, row, first + bit).to(tl.uint32)
        query = tl.where(by_key, first + bit, row).to(tl.uint32)
        drawn = drawn | ((_mixed(_mixed((of_pair ^ key) + high) ^ query) >= threshold).to(tl.uint32) << bit)
    tl.store(bits + index, drawn.to(tl.int32, bitcast=True), mask=pair < pairs)


@triton.jit
def _mixed(x):
    """Wellons' lowbias32: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def forward_kernel(
    q, kvs, gate, masks, bits, out, lse,
    lengths, longest, num_heads, num_queries, scale, dropout_p,
    LEVELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T queries of one (sample, head), all levels."""
    pair, sample, head, block = _program(tl.cdiv(num_queries, BLOCK_T), num_heads)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    row, pair_start = num_heads * WIDTH, (sample * num_queries * num_heads + head) * WIDTH
    queries = _load_rows(q + pair_start, t, row, num_queries, WIDTH, BLOCK_D)
    result = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for level in range(LEVELS):
        k, v, mask, num_keys = _open_level(kvs, masks, lengths, level, sample, head, num_heads, WIDTH, LEVELS)
        most = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_T], dtype=tl.float32)
        mixed = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
        for first in range(0, num_keys, BLOCK_V):
            rows = first + tl.arange(0, BLOCK_V)
            keys = _load_rows(k, rows, 2 * row, num_keys, WIDTH, BLOCK_D)
            values = _load_rows(v, rows, 2 * row, num_keys, WIDTH, BLOCK_D)
            readable = _readable(mask, rows, num_keys, HAS_MASK)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            scores = tl.where(readable[None, :], scores, float("-inf"))
            new_most = tl.maximum(most, tl.max(scores, 1) * (scale * LOG2_E))
            # Where nothing was readable yet, the difference of two infinities would be no number.
            base = tl.where(new_most == float("-inf"), 0.0, new_most)
            weights = tl.exp2(scores * (scale * LOG2_E) - base[:, None])
            shrunk = tl.exp2(most - base)
            total = total * shrunk + tl.sum(weights, 1)
            if DROPOUT:
                retained = _retained(bits, pair, t, first, num_queries, longest, BLOCK_V)
                weights = tl.where(retained, weights, 0.0)
            mixed = tl.dot(weights.to(values.dtype), values, acc=mixed * shrunk[:, None], input_precision=PRECISION)
            most = new_most
        some = total > 0
        safe = tl.where(some, total, 1.0)
        gates = _gates(gate, sample, t, head, level, num_heads, num_queries, HAS_GATE, LEVELS)
        result += mixed * (gates / safe)[:, None]
        # Infinite where nothing is readable: backward's weights are then zero.
        saved = tl.where(some, most + tl.log2(safe), float("inf"))
        tl.store(lse + (pair * LEVELS + level) * num_queries + t, saved, mask=t < num_queries)
    if DROPOUT:
        result *= 1.0 / (1.0 - dropout_p)
    _store_rows(out + pair_start, t, row, num_queries, result, WIDTH, BLOCK_D)


@triton.jit
def forward_short_kernel(
    q, kvs, gate, masks, bits, out, lse,
    lengths, longest, num_heads, num_queries, scale, dropout_p,
    LEVELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `forward_kernel`, for levels of one length, at most BLOCK_V, and one mask."""
    pair, sample, head, block = _program(tl.cdiv(num_queries, BLOCK_T), num_heads)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    row, pair_start = num_heads * WIDTH, (sample * num_queries * num_heads + head) * WIDTH
    queries = _load_rows(q + pair_start, t, row, num_queries, WIDTH, BLOCK_D)
    rows, num_keys = tl.arange(0, BLOCK_V), lengths[0]
    readable = _readable(masks[0] + sample * num_keys, rows, num_keys, HAS_MASK)
    level_start = (sample * num_keys * 2 * num_heads + head) * WIDTH
    if DROPOUT:
        retained = _retained(bits, pair, t, 0, num_queries, longest, BLOCK_V)
    result = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for level in range(LEVELS):
        k = _of_level(kvs, level, LEVELS) + level_start
        keys = _load_rows(k, rows, 2 * row, num_keys, WIDTH, BLOCK_D)
        values = _load_rows(k + row, rows, 2 * row, num_keys, WIDTH, BLOCK_D)
        gates = _gates(gate, sample, t, head, level, num_heads, num_queries, HAS_GATE, LEVELS)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        scores = tl.where(readable[None, :], scores, float("-inf"))
        most = tl.max(scores, 1) * (scale * LOG2_E)
        most = tl.where(most == float("-inf"), 0.0, most)
        weights = tl.exp2(scores * (scale * LOG2_E) - most[:, None])
        total = tl.sum(weights, 1)
        some = total > 0
        safe = tl.where(some, total, 1.0)
        if DROPOUT:
            weights = tl.where(retained, weights, 0.0)
        weights *= (gates / safe)[:, None]
        result = tl.dot(weights.to(values.dtype), values, acc=result, input_precision=PRECISION)
        saved = tl.where(some, most + tl.log2(safe), float("inf"))
        tl.store(lse + (pair * LEVELS + level) * num_queries + t, saved, mask=t < num_queries)
    if DROPOUT:
        result *= 1.0 / (1.0 - dropout_p)
    _store_rows(out + pair_start, t, row, num_queries, result, WIDTH, BLOCK_D)


@triton.jit
def backward_query_kernel(
    q, kvs, gate, masks, bits, grad_out, lse, grad_q, offsets,
    lengths, longest, num_heads, num_queries, scale, dropout_p,
    LEVELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: grad_q and D of BLOCK_T queries. `offsets` is D, which is the gate's gradient."""
    pair, sample, head, block = _program(tl.cdiv(num_queries, BLOCK_T), num_heads)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    row, pair_start = num_heads * WIDTH, (sample * num_queries * num_heads + head) * WIDTH
    queries = _load_rows(q + pair_start, t, row, num_queries, WIDTH, BLOCK_D)
    slopes = _load_rows(grad_out + pair_start, t, row, num_queries, WIDTH, BLOCK_D)
    result = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for level in range(LEVELS):
        k, v, mask, num_keys = _open_level(kvs, masks, lengths, level, sample, head, num_heads, WIDTH, LEVELS)
        row_of_lse = (pair * LEVELS + level) * num_queries + t
        saved = tl.load(lse + row_of_lse, mask=t < num_queries, other=float("inf"))
        centre = tl.zeros([BLOCK_T], dtype=tl.float32)
        offset = tl.zeros([BLOCK_T], dtype=tl.float32)
        seen = tl.zeros([BLOCK_T], dtype=tl.float32)
        sloped = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
        plain = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
        for first in range(0, num_keys, BLOCK_V):
            rows = first + tl.arange(0, BLOCK_V)
            keys = _load_rows(k, rows, 2 * row, num_keys, WIDTH, BLOCK_D)
            values = _load_rows(v, rows, 2 * row, num_keys, WIDTH, BLOCK_D)
            readable = _readable(mask, rows, num_keys, HAS_MASK)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E)
            weights = tl.where(readable[None, :], tl.exp2(scores - saved[:, None]), 0.0)
            slope = tl.dot(slopes, tl.trans(values), input_precision=PRECISION)
            if DROPOUT:
                retained = _retained(bits, pair, t, first, num_queries, longest, BLOCK_V)
                slope = tl.where(retained, slope, 0.0) * (1.0 / (1.0 - dropout_p))
            if first == 0:
                weight = tl.sum(weights, 1)
                centre = tl.sum(weights * slope, 1) / tl.where(weight > 0, weight, 1.0)
            centred = weights * (slope - centre[:, None])
            offset += tl.sum(centred, 1)
            seen += tl.sum(weights, 1)
            sloped = tl.dot(centred.to(keys.dtype), keys, acc=sloped, input_precision=PRECISION)
            plain = tl.dot(weights.to(keys.dtype), keys, acc=plain, input_precision=PRECISION)
        gates = _gates(gate, sample, t, head, level, num_heads, num_queries, HAS_GATE, LEVELS)
        result += (sloped - offset[:, None] * plain) * gates[:, None]
        # Of a level without a readable key the weights sum to zero, and so does D.
        tl.store(offsets + row_of_lse, offset + centre * seen, mask=t < num_queries)
    _store_rows(grad_q + pair_start, t, row, num_queries, result * scale, WIDTH, BLOCK_D)


@triton.jit
def backward_query_short_kernel(
    q, kvs, gate, masks, bits, grad_out, lse, grad_q, offsets,
    lengths, longest, num_heads, num_queries, scale, dropout_p,
    LEVELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `backward_query_kernel`, for levels of one length, at most BLOCK_V, and one mask."""
    pair, sample, head, block = _program(tl.cdiv(num_queries, BLOCK_T), num_heads)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    row, pair_start = num_heads * WIDTH, (sample * num_queries * num_heads + head) * WIDTH
    queries = _load_rows(q + pair_start, t, row, num_queries, WIDTH, BLOCK_D)
    slopes = _load_rows(grad_out + pair_start, t, row, num_queries, WIDTH, BLOCK_D)
    rows, num_keys = tl.arange(0, BLOCK_V), lengths[0]
    readable = _readable(masks[0] + sample * num_keys, rows, num_keys, HAS_MASK)
    level_start = (sample * num_keys * 2 * num_heads + head) * WIDTH
    if DROPOUT:
        retained = _retained(bits, pair, t, 0, num_queries, longest, BLOCK_V)
    result = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for level in range(LEVELS):
        k = _of_level(kvs, level, LEVELS) + level_start
        keys = _load_rows(k, rows, 2 * row, num_keys, WIDTH, BLOCK_D)
        values = _load_rows(k + row, rows, 2 * row, num_keys, WIDTH, BLOCK_D)
        row_of_lse = (pair * LEVELS + level) * num_queries + t
        saved = tl.load(lse + row_of_lse, mask=t < num_queries, other=float("inf"))
        gates = _gates(gate, sample, t, head, level, num_heads, num_queries, HAS_GATE, LEVELS)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E)
        weights = tl.where(readable[None, :], tl.exp2(scores - saved[:, None]), 0.0)
        slope = tl.dot(slopes, tl.trans(values), input_precision=PRECISION)
        if DROPOUT:
            slope = tl.where(retained, slope, 0.0) * (1.0 / (1.0 - dropout_p))
        offset = tl.sum(weights * slope, 1)
        change = weights * (slope - offset[:, None]) * gates[:, None]
        result = tl.dot(change.to(keys.dtype), keys, acc=result, input_precision=PRECISION)
        tl.store(offsets + row_of_lse, offset, mask=t < num_queries)
    _store_rows(grad_q + pair_start, t, row, num_queries, result * scale, WIDTH, BLOCK_D)


@triton.jit
def backward_key_kernel(
    q, kvs, gate, masks, bits, grad_out, lse, offsets, grad_kvs,
    lengths, longest, num_heads, num_queries, scale, dropout_p,
    LEVELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_V keys and values of one level."""
    pair, sample, head, block = _program(tl.cdiv(longest, BLOCK_V) * LEVELS, num_heads)
    level, first_key = block % LEVELS, (block // LEVELS) * BLOCK_V
    k, v, mask, num_keys = _open_level(kvs, masks, lengths, level, sample, head, num_heads, WIDTH, LEVELS)
    rows = first_key + tl.arange(0, BLOCK_V)
    row, pair_start = num_heads * WIDTH, (sample * num_queries * num_heads + head) * WIDTH
    keys = _load_rows(k, rows, 2 * row, num_keys, WIDTH, BLOCK_D)
    values = _load_rows(v, rows, 2 * row, num_keys, WIDTH, BLOCK_D)
    readable = _readable(mask, rows, num_keys, HAS_MASK)
    grad_key = tl.zeros([BLOCK_V, BLOCK_D], dtype=tl.float32)
    grad_value = tl.zeros([BLOCK_V, BLOCK_D], dtype=tl.float32)
    for first in range(0, num_queries, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        queries = _load_rows(q + pair_start, t, row, num_queries, WIDTH, BLOCK_D)
        slopes = _load_rows(grad_out + pair_start, t, row, num_queries, WIDTH, BLOCK_D)
        row_of_lse = (pair * LEVELS + level) * num_queries + t
        saved = tl.load(lse + row_of_lse, mask=t < num_queries, other=float("inf"))
        offset = tl.load(offsets + row_of_lse, mask=t < num_queries, other=0.0)
        gates = _gates(gate, sample, t, head, level, num_heads, num_queries, HAS_GATE, LEVELS)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2_E)
        weights = tl.where(readable[:, None], tl.exp2(scores - saved[None, :]), 0.0) * gates[None, :]
        slope = tl.dot(values, tl.trans(slopes), input_precision=PRECISION)
        mixed = weights
        if DROPOUT:
            retained = _retained_by(bits, pair, rows, first, num_queries, longest, BLOCK_T)
            slope = tl.where(retained, slope, 0.0) * (1.0 / (1.0 - dropout_p))
            mixed = tl.where(retained, weights, 0.0)
        grad_value = tl.dot(mixed.to(slopes.dtype), slopes, acc=grad_value, input_precision=PRECISION)
        change = weights * (slope - offset[None, :])
        grad_key = tl.dot(change.to(queries.dtype), queries, acc=grad_key, input_precision=PRECISION)
    if DROPOUT:
        grad_value *= 1.0 / (1.0 - dropout_p)
    grad = _of_level(grad_kvs, level, LEVELS) + (sample * num_keys * 2 * num_heads + head) * WIDTH
    _store_rows(grad, rows, 2 * row, num_keys, grad_key * scale, WIDTH, BLOCK_D)
    _store_rows(grad + row, rows, 2 * row, num_keys, grad_value, WIDTH, BLOCK_D)


@triton.jit
def backward_fused_kernel(
    q, kvs, gate, masks, bits, grad_out, lse, grad_q, offsets, grad_kvs,
    lengths, longest, num_heads, num_queries, scale, dropout_p,
    LEVELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: all gradients of one (sample, head) with at most BLOCK_T queries. Tables are [keys, queries]."""
    pair, sample, head, _ = _program(1, num_heads)
    t = tl.arange(0, BLOCK_T)
    row, pair_start = num_heads * WIDTH, (sample * num_queries * num_heads + head) * WIDTH
    queries = _load_rows(q + pair_start, t, row, num_queries, WIDTH, BLOCK_D)
    slopes = _load_rows(grad_out + pair_start, t, row, num_queries, WIDTH, BLOCK_D)
    result = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for level in range(LEVELS):
        k, v, mask, num_keys = _open_level(kvs, masks, lengths, level, sample, head, num_heads, WIDTH, LEVELS)
        grad = _of_level(grad_kvs, level, LEVELS) + (sample * num_keys * 2 * num_heads + head) * WIDTH
        row_of_lse = (pair * LEVELS + level) * num_queries + t
        saved = tl.load(lse + row_of_lse, mask=t < num_queries, other=float("inf"))
        gates = _gates(gate, sample, t, head, level, num_heads, num_queries, HAS_GATE, LEVELS)
        offset = tl.zeros([BLOCK_T], dtype=tl.float32)
        for first in range(0, num_keys, BLOCK_V):
            rows = first + tl.arange(0, BLOCK_V)
            keys = _load_rows(k, rows, 2 * row, num_keys, WIDTH, BLOCK_D)
            values = _load_rows(v, rows, 2 * row, num_keys, WIDTH, BLOCK_D)
            readable = _readable(mask, rows, num_keys, HAS_MASK)
            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2_E)
            weights = tl.where(readable[:, None], tl.exp2(scores - saved[None, :]), 0.0)
            slope = tl.dot(values, tl.trans(slopes), input_precision=PRECISION)
            if DROPOUT:
                retained = _retained_by(bits, pair, rows, 0, num_queries, longest, BLOCK_T)
                slope = tl.where(retained, slope, 0.0)
            offset += tl.sum(weights * slope, 0)
        if DROPOUT:
            offset *= 1.0 / (1.0 - dropout_p)
        tl.store(offsets + row_of_lse, offset, mask=t < num_queries)
        for first in range(0, num_keys, BLOCK_V):
            rows = first + tl.arange(0, BLOCK_V)
            keys = _load_rows(k, rows, 2 * row, num_keys, WIDTH, BLOCK_D)
            values = _load_rows(v, rows, 2 * row, num_keys, WIDTH, BLOCK_D)
            readable = _readable(mask, rows, num_keys, HAS_MASK)
            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2_E)
            weights = tl.where(readable[:, None], tl.exp2(scores - saved[None, :]), 0.0) * gates[None, :]
            mixed = weights
            if DROPOUT:
                retained = _retained_by(bits, pair, rows, 0, num_queries, longest, BLOCK_T)
                mixed = tl.where(retained, weights, 0.0)
            # Stored at once: registers are scarce.
            grad_value = tl.dot(mixed.to(slopes.dtype), slopes, input_precision=PRECISION)
            if DROPOUT:
                grad_value *= 1.0 / (1.0 - dropout_p)
            _store_rows(grad + row, rows, 2 * row, num_keys, grad_value, WIDTH, BLOCK_D)
            slope = tl.dot(values, tl.trans(slopes), input_precision=PRECISION)
            if DROPOUT:
                retained = _retained_by(bits, pair, rows, 0, num_queries, longest, BLOCK_T)
                slope = tl.where(retained, slope, 0.0) * (1.0 / (1.0 - dropout_p))
            change = (weights * (slope - offset[None, :])).to(queries.dtype)
            grad_key = tl.dot(change, queries, input_precision=PRECISION)
            _store_rows(grad, rows, 2 * row, num_keys, grad_key * scale, WIDTH, BLOCK_D)
            result = tl.dot(tl.trans(change), keys, acc=result, input_precision=PRECISION)
    _store_rows(grad_q + pair_start, t, row, num_queries, result * scale, WIDTH, BLOCK_D)
