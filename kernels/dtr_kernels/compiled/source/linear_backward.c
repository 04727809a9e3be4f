/* Gradients of linear attention.
 *
 * The forward pass left the state before every chunk and, for the delta rules, the prediction error e = v - S^T k of
 * every token. With u = v or beta e, a chunk's states come back from its first by S <- exp(g) S + k (x) u alone. Then,
 * from the last token to the first, with D the gradient of the state after a token, S' the decayed state before its
 * write and S the state after it:
 *
 *     D   <- D + scale sum_g q_g (x) dout_g          dq_g = scale S dout_g
 *     du   = D^T k                                   dk   = D u
 *     dv   = du, or for the delta rules beta du      dbeta = du . e,   dr = -beta du,   dk += S' dr,   D <- D + k (x) dr
 *     dg   = sum over the decayed elements of D S'   D <- exp(g) D
 *
 * Here a state is kept with its value columns as rows, so that sums over columns (dq, dk, dg) run along vectors; only
 * D^T k has to sum over lanes. One task is one sequence and kv head.
 */
#include "simd.h"

#define ROWS 32 /* value columns handled at a time: with a chunk of 32 tokens and Dk = 64 the states fill 256 KiB */
#define AHEAD 6 /* tokens between asking for operands and using them */
#define PART 4  /* rows whose sums stay in registers together */

typedef struct {
    const float *q, *k, *v, *log_decay, *beta, *error, *saved, *grad_out, *grad_final;
    float *grad_q, *grad_k, *grad_v, *grad_decay, *grad_beta, *grad_initial;
    const int64_t *borders;
    int64_t heads, group, key_dim, value_dim, chunk, saved_per_sequence;
    int decay_kind, delta;
    float scale;
} Problem;

enum { NO_DECAY = 0, HEAD_DECAY = 1, KEY_DECAY = 2 };

/* One token and ROWS value columns. padded: Dk rounded up to whole vectors. q, grad_q [group][padded]; k, decay,
 * grad_k, grad_decay [padded]; D, before [ROWS][padded]; dout [group][ROWS], times scale; u, error, grad_v [ROWS].
 * Adds to grad_q, grad_k and grad_decay; returns dbeta. */
INLINE float token_back(const int GROUP, const int DELTA, int64_t group, int64_t padded, const float *restrict q,
                        const float *restrict k, const float *restrict decay, float *restrict D,
                        const float *restrict before, const float *restrict dout, const float *restrict u,
                        const float *restrict error, float beta, float *restrict grad_q, float *restrict grad_k,
                        float *restrict grad_decay, float *restrict grad_v) {
    const int64_t G = GROUP ? GROUP : group;
    float grad_beta = 0;
    for (int64_t j = 0; j < ROWS; j += PART) {
        vec sum[PART] = {0};
        for (int64_t i = 0; i < padded; i += LANES) {
            const vec key = *(const vec *)(k + i);
#pragma GCC unroll 4
            for (int r = 0; r < PART; r++) {
                vec d = *(vec *)(D + (j + r) * padded + i);
#pragma GCC unroll 4
                for (int64_t g = 0; g < G; g++) d += dout[g * ROWS + j + r] * *(const vec *)(q + g * padded + i);
                *(vec *)(D + (j + r) * padded + i) = d;
                sum[r] += d * key;
            }
        }
        float back[PART];
        for (int r = 0; r < PART; r++) {
            const float du = sum_lanes(sum[r]);
            grad_v[j + r] = DELTA ? beta * du : du;
            if (DELTA) grad_beta += du * error[j + r];
            back[r] = -beta * du;
        }
        for (int64_t i = 0; i < padded; i += LANES) {
            const vec key = *(const vec *)(k + i), a = *(const vec *)(decay + i);
            vec sum_k = *(vec *)(grad_k + i), sum_decay = *(vec *)(grad_decay + i);
            vec after[PART];
#pragma GCC unroll 4
            for (int r = 0; r < PART; r++) {
                vec d = *(vec *)(D + (j + r) * padded + i);
                const vec decayed = a * *(const vec *)(before + (j + r) * padded + i);
                after[r] = decayed + u[j + r] * key;
                sum_k += u[j + r] * d;
                if (DELTA) {
                    d += back[r] * key;
                    sum_k += back[r] * decayed;
                }
                sum_decay += d * decayed;
                *(vec *)(D + (j + r) * padded + i) = a * d;
            }
#pragma GCC unroll 4
            for (int64_t g = 0; g < G; g++) {
                vec sum_q = *(vec *)(grad_q + g * padded + i);
#pragma GCC unroll 4
                for (int r = 0; r < PART; r++) sum_q += dout[g * ROWS + j + r] * after[r];
                *(vec *)(grad_q + g * padded + i) = sum_q;
            }
            *(vec *)(grad_k + i) = sum_k;
            *(vec *)(grad_decay + i) = sum_decay;
        }
    }
    return grad_beta;
}

