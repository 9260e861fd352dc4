// The CPU side of kernels/update.py: a rule in one pass over memory.

#include <cmath>
#include <cstdint>

#define SHARED static inline
#include "processors.h"
#include "update.h"

namespace {

// Which state arrays a rule has is known when it is compiled, so that no pass loads what is not there.
template <class Rule, int kSlots>
inline __attribute__((always_inline)) int32_t pass(
    float* __restrict__ weights, const float* __restrict__ grad, float* __restrict__ one, float* __restrict__ two,
    int64_t count, const Constants& constants) {
    const Constants c = constants;
    int32_t bad = 0;
    for (int64_t i = 0; i < count; ++i) {
        float first = kSlots > 0 ? one[i] : 0.0f, second = kSlots > 1 ? two[i] : 0.0f;
        const float weight = weights[i];
        bad |= !is_finite(grad[i]);
        weights[i] = Rule::step(c, gradient(c, grad[i], weight), weight * c.keep, first, second);
        if (kSlots > 0) bad |= !is_finite(first), one[i] = first;
        if (kSlots > 1) bad |= !is_finite(second), two[i] = second;
    }
    return bad;
}

}  // namespace

// Returns 1 if any gradient is not finite, or any state after it.
#define RULE(name, Rule, slots)                                                                             \
    extern "C" FOR_EVERY_PROCESSOR int32_t trireme_##name(float* weights, const float* grad, float* one,   \
                                                          float* two, int64_t count, const Constants* c) { \
        return pass<Rule, slots>(weights, grad, one, two, count, *c);                                       \
    }

FOR_EVERY_RULE(RULE)
