// One tile list from several: the compiled half of tile_list._join.

#include <algorithm>
#include <cstdint>
#include <vector>

struct Part {
    const int32_t* offsets;  // [rows + 1]
    const int32_t* tiles;    // [tiles, 3]: kind, index, mask
    const int64_t* target;   // [rows], where each row goes
    int64_t rows, gather_shift, mask_shift;
};

constexpr int32_t GATHER = 1, TAKEN = 3, FULL = -1;

// Fills offsets [rows + 1] and tiles [all tiles, 3]; a row gets its tiles in the order of the parts.
extern "C" void attnplan_join(const Part* parts, int64_t count, int64_t rows, int32_t* offsets,
                              int32_t* tiles) {
    std::fill(offsets, offsets + rows + 1, 0);
    for (const Part* p = parts; p < parts + count; p++)
        for (int64_t r = 0; r < p->rows; r++)
            offsets[p->target[r] + 1] += p->offsets[r + 1] - p->offsets[r];
    for (int64_t r = 0; r < rows; r++) offsets[r + 1] += offsets[r];
    std::vector<int32_t> next(offsets, offsets + rows);
    for (const Part* p = parts; p < parts + count; p++) {
        int32_t gather_shift = (int32_t)p->gather_shift, mask_shift = (int32_t)p->mask_shift;
        for (int64_t r = 0; r < p->rows; r++) {
            int32_t* out = tiles + 3 * (int64_t)next[p->target[r]];
            for (int32_t t = p->offsets[r]; t < p->offsets[r + 1]; t++, out += 3) {
                const int32_t* tile = p->tiles + 3 * (int64_t)t;
                out[0] = tile[0];
                bool gathers = tile[0] == GATHER || tile[0] == TAKEN;
                out[1] = gathers ? tile[1] + gather_shift : tile[1];
                out[2] = tile[2] == FULL ? FULL : tile[2] + mask_shift;
            }
            next[p->target[r]] += p->offsets[r + 1] - p->offsets[r];
        }
    }
}
