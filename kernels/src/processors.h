// One library for all processors of a kind: a function so marked is compiled for several, and the right one is called.

#pragma once

#if defined(__x86_64__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif
