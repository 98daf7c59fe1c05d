// Attention of a few new tokens over stored rows on a CPU: the compiled half of decode_cpu.py.
//
// One work item is a run of rows of one (batch, kv head): it reads every key and value once, for all
// query heads of the group, and leaves for each query (shift, mass, numerator). Where a head has
// several items they are merged in the end. Arithmetic is float32, logarithms are natural.

#include "vectors.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t TILE = 64;  // rows scored at once
constexpr int64_t PAGE = 16;  // rows that lie together
constexpr int PANEL = 4;      // vectors of a value that are summed at once
constexpr int64_t AHEAD = 32;  // rows from what is read to what is fetched

// Ask for a row that will be read soon: the processor's own prefetcher stops at every page.
template <class T>
inline void fetch(const T* row, int64_t vectors) {
    for (int64_t at = 0; at < vectors * W * (int64_t)sizeof(T); at += 64)
        __builtin_prefetch((const char*)row + at);
}

struct Head {  // one kv head: strides in elements; the last dimension is contiguous
    const void* key;
    const void* value;
    const float* bias;     // or null
    const int32_t* pages;  // or null
    int64_t key_batch, key_row, value_batch, value_row, bias_batch, pages_batch, rows, index;

    // Where row `i` of the list lies, the first of a page or of any tile.
    int64_t place(int64_t batch, int64_t i) const {
        return pages ? PAGE * pages[batch * pages_batch + i / PAGE] + i % PAGE : i;
    }

    // Where the row lies that is to be fetched while row `i` is read.
    int64_t soon(int64_t batch, int64_t i) const {
        return place(batch, std::min(i + AHEAD, (rows - 1) / PAGE * PAGE));
    }
};

struct DecodeCall {
    int64_t dtype;  // 0 float32, 1 bfloat16, 2 float16
    int64_t batch, kv_heads, group, queries, head_dim, value_dim, threads, run;
    double scale;
    Strided query, output;
    float* lse;  // [batch, heads, queries], or null
    const Head* heads;
    Strided key, value;  // of one new token, to become the last row of every head; or null
};

struct Item {
    int64_t batch, head, first, last;
};

template <class T>
struct Decoder {
    const DecodeCall& c;
    int64_t packed, depth, width;  // queries of a group; head_dim and value_dim in whole vectors

    explicit Decoder(const DecodeCall& call)
        : c(call),
          packed(call.group * call.queries),
          depth((call.head_dim + W - 1) / W * W),
          width((call.value_dim + W - 1) / W * W) {}

    int64_t state_size() const { return packed * (width + 2); }

    // Scaled queries of a group, [packed, depth], zero-padded: head by head, query by query.
    void load_queries(int64_t batch, int64_t head, float* to) const {
        for (int64_t p = 0; p < packed; p++) {
            int64_t h = head * c.group + p / c.queries, q = p % c.queries;
            const T* row = (const T*)c.query.data + batch * c.query.batch + h * c.query.head +
                           q * c.query.row;
            for (int64_t d = 0; d < depth; d += W)
                store(to + p * depth + d, load_first(row + d, c.head_dim - d) * (float)c.scale);
        }
    }

