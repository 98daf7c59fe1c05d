// The keys with the largest scores, and gather tiles from them: the compiled half of
// kernels/selectors/_top_tokens.py.
//
// Selection works on order-preserving integers. A lower bound of the top-th value is the top-th
// largest of many maxima of disjoint groups (each of them is one of the values); the few values
// above it are kept, in order of position, and bisected exactly.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int W = 16, R = 8;  // numbers per vector, query rows scored together
#elif defined(__AVX__)
constexpr int W = 8, R = 4;
#else
constexpr int W = 4, R = 8;
#endif

namespace {

constexpr int64_t BLOCK = 64;
constexpr int32_t LOWEST = std::numeric_limits<int32_t>::min();  // below every score

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));

struct TopCall {
    int64_t batch, heads, kv_heads, queries, keys, rank, top, threads;
    const float* query;      // [batch, heads, queries, rank]
    const float* key;        // [batch, kv_heads, keys, rank]
    const int32_t* kv_head;  // [heads]
    const int32_t* ranks;    // [heads], at most rank
    const int32_t* tops;     // [heads], at most top
    const int32_t* low;      // [batch, heads, queries]
    const int32_t* high;     // [batch, heads, queries]
    int32_t* out;            // [batch, heads, queries, top]
};

inline ivec load(const int32_t* p) {
    ivec x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline vec load(const float* p) {
    vec x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
template <class V>
inline void store(void* p, V x) {
    std::memcpy(p, &x, sizeof x);
}
inline ivec isplat(int32_t x) { return x - ivec{}; }

// Integers in the order of floats; the two zeros are equal.
inline ivec ordered(vec x) {
    ivec i = (ivec)(x + 0.f);
    return i ^ ((i >> 31) & 0x7fffffff);
}

// How many of n numbers are at least `bound`; n is a multiple of W.
inline int64_t count_at_least(const int32_t* x, int64_t n, int32_t bound) {
#if defined(__AVX512F__)
    __m512i limit = _mm512_set1_epi32(bound);
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += W)
        count += __builtin_popcount(_mm512_cmpge_epi32_mask((__m512i)load(x + i), limit));
    return count;
#else
    ivec total = {};
    for (int64_t i = 0; i < n; i += W) total -= load(x + i) >= isplat(bound);
    int64_t count = 0;
    for (int i = 0; i < W; i++) count += total[i];
    return count;
#endif
}

// Numbers that are at least `bound`, with their places, in order. Returns how many.
inline int64_t compact(const int32_t* x, int64_t n, int32_t bound, int32_t* kept, int32_t* where) {
    int64_t count = 0;
#if defined(__AVX512F__)
    __m512i limit = _mm512_set1_epi32(bound);
    __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int64_t i = 0; i < n; i += W) {
        __m512i v = (__m512i)load(x + i);
        __mmask16 on = _mm512_cmpge_epi32_mask(v, limit);
        _mm512_storeu_si512(kept + count, _mm512_maskz_compress_epi32(on, v));
        __m512i places = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)i));
        _mm512_storeu_si512(where + count, _mm512_maskz_compress_epi32(on, places));
        count += __builtin_popcount(on);
    }
#else
    for (int64_t i = 0; i < n; i++) {
        kept[count] = x[i];
        where[count] = (int32_t)i;
        count += x[i] >= bound;
    }
#endif
    return count;
}

struct Bound {
    int32_t value;  // at least `top` numbers reach it
    int64_t above;  // how many are greater, if more than `top` reach it; else -1
};

// The top-th largest of n numbers, or a smaller bound that exactly `top` of them reach.
// At least `top` numbers must reach `floor`.
Bound bisect(const int32_t* x, int64_t n, int64_t top, int32_t floor) {
    ivec best = isplat(LOWEST);
    for (int64_t i = 0; i < n; i += W) {
        ivec v = load(x + i);
        best = v > best ? v : best;
    }
    int64_t low = floor, high = LOWEST, above = 0;
    for (int i = 0; i < W; i++) high = std::max<int64_t>(high, best[i]);
    high++;  // fewer than `top` (none) reach it
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        int64_t count = count_at_least(x, n, (int32_t)middle);
        if (count == top) return {(int32_t)middle, -1};
        if (count > top) {
            low = middle;
        } else {
            high = middle;
            above = count;
        }
    }
    return {(int32_t)low, above};
}

