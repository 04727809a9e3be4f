/* The softmax window branch, forward: prefill and training in blocks of LANES tokens, and one token for decoding.
 *
 * A block's tokens, for all query heads of the group, meet the W - 1 keys before the block and its own: two small
 * matrix products around a softmax, so cost and memory are linear in the number of tokens. */
#include "window.h"

static void run_segment(const Window *w, int64_t sequence, int64_t head, int64_t from, void *out, int out_type, float *work) {
    const int64_t dim = w->dim, padded = whole_lanes(dim), group = w->group, keys = keys_of_block(w);
    const int64_t first = w->borders[sequence], to = MIN(from + SEGMENT, w->borders[sequence + 1] - first);
    const int64_t rows = rows_before(w) + whole_lanes(to - from);
    float *k = work, *v = k + rows * padded, *kt = v + rows * padded, *bias = kt + rows * padded;
    float *band = bias + rows, *q = band + LANES * keys, *p = q + group * LANES * padded, *o = p + group * LANES * keys;
    float *rest = o + group * LANES * padded;
    gather(w, sequence, head, from, to, k, v, bias);
    transpose(k, rows, padded, kt);
    make_band(w, band);
    for (int64_t block = 0; block < to - from; block += LANES) {
        const int64_t token = first + from + block, tokens = MIN(LANES, to - from - block);
        gather_block(w->q, w->type, token * w->q_stride + head * group * dim, w->q_stride, group, dim, tokens, w->scale, q);
        const int64_t skip = missing_keys(w, sequence, from + block), near = block + skip, seen = keys - skip;
        product(group * LANES, seen, dim, q, padded, 1, kt + near, rows, p, keys, 0);
        softmax(p, group, seen, keys, band + skip, bias + near, rest_logits(w, head), rest);
        product(group * LANES, padded, seen, p, keys, 1, v + near * padded, padded, o, padded, 0);
        for (int64_t g = 0; g < group; g++)
            for (int64_t c = 0; c < tokens; c++) {
                const int64_t row = g * LANES + c, offset = (((token + c) * w->heads + head) * group + g) * dim;
                float *mean = o + row * padded;
                if (w->rest_logit)
                    for (int64_t d = 0; d < dim; d++) mean[d] += rest[row] * w->rest_value[offset + d];
                narrow((char *)out + offset * bytes_of(out_type), out_type, mean, dim);
            }
    }
}

static int64_t scratch_floats(const Window *w) {
    const int64_t padded = whole_lanes(w->dim), rows = rows_before(w) + SEGMENT, keys = keys_of_block(w);
    return 3 * rows * padded + rows + LANES * keys + w->group * LANES * (2 * padded + keys + 1);
}

/* Put the last tokens of each sequence into its ring. */
static void write_ring(const Window *w, int64_t sequence, void *ring_k, void *ring_v) {
    const int64_t first = w->borders[sequence], tokens = w->borders[sequence + 1] - first, row_size = w->heads * w->dim;
    float work[row_size];
    for (int64_t token = MAX(0, tokens - w->window); token < tokens; token++) {
        const int64_t row = (w->start[sequence] + token) % w->window;
        const int64_t to = (w->slots[sequence] * w->past_slot + row * w->past_row) * bytes_of(w->past_type);
        widen(work, at(w->k, w->type, (first + token) * w->k_stride), w->type, row_size);
        narrow((char *)ring_k + to, w->past_type, work, row_size);
        widen(work, at(w->v, w->type, (first + token) * w->v_stride), w->type, row_size);
        narrow((char *)ring_v + to, w->past_type, work, row_size);
    }
}

/* R ragged sequences. With `ring`, past_k and past_v are rings [S,W,Hkv,D] that take the new tokens; else they are only
 * read and may be NULL. Slots <= null_slot: zeros in `out`, ring as it was. */
int dtr_window_forward(const void *q, const void *k, const void *v, void *past_k, void *past_v, const uint8_t *past_valid,
                       const uint8_t *mask, const int64_t *slots, const int64_t *borders, const int64_t *start,
                       const float *rest_logit, const float *rest_value, void *out, int64_t q_stride, int64_t k_stride,
                       int64_t v_stride, int64_t past_slot, int64_t past_row, int64_t sequences, int64_t heads, int64_t group,
                       int64_t dim, int64_t window, int64_t null_slot, int64_t pool_slots, int64_t tokens, int type,
                       int past_type, int out_type, int ring, float scale, int threads) {
    const Window w = {q, k, v, past_k, past_v, past_valid, mask, slots, borders, start, q_stride, k_stride, v_stride,
                      past_slot, past_row, heads, group, dim, window, type, past_type, ring, scale, rest_logit, rest_value};
    if (!fits(slots, borders, sequences, pool_slots, tokens)) return BAD_INDEX;
    int64_t *segments = malloc((size_t)(sequences + 1) * sizeof(int64_t));
    if (!segments) return NO_MEMORY;
    const int64_t tasks = count_segments(borders, sequences, segments) * heads;
    int failed = DONE;
    threads = (int)MAX(1, MIN((int64_t)threads, tasks));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *work = scratch(scratch_floats(&w));
        if (!work) {
#pragma omp atomic write
            failed = NO_MEMORY;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t sequence = 0;
            while (segments[sequence + 1] <= task / heads) sequence++;
            const int64_t from = (task / heads - segments[sequence]) * SEGMENT, head = task % heads;
            if (!work) continue;
            if (slots[sequence] > null_slot) run_segment(&w, sequence, head, from, out, out_type, work);
            else
                for (int64_t row = borders[sequence] + from; row < MIN(borders[sequence] + from + SEGMENT, borders[sequence + 1]); row++)
                    memset((char *)out + (row * heads + head) * group * dim * bytes_of(out_type), 0,
                           (size_t)(group * dim * bytes_of(out_type)));
        }
        free(work);
        if (ring) { /* after every segment has read */
#pragma omp for schedule(dynamic)
            for (int64_t sequence = 0; sequence < sequences; sequence++)
                if (slots[sequence] > null_slot) write_ring(&w, sequence, past_k, past_v);
        }
    }
    free(segments);
    return failed;
}

