// The CPU side of kernels/sru.py: forward and backward, each in one pass over time.
//
// Rows (step, sequence) are visited in the order in which they lie in memory; a row's units are what is vectorised. A
// sequence's state is its row of c one step before, still in the cache. Threads share sequences or units, never a sum,
// so that their number changes nothing.

#include <math.h>

#include <cstdint>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

#define SHARED static inline __attribute__((always_inline))
#include "bfloat16.h"
#include "sru.h"

namespace {

// What kernels/sru.py packs; the order of members is part of the contract. Rows of u are u_row apart, those of the
// highway highway_row; of all other arrays d. Null: v and mask where there are none, lengths where all are full.
template <class Real, class Stored>
struct Sru {
    const Stored *u, *highway;
    const Real *bias, *v, *mask, *c0;
    const int64_t* lengths;  // [B]
    Stored* h;
    Real* c;
    const Stored* grad_h;
    Real* grad_c;  // [B, d]: of the last state when it comes, of the first when it leaves
    Stored *grad_u, *grad_highway;
    Real *grad_bias, *grad_v;  // [B, 2 d]: a row a sequence
    int64_t steps, batch, d, u_row, highway_row, threads;
    double scale;
    int32_t activation, reverse;
};

// What one thread does: sequences [low, high), units [from, to).
struct Part {
    int64_t low, high, from, to;
};

template <bool kPeephole, bool kMasked, class Real, class Stored>
SHARED SruStep<Real> read(const Stored* __restrict__ u, const Stored* __restrict__ highway,
                          const Real* __restrict__ bias, const Real* __restrict__ v, const Real* __restrict__ mask,
                          const Real* __restrict__ before, Real scale, int64_t d, int64_t j) {
    return {widened(u[j]), widened(u[d + j]), widened(u[2 * d + j]), widened(highway[j]), bias[j], bias[d + j],
            kPeephole ? v[j] : Real(0), kPeephole ? v[d + j] : Real(0), kMasked ? mask[j] : Real(1), scale, before[j]};
}

// The units of one row.
template <int kActivation, bool kPeephole, bool kMasked, class Real, class Stored>
SHARED void forward_row(const Stored* __restrict__ u, const Stored* __restrict__ highway,
                        const Real* __restrict__ bias, const Real* __restrict__ v, const Real* __restrict__ mask,
                        const Real* __restrict__ before, Stored* __restrict__ h, Real* __restrict__ c, Real scale,
                        int64_t d, int64_t from, int64_t to) {
#pragma GCC ivdep  // no unit depends on another
    for (int64_t j = from; j < to; ++j) {
        const auto s = read<kPeephole, kMasked>(u, highway, bias, v, mask, before, scale, d, j);
        Real state;
        narrow(sru_forward<kActivation, kPeephole>(s, state), h[j]);
        c[j] = state;
    }
}

template <int kActivation, bool kPeephole, bool kMasked, class Real, class Stored>
SHARED void backward_row(const Stored* __restrict__ u, const Stored* __restrict__ highway,
                         const Real* __restrict__ bias, const Real* __restrict__ v, const Real* __restrict__ mask,
                         const Real* __restrict__ before, const Real* __restrict__ c,
                         const Stored* __restrict__ grad_h, Real* __restrict__ carried, Stored* __restrict__ grad_u,
                         Stored* __restrict__ grad_highway, Real* __restrict__ grad_bias, Real* __restrict__ grad_v,
                         Real scale, int64_t d, int64_t from, int64_t to) {
#pragma GCC ivdep  // no unit depends on another
    for (int64_t j = from; j < to; ++j) {
        const auto s = read<kPeephole, kMasked>(u, highway, bias, v, mask, before, scale, d, j);
        Real carry = carried[j];
        const auto out = sru_backward<kActivation, kPeephole>(s, c[j], Real(widened(grad_h[j])), carry);
        carried[j] = carry;
        narrow(out.candidate, grad_u[j]);
        narrow(out.forget, grad_u[d + j]);
        narrow(out.reset, grad_u[2 * d + j]);
        narrow(out.highway, grad_highway[j]);
        grad_bias[j] += out.forget;
        grad_bias[d + j] += out.reset;
        if (kPeephole) grad_v[j] = fused(out.forget, s.before, grad_v[j]);
        if (kPeephole) grad_v[d + j] = fused(out.reset, s.before, grad_v[d + j]);
    }
}

template <int kActivation, bool kPeephole, bool kMasked, class Real, class Stored>
SHARED void forward(const Sru<Real, Stored>& a, const Part& part) {
    const int64_t d = a.d, from = part.from, to = part.to;
    for (int64_t at = 0; at < a.steps; ++at) {
        const int64_t t = a.reverse ? a.steps - 1 - at : at, earlier = a.reverse ? t + 1 : t - 1;
        for (int64_t b = part.low; b < part.high; ++b) {
            const int64_t row = t * a.batch + b;
            const Real* before = at ? a.c + (earlier * a.batch + b) * d : a.c0 + b * d;
            if (!a.lengths || t < a.lengths[b]) {
                forward_row<kActivation, kPeephole, kMasked>(
                    a.u + row * a.u_row, a.highway + row * a.highway_row, a.bias, a.v, a.mask + row * d * kMasked,
                    before, a.h + row * d, a.c + row * d, Real(a.scale), d, from, to);
            } else {
                std::memset(a.h + row * d + from, 0, (to - from) * sizeof(Stored));
                std::memcpy(a.c + row * d + from, before + from, (to - from) * sizeof(Real));
            }
        }
    }
}

template <int kActivation, bool kPeephole, bool kMasked, class Real, class Stored>
SHARED void backward(const Sru<Real, Stored>& a, const Part& part) {
    const int64_t d = a.d, from = part.from, to = part.to;
    for (int64_t at = a.steps - 1; at >= 0; --at) {
        const int64_t t = a.reverse ? a.steps - 1 - at : at, earlier = a.reverse ? t + 1 : t - 1;
        for (int64_t b = part.low; b < part.high; ++b) {
            const int64_t row = t * a.batch + b;
            Stored* grad_u = a.grad_u + row * a.u_row;
            Stored* grad_highway = a.grad_highway + row * a.highway_row;
            if (!a.lengths || t < a.lengths[b]) {
                const Real* before = at ? a.c + (earlier * a.batch + b) * d : a.c0 + b * d;
                backward_row<kActivation, kPeephole, kMasked>(
                    a.u + row * a.u_row, a.highway + row * a.highway_row, a.bias, a.v, a.mask + row * d * kMasked,
                    before, a.c + row * d, a.grad_h + row * d, a.grad_c + b * d, grad_u, grad_highway,
                    a.grad_bias + 2 * b * d, a.grad_v + 2 * b * d * kPeephole, Real(a.scale), d, from, to);
            } else {
                for (int k = 0; k < 3; ++k) std::memset(grad_u + k * d + from, 0, (to - from) * sizeof(Stored));
                std::memset(grad_highway + from, 0, (to - from) * sizeof(Stored));
            }
        }
    }
}

// Thread k of n: whole sequences where they come out even, else units, by the cache line.
Part part_of(int64_t batch, int64_t d, int64_t k, int64_t n) {
    if (batch % n == 0 || batch >= 8 * n) return {batch * k / n, batch * (k + 1) / n, 0, d};
    const int64_t lines = (d + 31) / 32, from = lines * k / n * 32, to = lines * (k + 1) / n * 32;
    return {0, batch, from < d ? from : d, to < d ? to : d};
}

template <class Args>
void shared_out(const Args& a, void (*act)(const Args&, const Part&)) {
#ifdef _OPENMP
    if (a.threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(a.threads))
        act(a, part_of(a.batch, a.d, omp_get_thread_num(), omp_get_num_threads()));
        return;
    }
#endif
    act(a, {0, a.batch, 0, a.d});
}