struct Buffers {
    std::vector<int32_t> score, kept, where, maxima;
    Buffers(int64_t width, int64_t top)
        : score(R * width), kept(width + W), where(width + W), maxima(8 * top + 16 * W) {}
};

// Places of the `top` largest of n > top numbers, ascending; equal ones by place. x is padded with
// LOWEST to a multiple of W.
void select(const int32_t* x, int64_t n, int64_t top, Buffers& s, int32_t* out) {
    int64_t padded = (n + W - 1) / W * W, groups = (4 * top + W - 1) / W * W;
    int32_t floor = LOWEST;
    const int32_t* from = x;
    int64_t size = padded;
    bool filtered = n >= 3 * groups;
    if (filtered) {
        int32_t* maxima = s.maxima.data();
        std::memcpy(maxima, x, groups * 4);
        for (int64_t i = groups; i < padded; i += groups)
            for (int64_t g = 0; g < groups && i + g < padded; g += W) {
                ivec a = load(maxima + g), b = load(x + i + g);
                store(maxima + g, b > a ? b : a);
            }
        floor = bisect(maxima, groups, top, LOWEST).value;
        size = compact(x, padded, floor, s.kept.data(), s.where.data());
        for (int64_t i = size; i < (size + W - 1) / W * W; i++) s.kept[i] = LOWEST;
        from = s.kept.data();
    }
    int64_t whole = (size + W - 1) / W * W;
    Bound bound = bisect(from, whole, top, floor);
    int64_t equal = bound.above < 0 ? top : top - bound.above, count = 0;
    for (int64_t i = 0; i < size && count < top; i++) {
        bool on = from[i] > bound.value;
        if (from[i] == bound.value) on = bound.above < 0 || equal-- > 0;
        out[count] = filtered ? s.where[i] : (int32_t)i;
        count += on;
    }
}

// Scores of R rows against keys [first, last), multiples of W, as ordered integers.
void score(const float* const* rows, const float* key, int64_t stride, int64_t rank, int64_t first,
           int64_t last, int32_t* out, int64_t width) {
    for (int64_t j = first; j < last; j += W) {
        vec sum[R] = {};
        for (int64_t k = 0; k < rank; k++) {
            vec column = load(key + k * stride + j);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) sum[r] += rows[r][k] * column;
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) store(out + r * width + j, ordered(sum[r]));
    }
}

}  // namespace

extern "C" int attnplan_top_tokens(const TopCall* call) {
    const TopCall& c = *call;
    int64_t width = (c.keys + 2 * W - 1) / W * W;
    std::vector<float> packed(c.batch * c.kv_heads * c.rank * width);  // [rank, width] per kv head
    int64_t groups = (c.queries + R - 1) / R, items = c.batch * c.heads * groups;
    std::atomic<int64_t> next(0);
#pragma omp parallel num_threads((int)c.threads)
    {
#pragma omp for schedule(static) collapse(2)
        for (int64_t h = 0; h < c.batch * c.kv_heads; h++)
            for (int64_t k = 0; k < c.rank; k++)
                for (int64_t j = 0; j < c.keys; j++)
                    packed[(h * c.rank + k) * width + j] = c.key[(h * c.keys + j) * c.rank + k];
        Buffers s(width, c.top);
        for (int64_t item; (item = next++) < items;) {
            int64_t bh = item / groups, b = bh / c.heads, first_row = item % groups * R;
            int64_t count = std::min<int64_t>(R, c.queries - first_row);
            int64_t kv = b * c.kv_heads + c.kv_head[bh % c.heads];
            int64_t rank = c.ranks[bh % c.heads], top = c.tops[bh % c.heads];
            const int32_t *lows = c.low + bh * c.queries, *highs = c.high + bh * c.queries;
            const float* key = packed.data() + kv * c.rank * width;
            const float* rows[R];
            int64_t low = c.keys, high = 0;
            for (int64_t r = 0; r < R; r++) {
                int64_t i = first_row + std::min(r, count - 1);
                rows[r] = c.query + (bh * c.queries + i) * c.rank;
                int64_t from = std::max(lows[i], 0);
                int64_t to = std::min<int64_t>(highs[i], c.keys);
                if (to - from > top) low = std::min(low, from), high = std::max(high, to);
            }
            if (low < high)
                score(rows, key, width, rank, low / W * W, (high + W - 1) / W * W,
                      s.score.data(), width);
            for (int64_t r = 0; r < count; r++) {
                int64_t i = first_row + r;
                int64_t from = std::max(lows[i], 0);
                int64_t to = std::min<int64_t>(highs[i], c.keys);
                int32_t* out = c.out + (bh * c.queries + i) * c.top;
                int64_t n = std::max<int64_t>(to - from, 0);
                for (int64_t t = top; t < c.top; t++) out[t] = -1;
                if (n <= top) {
                    for (int64_t t = 0; t < top; t++) out[t] = t < n ? (int32_t)(from + t) : -1;
                    continue;
                }
                int32_t* x = s.score.data() + r * width;
                int64_t start = from / W * W, end = (to + W - 1) / W * W;
                for (int64_t j = start; j < from; j++) x[j] = LOWEST;
                for (int64_t j = to; j < end; j++) x[j] = LOWEST;
                select(x + start, to - start, top, s, out);
                for (int64_t t = 0; t < top; t++) out[t] += (int32_t)start;
            }
        }
    }
    return 0;
}

