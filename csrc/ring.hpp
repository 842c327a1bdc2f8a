// Batches made ahead of their consumer by a pool of threads, without Python.
//
// Enters: the mixtures of a stack, their dealing at the first step, and one buffer per slot. Leaves:
// the batches of steps `start` to `stop`, in order, each in a slot until the next one is taken.
// Dealing is sequential and cheap, so one thread at a time does it, some steps ahead; gathering is the
// work, and whoever is free takes the next step, a consumer that would have to wait included. The
// bytes do not depend on who did what.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "gather.hpp"
#include "order.hpp"

#if defined(__linux__)
#include <sys/resource.h>
#endif

namespace regmix {

// A mixture from `first_step` on. `fresh` is the dealing that starts it, whose counts are unused:
// a new segment resets deficits, not cursors.
struct Segment {
    std::int64_t first_step;
    std::vector<std::int64_t> table, fresh;
};

// One mixture of a stack and how far it is.
struct Member {
    std::vector<Segment> segments;     // by first step; the first is the one in force
    std::vector<std::int64_t> dealing; // as of the ring's first step
    std::int64_t sequence;             // the first sequence to deal, counted within the segment
    std::uint64_t step_key;
    std::vector<std::int64_t> slots;   // how the gatherer numbers the domains
    std::size_t segment = 0;
};

struct RingShape {
    std::int64_t seq_len, batch_size;
    std::int64_t first_row, num_rows;  // of each batch: the part of one rank
    std::int64_t start, stop;          // steps
    std::int64_t ahead;                // steps that are dealt before they are gathered
};

// Threads wait here for a condition that others make true. Nobody who finds it true takes a lock.
class Gate {
  public:
    template <typename Condition>
    void wait(int spins, Condition&& condition) {
        for (int i = 0; i < spins; ++i) {
            if (condition()) return;
#ifdef REGMIX_X86
            _mm_pause();
#endif
        }
        if (condition()) return;
        std::unique_lock lock(mutex_);
        ++sleepers_;
        while (!condition()) opened_.wait(lock);
        --sleepers_;
    }

    // To be called after the condition was made true by a sequentially consistent store: either this
    // sees the sleeper or the sleeper sees the store.
    void open() {
        if (sleepers_.load() == 0) return;
        std::lock_guard lock(mutex_);
        opened_.notify_all();
    }

  private:
    std::mutex mutex_;
    std::condition_variable opened_;
    std::atomic<int> sleepers_{0};
};

template <typename Out>
class Ring {
  public:
    // `num_threads` gather in the background; where `assist`, the consumer does too while it would
    // have to wait.
    Ring(std::shared_ptr<const Gatherer> gatherer, std::vector<Member> members, RingShape shape,
         std::vector<Out*> buffers, int num_threads, bool assist)
        : gatherer_(std::move(gatherer)), members_(std::move(members)), shape_(shape),
          buffers_(std::move(buffers)), depth_(static_cast<std::int64_t>(buffers_.size())),
          plans_(static_cast<std::size_t>(depth_ + shape.ahead)), complete_(buffers_.size()),
          slot_of_(buffers_.size()),
          writers_(static_cast<std::size_t>(num_threads + (assist ? 1 : 0))), assist_(assist),
          taken_(shape.start), next_(shape.start), dealt_(shape.start) {
        if (depth_ < 2) throw std::invalid_argument("a ring has at least two slots");
        const std::size_t rows = members_.size() * static_cast<std::size_t>(shape_.batch_size);
        for (Plan& plan : plans_) {
            plan.domains.resize(rows);
            plan.sequences.resize(rows);
        }
        for (std::int64_t slot = 0; slot < depth_; ++slot) writer_of(slot).slots.push_back(slot);
        // Waking a thread takes longer than making a small batch, but a thread that spins where all
        // processors are busy keeps another from working.
        const auto processors = static_cast<int>(std::thread::hardware_concurrency());
        spins_ = num_threads < processors ? kSpins : 0;
        try {
            for (int number = 0; number < num_threads; ++number)
                threads_.emplace_back([this, number] { work(writers_[number]); });
        } catch (...) {  // the system has no more threads
            close();
            throw;
        }
    }

    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;
    ~Ring() { close(); }

    // The slot of the next step, or -1 after the last. The slot taken before is free again. For one
    // consumer: calls may not overlap.
    std::int64_t take() {
        if (held_ >= 0) {
            Writer& writer = writer_of(std::exchange(held_, -1));
            writer.released.store(writer.released.load() + 1);
            taken_.store(taken_.load() + 1);
            room_.open();
        }
        const std::int64_t step = taken_.load();
        if (step >= shape_.stop) return -1;
        while (!closed_.load() && !is_complete(step))
            if (!assist_ || !make_one(writers_.back())) wait_for(step);
        if (closed_.load()) {
            std::lock_guard lock(deal_mutex_);
            if (failure_) std::rethrow_exception(failure_);
            throw std::logic_error("the ring is closed");
        }
        held_ = slot_of_[index(step)];
        return held_;
    }

