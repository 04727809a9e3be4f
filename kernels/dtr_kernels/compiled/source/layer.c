/* What surrounds a mixer in a decoder layer while serving: residual addition with RMS norm, and the gated activation.
 *
 * Values are rounded to the model's type where vLLM's own layers round them, so that a layer computes the same with and
 * without these. */
#include "simd.h"

#define MAX_DIM 8192
#define PIECE 512

/* sum = x + residual; out = weight * round(sum / sqrt(mean sum^2 + epsilon)). All [tokens, width] of one type, one row
 * after another; weight [width] of it too. residual NULL: out is made from x alone, and sum is not written. */
int dtr_add_norm(const void *x, const void *residual, const void *weight, void *sum, void *out, int64_t tokens,
                 int64_t width, int type, float epsilon, int threads) {
    const int64_t bytes = bytes_of(type);
    float scale_of[MAX_DIM];
    widen(scale_of, weight, type, width);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        float row[MAX_DIM], other[MAX_DIM];
        widen(row, at(x, type, t * width), type, width);
        if (residual) {
            widen(other, at(residual, type, t * width), type, width);
            for (int64_t i = 0; i < width; i++) row[i] += other[i];
            narrow((char *)sum + t * width * bytes, type, row, width);
        }
        vec squares = {0};
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) squares += load(row + i) * load(row + i);
        float total = sum_lanes(squares);
        for (; i < width; i++) total += row[i] * row[i];
        const float scale = 1.0f / sqrtf(total / (float)width + epsilon);
        for (i = 0; i < width; i++) row[i] *= scale;
        char *to = (char *)out + t * width * bytes;
        if (type != FLOAT32) { /* rounded before the weight */
            narrow(to, type, row, width);
            widen(row, to, type, width);
        }
        for (i = 0; i < width; i++) row[i] *= scale_of[i];
        narrow(to, type, row, width);
    }
    return DONE;
}

/* out = round(silu(gate)) * up. x [tokens, 2 * width]: gate, then up; out [tokens, width]; one type. */
int dtr_silu_mul(const void *x, void *out, int64_t tokens, int64_t width, int type, int threads) {
    const int64_t bytes = bytes_of(type);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        float gate[PIECE] ALIGNED, up[PIECE] ALIGNED;
        for (int64_t first = 0; first < width; first += PIECE) {
            const int64_t n = MIN(PIECE, width - first);
            widen(gate, at(x, type, t * 2 * width + first), type, n);
            widen(up, at(x, type, (t * 2 + 1) * width + first), type, n);
            char *to = (char *)out + (t * width + first) * bytes;
            for (int64_t i = n; i < (n + LANES - 1) / LANES * LANES; i++) gate[i] = 0.0f;
            for (int64_t i = 0; i < n; i += LANES) {
                /* x / (1 + exp(-x)); exp_vec takes up to 88, where the quotient is as good as 0 */
                const vec z = load(gate + i);
                store(gate + i, z / (1.0f + exp_vec(-larger(z, splat(-88.0f)))));
            }
            if (type != FLOAT32) {
                narrow(to, type, gate, n);
                widen(gate, to, type, n);
            }
            for (int64_t i = 0; i < n; i++) gate[i] *= up[i];
            narrow(to, type, gate, n);
        }
    }
    return DONE;
}
