// The data order, without Python.
//
// Enters: the table and the dealing of regmix/data/sampling/order.py. Leaves: domain and sequence of every
// row of a batch. Reads no token. order.py says what every step means and must give the same
// bytes; a change here is a change there and a new kOrderVersion.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <utility>

#include "isa.hpp"

namespace regmix {

constexpr int kOrderVersion = 1;
// A permutation of few elements needs many rounds; order.py has the numbers.
constexpr int kRounds = 8, kSmallRounds = 24;
constexpr unsigned kSmallBits = 8;
constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15ULL;

// What does not change during a run: rows of an int64 [6, D] array.
struct Table {
    std::int64_t num_domains;
    const std::int64_t *weight, *period, *remainder, *size, *pool, *key;

    static constexpr std::int64_t kRows = 6;
    Table(const std::int64_t* rows, std::int64_t d)
        : num_domains(d), weight(rows), period(rows + d), remainder(rows + 2 * d),
          size(rows + 3 * d), pool(rows + 4 * d), key(rows + 5 * d) {}
};

// What one dealt sequence changes, in its own domain only: rows of an int64 [5, D] array.
struct Dealing {
    std::int64_t *count, *release, *release_slack, *deadline, *deadline_slack;

    static constexpr std::int64_t kRows = 5;
    Dealing(std::int64_t* rows, std::int64_t d)
        : count(rows), release(rows + d), release_slack(rows + 2 * d), deadline(rows + 3 * d),
          deadline_slack(rows + 4 * d) {}
};

inline std::uint64_t mix(std::uint64_t value) {
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ULL;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBULL;
    return value ^ (value >> 31);
}

inline unsigned bit_length(std::uint64_t value) {
#if defined(__GNUC__)
    return value == 0 ? 0 : 64 - static_cast<unsigned>(__builtin_clzll(value));
#else
    unsigned bits = 0;
    while (value >> bits) ++bits;
    return bits;
#endif
}

// One pass of the Feistel network over the smallest power of two that holds `size`.
inline std::uint64_t network(std::uint64_t index, std::uint64_t size, std::uint64_t key) {
    const unsigned bits = bit_length(size - 1);
    const unsigned left_bits = bits / 2, right_bits = bits - left_bits;
    const std::uint64_t left_mask = (1ULL << left_bits) - 1, right_mask = (1ULL << right_bits) - 1;
    const int rounds = bits < kSmallBits ? kSmallRounds : kRounds;
    std::uint64_t left = index >> right_bits, right = index & right_mask;
    for (int round = 0; round < rounds; round += 2) {
        left ^= mix((key += kGolden) + right) & left_mask;
        right ^= mix((key += kGolden) + left) & right_mask;
    }
    return (left << right_bits) | right;
}

// The image of an index in [0, size) under the permutation of that size and key.
inline std::uint64_t permute(std::uint64_t index, std::uint64_t size, std::uint64_t key) {
    do index = network(index, size, key);
    while (index >= size);
    return index;
}

// Both targets of a domain move by 2^50 = period * weight + remainder: no division is needed.
inline void postpone(std::int64_t& time, std::int64_t& slack, std::int64_t weight,
                     std::int64_t period, std::int64_t remainder) {
    const std::int64_t late = remainder > slack;
    time += period + late;
    slack += late * weight - remainder;
}

// Tijdeman's rule: among the released domains, the earliest deadline; ties by index; -1 if none.
inline std::int64_t choose_scalar(const std::int64_t* release, const std::int64_t* deadline,
                                  std::int64_t num, std::int64_t now) {
    std::int64_t best = -1, earliest = INT64_MAX;
    for (std::int64_t d = 0; d < num; ++d) {
        if (release[d] <= now && deadline[d] < earliest) {
            best = d;
            earliest = deadline[d];
        }
    }
    return best;
}

#ifdef REGMIX_X86
// Every lane keeps its earliest deadline and the first index that had it.
REGMIX_TARGET_AVX2 inline std::int64_t choose_avx2(const std::int64_t* release,
                                                   const std::int64_t* deadline, std::int64_t num,
                                                   std::int64_t now) {
    const __m256i limit = _mm256_set1_epi64x(now), four = _mm256_set1_epi64x(4);
    __m256i earliest = _mm256_set1_epi64x(INT64_MAX), best = _mm256_set1_epi64x(-1);
    __m256i index = _mm256_set_epi64x(3, 2, 1, 0);
    std::int64_t d = 0;
    for (; d + 4 <= num; d += 4, index = _mm256_add_epi64(index, four)) {
        const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(release + d));
        const __m256i until = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(deadline + d));
        const __m256i better = _mm256_andnot_si256(_mm256_cmpgt_epi64(from, limit),
                                                   _mm256_cmpgt_epi64(earliest, until));
        earliest = _mm256_blendv_epi8(earliest, until, better);
        best = _mm256_blendv_epi8(best, index, better);
    }
    alignas(32) std::int64_t times[4], indices[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(times), earliest);
    _mm256_store_si256(reinterpret_cast<__m256i*>(indices), best);
    std::int64_t chosen = -1, time = INT64_MAX;
    for (int lane = 0; lane < 4; ++lane) {
        if (times[lane] < time || (times[lane] == time && indices[lane] < chosen)) {
            time = times[lane];
            chosen = indices[lane];
        }
    }
    for (; d < num; ++d) {
        if (release[d] <= now && deadline[d] < time) {
            time = deadline[d];
            chosen = d;
        }
    }
    return chosen;
}

