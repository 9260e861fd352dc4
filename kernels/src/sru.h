// One step of SRU for one unit, forward and backward: arithmetic that all sides share; kernels/sru.py says what.
//
// In float, exp and tanh are polynomials of single roundings (a fused multiply-add is one too), so all sides give the
// same bits (a GPU's denormal numbers apart: it takes them as 0); in double, which is there for checking gradients, they
// are the library's. SHARED is what a function of this file is declared as; fmaf, fma, exp and tanh are the library's or
// the compiler's own.

#pragma once

SHARED float fused(float a, float b, float c) { return fmaf(a, b, c); }
SHARED double fused(double a, double b, double c) { return fma(a, b, c); }

// e^-x where |x| is at most 43, else as if it were 43; relative error below 8e-7. 2^n comes of the low bits of a sum
// that is rounded to whole numbers; the rest, in [-1/2, 1/2], goes through a polynomial.
SHARED float decay(float x) {
    x = x < -43.0f ? -43.0f : x;
    x = x > 43.0f ? 43.0f : x;
    const float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23, and the exponent of 1
    union { float value; unsigned int bits; } whole, power;
    whole.value = fused(x, -1.44269504f, kRound);
    const float rest = fused(x, -1.44269504f, -(whole.value - kRound));
    float y = fused(rest, 1.326472701e-3f, 9.671512653e-3f);
    y = fused(rest, y, 5.550733744e-2f);
    y = fused(rest, y, 2.402224209e-1f);
    y = fused(rest, y, 6.931469776e-1f);
    y = fused(rest, y, 1.0f);
    power.bits = whole.bits << 23;
    return y * power.value;
}

SHARED double decay(double x) { return exp(-(x < -300.0 ? -300.0 : x > 300.0 ? 300.0 : x)); }

// A quotient of polynomials, the one that Eigen has: relative error below 3e-7.
SHARED float tangent(float x) {
    x = x < -7.90531111f ? -7.90531111f : x;
    x = x > 7.90531111f ? 7.90531111f : x;
    const float z = x * x;
    float p = fused(z, -2.76076847742355e-16f, 2.00018790482477e-13f);
    p = fused(z, p, -8.60467152213735e-11f);
    p = fused(z, p, 5.12229709037114e-08f);
    p = fused(z, p, 1.48572235717979e-05f);
    p = fused(z, p, 6.37261928875436e-04f);
    p = fused(z, p, 4.89352455891786e-03f);
    float q = fused(z, 1.19825839466702e-06f, 1.18534705686654e-04f);
    q = fused(z, q, 2.26843463243900e-03f);
    q = fused(z, q, 4.89352518554385e-03f);
    return x * p / q;
}

SHARED double tangent(double x) { return tanh(x); }

// The activation g: 0 is the identity, 1 tanh, 2 ReLU.
template <int kActivation, class Real>
SHARED Real activated(Real c) {
    return kActivation == 0 ? c : kActivation == 1 ? tangent(c) : (c > Real(0) ? c : Real(0));
}

// Its derivative, from its value.
template <int kActivation, class Real>
SHARED Real slope(Real value) {
    if (kActivation == 1) return Real(1) - value * value;
    return kActivation == 0 || value > Real(0) ? Real(1) : Real(0);
}

// What one unit reads at one step. `v` counts only with peepholes; `mask` is 1 where nothing is dropped.
template <class Real>
struct SruStep {
    Real candidate, forget, reset;  // W x, W_f x, W_r x
    Real highway;                   // x, or W_h x
    Real bias_f, bias_r, v_f, v_r, mask, scale, before;  // before: c_{t-1}
};

template <class Real>
struct SruGates {
    Real f, r;
};

template <bool kPeephole, class Real>
SHARED SruGates<Real> gates(const SruStep<Real>& s) {
    const Real f = kPeephole ? fused(s.v_f, s.before, s.forget) : s.forget;
    const Real r = kPeephole ? fused(s.v_r, s.before, s.reset) : s.reset;
    const Real sum_f = Real(1) + decay(f + s.bias_f), sum_r = Real(1) + decay(r + s.bias_r);
    const Real both = Real(1) / (sum_f * sum_r);  // one quotient for both: quotients are what takes longest
    return {both * sum_r, both * sum_f};
}

template <int kActivation, bool kPeephole, class Real>
SHARED Real sru_forward(const SruStep<Real>& s, Real& c) {
    const SruGates<Real> g = gates<kPeephole>(s);
    c = fused(g.f, s.before, (Real(1) - g.f) * s.candidate);
    return fused(g.r, activated<kActivation>(c) * s.mask, (Real(1) - g.r) * (s.highway * s.scale));
}

template <class Real>
struct SruGradient {
    Real candidate, forget, reset, highway;
};

// c is this step's; `carried` comes as the gradient of c from the steps after it, and leaves as that of c_{t-1}.
template <int kActivation, bool kPeephole, class Real>
SHARED SruGradient<Real> sru_backward(const SruStep<Real>& s, Real c, Real grad_h, Real& carried) {
    const SruGates<Real> g = gates<kPeephole>(s);
    const Real value = activated<kActivation>(c), through_r = grad_h * g.r, around_r = grad_h * (Real(1) - g.r);
    const Real grad_c = fused(through_r * s.mask, slope<kActivation>(value), carried);
    SruGradient<Real> out;
    out.highway = around_r * s.scale;
    out.reset = around_r * g.r * fused(value, s.mask, -(s.highway * s.scale));
    out.candidate = grad_c * (Real(1) - g.f);
    carried = grad_c * g.f;
    out.forget = carried * (Real(1) - g.f) * (s.before - s.candidate);
    if (kPeephole) carried = fused(out.forget, s.v_f, fused(out.reset, s.v_r, carried));
    return out;
}
