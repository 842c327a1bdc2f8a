// Which vector instructions are used: found out once, at run time.
//
// Leaves: `isa()`, the best that this processor and this build have, and `set_isa`, by which a test
// takes a lesser one. All give the same bytes.
#pragma once

#include <atomic>

#if defined(__GNUC__) && defined(__x86_64__)
#define REGMIX_X86 1
#include <immintrin.h>
#define REGMIX_TARGET_AVX2 __attribute__((target("avx2")))
#define REGMIX_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#endif

#if defined(__GNUC__)
#define REGMIX_PREFETCH(address) __builtin_prefetch(address)
#else
#define REGMIX_PREFETCH(address) static_cast<void>(address)
#endif

namespace regmix {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2 };

inline Isa best_isa() {
#ifdef REGMIX_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return Isa::avx512;
    if (__builtin_cpu_supports("avx2")) return Isa::avx2;
#endif
    return Isa::scalar;
}

inline std::atomic<Isa>& isa_in_use() {
    static std::atomic<Isa> chosen{best_isa()};
    return chosen;
}

inline Isa isa() { return isa_in_use().load(std::memory_order_relaxed); }

// Never above what the processor has.
inline Isa set_isa(Isa wanted) {
    const Isa best = best_isa();
    isa_in_use().store(wanted < best ? wanted : best, std::memory_order_relaxed);
    return isa();
}

}  // namespace regmix
