"""The kernels of prefill.py, in the order they run. Sizes and notation are explained there.

Every kernel masks what lies past a chunk's end: absent tokens have no key, no decay and no write. Token offsets are
int64. Tensors of our own making are contiguous; operands come with their strides and a contiguous last dimension.
"""

import triton
import triton.language as tl

from dtr_kernels.triton.arithmetic import fixed_and_rest, narrowed, product, split_product, unit_lower_inverse
from dtr_kernels.triton.chunk_plan import chunk_of


@triton.jit(do_not_specialize=["chunks", "sequences"])
def key_decay_products_kernel(
    q, k, log_decay, table, slots, attention, key_products, chunks, sequences,
    stride_q, stride_qh, stride_k, stride_kh, stride_g, stride_gh,
    HKV: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, C: tl.constexpr,
    GP: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Decay per key dimension: attention [N,Hq,C] = q_i exp(c_i - c_j) k_j and, for DELTA, key_products [N,Hkv,C] with
    k_i for q_i, for j <= i; 0 above the diagonal of a subchunk, unwritten in later ones.

    Grid (chunks, subchunks of 16 rows, Hkv). Keys before the subchunk meet its rows at its border, where both sides
    have only decayed; inside the subchunk the decay from j to i is summed up from j = i downwards.
    """
    begin, end, live = chunk_of(table, slots, chunks, sequences)
    sub, h = tl.program_id(1), tl.program_id(2)
    t0 = begin + sub * 16
    if (t0 >= end) | (live == 0):
        return
    i, member = tl.arange(0, 16), tl.arange(0, GP)
    m = tl.arange(0, 16 * GP)
    t = (t0 + i).to(tl.int64)
    t_row, h_row = (t0 + m // GP).to(tl.int64), h * G + m % GP
    real, real_row = t < end, (t_row < end) & (m % GP < G)
    j = tl.arange(0, C)
    t_before = (begin + j).to(tl.int64)
    before = t_before < t0

    near = tl.zeros([16, GP, 16], tl.float32)
    far = tl.zeros([16 * GP, C], tl.float32)
    near_keys = tl.zeros([16, 16], tl.float32)
    far_keys = tl.zeros([16, C], tl.float32)
    for d0 in range(0, DK, BK):
        d = d0 + tl.arange(0, BK)
        real_d = d < DK
        at = real[:, None] & real_d[None, :]
        queries = tl.load(
            q + t_row[:, None] * stride_q + h_row[:, None] * stride_qh + d[None, :],
            mask=real_row[:, None] & real_d[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        keys = tl.load(k + t[:, None] * stride_k + h * stride_kh + d[None, :], mask=at, other=0.0).to(tl.float32)
        g = tl.load(log_decay + t[:, None] * stride_g + h * stride_gh + d[None, :], mask=at, other=0.0).to(tl.float32)

        grouped = tl.reshape(queries, (16, GP, BK))
        segment = tl.zeros([16, BK], tl.float32)
        for back in range(0, 16):
            n = 15 - back
            # Masks of one comparison: the interpreter does not join a scalar's with a block's.
            k_n = tl.load(
                k + (t0 + n).to(tl.int64) * stride_k + h * stride_kh + d,
                mask=d < tl.where(t0 + n < end, DK, 0), other=0.0,
            )  # fmt: skip
            g_next = tl.load(
                log_decay + (t0 + n + 1).to(tl.int64) * stride_g + h * stride_gh + d,
                mask=d < tl.where((t0 + n + 1 < end) & (n < 15), DK, 0), other=0.0,
            )  # fmt: skip
            segment = tl.where(i[:, None] > n, segment + g_next.to(tl.float32)[None, :], 0.0)
            weighted = tl.where(i[:, None] >= n, tl.exp(segment), 0.0) * k_n.to(tl.float32)[None, :]
            column = tl.sum(grouped * weighted[:, None, :], axis=2)
            near += tl.where(i[None, None, :] == n, column[:, :, None], 0.0)
            if DELTA:
                near_keys += tl.where(i[None, :] == n, tl.sum(keys * weighted, axis=1)[:, None], 0.0)

        if sub > 0:
            at_before = before[:, None] & real_d[None, :]
            to_border = tl.load(
                log_decay + (t_before[:, None] + 1) * stride_g + h * stride_gh + d[None, :],
                mask=(t_before + 1 < t0)[:, None] & real_d[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            past = tl.load(
                k + t_before[:, None] * stride_k + h * stride_kh + d[None, :], mask=at_before, other=0.0
            ).to(tl.float32)  # fmt: skip
            past = tl.trans(past * tl.exp(tl.cumsum(to_border, 0, reverse=True)))
            from_border = tl.exp(tl.cumsum(g, 0))
            for_rows = tl.broadcast_to(from_border[:, None, :], (16, GP, BK))
            far += product(queries * tl.reshape(for_rows, (16 * GP, BK)), past, DOT)
            if DELTA:
                far_keys += product(keys * from_border, past, DOT)

    row = (t * (HKV * G) + h * G) * C
    heads = row[:, None, None] + member[None, :, None] * C + sub * 16 + i[None, None, :]
    at = real[:, None, None] & (member < G)[None, :, None]
    tl.store(attention + heads, narrowed(near, DOT), mask=at)
    rows = (t_row * (HKV * G) + h_row) * C
    at = real_row[:, None] & before[None, :]
    tl.store(attention + rows[:, None] + j[None, :], narrowed(far, DOT), mask=at)
    if DELTA:
        keys_row = (t * HKV + h) * C
        tl.store(key_products + keys_row[:, None] + sub * 16 + i[None, :], near_keys, mask=real[:, None])
        tl.store(key_products + keys_row[:, None] + j[None, :], far_keys, mask=real[:, None] & before[None, :])


@triton.jit(do_not_specialize=["chunks", "sequences", "tokens"])
def prepare_kernel(
    k, v, log_decay, beta, table, slots, key_products,
    cumulated, decay_in, keys_out, decay_all, w, u, chunks, sequences, tokens,
    stride_k, stride_kh, stride_v, stride_vh, stride_g, stride_gh, stride_b, stride_bh,
    HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PER_HEAD: tl.constexpr, PER_KEY: tl.constexpr, DELTA: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Stage 1, grid (chunks, Hkv). PER_HEAD: cumulated [2,Hkv,N], c_i in the two parts of `fixed_and_rest`.
    PER_KEY: decay_in [N,Hkv,Dk] = exp(c_i), keys_out [N,Hkv,Dk] = exp(c_C - c_i) k_i, decay_all [chunks,Hkv,Dk].
    DELTA: w [N,Hkv,Dk] = (I + A)^-1 beta exp(c) K and u [N,Hkv,Dv] = (I + A)^-1 beta V."""
    begin, end, live = chunk_of(table, slots, chunks, sequences)
    h = tl.program_id(1)
    if (begin >= end) | (live == 0):
        return
    i = tl.arange(0, C)
    t = (begin + i).to(tl.int64)
    real = t < end
    lower = i[:, None] > i[None, :]

    to_token = tl.zeros([C], tl.float32)
    if PER_HEAD:
        g = tl.load(log_decay + t * stride_g + h * stride_gh, mask=real, other=0.0).to(tl.float32)
        fixed, rest = fixed_and_rest(g)
        fixed, rest = tl.cumsum(fixed, 0), tl.cumsum(rest, 0)
        at_head = cumulated + h.to(tl.int64) * tokens + t
        tl.store(at_head, fixed, mask=real)
        tl.store(at_head + tokens.to(tl.int64) * HKV, rest, mask=real)
        to_token = fixed + rest

    if DELTA:
        strength = tl.load(beta + t * stride_b + h * stride_bh, mask=real, other=0.0).to(tl.float32)
        if PER_KEY:
            rows = (t * HKV + h) * C
            a = tl.load(key_products + rows[:, None] + i[None, :], mask=real[:, None] & lower, other=0.0)
        else:
            a = tl.zeros([C, C], tl.float32)
            for d0 in range(0, DK, BK):
                d = d0 + tl.arange(0, BK)
                at = real[:, None] & (d < DK)[None, :]
                keys = tl.load(k + t[:, None] * stride_k + h * stride_kh + d[None, :], mask=at, other=0.0)
                a += product(keys, tl.trans(keys), DOT)
            if PER_HEAD:
                exponent = (fixed[:, None] - fixed[None, :]) + (rest[:, None] - rest[None, :])
                a *= tl.exp(tl.where(lower, exponent, float("-inf")))
        solver = unit_lower_inverse(tl.where(lower, a * strength[:, None], 0.0), C)
        solver = solver * strength[None, :]
        for e0 in range(0, DV, BV):
            e = e0 + tl.arange(0, BV)
            at = real[:, None] & (e < DV)[None, :]
            values = tl.load(v + t[:, None] * stride_v + h * stride_vh + e[None, :], mask=at, other=0.0)
            written = split_product(solver, values, DOT)
            tl.store(u + (t[:, None] * HKV + h) * DV + e[None, :], narrowed(written, DOT), mask=at)
        if PER_HEAD:
            solver *= tl.exp(to_token)[None, :]
    if DELTA or PER_KEY:
        for d0 in range(0, DK, BK):
            d = d0 + tl.arange(0, BK)
            at = real[:, None] & (d < DK)[None, :]
            keys = tl.load(k + t[:, None] * stride_k + h * stride_kh + d[None, :], mask=at, other=0.0)
            own = (t[:, None] * HKV + h) * DK + d[None, :]
            if PER_KEY:
                at_g = log_decay + t[:, None] * stride_g + h * stride_gh + d[None, :]
                g = tl.load(at_g, mask=at, other=0.0).to(tl.float32)
                later = (t[:, None] + 1 < end) & (i < C - 1)[:, None] & (d < DK)[None, :]
                after = tl.load(at_g + stride_g, mask=later, other=0.0).to(tl.float32)
                into = tl.exp(tl.cumsum(g, 0))
                tl.store(decay_in + own, into, mask=at)
                outward = keys.to(tl.float32) * tl.exp(tl.cumsum(after, 0, reverse=True))
                tl.store(keys_out + own, narrowed(outward, DOT), mask=at)
                c = tl.program_id(0).to(tl.int64)
                tl.store(decay_all + (c * HKV + h) * DK + d, tl.exp(tl.sum(g, 0)), mask=d < DK)
                if DELTA:
                    keys = keys.to(tl.float32) * into
            if DELTA:
                tl.store(w + own, narrowed(split_product(solver, keys, DOT), DOT), mask=at)


@triton.jit(do_not_specialize=["sequences", "tokens"])
def state_kernel(
    keys, w, u, cumulated, decay_all, pool, slots, borders, has_initial, first_chunk, states, sequences, tokens,
    stride_k, stride_kh, stride_u, stride_uh, stride_pool,
    HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PER_HEAD: tl.constexpr, PER_KEY: tl.constexpr, DELTA: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Stage 2, grid (R Hkv, blocks of Dv, blocks of Dk; one block of Dk for DELTA): the state from chunk to chunk.

    Stores the state before each chunk, states [chunks,Hkv,Dk,Dv], replaces u by u - w S for DELTA, and writes the last
    state to the pool.
    """
    r, h = tl.program_id(0) // HKV, tl.program_id(0) % HKV
    slot = tl.load(slots + r).to(tl.int64)
    begin, end = tl.load(borders + r), tl.load(borders + r + 1)
    if (slot <= 0) | (begin >= end):
        return
    d = tl.program_id(2) * BK + tl.arange(0, BK)
    e = tl.program_id(1) * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    tile = d[:, None] * DV + e[None, :]
    at_tile = (d < DK)[:, None] & (e < DV)[None, :]
    row = pool + slot * stride_pool + h * (DK * DV) + tile
    state = tl.zeros([BK, BV], tl.float32)
    if tl.load(has_initial + r) != 0:
        state += tl.load(row, mask=at_tile, other=0.0).to(tl.float32)
    c = tl.load(first_chunk + r).to(tl.int64)
    for start in range(begin, end, C):
        tl.store(states + (c * HKV + h) * (DK * DV) + tile, narrowed(state, states.dtype.element_ty), mask=at_tile)
        t = (start + i).to(tl.int64)
        real = t < end
        at_k, at_u = real[:, None] & (d < DK)[None, :], real[:, None] & (e < DV)[None, :]
        written = tl.load(u + t[:, None] * stride_u + h * stride_uh + e[None, :], mask=at_u, other=0.0)
        k_tile = tl.load(keys + t[:, None] * stride_k + h * stride_kh + d[None, :], mask=at_k, other=0.0)
        if DELTA:
            w_rows = w + (t[:, None] * HKV + h) * DK
            if DOT.is_fp32():
                # A product of float32 holds its operands in registers: 32 rows of the state at a time, cut out by sums.
                blocks = tl.reshape(state, (BK // 32, 32, BV))
                written = written.to(tl.float32)
                for n in tl.static_range(BK // 32):
                    part = tl.sum(tl.where(tl.arange(0, BK // 32)[:, None, None] == n, blocks, 0.0), axis=0)
                    d_n = n * 32 + tl.arange(0, 32)
                    w_tile = tl.load(w_rows + d_n[None, :], mask=real[:, None] & (d_n < DK)[None, :], other=0.0)
                    written -= product(w_tile, part, DOT)
            else:
                w_tile = tl.load(w_rows + d[None, :], mask=at_k, other=0.0)
                written = written.to(tl.float32) - product(w_tile, state, DOT)
            tl.store(
                u + t[:, None] * stride_u + h * stride_uh + e[None, :], narrowed(written, u.dtype.element_ty), mask=at_u
            )
        if PER_HEAD:
            fixed = cumulated + h.to(tl.int64) * tokens
            rest = fixed + tokens.to(tl.int64) * HKV
            last = tl.minimum(start + C, end) - 1
            all_fixed, all_rest = tl.load(fixed + last), tl.load(rest + last)
            own_fixed, own_rest = tl.load(fixed + t, mask=real, other=0.0), tl.load(rest + t, mask=real, other=0.0)
            outward = tl.exp(tl.where(real, (all_fixed - own_fixed) + (all_rest - own_rest), 0.0))
            written = written.to(tl.float32) * outward[:, None]
            state *= tl.exp(all_fixed + all_rest)
        if PER_KEY:
            state *= tl.load(decay_all + (c * HKV + h) * DK + d, mask=d < DK, other=0.0)[:, None]
        state += product(tl.trans(k_tile), written, DOT)
        c += 1
    tl.store(row, narrowed(state, pool.dtype.element_ty), mask=at_tile)


@triton.jit(do_not_specialize=["chunks", "sequences", "tokens", "scale"])
def output_kernel(
    q, k, u, table, slots, states, cumulated, decay_in, attention, out, scale, chunks, sequences, tokens,
    stride_q, stride_qh, stride_k, stride_kh, stride_u, stride_uh,
    HKV: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PER_HEAD: tl.constexpr, PER_KEY: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Stage 3, grid (chunks, blocks of C G rows times blocks of Dv, Hkv): out [N,Hq,Dv].

    Row m is token m // G, query head m % G of the kv head, so that any group fills the rows of one product.
    """
    begin, end, live = chunk_of(table, slots, chunks, sequences)
    if begin >= end:
        return
    BLOCKS: tl.constexpr = (C * G + BM - 1) // BM
    h = tl.program_id(2)
    m = (tl.program_id(1) % BLOCKS) * BM + tl.arange(0, BM)
    e = (tl.program_id(1) // BLOCKS) * BV + tl.arange(0, BV)
    i, j = m // G, tl.arange(0, C)
    t_row, h_row = (begin + i).to(tl.int64), h * G + m % G
    t = (begin + j).to(tl.int64)
    real_row, real = (i < C) & (t_row < end), t < end
    at_out = real_row[:, None] & (e < DV)[None, :]
    to_out = out + (t_row[:, None] * (HKV * G) + h_row[:, None]) * DV + e[None, :]
    if live == 0:
        tl.store(to_out, tl.zeros([BM, BV], out.dtype.element_ty), mask=at_out)
        return
    c = tl.program_id(0).to(tl.int64)
    before = states + (c * HKV + h) * (DK * DV) + e[None, :]
    acc = tl.zeros([BM, BV], tl.float32)
    weights = tl.zeros([BM, C], tl.float32)
    for d0 in range(0, DK, BK):
        d = d0 + tl.arange(0, BK)
        real_d = d < DK
        at_row = real_row[:, None] & real_d[None, :]
        queries = tl.load(
            q + t_row[:, None] * stride_q + h_row[:, None] * stride_qh + d[None, :], mask=at_row, other=0.0
        )  # fmt: skip
        state = tl.load(before + d[:, None] * DV, mask=real_d[:, None] & (e < DV)[None, :], other=0.0)
        if PER_KEY:
            into = tl.load(decay_in + (t_row[:, None] * HKV + h) * DK + d[None, :], mask=at_row, other=0.0)
            acc += product(queries.to(tl.float32) * into, state, DOT)
        else:
            acc += product(queries, state, DOT)
            keys = tl.load(
                k + t[:, None] * stride_k + h * stride_kh + d[None, :], mask=real[:, None] & real_d[None, :], other=0.0
            )
            weights += product(queries, tl.trans(keys), DOT)
    seen = (i[:, None] >= j[None, :]) & real_row[:, None]
    if PER_KEY:
        rows = (t_row * (HKV * G) + h_row) * C
        weights = tl.load(attention + rows[:, None] + j[None, :], mask=seen, other=0.0).to(tl.float32)
    if PER_HEAD:
        fixed = cumulated + h.to(tl.int64) * tokens
        rest = fixed + tokens.to(tl.int64) * HKV
        row_fixed = tl.load(fixed + t_row, mask=real_row, other=0.0)
        row_rest = tl.load(rest + t_row, mask=real_row, other=0.0)
        own_fixed, own_rest = tl.load(fixed + t, mask=real, other=0.0), tl.load(rest + t, mask=real, other=0.0)
        acc *= tl.exp(row_fixed + row_rest)[:, None]
        exponent = (row_fixed[:, None] - own_fixed[None, :]) + (row_rest[:, None] - own_rest[None, :])
        weights *= tl.exp(tl.where(seen, exponent, float("-inf")))
    weights = tl.where(seen, weights, 0.0)
    written = tl.load(
        u + t[:, None] * stride_u + h * stride_uh + e[None, :], mask=real[:, None] & (e < DV)[None, :], other=0.0
    )
    acc += product(weights, written, DOT)
    tl.store(to_out, narrowed(acc * scale, out.dtype.element_ty), mask=at_out)
