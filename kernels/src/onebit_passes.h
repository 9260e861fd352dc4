// The passes of onebit.cpp over a column, a word of 32 values at a time. Included once for every kind of processor, where
// it finds what that has: Vector of kEach floats, Mask of as many yes or no, and load, store, spread, pick, not_negative,
// bits_of and mask_of. The 32 lanes of a sum are so many vectors beside each other, so all widths give the same bits.
//
// What is false or a number when it is called is known when it is compiled: all of this is inlined.

constexpr int kVectors = kLanes / kEach;

SHARED void fold(float* lanes, int half) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
}

SHARED float folded(const Vector* sums) {
    float lanes[kLanes];
    std::memcpy(lanes, sums, sizeof(lanes));
    fold(lanes, 16), fold(lanes, 8), fold(lanes, 4), fold(lanes, 2), fold(lanes, 1);
    return lanes[0];
}

SHARED Vector read(const float* from, bool whole, uint32_t present, int k) {
    return whole ? load(from + k * kEach) : load(from + k * kEach, mask_of(present, k));
}

SHARED void write(float* to, const Vector& v, bool whole, uint32_t present, int k) {
    whole ? store(to + k * kEach, v) : store(to + k * kEach, v, mask_of(present, k));
}

// One word's values: v, which is kept, its signs, and what it adds to the sums of the upper values and of the lower ones:
// NaN is among the latter. What is not there counts as 0, which changes no sum: they begin at 0.0 and are never -0.0.
SHARED uint32_t taken(const float* values, float* kept, bool keeps, Vector* uppers, Vector* lowers, bool whole,
                      uint32_t present) {
    uint32_t word = 0;
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) {
        Vector v = read(values, whole, present, k);
        if (keeps) {
            v = v + read(kept, whole, present, k);
            write(kept, v, whole, present, k);
        }
        const Mask high = not_negative(v);
        uppers[k] = uppers[k] + pick(high, v, spread(0.0f));
        lowers[k] = lowers[k] + pick(high, spread(0.0f), v);
        word |= bits_of(high) << (k * kEach);
    }
    return word & present;
}

SHARED void left(float* kept, const Vector& below, const Vector& above, bool whole, uint32_t present) {
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) {
        const Vector v = read(kept, whole, present, k);
        write(kept, v - pick(not_negative(v), above, below), whole, present, k);
    }
}

// Returns whether the levels are finite.
SHARED bool quantize_column(const float* __restrict__ values, float* __restrict__ residual, bool keeps, int64_t width,
                            int32_t* __restrict__ levels, int32_t* __restrict__ words) {
    Vector uppers[kVectors], lowers[kVectors];
    for (int k = 0; k < kVectors; ++k) uppers[k] = lowers[k] = spread(0.0f);
    const int64_t whole = width / kLanes * kLanes;
    const uint32_t present = first_bits(width - whole);
    int64_t high = 0;
    for (int64_t i = 0; i < whole; i += kLanes) {
        const uint32_t word = taken(values + i, residual + i, keeps, uppers, lowers, true, kAll);
        words[i / kLanes] = int32_t(word);
        high += __builtin_popcount(word);
    }
    if (present) {
        const uint32_t word = taken(values + whole, residual + whole, keeps, uppers, lowers, false, present);
        words[whole / kLanes] = int32_t(word);
        high += __builtin_popcount(word);
    }
    const float above = mean(folded(uppers), high), below = mean(folded(lowers), width - high);
    std::memcpy(levels, &below, sizeof(below));
    std::memcpy(levels + 1, &above, sizeof(above));
    if (keeps) {
        const Vector all_below = spread(below), all_above = spread(above);
        for (int64_t i = 0; i < whole; i += kLanes) left(residual + i, all_below, all_above, true, kAll);
        if (present) left(residual + whole, all_below, all_above, false, present);
    }
    return both_finite(below, above);
}

// Columns [low, high).
bool quantize(const Quantize& a, int64_t low, int64_t high) {
    bool finite = true;
    for (int64_t i = low; i < high; ++i) {
        const Column c = column_of(a.table, a.count, i);
        const float* values = a.values + c.start;
        int32_t *levels = a.packed + c.levels, *words = a.packed + c.words;
        finite &= a.residual ? quantize_column(values, a.residual + c.start, true, c.width, levels, words)
                             : quantize_column(values, nullptr, false, c.width, levels, words);
    }
    return finite;
}

// One word's sums, and to them the values of so many splits, left to right.
SHARED void add_word(float* out, bool fresh, const int32_t* const* words, int splits, int64_t at, const Vector* below,
                     const Vector* above, bool whole, uint32_t present) {
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) {
        Vector sum = fresh ? spread(0.0f) : read(out, whole, present, k);
#pragma GCC unroll 4
        for (int j = 0; j < splits; ++j) sum = sum + pick(mask_of(words[j][at], k), above[j], below[j]);
        write(out, sum, whole, present, k);
    }
}

SHARED void add_splits(float* __restrict__ out, int64_t width, const int32_t* const* rows, int splits, bool fresh,
                       int64_t levels, int64_t first_word) {
    Vector below[kTogether], above[kTogether];
    const int32_t* words[kTogether];
#pragma GCC unroll 4
    for (int j = 0; j < splits; ++j) {
        float both[2];
        std::memcpy(both, rows[j] + levels, sizeof(both));
        below[j] = spread(both[0]), above[j] = spread(both[1]);
        words[j] = rows[j] + first_word;
    }
    const int64_t whole = width / kLanes;
    for (int64_t at = 0; at < whole; ++at) {
        add_word(out + at * kLanes, fresh, words, splits, at, below, above, true, kAll);
    }
    if (const uint32_t present = first_bits(width - whole * kLanes)) {
        add_word(out + whole * kLanes, fresh, words, splits, whole, below, above, false, present);
    }
}

// Floats [low, high) of a column, cut between words, in strips: all splits while a strip is in the first cache; those
// that hold nothing are left out.
void accumulate(const Accumulate& a, const Column& c, int64_t low, int64_t high) {
    for (int64_t from = low; from < high; from += kStrip) {
        float* out = a.out + c.start + from;
        const int64_t width = high - from < kStrip ? high - from : kStrip, words = c.words + from / kLanes;
        bool fresh = a.fresh;
        for (int64_t at = 0; at < a.rows;) {
            const int32_t* rows[kTogether];
            int found = 0;
            for (; at < a.rows && found < kTogether; ++at) {
                const int32_t* row = a.packed + at * a.row;
                if (*row) rows[found++] = row;
            }
            if (!found) break;
            switch (found * 2 + fresh) {
                case 2: add_splits(out, width, rows, 1, false, c.levels, words); break;
                case 3: add_splits(out, width, rows, 1, true, c.levels, words); break;
                case 4: add_splits(out, width, rows, 2, false, c.levels, words); break;
                case 5: add_splits(out, width, rows, 2, true, c.levels, words); break;
                case 6: add_splits(out, width, rows, 3, false, c.levels, words); break;
                case 7: add_splits(out, width, rows, 3, true, c.levels, words); break;
                case 8: add_splits(out, width, rows, 4, false, c.levels, words); break;
                case 9: add_splits(out, width, rows, 4, true, c.levels, words); break;
            }
            fresh = false;
        }
        if (fresh) std::memset(out, 0, width * sizeof(float));
    }
}
