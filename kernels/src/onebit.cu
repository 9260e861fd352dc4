// The CUDA side of kernels/onebit.py: a warp a column, a thread a lane of its sums. Blocks are of whole warps, and the
// grid has a warp for every column at least.

#define SHARED static __device__ __forceinline__
#include "onebit.h"

static constexpr unsigned kWarp = 0xffffffffu;
static constexpr int kLanes = 32;
static constexpr int kWords = 8;  // that a warp has under way at a time: their signs are 32 bytes

static __device__ __forceinline__ long long warp() {
    return ((long long)blockIdx.x * blockDim.x + threadIdx.x) / kLanes;
}

// In halves, as in the reference; all threads get the same, for it does not matter which of two is added to the other.
static __device__ __forceinline__ float folded(float sum) {
    for (int by = kLanes / 2; by; by /= 2) sum += __shfl_xor_sync(kWarp, sum, by);
    return sum;
}

template <bool kKeeps>
static __device__ __forceinline__ void quantize(const float* __restrict__ values, float* __restrict__ residual,
                                                long long width, int* __restrict__ levels, int* __restrict__ words,
                                                int* bad) {
    const int lane = threadIdx.x % kLanes;
    float uppers = 0.0f, lowers = 0.0f;
    long long high = 0;
    for (long long first = 0; first < width; first += kWords * kLanes) {
        float v[kWords];
#pragma unroll
        for (int k = 0; k < kWords; ++k) {
            const long long i = first + k * kLanes + lane;
            v[k] = i < width ? values[i] : 0.0f;
            if (kKeeps && i < width) v[k] += residual[i];
        }
        unsigned own = 0;
#pragma unroll
        for (int k = 0; k < kWords; ++k) {
            const long long i = first + k * kLanes + lane;
            const bool is_high = v[k] >= 0.0f;  // NaN is not, so that the level below shows it
            const unsigned word = __ballot_sync(kWarp, i < width && is_high);
            uppers += is_high ? v[k] : 0.0f;  // 0 changes no sum: they begin at 0.0, and are never -0.0
            lowers += is_high ? 0.0f : v[k];
            high += __popc(word);
            if (lane == k) own = word;
            if (kKeeps && i < width) residual[i] = v[k];
        }
        if (lane < kWords && first + lane * kLanes < width) words[first / kLanes + lane] = (int)own;
    }
    const float above = mean(folded(uppers), high), below = mean(folded(lowers), width - high);
    if (lane == 0) {
        levels[0] = __float_as_int(below);
        levels[1] = __float_as_int(above);
        if (!both_finite(below, above)) *bad = 1;
    }
    if (!kKeeps) return;
    for (long long first = lane; first < width; first += kWords * kLanes) {  // what this thread wrote itself
        float v[kWords];
#pragma unroll
        for (int k = 0; k < kWords; ++k) v[k] = first + k * kLanes < width ? residual[first + k * kLanes] : 0.0f;
#pragma unroll
        for (int k = 0; k < kWords; ++k) {
            if (first + k * kLanes < width) residual[first + k * kLanes] = v[k] - (v[k] >= 0.0f ? above : below);
        }
    }
}

// residual: null if nothing is added or kept. bad: becomes 1 if a level is not finite.
extern "C" __global__ void trireme_onebit_quantize(const float* values, float* residual, int* packed,
                                                   const long long* table, long long count, int* bad) {
    if (warp() >= count) return;
    const Column c = column_of(table, count, warp());
    int *levels = packed + c.levels, *words = packed + c.words;
    if (residual) quantize<true>(values + c.start, residual + c.start, c.width, levels, words, bad);
    else quantize<false>(values + c.start, nullptr, c.width, levels, words, bad);
}

// packed: `rows` rows of int32, `row` of them apart. The grid's y: so many warps share the words of a column.
extern "C" __global__ void trireme_onebit_accumulate(float* __restrict__ out, const int* __restrict__ packed,
                                                     const long long* __restrict__ table, long long count,
                                                     long long rows, long long row, int fresh) {
    if (warp() >= count) return;
    const Column c = column_of(table, count, warp());
    const int lane = threadIdx.x % kLanes;
    const long long all = (c.width + kLanes - 1) / kLanes;
    float* column = out + c.start;
    for (long long first = (long long)blockIdx.y * kWords; first < all; first += (long long)gridDim.y * kWords) {
        float sums[kWords];
#pragma unroll
        for (int k = 0; k < kWords; ++k) {
            const long long i = (first + k) * kLanes + lane;
            sums[k] = !fresh && i < c.width ? column[i] : 0.0f;
        }
        for (long long at = 0; at < rows; ++at) {
            const int* split = packed + at * row;
            if (!split[0]) continue;
            const float below = __int_as_float(split[c.levels]), above = __int_as_float(split[c.levels + 1]);
            const int* words = split + c.words + first;
#pragma unroll
            for (int k = 0; k < kWords; ++k) {
                const unsigned word = first + k < all ? (unsigned)words[k] : 0u;
                sums[k] += word >> lane & 1u ? above : below;
            }
        }
#pragma unroll
        for (int k = 0; k < kWords; ++k) {
            const long long i = (first + k) * kLanes + lane;
            if (i < c.width) column[i] = sums[k];
        }
    }
}
