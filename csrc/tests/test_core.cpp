// The C++ core against naive versions of itself, without Python: see tests/test_native.py.
//
// `test_core` runs all checks and ends with 0, or names the first that failed. `test_core race` and
// `test_core overrun` do what a sanitizer must report, which shows that it looks at this code.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gather.hpp"
#include "order.hpp"
#include "ring.hpp"

namespace {

using regmix::Isa;
using Ints = std::vector<std::int64_t>;
using Wide = __int128;

constexpr std::int64_t kSum = std::int64_t{1} << 50;
constexpr std::int64_t kNever = INT64_MAX;

#define CHECK(condition)                                                             \
    do {                                                                             \
        if (!(condition)) {                                                          \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);     \
            std::exit(1);                                                            \
        }                                                                            \
    } while (false)

std::mt19937_64 random_bits(20261122);

// A number in [least, most].
std::int64_t any(std::int64_t least, std::int64_t most) {
    return std::uniform_int_distribution<std::int64_t>(least, most)(random_bits);
}

std::vector<Isa> all_isas() {
    std::vector<Isa> found;
    for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512})
        if (regmix::set_isa(isa) == isa) found.push_back(isa);
    regmix::set_isa(regmix::best_isa());
    return found;
}

template <typename Error, typename Act>
bool throws(Act&& act) {
    try {
        act();
    } catch (const Error&) {
        return true;
    }
    return false;
}

// --- tables and dealings, from their definition ---

// Weights of one kind of five: equal, random, one that takes nearly all, tiny ones, some zero.
Ints any_weights(std::int64_t num, int kind) {
    Ints weights(static_cast<std::size_t>(num), kSum / num);
    for (auto& weight : weights) {
        if (kind == 1) weight = 1 + any(0, 2 * kSum / num - 2);
        if (kind == 2) weight = any(1, 3);
        if (kind == 3) weight = any(0, 1) ? kSum / num : any(1, 1000);
        if (kind == 4) weight = any(0, 1) ? kSum / num : 0;
    }
    std::int64_t spare = kSum;
    for (auto& weight : weights) {
        if (weight > spare) weight = spare;
        spare -= weight;
    }
    weights[static_cast<std::size_t>(any(0, num - 1))] += spare;
    return weights;
}

struct Mixture {
    Ints table, fresh;
    std::int64_t num;

    regmix::Table rows() const { return {table.data(), num}; }
};

Ints dealing_at(const Ints& weights, const Ints& counts) {
    const std::size_t num = weights.size();
    std::int64_t positive = 0;
    for (const auto weight : weights) positive += weight > 0;
    const std::int64_t halves = 2 * (positive - 1);
    const std::int64_t early = halves ? (kSum + halves - 1) / halves : 0;
    const std::int64_t late = halves ? kSum / halves : 0;
    Ints dealing(5 * num, 0);
    for (std::size_t d = 0; d < num; ++d) {
        dealing[d] = counts[d];
        dealing[num + d] = dealing[3 * num + d] = kNever;
        if (weights[d] == 0) continue;
        const Wide targets[] = {Wide{counts[d]} * kSum + early, Wide{counts[d] + 1} * kSum - late};
        for (std::size_t i = 0; i < 2; ++i) {
            const Wide time = (targets[i] + weights[d] - 1) / weights[d];
            dealing[(1 + 2 * i) * num + d] = static_cast<std::int64_t>(time);
            dealing[(2 + 2 * i) * num + d] =
                static_cast<std::int64_t>(time * weights[d] - targets[i]);
        }
    }
    return dealing;
}

Mixture make_mixture(const Ints& weights, const Ints& sizes, const Ints& pools) {
    const std::size_t num = weights.size();
    Mixture mixture{Ints(6 * num), dealing_at(weights, Ints(num, 0)),
                    static_cast<std::int64_t>(num)};
    for (std::size_t d = 0; d < num; ++d) {
        const std::int64_t weight = std::max<std::int64_t>(weights[d], 1);
        const std::int64_t rows[] = {weights[d], kSum / weight, kSum % weight, sizes[d], pools[d],
                                     static_cast<std::int64_t>(d * 0x9E3779B97F4A7C15ULL + 1)};
        for (std::size_t row = 0; row < 6; ++row) mixture.table[row * num + d] = rows[row];
    }
    return mixture;
}

