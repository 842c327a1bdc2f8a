// Tokens into rows of a batch, without Python.
//
// Enters: pointers to tokens per domain, and domain and sequence of every row. Leaves: rows of T+1
// tokens as uint16, int32 or int64. Where a file comes with a check, no token of a block is copied
// before that block was checked; else it reads whatever the pointers show.
//
// A row is a random 4 KB of memory. While one is widened the next is prefetched line by line, which
// hides most of its way from memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.hpp"
#include "isa.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace regmix {

constexpr std::int64_t kLineBytes = 64;

// The tokens of one file, and where they end among the tokens of their domain.
struct Span {
    const void* tokens;
    bool wide;  // uint32 where true, uint16 where false
    std::int64_t length, end;
    const BlockCheck* check = nullptr;  // none where all of it was checked before

    const unsigned char* at(std::int64_t offset) const {
        return static_cast<const unsigned char*>(tokens) + (offset << shift());
    }

    void require(std::int64_t offset, std::int64_t num) const {
        if (check != nullptr) check->require(offset << shift(), (offset + num) << shift());
    }

    int shift() const { return wide ? 2 : 1; }
};

using Domain = std::vector<Span>;

// `next` is what will be read after these tokens; reading ahead of it never faults.
template <typename In, typename Out>
inline void widen_scalar(const In* in, const unsigned char* next, std::int64_t num, Out* out) {
    constexpr std::int64_t kPerLine = kLineBytes / static_cast<std::int64_t>(sizeof(In));
    std::int64_t i = 0;
    for (; i + kPerLine <= num; i += kPerLine, next += kLineBytes) {
        REGMIX_PREFETCH(next);
        for (std::int64_t j = i; j < i + kPerLine; ++j) out[j] = static_cast<Out>(in[j]);
    }
    for (; i < num; ++i) out[i] = static_cast<Out>(in[i]);
}

#ifdef REGMIX_X86
template <typename In, typename Out>
REGMIX_TARGET_AVX2 inline void widen_avx2(const In* in, const unsigned char* next,
                                          std::int64_t num, Out* out) {
    constexpr std::int64_t kPerLine = kLineBytes / static_cast<std::int64_t>(sizeof(In));
    constexpr std::int64_t kPerStore = 32 / static_cast<std::int64_t>(sizeof(Out));
    std::int64_t i = 0;
    for (; i + kPerLine <= num; i += kPerLine, next += kLineBytes) {
        REGMIX_PREFETCH(next);
        for (std::int64_t j = i; j < i + kPerLine; j += kPerStore) {
            __m256i wide;
            if constexpr (sizeof(In) == sizeof(Out)) {
                wide = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + j));
            } else if constexpr (sizeof(In) == 2 && sizeof(Out) == 4) {
                wide = _mm256_cvtepu16_epi32(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + j)));
            } else if constexpr (sizeof(In) == 2) {
                wide = _mm256_cvtepu16_epi64(
                    _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in + j)));
            } else {
                wide = _mm256_cvtepu32_epi64(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + j)));
            }
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), wide);
        }
    }
    for (; i < num; ++i) out[i] = static_cast<Out>(in[i]);
}

template <typename In, typename Out>
REGMIX_TARGET_AVX512 inline void widen_avx512(const In* in, const unsigned char* next,
                                              std::int64_t num, Out* out) {
    constexpr std::int64_t kPerLine = kLineBytes / static_cast<std::int64_t>(sizeof(In));
    constexpr std::int64_t kPerStore = 64 / static_cast<std::int64_t>(sizeof(Out));
    // A row of T+1 tokens starts anywhere; stores that straddle two lines would cost twice.
    const auto address = reinterpret_cast<std::uintptr_t>(out);
    const std::int64_t head =
        std::min<std::int64_t>(num, (64 - address % 64) % 64 / sizeof(Out));
    for (std::int64_t i = 0; i < head; ++i) out[i] = static_cast<Out>(in[i]);
    std::int64_t i = head;
    for (; i + kPerLine <= num; i += kPerLine, next += kLineBytes) {
        REGMIX_PREFETCH(next);
        for (std::int64_t j = i; j < i + kPerLine; j += kPerStore) {
            __m512i wide;
            if constexpr (sizeof(In) == sizeof(Out)) {
                wide = _mm512_loadu_si512(in + j);
            } else if constexpr (sizeof(In) == 2 && sizeof(Out) == 4) {
                wide = _mm512_cvtepu16_epi32(
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + j)));
            } else if constexpr (sizeof(In) == 2) {
                wide = _mm512_cvtepu16_epi64(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + j)));
            } else {
                wide = _mm512_cvtepu32_epi64(
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + j)));
            }
            _mm512_storeu_si512(out + j, wide);
        }
    }
    for (; i < num; ++i) out[i] = static_cast<Out>(in[i]);
}
#endif

