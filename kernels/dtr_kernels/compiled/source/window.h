/* What the window branch's forward and backward passes share: a small matrix product, and a segment of one sequence
 * with the keys and values it can see. */
#ifndef DTR_WINDOW_H
#define DTR_WINDOW_H

#include "simd.h"

#if VECTOR_BYTES == 64
#define ROW_BLOCK 8
#else
#define ROW_BLOCK 4
#endif
#define SEGMENT 256 /* tokens of a task, a multiple of LANES */
#define MASKED -1e30f
#define AHEAD 8 /* rows between asking for a row and using it */

INLINE void product_block(const int COLUMNS, int64_t inner, const float *restrict a, int64_t row_step, int64_t inner_step,
                          const float *restrict b, int64_t b_step, float *restrict c, int64_t c_step, int add) {
    vec sum[ROW_BLOCK][3];
    for (int r = 0; r < ROW_BLOCK; r++)
        for (int n = 0; n < COLUMNS; n++) sum[r][n] = add ? load(c + r * c_step + n * LANES) : splat(0.0f);
    for (int64_t i = 0; i < inner; i++) {
        vec row[3];
#pragma GCC unroll 3
        for (int n = 0; n < COLUMNS; n++) row[n] = load(b + i * b_step + n * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROW_BLOCK; r++) {
            const float x = a[r * row_step + i * inner_step];
#pragma GCC unroll 3
            for (int n = 0; n < COLUMNS; n++) sum[r][n] += x * row[n];
        }
    }
    for (int r = 0; r < ROW_BLOCK; r++)
        for (int n = 0; n < COLUMNS; n++) store(c + r * c_step + n * LANES, sum[r][n]);
}

/* c = a b, or c += a b. a [rows, inner] with any steps, b [inner, columns], c [rows, columns]; rows a multiple of
 * ROW_BLOCK, columns of LANES. */
INLINE void product(int64_t rows, int64_t columns, int64_t inner, const float *a, int64_t row_step, int64_t inner_step,
                    const float *b, int64_t b_step, float *c, int64_t c_step, int add) {
    for (int64_t n = 0; n < columns;) {
        const int64_t wide = MIN(3, (columns - n) / LANES);
        for (int64_t r = 0; r < rows; r += ROW_BLOCK) {
            const float *a_at = a + r * row_step;
            float *c_at = c + r * c_step + n;
            if (wide == 3) product_block(3, inner, a_at, row_step, inner_step, b + n, b_step, c_at, c_step, add);
            else if (wide == 2) product_block(2, inner, a_at, row_step, inner_step, b + n, b_step, c_at, c_step, add);
            else product_block(1, inner, a_at, row_step, inner_step, b + n, b_step, c_at, c_step, add);
        }
        n += wide * LANES;
    }
}

typedef struct {
    const void *q, *k, *v;          /* [N,Hq,D], [N,Hkv,D] x 2, contiguous but for token strides */
    const void *past_k, *past_v;    /* cached rows: slot, row and head apart by past_slot, past_row, D elements */
    const uint8_t *past_valid;      /* [R,W] or NULL: all that `start` says */
    const uint8_t *mask;            /* [N] or NULL: 1 is a token, 0 is padding */
    const int64_t *slots, *borders, *start; /* [R], [R+1], [R]: tokens cached */
    int64_t q_stride, k_stride, v_stride, past_slot, past_row;
    int64_t heads, group, dim, window;
    int type, past_type;
    int ring; /* 1: the token at position p is in row p % W; 0: rows are the last W tokens, oldest first */
    float scale;
    /* One more key, which every query sees: its logit [Hq], the same for all tokens, and its value [N,Hq,D], contiguous.
     * NULL: none. */
    const float *rest_logit, *rest_value;
} Window;