    // Dots of N queries, from `query` on, with W keys; `soon` are the keys to fetch meanwhile.
    template <int N>
    void score(const float* query, const T* key, const T* soon, int64_t stride, int64_t keys,
               vec* dots) const {
        vec part[N][W];
        for (int j = 0; j < W; j++) {
            const T* row = key + std::min<int64_t>(j, keys - 1) * stride;
            fetch(soon + j * stride, depth / W);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) part[n][j] = vec{};
            for (int64_t d = 0; d < depth; d += W) {
                vec k = load_first(row + d, c.head_dim - d);
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) part[n][j] += load(query + n * depth + d) * k;
            }
        }
        for (int n = 0; n < N; n++) dots[n] = reduce_each(part[n]);
    }

    // N queries over a tile of rows; `weights` is [packed, TILE].
    template <int N>
    void tile(const Head& h, const float* query, int64_t p, int64_t batch, int64_t first,
              int64_t rows, float* state, float* weights) const {
        const T* key = (const T*)h.key + batch * h.key_batch;
        const float* bias = h.bias ? h.bias + batch * h.bias_batch : nullptr;
        for (int64_t j = 0; j < rows; j += W) {
            vec dots[N];
            int64_t at = h.place(batch, first + j);  // W rows are of one page
            const T* soon = key + h.soon(batch, first + j) * h.key_row;
            score<N>(query + p * depth, key + at * h.key_row, soon, h.key_row, rows - j, dots);
            vec more = bias ? load_first(bias + at, rows - j) : vec{};
            for (int n = 0; n < N; n++) {
                int64_t seen = h.rows - c.queries + (p + n) % c.queries + 1 - first - j;
                seen = std::min(seen, rows - j);
                vec x = bias ? dots[n] + more : dots[n];
                uint64_t word = seen >= W ? ~0ull : seen <= 0 ? 0 : (1ull << seen) - 1;
                store(weights + n * TILE + j, where_set(word, x));
            }
        }
        int64_t whole = (rows + W - 1) / W * W;
        const T* value = (const T*)h.value + batch * h.value_batch;
        for (int n = 0; n < N; n++) {
            float* own = state + (p + n) * (width + 2);
            float* w = weights + n * TILE;
            vec top = splat(NONE);
            for (int64_t j = 0; j < whole; j += W) top = max(top, load(w + j));
            float shift = std::max(own[0], reduce_max(top));
            if (shift == NONE) {
                for (int64_t j = 0; j < whole; j += W) store(w + j, vec{});
                continue;
            }
            float fade = own[0] == NONE ? 0.f : std::exp(own[0] - shift);
            vec mass{};
            for (int64_t j = 0; j < whole; j += W) {
                vec e = exponential(load(w + j) - shift);
                store(w + j, e);
                mass += e;
            }
            own[0] = shift;
            own[1] = own[1] * fade + reduce_add(mass);
            for (int64_t d = 0; d < width; d += W) store(own + 2 + d, load(own + 2 + d) * fade);
        }
        bool all = !bias && c.queries == 1;  // else a row that nobody sees may hold anything
        float* sums = state + p * (width + 2) + 2;
        int64_t together = h.pages ? PAGE : TILE;  // rows that follow each other
        for (int64_t j = 0; j < rows; j += together) {
            int64_t some = std::min(together, rows - j);
            const T* from = value + h.place(batch, first + j) * h.value_row;
            const T* soon = value + h.soon(batch, first + j) * h.value_row;
            const float* w = weights + j;
            for (int64_t d = 0; d < width; d += PANEL * W)
                if (d + PANEL * W <= c.value_dim)
                    add_values<N, PANEL>(from + d, soon + d, h.value_row, some, w, all, W,
                                         sums + d);
                else
                    for (int64_t e = d; e < width; e += W)
                        add_values<N, 1>(from + e, soon + e, h.value_row, some, w, all,
                                         c.value_dim - e, sums + e);
        }
    }

    // Add weighted values of some rows to the numerators of N queries, P vectors of each.
    template <int N, int P>
    void add_values(const T* value, const T* soon, int64_t stride, int64_t rows,
                    const float* weights, bool all, int64_t last, float* sums) const {
        vec sum[N][P];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++)
#pragma GCC unroll 4
            for (int i = 0; i < P; i++) sum[n][i] = load(sums + n * (width + 2) + i * W);
        for (int64_t j = 0; j < rows; j++) {
            fetch(soon + j * stride, P);
            bool any = all;
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) any |= weights[n * TILE + j] != 0;
            if (!any) continue;
#pragma GCC unroll 4
            for (int i = 0; i < P; i++) {
                const T* at = value + j * stride + i * W;
                vec v = P == 1 ? load_first(at, last) : load(at);
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) sum[n][i] += v * weights[n * TILE + j];
            }
        }
#pragma GCC unroll 4
        for (int n = 0; n < N; n++)
