// The CUDA side of kernels/sru.py: forward and backward, each in one pass over time, a thread a unit of a sequence.
//
// Threads are numbered b * d + j, so that neighbours read neighbouring floats at every step; any grid of one dimension
// that has a thread for every unit will do.

#define SHARED static __device__ __forceinline__
#include "bfloat16.h"
#include "sru.h"

// As in sru.cpp, with real numbers as float; kernels/sru.py packs it.
template <class Stored>
struct Sru {
    const Stored *u, *highway;
    const float *bias, *v, *mask, *c0;
    const long long* lengths;
    Stored* h;
    float* c;
    const Stored* grad_h;
    float* grad_c;
    Stored *grad_u, *grad_highway;
    float *grad_bias, *grad_v;
    long long steps, batch, d, u_row, highway_row, threads;
    double scale;
    int activation, reverse;
};

template <bool kPeephole, bool kMasked, class Stored>
static __device__ __forceinline__ SruStep<float> read(const Sru<Stored>& a, long long row, long long j, float before) {
    const Stored* u = a.u + row * a.u_row;
    return {widened(u[j]),
            widened(u[a.d + j]),
            widened(u[2 * a.d + j]),
            widened(a.highway[row * a.highway_row + j]),
            a.bias[j],
            a.bias[a.d + j],
            kPeephole ? a.v[j] : 0.0f,
            kPeephole ? a.v[a.d + j] : 0.0f,
            kMasked ? a.mask[row * a.d + j] : 1.0f,
            (float)a.scale,
            before};
}

template <int kActivation, bool kPeephole, bool kMasked, class Stored>
static __device__ __forceinline__ void forward(const Sru<Stored>& a, long long b, long long j) {
    float state = a.c0[b * a.d + j];
    for (long long at = 0; at < a.steps; ++at) {
        const long long t = a.reverse ? a.steps - 1 - at : at, row = t * a.batch + b;
        float h = 0.0f;
        if (!a.lengths || t < a.lengths[b]) {
            const SruStep<float> s = read<kPeephole, kMasked>(a, row, j, state);
            h = sru_forward<kActivation, kPeephole>(s, state);
        }
        narrow(h, a.h[row * a.d + j]);
        a.c[row * a.d + j] = state;
    }
}

template <int kActivation, bool kPeephole, bool kMasked, class Stored>
static __device__ __forceinline__ void backward(const Sru<Stored>& a, long long b, long long j) {
    float carried = a.grad_c[b * a.d + j], bias_f = 0.0f, bias_r = 0.0f, v_f = 0.0f, v_r = 0.0f;
    for (long long at = a.steps - 1; at >= 0; --at) {
        const long long t = a.reverse ? a.steps - 1 - at : at, row = t * a.batch + b;
        SruGradient<float> out = {0.0f, 0.0f, 0.0f, 0.0f};
        if (!a.lengths || t < a.lengths[b]) {
            const long long earlier = (a.reverse ? t + 1 : t - 1) * a.batch + b;
            const float before = at ? a.c[earlier * a.d + j] : a.c0[b * a.d + j];
            const SruStep<float> s = read<kPeephole, kMasked>(a, row, j, before);
            const float grad_h = widened(a.grad_h[row * a.d + j]);
            out = sru_backward<kActivation, kPeephole>(s, a.c[row * a.d + j], grad_h, carried);
            bias_f += out.forget;
            bias_r += out.reset;
            if (kPeephole) {
                v_f = fused(out.forget, before, v_f);
                v_r = fused(out.reset, before, v_r);
            }
        }
        Stored* grad_u = a.grad_u + row * a.u_row;
        narrow(out.candidate, grad_u[j]);
        narrow(out.forget, grad_u[a.d + j]);
        narrow(out.reset, grad_u[2 * a.d + j]);
        narrow(out.highway, a.grad_highway[row * a.highway_row + j]);
    }
    a.grad_c[b * a.d + j] = carried;
    a.grad_bias[2 * b * a.d + j] = bias_f;
    a.grad_bias[(2 * b + 1) * a.d + j] = bias_r;
    if (kPeephole) {
        a.grad_v[2 * b * a.d + j] = v_f;
        a.grad_v[(2 * b + 1) * a.d + j] = v_r;
    }
}

#define CASE(pass, A)                                                                                          \
    if (a.activation == A) {                                                                                   \
        if (a.v) return a.mask ? pass<A, true, true>(a, b, j) : pass<A, true, false>(a, b, j);                 \
        return a.mask ? pass<A, false, true>(a, b, j) : pass<A, false, false>(a, b, j);                        \
    }
#define UNIT(pass)                                                                \
    const long long unit = (long long)blockIdx.x * blockDim.x + threadIdx.x;      \
    if (unit >= a.batch * a.d) return;                                            \
    const long long b = unit / a.d, j = unit % a.d;                               \
    CASE(pass, 0) CASE(pass, 1) CASE(pass, 2)

extern "C" __global__ void trireme_sru_forward(Sru<float> a) { UNIT(forward) }
extern "C" __global__ void trireme_sru_backward(Sru<float> a) { UNIT(backward) }
extern "C" __global__ void trireme_sru_forward_bfloat16(Sru<Bfloat16> a) { UNIT(forward) }
extern "C" __global__ void trireme_sru_backward_bfloat16(Sru<Bfloat16> a) { UNIT(backward) }
