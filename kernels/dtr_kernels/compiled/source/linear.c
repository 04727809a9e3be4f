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

#define AHEAD 6                       /* tokens between asking for operands and using them */

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

/* Query heads past the main pass: out_g = q_g^T S for MAX_GROUP of them. Rows of S are `step` apart. */
static void read_out(const float *restrict S, int64_t step, const float *const *q, int64_t key_dim,
                     float *restrict out) {
    vec sum[MAX_GROUP][BLOCK_VECTORS] = {0};
    for (int64_t i = 0; i < key_dim; i++)
#pragma GCC unroll 4
        for (int g = 0; g < MAX_GROUP; g++)
#pragma GCC unroll 2
            for (int n = 0; n < BLOCK_VECTORS; n++) sum[g][n] += q[g][i] * load(S + i * step + n * LANES);
    for (int g = 0; g < MAX_GROUP; g++)
        for (int n = 0; n < BLOCK_VECTORS; n++) store(out + g * BLOCK + n * LANES, sum[g][n]);
}

/* sum = S^T k */
INLINE void recall_pass(const float *restrict S, int64_t step, int64_t key_dim, const float *restrict k,
                        float *restrict recall) {
    vec sum[BLOCK_VECTORS] = {0};
    for (int64_t i = 0; i < key_dim; i++)
        for (int n = 0; n < BLOCK_VECTORS; n++) sum[n] += k[i] * load(S + i * step + n * LANES);
    for (int n = 0; n < BLOCK_VECTORS; n++) store(recall + n * LANES, sum[n]);
}

/* The pass over the block for one token. GROUP, DECAY and NEXT are constants at every call; rows of S are `step` apart.
 * NEXT: k_next is the next token's key, times its decay if that is per key; S^T k_next comes back in `recall`. */
INLINE void token_pass(const int GROUP, const int DECAY, const int NEXT, float *restrict S, int64_t step,
                       int64_t key_dim, const float *const *q, const float *restrict k, const float *restrict k_next,
                       const float *restrict decay, const float *restrict u, float *restrict recall,
                       float *restrict out) {
    vec write[BLOCK_VECTORS], next[BLOCK_VECTORS] = {0}, read[MAX_GROUP][BLOCK_VECTORS] = {0};
    for (int n = 0; n < BLOCK_VECTORS; n++) write[n] = load(u + n * LANES);
#pragma GCC unroll 2
    for (int64_t i = 0; i < key_dim; i++) {
#pragma GCC unroll 2
        for (int n = 0; n < BLOCK_VECTORS; n++) {
            float *at_state = S + i * step + n * LANES;
            vec s = load(at_state);
            if (DECAY == HEAD_DECAY) s *= decay[0];
            if (DECAY == KEY_DECAY) s *= decay[i];
            s += k[i] * write[n];
            store(at_state, s);
#pragma GCC unroll 4
            for (int g = 0; g < GROUP; g++) read[g][n] += q[g][i] * s;
            if (NEXT) next[n] += k_next[i] * s;
        }
    }
    for (int n = 0; n < BLOCK_VECTORS; n++) {
        if (NEXT) store(recall + n * LANES, next[n]);
        for (int g = 0; g < GROUP; g++) store(out + g * BLOCK + n * LANES, read[g][n]);
    }
}

typedef void TokenPass(float *restrict S, int64_t step, int64_t key_dim, const float *const *q, const float *restrict k,
                       const float *restrict k_next, const float *restrict decay, const float *restrict u,
                       float *restrict recall, float *restrict out);
#define PASS(GROUP, DECAY, NEXT)                                                                                   \
    static void pass_##GROUP##DECAY##NEXT(float *restrict S, int64_t step, int64_t key_dim, const float *const *q, \
                                          const float *restrict k, const float *restrict k_next,                   \
                                          const float *restrict decay, const float *restrict u,                    \
                                          float *restrict recall, float *restrict out) {                           \
        token_pass(GROUP, DECAY, NEXT, S, step, key_dim, q, k, k_next, decay, u, recall, out);                     \
    }