typedef float TokenBack(int64_t group, int64_t padded, const float *restrict q, const float *restrict k,
                        const float *restrict decay, float *restrict D, const float *restrict before,
                        const float *restrict dout, const float *restrict u, const float *restrict error, float beta,
                        float *restrict grad_q, float *restrict grad_k, float *restrict grad_decay,
                        float *restrict grad_v);
#define BACK(GROUP, DELTA)                                                                                             \
    static float back_##GROUP##DELTA(int64_t group, int64_t padded, const float *restrict q, const float *restrict k,  \
                                     const float *restrict decay, float *restrict D, const float *restrict before,     \
                                     const float *restrict dout, const float *restrict u,                              \
                                     const float *restrict error, float beta, float *restrict grad_q,                  \
                                     float *restrict grad_k, float *restrict grad_decay, float *restrict grad_v) {     \
        return token_back(GROUP, DELTA, group, padded, q, k, decay, D, before, dout, u, error, beta, grad_q, grad_k,   \
                          grad_decay, grad_v);                                                                         \
    }
BACK(0, 0) BACK(0, 1) BACK(1, 0) BACK(1, 1) BACK(2, 0) BACK(2, 1) BACK(3, 0) BACK(3, 1) BACK(4, 0) BACK(4, 1)
/* [0]: any group size */
static TokenBack *const BACK_FOR[5][2] = {
    {back_00, back_01}, {back_10, back_11}, {back_20, back_21}, {back_30, back_31}, {back_40, back_41}};

