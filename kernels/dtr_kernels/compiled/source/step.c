/* One decoding step of a form's branch and of its window, from what the projections give to the heads' output: the
 * kernels of the other files one after another behind one call. At one token a sequence the way into C and back costs
 * as much as what is computed there. */
#include "simd.h"

int dtr_unit_rows(const void *, float *, int64_t, int64_t, int64_t, int64_t, int, float, int);
int dtr_gates(const void *, const float *, const float *, const float *, float *, int64_t, int64_t, int64_t, int64_t, int,
              int, int);
int dtr_readout(const float *, const float *, const void *, const float *, void *, int64_t, int64_t, int64_t, int, int,
                float, int);
int dtr_linear_forward(const void *, const void *, const void *, const float *, const float *, float *, void *,
                       const int64_t *, const int64_t *, const uint8_t *, float *, float *, int64_t, int64_t, int64_t,
                       int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                       int, int, int, int, float, int);
int dtr_window_step(const void *, const void *, const void *, void *, void *, const int64_t *, const int64_t *, void *,
                    int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                    int64_t, int, int, int, float, int);

/* [tokens, width] of any type, tokens `stride` apart -> float rows one after another. */
static void gather_rows(const void *from, int type, int64_t stride, int64_t tokens, int64_t width, float *to) {
    for (int64_t t = 0; t < tokens; t++) widen(to + t * width, at(from, type, t * stride), type, width);
}

/* q [R,Hq,D], k, v [R,Hkv,D] of one type, as the window sees them; values [R,Hkv,D] what the linear branch writes (v, or
 * v convolved). unit: q and k are L2-normalised for the linear branch. Gates: from hidden [R,inputs] where weights are
 * given (see dtr_gates; the rate is exp(log_rate)), else log_decay and beta as they are, NULL for rules without. window 0: no
 * rings; else its share of the mix is sigmoid(window_gate). out [R,Hq,D] float or bfloat16. Slots <= 0 leave the states as they are and give zeros. */
int dtr_form_step(const void *q, const void *k, const void *v, const void *values, const void *hidden,
                  const float *decay_weight, const float *decay_bias, const float *log_rate, const float *beta_weight,
                  const float *beta_bias, const float *log_decay, const float *beta, void *pool, const int64_t *slots,
                  void *ring_k, void *ring_v, const int64_t *positions, const float *gain, const float *window_gate, void *out,
                  int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t values_stride, int64_t hidden_stride,
                  int64_t pool_stride, int64_t ring_slot, int64_t ring_row, int64_t tokens, int64_t heads, int64_t group,
                  int64_t dim, int64_t inputs, int64_t window, int64_t pool_slots, int type, int values_type,
                  int hidden_type, int pool_type, int ring_type, int out_type, int decay_kind, int unit,
                  float unit_epsilon, float norm_epsilon, float scale, int threads) {
    const int64_t q_size = tokens * heads * group * dim, kv_size = tokens * heads * dim, gate_size = tokens * heads;
    float *work = scratch(3 * q_size + 2 * kv_size + 2 * gate_size + 2 * (tokens + 2) + heads * (group + 1));
    if (!work) return NO_MEMORY;
    float *queries = work, *keys = queries + q_size, *writes = keys + kv_size, *linear = writes + kv_size;
    float *near = linear + q_size, *decays = near + q_size, *betas = decays + gate_size;
    float *rate = betas + gate_size, *share = rate + heads;
    int64_t *borders = (int64_t *)(((uintptr_t)(share + heads * group) + 7) / 8 * 8);
    for (int64_t t = 0; t <= tokens; t++) borders[t] = t;
    for (int64_t h = 0; decay_weight && h < heads; h++) rate[h] = expf(log_rate[h]);
    for (int64_t h = 0; window && h < heads * group; h++) share[h] = 1.0f / (1.0f + expf(-window_gate[h]));
    const int few = tokens < 4 ? 1 : threads; /* waking another thread costs more than a few rows do */
    if (unit) {
        dtr_unit_rows(q, queries, tokens, heads * group, dim, q_stride, type, unit_epsilon, few);
        dtr_unit_rows(k, keys, tokens, heads, dim, k_stride, type, unit_epsilon, few);
    } else {
        gather_rows(q, type, q_stride, tokens, heads * group * dim, queries);
        gather_rows(k, type, k_stride, tokens, heads * dim, keys);
    }
    gather_rows(values, values_type, values_stride, tokens, heads * dim, writes);
    if (decay_weight) {
        dtr_gates(hidden, decay_weight, decay_bias, rate, decays, tokens, inputs, heads, hidden_stride, hidden_type, 1, few);
        log_decay = decays;
    }
    if (beta_weight) {
        dtr_gates(hidden, beta_weight, beta_bias, NULL, betas, tokens, inputs, heads, hidden_stride, hidden_type, 0, few);
        beta = betas;
    }
    int result = dtr_linear_forward(queries, keys, writes, log_decay, beta, linear, pool, slots, borders, NULL, NULL, NULL,
                                    heads * group * dim, heads * dim, heads * dim, pool_stride, tokens, heads, group, dim,
                                    dim, 1, 0, 0, pool_slots, tokens, FLOAT32, pool_type, decay_kind, beta != NULL, scale,
                                    threads);
    if (!result && window)
        result = dtr_window_step(q, k, v, ring_k, ring_v, slots, positions, near, q_stride, k_stride, v_stride, ring_slot,
                                 ring_row, tokens, heads, group, dim, window, 0, pool_slots, type, ring_type, FLOAT32,
                                 1.0f / sqrtf((float)dim), threads);
    if (!result)
        dtr_readout(linear, gain, window ? near : NULL, share, out, tokens, heads * group, dim, FLOAT32, out_type,
                    norm_epsilon, few);
    free(work);
    return result;
}
