// The consumer's side of the ring buffer (BPF_MAP_TYPE_RINGBUF), mapped into this process.
//
// libbpf has the same, but tells neither how full the ring is nor where a record lies. A position counts bytes since the
// ring was made, so it never repeats. Not thread-safe: one thread consumes.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "eviction.h"

namespace cleanfs {

class EvictionRing {
public:
    using Position = std::uint64_t;

    // Go on where the last consumer stopped. Throws std::system_error. `fd` is the map's and stays the caller's; `size` its number of bytes.
    EvictionRing(int fd, std::size_t size);
    ~EvictionRing();
    EvictionRing(const EvictionRing&) = delete;
    EvictionRing& operator=(const EvictionRing&) = delete;

    int fd() const { return fd_; }
    std::size_t size() const { return size_; }
    // Where the next record will be. Whatever leaves the page cache after this call, in an order that anybody can tell,
    // has this position or a later one.
    Position produced() const { return std::atomic_ref(*producer_).load(std::memory_order_acquire); }
    Position consumed() const { return consumed_; }

    // Call `use(record, position)` for each record until there is none, or none that is complete, or `most` were used.
    // Returns how many.
    template <class Use>
    std::size_t consume(std::size_t most, Use&& use) {
        std::size_t used = 0;
        const Position stop = produced();
        while (consumed_ < stop && used < most) {
            auto* const header = reinterpret_cast<std::uint32_t*>(data_ + (consumed_ & (size_ - 1)));
            const std::uint32_t length = std::atomic_ref(*header).load(std::memory_order_acquire);
            if ((length & busy) != 0) break;
            if ((length & discarded) == 0) {
                use(*reinterpret_cast<const eviction*>(header + 2), consumed_);
                ++used;
            }
            consumed_ += ((length & ~discarded) + 8 + 7) / 8 * 8;
            std::atomic_ref(*consumer_).store(consumed_, std::memory_order_release);
        }
        return used;
    }

private:
    static constexpr std::uint32_t busy = std::uint32_t{1} << 31, discarded = std::uint32_t{1} << 30;  // BPF_RINGBUF_*_BIT

    const int fd_;
    const std::size_t size_;
    std::byte *pages_ = nullptr, *data_ = nullptr;
    std::uint64_t *consumer_ = nullptr, *producer_ = nullptr;
    Position consumed_ = 0;
};

}  // namespace cleanfs
