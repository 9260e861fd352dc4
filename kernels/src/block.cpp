// The CPU side of kernels/block.py: each in one pass over memory.

#include <cstdint>

#define SHARED static inline
#include "processors.h"
#include "block.h"

// Returns 1 if any total or any change is not finite.
extern "C" FOR_EVERY_PROCESSOR int32_t trireme_block(const float* __restrict__ total, float* __restrict__ weights,
                                                     float* __restrict__ change, float* __restrict__ start,
                                                     int64_t count, const BlockConstants* constants) {
    const BlockConstants c = *constants;
    int32_t bad = 0;
    for (int64_t i = 0; i < count; ++i) {
        float weight = weights[i], moved = change[i];
        start[i] = block_step(c, total[i], weight, moved);
        bad |= !is_finite(total[i]) | !is_finite(moved);
        weights[i] = weight;
        change[i] = moved;
    }
    return bad;
}

extern "C" FOR_EVERY_PROCESSOR void trireme_departure(const float* __restrict__ weights, const float* __restrict__ start,
                                                      float* __restrict__ out, int64_t count, float weight) {
    for (int64_t i = 0; i < count; ++i) out[i] = (weights[i] - start[i]) * weight;
}
