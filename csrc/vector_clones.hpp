// How the float32 kernels are compiled; they are plain loops which the compiler turns into vector code.
#pragma once

// Before a function: one binary for every x86-64, whose loader picks the widest vectors the processor has.
// Under a thread sanitizer a program with it cannot start.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_THREAD__)
#define BRC_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define BRC_VECTOR_CLONES
#endif

// Before a function that such a clone calls: it must be part of the clone to have its vectors.
#if defined(__GNUC__)
#define BRC_INLINE __attribute__((always_inline)) inline
#else
#define BRC_INLINE inline
#endif

// Before a loop none of whose steps reads or writes what another step writes: no check for overlap is needed.
// Before a loop of constant length inside of it: its steps are written out.
#if defined(__clang__)
#define BRC_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#define BRC_UNROLLED _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define BRC_INDEPENDENT _Pragma("GCC ivdep")
#define BRC_UNROLLED _Pragma("GCC unroll 16")
#else
#define BRC_INDEPENDENT
#define BRC_UNROLLED
#endif
