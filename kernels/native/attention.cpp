// Attention over tile lists on a CPU: the compiled half of cpu.py.
//
// One work item is one (batch, head, block of 64 query rows). Keys and values of the contiguous
// tiles that several items share are packed once per call as float32: keys transposed per tile
// [head_dim, 64], values [64, value_dim]. Three ways through a tile:
//
//   dense   S = Q K^T and O += P V with a register-blocked product over the packed tile, 16 query
//           rows at a time, over the columns that these rows use; masks act on S
//   gather  the same after the named rows were packed into a buffer of the thread
//   sparse  few set bits per row: the keys that one row uses, of all such tiles of the block, are
//           listed, and only they are read
//
// A key of a TAKEN tile leaves its slot: besides e^{q.k} it weighs minus its share of e^{q.k_slot},
// so that the product with its value does both.
//
// Softmax is online: a row carries (shift, mass, numerator), natural logarithms, float32. Built
// without -ffast-math: -inf and NaN keep their meaning.
//
// bfloat16 inputs on a processor that multiplies bfloat16 (AVX512-BF16, and AMX where the system
// grants it) take the same ways with pairs of bfloat16 in place of each float32 of a packed tile.
// Products of inputs are then exact and sums float32; only the exponentials that weigh the values
// are rounded to bfloat16, as in torch's own flash attention.

#include "vectors.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#if defined(__AVX512BF16__)
#define PAIRS 1
#else
#define PAIRS 0
#endif
#if defined(__AMX_BF16__) && defined(__linux__) && PAIRS
#define AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define AMX 0
#endif

namespace {

constexpr int64_t BLOCK = 64, GROUP = 16, CHUNK = 256;
constexpr int64_t CONTIGUOUS = 0, GATHER = 1, SLOTS = 2, TAKEN = 3;
constexpr int64_t FEW_ROWS = 4;       // a block with so few rows reads keys one by one

struct Call {
    int64_t dtype;  // 0 float32, 1 bfloat16, 2 float16
    int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim, blocks, threads;
    double scale;
    Strided query, key, value, output;
    float* lse;               // [batch, heads, queries]
    const int32_t* kv_head;   // [heads]
    const int32_t* offsets;   // [rows + 1]
    const int32_t* tiles;     // [tiles, 3]
    const int32_t* gather;    // [gathers, 64]
    const uint64_t* masks;    // [masks, 64]
    int64_t gathers, mask_count;
    int64_t slots, slot_heads;
    const float* slot_key;         // [batch, slot_heads, slots, head_dim]
    const float* slot_value;       // [batch, slot_heads, slots, value_dim]
    const float* slot_log_weight;  // [batch, slot_heads, slots]
    const float* slot_weight;      // [batch, slot_heads, slots]
    const int32_t* slot_head;      // [heads]
    const int32_t* slot_member;    // [batch, slot_heads, keys], or null
    const float* slot_share;       // [batch, slot_heads, keys], or null
};

enum Status { OK = 0, BAD_KIND = 1, BAD_GATHER = 2, BAD_MASK = 3, BAD_SLOT = 4, NO_MEMORY = 5 };

// C = A B, or C = diag(alpha) C + A B where alpha is given. NV vectors of columns.
template <int NV>
inline void product_block(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
                          float* c, int64_t ldc, const float* alpha) {
    vec sum[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++)
            sum[r][n] = alpha ? load(c + r * ldc + n * W) * alpha[r] : vec{};
    for (int64_t k = 0; k < depth; k++) {
        vec column[NV];
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) column[n] = load(b + k * ldb + n * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++) sum[r][n] += a[r * lda + k] * column[n];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) store(c + r * ldc + n * W, sum[r][n]);
}

// `rows` is rounded up to a multiple of R, so buffers hold whole groups; columns are in vectors.
inline void product(int64_t rows, int64_t depth, int64_t vectors, const float* a, int64_t lda,
                    const float* b, int64_t ldb, float* c, int64_t ldc, const float* alpha) {
    for (int64_t n = 0; n < vectors; n += 2)
        for (int64_t r = 0; r < rows; r += R) {
            const float *ar = a + r * lda, *bn = b + n * W, *scale = alpha ? alpha + r : nullptr;
            float* cn = c + r * ldc + n * W;
            if (n + 1 < vectors)
                product_block<2>(depth, ar, lda, bn, ldb, cn, ldc, scale);
            else
                product_block<1>(depth, ar, lda, bn, ldb, cn, ldc, scale);
        }
}

// Products of bfloat16 pairs ---------------------------------------------------------------------
//
// a: rows of 2 * pairs bfloat16, read as 32-bit pairs. b: [pairs, columns] of 32-bit pairs.

#if PAIRS
template <int NV>
inline void pair_block(int64_t pairs, const float* a, int64_t lda, const float* b, int64_t ldb,
                       float* c, int64_t ldc, bool add) {
    __m512 sum[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++)
            sum[r][n] = add ? (__m512)load(c + r * ldc + n * W) : _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++) {
        vec column[NV];
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) column[n] = load(b + k * ldb + n * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32((int)bits_of(a[r * lda + k]));
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++)
                sum[r][n] = _mm512_dpbf16_ps(sum[r][n], pair, (__m512bh)column[n]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) store(c + r * ldc + n * W, (vec)sum[r][n]);
}
#endif