#define PASSES(GROUP) PASS(GROUP, 0, 0) PASS(GROUP, 0, 1) PASS(GROUP, 1, 0) PASS(GROUP, 1, 1) PASS(GROUP, 2, 0) PASS(GROUP, 2, 1)
PASSES(1) PASSES(2) PASSES(3) PASSES(4)
#define NAMES(G) {{pass_##G##00, pass_##G##01}, {pass_##G##10, pass_##G##11}, {pass_##G##20, pass_##G##21}}
static TokenPass *const PASS_FOR[MAX_GROUP][3][2] = {NAMES(1), NAMES(2), NAMES(3), NAMES(4)};

/* The decay of token t and kv head `head`: one number, or key_dim of them. */
INLINE void read_decay(const Problem *p, int64_t t, int64_t head, float *restrict decay) {
    if (p->decay_kind == HEAD_DECAY) decay[0] = expf(p->log_decay[t * p->heads + head]);
    if (p->decay_kind == KEY_DECAY) {
        const float *log_decay = p->log_decay + (t * p->heads + head) * p->key_dim;
        int64_t i = 0;
        for (; i + LANES <= p->key_dim; i += LANES) store(decay + i, exp_vec(load(log_decay + i)));
        for (; i < p->key_dim; i++) decay[i] = expf(log_decay[i]);
    }
}

/* A row of operands as float: where it lies, or widened into `to`. */
INLINE const float *read_row(const void *base, int type, int64_t element, int64_t n, float *restrict to) {
    if (type == FLOAT32) return (const float *)at(base, type, element);
    widen(to, at(base, type, element), type, n);
    return to;
}

/* u: the value, for the delta rules less what the state recalls (kept in `error`) and times beta. */
INLINE void make_write(const Problem *p, int64_t t, int64_t head, int64_t column, int64_t columns, float decay,
                       const float *restrict recall, float *restrict u) {
    const int64_t row = t * p->heads + head;
    const void *value = at(p->v, p->type, t * p->v_stride + head * p->value_dim + column);
    if (p->type == FLOAT32 && columns == BLOCK)
        for (int n = 0; n < BLOCK_VECTORS; n++) store(u + n * LANES, load((const float *)value + n * LANES));
    else widen(u, value, p->type, columns);
    if (!p->delta) return;
    for (int n = 0; n < BLOCK_VECTORS; n++)
        store(u + n * LANES, load(u + n * LANES) - decay * load(recall + n * LANES));
    if (p->error) memcpy(p->error + row * p->value_dim + column, u, (size_t)columns * 4);
    for (int n = 0; n < BLOCK_VECTORS; n++) store(u + n * LANES, p->beta[row] * load(u + n * LANES));
}

/* Write u into the block and read it out for every query head of token t. rows: room for MAX_GROUP queries. */
INLINE void write_and_read(const Problem *p, TokenPass *pass, int64_t t, int64_t head, int64_t column, int64_t columns,
                           float *restrict S, int64_t step, const float *k, const float *k_next, const float *decay,
                           const float *u, float *restrict recall, float *rows) {
    const int64_t group = p->group, key_dim = p->key_dim, value_dim = p->value_dim;
    float out[MAX_GROUP * BLOCK] ALIGNED, *to = p->out + (t * p->heads + head) * group * value_dim + column;
    const float *q[MAX_GROUP];
    for (int64_t first = 0; first < group; first += MAX_GROUP) {
        const int64_t queries = MIN(MAX_GROUP, group - first);
        for (int64_t g = 0; g < MAX_GROUP; g++) /* those past `queries` are read out and not used */
            q[g] = g < queries ? read_row(p->q, p->type, t * p->q_stride + (head * group + first + g) * key_dim, key_dim,
                                          rows + g * key_dim)
                               : q[0];
        if (first == 0) pass(S, step, key_dim, q, k, k_next, decay, u, recall, out);
        else read_out(S, step, q, key_dim, out);
        for (int64_t g = 0; g < queries; g++) {
            float *row = columns == BLOCK ? to + (first + g) * value_dim : out + g * BLOCK;
            for (int n = 0; n < BLOCK_VECTORS; n++) store(row + n * LANES, p->scale * load(out + g * BLOCK + n * LANES));
            if (columns < BLOCK) memcpy(to + (first + g) * value_dim, row, (size_t)columns * 4);
        }
    }
}

