// The CUDA side of kernels/sru.py: forward and backward, each in one pass over time, a thread a unit of a sequence.
//
// Threads are numbered b * d + j, so that neighbours read neighbouring floats at every step; any grid of one dimension
// that has a thread for every unit will do.

#define SHARED static __device__ __forceinline__
#include "sru.h"

// As in sru.cpp; kernels/sru.py packs it.
struct Sru {
    const float *u, *highway, *bias, *v, *mask, *c0;
    const long long* lengths;
    float *h, *c;
    const float* grad_h;
    float *grad_c, *grad_u, *grad_highway, *grad_bias, *grad_v;
    long long steps, batch, d, u_row, highway_row, low, high;
    double scale;
    int activation, reverse;
};

template <bool kPeephole, bool kMasked>
static __device__ __forceinline__ SruStep<float> read(const Sru& a, long long row, long long j, float before) {
    const float* u = a.u + row * a.u_row;
    return {u[j],
            u[a.d + j],
            u[2 * a.d + j],
            a.highway[row * a.highway_row + j],
            a.bias[j],
            a.bias[a.d + j],
            kPeephole ? a.v[j] : 0.0f,
            kPeephole ? a.v[a.d + j] : 0.0f,
            kMasked ? a.mask[row * a.d + j] : 1.0f,
            (float)a.scale,
            before};
}

template <int kActivation, bool kPeephole, bool kMasked>
static __device__ __forceinline__ void forward(const Sru& a, long long b, long long j) {
    float state = a.c0[b * a.d + j];
    for (long long at = 0; at < a.steps; ++at) {
        const long long t = a.reverse ? a.steps - 1 - at : at, row = t * a.batch + b;
        float h = 0.0f;
        if (t < a.lengths[b]) {
            const SruStep<float> s = read<kPeephole, kMasked>(a, row, j, state);
            h = sru_forward<kActivation, kPeephole>(s, state);
        }
        a.h[row * a.d + j] = h;
        a.c[row * a.d + j] = state;
    }
}

template <int kActivation, bool kPeephole, bool kMasked>
static __device__ __forceinline__ void backward(const Sru& a, long long b, long long j) {
    float carried = a.grad_c[b * a.d + j], bias_f = 0.0f, bias_r = 0.0f, v_f = 0.0f, v_r = 0.0f;
    for (long long at = a.steps - 1; at >= 0; --at) {
        const long long t = a.reverse ? a.steps - 1 - at : at, row = t * a.batch + b;
        SruGradient<float> out = {0.0f, 0.0f, 0.0f, 0.0f};
        if (t < a.lengths[b]) {
            const long long earlier = (a.reverse ? t + 1 : t - 1) * a.batch + b;
            const float before = at ? a.c[earlier * a.d + j] : a.c0[b * a.d + j];
            const SruStep<float> s = read<kPeephole, kMasked>(a, row, j, before);
            out = sru_backward<kActivation, kPeephole>(s, a.c[row * a.d + j], a.grad_h[row * a.d + j], carried);
            bias_f += out.forget;
            bias_r += out.reset;
            if (kPeephole) {
                v_f += out.forget * before;
                v_r += out.reset * before;
            }
        }
        float* grad_u = a.grad_u + row * a.u_row;
        grad_u[j] = out.candidate;
        grad_u[a.d + j] = out.forget;
        grad_u[2 * a.d + j] = out.reset;
        a.grad_highway[row * a.highway_row + j] = out.highway;
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
#define SIDE(pass)                                                                         \
    extern "C" __global__ void trireme_sru_##pass(Sru a) {                                 \
        const long long unit = (long long)blockIdx.x * blockDim.x + threadIdx.x;           \
        if (unit >= a.batch * a.d) return;                                                 \
        const long long b = unit / a.d, j = unit % a.d;                                    \
        CASE(pass, 0) CASE(pass, 1) CASE(pass, 2)                                          \
    }

SIDE(forward)
SIDE(backward)