/* One token of one sequence and kv head: its own row goes into the ring first, then the ring is attended to as it lies. */
static void run_step(const Window *w, int64_t row, int64_t head, int64_t position, void *ring_k, void *ring_v, void *out,
                     int out_type, float *work) {
    const int64_t dim = w->dim, padded = whole_lanes(dim), group = w->group, window = w->window;
    const int64_t filled = MIN(position + 1, window), base = w->slots[row] * w->past_slot + head * dim;
    const int64_t own = (base + position % window * w->past_row) * bytes_of(w->past_type);
    float *keys = work, *values = keys + window * padded, *q = values + window * padded, *p = q + padded;
    float *o = p + whole_lanes(window);
    widen(o, at(w->k, w->type, row * w->k_stride + head * dim), w->type, dim);
    narrow((char *)ring_k + own, w->past_type, o, dim);
    widen(o, at(w->v, w->type, row * w->v_stride + head * dim), w->type, dim);
    narrow((char *)ring_v + own, w->past_type, o, dim);
    for (int64_t m = 0; m < filled; m++) {
        widen(keys + m * padded, at(ring_k, w->past_type, base + m * w->past_row), w->past_type, dim);
        widen(values + m * padded, at(ring_v, w->past_type, base + m * w->past_row), w->past_type, dim);
        for (int64_t d = dim; d < padded; d++) keys[m * padded + d] = values[m * padded + d] = 0.0f;
    }
    for (int64_t g = 0; g < group; g++) {
        widen(q, at(w->q, w->type, row * w->q_stride + (head * group + g) * dim), w->type, dim);
        for (int64_t d = dim; d < padded; d++) q[d] = 0.0f;
        float best = w->rest_logit ? w->rest_logit[head * group + g] : MASKED;
        for (int64_t m = 0; m < filled; m++) {
            vec sum = {0};
            for (int64_t d = 0; d < padded; d += LANES) sum += *(vec *)(q + d) * *(vec *)(keys + m * padded + d);
            p[m] = w->scale * sum_lanes(sum);
            best = p[m] > best ? p[m] : best;
        }
        for (int64_t m = filled; m < whole_lanes(filled); m++) p[m] = MASKED;
        vec total = {0};
        for (int64_t m = 0; m < filled; m += LANES) {
            const vec e = exp_vec(load(p + m) - best);
            store(p + m, e);
            total += e;
        }
        const int64_t to = ((row * w->heads + head) * group + g) * dim;
        const float outside = w->rest_logit ? expf(w->rest_logit[head * group + g] - best) : 0.0f;
        const float share = 1.0f / (sum_lanes(total) + outside);
        for (int64_t d = 0; d < padded; d += LANES) {
            vec even = {0}, odd = {0};
            int64_t m = 0;
            for (; m + 2 <= filled; m += 2) {
                even += p[m] * *(vec *)(values + m * padded + d);
                odd += p[m + 1] * *(vec *)(values + (m + 1) * padded + d);
            }
            if (m < filled) even += p[m] * *(vec *)(values + m * padded + d);
            store(o + d, share * (even + odd));
        }
        if (w->rest_logit)
            for (int64_t d = 0; d < dim; d++) o[d] += share * outside * w->rest_value[to + d];
        narrow((char *)out + to * bytes_of(out_type), out_type, o, dim);
    }
}

/* Decoding: one token for R sequences with rings [S,W,Hkv,D], in place. Slots <= null_slot change nothing, give zeros. */
int dtr_window_step(const void *q, const void *k, const void *v, void *ring_k, void *ring_v, const int64_t *slots,
                    const int64_t *positions, const float *rest_logit, const float *rest_value, void *out, int64_t q_stride,
                    int64_t k_stride, int64_t v_stride, int64_t past_slot, int64_t past_row, int64_t rows, int64_t heads, int64_t group, int64_t dim,
                    int64_t window, int64_t null_slot, int64_t pool_slots, int type, int past_type, int out_type,
                    float scale, int threads) {
    for (int64_t row = 0; row < rows; row++)
        if (slots[row] >= pool_slots || positions[row] < 0) return BAD_INDEX;
    const Window w = {q, k, v, ring_k, ring_v, NULL, NULL, slots, NULL, NULL, q_stride, k_stride, v_stride,
                      past_slot, past_row, heads, group, dim, window, type, past_type, 1, scale, rest_logit, rest_value};
    const int64_t padded = whole_lanes(dim), tasks = rows * heads;
    int failed = DONE;
    threads = (int)MAX(1, MIN((int64_t)threads, tasks));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *work = scratch(2 * window * padded + 2 * padded + whole_lanes(window));
        if (!work) {
#pragma omp atomic write
            failed = NO_MEMORY;
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t row = task / heads, head = task % heads;
            if (!work) continue;
            if (slots[row] > null_slot) run_step(&w, row, head, positions[row], ring_k, ring_v, out, out_type, work);
            else
                memset((char *)out + (row * heads + head) * group * dim * bytes_of(out_type), 0,
                       (size_t)(group * dim * bytes_of(out_type)));
        }
        free(work);
    }
    return failed;
}
