// Blocks of a file compared with their checksums, each once, when a row first touches it.
//
// Enters: a descriptor, where the tokens lie, the XXH3_64 of every block of 1 MiB, and a byte of
// state a block, shared with Python. Leaves: nothing, or BlockError. Reads with pread, never
// through a map: a file that was cut is an error here and no signal. Knows no domain and no file
// name.
#pragma once

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include <unistd.h>

#define XXH_INLINE_ALL
#include "third_party/xxhash.h"

namespace regmix {

class BlockCheck;

// A block that is not what was written; `error` is an errno where it could not be read.
struct BlockError : std::runtime_error {
    BlockError(const BlockCheck& of, std::int64_t number, int cause)
        : std::runtime_error("a block of tokens is damaged"), check(&of), block(number),
          error(cause) {}

    const BlockCheck* check;
    std::int64_t block;
    int error;
};

class BlockCheck {
  public:
    using State = std::atomic<std::uint8_t>;  // 0: not checked yet
    static_assert(sizeof(State) == 1, "states are shared with Python as bytes");

    // `num_bytes` of tokens from byte `start` of the file; all of it must outlive the check.
    BlockCheck(int descriptor, std::int64_t start, std::int64_t num_bytes,
               const std::uint64_t* digests, State* states)
        : descriptor_(descriptor), start_(start), num_bytes_(num_bytes), digests_(digests),
          states_(states) {}

    // Returns when the blocks that hold these bytes of the tokens are what was written.
    void require(std::int64_t first, std::int64_t end) const {
        const std::int64_t last = (end - 1) >> kBlockBits;
        for (std::int64_t block = first >> kBlockBits; block <= last; ++block)
            if (states_[block].load(std::memory_order_acquire) == 0) check(block);
    }

    static constexpr int kBlockBits = 20;

  private:
    // Read in pieces that stay in the processor's own cache until they are hashed.
    static constexpr std::size_t kPieceBytes = 1 << 17;

    // Two threads may check a block at the same time: that costs less than a lock.
    [[gnu::noinline]] void check(std::int64_t block) const {
        static thread_local std::vector<unsigned char> piece(kPieceBytes);
        XXH3_state_t digest;
        XXH3_INITSTATE(&digest);
        XXH3_64bits_reset(&digest);
        const std::int64_t begin = block << kBlockBits;
        const std::int64_t end = std::min(begin + (std::int64_t{1} << kBlockBits), num_bytes_);
        for (std::int64_t at = begin; at < end;) {
            const auto wanted = std::min(kPieceBytes, static_cast<std::size_t>(end - at));
            const ssize_t got = pread(descriptor_, piece.data(), wanted, start_ + at);
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) throw BlockError(*this, block, got < 0 ? errno : 0);
            XXH3_64bits_update(&digest, piece.data(), static_cast<std::size_t>(got));
            at += got;
        }
        if (XXH3_64bits_digest(&digest) != digests_[block]) throw BlockError(*this, block, 0);
        states_[block].store(1, std::memory_order_release);
    }

    const int descriptor_;
    const std::int64_t start_, num_bytes_;
    const std::uint64_t* const digests_;
    State* const states_;
};

}  // namespace regmix