namespace {

constexpr int64_t SIEVE = 16;  // keys per block of the sieve

struct SieveCall {
    int64_t batch, heads, kv_heads, queries, keys, rank, blocks, top, sinks, threads;
    const float* query;      // [batch, heads, queries, rank]
    const float* key;        // [batch, kv_heads, keys, rank]
    const int32_t* kv_head;  // [heads]
    const int32_t* start;    // [batch]
    const int32_t* high;     // [queries]
    int32_t* out;            // [batch, heads, queries, top]
};

// Keys of one kv head by block [count][rank][SIEVE], and the largest and smallest of every
// coordinate of a block, [2 * rank][width].
void pack_blocks(const float* key, int64_t keys, int64_t rank, int64_t width, float* by_block,
                 float* bounds) {
    for (int64_t block = 0; block * SIEVE < keys; block++) {
        int64_t count = std::min(SIEVE, keys - block * SIEVE);
        for (int64_t k = 0; k < rank; k++) {
            float* column = by_block + (block * rank + k) * SIEVE;
            float most = -std::numeric_limits<float>::infinity(), least = -most;
            for (int64_t j = 0; j < count; j++) {
                float x = key[(block * SIEVE + j) * rank + k];
                column[j] = x;
                most = std::max(most, x), least = std::min(least, x);
            }
            for (int64_t j = count; j < SIEVE; j++) column[j] = 0;
            bounds[k * width + block] = most;
            bounds[(rank + k) * width + block] = least;
        }
    }
}

}  // namespace

