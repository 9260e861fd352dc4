// The CUDA side of kernels/block.py: each in one pass over memory; any grid and block will do.

#define SHARED static __device__ __forceinline__
#include "block.h"

extern "C" __global__ void trireme_block(const float* __restrict__ total, float* __restrict__ weights,
                                         float* __restrict__ change, float* __restrict__ start, long long count,
                                         BlockConstants c, int* bad) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        float weight = weights[i], moved = change[i];
        const float sum = total[i];
        start[i] = block_step(c, sum, weight, moved);
        if (!is_finite(sum) || !is_finite(moved)) *bad = 1;
        weights[i] = weight;
        change[i] = moved;
    }
}

extern "C" __global__ void trireme_departure(const float* __restrict__ weights, const float* __restrict__ start,
                                             float* __restrict__ out, long long count, float weight) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride)
        out[i] = (weights[i] - start[i]) * weight;
}
