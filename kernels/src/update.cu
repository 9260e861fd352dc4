// The CUDA side of kernels/update.py: a rule in one pass over memory; any grid and block will do.

#define SHARED static __device__ __forceinline__
#include "update.h"

template <class Rule, int kSlots>
static __device__ __forceinline__ void pass(float* __restrict__ weights, const float* __restrict__ grad,
                                            float* __restrict__ one, float* __restrict__ two, long long count,
                                            Constants c, int* bad) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        float first = kSlots > 0 ? one[i] : 0.0f, second = kSlots > 1 ? two[i] : 0.0f;
        const float weight = weights[i], g = grad[i];
        weights[i] = Rule::step(c, gradient(c, g, weight), weight * c.keep, first, second);
        if (!is_finite(g) || (kSlots > 0 && !is_finite(first)) || (kSlots > 1 && !is_finite(second))) *bad = 1;
        if (kSlots > 0) one[i] = first;
        if (kSlots > 1) two[i] = second;
    }
}

#define RULE(name, Rule, slots)                                                                                  \
    extern "C" __global__ void trireme_##name(float* weights, const float* grad, float* one, float* two,        \
                                              long long count, Constants c, int* bad) {                         \
        pass<Rule, slots>(weights, grad, one, two, count, c, bad);                                               \
    }

FOR_EVERY_RULE(RULE)