/* Floats of scratch memory that a task needs beside the block: keys and decays of two tokens, key times decay, queries. */
INLINE int64_t work_floats(int64_t key_dim) { return (5 + MAX_GROUP) * key_dim; }

/* All tokens of one task. */
static void run_tokens(const Problem *p, int64_t sequence, int64_t head, int64_t column, float *restrict S,
                       float *restrict work) {
    const int64_t key_dim = p->key_dim, value_dim = p->value_dim, heads = p->heads;
    const int64_t first = p->borders[sequence], last = p->borders[sequence + 1];
    const int64_t columns = MIN(BLOCK, value_dim - column);
    TokenPass *const pass = PASS_FOR[MIN(p->group, MAX_GROUP) - 1][p->decay_kind][p->delta];
    float u[BLOCK] ALIGNED = {0}, recall[BLOCK] ALIGNED = {0};
    float *decays[2] = {work, work + key_dim}, *weighted = work + 2 * key_dim, *rows = work + 3 * key_dim;
    const float *keys[2] = {0};

    for (int64_t t = first; t <= last; t++) {
        /* Prepare token t's key and decay, while token t - 1 is the one to be passed over. */
        const int now = (int)((t - first) & 1), before = now ^ 1;
        const float *k_next = t < last ? NULL : keys[before]; /* after the last token: what it sums is not used */
        if (t + AHEAD < last) {
            prefetch(p->k, p->type, (t + AHEAD) * p->k_stride + head * key_dim, key_dim);
            prefetch(p->q, p->type, (t + AHEAD) * p->q_stride + head * p->group * key_dim, p->group * key_dim);
            prefetch(p->v, p->type, (t + AHEAD) * p->v_stride + head * value_dim + column, columns);
        }
        if (t < last) {
            k_next = keys[now] = read_row(p->k, p->type, t * p->k_stride + head * key_dim, key_dim, rows + now * key_dim);
            read_decay(p, t, head, decays[now]);
            if (p->decay_kind == KEY_DECAY && p->delta) {
                for (int64_t i = 0; i < key_dim; i++) weighted[i] = keys[now][i] * decays[now][i];
                k_next = weighted;
            }
        }
        if (t == first) { /* no pass before the first token: S^T k by itself */
            if (p->delta) recall_pass(S, BLOCK, key_dim, k_next, recall);
            continue;
        }
        const int64_t done = t - 1;
        if (p->saved && (done - first) % p->saved_chunk == 0) {
            const int64_t chunk = sequence * p->saved_per_sequence + (done - first) / p->saved_chunk;
            float *saved = p->saved + (chunk * heads + head) * key_dim * value_dim + column;
            for (int64_t i = 0; i < key_dim; i++) memcpy(saved + i * value_dim, S + i * BLOCK, (size_t)columns * 4);
        }
        make_write(p, done, head, column, columns, p->decay_kind == HEAD_DECAY ? decays[before][0] : 1.0f, recall, u);
        write_and_read(p, pass, done, head, column, columns, S, BLOCK, keys[before], k_next, decays[before], u, recall,
                       rows + 2 * key_dim);
    }
}