template <typename In, typename Out>
inline void widen(const void* in, const unsigned char* next, std::int64_t num, Out* out) {
    const In* tokens = static_cast<const In*>(in);
#ifdef REGMIX_X86
    if (isa() == Isa::avx512) return widen_avx512(tokens, next, num, out);
    if (isa() == Isa::avx2) return widen_avx2(tokens, next, num, out);
#endif
    return widen_scalar(tokens, next, num, out);
}

// Copies sequences of T tokens and the label of the last. Domains can be added while others read.
class Gatherer {
  public:
    // Returns the number by which rows name the domain.
    std::int64_t add(Domain spans) {
        std::unique_lock lock(mutex_);
        domains_.push_back(std::move(spans));
        return static_cast<std::int64_t>(domains_.size()) - 1;
    }

    // Row r takes sequence `sequences[r]` of the domain numbered `slots[domains[r]]`.
    template <typename Out>
    void fill(const std::int64_t* slots, std::int64_t num_slots, const std::int64_t* domains,
              const std::int64_t* sequences, std::int64_t num, std::int64_t seq_len,
              Out* out) const {
        std::shared_lock lock(mutex_);
        const std::int64_t length = seq_len + 1;
        if (num == 0) return;
        Place place = find(slots, num_slots, domains[0], sequences[0], seq_len);
        for (std::int64_t row = 0; row < num; ++row, out += length) {
            const Place here = place;
            if (row + 1 < num)
                place = find(slots, num_slots, domains[row + 1], sequences[row + 1], seq_len);
            copy(here, place.span->at(place.offset), length, out);
        }
    }

    // Asks the system to read the pages of these rows, which may lie on a disk. Costs a system call
    // a row, so it is for cold data only.
    void read_ahead(const std::int64_t* slots, std::int64_t num_slots, const std::int64_t* domains,
                    const std::int64_t* sequences, std::int64_t num, std::int64_t seq_len) const {
#if defined(MADV_WILLNEED)
        std::shared_lock lock(mutex_);
        static const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
        for (std::int64_t row = 0; row < num; ++row) {
            const Place place = find(slots, num_slots, domains[row], sequences[row], seq_len);
            const std::int64_t here =
                std::min(seq_len + 1, place.span->length - place.offset);
            const auto first = reinterpret_cast<std::uintptr_t>(place.span->at(place.offset));
            const auto last =
                reinterpret_cast<std::uintptr_t>(place.span->at(place.offset + here));
            const std::uintptr_t start = first / page * page;
            madvise(reinterpret_cast<void*>(start), last - start, MADV_WILLNEED);
        }
#else
        static_cast<void>(slots), static_cast<void>(num_slots), static_cast<void>(domains);
        static_cast<void>(sequences), static_cast<void>(num), static_cast<void>(seq_len);
#endif
    }

  private:
    struct Place {
        const Span* span;
        std::int64_t offset;
    };

    Place find(const std::int64_t* slots, std::int64_t num_slots, std::int64_t domain,
               std::int64_t sequence, std::int64_t seq_len) const {
        if (domain < 0 || domain >= num_slots || slots[domain] < 0 ||
            slots[domain] >= static_cast<std::int64_t>(domains_.size()))
            throw std::out_of_range("no such domain");
        const Domain& spans = domains_[static_cast<std::size_t>(slots[domain])];
        if (sequence < 0 || spans.empty() || sequence >= (spans.back().end - 1) / seq_len)
            throw std::out_of_range("no such sequence");
        const std::int64_t start = sequence * seq_len;
        const auto after = [](std::int64_t at, const Span& span) { return at < span.end; };
        const Span* span = spans.data();
        if (start >= span->end)
            span = &*std::upper_bound(spans.begin(), spans.end(), start, after);
        return {span, start - (span->end - span->length)};
    }

    template <typename Out>
    static void copy(Place place, const unsigned char* next, std::int64_t length, Out* out) {
        for (std::int64_t done = 0; done < length; ++place.span, place.offset = 0) {
            const Span& span = *place.span;
            const std::int64_t num = std::min(length - done, span.length - place.offset);
            span.require(place.offset, num);
            const unsigned char* tokens = span.at(place.offset);
            if (!span.wide)
                widen<std::uint16_t>(tokens, next, num, out + done);
            else if constexpr (sizeof(Out) > 2)
                widen<std::uint32_t>(tokens, next, num, out + done);
            else
                throw std::invalid_argument("uint32 tokens do not fit uint16 rows");
            done += num;
        }
    }

    // A deque keeps its elements in place as it grows; its own index does not, hence the lock.
    std::deque<Domain> domains_;
    mutable std::shared_mutex mutex_;
};

}  // namespace regmix
