// CUDA sources on the CPU, for tests: one fiber a CUDA thread. Blocks run one after another; the threads of a block
// take turns from barrier to barrier, in ascending or descending order: a barrier left out changes the result.
//
// Not here: half-precision types, warp-wide matrix products, cooperative groups, streams, anything timed.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ static
#define __shared__ thread_local  // one copy for all fibers of the one real thread; `extern` goes before it, too

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    unsigned count() const { return x * y * z; }
    dim3 at(unsigned i) const { return {i % x, i / x % y, i / x / y}; }
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

constexpr size_t kStack = 128 << 10, kDynamic = 227 << 10;
constexpr uint64_t kNobody = ~0ull;  // what a lane reads that asks one which takes no part: a NaN
constexpr unsigned char kFresh = 0xff;  // dynamic shared memory at a block's start: NaN

enum class At { kReady, kBarrier, kWarp, kEnd };

struct Thread {
    ucontext_t context;
    At at = At::kReady;
    int line = 0;                         // of the barrier
    unsigned mask = 0, group = 0;         // lanes that are waited for, and those that came
    uint64_t given = 0, seen = kNobody;   // what this lane shows: now, and in the last operation that is complete
};

struct Block {
    std::vector<Thread> threads;
    std::unique_ptr<char[]> stacks;
    ucontext_t scheduler;
    unsigned current = 0;
    std::function<void()> kernel;
};
inline Block* block;

inline Thread& self() { return block->threads[block->current]; }

inline void wait(At at) {
    Thread& thread = self();
    thread.at = at;
    swapcontext(&thread.context, &block->scheduler);
}

inline void enter() {
    block->kernel();
    self().at = At::kEnd;  // and on to the scheduler, through uc_link
}

inline void barrier(int line) {
    self().line = line;
    wait(At::kBarrier);
}

// Whether some threads go on: a warp's lanes that have all come, or else a block that has all come.
inline bool release(std::string& error) {
    auto& threads = block->threads;
    bool any = false, together = true;
    int line = 0;
    for (unsigned i = 0; i < threads.size(); ++i) {
        if (threads[i].at == At::kEnd) continue;
        if (threads[i].at == At::kWarp) {
            const unsigned first = i / 32 * 32, mask = threads[i].mask;
            unsigned group = 0;
            bool all = true;
            for (unsigned l = 0; l < 32 && first + l < threads.size(); ++l) {
                const Thread& lane = threads[first + l];
                if (!(mask >> l & 1) || lane.at == At::kEnd) continue;
                group |= 1u << l;
                all = all && lane.at == At::kWarp && lane.mask == mask;
            }
            if (all && !(mask >> (i - first) & 1)) error = "a lane is not in the mask of its own warp operation";
            for (unsigned l = 0; all && error.empty() && l < 32 && first + l < threads.size(); ++l) {
                Thread& lane = threads[first + l];
                if (!(mask >> l & 1)) continue;
                lane.seen = group >> l & 1 ? lane.given : kNobody;
                if (group >> l & 1) lane.group = group, lane.at = At::kReady;
            }
            any = any || all;
        }
        if (threads[i].at != At::kBarrier || (line && line != threads[i].line)) together = false;
        if (threads[i].at == At::kBarrier) line = threads[i].line;
    }
    for (auto& thread : threads) {
        if (!any && together && thread.at == At::kBarrier) thread.at = At::kReady;
    }
    if (!any && !together) {
        error = "threads of a block wait for each other; last barrier seen: line " + std::to_string(line);
    }
    return error.empty();
}

inline std::string run_block(bool descending) {
    auto& threads = block->threads;
    for (unsigned i = 0; i < threads.size(); ++i) {
        threads[i] = Thread();
        getcontext(&threads[i].context);
        threads[i].context.uc_stack.ss_sp = block->stacks.get() + i * kStack;
        threads[i].context.uc_stack.ss_size = kStack;
        threads[i].context.uc_link = &block->scheduler;
        makecontext(&threads[i].context, enter, 0);
    }
    for (std::string error;;) {
        unsigned ended = 0;
        for (unsigned k = 0; k < threads.size(); ++k) {
            const unsigned i = block->current = descending ? threads.size() - 1 - k : k;
            if (threads[i].at == At::kReady) {
                threadIdx = blockDim.at(i);
                swapcontext(&block->scheduler, &threads[i].context);
            }
            ended += threads[i].at == At::kEnd;
        }
        if (ended == threads.size() || !release(error)) return error;
    }
}

struct Launch {
    dim3 blocks, threads;
    size_t shared;           // bytes of dynamic shared memory that were asked for,
    unsigned char* dynamic;  // of kDynamic here; null if the source declares none
    bool descending;
    void** arguments;
    const int64_t* sizes;    // what is at hand for each argument
    int64_t count;
};

inline std::string differ(const std::string& what, int64_t expected, int64_t got) {
    return what + ": expected " + std::to_string(expected) + ", got " + std::to_string(got);
}

