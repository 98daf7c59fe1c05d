// Features of rows, and sums over them added to attention: what torch does in many passes over
// memory, in one.

#include "vectors.h"

#include <vector>

namespace {

constexpr int MOST = 1024;  // features of a sketch

// Complex Fourier transform of W sequences side by side, in place, N a power of two: decimation in
// frequency, whose result is in bit-reversed order.
void transform(vec* re, vec* im, int64_t n, const float* cosine, const float* sine) {
    for (int64_t half = n / 2, step = 1; half; half /= 2, step *= 2)
        for (int64_t first = 0; first < n; first += 2 * half)
            for (int64_t k = 0; k < half; k++) {
                int64_t a = first + k, b = a + half;
                vec x = re[a] - re[b], y = im[a] - im[b];
                re[a] += re[b];
                im[a] += im[b];
                float c = cosine[k * step], s = sine[k * step];
                re[b] = x * c - y * s;
                im[b] = x * s + y * c;
            }
}

}  // namespace

// Tensor sketches of degree two of rows [count, columns] (row stride `stride`), in frequencies.
//
// `bucket` and `sign` are [2, columns + 1], of a constant 1 and of the columns times `scale`. The two
// count sketches are the real and the imaginary part of one sequence z, so that one transform does:
// the product of theirs is (Z_k^2 - conj(Z_-k)^2) / 4i. `weight` [features / 2 + 1] multiplies it.
extern "C" void attnplan_sketch(const float* rows, int64_t count, int64_t stride, int64_t columns,
                                float scale, const int64_t* bucket, const float* sign,
                                const float* weight, int64_t features, float* out) {
    const int64_t n = features, half = n / 2;
    std::vector<float> cosine(half + 1), sine(half + 1);
    std::vector<int64_t> at(n);
    for (int64_t k = 0; k < half; k++) {
        cosine[k] = (float)std::cos(2 * M_PI * k / n);
        sine[k] = (float)-std::sin(2 * M_PI * k / n);
    }
    for (int64_t k = 0; k < n; k++)
        for (int64_t bit = 1, to = n / 2; bit < n; bit *= 2, to /= 2)
            if (k & bit) at[k] |= to;
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < count; first += W) {
        vec re[MOST], im[MOST], made[MOST];
        std::fill(re, re + n, vec{});
        std::fill(im, im + n, vec{});
        int64_t some = std::min<int64_t>(W, count - first);
        for (int64_t c = 0; c <= columns; c += W) {  // [1, columns] as blocks of columns
            vec block[W] = {};
            for (int64_t r = 0; r < some; r++) {
                const float* row = rows + (first + r) * stride;
                if (c)
                    block[r] = load_first(row + c - 1, columns - c + 1) * scale;
                else {
                    float part[W] = {1.f};
                    int64_t have = std::min<int64_t>(W - 1, columns);
                    for (int64_t i = 0; i < have; i++) part[i + 1] = row[i] * scale;
                    block[r] = load(part);
                }
            }
            transpose(block);
            for (int64_t i = 0; i < std::min<int64_t>(W, columns + 1 - c); i++) {
                re[bucket[c + i]] += block[i] * sign[c + i];
                im[bucket[columns + 1 + c + i]] += block[i] * sign[columns + 1 + c + i];
            }
        }
        transform(re, im, n, cosine.data(), sine.data());
        for (int64_t k = 0; k <= half; k++) {
            int64_t a = at[k], b = at[(n - k) % n];
            vec real = re[a] * im[a] + re[b] * im[b];  // of Z_k^2 - conj(Z_-k)^2 over 4i
            vec imaginary = re[b] * re[b] - im[b] * im[b] - re[a] * re[a] + im[a] * im[a];
            made[k] = real * (weight[k] * 0.5f);
            if (k && k < n - k) made[half + k] = imaginary * (weight[k] * 0.25f);
        }
        for (int64_t c = 0; c < n; c += W) {
            vec block[W];
            for (int64_t i = 0; i < W; i++) block[i] = c + i < n ? made[c + i] : vec{};
            transpose(block);
            for (int64_t r = 0; r < some; r++)
                store_first(out + (first + r) * n + c, block[r], n - c);
        }
    }
}

namespace {

struct Sums {  // of rows [batch, heads, rows], contiguous; rows past `rows` of the output are left
    const float *numerator, *mass, *shift;
    const int32_t* head;
    int64_t batch, heads, rows, value_dim;
};

bool is_finite(float x) { return x - x == 0; }

template <class T>
void merge(const Sums& part, T* output, const int64_t* stride, float* log_mass, int64_t queries,
           int64_t all_heads) {
    int64_t n = part.value_dim;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t b = 0; b < part.batch; b++)
        for (int64_t h = 0; h < part.heads; h++)
            for (int64_t r = 0; r < queries; r++) {
                int64_t at = (b * part.heads + h) * part.rows + r;
                float mass = part.mass[at], shift = part.shift[at], sum = 0;
                const float* far = part.numerator + at * n;
                for (int64_t i = 0; i < n; i++) sum += far[i] - far[i];
                if (!(mass > 0) || !is_finite(mass) || !is_finite(shift) || sum != 0) continue;
                float& near_mass = log_mass[(b * all_heads + part.head[h]) * queries + r];
                float far_mass = std::log(mass) + shift, top = std::max(near_mass, far_mass);
                float total = top + std::log(std::exp(near_mass - top) + std::exp(far_mass - top));
                float near = std::exp(near_mass - total), scale = std::exp(shift - total);
                T* out = output + b * stride[0] + part.head[h] * stride[1] + r * stride[2];
                for (int64_t i = 0; i < n; i += W) {
                    vec x = load_first(out + i, n - i) * near + load_first(far + i, n - i) * scale;
                    store_first(out + i, x, n - i);
                }
                near_mass = total;
            }
}

}  // namespace

// `Part.merge` into output [batch, all heads, queries, value_dim], whose last stride is 1, and
// log_mass [batch, all heads, queries], contiguous. Types as in `cpu.DTYPES`.
extern "C" void attnplan_merge(const Sums* part, int type, void* output, const int64_t* stride,
                               float* log_mass, int64_t queries, int64_t all_heads) {
    if (type == 0) merge(*part, (float*)output, stride, log_mass, queries, all_heads);
    if (type == 1) merge(*part, (BFloat16*)output, stride, log_mass, queries, all_heads);
    if (type == 2) merge(*part, (Float16*)output, stride, log_mass, queries, all_heads);
}
