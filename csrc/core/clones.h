// One shared library for every x86-64: the loader picks the widest version the processor has.
#pragma once

#include <cstdint>  // says whether the C library is glibc

#if defined(MIGA_ONE_TARGET)  // the compiler's own flags choose
#define MIGA_CLONES
#elif defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define MIGA_CLONES __attribute__((noinline, target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MIGA_CLONES
#endif

// For what a clone is made of: inlined, it is compiled for the clone's instructions.
#define MIGA_INLINE inline __attribute__((always_inline))