#pragma GCC unroll 4
            for (int i = 0; i < P; i++) store(sums + n * (width + 2) + i * W, sum[n][i]);
    }

    void item(const Item& i, float* query, float* weights, float* state) const {
        const Head& h = c.heads[i.head];
        load_queries(i.batch, h.index, query);
        for (int64_t p = 0; p < packed; p++) {
            float* own = state + p * (width + 2);
            std::fill(own, own + width + 2, 0.f);
            own[0] = NONE;
        }
        for (int64_t first = i.first; first < i.last; first += TILE) {
            int64_t rows = std::min(TILE, i.last - first), p = 0;
            for (; p + 4 <= packed; p += 4) tile<4>(h, query, p, i.batch, first, rows, state, weights);
            for (; p + 3 <= packed; p += 3) tile<3>(h, query, p, i.batch, first, rows, state, weights);
            for (; p < packed; p++) tile<1>(h, query, p, i.batch, first, rows, state, weights);
        }
    }

    // Merge the items of one (batch, head), which follow each other, and write the outputs.
    void finish(const Item& i, const float* states, int64_t count) const {
        for (int64_t p = 0; p < packed; p++) {
            int64_t h = c.heads[i.head].index * c.group + p / c.queries, q = p % c.queries;
            float shift = NONE, mass = 0;
            for (int64_t s = 0; s < count; s++)
                shift = std::max(shift, states[s * state_size() + p * (width + 2)]);
            std::vector<float> sum(width, 0.f);
            for (int64_t s = 0; s < count && shift != NONE; s++) {
                const float* own = states + s * state_size() + p * (width + 2);
                float fade = own[0] == NONE ? 0.f : std::exp(own[0] - shift);
                mass += own[1] * fade;
                for (int64_t d = 0; d < c.value_dim; d++) sum[d] += own[2 + d] * fade;
            }
            T* to = (T*)c.output.data + i.batch * c.output.batch + h * c.output.head +
                    q * c.output.row;
            for (int64_t d = 0; d < c.value_dim; d++) put(to + d, mass > 0 ? sum[d] / mass : 0.f);
            if (c.lse)
                c.lse[(i.batch * c.kv_heads * c.group + h) * c.queries + q] =
                    mass > 0 ? shift + std::log(mass) : NONE;
        }
    }

    static void take(const void* rows, int64_t at, const Strided& from, int64_t batch, int64_t head,
                     int64_t width) {
        const T* row = (const T*)from.data + batch * from.batch + head * from.head;
        std::memcpy((T*)const_cast<void*>(rows) + at, row, width * sizeof(T));
    }

    // The key and the value of a new token become the last rows.
    void take_in() const {
        for (int64_t h = 0; h < c.kv_heads; h++) {
            const Head& own = c.heads[h];
            for (int64_t b = 0; b < c.batch; b++) {
                int64_t key = b * own.key_batch + (own.rows - 1) * own.key_row;
                int64_t value = b * own.value_batch + (own.rows - 1) * own.value_row;
                take(own.key, key, c.key, b, own.index, c.head_dim);
                take(own.value, value, c.value, b, own.index, c.value_dim);
            }
        }
    }

    int run() const {
        if (c.key.data) take_in();
        std::vector<Item> items;
        std::vector<int64_t> begins;
        for (int64_t b = 0; b < c.batch; b++)
            for (int64_t h = 0; h < c.kv_heads; h++) {
                begins.push_back(items.size());
                for (int64_t first = 0; first < c.heads[h].rows; first += c.run)
                    items.push_back({b, h, first, std::min(first + c.run, c.heads[h].rows)});
            }
        begins.push_back(items.size());
        int64_t threads = std::min<int64_t>(c.threads, items.size());
        int64_t scratch = packed * depth + 4 * TILE;
        size_t floats = items.size() * state_size() + threads * scratch;
        float* memory = (float*)std::malloc(floats * sizeof(float));
        if (!memory) return 5;
        float* spare = memory + items.size() * state_size();
        std::atomic<int64_t> next{0}, workers{0}, heads{0};
#pragma omp parallel num_threads((int)threads) if (threads > 1)
        {
            float* own = spare + (workers++) * scratch;
            for (int64_t i; (i = next++) < (int64_t)items.size();)
                item(items[i], own, own + packed * depth, memory + i * state_size());
#pragma omp barrier
            for (int64_t g; (g = heads++) + 1 < (int64_t)begins.size();)
                finish(items[begins[g]], memory + begins[g] * state_size(),
                       begins[g + 1] - begins[g]);
        }
        std::free(memory);
        return 0;
    }
};

}  // namespace

extern "C" int attnplan_decode(const DecodeCall* call) {
    switch (call->dtype) {
        case 0: return Decoder<float>(*call).run();
        case 1: return Decoder<BFloat16>(*call).run();
        default: return Decoder<Float16>(*call).run();
    }
}
