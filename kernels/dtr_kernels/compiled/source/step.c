/* One decoding step of a form's branch and of its window, from what the projections give to the heads' output: the
 * kernels of the other files one after another behind one call. At one token a sequence the way into C and back costs
 * as much as what is computed there, so what does not change from step to step comes as one struct. */
#include "simd.h"

int dtr_unit_rows(const void *, float *, int64_t, int64_t, int64_t, int64_t, int, float, int);
int dtr_gates(const void *, const float *, const float *, const float *, float *, int64_t, int64_t, int64_t, int64_t, int,
              int, int);
int dtr_readout(const float *, const float *, void *, int64_t, int64_t, int64_t, int, float, int);
int dtr_linear_forward(const void *, const void *, const void *, const float *, const float *, float *, void *,
                       const int64_t *, const int64_t *, const uint8_t *, float *, float *, int64_t, int64_t, int64_t,
                       int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                       int, int, int, int, float, int);
int dtr_window_step(const void *, const void *, const void *, void *, void *, const int64_t *, const int64_t *,
                    const float *, const float *, void *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                    int64_t, int, int, int, float, int);

/* Multiply-adds of a step below which one thread does it all, some 10 microseconds: waking another costs as much, and
 * far more where a server's other processes hold the cores. */
#define WORTH_A_THREAD 500000

/* A layer's weights and pools. `compiled/step.py` has the same struct; sizes in elements, strides of a slot or a row.
 * decay_weight, beta_weight: projections of hidden (see dtr_gates; the rate is exp(log_rate)), NULL for forms without.
 * conv [S,taps-1,Hkv,D]: the rows of v that a convolution of `taps` still needs; taps 0: none. window 0: no rings; else
 * the linear branch is one more key of the window, with the logits rest_logit. unit: q and k are L2-normalised for the linear branch. */
typedef struct {
    const float *decay_weight, *decay_bias, *log_rate, *beta_weight, *beta_bias, *gain, *rest_logit;
    void *pool, *ring_k, *ring_v, *conv;
    int64_t pool_stride, ring_slot, ring_row, conv_stride, pool_slots, heads, group, dim, inputs, window, taps;
    int pool_type, ring_type, conv_type, decay_kind, unit;
    float unit_epsilon, norm_epsilon, scale;
} FormStep;

/* [tokens, width] of any type, tokens `stride` apart -> float rows one after another. */
static void gather_rows(const void *from, int type, int64_t stride, int64_t tokens, int64_t width, float *to) {
    for (int64_t t = 0; t < tokens; t++) widen(to + t * width, at(from, type, t * stride), type, width);
}

/* One token of the convolution: v [width] -> out [width] = sum_j taps[j] * row j, of the kept rows and v; the oldest row
 * leaves. `row` is scratch [width]. */
static void convolve(const FormStep *s, int64_t slot, const void *v, int type, const float *taps, float *out, float *row) {
    const int64_t width = s->heads * s->dim, kept = s->taps - 1, bytes = width * bytes_of(s->conv_type);
    char *rows = (char *)s->conv + slot * s->conv_stride * bytes_of(s->conv_type);
    widen(row, v, type, width);
    for (int64_t c = 0; c < width; c++) out[c] = taps[kept * width + c] * row[c];
    for (int64_t j = 0; j < kept; j++) {
        float *old = row + width;
        widen(old, rows + j * bytes, s->conv_type, width);
        for (int64_t c = 0; c < width; c++) out[c] += taps[j * width + c] * old[c];
    }
    if (kept) {
        memmove(rows, rows + bytes, (size_t)((kept - 1) * bytes));
        narrow(rows + (kept - 1) * bytes, s->conv_type, row, width);
    }
}

/* q [R,Hq,D], k, v [R,Hkv,D] of one type, as the window sees them; hidden [R,inputs]. log_decay [R,Hkv] or [R,Hkv,D]
 * where it is no projection of hidden, taps [R,K,Hkv,D] for forms with a convolution, else NULL. slots [R] int32 or int64,
 * `slot_stride` apart. out [R,Hq,D] float or bfloat16. Slots <= 0 leave the states as they are and give zeros. */