INLINE int64_t whole_lanes(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
INLINE const float *rest_logits(const Window *w, int64_t head) { return w->rest_logit ? w->rest_logit + head * w->group : NULL; }
/* Rows kept in front of a segment: the W - 1 that its first token sees. */
INLINE int64_t rows_before(const Window *w) { return whole_lanes(w->window - 1); }
/* Keys that a block of LANES tokens may see. */
INLINE int64_t keys_of_block(const Window *w) { return rows_before(w) + LANES; }

/* Keys and values of tokens [from - rows_before, to) of a sequence, as float rows of `padded` = whole_lanes(dim); rows
 * that do not exist are zero. bias [rows]: 0, or MASKED where there is nothing to attend to. */
static inline void gather(const Window *w, int64_t sequence, int64_t head, int64_t from, int64_t to, float *restrict keys,
                   float *restrict values, float *restrict bias) {
    const int64_t dim = w->dim, padded = whole_lanes(dim), before = rows_before(w);
    const int64_t first = w->borders[sequence], cached = w->start ? w->start[sequence] : 0;
    const int64_t rows = before + whole_lanes(to - from);
    for (int64_t i = 0; i < rows; i++) {
        const int64_t token = from - before + i; /* in this call's sequence; negative: cached */
        float *key = keys + i * padded, *value = values + i * padded;
        const void *k = NULL, *v = NULL;
        int type = w->type;
        if (token + AHEAD >= 0 && token + AHEAD < to) {
            prefetch(w->k, type, (first + token + AHEAD) * w->k_stride + head * dim, dim);
            prefetch(w->v, type, (first + token + AHEAD) * w->v_stride + head * dim, dim);
        }
        if (token >= 0 && token < to) {
            if (!w->mask || w->mask[first + token]) {
                k = at(w->k, type, (first + token) * w->k_stride + head * dim);
                v = at(w->v, type, (first + token) * w->v_stride + head * dim);
            }
        } else if (token < 0 && -token <= w->window && w->past_k && (w->past_valid || -token <= cached)) {
            const int64_t row = w->ring ? (cached + token) % w->window : w->window + token;
            if (!w->past_valid || w->past_valid[sequence * w->window + row]) {
                const int64_t offset = w->slots[sequence] * w->past_slot + row * w->past_row + head * dim;
                type = w->past_type;
                k = at(w->past_k, type, offset);
                v = at(w->past_v, type, offset);
            }
        }
        bias[i] = k ? 0.0f : MASKED;
        if (k) {
            widen(key, k, type, dim);
            widen(value, v, type, dim);
            for (int64_t d = dim; d < padded; d++) key[d] = value[d] = 0.0f;
        } else {
            memset(key, 0, (size_t)padded * 4);
            memset(value, 0, (size_t)padded * 4);
        }
    }
}

/* rows x columns -> columns x rows */
static inline void transpose(const float *restrict from, int64_t rows, int64_t columns, float *restrict to) {
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t c = 0; c < columns; c++)
            for (int64_t i = r; i < r + LANES; i++) to[c * rows + i] = from[i * columns + c];
}

/* band [LANES, keys]: 0 where token c of a block sees key m of the block's keys, MASKED elsewhere. */
static inline void make_band(const Window *w, float *restrict band) {
    const int64_t keys = keys_of_block(w), before = rows_before(w);
    for (int64_t c = 0; c < LANES; c++)
        for (int64_t m = 0; m < keys; m++)
            band[c * keys + m] = m > before + c - w->window && m <= before + c ? 0.0f : MASKED;
}

/* Of the keys of the block of tokens that begins at `token`, how many come before anything the sequence has. */
INLINE int64_t missing_keys(const Window *w, int64_t sequence, int64_t token) {
    const int64_t cached = !w->past_k ? 0 : w->past_valid ? w->window : w->start[sequence];
    return MAX(0, rows_before(w) - token - cached) / LANES * LANES;
}

/* Logits [group * LANES, keys] -> probabilities; zero for a token that sees nothing. Rows of p and band are `step`
 * apart. rest [group] or NULL: the logits of the one more key, whose probabilities go to rest_share [group * LANES]. */
INLINE void softmax(float *restrict p, int64_t group, int64_t keys, int64_t step, const float *restrict band,
                    const float *restrict bias, const float *restrict rest, float *restrict rest_share) {
    for (int64_t row = 0; row < group * LANES; row++) {
        float *x = p + row * step;
        const float *visible = band + row % LANES * step;
        vec best = splat(MASKED);
        for (int64_t m = 0; m < keys; m += LANES) {
            const vec logit = load(x + m) + load(visible + m) + load(bias + m);
            store(x + m, logit);
            best = larger(best, logit);
        }
        float top = max_lanes(best);
        if (rest) top = MAX(top, rest[row / LANES]);
        vec total = splat(0.0f);
        for (int64_t m = 0; m < keys; m += LANES) {
            const vec e = exp_vec(load(x + m) - top);
            store(x + m, e);
            total += e;
        }
        const float outside = rest ? expf(rest[row / LANES] - top) : 0.0f;
        const float share = top > MASKED / 2 ? 1.0f / (sum_lanes(total) + outside) : 0.0f;
        if (rest) rest_share[row] = share * outside;
        for (int64_t m = 0; m < keys; m += LANES) store(x + m, share * load(x + m));
    }
}

/* Rows (query head g, token c) of a block of LANES tokens, [group * LANES, padded], times `scale`; zero past `tokens`. */
INLINE void gather_block(const void *from, int type, int64_t offset, int64_t stride, int64_t group, int64_t dim,
                         int64_t tokens, float scale, float *restrict to) {
    const int64_t padded = whole_lanes(dim);
    for (int64_t g = 0; g < group; g++)
        for (int64_t c = 0; c < LANES; c++) {
            float *row = to + (g * LANES + c) * padded;
            if (c >= tokens) {
                memset(row, 0, (size_t)padded * 4);
                continue;
            }
            prefetch(from, type, offset + (c + LANES) * stride + g * dim, dim); /* the next block's; may lie past the end */
            widen(row, at(from, type, offset + c * stride + g * dim), type, dim);
            for (int64_t d = dim; d < padded; d++) row[d] = 0.0f;
            for (int64_t d = 0; d < padded; d += LANES) store(row + d, scale * load(row + d));
        }
}

/* [R+1] into `tasks`: how many (segment, head) tasks come before each sequence. Returns the total. */
static inline int64_t count_segments(const int64_t *borders, int64_t sequences, int64_t *segments) {
    segments[0] = 0;
    for (int64_t r = 0; r < sequences; r++)
        segments[r + 1] = segments[r] + (borders[r + 1] - borders[r] + SEGMENT - 1) / SEGMENT;
    return segments[sequences];
}

#endif
