// Put the pages that the kernel evicts from its page cache of the mount.
//
// A page is what a read of the mount would have returned at the moment of its eviction. It is put if that is still so.
// The order of events is the order of the ring (EvictionRing). Its present position is noted
//
//   for a file     when its pages are flushed, here and in the pool, and when its source is about to be read: what was
//                  evicted before may be older (FileState::evictions_after);
//   for a node     when the kernel has dropped its pages or the inode: until then it may have old ones, and evict them.
//                  While the kernel has yet to do so the node is held, and nothing of it is put.
//
// Before either is noted the ring is drained, for the pages that stay valid. On trio's thread, as all that it reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>

#include "eviction_ring.hpp"
#include "inode_state.hpp"
#include "state.hpp"

namespace cleanfs {

class EvictedPages {
public:
    struct Counters {
        std::uint64_t put = 0;
        std::uint64_t kept = 0;       // the pool had the page already
        std::uint64_t unknown = 0;    // of a file of which nothing is known
        std::uint64_t stale = 0;      // flushed since, or the kernel has yet to drop it
        std::uint64_t past_end = 0;   // of the file, as it is known here or in the kernel
        std::uint64_t refused = 0;    // there is no pool, or it failed
        std::uint64_t high_water = 0; // bytes in the ring
    };

    // All must outlive this object, and any caches that `table` was given to.
    EvictedPages(EvictionRing& ring, const InodeStates& inodes, CacheState& caches);

    const Evictions& table() const { return table_; }
    const Counters& counters() const { return counters_; }
    // Nodes with a hold, or of which old pages may be in the ring.
    std::size_t held_nodes() const { return holds_.size(); }

    // Put up to `most` pages that wait. Returns how many records there were.
    std::size_t drain(std::size_t most) noexcept;
    // From now on the kernel may evict old pages of the node. Counted: as many `release` end it.
    void hold(std::uint64_t node);
    // It will not any more.
    void release(std::uint64_t node);
    // The kernel has forgotten the node; another file may get the number.
    void forget(std::uint64_t node);

private:
    using Position = EvictionRing::Position;
    static constexpr std::size_t many = 2048;  // the most records that a request waits for: some milliseconds

    struct Hold {
        std::uint32_t holders = 0;
        Position until = 0;  // older pages are not put
    };

    void use(const eviction& page, Position position);
    bool is_held(std::uint64_t node, Position position) const;
    void drop_older(std::uint64_t node);
    bool is_empty() const { return ring_.consumed() == ring_.produced(); }

    EvictionRing& ring_;
    const InodeStates& inodes_;
    CacheState& caches_;
    Evictions table_;
    std::unordered_map<std::uint64_t, Hold> holds_;  // by node
    std::size_t max_holds_ = many;                   // beyond, those without effect go
    Counters counters_;
};

}  // namespace cleanfs
