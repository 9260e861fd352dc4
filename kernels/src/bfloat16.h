// bfloat16 as it lies in memory: the upper half of a float. SHARED is what a function of this file is declared as.

#pragma once

struct Bfloat16 {
    unsigned short bits;
};

union FloatBits {
    unsigned int bits;
    float value;
};

SHARED float widened(Bfloat16 x) {
    FloatBits made;
    made.bits = (unsigned int)x.bits << 16;
    return made.value;
}

SHARED float widened(float x) { return x; }
SHARED double widened(double x) { return x; }

// To the nearest, ties to even; what is not a number stays none.
SHARED void narrow(float x, Bfloat16& to) {
    FloatBits given;
    given.value = x;
    const unsigned int nearest = (given.bits + 0x7fffu + ((given.bits >> 16) & 1u)) >> 16;
    const unsigned int quiet = (given.bits >> 16) | 0x40u;
    to.bits = (unsigned short)((given.bits & 0x7fffffffu) > 0x7f800000u ? quiet : nearest);
}

SHARED void narrow(float x, float& to) { to = x; }
SHARED void narrow(double x, double& to) { to = x; }