extern "C" int attnplan_sieved_tokens(const SieveCall* call) {
    const SieveCall& c = *call;
    int64_t most = (c.keys + SIEVE - 1) / SIEVE, width = (most + 2 * W - 1) / W * W;
    int64_t packed = most * SIEVE * c.rank;
    std::vector<float> by_block(c.batch * c.kv_heads * packed);
    std::vector<float> bounds(c.batch * c.kv_heads * 2 * c.rank * width);
    int64_t groups = (c.queries + R - 1) / R, items = c.batch * c.heads * groups;
    std::atomic<int64_t> next(0);
#pragma omp parallel num_threads((int)c.threads)
    {
#pragma omp for schedule(static)
        for (int64_t h = 0; h < c.batch * c.kv_heads; h++) {
            int64_t start = c.start[h / c.kv_heads];
            pack_blocks(c.key + (h * c.keys + start) * c.rank, c.keys - start, c.rank, width,
                        by_block.data() + h * packed, bounds.data() + h * 2 * c.rank * width);
        }
        int64_t scored = c.blocks * SIEVE;
        Buffers s(width, c.blocks), t(scored + 2 * W, c.top);
        std::vector<float> signs(R * 2 * c.rank);
        std::vector<int32_t> chosen(c.blocks + 1), found(scored + 2 * W), place(scored + 2 * W);
        for (int64_t item; (item = next++) < items;) {
            int64_t bh = item / groups, b = bh / c.heads, first_row = item % groups * R;
            int64_t count = std::min<int64_t>(R, c.queries - first_row), start = c.start[b];
            int64_t kv = b * c.kv_heads + c.kv_head[bh % c.heads], end = 0;
            const float* rows[R];
            for (int64_t r = 0; r < R; r++) {
                int64_t i = first_row + std::min(r, count - 1);
                const float* q = c.query + (bh * c.queries + i) * c.rank;
                float* sign = signs.data() + r * 2 * c.rank;
                for (int64_t k = 0; k < c.rank; k++)
                    sign[k] = std::max(q[k], 0.f), sign[c.rank + k] = std::min(q[k], 0.f);
                rows[r] = sign;
                end = std::max<int64_t>(end, std::min<int64_t>(c.high[i], c.keys) - start);
            }
            int64_t whole = (end + SIEVE - 1) / SIEVE, first = c.sinks / SIEVE;
            if (whole - first > c.blocks)
                score(rows, bounds.data() + kv * 2 * c.rank * width, width, 2 * c.rank,
                      first / W * W, (whole + W - 1) / W * W, s.score.data(), width);
            for (int64_t r = 0; r < count; r++) {
                int64_t i = first_row + r, to = std::min<int64_t>(c.high[i], c.keys) - start;
                int32_t* out = c.out + (bh * c.queries + i) * c.top;
                int64_t last = std::max((to + SIEVE - 1) / SIEVE, first);
                int64_t kept = to > c.sinks ? std::min(last - first, c.blocks) : 0;
                if (last - first > c.blocks) {
                    int32_t* x = s.score.data() + r * width;
                    int64_t from = first / W * W, stop = (last + W - 1) / W * W;
                    for (int64_t j = from; j < first; j++) x[j] = LOWEST;
                    for (int64_t j = last; j < stop; j++) x[j] = LOWEST;
                    select(x + from, last - from, c.blocks, s, chosen.data());
                    for (int64_t j = 0; j < kept; j++) chosen[j] += (int32_t)from;
                } else {
                    for (int64_t j = 0; j < kept; j++) chosen[j] = (int32_t)(first + j);
                }
                const float* q = c.query + (bh * c.queries + i) * c.rank;
                int64_t size = 0;
                for (int64_t j = 0; j < kept; j++) {
                    const float* key = by_block.data() + kv * packed + chosen[j] * c.rank * SIEVE;
                    int32_t scores[SIEVE];
                    for (int64_t w = 0; w < SIEVE; w += W) {
                        vec sum = {};
                        for (int64_t k = 0; k < c.rank; k++) sum += q[k] * load(key + k * SIEVE + w);
                        store(scores + w, ordered(sum));
                    }
                    int64_t at = chosen[j] * SIEVE, low = std::max<int64_t>(c.sinks - at, 0);
                    int64_t high = std::min(SIEVE, to - at);
                    for (int64_t w = low; w < high; w++) {
                        found[size] = scores[w];
                        place[size++] = (int32_t)(start + at + w);
                    }
                }
                if (size <= c.top) {
                    for (int64_t x = 0; x < c.top; x++) out[x] = x < size ? place[x] : -1;
                    continue;
                }
                for (int64_t x = size; x < (size + W - 1) / W * W; x++) found[x] = LOWEST;
                select(found.data(), size, c.top, t, out);
                for (int64_t x = 0; x < c.top; x++) out[x] = place[out[x]];
            }
        }
    }
    return 0;
}

// The union of the keys that the rows of a block chose, as a bit per key.
static int64_t unite(const int32_t* tokens, int64_t count, int64_t keys, uint64_t* bits) {
    int64_t words = (keys + 63) / 64;
    std::fill(bits, bits + words, 0);
    for (int64_t i = 0; i < count; i++) {
        if (tokens[i] < 0) continue;
        if (tokens[i] >= keys) return -1;
        bits[tokens[i] / 64] |= 1ull << (tokens[i] % 64);
    }
    int64_t total = 0;
    for (int64_t w = 0; w < words; w++) total += __builtin_popcountll(bits[w]);
    return total;
}

// Tiles of every row of the list: offsets [rows + 1]. Returns 1 if a token is outside the text.
extern "C" int attnplan_count_tiles(const int32_t* tokens, int64_t heads, int64_t queries,
                                    int64_t top, int64_t keys, int64_t threads, int32_t* offsets) {
    int64_t blocks = (queries + BLOCK - 1) / BLOCK, bad = 0;
#pragma omp parallel num_threads((int)threads) reduction(| : bad)
    {
        std::vector<uint64_t> bits((keys + 63) / 64);
#pragma omp for schedule(dynamic, 4)
        for (int64_t row = 0; row < heads * blocks; row++) {
            int64_t first = row / blocks * queries + row % blocks * BLOCK;
            int64_t count = std::min(BLOCK, queries - row % blocks * BLOCK) * top;
            int64_t total = unite(tokens + first * top, count, keys, bits.data());
            bad |= total < 0;
            offsets[row + 1] = (int32_t)((std::max<int64_t>(total, 0) + BLOCK - 1) / BLOCK);
        }
    }
    offsets[0] = 0;
    for (int64_t row = 0; row < heads * blocks; row++) offsets[row + 1] += offsets[row];
    return (int)bad;
}

