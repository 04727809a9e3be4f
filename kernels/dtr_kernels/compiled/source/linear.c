/* Linear attention, forward: token after token with the state in the first-level cache.
 *
 * One task is one sequence, one kv head and a block of value columns: columns of the state do not depend on one
 * another, for the delta rule too. A task makes one pass over its block of the state per token. The pass decays the
 * block, writes k (x) u, reads it out for every query head of the group, and already sums S^T k of the *next* token,
 * which the delta rule needs before that token can write. So the state is loaded and stored once a token, and the
 * arithmetic units, not the cache, are the limit: (group + 3) multiply-adds per state element and token.
 */
#include "simd.h"

#define BLOCK_VECTORS 2
#define BLOCK (BLOCK_VECTORS * LANES) /* value columns of a task */
#define MAX_GROUP 4                   /* query heads read out in the main pass; more take passes of their own */

enum { NO_DECAY = 0, HEAD_DECAY = 1, KEY_DECAY = 2 };

typedef struct {
    const void *q, *k, *v;                     /* [N,Hq,Dk], [N,Hkv,Dk], [N,Hkv,Dv], contiguous but for token strides */
    const float *log_decay, *beta;             /* [N,Hkv] or [N,Hkv,Dk]; [N,Hkv] */
    float *out;                                /* [N,Hq,Dv] */
    void *pool;                                /* [S,Hkv,Dk,Dv], slots `pool_stride` elements apart */
    const int64_t *slots, *borders;            /* [R], [R+1] */
    const uint8_t *initial;                    /* [R] or NULL: all start from the pool */
    float *error, *saved;                      /* training: v - S^T k [N,Hkv,Dv]; states at chunk starts, or NULL */
    int64_t q_stride, k_stride, v_stride, pool_stride; /* elements from token to token, slot to slot */
    int64_t heads, group, key_dim, value_dim, saved_chunk, saved_per_sequence;
    int type, pool_type, decay_kind, delta;
    float scale;
} Problem;

/* Query heads past the main pass: out_g = q_g^T S for MAX_GROUP of them. */
static void read_out(const float *restrict S, const float *const *q, int64_t key_dim, float *restrict out) {
    vec sum[MAX_GROUP][BLOCK_VECTORS] = {0};
    for (int64_t i = 0; i < key_dim; i++)
#pragma GCC unroll 4
        for (int g = 0; g < MAX_GROUP; g++)
#pragma GCC unroll 2
            for (int n = 0; n < BLOCK_VECTORS; n++) sum[g][n] += q[g][i] * *(const vec *)(S + i * BLOCK + n * LANES);
    for (int g = 0; g < MAX_GROUP; g++)
        for (int n = 0; n < BLOCK_VECTORS; n++) store(out + g * BLOCK + n * LANES, sum[g][n]);
}

/* The pass over the block for one token. GROUP, DECAY and DELTA are constants at every call. k_next is the next token's
 * key, times its decay if that is per key; S^T k_next comes back in `recall`. */
INLINE void token_pass(const int GROUP, const int DECAY, const int DELTA, float *restrict S, int64_t key_dim,
                       const float *const *q, const float *restrict k, const float *restrict k_next,
                       const float *restrict decay, const float *restrict u, float *restrict recall,
                       float *restrict out) {
    vec write[BLOCK_VECTORS], next[BLOCK_VECTORS] = {0}, read[MAX_GROUP][BLOCK_VECTORS] = {0};
    for (int n = 0; n < BLOCK_VECTORS; n++) write[n] = load(u + n * LANES);
#pragma GCC unroll 2
    for (int64_t i = 0; i < key_dim; i++) {
#pragma GCC unroll 2
        for (int n = 0; n < BLOCK_VECTORS; n++) {
            float *at_state = S + i * BLOCK + n * LANES;
            vec s = *(vec *)at_state;
            if (DECAY == HEAD_DECAY) s *= decay[0];
            if (DECAY == KEY_DECAY) s *= decay[i];
            s += k[i] * write[n];
            *(vec *)at_state = s;
#pragma GCC unroll 4
            for (int g = 0; g < GROUP; g++) read[g][n] += q[g][i] * s;
            if (DELTA) next[n] += k_next[i] * s;
        }
    }
    for (int n = 0; n < BLOCK_VECTORS; n++) {
        if (DELTA) store(recall + n * LANES, next[n]);
        for (int g = 0; g < GROUP; g++) store(out + g * BLOCK + n * LANES, read[g][n]);
    }
}

typedef void TokenPass(float *restrict S, int64_t key_dim, const float *const *q, const float *restrict k,
                       const float *restrict k_next, const float *restrict decay, const float *restrict u,
                       float *restrict recall, float *restrict out);