/* to[i] = from[i], or += if it is not the first time. */
INLINE void give(float *restrict to, const float *restrict from, int64_t n, int first) {
    if (first) memcpy(to, from, (size_t)n * 4);
    else for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

/* Floats of scratch memory that a task needs. */
static int64_t scratch_floats(const Problem *p, int64_t padded) {
    return (p->chunk + 1) * ROWS * padded               /* states of a chunk, D */
           + p->chunk * 2 * padded                      /* k and decay of a chunk */
           + p->chunk * 2 * ROWS                        /* u and error of a chunk */
           + 2 * p->group * padded + 2 * padded + p->group * ROWS + ROWS; /* one token's q, gradients, dout */
}

static void run_task(const Problem *p, int64_t sequence, int64_t head, float *work) {
    const int64_t key_dim = p->key_dim, value_dim = p->value_dim, heads = p->heads, group = p->group, chunk = p->chunk;
    const int64_t padded = (key_dim + LANES - 1) / LANES * LANES, state = ROWS * padded;
    const int64_t first = p->borders[sequence], last = p->borders[sequence + 1];
    float *states = work, *D = states + chunk * state, *keys = D + state, *decays = keys + chunk * padded;
    float *writes = decays + chunk * padded, *errors = writes + chunk * ROWS, *q = errors + chunk * ROWS;
    float *grad_q = q + group * padded, *grad_k = grad_q + group * padded, *grad_decay = grad_k + padded;
    float *dout = grad_decay + padded, *grad_v = dout + group * ROWS;
    TokenBack *const back = BACK_FOR[group <= 4 ? group : 0][p->delta];
    memset(work, 0, (size_t)scratch_floats(p, padded) * 4); /* padding of keys and queries stays zero */

    for (int64_t column = 0; column < value_dim; column += ROWS) {
        const int64_t columns = MIN(ROWS, value_dim - column);
        const int first_block = column == 0;
        const int64_t whole = (sequence * heads + head) * key_dim * value_dim + column;
        memset(D, 0, (size_t)state * 4);
        if (p->grad_final)
            for (int64_t i = 0; i < key_dim; i++)
                for (int64_t j = 0; j < columns; j++) D[j * padded + i] = p->grad_final[whole + i * value_dim + j];
        if (columns < ROWS) {
            memset(writes, 0, (size_t)(chunk * 2 * ROWS) * 4);
            memset(dout, 0, (size_t)(group * ROWS) * 4);
            memset(states, 0, (size_t)state * 4);
        }
        for (int64_t n = (last - first + chunk - 1) / chunk - 1; n >= 0; n--) {
            const int64_t start = first + n * chunk, tokens = MIN(chunk, last - start);
            const float *saved = p->saved + ((sequence * p->saved_per_sequence + n) * heads + head) * key_dim * value_dim + column;
            for (int64_t i = 0; i < key_dim; i++)
                for (int64_t j = 0; j < columns; j++) states[j * padded + i] = saved[i * value_dim + j];
            for (int64_t c = 0; c < tokens; c++) {
                const int64_t row = (start + c) * heads + head;
                prefetch(p->k, FLOAT32, (row + AHEAD * heads) * key_dim, key_dim); /* may lie past the end */
                prefetch(p->delta ? p->error : p->v, FLOAT32, (row + AHEAD * heads) * value_dim + column, columns);
                for (int64_t g = 0; g < group; g++) { /* for the way back */
                    prefetch(p->q, FLOAT32, (row * group + g) * key_dim, key_dim);
                    prefetch(p->grad_out, FLOAT32, (row * group + g) * value_dim + column, columns);
                }
                float *k = keys + c * padded, *decay = decays + c * padded, *u = writes + c * ROWS, *e = errors + c * ROWS;
                memcpy(k, p->k + row * key_dim, (size_t)key_dim * 4);
                if (p->decay_kind == KEY_DECAY) {
                    memcpy(decay, p->log_decay + row * key_dim, (size_t)key_dim * 4);
                    for (int64_t i = 0; i < padded; i += LANES) store(decay + i, exp_vec(load(decay + i)));
                } else {
                    const vec a = splat(p->decay_kind == HEAD_DECAY ? expf(p->log_decay[row]) : 1.0f);
                    for (int64_t i = 0; i < padded; i += LANES) store(decay + i, a);
                }
                memcpy(p->delta ? e : u, (p->delta ? p->error : p->v) + row * value_dim + column, (size_t)columns * 4);
                if (p->delta)
                    for (int64_t j = 0; j < columns; j++) u[j] = p->beta[row] * e[j];
                if (c + 1 == tokens) break; /* states are those before a token */
                const float *before = states + c * state;
                for (int64_t j = 0; j < ROWS; j++)
                    for (int64_t i = 0; i < padded; i += LANES)
                        store(states + (c + 1) * state + j * padded + i,
                              load(decay + i) * load(before + j * padded + i) + u[j] * load(k + i));
            }
            for (int64_t c = tokens - 1; c >= 0; c--) {
                const int64_t token = start + c, row = token * heads + head;
                for (int64_t g = 0; g < group; g++) {
                    memcpy(q + g * padded, p->q + (row * group + g) * key_dim, (size_t)key_dim * 4);
                    for (int64_t j = 0; j < columns; j++)
                        dout[g * ROWS + j] = p->scale * p->grad_out[(row * group + g) * value_dim + column + j];
                }
                memset(grad_q, 0, (size_t)((group + 2) * padded) * 4); /* grad_k and grad_decay lie behind */
                const float grad_beta =
                    back(group, padded, q, keys + c * padded, decays + c * padded, D, states + c * state, dout,
                         writes + c * ROWS, errors + c * ROWS, p->delta ? p->beta[row] : 0.0f, grad_q, grad_k,
                         grad_decay, grad_v);
                for (int64_t g = 0; g < group; g++)
                    give(p->grad_q + (row * group + g) * key_dim, grad_q + g * padded, key_dim, first_block);
                give(p->grad_k + row * key_dim, grad_k, key_dim, first_block);
                memcpy(p->grad_v + row * value_dim + column, grad_v, (size_t)columns * 4);
                if (p->delta) give(p->grad_beta + row, &grad_beta, 1, first_block);
                if (p->decay_kind == KEY_DECAY) give(p->grad_decay + row * key_dim, grad_decay, key_dim, first_block);
                if (p->decay_kind == HEAD_DECAY) {
                    vec sum = {0};
                    for (int64_t i = 0; i < padded; i += LANES) sum += load(grad_decay + i);
                    const float total = sum_lanes(sum);
                    give(p->grad_decay + row, &total, 1, first_block);
                }
            }
        }
        for (int64_t i = 0; i < key_dim; i++)
            for (int64_t j = 0; j < columns; j++) p->grad_initial[whole + i * value_dim + j] = D[j * padded + i];
    }
}

/* Gradients of `dtr_linear_forward` for float operands, all contiguous: q, grad_q [N,Hq,Dk]; k [N,Hkv,Dk]; v [N,Hkv,Dv];
 * grad_out [N,Hq,Dv]; grad_final (or NULL), grad_initial [R,Hkv,Dk,Dv]. `chunk` is the forward's saved_chunk. */
int dtr_linear_backward(const float *q, const float *k, const float *v, const float *log_decay, const float *beta,
                        const float *error, const float *saved, const float *grad_out, const float *grad_final,
                        float *grad_q, float *grad_k, float *grad_v, float *grad_decay, float *grad_beta,
                        float *grad_initial, const int64_t *borders, int64_t sequences, int64_t heads, int64_t group,
                        int64_t key_dim, int64_t value_dim, int64_t chunk, int64_t saved_per_sequence, int decay_kind,
                        int delta, float scale, int threads) {
    const Problem p = {q, k, v, log_decay, beta, error, saved, grad_out, grad_final, grad_q, grad_k, grad_v, grad_decay,
                       grad_beta, grad_initial, borders, heads, group, key_dim, value_dim, chunk, saved_per_sequence,
                       decay_kind, delta, scale};
    const int64_t tasks = sequences * heads, padded = (key_dim + LANES - 1) / LANES * LANES;
    int failed = DONE;
    threads = (int)MIN((int64_t)threads, tasks);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *work = scratch(scratch_floats(&p, padded));
        if (!work) {
#pragma omp atomic write
            failed = NO_MEMORY;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++)
            if (work) run_task(&p, task / heads, task % heads, work);
        free(work);
    }
    return failed;
}