Mixture any_mixture(std::int64_t num, int kind) {
    const Ints ones(static_cast<std::size_t>(num), 1);
    return make_mixture(any_weights(num, kind), ones, ones);
}

// --- order ---

void test_every_prefix_is_within_one_sequence() {
    for (const std::int64_t num : {1, 2, 3, 7, 8, 9, 17, 64, 65, 1000}) {
        for (int kind = 0; kind < 5; ++kind) {
            const Mixture mixture = any_mixture(num, kind);
            const Ints weights(mixture.table.begin(), mixture.table.begin() + num);
            std::int64_t positive = 0;
            for (const auto weight : weights) positive += weight > 0;
            const std::int64_t bound = positive > 1 ? kSum - kSum / (2 * (positive - 1)) : 0;
            Ints rows = mixture.fresh;
            regmix::Dealing dealing(rows.data(), num);
            for (std::int64_t i = 1; i <= 1500; ++i) {
                regmix::deal_one(mixture.rows(), dealing, i);
                if (num == 1000 && i % 7 != 0) continue;
                for (std::int64_t d = 0; d < num; ++d) {
                    const Wide error = Wide{dealing.count[d]} * kSum - Wide{weights[d]} * i;
                    CHECK(error <= bound && -error <= bound);
                }
            }
            CHECK(rows == dealing_at(weights, Ints(rows.begin(), rows.begin() + num)));
        }
    }
}

void test_a_dealing_that_fits_no_sequence_throws() {
    const Mixture mixture = any_mixture(5, 0);
    Ints rows = mixture.fresh;
    std::fill(rows.begin() + 5, rows.begin() + 10, kNever);
    regmix::Dealing dealing(rows.data(), 5);
    for (const Isa isa : all_isas()) {
        regmix::set_isa(isa);
        CHECK(throws<std::logic_error>([&] { regmix::advance(mixture.rows(), dealing, 1, 1); }));
    }
}

void test_permute_is_a_bijection() {
    for (std::uint64_t size = 1; size <= 300 || size == 100'003; ++size) {
        std::vector<bool> seen(size, false);
        const std::uint64_t key = random_bits();
        for (std::uint64_t index = 0; index < size; ++index) {
            const std::uint64_t image = regmix::permute(index, size, key);
            CHECK(image < size && !seen[image]);
            seen[image] = true;
        }
        if (size == 300) size = 100'002;
    }
    const std::uint64_t large = (1ULL << 40) + 1;
    std::vector<std::uint64_t> images;
    for (std::uint64_t index = 0; index < 2000; ++index)
        images.push_back(regmix::permute(index * 549'755'813, large, 7));
    std::sort(images.begin(), images.end());
    CHECK(images.back() < large);
    CHECK(std::adjacent_find(images.begin(), images.end()) == images.end());
}

std::int64_t place_naive(const regmix::Table& table, std::int64_t d, std::int64_t ordinal) {
    const auto size = static_cast<std::uint64_t>(table.size[d]);
    const auto pool = static_cast<std::uint64_t>(table.pool[d]);
    const auto key = static_cast<std::uint64_t>(table.key[d]);
    const std::uint64_t epoch = static_cast<std::uint64_t>(ordinal) / pool;
    std::uint64_t within = static_cast<std::uint64_t>(ordinal) % pool;
    const std::uint64_t epoch_key = regmix::mix(key + epoch * regmix::kGolden);
    if (pool == size) return static_cast<std::int64_t>(regmix::permute(within, size, epoch_key));
    if (epoch > 0) within = regmix::permute(within, pool, epoch_key);
    return static_cast<std::int64_t>(regmix::permute(within, size, regmix::mix(key)));
}

Mixture any_sized_mixture(std::int64_t num, std::int64_t most) {
    Ints sizes, pools;
    for (std::int64_t d = 0; d < num; ++d) {
        sizes.push_back(any(1, most));
        pools.push_back(any(0, 1) ? sizes.back() : any(1, sizes.back()));
    }
    return make_mixture(any_weights(num, 1), sizes, pools);
}

