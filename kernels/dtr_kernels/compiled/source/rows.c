/* What surrounds the operator, one head's row at a time, with gradients: rotary embedding, L2 norm, read-out.
 *
 * In torch each of these is a chain of passes over [tokens, heads, dim] through memory; here it is one. */
#include "simd.h"

#define MAX_DIM 8192

INLINE float dot(const float *a, const float *b, int64_t n) {
    vec sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sum += load(a + i) * load(b + i);
    float total = sum_lanes(sum);
    for (; i < n; i++) total += a[i] * b[i];
    return total;
}

/* out = x / sqrt(sum x^2 + epsilon) over dim. x [tokens, heads, dim] any type, tokens `stride` elements apart; out float. */
int dtr_unit_rows(const void *x, float *out, int64_t tokens, int64_t heads, int64_t dim, int64_t stride, int type,
                  float epsilon, int threads) {
    const int64_t rows = tokens * heads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float row[MAX_DIM];
        widen(row, at(x, type, r / heads * stride + r % heads * dim), type, dim);
        const float scale = 1.0f / sqrtf(dot(row, row, dim) + epsilon);
        for (int64_t i = 0; i < dim; i++) out[r * dim + i] = scale * row[i];
    }
    return DONE;
}

/* y = s x with s = (sum x^2 + epsilon)^-1/2: dx = s (dy - y (y . dy)). */
int dtr_unit_rows_backward(const void *x, const float *grad_out, float *grad, int64_t tokens, int64_t heads, int64_t dim,
                           int64_t stride, int type, float epsilon, int threads) {
    const int64_t rows = tokens * heads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float row[MAX_DIM];
        const float *dy = grad_out + r * dim;
        widen(row, at(x, type, r / heads * stride + r % heads * dim), type, dim);
        const float scale = 1.0f / sqrtf(dot(row, row, dim) + epsilon);
        const float along = scale * scale * dot(row, dy, dim);
        for (int64_t i = 0; i < dim; i++) grad[r * dim + i] = scale * (dy[i] - along * row[i]);
    }
    return DONE;
}

/* Rotary embedding of halves: out = x cos + rotate_half(x) sin. x [tokens, heads, dim] any type, cos, sin [tokens, dim]
 * repeated every `period` tokens, out float. backward: x is the gradient of out (float), out that of x. */
int dtr_rotary(const void *x, const float *cosine, const float *sine, float *out, int64_t tokens, int64_t heads,
                int64_t dim, int64_t period, int type, int backward, int threads) {
    const int64_t half = dim / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        float row[MAX_DIM];
        const float *c = cosine + t % period * dim, *s = sine + t % period * dim;
        for (int64_t h = 0; h < heads; h++) {
            float *to = out + (t * heads + h) * dim;
            widen(row, at(x, type, (t * heads + h) * dim), type, dim);
            if (backward)
                for (int64_t i = 0; i < half; i++) {
                    to[i] = row[i] * c[i] + row[i + half] * s[i + half];
                    to[i + half] = row[i + half] * c[i + half] - row[i] * s[i];
                }
            else
                for (int64_t i = 0; i < half; i++) {
                    to[i] = row[i] * c[i] - row[i + half] * s[i];
                    to[i + half] = row[i + half] * c[i + half] + row[i] * s[i + half];
                }
        }
    }
    return DONE;
}

enum { SIGMOID = 0, DECAY = 1 };

/* The gates of a form, from the layer's input: z = weight h + bias; out = sigmoid(z), or -rate softplus(z). h [tokens,
 * inputs] any type, tokens `stride` elements apart; weight [outputs, inputs], bias, rate [outputs], out [tokens, outputs]. */
int dtr_gates(const void *h, const float *weight, const float *bias, const float *rate, float *out, int64_t tokens,
              int64_t inputs, int64_t outputs, int64_t stride, int type, int kind, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        float row[MAX_DIM];
        widen(row, at(h, type, t * stride), type, inputs);
        for (int64_t j = 0; j < outputs; j++) {
            const float z = dot(weight + j * inputs, row, inputs) + bias[j];
            out[t * outputs + j] = kind == SIGMOID ? 1.0f / (1.0f + expf(-z))
                                                   : -rate[j] * (MAX(z, 0.0f) + log1pf(expf(-fabsf(z))));
        }
    }
    return DONE;
}

/* out = gain x / rms(x). x [tokens, heads, dim] float, gain [heads, dim], rms with epsilon inside the root. out float or
 * bfloat16. */
int dtr_readout(const float *x, const float *gain, void *out, int64_t tokens, int64_t heads, int64_t dim, int out_type,
                float epsilon, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        float scaled[MAX_DIM];
        for (int64_t h = 0; h < heads; h++) {
            const int64_t offset = (t * heads + h) * dim;
            const float *row = x + offset, *g = gain + h * dim;
            const float scale = 1.0f / sqrtf(dot(row, row, dim) / (float)dim + epsilon);
            for (int64_t i = 0; i < dim; i++) scaled[i] = scale * row[i] * g[i];
            narrow((char *)out + offset * bytes_of(out_type), out_type, scaled, dim);
        }
    }
    return DONE;
}

/* With n = x / rms(x): dgain = sum dy n, dn = gain dy, dx = (dn - n mean(n dn)) / rms(x). */
int dtr_readout_backward(const float *x, const float *gain, const float *grad_out, float *grad_x, float *grad_gain,
                         int64_t tokens, int64_t heads, int64_t dim, float epsilon, int threads) {
    /* Sums over tokens in fixed parts, added up in order: the same result in every run. */
    const int64_t parts = MIN(tokens, 64), size = heads * dim;
    float *sums = calloc((size_t)MAX(1, parts * size), 4);
    if (!sums) return NO_MEMORY;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t part = 0; part < parts; part++) {
        float n[MAX_DIM], dn[MAX_DIM];
        float *sum = sums + part * size;
        for (int64_t t = tokens * part / parts; t < tokens * (part + 1) / parts; t++)
            for (int64_t h = 0; h < heads; h++) {
                const int64_t offset = (t * heads + h) * dim;
                const float *row = x + offset, *dy = grad_out + offset, *g = gain + h * dim;
                const float scale = 1.0f / sqrtf(dot(row, row, dim) / (float)dim + epsilon);
                for (int64_t i = 0; i < dim; i++) {
                    n[i] = scale * row[i];
                    sum[h * dim + i] += dy[i] * n[i];
                    dn[i] = g[i] * dy[i];
                }
                const float along = dot(n, dn, dim) / (float)dim;
                for (int64_t i = 0; i < dim; i++) grad_x[offset + i] = scale * (dn[i] - along * n[i]);
            }
    }
    memset(grad_gain, 0, (size_t)size * 4);
    for (int64_t part = 0; part < parts; part++)
        for (int64_t i = 0; i < size; i++) grad_gain[i] += sums[part * size + i];
    free(sums);
    return DONE;
}
