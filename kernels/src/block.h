// The update of a block, one float at a time: arithmetic that block.cpp and block.cu share; kernels/block.py says what.
//
// Every operation is rounded by itself, so the CPU, the GPU and the torch reference give the same bits. SHARED is what a
// function of this file is declared as; who includes it says so.

#pragma once

struct BlockConstants {
    float scale;     // of the total
    float momentum;  // block momentum
    float rate;      // block learning rate
    float keep;      // of the weight, before the change
    float ahead;     // of the change that the next block's start lies before the weights
};

SHARED bool is_finite(float value) { return value - value == 0.0f; }

// Returns where the next block starts.
SHARED float block_step(const BlockConstants& c, float total, float& weight, float& change) {
    change = c.momentum * change + c.rate * (total * c.scale);
    weight = weight * c.keep + change;
    return weight + c.ahead * change;
}
