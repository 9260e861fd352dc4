// Where a column lies in a packed row, and its levels: what onebit.cpp and onebit.cu share; kernels/onebit.py says
// why.
//
// Every operation is rounded by itself, so the CPU, the GPU and the reference give the same bits (a GPU's denormal
// numbers apart: it takes them as 0). SHARED is what a function of this file is declared as; who includes it says so.

#pragma once

struct Column {
    long long start, width;  // floats of the stretch: where it begins, and how many
    long long levels;        // int32 of a packed row: where (below, above) are
    long long words;         // likewise its first word of signs
};

// table: [3, count], as `Columns.table` makes it.
template <class Whole>
SHARED Column column_of(const Whole* table, long long count, long long i) {
    return {table[i], table[count + i], 1 + 2 * i, 1 + 2 * count + table[2 * count + i]};
}

SHARED float mean(float sum, long long count) { return sum / (float)(count > 0 ? count : 1); }

SHARED bool both_finite(float one, float other) { return one - one == 0.0f && other - other == 0.0f; }