    // Steps whose rows were asked of the system before they were gathered, so far.
    std::int64_t num_read_ahead() const { return num_read_ahead_.load(); }

    void close() {
        closed_.store(true);
        room_.open();
        ready_.open();
        for (std::thread& thread : threads_)
            if (thread.joinable()) thread.join();
    }

  private:
    // Alone on its line: whoever writes another does not make this one's readers wait.
    struct alignas(kLineBytes) OwnLine {
        std::atomic<std::int64_t> value{-1};
    };

    // Who gathers: a thread or the consumer. Everyone writes slots of his own, which stay in the
    // cache of his processor: a buffer that two processors write by turns costs twice.
    struct alignas(kLineBytes) Writer {
        std::atomic<std::int64_t> released{0};  // by the consumer
        std::int64_t claimed = 0, page_reads = 0;
        std::vector<std::int64_t> slots;

        bool has_room() const {
            return claimed - released.load() < static_cast<std::int64_t>(slots.size());
        }
    };

    struct Plan {
        std::vector<std::int64_t> domains, sequences;  // [P x B]
    };

    static constexpr int kSpins = 1000;
    static constexpr std::chrono::microseconds kSlowRow{4};
    // Steps that are read ahead after one had to wait for the disk.
    static constexpr std::int64_t kColdSteps = 256;

    std::size_t index(std::int64_t step) const { return static_cast<std::size_t>(step % depth_); }

    bool is_complete(std::int64_t step) const {
        return complete_[index(step)].value.load() == step;
    }

    Writer& writer_of(std::int64_t slot) {
        return writers_[static_cast<std::size_t>(slot) % writers_.size()];
    }

    Plan& plan(std::int64_t step) {
        return plans_[static_cast<std::size_t>(step % static_cast<std::int64_t>(plans_.size()))];
    }

    void wait_for(std::int64_t step) {
        // A consumer that only waits sleeps until half of the ring is full.
        const std::int64_t half = assist_ ? 1 : depth_ / 2;
        const std::int64_t last = std::min(step + half, shape_.stop) - 1;
        wanted_first_.store(step);
        wanted_last_.store(last);
        ready_.wait(spins_, [&] {
            return closed_.load() || (is_complete(step) && is_complete(last));
        });
    }

    // Makes the next step that nobody has begun; false where there is none or no slot for it.
    bool make_one(Writer& writer) {
        if (!writer.has_room()) return false;
        std::int64_t step = next_.load();
        do {
            if (step >= shape_.stop) return false;
        } while (!next_.compare_exchange_weak(step, step + 1));
        const auto number = static_cast<std::size_t>(writer.claimed++);
        const std::int64_t slot = writer.slots[number % writer.slots.size()];
        try {
            // Half of what can be known ahead at a time, so that the lock is seldom taken.
            if (dealt_.load() <= step + shape_.ahead / 2) deal_ahead(step);
            if (closed_.load()) return false;
            if (gather(step, slot, writer.page_reads)) cold_until_.store(step + kColdSteps);
        } catch (...) {
            std::lock_guard lock(deal_mutex_);
            fail(std::current_exception());
            return false;
        }
        slot_of_[index(step)] = slot;
        complete_[index(step)].value.store(step);
        if (step == wanted_first_.load() || step == wanted_last_.load()) ready_.open();
        return true;
    }

    void deal(std::int64_t step) {
        Plan& rows = plan(step);
        const std::int64_t size = shape_.batch_size;
        std::int64_t first = 0;
        for (Member& member : members_) {
            while (member.segment + 1 < member.segments.size() &&
                   member.segments[member.segment + 1].first_step <= step)
                begin(member, ++member.segment);
            const auto num = static_cast<std::int64_t>(member.slots.size());
            const Table table(member.segments[member.segment].table.data(), num);
            Dealing dealing(member.dealing.data(), num);
            const std::uint64_t key =
                mix(member.step_key + static_cast<std::uint64_t>(step) * kGolden);
            order(table, dealing, member.sequence, key, size, rows.domains.data() + first,
                  rows.sequences.data() + first);
            member.sequence += size;
            first += size;
        }
    }

    static void begin(Member& member, std::size_t segment) {
        const std::size_t num = member.slots.size();  // the counts, the first row, go on
        const std::vector<std::int64_t>& fresh = member.segments[segment].fresh;
        std::copy(fresh.begin() + static_cast<std::ptrdiff_t>(num), fresh.end(),
                  member.dealing.begin() + static_cast<std::ptrdiff_t>(num));
        member.sequence = 1;
    }

