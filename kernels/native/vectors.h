// Vectors of floats as wide as the processor's registers, and the element types of tensors.
//
// Included by every source of this folder that computes; each gets functions of its own.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int W = 16;  // floats per vector
constexpr int R = 8;   // rows of one register block
#elif defined(__AVX__)
constexpr int W = 8, R = 4;
#else
constexpr int W = 4, R = 8;
#endif

namespace {

constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504088896341f;

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));

struct Strided {  // strides in elements; the last dimension is contiguous
    const void* data;
    int64_t batch, head, row;
};

// Element types ---------------------------------------------------------------------------------

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline vec splat(float x) { return x - vec{}; }
inline ivec isplat(int32_t x) { return x - ivec{}; }

inline vec load(const float* p) {
    vec x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline void store(float* p, vec x) { std::memcpy(p, &x, sizeof x); }

inline vec load(const BFloat16* p) {
    hvec h;
    std::memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}

inline vec load(const Float16* p) {
    hvec h;
    std::memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps((__m256i)h);
#else
    uvec u = __builtin_convertvector(h, uvec);
    vec x = (vec)((u & 0x7fff) << 13) * splat(0x1p112f);  // moves the exponent's bias
    ivec special = (u & 0x7c00) == 0x7c00;                // infinity and NaN
    return (vec)((uvec)x | ((uvec)special & 0x7f800000) | ((u & 0x8000) << 16));
#endif
}

// The first n of W elements, then zeros.
template <class T>
inline vec load_first(const T* p, int64_t n) {
    if (n >= W) return load(p);
    T part[W] = {};
    std::memcpy(part, p, n * sizeof(T));
    return load(part);
}

inline uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}

inline void put(float* p, float x) { *p = x; }

inline void put(BFloat16* p, float x) {
    uint32_t u = bits_of(x);
    p->bits = x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

inline void put(Float16* p, float x) {  // round to nearest even, subnormals included
    uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    uint32_t h;
    if (u > 0x7f800000) {
        h = 0x7e00;
    } else if (u >= 0x477ff000) {
        h = 0x7c00;
    } else if (u < 0x38800000) {
        float magic = 0.5f, y;
        std::memcpy(&y, &u, 4);
        h = bits_of(y + magic) - bits_of(magic);
    } else {
        h = (u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13;
    }
    p->bits = h | sign;
}

template <class T, class V>
inline void copy_first(T* p, V x, int64_t n) {
    if (n >= W)
        std::memcpy(p, &x, sizeof x);
    else
        std::memcpy(p, &x, n * sizeof(T));
}

// The first n of W elements are written.
inline void store_first(float* p, vec x, int64_t n) { copy_first(p, x, n); }

inline void store_first(BFloat16* p, vec x, int64_t n) {
    uvec u = (uvec)x, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    copy_first(p, __builtin_convertvector(x == x ? rounded : uvec{} + 0x7fc0, hvec), n);
}

inline void store_first(Float16* p, vec x, int64_t n) {
#if defined(__AVX512F__)
    copy_first(p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT), n);
#else
    for (int64_t i = 0; i < std::min<int64_t>(n, W); i++) put(p + i, x[i]);
#endif
}

// Vector arithmetic -----------------------------------------------------------------------------

inline vec max(vec a, vec b) { return a > b ? a : b; }

// x where the bit of the lane is set, -inf elsewhere.
inline vec where_set(uint64_t word, vec x) {
#if defined(__AVX512F__)
    return (vec)_mm512_mask_blend_ps((__mmask16)word, _mm512_set1_ps(NONE), (__m512)x);
#else
    ivec bits;
    for (int i = 0; i < W; i++) bits[i] = 1 << i;
    return (isplat((int32_t)word) & bits) != 0 ? x : splat(NONE);
#endif
}

inline bool any_above(vec x, float bound) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(bound), _CMP_GT_OQ);
#else
    bool any = false;
    for (int i = 0; i < W; i++) any |= x[i] > bound;
    return any;
#endif
}

inline bool any_below(vec x, float bound) { return any_above(-x, -bound); }

inline float reduce_max(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float best = x[0];
    for (int i = 1; i < W; i++) best = x[i] > best ? x[i] : best;
    return best;
#endif
}

inline float reduce_add(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#endif
    float sum = 0;
    for (int i = 0; i < W; i++) sum += x[i];
    return sum;
}

// e^x for x <= 0, relative error about 1e-7; 0 below e^-87.
inline vec exponential(vec x) {
    x *= LOG2E;
    const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
    vec shifted = x + magic;
    vec f = x - (shifted - magic);
    vec p = splat(1.535336188319500e-4f);  // 2^f on [-1/2, 1/2], Cephes exp2f
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.f;
    ivec power = ((ivec)shifted - isplat((int32_t)bits_of(magic) - 127)) << 23;
    return x < -126.f ? vec{} : p * (vec)power;
}

template <int... I>
struct Lanes {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
    typedef Lanes<I...> type;
};
typedef Count<W>::type AllLanes;

// Lane l of the result is lane pick(l) of (a, b), b's lanes counting from W.
#if defined(__clang__)
#define SHUFFLE(a, b, pick) __builtin_shufflevector(a, b, (pick)...)
#else
#define SHUFFLE(a, b, pick) __builtin_shuffle(a, b, ivec{(pick)...})
#endif

template <int... I>
inline vec zip_low(vec a, vec b, Lanes<I...>) {
    return SHUFFLE(a, b, I / 2 + (I % 2) * W);
}
template <int... I>
inline vec zip_high(vec a, vec b, Lanes<I...>) {
    return SHUFFLE(a, b, I / 2 + W / 2 + (I % 2) * W);
}

// Rows become columns, in place.
inline void transpose(vec* x) {
#pragma GCC unroll 4
    for (int round = 1; round < W; round *= 2) {
        vec y[W];
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; i++) {
            y[2 * i] = zip_low(x[i], x[i + W / 2], AllLanes());
            y[2 * i + 1] = zip_high(x[i], x[i + W / 2], AllLanes());
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) x[i] = y[i];
    }
}

template <int H, int... I>
inline vec add_halves(vec a, vec b, Lanes<I...>) {
    vec first = SHUFFLE(a, b, I / H / 2 * 2 * H + I % H + (I / H % 2) * W);
    vec second = SHUFFLE(a, b, I / H / 2 * 2 * H + I % H + H + (I / H % 2) * W);
    return first + second;
}

// Lane j of the result is the sum of the lanes of x[j].
template <int H = W / 2>
inline vec reduce_each(vec* x) {
#pragma GCC unroll 8
    for (int i = 0; i < H; i++) x[i] = add_halves<H>(x[i], x[i + H], AllLanes());
    if constexpr (H > 1) return reduce_each<H / 2>(x);
    return x[0];
}

}  // namespace