// Fills gather [tiles, 64] and masks [tiles, 64].
extern "C" int attnplan_fill_tiles(const int32_t* tokens, int64_t heads, int64_t queries,
                                   int64_t top, int64_t keys, int64_t threads,
                                   const int32_t* offsets, int32_t* gather, uint64_t* masks) {
    int64_t blocks = (queries + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads((int)threads)
    {
        std::vector<uint64_t> bits((keys + 63) / 64);
        std::vector<int32_t> before((keys + 63) / 64);  // united keys in earlier words
#pragma omp for schedule(dynamic, 4)
        for (int64_t row = 0; row < heads * blocks; row++) {
            int64_t first = row / blocks * queries + row % blocks * BLOCK;
            int64_t count = std::min(BLOCK, queries - row % blocks * BLOCK) * top;
            const int32_t* chosen = tokens + first * top;
            int64_t total = unite(chosen, count, keys, bits.data());
            int32_t* ids = gather + (int64_t)offsets[row] * BLOCK;
            uint64_t* words = masks + (int64_t)offsets[row] * BLOCK;
            int64_t slots = (int64_t)(offsets[row + 1] - offsets[row]) * BLOCK, n = 0;
            for (int64_t w = 0; w < (keys + 63) / 64; w++) {
                before[w] = (int32_t)n;
                for (uint64_t word = bits[w]; word; word &= word - 1)
                    ids[n++] = (int32_t)(w * 64 + __builtin_ctzll(word));
            }
            std::fill(ids + total, ids + slots, -1);
            std::fill(words, words + slots, 0);
            for (int64_t i = 0; i < count; i++) {
                if (chosen[i] < 0) continue;
                int64_t w = chosen[i] / 64, bit = chosen[i] % 64;
                int64_t rank = before[w] + __builtin_popcountll(bits[w] & ((1ull << bit) - 1));
                words[rank / BLOCK * BLOCK + i / top] |= 1ull << (rank % BLOCK);
            }
        }
    }
    return 0;
}

// Clusters that rows read key by key ---------------------------------------------------------------

struct OpenCall {
    int64_t heads, blocks, slots, keys, rank, most, threads;  // heads of the whole batch
    const float* query;     // [heads, 64 * blocks, rank]
    const float* key;       // [heads, slots, rank]; query.key is the logarithm of a slot's mass
    const int32_t* begin;   // [heads, slots + 1], where a slot's keys begin in `order`
    const int32_t* order;   // [heads, keys]
    const uint64_t* words;  // [heads, blocks, slots / 64], which slots a block may read
    uint64_t* read;         // [heads, 64 * blocks, slots / 64], those that a row reads
    int32_t* tokens;        // [heads, 64 * blocks, most], the keys of those that it opens
};

// The heaviest slots of every row, as long as their keys are at most `most`. Of equal ones the
// earlier comes first.
extern "C" int attnplan_open_clusters(const OpenCall* call) {
    const OpenCall& c = *call;
    int64_t width = (c.slots + W - 1) / W * W, tiles = c.slots / BLOCK;
    std::vector<float> packed(c.heads * c.rank * width);
    std::atomic<int64_t> next(0);
#pragma omp parallel num_threads((int)c.threads)
    {
#pragma omp for schedule(static)
        for (int64_t h = 0; h < c.heads; h++)
            for (int64_t k = 0; k < c.rank; k++)
                for (int64_t j = 0; j < c.slots; j++)
                    packed[(h * c.rank + k) * width + j] = c.key[(h * c.slots + j) * c.rank + k];
        std::vector<int32_t> scores(R * width);
        std::vector<int64_t> heap(c.slots);
        for (int64_t item; (item = next++) < c.heads * c.blocks;) {
            int64_t h = item / c.blocks;
            const int32_t *begin = c.begin + h * (c.slots + 1), *order = c.order + h * c.keys;
            const uint64_t* words = c.words + item * tiles;
            int64_t last = 0;
            for (int64_t t = 0; t < tiles; t++)
                if (words[t]) last = t * BLOCK + BLOCK - __builtin_clzll(words[t]);
            for (int64_t i = item * BLOCK; i < (item + 1) * BLOCK; i += R) {
                const float* rows[R];
                for (int64_t r = 0; r < R; r++) rows[r] = c.query + (i + r) * c.rank;
                score(rows, packed.data() + h * c.rank * width, width, c.rank, 0,
                      (last + W - 1) / W * W, scores.data(), width);
                for (int64_t r = 0; r < R; r++) {
                    const int32_t* x = scores.data() + r * width;
                    uint64_t* read = c.read + (i + r) * tiles;
                    int32_t* out = c.tokens + (i + r) * c.most;
                    int64_t count = 0, taken = 0;
                    for (int64_t t = 0; t < tiles; t++)
                        for (uint64_t word = read[t] = words[t]; word; word &= word - 1) {
                            int64_t s = t * BLOCK + __builtin_ctzll(word);
                            if (begin[s + 1] > begin[s])
                                heap[count++] = ((int64_t)x[s] << 32) | (0xffffffff - s);
                        }
                    auto end = heap.begin() + count;
                    std::make_heap(heap.begin(), end);
                    for (; end != heap.begin(); --end) {
                        std::pop_heap(heap.begin(), end);
                        int64_t s = 0xffffffff - (*(end - 1) & 0xffffffff);
                        if (taken + begin[s + 1] - begin[s] > c.most) break;
                        for (int32_t j = begin[s]; j < begin[s + 1]; j++) out[taken++] = order[j];
                        read[s / BLOCK] &= ~(1ull << (s % BLOCK));
                    }
                    std::fill(out + taken, out + c.most, -1);
                }
            }
        }
    }
    return 0;
}

struct LeaveCall {
    int64_t heads, blocks, slots, keys, top, threads;  // heads of the whole batch
    const int32_t* tokens;  // [heads, 64 * blocks, top], keys that rows read, -1 for none
    const int32_t* member;  // [heads, keys], the slot that loses a key, -1 for none
    const uint64_t* words;  // [heads, blocks, slots / 64], which slots a block may read
    uint64_t* read;         // [heads, 64 * blocks, slots / 64], those that a row reads
    int32_t* alone;         // like tokens: keys of slots that a row does not read, or of none
    int32_t* taken;         // like tokens: the others, which leave a slot that is read
};

// A slot all of whose keys a row reads is not read. Returns 1 if some key leaves a slot that is.
extern "C" int attnplan_leave_slots(const LeaveCall* call) {
    const LeaveCall& c = *call;
    int64_t tiles = c.slots / BLOCK, leaves = 0;
#pragma omp parallel num_threads((int)c.threads) reduction(| : leaves)
    {
        std::vector<int32_t> size(c.slots), count(c.slots, 0);
        std::vector<uint64_t> empty(tiles);
#pragma omp for schedule(static)
        for (int64_t h = 0; h < c.heads; h++) {
            const int32_t* member = c.member + h * c.keys;
            std::fill(size.begin(), size.end(), 0);
            std::fill(empty.begin(), empty.end(), 0);
            for (int64_t j = 0; j < c.keys; j++)
                if (member[j] >= 0) size[member[j]]++;
            for (int64_t s = 0; s < c.slots; s++)
                if (!size[s]) empty[s / BLOCK] |= 1ull << (s % BLOCK);
            for (int64_t i = h * c.blocks * BLOCK; i < (h + 1) * c.blocks * BLOCK; i++) {
                const int32_t* tokens = c.tokens + i * c.top;
                uint64_t* read = c.read + i * tiles;
                for (int64_t t = 0; t < tiles; t++)
                    read[t] = c.words[i / BLOCK * tiles + t] & ~empty[t];
                for (int64_t n = 0; n < c.top; n++) {
                    int32_t s = tokens[n] < 0 ? -1 : member[tokens[n]];
                    if (s >= 0 && ++count[s] == size[s]) read[s / BLOCK] &= ~(1ull << (s % BLOCK));
                }
                for (int64_t n = 0; n < c.top; n++) {
                    int32_t s = tokens[n] < 0 ? -1 : member[tokens[n]];
                    bool leave = s >= 0 && count[s] < size[s];
                    c.alone[i * c.top + n] = leave ? -1 : tokens[n];
                    c.taken[i * c.top + n] = leave ? tokens[n] : -1;
                    leaves |= leave;
                }
                for (int64_t n = 0; n < c.top; n++) {
                    int32_t s = tokens[n] < 0 ? -1 : member[tokens[n]];
                    if (s >= 0) count[s] = 0;
                }
            }
        }
    }
    return (int)leaves;
}
