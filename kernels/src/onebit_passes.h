// The passes of onebit.cpp over a column, a word of 32 values at a time. Included once for every kind of processor,
// where it finds what that has: Vector (kEach floats), Mask (as many times yes or no), load, store, spread, pick,
// not_negative, bits_of and mask_of. The 32 lanes of a sum are so many vectors beside each other: vectors of any width
// give the same bits.
//
// All of it is inlined, so a `keeps`, `fresh` or `splits` that is a constant where it is given costs nothing.

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

SHARED void read(const float* from, Vector* v) {
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) v[k] = load(from + k * kEach);
}

SHARED void write(float* to, const Vector* v) {
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) store(to + k * kEach, v[k]);
}

// The same where a column ends inside a word: what is not there is read as 0.
SHARED void read_first(const float* from, Vector* v, int64_t count) {
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) v[k] = load(from + k * kEach, mask_of(first_bits(count), k));
}

// Not by masks: the next column's first loads would wait for a store that reaches over them, though it writes nothing
// there.
SHARED void write_first(float* to, const Vector* v, int64_t count) {
    float lanes[kLanes];
    write(lanes, v);
    std::memcpy(to, lanes, count * sizeof(float));
}

// A word's signs, and what it adds to the sums of the upper values and of the lower ones: NaN is among the latter. What
// is not there adds 0, which changes no sum: they begin at 0.0, and are never -0.0.
SHARED uint32_t taken(const Vector* v, Vector* uppers, Vector* lowers) {
    uint32_t word = 0;
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) {
        const Mask high = not_negative(v[k]);
        uppers[k] = uppers[k] + pick(high, v[k], spread(0.0f));
        lowers[k] = lowers[k] + pick(high, spread(0.0f), v[k]);
        word |= bits_of(high) << (k * kEach);
    }
    return word;
}

SHARED void plus(Vector* v, const Vector* other) {
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) v[k] = v[k] + other[k];
}

SHARED void minus_level(Vector* v, const Vector& below, const Vector& above) {
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) v[k] = v[k] - pick(not_negative(v[k]), above, below);
}

// Returns whether the levels are finite.
SHARED bool quantize_column(const float* __restrict__ values, float* __restrict__ residual, bool keeps, int64_t width,
                            int32_t* __restrict__ levels, int32_t* __restrict__ words) {
    Vector uppers[kVectors], lowers[kVectors], v[kVectors], kept[kVectors];
    for (int k = 0; k < kVectors; ++k) uppers[k] = lowers[k] = spread(0.0f);
    const int64_t whole = width / kLanes * kLanes, rest = width - whole;
    int64_t high = 0;
    for (int64_t i = 0; i < whole; i += kLanes) {
        read(values + i, v);
        if (keeps) read(residual + i, kept), plus(v, kept), write(residual + i, v);
        const uint32_t word = taken(v, uppers, lowers);
        words[i / kLanes] = int32_t(word);
        high += __builtin_popcount(word);
    }
    if (rest) {
        read_first(values + whole, v, rest);
        if (keeps) read_first(residual + whole, kept, rest), plus(v, kept);  // written when it is what is left
        const uint32_t word = taken(v, uppers, lowers) & first_bits(rest);
        words[whole / kLanes] = int32_t(word);
        high += __builtin_popcount(word);
    }
    const float above = mean(folded(uppers), high), below = mean(folded(lowers), width - high);
    std::memcpy(levels, &below, sizeof(below));
    std::memcpy(levels + 1, &above, sizeof(above));
    if (keeps) {
        const Vector all_below = spread(below), all_above = spread(above);
        if (rest) minus_level(v, all_below, all_above), write_first(residual + whole, v, rest);
        for (int64_t i = 0; i < whole; i += kLanes) {
            read(residual + i, v), minus_level(v, all_below, all_above), write(residual + i, v);
        }
    }
    return both_finite(below, above);
}

// What quantize_column does of a single value, a vector's: the level is the value.
SHARED bool quantize_value(const float* value, float* residual, int32_t* levels, int32_t* words) {
    const float v = residual ? *value + *residual : *value;
    const bool high = v >= 0.0f;
    const float level = 0.0f + v, below = high ? 0.0f : level, above = high ? level : 0.0f;
    std::memcpy(levels, &below, sizeof(below));
    std::memcpy(levels + 1, &above, sizeof(above));
    *words = high;
    if (residual) *residual = v - level;
    return both_finite(below, above);
}

// Columns [low, high).
bool quantize(const Quantize& a, int64_t low, int64_t high) {
    bool finite = true;
    for (int64_t i = low; i < high; ++i) {
        const Column c = column_of(a.table, a.count, i);
        const float* values = a.values + c.start;
        int32_t *levels = a.packed + c.levels, *words = a.packed + c.words;
        if (c.width == 1) {
            finite &= quantize_value(values, a.residual ? a.residual + c.start : nullptr, levels, words);
            continue;
        }
        finite &= a.residual ? quantize_column(values, a.residual + c.start, true, c.width, levels, words)
                             : quantize_column(values, nullptr, false, c.width, levels, words);
    }
    return finite;
}

// To a word's sums the values of so many splits, left to right.
SHARED void add_word(Vector* sums, const int32_t* const* words, int splits, int64_t at, const Vector* below,
                     const Vector* above) {
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) {
#pragma GCC unroll 4
        for (int j = 0; j < splits; ++j) sums[k] = sums[k] + pick(mask_of(words[j][at], k), above[j], below[j]);
    }
}

SHARED void add_splits(float* __restrict__ out, int64_t width, const int32_t* const* rows, int splits, bool fresh,
                       int64_t levels, int64_t first_word) {
    Vector below[kTogether], above[kTogether], sums[kVectors];
    const int32_t* words[kTogether];
#pragma GCC unroll 4
    for (int j = 0; j < splits; ++j) {
        float both[2];
        std::memcpy(both, rows[j] + levels, sizeof(both));
        below[j] = spread(both[0]), above[j] = spread(both[1]);
        words[j] = rows[j] + first_word;
    }
    const int64_t whole = width / kLanes * kLanes, rest = width - whole;
    for (int64_t i = 0; i < whole; i += kLanes) {
        for (int k = 0; fresh && k < kVectors; ++k) sums[k] = spread(0.0f);
        if (!fresh) read(out + i, sums);
        add_word(sums, words, splits, i / kLanes, below, above);
        write(out + i, sums);
    }
    if (rest) {
        read_first(out + whole, sums, fresh ? 0 : rest);
        add_word(sums, words, splits, whole / kLanes, below, above);
        write_first(out + whole, sums, rest);
    }
}

// Floats [low, high) of a column, cut between words, in strips: all splits while a strip is in the first cache; those
// that hold nothing are left out.
void accumulate(const Accumulate& a, const Column& c, int64_t low, int64_t high) {
    if (c.width == 1) {
        float sum = a.fresh ? 0.0f : a.out[c.start];
        for (int64_t at = 0; at < a.rows && low < high; ++at) {
            const int32_t* row = a.packed + at * a.row;
            float level;
            std::memcpy(&level, row + c.levels + (row[c.words] & 1), sizeof(level));
            if (*row) sum = sum + level;
        }
        if (low < high) a.out[c.start] = sum;
        return;
    }
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
