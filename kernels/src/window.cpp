// Sums and signals in memory that several processes share: the CPU side of kernels/window.py, which documents them.
//
// A flag is one cache line: word 0 is its value, word 1 the number of waiters, so that posting costs a system call only
// where somebody sleeps.

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <ctime>
#include <sched.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "processors.h"

namespace {

constexpr int64_t kBlock = 4096;  // floats that are summed at a time: operands and results stay in the first cache
constexpr int kDepth = 40;        // no tree of 2^31 splits is deeper
constexpr int kYields = 200;      // looks with the core lent to others in between, before a waiting rank goes to sleep

FOR_EVERY_PROCESSOR void add(const float* left, const float* right, float* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = left[i] + right[i];
}

FOR_EVERY_PROCESSOR void copy(const float* from, float* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = from[i];
}

// The same, past the caches: nobody here reads `out` soon, and its lines need not be read before they are written.
void add_past_caches(const float* left, const float* right, float* out, int64_t count) {
#if defined(__x86_64__)
    int64_t i = 0;
    for (; i < count && (reinterpret_cast<uintptr_t>(out + i) & 63); ++i) out[i] = left[i] + right[i];
    for (; i + 16 <= count; i += 16) {
        _mm_stream_ps(out + i, _mm_add_ps(_mm_loadu_ps(left + i), _mm_loadu_ps(right + i)));
        _mm_stream_ps(out + i + 4, _mm_add_ps(_mm_loadu_ps(left + i + 4), _mm_loadu_ps(right + i + 4)));
        _mm_stream_ps(out + i + 8, _mm_add_ps(_mm_loadu_ps(left + i + 8), _mm_loadu_ps(right + i + 8)));
        _mm_stream_ps(out + i + 12, _mm_add_ps(_mm_loadu_ps(left + i + 12), _mm_loadu_ps(right + i + 12)));
    }
    for (; i < count; ++i) out[i] = left[i] + right[i];
    _mm_sfence();
#else
    add(left, right, out, count);
#endif
}

inline std::atomic<uint32_t>* word(uint32_t* flag, int index) {
    return reinterpret_cast<std::atomic<uint32_t>*>(flag + index);
}

inline bool reached(uint32_t* flag, uint32_t value) {
    return static_cast<int32_t>(word(flag, 0)->load(std::memory_order_acquire) - value) >= 0;
}

inline void pause_() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

}  // namespace

extern "C" {

void trireme_tree_sum(const float* const* leaves, const int32_t* program, int32_t steps, float* out, int64_t count,
                      int32_t past_caches) {
    alignas(64) static thread_local float scratch[kDepth][kBlock];
    for (int64_t at = 0; at < count; at += kBlock) {
        const int64_t n = count - at < kBlock ? count - at : kBlock;
        const float* stack[kDepth];
        int depth = 0;
        for (int32_t step = 0; step < steps; ++step) {
            if (program[step] >= 0) {
                stack[depth++] = leaves[program[step]] + at;
                continue;
            }
            --depth;
            const bool last = step == steps - 1;
            float* to = last ? out + at : scratch[depth - 1];
            if (last && past_caches) {
                add_past_caches(stack[depth - 1], stack[depth], to, n);
            } else {
                add(stack[depth - 1], stack[depth], to, n);
            }
            stack[depth - 1] = to;
        }
        if (stack[0] != out + at) copy(stack[0], out + at, n);
    }
}

void trireme_post(uint32_t* flag, uint32_t value) {
    word(flag, 0)->store(value, std::memory_order_seq_cst);
#if defined(__linux__)
    if (word(flag, 1)->load(std::memory_order_seq_cst)) {
        syscall(SYS_futex, flag, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    }
#endif
}

// spins: so many looks before the core is lent to others between two looks, and then slept; -1: lent at once; 0: one
// look, then slept. Two ranks that sleep can keep each other slow for long, by waking each other.
int32_t trireme_wait(uint32_t* flag, uint32_t value, int32_t spins, int64_t patience_ns) {
    for (int32_t i = 0; i < spins; ++i) {
        if (reached(flag, value)) return 1;
        pause_();
    }
    for (int i = 0; spins && i < kYields; ++i) {
        if (reached(flag, value)) return 1;
        sched_yield();
    }
    if (reached(flag, value)) return 1;
    const int64_t deadline = now_ns() + patience_ns;
    word(flag, 1)->fetch_add(1, std::memory_order_seq_cst);
    int32_t found = 0;
    for (;;) {
        const uint32_t seen = word(flag, 0)->load(std::memory_order_seq_cst);
        if (static_cast<int32_t>(seen - value) >= 0) {
            found = 1;
            break;
        }
        const int64_t left = deadline - now_ns();
        if (left <= 0) break;
#if defined(__linux__)
        timespec t{time_t(left / 1000000000), long(left % 1000000000)};
        syscall(SYS_futex, flag, FUTEX_WAIT, seen, &t, nullptr, 0);
#else
        timespec t{0, 50000};
        nanosleep(&t, nullptr);
#endif
    }
    word(flag, 1)->fetch_sub(1, std::memory_order_seq_cst);
    return found;
}

// Waits for each of the flags in turn; returns the index of the first that did not come, or -1.
int32_t trireme_wait_all(uint32_t* const* flags, int32_t count, uint32_t value, int32_t spins, int64_t patience_ns) {
    for (int32_t i = 0; i < count; ++i) {
        if (!trireme_wait(flags[i], value, spins, patience_ns)) return i;
    }
    return -1;
}

// What kernels/window.py's Meeting packs; the order of members is part of the contract.
struct Meeting {
    uint32_t* const* ready;       // one flag a rank
    uint32_t* const* done;        // one flag a rank
    const float* const* leaves;
    const int32_t* program;
    float* out;
    int64_t count, patience_ns;
    int32_t ranks, mine, steps, past_caches, spins;
    uint32_t turn;
    int32_t entered;              // whether this rank is in the meeting already: a call after patience ran out
};

// Everybody is ready, everybody sums, everybody is done. Returns -1, or the first rank that did not come.
int32_t trireme_meet_and_sum(Meeting* m) {
    int32_t missing;
    if (m->entered < 1) {
        trireme_post(m->ready[m->mine], m->turn);
        m->entered = 1;
    }
    if (m->entered < 2) {
        missing = trireme_wait_all(m->ready, m->ranks, m->turn, m->spins, m->patience_ns);
        if (missing >= 0) return missing;
        if (m->count) trireme_tree_sum(m->leaves, m->program, m->steps, m->out, m->count, m->past_caches);
        trireme_post(m->done[m->mine], m->turn);
        m->entered = 2;
    }
    missing = trireme_wait_all(m->done, m->ranks, m->turn, m->spins, m->patience_ns);
    if (missing >= 0) return missing;
    m->entered = 0;
    return -1;
}

}  // extern "C"
