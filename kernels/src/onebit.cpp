// The CPU side of kernels/onebit.py: column by column, so that what is read twice is still in the cache.
//
// The compiler does not find a processor's masks by itself, so the few operations that differ are written by hand for
// each kind of processor; onebit_passes.h is the rest, compiled for each. Threads share columns, or the words of a
// sum, but never a column's mean: their number changes no bit.

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SHARED static inline __attribute__((always_inline))
#include "onebit.h"

namespace {

constexpr int kLanes = 32;
constexpr int64_t kStrip = 2048;  // floats of a sum that stay in the first cache while splits are added
constexpr int kTogether = 4;      // splits that are added between loading a sum and storing it

uint32_t first_bits(int64_t count) { return (uint32_t(1) << count) - 1; }  // below 32

struct Quantize {
    const float* values;
    float* residual;  // null: nothing is added or kept
    const int64_t* table;
    int64_t count;
    int32_t* packed;
};

struct Accumulate {
    float* out;
    const int32_t* packed;
    int64_t rows, row;  // how many, and how far apart
    const int64_t* table;
    int64_t count, fresh;
};

// Where a column is cut for a thread to end and the next to begin at float `at` of the stretch: between words.
int64_t cut(const Column& c, int64_t at) {
    const int64_t inside = at > c.start ? (at - c.start + kLanes - 1) / kLanes * kLanes : 0;
    return std::min<int64_t>(inside, c.width);
}

#if defined(__x86_64__) && !defined(__clang__)
#define BY_HAND  // clang does not know these pragmas

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,popcnt")
namespace newest {

typedef __m512 Vector;
typedef __mmask16 Mask;
constexpr int kEach = 16;

SHARED Vector spread(float v) { return _mm512_set1_ps(v); }
SHARED Vector load(const float* from) { return _mm512_loadu_ps(from); }
SHARED Vector load(const float* from, Mask there) { return _mm512_maskz_loadu_ps(there, from); }
SHARED void store(float* to, Vector v) { _mm512_storeu_ps(to, v); }
SHARED Mask not_negative(Vector v) { return _mm512_cmp_ps_mask(v, spread(0.0f), _CMP_GE_OQ); }
SHARED Vector pick(Mask which, Vector yes, Vector no) { return _mm512_mask_blend_ps(which, no, yes); }
SHARED uint32_t bits_of(Mask mask) { return mask; }
SHARED Mask mask_of(uint32_t word, int k) { return Mask(word >> (k * kEach)); }

#include "onebit_passes.h"

}  // namespace newest
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,popcnt")
namespace wider {

typedef __m256 Vector;
typedef __m256 Mask;  // all bits of a float, or none
constexpr int kEach = 8;

SHARED __m256i whole(Mask mask) { return _mm256_castps_si256(mask); }
SHARED Vector spread(float v) { return _mm256_set1_ps(v); }
SHARED Vector load(const float* from) { return _mm256_loadu_ps(from); }
SHARED Vector load(const float* from, Mask there) { return _mm256_maskload_ps(from, whole(there)); }
SHARED void store(float* to, Vector v) { _mm256_storeu_ps(to, v); }
SHARED Mask not_negative(Vector v) { return _mm256_cmp_ps(v, spread(0.0f), _CMP_GE_OQ); }
SHARED Vector pick(Mask which, Vector yes, Vector no) { return _mm256_blendv_ps(no, yes, which); }
SHARED uint32_t bits_of(Mask mask) { return uint32_t(_mm256_movemask_ps(mask)); }
SHARED Mask mask_of(uint32_t word, int k) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(int32_t(word >> (k * kEach)));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, bit), bit));
}

#include "onebit_passes.h"

}  // namespace wider
#pragma GCC pop_options
#endif

namespace any {

typedef float Vector __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));
constexpr int kEach = 4;

SHARED Vector spread(float v) { return Vector{v, v, v, v}; }
SHARED Vector load(const float* from) {
    Vector v;
    std::memcpy(&v, from, sizeof(v));
    return v;
}
SHARED Vector load(const float* from, Mask there) {
    Vector v = {};
    for (int i = 0; i < kEach; ++i) v[i] = there[i] ? from[i] : 0.0f;
    return v;
}
SHARED void store(float* to, Vector v) { std::memcpy(to, &v, sizeof(v)); }
SHARED Mask not_negative(Vector v) { return v >= spread(0.0f); }
SHARED Vector pick(Mask which, Vector yes, Vector no) { return which ? yes : no; }
SHARED uint32_t bits_of(Mask mask) {
    const Mask found = mask & Mask{1, 2, 4, 8};
    return uint32_t(found[0] | found[1] | found[2] | found[3]);
}
SHARED Mask mask_of(uint32_t word, int k) {
    const int32_t all = int32_t(word >> (k * kEach));
    return (Mask{all, all, all, all} & Mask{1, 2, 4, 8}) != 0;
}

#include "onebit_passes.h"

}  // namespace any

#if defined(ONLY)  // one of them, for tests
#define CHOSEN(name) ONLY::name
#elif defined(BY_HAND)
#define CHOSEN(name)                                                                                               \
    (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") \
         ? newest::name                                                                                            \
         : __builtin_cpu_supports("avx2") ? wider::name : any::name)
#else
#define CHOSEN(name) any::name
#endif

// Where part k of n of the floats from the first column to the last begins.
int64_t edge(const int64_t* table, int64_t count, int64_t k, int64_t n) {
    if (!count) return 0;
    return table[0] + (table[count - 1] + table[2 * count - 1] - table[0]) * k / n;
}

}  // namespace

// Returns 1 if any level is not finite. A thread has the columns that begin in its part of the stretch.
extern "C" int32_t trireme_onebit_quantize(const float* values, float* residual, const int64_t* table, int64_t count,
                                           int32_t* packed, int64_t threads) {
    const Quantize a = {values, residual, table, count, packed};
    const auto act = CHOSEN(quantize);
    int32_t bad = 0;
    packed[0] = 1;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : bad) if (threads > 1)
    for (int64_t k = 0; k < threads; ++k) {
        const int64_t from = edge(table, count, k, threads), to = edge(table, count, k + 1, threads);
        const int64_t low = std::lower_bound(table, table + count, from) - table;
        const int64_t high = std::lower_bound(table, table + count, to) - table;
        bad |= !act(a, low, high);
    }
    return bad;
}

// packed: rows of int32, `row` of them apart. A thread has its part of the stretch.
extern "C" void trireme_onebit_accumulate(float* out, const int32_t* packed, int64_t rows, int64_t row,
                                          const int64_t* table, int64_t count, int32_t fresh, int64_t threads) {
    const Accumulate a = {out, packed, rows, row, table, count, fresh};
    const auto act = CHOSEN(accumulate);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t k = 0; k < threads; ++k) {
        const int64_t low = edge(table, count, k, threads), high = edge(table, count, k + 1, threads);
        int64_t i = std::upper_bound(table, table + count, low) - table - 1;  // the column that `low` is in
        for (i = std::max<int64_t>(i, 0); i < count && table[i] < high; ++i) {
            const Column c = column_of(table, count, i);
            act(a, c, cut(c, low), cut(c, high));
        }
    }
}
