/* Gradients of the window branch. Probabilities are computed again block by block, so nothing but q, k and v is kept:
 *
 *     dV += P^T dO      dP = dO V^T      dS = P (dP - rowsum(P dP))      dQ = scale dS K      dK += scale dS^T Q
 *
 * The one more key is one more column of P and dP; its value's gradient is its probability times dO. */
#include "window.h"

static int64_t scratch_floats(const Window *w) {
    const int64_t padded = whole_lanes(w->dim), rows = rows_before(w) + SEGMENT, keys = keys_of_block(w);
    return 6 * rows * padded + rows + LANES * keys + w->group * LANES * (3 * padded + 2 * keys + 1);
}

static void run_segment(const Window *w, int64_t sequence, int64_t head, int64_t from, const float *grad_out,
                        float *grad_q, float *grad_k, float *grad_v, float *grad_rest_logit, float *grad_rest_value,
                        float *work) {
    const int64_t dim = w->dim, padded = whole_lanes(dim), group = w->group, keys = keys_of_block(w), heads = w->heads;
    const int64_t first = w->borders[sequence], to = MIN(from + SEGMENT, w->borders[sequence + 1] - first);
    const int64_t before = rows_before(w), rows = before + whole_lanes(to - from), height = group * LANES;
    float *k = work, *v = k + rows * padded, *kt = v + rows * padded, *vt = kt + rows * padded;
    float *sum_k = vt + rows * padded, *sum_v = sum_k + rows * padded, *bias = sum_v + rows * padded;
    float *band = bias + rows, *q = band + LANES * keys, *dout = q + height * padded, *dq = dout + height * padded;
    float *p = dq + height * padded, *dp = p + height * keys, *rest = dp + height * keys;
    gather(w, sequence, head, from, to, k, v, bias);
    transpose(k, rows, padded, kt);
    transpose(v, rows, padded, vt);
    make_band(w, band);
    memset(sum_k, 0, (size_t)(2 * rows * padded) * 4);
    for (int64_t block = 0; block < to - from; block += LANES) {
        const int64_t token = first + from + block, tokens = MIN(LANES, to - from - block);
        gather_block(w->q, w->type, token * w->q_stride + head * group * dim, w->q_stride, group, dim, tokens, w->scale, q);
        gather_block(grad_out, FLOAT32, (token * heads + head) * group * dim, heads * group * dim, group, dim, tokens, 1, dout);
        const int64_t skip = missing_keys(w, sequence, from + block), near = block + skip, seen = keys - skip;
        product(height, seen, dim, q, padded, 1, kt + near, rows, p, keys, 0);
        softmax(p, group, seen, keys, band + skip, bias + near, rest_logits(w, head), rest);
        product(height, seen, dim, dout, padded, 1, vt + near, rows, dp, keys, 0);
        product(seen, padded, height, p, 1, keys, dout, padded, sum_v + near * padded, padded, 1);
        for (int64_t row = 0; row < height; row++) {
            float *probability = p + row * keys, *gradient = dp + row * keys;
            vec total = {0};
            for (int64_t m = 0; m < seen; m += LANES) total += load(probability + m) * load(gradient + m);
            float mean = sum_lanes(total);
            if (w->rest_logit && row % LANES < tokens) {
                const int64_t offset = (((token + row % LANES) * heads + head) * group + row / LANES) * dim;
                const float *dy = dout + row * padded, *value = w->rest_value + offset;
                float along = 0.0f;
                for (int64_t d = 0; d < dim; d++) along += dy[d] * value[d];
                for (int64_t d = 0; d < dim; d++) grad_rest_value[offset + d] = rest[row] * dy[d];
                mean += rest[row] * along;
                grad_rest_logit[row / LANES] += rest[row] * (along - mean);
            }
            for (int64_t m = 0; m < seen; m += LANES)
                store(gradient + m, load(probability + m) * (load(gradient + m) - mean));
        }
        product(height, padded, seen, dp, keys, 1, k + near * padded, padded, dq, padded, 0);
        product(seen, padded, height, dp, 1, keys, q, padded, sum_k + near * padded, padded, 1); /* q holds scale */
        for (int64_t g = 0; g < group; g++)
            for (int64_t c = 0; c < tokens; c++) {
                float *to_row = grad_q + (((token + c) * heads + head) * group + g) * dim;
                for (int64_t d = 0; d < dim; d++) to_row[d] = w->scale * dq[(g * LANES + c) * padded + d];
            }
    }
    /* Rows before this segment belong to the one before it, which has been here already: tasks are whole sequences. */
    for (int64_t i = MAX(0, before - from); i < before + to - from; i++) {
        const int64_t offset = ((first + from - before + i) * heads + head) * dim;
        for (int64_t d = 0; d < dim; d++) {
            grad_k[offset + d] += sum_k[i * padded + d];
            grad_v[offset + d] += sum_v[i * padded + d];
        }
    }
}

/* q, k, v, grad_out float, contiguous; grad_k, grad_v and grad_rest_logit start at zero. mask, rest_logit and rest_value as
 * in the forward pass; there is no past. grad_rest_logit [sequences,Hq]: each sequence's part. */
int dtr_window_backward(const float *q, const float *k, const float *v, const uint8_t *mask, const int64_t *borders,
                        const float *rest_logit, const float *rest_value, const float *grad_out, float *grad_q,
                        float *grad_k, float *grad_v, float *grad_rest_logit, float *grad_rest_value, int64_t sequences,
                        int64_t heads, int64_t group, int64_t dim, int64_t window, float scale, int threads) {
    const Window w = {q, k, v, NULL, NULL, NULL, mask, NULL, borders, NULL, heads * group * dim, heads * dim, heads * dim,
                      0, 0, heads, group, dim, window, FLOAT32, FLOAT32, 0, scale, rest_logit, rest_value};
    const int64_t tasks = sequences * heads;
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
            const int64_t sequence = task / heads, length = borders[sequence + 1] - borders[sequence];
            for (int64_t from = 0; work && from < length; from += SEGMENT)
                run_segment(&w, sequence, task % heads, from, grad_out, grad_q, grad_k, grad_v,
                            rest_logit ? grad_rest_logit + task * group : NULL, grad_rest_value, work);
        }
        free(work);
    }
    return failed;
}