/* Decoding: one token on a float pool and a whole block, which is worked on where it lies. */
static void run_step(const Problem *p, int64_t sequence, int64_t head, int64_t column, float *restrict S,
                     float *restrict work) {
    const int64_t key_dim = p->key_dim, t = p->borders[sequence];
    float u[BLOCK] ALIGNED, recall[BLOCK] ALIGNED, *decay = work, *weighted = work + 2 * key_dim, *rows = work + 3 * key_dim;
    const float *k = read_row(p->k, p->type, t * p->k_stride + head * key_dim, key_dim, rows);
    read_decay(p, t, head, decay);
    if (p->delta) {
        const int per_key = p->decay_kind == KEY_DECAY;
        for (int64_t i = 0; per_key && i < key_dim; i++) weighted[i] = k[i] * decay[i];
        recall_pass(S, p->value_dim, key_dim, per_key ? weighted : k, recall);
    }
    make_write(p, t, head, column, BLOCK, p->decay_kind == HEAD_DECAY ? decay[0] : 1.0f, recall, u);
    write_and_read(p, PASS_FOR[MIN(p->group, MAX_GROUP) - 1][p->decay_kind][0], t, head, column, BLOCK, S, p->value_dim, k,
                   k, decay, u, recall, rows + 2 * key_dim);
}

static void run_task(const Problem *p, int64_t sequence, int64_t head, int64_t column, float *S, float *work) {
    const int64_t key_dim = p->key_dim, columns = MIN(BLOCK, p->value_dim - column);
    const int64_t offset = p->slots[sequence] * p->pool_stride + head * key_dim * p->value_dim + column;
    const int64_t tokens = p->borders[sequence + 1] - p->borders[sequence];
    const int read = p->initial == NULL || p->initial[sequence];
    if (tokens == 1 && read && columns == BLOCK && p->pool_type == FLOAT32 && !p->saved) {
        run_step(p, sequence, head, column, (float *)p->pool + offset, work);
        return;
    }
    if (!read || columns < BLOCK) memset(S, 0, (size_t)(key_dim * BLOCK) * 4);
    if (read)
        for (int64_t i = 0; i < key_dim; i++)
            widen(S + i * BLOCK, at(p->pool, p->pool_type, offset + i * p->value_dim), p->pool_type, columns);
    run_tokens(p, sequence, head, column, S, work);
    for (int64_t i = 0; i < key_dim; i++)
        narrow((char *)p->pool + (offset + i * p->value_dim) * bytes_of(p->pool_type), p->pool_type, S + i * BLOCK, columns);
}

/* The operator over R ragged sequences and a pool of states, updated in place. Slots <= null_slot are skipped: the pool
 * stays as it is and `out` is set to zero. */
int dtr_linear_forward(const void *q, const void *k, const void *v, const float *log_decay, const float *beta, float *out,
                       void *pool, const int64_t *slots, const int64_t *borders, const uint8_t *initial, float *error,
                       float *saved, int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t pool_stride,
                       int64_t sequences, int64_t heads, int64_t group, int64_t key_dim, int64_t value_dim,
                       int64_t saved_chunk, int64_t saved_per_sequence, int64_t null_slot, int64_t pool_slots,
                       int64_t tokens, int type, int pool_type, int decay_kind, int delta, float scale, int threads) {
    const Problem p = {q, k, v, log_decay, beta, out, pool, slots, borders, initial, error, saved, q_stride, k_stride,
                       v_stride, pool_stride, heads, group, key_dim, value_dim, saved_chunk, saved_per_sequence, type,
                       pool_type, decay_kind, delta, scale};
    const int64_t blocks = (value_dim + BLOCK - 1) / BLOCK, tasks = sequences * heads * blocks;
    int failed = DONE;
    if (!fits(slots, borders, sequences, pool_slots, tokens)) return BAD_INDEX;
    threads = (int)MIN((int64_t)threads, tasks);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *S = scratch(key_dim * BLOCK + work_floats(key_dim));
        if (!S) {
#pragma omp atomic write
            failed = NO_MEMORY;
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
