// The update rules, one float at a time: arithmetic that update.cpp and update.cu share; kernels/update.py says what.
//
// Every operation is rounded by itself (no fused multiply-add), square roots and quotients correctly: so the CPU, the
// GPU and the torch reference give the same bits. SHARED is what a function of this file is declared as; who includes
// it says so.

#pragma once

struct Constants {
    float scale;        // of the gradient
    float l2;           // of the weight that is added to it
    float keep;         // of the weight, before the rule
    float rate;
    float momentum;     // or beta1
    float fresh;        // 1 - beta1
    float beta2;
    float fresh2;       // 1 - beta2
    float correction2;  // of the square root, Adam's
    float epsilon;
};

SHARED bool is_finite(float value) { return value - value == 0.0f; }

SHARED float gradient(const Constants& c, float g, float w) { return g * c.scale + c.l2 * w; }

// Each: g is the gradient with l2, w the weight after decay, one and two the state of this float.

struct Sgd {
    SHARED float step(const Constants& c, float g, float w, float&, float&) { return w - c.rate * g; }
};

struct Momentum {
    SHARED float step(const Constants& c, float g, float w, float& one, float&) {
        one = c.momentum * one + g;
        return w - c.rate * one;
    }
};

struct Nesterov {
    SHARED float step(const Constants& c, float g, float w, float& one, float&) {
        one = c.momentum * one + g;
        return w - c.rate * (g + c.momentum * one);
    }
};

struct AdaGrad {
    SHARED float step(const Constants& c, float g, float w, float& one, float&) {
        one = one + g * g;
        return w - c.rate * (g / (sqrtf(one) + c.epsilon));
    }
};

struct AdaGradMomentum {
    SHARED float step(const Constants& c, float g, float w, float& one, float& two) {
        one = one + g * g;
        two = c.momentum * two + g / (sqrtf(one) + c.epsilon);
        return w - c.rate * two;
    }
};

struct MomentumAdaGrad {
    SHARED float step(const Constants& c, float g, float w, float& one, float& two) {
        two = c.momentum * two + g;
        one = one + two * two;
        return w - c.rate * (two / (sqrtf(one) + c.epsilon));
    }
};

struct Adam {
    SHARED float step(const Constants& c, float g, float w, float& one, float& two) {
        one = c.momentum * one + c.fresh * g;
        two = c.beta2 * two + c.fresh2 * (g * g);
        return w - c.rate * (one / (sqrtf(two) * c.correction2 + c.epsilon));
    }
};

struct Adamax {
    SHARED float step(const Constants& c, float g, float w, float& one, float& two) {
        one = c.momentum * one + c.fresh * g;
        const float kept = c.beta2 * two, size = fabsf(g);
        two = kept > size ? kept : size;
        return w - c.rate * (one / (two + c.epsilon));
    }
};

// RULE(name, struct, number of state arrays)
#define FOR_EVERY_RULE(RULE)                   \
    RULE(sgd, Sgd, 0)                          \
    RULE(momentum, Momentum, 1)                \
    RULE(nesterov, Nesterov, 1)                \
    RULE(adagrad, AdaGrad, 1)                  \
    RULE(adagrad_momentum, AdaGradMomentum, 2) \
    RULE(momentum_adagrad, MomentumAdaGrad, 2) \
    RULE(adam, Adam, 2)                        \
    RULE(adamax, Adamax, 2)