int dtr_form_step(const FormStep *s, const void *q, const void *k, const void *v, const void *hidden,
                  const float *log_decay, const float *taps, const void *slots, const int64_t *positions, void *out,
                  int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t hidden_stride, int64_t slot_stride,
                  int64_t tokens, int type, int hidden_type, int wide_slots, int out_type, int threads) {
    const int64_t heads = s->heads, group = s->group, dim = s->dim, window = s->window;
    const int64_t q_size = tokens * heads * group * dim, kv_size = tokens * heads * dim, gate_size = tokens * heads;
    float *work = scratch(3 * q_size + 2 * kv_size + 2 * gate_size + 2 * heads * dim + heads +
                          2 * (2 * tokens + 2));
    if (!work) return NO_MEMORY;
    float *queries = work, *keys = queries + q_size, *writes = keys + kv_size, *linear = writes + kv_size;
    float *rest = linear + q_size, *decays = rest + q_size, *betas = decays + gate_size, *row = betas + gate_size;
    float *rate = row + 2 * heads * dim;
    int64_t *borders = (int64_t *)(((uintptr_t)(rate + heads) + 7) / 8 * 8), *places = borders + tokens + 1;
    int result = DONE;
    for (int64_t t = 0; t <= tokens; t++) borders[t] = t;
    for (int64_t t = 0; t < tokens; t++) {
        places[t] = wide_slots ? ((const int64_t *)slots)[t * slot_stride] : ((const int32_t *)slots)[t * slot_stride];
        if (places[t] >= s->pool_slots) result = BAD_INDEX;
    }
    if (result) {
        free(work);
        return result;
    }
    for (int64_t h = 0; s->decay_weight && h < heads; h++) rate[h] = expf(s->log_rate[h]);
    const int few = tokens < 4 ? 1 : threads; /* for what goes row by row */
    const int many = kv_size * (group + 3) * dim < WORTH_A_THREAD ? 1 : threads;
    if (s->unit) {
        dtr_unit_rows(q, queries, tokens, heads * group, dim, q_stride, type, s->unit_epsilon, few);
        dtr_unit_rows(k, keys, tokens, heads, dim, k_stride, type, s->unit_epsilon, few);
    } else {
        gather_rows(q, type, q_stride, tokens, heads * group * dim, queries);
        gather_rows(k, type, k_stride, tokens, heads * dim, keys);
    }
    if (s->taps) {
        for (int64_t t = 0; t < tokens; t++)
            if (places[t] > 0)
                convolve(s, places[t], at(v, type, t * v_stride), type, taps + t * s->taps * heads * dim,
                         writes + t * heads * dim, row);
            else memset(writes + t * heads * dim, 0, (size_t)(heads * dim) * 4);
    } else gather_rows(v, type, v_stride, tokens, heads * dim, writes);
    if (s->decay_weight) {
        dtr_gates(hidden, s->decay_weight, s->decay_bias, rate, decays, tokens, s->inputs, heads, hidden_stride, hidden_type,
                  1, few);
        log_decay = decays;
    }
    if (s->beta_weight)
        dtr_gates(hidden, s->beta_weight, s->beta_bias, NULL, betas, tokens, s->inputs, heads, hidden_stride, hidden_type, 0,
                  few);
    result = dtr_linear_forward(queries, keys, writes, log_decay, s->beta_weight ? betas : NULL, linear, s->pool, places,
                                borders, NULL, NULL, NULL, heads * group * dim, heads * dim, heads * dim, s->pool_stride,
                                tokens, heads, group, dim, dim, 1, 0, 0, s->pool_slots, tokens, FLOAT32, s->pool_type,
                                s->decay_kind, s->beta_weight != NULL, s->scale, many);
    if (!result)
        dtr_readout(linear, s->gain, window ? rest : out, tokens, heads * group, dim, window ? FLOAT32 : out_type,
                    s->norm_epsilon, few);
    if (!result && window)
        result = dtr_window_step(q, k, v, s->ring_k, s->ring_v, places, positions, s->rest_logit, rest, out, q_stride,
                                 k_stride, v_stride, s->ring_slot, s->ring_row, tokens, heads, group, dim, window, 0,
                                 s->pool_slots, type, s->ring_type, out_type, 1.0f / sqrtf((float)dim), many);
    free(work);
    return result;
}
