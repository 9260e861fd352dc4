// The CPU side of kernels/product.py's by_rows(): tiles of 8 x 8 in registers.

#include <cstdint>

#include "processors.h"

#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int64_t kTile = 8;
constexpr int64_t kBlock = 128;  // rows that are read side by side: what they fill of a result's row is whole cache lines

typedef float Row __attribute__((vector_size(4 * kTile), aligned(4)));
typedef int32_t Order __attribute__((vector_size(4 * kTile)));

// Swaps the off-diagonal blocks of ever smaller blocks.
INLINE void tile(const float* from, int64_t from_row, float* to, int64_t to_row) {
    Row rows[kTile];
    for (int i = 0; i < kTile; ++i) rows[i] = *reinterpret_cast<const Row*>(from + i * from_row);
#pragma GCC unroll 3
    for (int half = kTile / 2; half; half /= 2) {
        Order upper, lower;
        for (int k = 0; k < kTile; ++k) {
            upper[k] = k & half ? int(kTile) + k - half : k;
            lower[k] = k & half ? int(kTile) + k : k + half;
        }
#pragma GCC unroll 8
        for (int i = 0; i < kTile; ++i) {
            if (i & half) continue;
            const Row one = rows[i], other = rows[i + half];
            rows[i] = __builtin_shuffle(one, other, upper);
            rows[i + half] = __builtin_shuffle(one, other, lower);
        }
    }
    for (int i = 0; i < kTile; ++i) *reinterpret_cast<Row*>(to + i * to_row) = rows[i];
}

// Columns [low, high) of `from` [rows, columns], which are rows of `to` [columns, rows].
INLINE void strip(const float* from, float* to, int64_t rows, int64_t columns, int64_t low, int64_t high) {
    const int64_t whole_rows = rows / kTile * kTile, whole = low + (high - low) / kTile * kTile;
    for (int64_t first = 0; first < whole_rows; first += kBlock) {
        const int64_t last = first + kBlock < whole_rows ? first + kBlock : whole_rows;
        for (int64_t j = low; j < whole; j += kTile) {
            for (int64_t i = first; i < last; i += kTile) tile(from + i * columns + j, columns, to + j * rows + i, rows);
        }
    }
    for (int64_t j = low; j < high; ++j) {
        for (int64_t i = j < whole ? whole_rows : 0; i < rows; ++i) to[j * rows + i] = from[i * columns + j];
    }
}

}  // namespace

// to [columns, rows] = from [rows, columns], transposed; threads share columns.
extern "C" FOR_EVERY_PROCESSOR void trireme_transpose_part(const float* from, float* to, int64_t rows, int64_t columns,
                                                           int64_t low, int64_t high) {
    strip(from, to, rows, columns, low, high);
}

extern "C" void trireme_transpose(const float* from, float* to, int64_t rows, int64_t columns, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < threads; ++k) {
        const int64_t lines = (columns + 15) / 16, low = lines * k / threads * 16, high = lines * (k + 1) / threads * 16;
        trireme_transpose_part(from, to, rows, columns, low, high < columns ? high : columns);
    }
}