// Returns what went wrong, or "".
template <class... Arguments, size_t... I>
std::string run(void (*kernel)(Arguments...), const Launch& given, std::index_sequence<I...>) {
    const int64_t wanted[] = {int64_t(sizeof(Arguments))..., 0}, number = sizeof...(I);
    if (given.count != number) return differ("number of arguments", number, given.count);
    for (int64_t i = 0; i < number; ++i) {
        if (given.sizes[i] != wanted[i]) {
            return differ("bytes of argument " + std::to_string(i), wanted[i], given.sizes[i]);
        }
    }
    Block own;
    own.threads.resize(given.threads.count());
    own.stacks.reset(new char[given.threads.count() * kStack]);
    own.kernel = [&] { kernel(*static_cast<std::decay_t<Arguments>*>(given.arguments[I])...); };
    block = &own;
    gridDim = given.blocks, blockDim = given.threads;
    for (unsigned k = 0, n = gridDim.count(); k < n; ++k) {
        blockIdx = gridDim.at(given.descending ? n - 1 - k : k);
        if (given.dynamic) memset(given.dynamic, kFresh, kDynamic);
        if (std::string error = run_block(given.descending); !error.empty()) return error;
        for (size_t i = given.shared; given.dynamic && i < kDynamic; ++i) {
            if (given.dynamic[i] != kFresh) return differ("bytes of shared memory written", given.shared, i + 1);
        }
    }
    return "";
}

template <class... Arguments>
void launch(void (*kernel)(Arguments...), const Launch& given, char* error, size_t room) {
    const std::string found = run(kernel, given, std::index_sequence_for<Arguments...>());
    error[found.copy(error, room - 1)] = 0;
}

// Every lane shows a value; which lane's it then reads is the caller's to say. 8 bytes at most.
template <class T> void show(unsigned mask, T value) {
    static_assert(sizeof(T) <= 8);
    self().given = 0, self().mask = mask;
    memcpy(&self().given, &value, sizeof(T));
    wait(At::kWarp);
}
template <class T> T look(unsigned lane) {
    const unsigned i = block->current / 32 * 32 + lane;
    uint64_t bits = self().group >> lane & 1 ? block->threads[i].seen : kNobody;
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
}
inline unsigned lane() { return block->current % 32; }
template <class T> T shuffle(unsigned mask, T value, unsigned from, bool inside) {
    show(mask, value);
    return inside ? look<T>(from) : value;
}

}  // namespace cuda_on_cpu

#define __syncthreads() cuda_on_cpu::barrier(__LINE__)
inline void __syncwarp(unsigned mask = ~0u) { cuda_on_cpu::show(mask, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// Segments of `width` lanes; one that asks past its segment's end gets its own value.
template <class T> T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    const int base = int(cuda_on_cpu::lane()) / width * width;
    return cuda_on_cpu::shuffle(mask, value, base + (from & (width - 1)), true);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const int lane = cuda_on_cpu::lane(), from = lane ^ bits;
    return cuda_on_cpu::shuffle(mask, value, from, from / width <= lane / width);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    const int lane = cuda_on_cpu::lane();
    return cuda_on_cpu::shuffle(mask, value, lane + by, lane % width + int(by) < width);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    const int lane = cuda_on_cpu::lane();
    return cuda_on_cpu::shuffle(mask, value, lane - by, lane % width >= int(by));
}
inline unsigned __ballot_sync(unsigned mask, int yes) {
    unsigned found = 0;
    cuda_on_cpu::show(mask, yes != 0);
    for (unsigned l = 0; l < 32; ++l) {
        if (cuda_on_cpu::self().group >> l & 1) found |= unsigned(cuda_on_cpu::look<bool>(l)) << l;
    }
    return found;
}
inline int __any_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) != 0; }
inline int __all_sync(unsigned mask, int yes) { return __ballot_sync(mask, !yes) == 0; }

#define ATOMIC(name, result)                        \
    template <class T, class V> T name(T* at, V v) { \
        const T old = *at, value = T(v);            \
        *at = result;                               \
        return old;                                 \
    }
ATOMIC(atomicAdd, old + value)
ATOMIC(atomicSub, old - value)
ATOMIC(atomicExch, value)
ATOMIC(atomicMax, old > value ? old : value)
ATOMIC(atomicMin, old < value ? old : value)
ATOMIC(atomicOr, old | value)
ATOMIC(atomicAnd, old & value)
#undef ATOMIC
template <class T> T atomicCAS(T* at, T expected, T value) {
    const T old = *at;
    if (old == expected) *at = value;
    return old;
}

template <class T> T __ldg(const T* at) { return *at; }
template <class A, class B> auto min(A a, B b) { return b < a ? b : a; }
template <class A, class B> auto max(A a, B b) { return a < b ? b : a; }
template <class To, class From> To bits_as(From from) {
    To to;
    static_assert(sizeof(to) == sizeof(from));
    memcpy(&to, &from, sizeof(to));
    return to;
}
inline float __int_as_float(int v) { return bits_as<float>(v); }
inline float __uint_as_float(unsigned v) { return bits_as<float>(v); }
inline int __float_as_int(float v) { return bits_as<int>(v); }
inline unsigned __float_as_uint(float v) { return bits_as<unsigned>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline float __expf(float v) { return expf(v); }
inline float __logf(float v) { return logf(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