#if AMX
#define TILE_LOAD(t, p, stride) \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(p), "r"((int64_t)(stride)) : "memory")
#define TILE_STORE(t, p, stride) \
    asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"((int64_t)(stride)) : "memory")
#define TILE_ZERO(t) asm volatile("tilezero %%tmm" #t ::)
#define TILE_PRODUCT(c, a, b) \
    asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

// 16 rows; NV groups of 16 columns; `pairs` is a multiple of 16.
template <int NV>
inline void tile_block(int64_t pairs, const float* a, int64_t lda, const float* b, int64_t ldb,
                       float* c, int64_t ldc, bool add) {
    lda *= 4, ldb *= 4, ldc *= 4;
    if (add) {
        TILE_LOAD(0, c, ldc);
        if (NV > 1) TILE_LOAD(1, c + 16, ldc);
        if (NV > 2) TILE_LOAD(2, c + 32, ldc);
        if (NV > 3) TILE_LOAD(3, c + 48, ldc);
    } else {
        TILE_ZERO(0);
        if (NV > 1) TILE_ZERO(1);
        if (NV > 2) TILE_ZERO(2);
        if (NV > 3) TILE_ZERO(3);
    }
    for (int64_t k = 0; k < pairs; k += 16) {
        const float* row = b + k * (ldb / 4);
        TILE_LOAD(4, a + k, lda);
        TILE_LOAD(5, row, ldb);
        TILE_PRODUCT(0, 4, 5);
        if (NV > 1) {
            TILE_LOAD(6, row + 16, ldb);
            TILE_PRODUCT(1, 4, 6);
        }
        if (NV > 2) {
            TILE_LOAD(7, row + 32, ldb);
            TILE_PRODUCT(2, 4, 7);
        }
        if (NV > 3) {
            TILE_LOAD(5, row + 48, ldb);
            TILE_PRODUCT(3, 4, 5);
        }
    }
    TILE_STORE(0, c, ldc);
    if (NV > 1) TILE_STORE(1, c + 16, ldc);
    if (NV > 2) TILE_STORE(2, c + 32, ldc);
    if (NV > 3) TILE_STORE(3, c + 48, ldc);
}

// Asks the system once for the tile registers.
bool tiles_granted() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
    return granted;
}

