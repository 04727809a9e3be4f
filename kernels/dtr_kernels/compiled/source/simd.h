/* Vectors, number formats and small helpers shared by the kernels. GCC and clang vector extensions: one source for
 * AVX-512, AVX2, NEON and plain SSE, chosen by what -march says. */
#ifndef DTR_SIMD_H
#define DTR_SIMD_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define LANES (VECTOR_BYTES / 4)

#define INLINE static inline __attribute__((always_inline))
#define ALIGNED __attribute__((aligned(64)))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef float vec __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t ivec __attribute__((vector_size(VECTOR_BYTES)));
/* The same, at any address. */
typedef float vec_at __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const vec_at *)p; }
INLINE void store(float *p, vec x) { *(vec_at *)p = x; }
INLINE vec splat(float x) { return x - (vec){0}; }

INLINE vec select_vec(ivec condition, vec yes, vec no) {
    return (vec)(((ivec)yes & condition) | ((ivec)no & ~condition));
}
#if defined(__AVX512F__)
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX__)
INLINE vec larger(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
#else
INLINE vec larger(vec a, vec b) { return select_vec(a > b, a, b); }
#endif

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SHUFFLE(x, ...) __builtin_shuffle(x, (ivec){__VA_ARGS__})
#endif
#if VECTOR_BYTES == 64
#define OVER_LANES(x, OP) \
    x = OP(x, SHUFFLE(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
    x = OP(x, SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
    x = OP(x, SHUFFLE(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
    x = OP(x, SHUFFLE(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif VECTOR_BYTES == 32
#define OVER_LANES(x, OP) \
    x = OP(x, SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3)); \
    x = OP(x, SHUFFLE(x, 2, 3, 0, 1, 6, 7, 4, 5)); \
    x = OP(x, SHUFFLE(x, 1, 0, 3, 2, 5, 4, 7, 6));
#else
#define OVER_LANES(x, OP) \
    x = OP(x, SHUFFLE(x, 2, 3, 0, 1)); \
    x = OP(x, SHUFFLE(x, 1, 0, 3, 2));
#endif
#define PLUS(a, b) ((a) + (b))

/* Sum and maximum over the lanes, as a tree. */
INLINE float sum_lanes(vec x) { OVER_LANES(x, PLUS) return x[0]; }
INLINE float max_lanes(vec x) { OVER_LANES(x, larger) return x[0]; }

/* exp(x) for x <= 88 within 1.5 units in the last place; 0 below -87.7. After Cephes' expf. */
INLINE vec exp_vec(vec x) {
    x = larger(x, splat(-88.0f)); /* there the power of two below has no bits left: 0 */
    const vec shift = splat(12582912.0f); /* 1.5 * 2^23: adding and subtracting it rounds to an integer */
    const vec n = (x * 1.44269504088896341f + shift) - shift;
    x = x - n * 0.693359375f;
    x = x - n * -2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * (x * x) + x + 1.0f;
    const ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return p * (vec)power;
}

/* Element types of operands and pools, as the Python side numbers them. */
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
INLINE int64_t bytes_of(int type) { return type == FLOAT32 ? 4 : 2; }

INLINE float from_bfloat16(uint16_t x) {
    union { uint32_t i; float f; } u = {(uint32_t)x << 16};
    return u.f;
}
INLINE uint16_t to_bfloat16(float x) { /* round to nearest even; NaN stays NaN */
    union { float f; uint32_t i; } u = {x};
    if ((u.i & 0x7fffffff) > 0x7f800000) return (uint16_t)((u.i >> 16) | 0x40);
    return (uint16_t)((u.i + 0x7fff + ((u.i >> 16) & 1)) >> 16);
}
INLINE float from_float16(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    union { uint32_t i; float f; } u;
    if (rest >= 0x7c00) u.i = sign | 0x7f800000 | ((rest & 0x3ff) << 13);
    else { /* 2^112 moves the exponent's bias from 15 to 127, subnormals included */
        union { uint32_t i; float f; } magic = {0x77800000};
        u.i = rest << 13;
        u.f *= magic.f;
        u.i |= sign;
    }
    return u.f;
}

INLINE const void *at(const void *base, int type, int64_t element) {
    return (const char *)base + element * bytes_of(type);
}

/* Ask for n elements. Tokens lie a whole model's heads apart, which no hardware prefetcher follows. */
INLINE void prefetch(const void *base, int type, int64_t element, int64_t n) {
    const char *p = (const char *)at(base, type, element);
    for (int64_t i = 0; i < n * bytes_of(type); i += 64) __builtin_prefetch(p + i);
}

/* n elements of any type -> float. */
INLINE void widen(float *restrict to, const void *from, int type, int64_t n) {
    if (type == FLOAT32) memcpy(to, from, (size_t)n * 4);
    else if (type == BFLOAT16) for (int64_t i = 0; i < n; i++) to[i] = from_bfloat16(((const uint16_t *)from)[i]);
    else for (int64_t i = 0; i < n; i++) to[i] = from_float16(((const uint16_t *)from)[i]);
}
/* float -> float or bfloat16 (pools have no other type). */
INLINE void narrow(void *to, int type, const float *restrict from, int64_t n) {
    if (type == FLOAT32) memcpy(to, from, (size_t)n * 4);
    else for (int64_t i = 0; i < n; i++) ((uint16_t *)to)[i] = to_bfloat16(from[i]);
}

/* What kernels return. */
enum { DONE = 0, NO_MEMORY = 1, BAD_INDEX = 2 };

/* Whether R sequences lie within `tokens` rows, one after another, and their slots within a pool of `pool_slots`. */
static inline int fits(const int64_t *slots, const int64_t *borders, int64_t sequences, int64_t pool_slots, int64_t tokens) {
    int64_t last = 0;
    for (int64_t r = 0; r < sequences; r++) {
        if (slots[r] >= pool_slots || borders[r] < last || borders[r + 1] < borders[r]) return 0;
        last = borders[r + 1];
    }
    return last <= tokens;
}

/* Scratch memory of one thread, aligned to a cache line; size in floats. */
INLINE float *scratch(int64_t floats) {
    return (float *)aligned_alloc(64, (size_t)((floats * 4 + 63) / 64 * 64 + 64));
}

#endif