REGMIX_TARGET_AVX512 inline std::int64_t choose_avx512(const std::int64_t* release,
                                                       const std::int64_t* deadline,
                                                       std::int64_t num, std::int64_t now) {
    const __m512i limit = _mm512_set1_epi64(now), eight = _mm512_set1_epi64(8);
    __m512i earliest = _mm512_set1_epi64(INT64_MAX), best = _mm512_set1_epi64(-1);
    __m512i index = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    for (std::int64_t d = 0; d < num; d += 8, index = _mm512_add_epi64(index, eight)) {
        const __mmask8 lanes = num - d >= 8 ? 0xFF : static_cast<__mmask8>((1 << (num - d)) - 1);
        const __m512i from = _mm512_maskz_loadu_epi64(lanes, release + d);
        const __mmask8 released = _mm512_mask_cmple_epi64_mask(lanes, from, limit);
        const __m512i until = _mm512_maskz_loadu_epi64(released, deadline + d);
        const __mmask8 better = _mm512_mask_cmplt_epi64_mask(released, until, earliest);
        earliest = _mm512_mask_mov_epi64(earliest, better, until);
        best = _mm512_mask_mov_epi64(best, better, index);
    }
    const std::int64_t time = _mm512_reduce_min_epi64(earliest);
    if (time == INT64_MAX) return -1;
    const __mmask8 first = _mm512_cmpeq_epi64_mask(earliest, _mm512_set1_epi64(time));
    return _mm512_mask_reduce_min_epi64(first, best);
}
#endif

inline std::int64_t choose(const std::int64_t* release, const std::int64_t* deadline,
                           std::int64_t num, std::int64_t now) {
#ifdef REGMIX_X86
    if (isa() == Isa::avx512) return choose_avx512(release, deadline, num, now);
    if (isa() == Isa::avx2) return choose_avx2(release, deadline, num, now);
#endif
    return choose_scalar(release, deadline, num, now);
}

inline std::int64_t deal_one(const Table& table, Dealing& dealing, std::int64_t now) {
    const std::int64_t best = choose(dealing.release, dealing.deadline, table.num_domains, now);
    if (best < 0) throw std::logic_error("no domain is released: the dealing does not fit `first`");
    ++dealing.count[best];
    postpone(dealing.release[best], dealing.release_slack[best], table.weight[best],
             table.period[best], table.remainder[best]);
    postpone(dealing.deadline[best], dealing.deadline_slack[best], table.weight[best],
             table.period[best], table.remainder[best]);
    return best;
}

inline void advance(const Table& table, Dealing& dealing, std::int64_t first, std::int64_t num) {
    for (std::int64_t now = first; now < first + num; ++now) deal_one(table, dealing, now);
}

// The sequences that domains give, where `ordinals` of each were dealt before. The images that fall
// outside are walked on together: a branch for each would be mispredicted every third time.
inline void place(const Table& table, const std::int64_t* domains, std::int64_t* ordinals,
                  std::int64_t num) {
    constexpr std::int64_t kChunk = 64;
    std::uint64_t index[kChunk], size[kChunk], key[kChunk];
    std::int64_t walking[kChunk];
    for (std::int64_t start = 0; start < num; start += kChunk) {
        const std::int64_t length = num - start < kChunk ? num - start : kChunk;
        for (std::int64_t i = 0; i < length; ++i) {
            const std::int64_t d = domains[start + i];
            const auto pool = static_cast<std::uint64_t>(table.pool[d]);
            const auto own_key = static_cast<std::uint64_t>(table.key[d]);
            std::uint64_t epoch = 0, within = static_cast<std::uint64_t>(ordinals[start + i]);
            if (within >= pool) {  // a division costs as much as a third of the permutation
                epoch = within / pool;
                within %= pool;
            }
            size[i] = static_cast<std::uint64_t>(table.size[d]);
            key[i] = mix(own_key + (pool == size[i] ? epoch : 0) * kGolden);
            if (pool != size[i] && epoch > 0)
                within = permute(within, pool, mix(own_key + epoch * kGolden));
            index[i] = within;
            walking[i] = i;
        }
        for (std::int64_t left = length; left > 0;) {
            for (std::int64_t w = 0; w < left; ++w) {
                const std::int64_t i = walking[w];
                index[i] = network(index[i], size[i], key[i]);
            }
            std::int64_t outside = 0;
            for (std::int64_t w = 0; w < left; ++w) {
                const std::int64_t i = walking[w];
                walking[outside] = i;
                outside += index[i] >= size[i];
            }
            left = outside;
        }
        for (std::int64_t i = 0; i < length; ++i)
            ordinals[start + i] = static_cast<std::int64_t>(index[i]);
    }
}

// Deals one step of `num` sequences from sequence `first` on, in batch order.
inline void order(const Table& table, Dealing& dealing, std::int64_t first, std::uint64_t step_key,
                  std::int64_t num, std::int64_t* domains, std::int64_t* sequences) {
    for (std::int64_t position = 0; position < num; ++position) {
        const std::int64_t d = deal_one(table, dealing, first + position);
        domains[position] = d;
        sequences[position] = dealing.count[d] - 1;
    }
    place(table, domains, sequences, num);
    for (std::int64_t row = num - 1; row > 0; --row) {
        const std::uint64_t draw = mix(step_key + static_cast<std::uint64_t>(row) * kGolden) >> 32;
        const std::uint64_t other = (draw * static_cast<std::uint64_t>(row + 1)) >> 32;
        std::swap(domains[row], domains[other]);
        std::swap(sequences[row], sequences[other]);
    }
}

}  // namespace regmix