// For the newest processors, for those with fused multiply-adds, for all.
#if defined(__x86_64__)
#define NEWEST __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define FUSING __attribute__((target("avx2,fma")))
#define CHOSEN(name)                                                                                              \
    (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") \
         ? name##_newest                                                                                          \
         : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? name##_fusing : name##_any)
#else
#define NEWEST
#define FUSING
#define CHOSEN(name) name##_any
#endif

}  // namespace

#define CASE(pass, A)                                                                                           \
    if (a.activation == A) {                                                                                    \
        if (a.v) return a.mask ? pass<A, true, true>(a, part) : pass<A, true, false>(a, part);                  \
        return a.mask ? pass<A, false, true>(a, part) : pass<A, false, false>(a, part);                         \
    }
#define VERSION(name, pass, Real, Stored)                                       \
    [[maybe_unused]] static void name(const Sru<Real, Stored>& a, const Part& part) { \
        CASE(pass, 0) CASE(pass, 1) CASE(pass, 2)                               \
    }
#define SIDE(name, pass, Real, Stored)                                                   \
    NEWEST VERSION(name##_newest, pass, Real, Stored)                                    \
    FUSING VERSION(name##_fusing, pass, Real, Stored)                                    \
    VERSION(name##_any, pass, Real, Stored)                                              \
    extern "C" void trireme_sru_##name(const Sru<Real, Stored>* a) { shared_out(*a, CHOSEN(name)); }

SIDE(forward, forward, float, float)
SIDE(backward, backward, float, float)
SIDE(forward_bfloat16, forward, float, Bfloat16)
SIDE(backward_bfloat16, backward, float, Bfloat16)

// For checking gradients.
VERSION(forward_double_any, forward, double, double)
VERSION(backward_double_any, backward, double, double)
extern "C" void trireme_sru_forward_double(const Sru<double, double>* a) { shared_out(*a, forward_double_any); }
extern "C" void trireme_sru_backward_double(const Sru<double, double>* a) { shared_out(*a, backward_double_any); }
