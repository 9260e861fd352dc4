// One step of SRU for one unit, forward and backward: arithmetic that all sides share; kernels/sru.py says what.
//
// In float, exp and tanh are polynomials of single roundings, so both give the same bits; in double, which is there for
// checking gradients, they are the library's. SHARED is what a function of this file is declared as.

#pragma once

// Cephes' expf: relative error below 2e-7. Sums with 1.5 * 2^23 round to whole numbers.
SHARED float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    x = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float y = 1.9875691500e-4f * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = (y * (x * x) + x) + 1.0f;
    union { int bits; float value; } power;
    power.bits = ((int)whole + 127) << 23;
    return y * power.value;
}

SHARED double exponential(double x) { return exp(x); }

// Cephes' tanhf.
SHARED float tangent(float x) {
    const float size = x < 0.0f ? -x : x, z = x * x;
    float near = -5.70498872745e-3f * z + 2.06390887954e-2f;
    near = near * z - 5.37397155531e-2f;
    near = near * z + 1.33314422036e-1f;
    near = near * z - 3.33332819422e-1f;
    near = near * z * x + x;
    const float far = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
    return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

SHARED double tangent(double x) { return tanh(x); }

template <class Real>
SHARED Real gate(Real x) {
    return Real(1) / (Real(1) + exponential(-x));
}

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
    const Real f = kPeephole ? s.forget + s.v_f * s.before : s.forget;
    const Real r = kPeephole ? s.reset + s.v_r * s.before : s.reset;
    return {gate(f + s.bias_f), gate(r + s.bias_r)};
}

template <int kActivation, bool kPeephole, class Real>
SHARED Real sru_forward(const SruStep<Real>& s, Real& c) {
    const SruGates<Real> g = gates<kPeephole>(s);
    c = g.f * s.before + (Real(1) - g.f) * s.candidate;
    return g.r * (activated<kActivation>(c) * s.mask) + (Real(1) - g.r) * (s.highway * s.scale);
}

template <class Real>
struct SruGradient {
    Real candidate, forget, reset, highway;
};

// c is this step's; `carried` comes as the gradient of c from the steps after it, and leaves as that of c_{t-1}.
template <int kActivation, bool kPeephole, class Real>
SHARED SruGradient<Real> sru_backward(const SruStep<Real>& s, Real c, Real grad_h, Real& carried) {
    const SruGates<Real> g = gates<kPeephole>(s);
    const Real value = activated<kActivation>(c);
    const Real grad_c = carried + grad_h * g.r * s.mask * slope<kActivation>(value);
    SruGradient<Real> out;
    out.highway = grad_h * (Real(1) - g.r) * s.scale;
    out.reset = grad_h * (value * s.mask - s.highway * s.scale) * (g.r * (Real(1) - g.r));
    out.forget = grad_c * (s.before - s.candidate) * (g.f * (Real(1) - g.f));
    out.candidate = grad_c * (Real(1) - g.f);
    carried = grad_c * g.f;
    if (kPeephole) carried = carried + (out.forget * s.v_f + out.reset * s.v_r);
    return out;
}