#define PASS(GROUP, DECAY, DELTA)                                                                                  \
    static void pass_##GROUP##DECAY##DELTA(float *restrict S, int64_t key_dim, const float *const *q,              \
                                           const float *restrict k, const float *restrict k_next,                  \
                                           const float *restrict decay, const float *restrict u,                   \
                                           float *restrict recall, float *restrict out) {                          \
        token_pass(GROUP, DECAY, DELTA, S, key_dim, q, k, k_next, decay, u, recall, out);                          \
    }
#define PASSES(GROUP) PASS(GROUP, 0, 0) PASS(GROUP, 0, 1) PASS(GROUP, 1, 0) PASS(GROUP, 1, 1) PASS(GROUP, 2, 0) PASS(GROUP, 2, 1)
PASSES(1) PASSES(2) PASSES(3) PASSES(4)
#define NAMES(G) {{pass_##G##00, pass_##G##01}, {pass_##G##10, pass_##G##11}, {pass_##G##20, pass_##G##21}}
static TokenPass *const PASS_FOR[MAX_GROUP][3][2] = {NAMES(1), NAMES(2), NAMES(3), NAMES(4)};

/* All tokens of one task. */
static void run_tokens(const Problem *p, int64_t sequence, int64_t head, int64_t column, float *restrict S,
                       float *restrict work) {
    const int decay_kind = p->decay_kind, delta = p->delta;
    TokenPass *const pass = PASS_FOR[MIN(p->group, MAX_GROUP) - 1][decay_kind][delta];
    const int64_t key_dim = p->key_dim, value_dim = p->value_dim, heads = p->heads, group = p->group;
    const int64_t first = p->borders[sequence], last = p->borders[sequence + 1];
    const int64_t columns = MIN(BLOCK, value_dim - column);
    const int narrow_inputs = p->type != FLOAT32;
    float u[BLOCK] ALIGNED = {0}, recall[BLOCK] ALIGNED = {0}, out[MAX_GROUP * BLOCK] ALIGNED;
    /* work: keys of two tokens as float, key times decay, decays of two tokens, queries of the group */
    float *key_rows[2] = {work, work + key_dim}, *weighted = work + 2 * key_dim;
    float *decays[2] = {work + 3 * key_dim, work + 4 * key_dim}, *query_rows = work + 5 * key_dim;
    const float *q[MAX_GROUP], *keys[2] = {0};

    for (int64_t t = first; t <= last; t++) {
        /* Prepare token t's key and decay, while token t - 1 is the one to be passed over. */
        const int now = (int)((t - first) & 1), before = now ^ 1;
        const float *k_next = weighted;
        if (t < last) {
            const void *key = at(p->k, p->type, t * p->k_stride + head * key_dim);
            if (narrow_inputs) widen(key_rows[now], key, p->type, key_dim);
            keys[now] = narrow_inputs ? key_rows[now] : (const float *)key;
            if (decay_kind == HEAD_DECAY) decays[now][0] = expf(p->log_decay[t * heads + head]);
            if (decay_kind == KEY_DECAY) {
                const float *log_decay = p->log_decay + (t * heads + head) * key_dim;
                int64_t i = 0;
                for (; i + LANES <= key_dim; i += LANES) store(decays[now] + i, exp_vec(load(log_decay + i)));
                for (; i < key_dim; i++) decays[now][i] = expf(log_decay[i]);
                if (delta) for (i = 0; i < key_dim; i++) weighted[i] = keys[now][i] * decays[now][i];
            } else k_next = keys[now];
        } else k_next = keys[before]; /* what it sums is not used */
        if (t == first) {
            if (delta) { /* no pass before the first token: S^T k by itself */
                vec sum[BLOCK_VECTORS] = {0};
                for (int64_t i = 0; i < key_dim; i++)
                    for (int n = 0; n < BLOCK_VECTORS; n++) sum[n] += k_next[i] * load(S + i * BLOCK + n * LANES);
                for (int n = 0; n < BLOCK_VECTORS; n++) store(recall + n * LANES, sum[n]);
            }
            continue;
        }
        const int64_t done = t - 1;
        if (p->saved && (done - first) % p->saved_chunk == 0) {
            float *saved = p->saved + (((sequence * p->saved_per_sequence + (done - first) / p->saved_chunk) * heads + head)
                                       * key_dim) * value_dim + column;
            for (int64_t i = 0; i < key_dim; i++) memcpy(saved + i * value_dim, S + i * BLOCK, (size_t)columns * 4);
        }
        const void *value = at(p->v, p->type, done * p->v_stride + head * value_dim + column);
        widen(u, value, p->type, columns);
        if (delta) {
            const float beta = p->beta[done * heads + head];
            const float decay = decay_kind == HEAD_DECAY ? decays[before][0] : 1.0f;
            for (int n = 0; n < BLOCK_VECTORS; n++)
                store(u + n * LANES, load(u + n * LANES) - decay * load(recall + n * LANES));
            if (p->error) memcpy(p->error + (done * heads + head) * value_dim + column, u, (size_t)columns * 4);
            for (int n = 0; n < BLOCK_VECTORS; n++) store(u + n * LANES, beta * load(u + n * LANES));
        }
        const int64_t query_offset = done * p->q_stride + head * group * key_dim;
        float *to = p->out + (done * heads + head) * group * value_dim + column;
        for (int64_t g0 = 0; g0 < group; g0 += MAX_GROUP) {
            const int64_t queries = MIN(MAX_GROUP, group - g0);
            for (int64_t g = 0; g < queries; g++) {
                const void *query = at(p->q, p->type, query_offset + (g0 + g) * key_dim);
                if (narrow_inputs) widen(query_rows + g * key_dim, query, p->type, key_dim);
                q[g] = narrow_inputs ? query_rows + g * key_dim : (const float *)query;
            }
            for (int64_t g = queries; g < MAX_GROUP; g++) q[g] = q[0]; /* read out and not used */
            if (g0 == 0)
                pass(S, key_dim, q, keys[before], k_next, decays[before], u, recall, out);
            else read_out(S, q, key_dim, out);
            for (int64_t g = 0; g < queries; g++) {
                for (int n = 0; n < BLOCK_VECTORS; n++)
                    store(out + g * BLOCK + n * LANES, p->scale * load(out + g * BLOCK + n * LANES));
                memcpy(to + (g0 + g) * value_dim, out + g * BLOCK, (size_t)columns * 4);
            }
        }
    }
}