void configure_tiles() {  // eight tiles of 16 rows of 64 bytes
    alignas(64) uint8_t config[64] = {1};
    for (int t = 0; t < 8; t++) {
        config[16 + 2 * t] = 64;
        config[48 + t] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
}

void release_tiles() { asm volatile("tilerelease" ::); }
#else
bool tiles_granted() { return false; }
void configure_tiles() {}
void release_tiles() {}
#endif

// C = A B or C += A B for one group of 16 rows, all of which the buffers hold.
inline void pair_product(bool tiles, int64_t rows, int64_t pairs, int64_t vectors,
                         const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                         int64_t ldc, bool add) {
#if AMX
    if (tiles) {
        for (int64_t n = 0; n < vectors; n += 4) {
            const float* bn = b + n * W;
            float* cn = c + n * W;
            switch (std::min<int64_t>(4, vectors - n)) {
                case 1: tile_block<1>(pairs, a, lda, bn, ldb, cn, ldc, add); break;
                case 2: tile_block<2>(pairs, a, lda, bn, ldb, cn, ldc, add); break;
                case 3: tile_block<3>(pairs, a, lda, bn, ldb, cn, ldc, add); break;
                default: tile_block<4>(pairs, a, lda, bn, ldb, cn, ldc, add);
            }
        }
        return;
    }
#endif
#if PAIRS
    for (int64_t n = 0; n < vectors; n += 2)
        for (int64_t r = 0; r < rows; r += R) {
            const float *ar = a + r * lda, *bn = b + n * W;
            float* cn = c + r * ldc + n * W;
            if (n + 1 < vectors)
                pair_block<2>(pairs, ar, lda, bn, ldb, cn, ldc, add);
            else
                pair_block<1>(pairs, ar, lda, bn, ldb, cn, ldc, add);
        }
#endif
}

// Packing ---------------------------------------------------------------------------------------

inline int64_t padded(int64_t n, int64_t unit = W) { return (n + unit - 1) / unit * unit; }

// 64 rows (null: zeros) to [head_dim, 64].
template <class T>
void pack_keys(const T* const* rows, int64_t head_dim, float* out) {
    for (int64_t j = 0; j < BLOCK; j += W)
        for (int64_t k = 0; k < head_dim; k += W) {
            vec x[W];
            for (int i = 0; i < W; i++)
                x[i] = rows[j + i] ? load_first(rows[j + i] + k, head_dim - k) : vec{};
            transpose(x);
            for (int i = 0; i < std::min<int64_t>(W, head_dim - k); i++)
                store(out + (k + i) * BLOCK + j, x[i]);
        }
}

// 64 rows (null: zeros) to [64, padded(value_dim)].
template <class T>
void pack_values(const T* const* rows, int64_t value_dim, float* out) {
    for (int64_t j = 0; j < BLOCK; j++)
        for (int64_t k = 0; k < value_dim; k += W)
            store(out + j * padded(value_dim) + k,
                  rows[j] ? load_first(rows[j] + k, value_dim - k) : vec{});
}

// W 32-bit pairs of one row, of which `left` bfloat16 exist.
inline vec load_pairs(const BFloat16* p, int64_t left) {
    if (left >= 2 * W) return load((const float*)p);
    float part[W] = {};
    std::memcpy(part, p, std::min<int64_t>(2 * W, std::max<int64_t>(left, 0)) * 2);
    return load(part);
}

// 64 rows (null: zeros) to 32-bit pairs [padded(head_dim, 32) / 2, 64].
void pack_key_pairs(const BFloat16* const* rows, int64_t head_dim, float* out) {
    for (int64_t j = 0; j < BLOCK; j += W)
        for (int64_t k = 0; k < padded(head_dim, 32); k += 2 * W) {
            vec x[W];
            for (int i = 0; i < W; i++)
                x[i] = rows[j + i] ? load_pairs(rows[j + i] + k, head_dim - k) : vec{};
            transpose(x);
            for (int i = 0; i < W; i++) store(out + (k / 2 + i) * BLOCK + j, x[i]);
        }
}

// 64 rows (null: zeros) to pairs of rows [32, padded(value_dim)].
void pack_value_pairs(const BFloat16* const* rows, int64_t value_dim, float* out) {
    for (int64_t j = 0; j < BLOCK; j += 2)
        for (int64_t k = 0; k < value_dim; k += W) {
            vec even = rows[j] ? load_first(rows[j] + k, value_dim - k) : vec{};
            vec odd = rows[j + 1] ? load_first(rows[j + 1] + k, value_dim - k) : vec{};
            store(out + j / 2 * padded(value_dim) + k, (vec)((uvec)odd | (uvec)even >> 16));
        }
}

// What is known of a mask before any tile is read.
struct MaskFacts {
    int64_t pairs;   // set bits
    int64_t columns; // sum over groups of 16 rows of 16 * columns, in whole vectors
};

// Columns that a word spans, rounded to groups of 16, in vectors.
inline void column_range(uint64_t word, int64_t& low, int64_t& high) {
    low = __builtin_ctzll(word) / 16 * (16 / W);
    high = ((63 - __builtin_clzll(word)) / 16 + 1) * (16 / W);
}

MaskFacts facts_of(const uint64_t* words) {
    MaskFacts facts = {0, 0};
    for (int64_t g = 0; g < BLOCK; g += GROUP) {
        uint64_t any = 0;
        for (int64_t r = g; r < g + GROUP; r++) {
            facts.pairs += __builtin_popcountll(words[r]);
            any |= words[r];
        }
        if (any) {
            int64_t low, high;
            column_range(any, low, high);
            facts.columns += GROUP * (high - low) * W;
        }
    }
    return facts;
}

// A tile as the dense way reads it.
struct Packed {
    const float* key;
    const float* value;
    const float* log_weight;  // null but for slots
    const float* weight;
    uint64_t valid;  // columns that hold a key
    const float* slot_key = nullptr;         // of keys that leave their slots: the slots' keys
    const float* slot_log_weight = nullptr;  // and log-weights
    const float* share = nullptr;            // and what they take from their slots
};

template <class T>
class Engine {
  public:
    explicit Engine(const Call& call)
        : c(call),
          key_tiles((c.keys + BLOCK - 1) / BLOCK),
          slot_tiles(c.slots / BLOCK),
          dq(padded(c.head_dim)),
          dv(padded(c.value_dim)),
          pairs(padded(c.head_dim, 32) / 2),
          key_floats((PAIRED ? pairs : c.head_dim) * BLOCK),
          per_tile(key_floats + (PAIRED ? BLOCK / 2 : BLOCK) * dv),
          scale((float)c.scale),
          tiles(PAIRED && tiles_granted()),
          single_key(tiles ? 24 : PAIRED ? 10 : 4),
          pack_gather(tiles ? 1500 : 640) {}

    int run() {
        if (int status = plan()) return status;
        int64_t pool = c.batch * c.kv_heads * key_tiles;
        int64_t slot_pool = c.batch * c.slot_heads * slot_tiles;
        int64_t used = 0;
        for (int64_t i = 0; i < pool + slot_pool; i++)
            if (place[i]) place[i] = ++used;  // 1-based
        int64_t per_thread =
            BLOCK * (dq + dv + W + pairs) + 3 * GROUP * BLOCK + 4 * BLOCK + 4 * CHUNK + per_tile +
            key_floats;
        float* memory = allocate(used * per_tile + c.threads * per_thread);
        if (!memory) return NO_MEMORY;
        packed = memory;
        float* scratch = memory + used * per_tile;
        std::atomic<int64_t> next_pack(0), next_item(0), workers(0);
        int64_t items = (int64_t)order.size();
#pragma omp parallel num_threads((int)c.threads)
        {
            for (int64_t i; (i = next_pack++) < pool + slot_pool;)
                if (place[i]) {
                    float* to = packed + (place[i] - 1) * per_tile;
                    i < pool ? pack_contiguous(i, to) : pack_slots(i - pool, to);
                }
#pragma omp barrier
            Scratch own(scratch + (workers++) * per_thread, *this);
            if (tiles) configure_tiles();
            for (int64_t i = next_item++, next; i < items; i = next) {
                next = next_item++;
                if (next < items) fetch_query(order[next]);
                block(order[i], own);
            }
            if (tiles) release_tiles();
        }
        std::free(memory);
        return OK;
    }

  private:
    const Call& c;
    static constexpr bool PAIRED = PAIRS && std::is_same_v<T, BFloat16>;
    static constexpr int NV = BLOCK / W;  // vectors in a row of a tile
    int64_t key_tiles, slot_tiles;
    int64_t dq, dv, pairs;         // padded head_dim, value_dim; bfloat16 pairs per query row
    int64_t key_floats, per_tile;  // of a packed tile
    float scale;
    bool tiles;  // AMX
    // Measured times, in pairs of a dense tile: of one listed pair, and of packing a gather tile.
    int64_t single_key, pack_gather;
    float* packed = nullptr;
    std::vector<MaskFacts> facts;
    std::vector<int32_t> place;  // of every key tile, then of every slot tile: 0, or 1 + its slot
    std::vector<int64_t> order;  // CSR rows, longest first

    struct Scratch {
        float *query, *output, *mass, *pairs, *score, *weight, *shift, *alpha, *single, *tile;
        float *slot_score, *slot_tile, *slot_numbers;  // of keys that leave their slots
        std::vector<const int32_t*> listed, taken;     // the sparse tiles of the block
        int64_t counts[BLOCK];               // and the keys that each row reads through them
        int32_t ids[BLOCK][CHUNK + BLOCK];
        Scratch(float* p, const Engine& e) {
            query = p;
            output = query + BLOCK * e.dq;
            mass = output + BLOCK * e.dv;
            pairs = mass + BLOCK * W;
            score = pairs + BLOCK * e.pairs;
            weight = score + GROUP * BLOCK;
            shift = weight + GROUP * BLOCK;
            alpha = shift + BLOCK;
            single = alpha + BLOCK;
            tile = single + 4 * CHUNK;
            slot_tile = tile + e.per_tile;
            slot_score = slot_tile + e.key_floats;
            slot_numbers = slot_score + GROUP * BLOCK;
        }
    };

    static float* allocate(int64_t floats) {
        return (float*)std::aligned_alloc(64, (size_t)(floats * 4 + 63) / 64 * 64);
    }

    int64_t rows_of(int64_t row) const {
        return std::min(BLOCK, c.queries - row % c.blocks * BLOCK);
    }

    static bool gathers(const int32_t* tile) { return tile[0] == GATHER || tile[0] == TAKEN; }

    bool is_sparse(const int32_t* tile, int64_t rows) const {
        if (tile[0] == SLOTS) return false;
        if (rows <= FEW_ROWS) return true;
        if (tile[2] < 0) return false;
        const MaskFacts& f = facts[tile[2]];
        return f.pairs * single_key < f.columns + (gathers(tile) ? pack_gather : 0);
    }

    // Checks the list, marks the tiles to pack, orders the rows by their work.
    int plan() {
        facts.resize(c.mask_count);
#pragma omp parallel for num_threads((int)c.threads) if (c.mask_count > 256)
        for (int64_t i = 0; i < c.mask_count; i++) facts[i] = facts_of(c.masks + i * BLOCK);
        int64_t rows = c.batch * c.heads * c.blocks;
        place.assign(c.batch * (c.kv_heads * key_tiles + c.slot_heads * slot_tiles), 0);
        std::vector<int64_t> work(rows);
        for (int64_t row = 0; row < rows; row++) {
            int64_t b = row / c.blocks / c.heads, h = row / c.blocks % c.heads;
            int64_t alive = rows_of(row);
            work[row] = 1;
            for (int64_t t = c.offsets[row]; t < c.offsets[row + 1]; t++) {
                const int32_t* tile = c.tiles + 3 * t;
                int64_t kind = tile[0], index = tile[1], mask = tile[2];
                if (kind < CONTIGUOUS || kind > (c.slot_member ? TAKEN : SLOTS)) return BAD_KIND;
                if (mask < -1 || mask >= c.mask_count) return BAD_MASK;
                if (gathers(tile) && (index < 0 || index >= c.gathers)) return BAD_GATHER;
                if (kind == SLOTS && (index < 0 || index >= slot_tiles)) return BAD_SLOT;
                if (kind >= SLOTS && (c.slot_head[h] < 0 || c.slot_head[h] >= c.slot_heads))
                    return BAD_SLOT;
                if (is_sparse(tile, alive)) {
                    int64_t pairs = mask < 0 ? BLOCK * BLOCK : facts[mask].pairs;
                    work[row] += pairs * single_key;
                    continue;
                }
                work[row] += mask < 0 ? BLOCK * BLOCK : facts[mask].columns;
                if (gathers(tile)) work[row] += pack_gather;
                if (kind == CONTIGUOUS && index >= 0 && index < key_tiles)
                    place[(b * c.kv_heads + c.kv_head[h]) * key_tiles + index] = 1;
                if (kind == SLOTS)
                    place[c.batch * c.kv_heads * key_tiles +
                          (b * c.slot_heads + c.slot_head[h]) * slot_tiles + index] = 1;
            }
        }
        order.resize(rows);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(),
                         [&](int64_t x, int64_t y) { return work[x] > work[y]; });
        return OK;
    }

    static const T* at(const Strided& s, int64_t b, int64_t h, int64_t row) {
        return (const T*)s.data + b * s.batch + h * s.head + row * s.row;
    }

    void pack(const T* const* key, const T* const* value, float* to) const {
        if constexpr (PAIRED) {
            pack_key_pairs(key, c.head_dim, to);
            pack_value_pairs(value, c.value_dim, to + key_floats);
        } else {
            pack_keys(key, c.head_dim, to);
            pack_values(value, c.value_dim, to + key_floats);
        }
    }

    void pack_contiguous(int64_t i, float* to) const {
        int64_t b = i / key_tiles / c.kv_heads, h = i / key_tiles % c.kv_heads;
        const T *key[BLOCK], *value[BLOCK];
        for (int64_t j = 0; j < BLOCK; j++) {
            int64_t position = i % key_tiles * BLOCK + j;
            key[j] = position < c.keys ? at(c.key, b, h, position) : nullptr;
            value[j] = position < c.keys ? at(c.value, b, h, position) : nullptr;
        }
        pack(key, value, to);
    }

    void pack_slots(int64_t i, float* to) const {
        const float *key[BLOCK], *value[BLOCK];
        for (int64_t j = 0; j < BLOCK; j++) {
            key[j] = c.slot_key + (i * BLOCK + j) * c.head_dim;
            value[j] = c.slot_value + (i * BLOCK + j) * c.value_dim;
        }
        if constexpr (PAIRED) {
            const T *narrow_key[BLOCK], *narrow_value[BLOCK];
            std::vector<T> keys = narrowed(key, c.head_dim, narrow_key);
            std::vector<T> values = narrowed(value, c.value_dim, narrow_value);
            pack(narrow_key, narrow_value, to);
        } else {
            pack_keys(key, c.head_dim, to);
            pack_values(value, c.value_dim, to + key_floats);
        }
    }

    static std::vector<T> narrowed(const float* const* rows, int64_t width, const T** out) {
        std::vector<T> copy(BLOCK * width);
        for (int64_t j = 0; j < BLOCK; j++) {
            for (int64_t k = 0; rows[j] && k < width; k++) put(&copy[j * width + k], rows[j][k]);
            out[j] = rows[j] ? &copy[j * width] : nullptr;
        }
        return copy;
    }

    // Which columns of a tile hold a key.
    uint64_t valid_columns(const int32_t* tile) const {
        if (tile[0] == SLOTS) return ~0ull;
        if (tile[0] == CONTIGUOUS) {
            int64_t left = tile[1] < 0 ? 0 : c.keys - tile[1] * BLOCK;
            return left >= BLOCK ? ~0ull : left <= 0 ? 0 : (1ull << left) - 1;
        }
        uint64_t word = 0;
        const int32_t* ids = c.gather + tile[1] * BLOCK;
        for (int64_t j = 0; j < BLOCK; j++)
            word |= (uint64_t)(ids[j] >= 0 && ids[j] < c.keys) << j;
        return word;
    }

    // The slot of a key of head h, -1 for none.
    int64_t slot_of(int64_t b, int64_t h, int64_t key) const {
        int64_t slot = c.slot_member[(b * c.slot_heads + c.slot_head[h]) * c.keys + key];
        return slot < c.slots ? slot : -1;
    }

    const float* slot_key_of(int64_t b, int64_t h, int64_t slot) const {
        return c.slot_key + ((b * c.slot_heads + c.slot_head[h]) * c.slots + slot) * c.head_dim;
    }

    // What the keys of a tile leave: keys, log-weights and shares of their slots.
    void leave(const int32_t* ids, int64_t b, int64_t h, Scratch& s, Packed& tile) const {
        int64_t row = b * c.slot_heads + c.slot_head[h];
        const float* key[BLOCK];
        for (int64_t j = 0; j < BLOCK; j++) {
            int64_t slot = tile.valid >> j & 1 ? slot_of(b, h, ids[j]) : -1;
            key[j] = slot < 0 ? nullptr : slot_key_of(b, h, slot);
            s.slot_numbers[j] = slot < 0 ? NONE : c.slot_log_weight[row * c.slots + slot];
            s.slot_numbers[BLOCK + j] = slot < 0 ? 0.f : c.slot_share[row * c.keys + ids[j]];
        }
        if constexpr (PAIRED) {
            const T* narrow[BLOCK];
            std::vector<T> keys = narrowed(key, c.head_dim, narrow);
            pack_key_pairs(narrow, c.head_dim, s.slot_tile);
        } else {
            pack_keys(key, c.head_dim, s.slot_tile);
        }
        tile.slot_key = s.slot_tile;
        tile.slot_log_weight = s.slot_numbers;
        tile.share = s.slot_numbers + BLOCK;
    }

    Packed find(const int32_t* tile, uint64_t valid, int64_t b, int64_t h, Scratch& s) const {
        int64_t kv = c.kv_head[h];
        if (gathers(tile)) {
            const T *key[BLOCK], *value[BLOCK];
            const int32_t* ids = c.gather + tile[1] * BLOCK;
            for (int64_t j = 0; j < BLOCK; j++) {
                bool on = valid >> j & 1;
                key[j] = on ? at(c.key, b, kv, ids[j]) : nullptr;
                value[j] = on ? at(c.value, b, kv, ids[j]) : nullptr;
            }
            pack(key, value, s.tile);
            Packed found = {s.tile, s.tile + key_floats, nullptr, nullptr, valid};
            if (tile[0] == TAKEN) leave(ids, b, h, s, found);
            return found;
        }
        int64_t i = (b * c.kv_heads + kv) * key_tiles + tile[1];
        const float *log_weight = nullptr, *weight = nullptr;
        if (tile[0] == SLOTS) {
            int64_t slot_row = b * c.slot_heads + c.slot_head[h];
            i = c.batch * c.kv_heads * key_tiles + slot_row * slot_tiles + tile[1];
            log_weight = c.slot_log_weight + slot_row * c.slots + tile[1] * BLOCK;
            weight = c.slot_weight + slot_row * c.slots + tile[1] * BLOCK;
        }
        const float* key = packed + (place[i] - 1) * per_tile;
        return {key, key + key_floats, log_weight, weight, valid};
    }

    void block(int64_t row, Scratch& s) const {
        int64_t b = row / c.blocks / c.heads, h = row / c.blocks % c.heads;
        int64_t first = row % c.blocks * BLOCK, rows = rows_of(row);
        int64_t whole = padded(rows, GROUP);
        if (!PAIRED) scale_query(b, h, first, rows, whole, s);
        if constexpr (PAIRED)
            for (int64_t r = 0; r < whole; r++)
                for (int64_t k = 0; k < pairs; k += W) {
                    vec x = r < rows ? load_pairs(at(c.query, b, h, first + r) + 2 * k,
                                                  c.head_dim - 2 * k)
                                     : vec{};
                    store(s.pairs + r * pairs + k, x);
                }
        std::fill(s.output, s.output + whole * dv, 0.f);
        std::fill(s.mass, s.mass + whole * W, 0.f);
        std::fill(s.shift, s.shift + BLOCK, NONE);

        s.listed.clear();
        s.taken.clear();
        for (int64_t t = c.offsets[row]; t < c.offsets[row + 1]; t++) {
            const int32_t* tile = c.tiles + 3 * t;
            if (is_sparse(tile, rows)) {
                (tile[0] == TAKEN ? s.taken : s.listed).push_back(tile);
                continue;
            }
            uint64_t valid = valid_columns(tile);
            if (valid) dense(find(tile, valid, b, h, s), tile[2], rows, s);
        }
        bool few = !s.listed.empty() || !s.taken.empty();
        if (PAIRED && few) scale_query(b, h, first, rows, rows, s);
        if (!s.listed.empty()) sparse<false>(s.listed, rows, b, h, s);
        if (!s.taken.empty()) sparse<true>(s.taken, rows, b, h, s);

        for (int64_t r = 0; r < rows; r++) {
            float mass = reduce_add(load(s.mass + r * W));
            float inverse = mass == 0 ? 1.f : 1.f / mass;
            T* out = const_cast<T*>(at(c.output, b, h, first + r));
            for (int64_t k = 0; k < c.value_dim; k += W)
                store_first(out + k, load(s.output + r * dv + k) * inverse, c.value_dim - k);
            float shift = s.shift[r] == NONE ? 0.f : s.shift[r];
            c.lse[(b * c.heads + h) * c.queries + first + r] = std::log(mass) + shift;
        }
    }

    // Query rows times the scale, float32; zeros from `rows` to `whole`.
    void scale_query(int64_t b, int64_t h, int64_t first, int64_t rows, int64_t whole,
                     Scratch& s) const {
        for (int64_t r = 0; r < whole; r++)
            for (int64_t k = 0; k < dq; k += W) {
                vec x = r < rows ? load_first(at(c.query, b, h, first + r) + k, c.head_dim - k)
                                 : vec{};
                store(s.query + r * dq + k, x * scale);
            }
    }

    // Asks the memory for the queries of a CSR row ahead of time.
    void fetch_query(int64_t row) const {
        int64_t b = row / c.blocks / c.heads, h = row / c.blocks % c.heads;
        for (int64_t r = 0; r < rows_of(row); r++) {
            const char* p = (const char*)at(c.query, b, h, row % c.blocks * BLOCK + r);
            for (int64_t k = 0; k < c.head_dim * (int64_t)sizeof(T); k += 64)
                __builtin_prefetch(p + k);
        }
    }

    void dense(const Packed& tile, int64_t mask, int64_t rows, Scratch& s) const {
        const uint64_t* words = mask < 0 ? nullptr : c.masks + mask * BLOCK;
        for (int64_t g = 0; g < rows; g += GROUP) {
            int64_t count = std::min(GROUP, rows - g);
            uint64_t any = tile.valid;
            if (words) {
                any = 0;
                for (int64_t r = g; r < g + count; r++) any |= words[r];
                any &= tile.valid;
                if (!any) continue;
            }
            int64_t low, high;
            column_range(any, low, high);
            if constexpr (PAIRED) {
                pair_product(tiles, count, pairs, high - low, s.pairs + g * pairs, pairs,
                             tile.key + low * W, BLOCK, s.score + low * W, BLOCK, false);
            } else {
                product(count, c.head_dim, high - low, s.query + g * dq, dq, tile.key + low * W,
                        BLOCK, s.score + low * W, BLOCK, nullptr);
            }
            if (tile.slot_key) {
                if constexpr (PAIRED) {
                    pair_product(tiles, count, pairs, high - low, s.pairs + g * pairs, pairs,
                                 tile.slot_key + low * W, BLOCK, s.slot_score + low * W, BLOCK,
                                 false);
                } else {
                    product(count, c.head_dim, high - low, s.query + g * dq, dq,
                            tile.slot_key + low * W, BLOCK, s.slot_score + low * W, BLOCK, nullptr);
                }
            }
            bool plain = !words && !tile.log_weight && !tile.slot_key && tile.valid == ~0ull;
            for (int64_t r = 0; r < count; r++) {
                uint64_t word = words ? words[g + r] & tile.valid : tile.valid;
                if (plain)
                    softmax<true, 4>(tile, ~0ull, 0, g + r, s);
                else if (high - low == 1 * (16 / W))
                    softmax<false, 1>(tile, word, low, g + r, s);
                else if (high - low == 2 * (16 / W))
                    softmax<false, 2>(tile, word, low, g + r, s);
                else if (high - low == 3 * (16 / W))
                    softmax<false, 3>(tile, word, low, g + r, s);
                else
                    softmax<false, 4>(tile, word, low, g + r, s);
            }
            float* output = s.output + g * dv;
            bool moved = false;
            for (int64_t r = 0; r < count; r += W) {
                vec alpha = exponential(load(s.alpha + r));
                moved |= any_below(alpha, 1.f);
                store(s.alpha + r, alpha);
            }
            for (int64_t r = 0; r < count; r++)
                store(s.mass + (g + r) * W,
                      load(s.mass + (g + r) * W) * s.alpha[r] + load(s.single + r * W));
            if constexpr (PAIRED) {
                for (int64_t r = 0; moved && r < count; r++)
                    for (int64_t k = 0; k < dv; k += W)
                        store(output + r * dv + k, load(output + r * dv + k) * s.alpha[r]);
                int64_t from = low / 2, to = (high + 1) / 2;  // in 32 keys
                pair_product(tiles, count, (to - from) * W, dv / W, s.weight + from * W, BLOCK / 2,
                             tile.value + from * W * dv, dv, output, dv, true);
            } else {
                product(count, (high - low) * W, dv / W, s.score + low * W, BLOCK,
                        tile.value + low * W * dv, dv, output, dv, s.alpha);
            }
        }
    }

    // Scores of one row to exponentials, over QUARTERS * 16 columns from vector `low` on. Moves the
    // row's shift; leaves its mass in `single` and the old shift minus the new one in `alpha`.
    template <bool PLAIN, int QUARTERS>
    void softmax(const Packed& tile, uint64_t word, int64_t low, int64_t row, Scratch& s) const {
        constexpr int N = QUARTERS * (16 / W);
        float* score = s.score + row % GROUP * BLOCK + low * W;
        vec x[N], y[N], best = splat(s.shift[row]);
        bool leaves = !PLAIN && tile.slot_key;
        if (leaves) {
            const float* slot_score = s.slot_score + row % GROUP * BLOCK + low * W;
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
                y[n] = load(slot_score + n * W);
                if (PAIRED) y[n] *= scale;
                y[n] += load(tile.slot_log_weight + (low + n) * W);
                y[n] = where_set(word >> ((low + n) * W), y[n]);
                best = max(best, y[n]);
            }
        }
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            x[n] = load(score + n * W);
            if (PAIRED) x[n] *= scale;
            if (!PLAIN) {
                if (tile.log_weight) x[n] += load(tile.log_weight + (low + n) * W);
                x[n] = where_set(word >> ((low + n) * W), x[n]);
            }
            best = max(best, x[n]);
        }
        float old = s.shift[row], top = old;
        if (any_above(best, old)) top = reduce_max(best);
        float shift = top == NONE ? 0.f : top;
        vec mass = {};
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            x[n] = exponential(x[n] - shift);
            if (leaves) x[n] -= exponential(y[n] - shift) * load(tile.share + (low + n) * W);
            mass += !PLAIN && tile.weight ? x[n] * load(tile.weight + (low + n) * W) : x[n];
        }
        store(s.single + row % GROUP * W, mass);
        s.shift[row] = top;
        s.alpha[row % GROUP] = old - shift;
        if constexpr (PAIRED) {
            store_weights<N>(x, low, s.weight + row % GROUP * (BLOCK / 2));
        } else {
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) store(score + n * W, x[n]);
        }
    }

    // To bfloat16, over whole groups of 32 keys.
    template <int N>
    static void store_weights(const vec* x, int64_t low, float* to) {
#if PAIRS
        vec whole[N + 2] = {};  // N + 1 vectors, x at the place of `low` in its group
        for (int n = 0; n < N; n++) whole[n + low % 2] = x[n];
        for (int64_t n = 0; n < N + low % 2; n += 2) {
            __m512bh pair = _mm512_cvtne2ps_pbh((__m512)whole[n + 1], (__m512)whole[n]);
            store(to + (low / 2 * 2 + n) * W / 2, (vec)pair);
        }
#endif
    }

    // The keys that each row reads through some sparse tiles of its block.
    template <bool LEAVES>
    void sparse(const std::vector<const int32_t*>& some, int64_t rows, int64_t b, int64_t h,
                Scratch& s) const {
        std::fill(s.counts, s.counts + rows, 0);
        for (const int32_t* tile : some) {
            uint64_t valid = valid_columns(tile);
            const uint64_t* words = tile[2] < 0 ? nullptr : c.masks + tile[2] * BLOCK;
            int32_t names[BLOCK];
            for (int64_t j = 0; j < BLOCK; j++)
                names[j] = gathers(tile) ? c.gather[tile[1] * BLOCK + j]
                                             : (int32_t)(tile[1] * BLOCK + j);
            for (int64_t r = 0; r < rows; r++) {
                uint64_t word = words ? words[r] & valid : valid;
                int64_t bits = __builtin_popcountll(word);
                int32_t* to = s.ids[r] + s.counts[r];
                for (int64_t i = 0; i < bits; i += 4)  // four at a time: no branch per bit
#pragma GCC unroll 4
                    for (int64_t j = 0; j < 4; j++) {
                        to[i + j] = names[word ? __builtin_ctzll(word) : 0];
                        word &= word - 1;
                    }
                if ((s.counts[r] += bits) > CHUNK - BLOCK) {
                    listed<LEAVES>(s.counts[r], r, b, h, s);
                    s.counts[r] = 0;
                }
            }
        }
        for (int64_t r = 0; r < rows; r++)
            if (s.counts[r]) listed<LEAVES>(s.counts[r], r, b, h, s);
    }

    static void prefetch(const T* row, int64_t width) {
        for (int64_t k = 0; k < width; k += 64 / (int64_t)sizeof(T)) __builtin_prefetch(row + k);
    }

    // Softmax of row r over the first `count` keys of its list.
    template <bool LEAVES>
    void listed(int64_t count, int64_t r, int64_t b, int64_t h, Scratch& s) const {
        int64_t kv = c.kv_head[h];
        int32_t* ids = s.ids[r];
        float *slot_logit = s.single + 2 * CHUNK, *share = s.single + 3 * CHUNK;
        const float* query = s.query + r * dq;
        const T *key = at(c.key, b, kv, 0), *value = at(c.value, b, kv, 0);
        for (int64_t i = count; i < count + W; i++) ids[i] = ids[count - 1];
        ivec lanes;
        for (int i = 0; i < W; i++) lanes[i] = i;
        vec best = splat(s.shift[r]);
        for (int64_t i = 0; i < count; i += W) {
            const T* rows[W];
            for (int j = 0; j < W; j++) {
                rows[j] = key + ids[i + j] * c.key.row;
                prefetch(value + ids[i + j] * c.value.row, c.value_dim);
            }
            if (i + W < count)
                for (int j = 0; j < W; j++)
                    prefetch(key + ids[std::min(i + W + j, count - 1)] * c.key.row, c.head_dim);
            vec sum[W] = {};
            int64_t k = 0;
            for (; k + W <= c.head_dim; k += W) {
                vec q = load(query + k);
#pragma GCC unroll 16
                for (int j = 0; j < W; j++) sum[j] += q * load(rows[j] + k);
            }
            if (k < c.head_dim)
                for (int j = 0; j < W; j++)
                    sum[j] += load(query + k) * load_first(rows[j] + k, c.head_dim - k);
            vec x = reduce_each(sum);
            if (i + W > count) x = lanes < isplat((int32_t)(count - i)) ? x : splat(NONE);
            store(s.single + i, x);
            best = max(best, x);
            if constexpr (LEAVES) {
                x = slot_logits(i, count, query, ids, b, h, share);
                store(slot_logit + i, x);
                best = max(best, x);
            }
        }
        float top = reduce_max(best), shift = top == NONE ? 0.f : top;
        vec mass = {};
        for (int64_t i = 0; i < count; i += W) {
            vec p = exponential(load(s.single + i) - shift);
            if constexpr (LEAVES) p -= exponential(load(slot_logit + i) - shift) * load(share + i);
            store(s.single + i, p);
            mass += p;
        }
        float alpha = std::exp(s.shift[r] - shift);
        s.shift[r] = top;
        store(s.mass + r * W, load(s.mass + r * W) * alpha + mass);
        int64_t k = 0;
        for (; k + 4 * W <= c.value_dim; k += 4 * W)
            accumulate<4>(count, ids, s, value + k, s.output + r * dv + k, alpha, 4 * W);
        for (; k < c.value_dim; k += W)
            accumulate<1>(count, ids, s, value + k, s.output + r * dv + k, alpha, c.value_dim - k);
    }

    // Logarithms of what the slots of keys [i, i + W) of a list weigh, and the keys' shares of it.
    vec slot_logits(int64_t i, int64_t count, const float* query, const int32_t* ids, int64_t b,
                    int64_t h, float* share) const {
        int64_t row = b * c.slot_heads + c.slot_head[h];
        vec x, sum[W] = {};
        for (int j = 0; j < W; j++) {
            int64_t slot = i + j < count ? slot_of(b, h, ids[i + j]) : -1;
            share[i + j] = slot < 0 ? 0.f : c.slot_share[row * c.keys + ids[i + j]];
            x[j] = slot < 0 ? NONE : c.slot_log_weight[row * c.slots + slot];
            if (slot < 0) continue;
            const float* key = slot_key_of(b, h, slot);
            for (int64_t k = 0; k < c.head_dim; k += W)
                sum[j] += load(query + k) * load_first(key + k, c.head_dim - k);
        }
        return x + reduce_each(sum);
    }

    template <int NV>
    void accumulate(int64_t count, const int32_t* ids, const Scratch& s, const T* value,
                    float* output, float alpha, int64_t columns) const {
        vec sum[NV];
        for (int n = 0; n < NV; n++) sum[n] = load(output + n * W) * alpha;
        for (int64_t i = 0; i < count; i++) {
            const T* row = value + ids[i] * c.value.row;
            for (int n = 0; n < NV; n++)
                sum[n] += s.single[i] * load_first(row + n * W, columns - n * W);
        }
        for (int n = 0; n < NV; n++) store(output + n * W, sum[n]);
    }
};

}  // namespace

extern "C" int attnplan_attend(const Call* call) {
    switch (call->dtype) {
        case 0: return Engine<float>(*call).run();
        case 1: return Engine<BFloat16>(*call).run();
        default: return Engine<Float16>(*call).run();
    }
}