void test_place_is_permute_one_by_one() {
    for (int round = 0; round < 100; ++round) {
        const std::int64_t num = any(1, 20);
        const Mixture mixture = any_sized_mixture(num, round % 2 ? 5000 : 9);
        Ints domains, ordinals, expected;
        for (std::int64_t i = any(0, 200); i > 0; --i) {
            domains.push_back(any(0, num - 1));
            ordinals.push_back(any(0, 20'000));
            expected.push_back(place_naive(mixture.rows(), domains.back(), ordinals.back()));
        }
        regmix::place(mixture.rows(), domains.data(), ordinals.data(),
                      static_cast<std::int64_t>(domains.size()));
        CHECK(ordinals == expected);
    }
}

void test_choose_is_the_same_for_all_instructions() {
    const std::vector<Isa> isas = all_isas();
    for (int round = 0; round < 20'000; ++round) {
        const std::int64_t num = any(0, 40), range = any(1, 6);
        Ints release, deadline;
        for (std::int64_t d = 0; d < num; ++d) {
            release.push_back(any(0, 9) ? any(0, range) : kNever);
            deadline.push_back(release.back() == kNever ? kNever : any(0, range));
        }
        const std::int64_t now = any(0, range);
        const std::int64_t expected =
            regmix::choose_scalar(release.data(), deadline.data(), num, now);
        for (const Isa isa : isas) {
            regmix::set_isa(isa);
            CHECK(regmix::choose(release.data(), deadline.data(), num, now) == expected);
        }
    }
}

// --- tokens ---

template <typename In, typename Out>
void check_widen(const std::vector<Isa>& isas) {
    for (std::size_t length = 0; length <= 200; ++length) {
        for (const std::size_t from : {0, 1, 5, 31}) {
            for (const std::size_t to : {0, 1, 2, 7, 16, 31}) {
                std::vector<In> in(from + length);
                for (In& token : in) token = static_cast<In>(random_bits());
                for (const Isa isa : isas) {
                    regmix::set_isa(isa);
                    std::vector<Out> out(to + length, Out{77});
                    regmix::widen<In>(in.data() + from,
                                      reinterpret_cast<const unsigned char*>(in.data()),
                                      static_cast<std::int64_t>(length), out.data() + to);
                    for (std::size_t i = 0; i < to; ++i) CHECK(out[i] == 77);
                    for (std::size_t i = 0; i < length; ++i)
                        CHECK(out[to + i] == static_cast<Out>(in[from + i]));
                }
            }
        }
    }
}

void test_widen_is_a_conversion_at_every_length_and_place() {
    const std::vector<Isa> isas = all_isas();
    check_widen<std::uint16_t, std::uint16_t>(isas);
    check_widen<std::uint16_t, std::int32_t>(isas);
    check_widen<std::uint16_t, std::int64_t>(isas);
    check_widen<std::uint32_t, std::int32_t>(isas);
    check_widen<std::uint32_t, std::int64_t>(isas);
}

// Domains in files of random lengths, as memory of exactly their size, and as one list of tokens.
struct Corpus {
    std::shared_ptr<regmix::Gatherer> gatherer = std::make_shared<regmix::Gatherer>();
    std::vector<std::vector<std::uint32_t>> tokens;
    std::vector<std::unique_ptr<std::uint16_t[]>> narrow;
    std::vector<std::unique_ptr<std::uint32_t[]>> wide;
    Ints sizes, slots;
    std::int64_t seq_len;

    Corpus(std::int64_t num_domains, std::int64_t length, bool any_wide) : seq_len(length) {
        for (std::int64_t d = 0; d < num_domains; ++d) {
            slots.push_back(add(any(1, 6), any_wide));
            sizes.push_back((static_cast<std::int64_t>(tokens.back().size()) - 1) / length);
        }
    }

    std::int64_t add(std::int64_t num_files, bool any_wide) {
        regmix::Domain spans;
        std::vector<std::uint32_t> all;
        for (std::int64_t file = 0; file < num_files; ++file) {
            // The last makes sure that there is one sequence.
            const auto size = static_cast<std::size_t>(
                any(0, 70) + (file == num_files - 1 ? seq_len + 1 : 0));
            const bool is_wide = any_wide && any(0, 1);
            narrow.emplace_back(is_wide ? nullptr : new std::uint16_t[size]);
            wide.emplace_back(is_wide ? new std::uint32_t[size] : nullptr);
            for (std::size_t i = 0; i < size; ++i) {
                all.push_back(static_cast<std::uint32_t>(any(0, is_wide ? INT32_MAX : UINT16_MAX)));
                if (is_wide) wide.back()[i] = all.back();
                else narrow.back()[i] = static_cast<std::uint16_t>(all.back());
            }
            const void* data = is_wide ? static_cast<void*>(wide.back().get()) : narrow.back().get();
            spans.push_back({data, is_wide, static_cast<std::int64_t>(size),
                             static_cast<std::int64_t>(all.size())});
        }
        tokens.push_back(std::move(all));
        return gatherer->add(std::move(spans));
    }

    template <typename Out>
    bool holds(const Out* row, std::int64_t domain, std::int64_t sequence) const {
        const std::uint32_t* start =
            tokens[static_cast<std::size_t>(domain)].data() + sequence * seq_len;
        for (std::int64_t i = 0; i <= seq_len; ++i)
            if (row[i] != static_cast<Out>(start[i])) return false;
        return true;
    }
};

template <typename Out>
void check_gather(const std::vector<Isa>& isas) {
    for (int round = 0; round < 150; ++round) {
        const std::int64_t num_domains = any(1, 4), num = any(0, 20);
        const Corpus corpus(num_domains, any(1, 130), sizeof(Out) > 2);
        Ints domains, sequences;
        for (std::int64_t row = 0; row < num; ++row) {
            domains.push_back(any(0, num_domains - 1));
            sequences.push_back(any(0, corpus.sizes[static_cast<std::size_t>(domains.back())] - 1));
        }
        const std::int64_t length = corpus.seq_len + 1;
        for (const Isa isa : isas) {
            regmix::set_isa(isa);
            std::vector<Out> out(static_cast<std::size_t>(num * length));
            corpus.gatherer->fill(corpus.slots.data(), num_domains, domains.data(),
                                  sequences.data(), num, corpus.seq_len, out.data());
            for (std::int64_t row = 0; row < num; ++row)
                CHECK(corpus.holds(out.data() + row * length,
                                   domains[static_cast<std::size_t>(row)],
                                   sequences[static_cast<std::size_t>(row)]));
        }
        corpus.gatherer->read_ahead(corpus.slots.data(), num_domains, domains.data(),
                                    sequences.data(), num, corpus.seq_len);
    }
}

void test_gather_is_the_tokens_across_files() {
    check_gather<std::uint16_t>(all_isas());
    check_gather<std::int32_t>(all_isas());
    check_gather<std::int64_t>(all_isas());
}

void test_gather_refuses_what_is_not_there() {
    const Corpus corpus(2, 8, true);
    std::vector<std::int64_t> out(9);
    const auto fill = [&](std::int64_t domain, std::int64_t sequence) {
        corpus.gatherer->fill(corpus.slots.data(), 2, &domain, &sequence, 1, 8, out.data());
    };
    fill(0, corpus.sizes[0] - 1);
    CHECK(throws<std::out_of_range>([&] { fill(0, corpus.sizes[0]); }));
    CHECK(throws<std::out_of_range>([&] { fill(0, -1); }));
    CHECK(throws<std::out_of_range>([&] { fill(2, 0); }));
    CHECK(throws<std::out_of_range>([&] { fill(-1, 0); }));
    const std::uint32_t large[9] = {70'000};
    const std::int64_t zero = 0, slot = corpus.gatherer->add({{large, true, 9, 9}});
    std::vector<std::uint16_t> narrow(9);
    CHECK(throws<std::invalid_argument>(
        [&] { corpus.gatherer->fill(&slot, 1, &zero, &zero, 1, 8, narrow.data()); }));
}

// --- the check of blocks ---

// A file of tokens with its checksums; `read` is what a map of it shows.
struct Stored {
    static constexpr std::int64_t kStart = 4096;
    std::vector<unsigned char> read;
    std::vector<std::uint64_t> digests;
    std::vector<regmix::BlockCheck::State> states;
    std::FILE* file = std::tmpfile();
    std::unique_ptr<regmix::BlockCheck> check;

    explicit Stored(std::int64_t num_bytes)
        : read(static_cast<std::size_t>(num_bytes)),
          states(static_cast<std::size_t>((num_bytes + kBlock - 1) / kBlock)) {
        for (auto& byte : read) byte = static_cast<unsigned char>(random_bits());
        for (std::int64_t at = 0; at < num_bytes; at += kBlock) {
            const auto size = static_cast<std::size_t>(std::min(kBlock, num_bytes - at));
            digests.push_back(XXH3_64bits(read.data() + at, size));
        }
        CHECK(file != nullptr);
        write(0, read.data(), read.size());
        check = std::make_unique<regmix::BlockCheck>(fileno(file), kStart, num_bytes,
                                                     digests.data(), states.data());
    }

    Stored(const Stored&) = delete;
    Stored& operator=(const Stored&) = delete;
    ~Stored() { std::fclose(file); }

    void write(std::int64_t at, const unsigned char* bytes, std::size_t num) const {
        CHECK(pwrite(fileno(file), bytes, num, kStart + at) == static_cast<ssize_t>(num));
    }

    void flip(std::int64_t at) const {
        const auto changed = static_cast<unsigned char>(read[static_cast<std::size_t>(at)] ^ 16);
        write(at, &changed, 1);
    }

    regmix::Span span(bool wide, std::int64_t before) const {
        const auto length = static_cast<std::int64_t>(read.size()) / (wide ? 4 : 2);
        return {read.data(), wide, length, before + length, check.get()};
    }

    static constexpr std::int64_t kBlock = std::int64_t{1} << 20;
};

// What `fill` says of a row of 1000 tokens and a label: the damaged block, or -1.
std::int64_t damaged_block(const regmix::Gatherer& gatherer, std::int64_t slot, std::int64_t row,
                           std::vector<std::int64_t>& out) {
    const std::int64_t zero = 0;
    try {
        gatherer.fill(&slot, 1, &zero, &row, 1, 1000, out.data());
    } catch (const regmix::BlockError& error) {
        return error.block;
    }
    return -1;
}

void test_no_token_of_a_damaged_block_is_copied() {
    const Stored narrow(2 * Stored::kBlock + 777'776), wide(Stored::kBlock + 44'444);
    const std::int64_t first = static_cast<std::int64_t>(narrow.read.size()) / 2;
    narrow.flip(2 * Stored::kBlock);  // the first byte of a block that is short
    wide.flip(Stored::kBlock - 1);
    regmix::Gatherer gatherer;
    const std::int64_t slot = gatherer.add({narrow.span(false, 0), wide.span(true, first)});
    const std::int64_t rows = (first + static_cast<std::int64_t>(wide.read.size()) / 4 - 1) / 1000;
    for (std::int64_t row = 0; row < rows; ++row) {
        std::vector<std::int64_t> out(1001, -1);
        const std::int64_t begin = row * 1000, end = begin + 1001;
        // Two blocks of 2-byte tokens, one of 4-byte tokens.
        const bool hits_narrow = begin < first && end > Stored::kBlock;
        const bool hits_wide = end > first && begin < first + Stored::kBlock / 4;
        const std::int64_t expected = hits_narrow ? 2 : hits_wide ? 0 : -1;
        CHECK(damaged_block(gatherer, slot, row, out) == expected);
        if (hits_narrow) CHECK(out[0] == -1);
        if (expected == -1) CHECK(std::count(out.begin(), out.end(), -1) == 0);
    }
    CHECK(narrow.states[0].load() == 1 && narrow.states[1].load() == 1);
    CHECK(narrow.states[2].load() == 0 && wide.states[0].load() == 0);
    CHECK(wide.states[1].load() == 1);
}

void test_a_cut_file_is_an_error() {
    const Stored stored(Stored::kBlock + 10'000);
    regmix::Gatherer gatherer;
    const std::int64_t slot = gatherer.add({stored.span(false, 0)});
    CHECK(ftruncate(fileno(stored.file), Stored::kStart + Stored::kBlock + 9'999) == 0);
    std::vector<std::int64_t> out(1001, -1);
    CHECK(damaged_block(gatherer, slot, 0, out) == -1);
    CHECK(damaged_block(gatherer, slot, 524, out) == 1);
}

void test_threads_check_blocks_side_by_side() {
    const Stored stored(2 * Stored::kBlock);
    regmix::Gatherer gatherer;
    const std::int64_t slot = gatherer.add({stored.span(false, 0)});
    std::atomic<int> found{0};
    std::vector<std::thread> threads;
    for (int number = 0; number < 3; ++number)
        threads.emplace_back([&] {
            std::vector<std::int64_t> out(1001);
            for (std::int64_t row = 0; row < 1048; ++row)
                found += damaged_block(gatherer, slot, row, out) == -1;
        });
    for (auto& thread : threads) thread.join();
    CHECK(found == 3 * 1048);
}

// --- the ring ---

struct Run {
    regmix::RingShape shape;
    std::vector<regmix::Member> members;
};

Run any_run(const Corpus& corpus) {
    const std::int64_t batch_size = any(1, 9), first_row = any(0, batch_size - 1);
    const std::int64_t start = any(0, 1) ? 0 : any(0, 50), num = any(0, 40);
    Run run{{corpus.seq_len, batch_size, first_row, any(1, batch_size - first_row), start,
             start + num, any(0, 12)},
            {}};
    for (std::int64_t p = any(1, 3); p > 0; --p) {
        regmix::Member member{{}, {}, 1, random_bits(), corpus.slots};
        const auto num_domains = static_cast<std::int64_t>(corpus.slots.size());
        for (std::int64_t first = start; first <= start + num; first += any(1, 15)) {
            const Mixture mixture =
                make_mixture(any_weights(num_domains, static_cast<int>(any(0, 4))), corpus.sizes,
                             corpus.sizes);
            member.segments.push_back({first, mixture.table, mixture.fresh});
            if (any(0, 2) == 0) break;
        }
        member.dealing = member.segments.front().fresh;
        run.members.push_back(std::move(member));
    }
    return run;
}

// The domain and sequence of every row of a step, dealt for all steps in order.
void order_naive(regmix::Member& member, std::int64_t step, Ints& domains, Ints& sequences) {
    const auto num_domains = static_cast<std::int64_t>(member.slots.size());
    const std::size_t next = member.segment + 1;
    if (next < member.segments.size() && member.segments[next].first_step == step) {
        const Ints counts(member.dealing.begin(), member.dealing.begin() + num_domains);
        member.dealing = member.segments[next].fresh;
        std::copy(counts.begin(), counts.end(), member.dealing.begin());
        member.segment = next;
        member.sequence = 1;
    }
    const regmix::Table table(member.segments[member.segment].table.data(), num_domains);
    regmix::Dealing dealing(member.dealing.data(), num_domains);
    for (std::size_t row = 0; row < domains.size(); ++row) {
        const std::int64_t d = regmix::deal_one(table, dealing, member.sequence++);
        domains[row] = d;
        sequences[row] = place_naive(table, d, dealing.count[d] - 1);
    }
    const std::uint64_t key =
        regmix::mix(member.step_key + static_cast<std::uint64_t>(step) * regmix::kGolden);
    for (std::size_t row = domains.size() - 1; row > 0; --row) {
        const std::uint64_t draw = regmix::mix(key + row * regmix::kGolden) >> 32;
        const std::size_t other = (draw * (row + 1)) >> 32;
        std::swap(domains[row], domains[other]);
        std::swap(sequences[row], sequences[other]);
    }
}

template <typename Out>
struct Buffers {
    std::vector<std::vector<Out>> arrays;

    Buffers(const Run& run, std::int64_t depth)
        : arrays(static_cast<std::size_t>(depth),
                 std::vector<Out>(run.members.size() *
                                  static_cast<std::size_t>(run.shape.num_rows *
                                                           (run.shape.seq_len + 1)))) {}

    std::vector<Out*> pointers() {
        std::vector<Out*> all;
        for (auto& array : arrays) all.push_back(array.data());
        return all;
    }
};

// Takes batches until the end, or closes early; checks every token on the way.
template <typename Out>
void check_ring(int threads, std::int64_t depth, bool to_the_end) {
    Corpus corpus(any(1, 4), any(1, 40), sizeof(Out) > 2);
    const Run run = any_run(corpus);
    std::vector<regmix::Member> members = run.members;
    Buffers<Out> buffers(run, depth);
    regmix::Ring<Out> ring(corpus.gatherer, run.members, run.shape, buffers.pointers(), threads, threads % 2 == 0);
    const std::int64_t stop =
        to_the_end ? run.shape.stop : run.shape.start + any(0, run.shape.stop - run.shape.start);
    Ints domains(static_cast<std::size_t>(run.shape.batch_size)), sequences(domains);
    std::int64_t slot = 0;
    for (std::int64_t step = run.shape.start; step < stop; ++step) {
        slot = ring.take();
        CHECK(slot >= 0 && slot < depth);
        if (step % 8 == 0) corpus.add(1, false);  // domains come while others are read
        const Out* row = buffers.arrays[static_cast<std::size_t>(slot)].data();
        for (regmix::Member& member : members) {
            order_naive(member, step, domains, sequences);
            for (std::int64_t r = 0; r < run.shape.num_rows; ++r, row += corpus.seq_len + 1) {
                const auto from = static_cast<std::size_t>(run.shape.first_row + r);
                CHECK(corpus.holds(row, domains[from], sequences[from]));
            }
        }
    }
    if (to_the_end) CHECK(ring.take() == -1 && ring.take() == -1);
    if (stop == run.shape.start || to_the_end) return;
    const std::vector<Out>& taken = buffers.arrays[static_cast<std::size_t>(slot)];
    const std::vector<Out> before = taken;
    for (std::int64_t times = any(1, 2); times > 0; --times) ring.close();
    CHECK(taken == before);
}

void test_rings_of_any_shape_give_order_and_fill() {
    for (int round = 0; round < 160; ++round) {
        const int threads = 1 + round % 4;
        const bool to_the_end = round % 3 > 0;
        if (round % 2) check_ring<std::int32_t>(threads, any(2, 9), to_the_end);
        else check_ring<std::uint16_t>(threads, any(2, 9), to_the_end);
    }
}

void test_a_failure_in_a_thread_reaches_the_consumer() {
    for (int threads = 1; threads <= 4; ++threads) {
        const Corpus corpus(2, 8, false);
        Run run = any_run(corpus);
        run.shape.stop = run.shape.start + 30;
        if (threads % 2) run.members[0].slots[0] = run.members[0].slots[1] = 99;
        else std::fill(run.members[0].dealing.begin() + 2, run.members[0].dealing.end(), kNever);
        Buffers<std::int64_t> buffers(run, 3);
        regmix::Ring<std::int64_t> ring(corpus.gatherer, run.members, run.shape,
                                        buffers.pointers(), threads, threads % 2 == 0);
        const auto take_all = [&] { while (ring.take() >= 0) {} };
        if (threads % 2) CHECK(throws<std::out_of_range>(take_all));
        else CHECK(throws<std::logic_error>(take_all));
    }
}

void test_a_closed_ring_gives_nothing() {
    const Corpus corpus(2, 8, false);
    Run run = any_run(corpus);
    run.shape.stop = run.shape.start + 30;
    Buffers<std::int64_t> buffers(run, 2);
    regmix::Ring<std::int64_t> ring(corpus.gatherer, run.members, run.shape, buffers.pointers(), 2, true);
    ring.take();
    ring.close();
    CHECK(throws<std::logic_error>([&] { ring.take(); }));
}

// Writes into buffers that the threads of a ring are filling: for a sanitizer to report.
void make_a_race() {
    const Corpus corpus(2, 40, false);
    Run run = any_run(corpus);
    run.shape.stop = run.shape.start + 2000;
    Buffers<std::int64_t> buffers(run, 4);
    regmix::Ring<std::int64_t> ring(corpus.gatherer, run.members, run.shape, buffers.pointers(), 2, true);
    while (ring.take() >= 0)
        for (auto& array : buffers.arrays) array[0] = 1;
}

// Reads one sequence more than a file holds: for a sanitizer to report.
void make_an_overrun() {
    const std::unique_ptr<std::uint16_t[]> tokens(new std::uint16_t[50]());
    regmix::Gatherer gatherer;
    const std::int64_t zero = 0, beyond = 1, slot = gatherer.add({{tokens.get(), false, 99, 99}});
    std::vector<std::int64_t> out(41);
    gatherer.fill(&slot, 1, &zero, &beyond, 1, 40, out.data());
}

}  // namespace

int main(int count, char** words) {
    const std::string word = count > 1 ? words[1] : "";
    if (word == "race") return make_a_race(), 0;
    if (word == "overrun") return make_an_overrun(), 0;
    test_every_prefix_is_within_one_sequence();
    test_a_dealing_that_fits_no_sequence_throws();
    test_permute_is_a_bijection();
    test_place_is_permute_one_by_one();
    test_choose_is_the_same_for_all_instructions();
    test_widen_is_a_conversion_at_every_length_and_place();
    test_gather_is_the_tokens_across_files();
    test_gather_refuses_what_is_not_there();
    test_no_token_of_a_damaged_block_is_copied();
    test_a_cut_file_is_an_error();
    test_threads_check_blocks_side_by_side();
    test_rings_of_any_shape_give_order_and_fill();
    test_a_failure_in_a_thread_reaches_the_consumer();
    test_a_closed_ring_gives_nothing();
    std::puts("all checks passed");
    return 0;
}