static void run_task(const Problem *p, int64_t sequence, int64_t head, int64_t column, float *S, float *work) {
    const int64_t key_dim = p->key_dim, columns = MIN(BLOCK, p->value_dim - column);
    const int64_t offset = p->slots[sequence] * p->pool_stride + head * key_dim * p->value_dim + column;
    const int read = p->initial == NULL || p->initial[sequence];
    if (!read || columns < BLOCK) memset(S, 0, (size_t)(key_dim * BLOCK) * 4);
    if (read)
        for (int64_t i = 0; i < key_dim; i++)
            widen(S + i * BLOCK, at(p->pool, p->pool_type, offset + i * p->value_dim), p->pool_type, columns);
    run_tokens(p, sequence, head, column, S, work);
    for (int64_t i = 0; i < key_dim; i++)
        narrow((char *)p->pool + (offset + i * p->value_dim) * bytes_of(p->pool_type), p->pool_type, S + i * BLOCK, columns);
}

/* The operator over R ragged sequences and a pool of states, updated in place. Slots <= null_slot are skipped: the pool
 * stays as it is and `out` is set to zero. Returns 0, or 1 if scratch memory could not be had. */
int dtr_linear_forward(const void *q, const void *k, const void *v, const float *log_decay, const float *beta, float *out,
                       void *pool, const int64_t *slots, const int64_t *borders, const uint8_t *initial, float *error,
                       float *saved, int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t pool_stride,
                       int64_t sequences, int64_t heads, int64_t group, int64_t key_dim, int64_t value_dim,
                       int64_t saved_chunk, int64_t saved_per_sequence, int64_t null_slot, int type, int pool_type,
                       int decay_kind, int delta, float scale, int threads) {
    const Problem p = {q, k, v, log_decay, beta, out, pool, slots, borders, initial, error, saved, q_stride, k_stride,
                       v_stride, pool_stride, heads, group, key_dim, value_dim, saved_chunk, saved_per_sequence, type,
                       pool_type, decay_kind, delta, scale};
    const int64_t blocks = (value_dim + BLOCK - 1) / BLOCK, tasks = sequences * heads * blocks;
    int failed = 0;
    threads = (int)MIN((int64_t)threads, tasks);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *S = scratch(key_dim * BLOCK + (5 + MAX_GROUP) * key_dim);
        if (!S) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t sequence = task / (heads * blocks), head = task / blocks % heads, column = task % blocks * BLOCK;
            const int64_t first = borders[sequence], last = borders[sequence + 1];
            if (!S || first == last) continue;
            if (slots[sequence] <= null_slot) {
                for (int64_t row = first; row < last; row++)
                    for (int64_t g = 0; g < group; g++)
                        memset(out + ((row * heads + head) * group + g) * value_dim + column, 0,
                               (size_t)MIN(BLOCK, value_dim - column) * 4);
            } else run_task(&p, sequence, head, column, S, S + key_dim * BLOCK);
        }
        free(S);
    }
    return failed;
}
