// The CPU side of kernels/sru.py: forward and backward, each in one pass over time.
//
// Rows (step, sequence) are visited in the order in which they lie in memory; a row's units are what is vectorised. A
// sequence's state is its row of c one step before, still in the cache.

#include <cmath>
#include <cstdint>
#include <cstring>

#define SHARED static inline __attribute__((always_inline))
#include "processors.h"
#include "sru.h"

namespace {

// What kernels/sru.py packs; the order of members is part of the contract. Rows of u are u_row apart, those of the
// highway highway_row; of all other arrays d. Null: v and mask where there are none.
template <class Real>
struct Sru {
    const Real *u, *highway, *bias, *v, *mask, *c0;
    const int64_t* lengths;  // [B]
    Real *h, *c;
    const Real *grad_h;
    Real *grad_c;  // [B, d]: of the last state when it comes, of the first when it leaves
    Real *grad_u, *grad_highway, *grad_bias, *grad_v;  // the last two [B, 2 d]: a row a sequence
    int64_t steps, batch, d, u_row, highway_row, low, high;  // sequences [low, high) are done
    double scale;
    int32_t activation, reverse;
};

// The units of one row.
template <int kActivation, bool kPeephole, bool kMasked, class Real>
SHARED void forward_row(const Real* __restrict__ u, const Real* __restrict__ highway, const Real* __restrict__ bias,
                        const Real* __restrict__ v, const Real* __restrict__ mask, const Real* __restrict__ before,
                        Real* __restrict__ h, Real* __restrict__ c, Real scale, int64_t d) {
    for (int64_t j = 0; j < d; ++j) {
        const SruStep<Real> s = {
            u[j], u[d + j], u[2 * d + j], highway[j], bias[j], bias[d + j], kPeephole ? v[j] : Real(0),
            kPeephole ? v[d + j] : Real(0), kMasked ? mask[j] : Real(1), scale, before[j]};
        Real state;
        h[j] = sru_forward<kActivation, kPeephole>(s, state);
        c[j] = state;
    }
}

template <int kActivation, bool kPeephole, bool kMasked, class Real>
SHARED void backward_row(const Real* __restrict__ u, const Real* __restrict__ highway, const Real* __restrict__ bias,
                         const Real* __restrict__ v, const Real* __restrict__ mask, const Real* __restrict__ before,
                         const Real* __restrict__ c, const Real* __restrict__ grad_h, Real* __restrict__ carried,
                         Real* __restrict__ grad_u, Real* __restrict__ grad_highway, Real* __restrict__ grad_bias,
                         Real* __restrict__ grad_v, Real scale, int64_t d) {
    for (int64_t j = 0; j < d; ++j) {
        const SruStep<Real> s = {
            u[j], u[d + j], u[2 * d + j], highway[j], bias[j], bias[d + j], kPeephole ? v[j] : Real(0),
            kPeephole ? v[d + j] : Real(0), kMasked ? mask[j] : Real(1), scale, before[j]};
        Real carry = carried[j];
        const SruGradient<Real> out = sru_backward<kActivation, kPeephole>(s, c[j], grad_h[j], carry);
        carried[j] = carry;
        grad_u[j] = out.candidate;
        grad_u[d + j] = out.forget;
        grad_u[2 * d + j] = out.reset;
        grad_highway[j] = out.highway;
        grad_bias[j] += out.forget;
        grad_bias[d + j] += out.reset;
        if (kPeephole) grad_v[j] += out.forget * s.before;
        if (kPeephole) grad_v[d + j] += out.reset * s.before;
    }
}

template <int kActivation, bool kPeephole, bool kMasked, class Real>
SHARED void forward(const Sru<Real>& a) {
    const int64_t d = a.d;
    for (int64_t at = 0; at < a.steps; ++at) {
        const int64_t t = a.reverse ? a.steps - 1 - at : at, earlier = a.reverse ? t + 1 : t - 1;
        for (int64_t b = a.low; b < a.high; ++b) {
            const int64_t row = t * a.batch + b;
            const Real* before = at ? a.c + (earlier * a.batch + b) * d : a.c0 + b * d;
            if (t < a.lengths[b]) {
                forward_row<kActivation, kPeephole, kMasked>(
                    a.u + row * a.u_row, a.highway + row * a.highway_row, a.bias, a.v, a.mask + row * d * kMasked,
                    before, a.h + row * d, a.c + row * d, Real(a.scale), d);
            } else {
                std::memset(a.h + row * d, 0, d * sizeof(Real));
                std::memcpy(a.c + row * d, before, d * sizeof(Real));
            }
        }
    }
}

template <int kActivation, bool kPeephole, bool kMasked, class Real>
SHARED void backward(const Sru<Real>& a) {
    const int64_t d = a.d;
    for (int64_t at = a.steps - 1; at >= 0; --at) {
        const int64_t t = a.reverse ? a.steps - 1 - at : at, earlier = a.reverse ? t + 1 : t - 1;
        for (int64_t b = a.low; b < a.high; ++b) {
            const int64_t row = t * a.batch + b;
            Real* grad_u = a.grad_u + row * a.u_row;
            Real* grad_highway = a.grad_highway + row * a.highway_row;
            if (t < a.lengths[b]) {
                const Real* before = at ? a.c + (earlier * a.batch + b) * d : a.c0 + b * d;
                backward_row<kActivation, kPeephole, kMasked>(
                    a.u + row * a.u_row, a.highway + row * a.highway_row, a.bias, a.v, a.mask + row * d * kMasked,
                    before, a.c + row * d, a.grad_h + row * d, a.grad_c + b * d, grad_u, grad_highway,
                    a.grad_bias + 2 * b * d, a.grad_v + 2 * b * d * kPeephole, Real(a.scale), d);
            } else {
                std::memset(grad_u, 0, 3 * d * sizeof(Real));
                std::memset(grad_highway, 0, d * sizeof(Real));
            }
        }
    }
}

}  // namespace

#define CASE(pass, A)                                                                           \
    if (a->activation == A) {                                                                   \
        if (a->v) return a->mask ? pass<A, true, true>(*a) : pass<A, true, false>(*a);          \
        return a->mask ? pass<A, false, true>(*a) : pass<A, false, false>(*a);                  \
    }
#define SIDE(name, pass, Real)                                                \
    extern "C" FOR_EVERY_PROCESSOR void trireme_sru_##name(const Sru<Real>* a) { \
        CASE(pass, 0) CASE(pass, 1) CASE(pass, 2)                             \
    }

SIDE(forward, forward, float)
SIDE(backward, backward, float)
SIDE(forward_double, forward, double)
SIDE(backward_double, backward, double)