    void work(Writer& writer) {
        writer.page_reads = page_reads();
        while (!closed_.load() && next_.load() < shape_.stop)
            if (!make_one(writer))
                room_.wait(0, [&] {
                    return closed_.load() || next_.load() >= shape_.stop || writer.has_room();
                });
    }

    // With the lock held: whoever deals next must not go on from what failed half-way.
    void fail(std::exception_ptr failure) {
        if (!failure_) failure_ = std::move(failure);
        closed_.store(true);
        ready_.open();
        room_.open();
    }

    void deal_ahead(std::int64_t step) {
        std::lock_guard lock(deal_mutex_);
        if (closed_.load()) return;
        try {
            deal_until(step);
        } catch (...) {
            fail(std::current_exception());
        }
    }

    void deal_until(std::int64_t step) {
        const std::int64_t end = std::min(shape_.stop, step + 1 + shape_.ahead);
        std::int64_t dealt = dealt_.load();
        while (dealt < end) {
            deal(dealt);
            dealt_.store(++dealt);
        }
        for (advised_ = std::max(advised_, step + 1);
             step < cold_until_.load() && advised_ < dealt; ++advised_)
            advise(advised_);
    }

    template <typename Each>
    void each_member(std::int64_t step, Each&& each) {
        const Plan& rows = plan(step);
        std::int64_t row = shape_.first_row, out = 0;
        for (const Member& member : members_) {
            each(member, rows.domains.data() + row, rows.sequences.data() + row, out);
            row += shape_.batch_size;
            out += shape_.num_rows * (shape_.seq_len + 1);
        }
    }

    void advise(std::int64_t step) {
        each_member(step, [&](const Member& member, const std::int64_t* domains,
                              const std::int64_t* sequences, std::int64_t) {
            gatherer_->read_ahead(member.slots.data(),
                                  static_cast<std::int64_t>(member.slots.size()), domains,
                                  sequences, shape_.num_rows, shape_.seq_len);
        });
        num_read_ahead_.fetch_add(1);
    }

    // Returns whether a page had to come from the disk. To ask the system costs as much as a row, so
    // it is asked only after a step that took longer than memory does.
    bool gather(std::int64_t step, std::int64_t slot, std::int64_t& page_reads_before) {
        const auto begun = std::chrono::steady_clock::now();
        Out* out = buffers_[static_cast<std::size_t>(slot)];
        each_member(step, [&](const Member& member, const std::int64_t* domains,
                              const std::int64_t* sequences, std::int64_t offset) {
            gatherer_->fill(member.slots.data(), static_cast<std::int64_t>(member.slots.size()),
                            domains, sequences, shape_.num_rows, shape_.seq_len, out + offset);
        });
        const auto limit = kSlowRow * shape_.num_rows * static_cast<std::int64_t>(members_.size());
        if (std::chrono::steady_clock::now() - begun < limit) return false;
        const std::int64_t before = std::exchange(page_reads_before, page_reads());
        return page_reads_before > before;
    }

    static std::int64_t page_reads() {
#if defined(__linux__) && defined(RUSAGE_THREAD)
        rusage usage{};
        getrusage(RUSAGE_THREAD, &usage);
        return usage.ru_inblock;  // page faults and the reads of block checks alike
#else
        return 0;
#endif
    }

    std::shared_ptr<const Gatherer> gatherer_;
    std::vector<Member> members_;
    const RingShape shape_;
    std::vector<Out*> buffers_;
    const std::int64_t depth_;
    std::vector<Plan> plans_;
    std::vector<OwnLine> complete_;       // of `depth` steps under way, the one that is complete
    std::vector<std::int64_t> slot_of_;   // and its slot
    std::vector<Writer> writers_;         // the threads, then the consumer
    const bool assist_;

    int spins_ = 0;
    alignas(kLineBytes) Gate room_;
    alignas(kLineBytes) Gate ready_;

    // Written by the consumer: the first step not given back, and those it waits for.
    alignas(kLineBytes) std::atomic<std::int64_t> taken_;
    std::atomic<std::int64_t> wanted_first_{-1}, wanted_last_{-1};
    std::int64_t held_ = -1;  // the slot that it has

    // Written by all: the first step not begun, not dealt, and how long to read ahead.
    alignas(kLineBytes) std::atomic<std::int64_t> next_;
    std::atomic<std::int64_t> dealt_;
    std::atomic<std::int64_t> cold_until_{0}, num_read_ahead_{0};
    std::atomic<bool> closed_{false};

    std::mutex deal_mutex_;  // of the members, the plans not dealt, and these two
    std::int64_t advised_ = 0;
    std::exception_ptr failure_;
    std::vector<std::thread> threads_;
};

}  // namespace regmix
