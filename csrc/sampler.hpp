// The data order and the gathering of tokens, without Python.
//
// Enters: the table and the dealing of regmix/data/order.py, and pointers to tokens. Leaves: domain
// and sequence of every row of a batch, and its tokens as int64. order.py says what every step
// means and must give the same bytes; a change here is a change there and a new kOrderVersion.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

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

// The image of an index in [0, size) under the permutation of that size and key.
inline std::uint64_t permute(std::uint64_t index, std::uint64_t size, std::uint64_t key) {
    unsigned bits = 0;
    while ((1ULL << bits) < size) ++bits;
    const unsigned left_bits = bits / 2, right_bits = bits - left_bits;
    const std::uint64_t left_mask = (1ULL << left_bits) - 1, right_mask = (1ULL << right_bits) - 1;
    const int rounds = bits < kSmallBits ? kSmallRounds : kRounds;
    do {
        std::uint64_t left = index >> right_bits, right = index & right_mask, round_key = key;
        for (int round = 0; round < rounds; round += 2) {
            left ^= mix((round_key += kGolden) + right) & left_mask;
            right ^= mix((round_key += kGolden) + left) & right_mask;
        }
        index = (left << right_bits) | right;
    } while (index >= size);
    return index;
}

// Both targets of a domain move by 2^50 = period * weight + remainder: no division is needed.
inline void postpone(std::int64_t& time, std::int64_t& slack, std::int64_t weight,
                     std::int64_t period, std::int64_t remainder) {
    const std::int64_t late = remainder > slack;
    time += period + late;
    slack += late * weight - remainder;
}

// Tijdeman's rule: among the released domains, the earliest deadline; ties by index.
inline std::int64_t deal_one(const Table& table, Dealing& dealing, std::int64_t now) {
    std::int64_t best = -1, best_deadline = INT64_MAX;
    for (std::int64_t d = 0; d < table.num_domains; ++d) {
        if (dealing.release[d] <= now && dealing.deadline[d] < best_deadline) {
            best = d;
            best_deadline = dealing.deadline[d];
        }
    }
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

// The sequence that a domain gives when `ordinal` of it were dealt before.
inline std::int64_t place(const Table& table, std::int64_t d, std::int64_t ordinal) {
    const auto size = static_cast<std::uint64_t>(table.size[d]);
    const auto pool = static_cast<std::uint64_t>(table.pool[d]);
    const auto key = static_cast<std::uint64_t>(table.key[d]);
    const std::uint64_t epoch = static_cast<std::uint64_t>(ordinal) / pool;
    std::uint64_t within = static_cast<std::uint64_t>(ordinal) % pool;
    const std::uint64_t epoch_key = mix(key + epoch * kGolden);
    if (pool == size) return static_cast<std::int64_t>(permute(within, size, epoch_key));
    if (epoch > 0) within = permute(within, pool, epoch_key);
    return static_cast<std::int64_t>(permute(within, size, mix(key)));
}

// Deals one step of `num` sequences from sequence `first` on, in batch order.
inline void order(const Table& table, Dealing& dealing, std::int64_t first, std::uint64_t step_key,
                  std::int64_t num, std::int64_t* domains, std::int64_t* sequences) {
    for (std::int64_t position = 0; position < num; ++position) {
        const std::int64_t d = deal_one(table, dealing, first + position);
        domains[position] = d;
        sequences[position] = place(table, d, dealing.count[d] - 1);
    }
    for (std::int64_t row = num - 1; row > 0; --row) {
        const std::uint64_t draw = mix(step_key + static_cast<std::uint64_t>(row) * kGolden) >> 32;
        const std::uint64_t other = (draw * static_cast<std::uint64_t>(row + 1)) >> 32;
        std::swap(domains[row], domains[other]);
        std::swap(sequences[row], sequences[other]);
    }
}

// The tokens of one file, and where they end among the tokens of their domain.
struct Span {
    const void* tokens;
    bool wide;  // uint32 where true, uint16 where false
    std::int64_t length, end;
};

template <typename Token>
inline void widen(const void* tokens, std::int64_t offset, std::int64_t num, std::int64_t* out) {
    const Token* source = static_cast<const Token*>(tokens) + offset;
    for (std::int64_t i = 0; i < num; ++i) out[i] = source[i];
}

// Copies sequences of `seq_len` tokens and the label of the last into rows of a batch.
class Gatherer {
  public:
    Gatherer(std::vector<std::vector<Span>> domains, std::int64_t seq_len)
        : domains_(std::move(domains)), seq_len_(seq_len) {}

    std::int64_t length() const { return seq_len_ + 1; }

    void fill(const std::int64_t* domains, const std::int64_t* sequences, std::int64_t num,
              std::int64_t* out) const {
        for (std::int64_t row = 0; row < num; ++row, out += length()) {
            if (domains[row] < 0 || domains[row] >= static_cast<std::int64_t>(domains_.size()))
                throw std::out_of_range("no such domain");
            copy(domains_[domains[row]], sequences[row], out);
        }
    }

  private:
    void copy(const std::vector<Span>& spans, std::int64_t sequence, std::int64_t* out) const {
        const std::int64_t start = sequence * seq_len_, stop = start + length();
        if (sequence < 0 || spans.empty() || stop > spans.back().end)
            throw std::out_of_range("no such sequence");
        auto span = std::upper_bound(spans.begin(), spans.end(), start,
                                     [](std::int64_t at, const Span& s) { return at < s.end; });
        for (std::int64_t at = start; at < stop; ++span) {
            const std::int64_t offset = at - (span->end - span->length);
            const std::int64_t num = std::min(stop, span->end) - at;
            if (span->wide)
                widen<std::uint32_t>(span->tokens, offset, num, out);
            else
                widen<std::uint16_t>(span->tokens, offset, num, out);
            out += num;
            at += num;
        }
    }

    std::vector<std::vector<Span>> domains_;
    std::int64_t seq_len_;
};

}  // namespace regmix
