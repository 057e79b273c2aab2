// The dense allocator: a log of segments, reclaimed whole. Log-structured memory (RAMCloud, FAST '14)
// for entries that may be dropped (Segcache, NSDI '21).
//
// Entries are appended to an open segment, one behind the other, so nothing is lost to size classes.
// The order of the segments is the order of the puts: the oldest segment is the least recently used one.
// A released entry leaves a hole. When room is needed, there are two cases:
//
//  * An eighth or more of some closed segment is holes. Its live entries are copied together with those
//    of other such segments of about its age (*compaction*). That frees the segment, and keeps the
//    entries' place in the order.
//  * Otherwise the oldest segment goes. Entries used since they were stored are copied forward to the
//    young end, up to half a segment, so that each such step frees something. The rest is evicted.
//
// Poor entries (raw pages) have a log of their own, which is evicted first.
//
// One segment is kept in reserve: compaction needs somewhere to copy to before it can free anything.
#pragma once

#include <array>
#include <vector>

#include "allocator.hpp"

namespace zcache {

class LogAllocator final : public Allocator {
public:
    // For pages of `page_size` bytes. Without `checksums`, entry headers have no checksum.
    LogAllocator(Budget& budget, IndexLink& index, std::uint32_t page_size, bool checksums);
    ~LogAllocator() override;

    std::optional<Location> store(const Entry& entry) override;
    Stored load(Location at) const override;
    void release(Location at) override;
    bool reclaim() override;
    std::size_t bytes() const override;
    void resized() override;
    void shrink_tables() override;
    void count(Counts& counts) const override;

private:
    using SegmentId = std::uint32_t;
    static constexpr SegmentId none = ~SegmentId{0};
    static constexpr unsigned buckets = 16;
    static constexpr std::uint8_t no_bucket = 255;
    static constexpr unsigned max_survivors = 8;

    enum Log : std::uint8_t { zpages, raw_pages, logs };

    struct Segment {
        Mapping memory;
        std::uint32_t filled = 0;
        std::uint32_t live_bytes = 0;
        std::uint32_t live = 0;
        Log log = zpages;
        bool open = false;
        std::uint8_t bucket = no_bucket;  // by the share of holes, while closed
        std::uint64_t age = 0;  // number in the order of opening; a survivor has its first source's
        SegmentId older = none, younger = none;
        SegmentId bucket_prev = none, bucket_next = none;
    };

    // Entries begin at multiples of this many bytes.
    static constexpr std::size_t unit = 4;

    Entry entry_at(const Segment& segment, std::uint32_t offset) const;
    Location append(SegmentId id, const Entry& entry);
    bool fits(SegmentId id, std::size_t bytes) const;
    SegmentId new_segment(Log log, std::size_t bytes, SegmentId before, std::size_t at_most);
    Mapping memory_for_segment(std::size_t size);
    void close(SegmentId& open);
    void free_segment(SegmentId id);
    void forget(Segment& segment, std::size_t bytes);
    void mark_hole(const Entry& entry) const;
    std::size_t entry_bytes(std::size_t size) const { return round_up(header_bytes_ + size, unit); }

    bool make_room(Log log);
    bool drop_spare();
    bool reclaim_segment();
    bool compact_one(Log log);
    void compact(SegmentId id);
    bool evict_oldest(Log log);
    template <class Each>
    void for_each_live(SegmentId id, Each&& each);
    SegmentId& survivor_of_age(SegmentId id);
    void reopen(SegmentId& open, Log log, std::size_t bytes, SegmentId before, std::size_t at_most);

    void link_age(SegmentId id, SegmentId before);
    void unlink_age(SegmentId id);
    unsigned bucket_of(const Segment& segment) const;
    void link_bucket(SegmentId id);
    void unlink_bucket(SegmentId id);

    Budget& budget_;
    IndexLink& index_;
    const std::uint32_t page_size_;
    const std::size_t header_bytes_;  // before each entry
    const unsigned size_bits_;  // of an entry's size, which is 1 to page_size
    std::size_t segment_bytes_ = 0;  // at most; a small log has smaller segments
    std::size_t min_segment_bytes_ = 0;
    std::array<std::size_t, logs> log_bytes_{};
    std::vector<Mapping> spares_;  // freed segments, for reuse
    std::size_t spare_bytes_ = 0;
    std::size_t max_spare_bytes_ = 0;

    std::vector<Segment> segments_;
    std::vector<SegmentId> free_ids_;
    std::size_t bytes_ = 0;
    std::size_t live_bytes_ = 0;
    std::uint64_t next_age_ = 0;
    std::array<SegmentId, logs> oldest_{none, none}, youngest_{none, none};
    std::array<SegmentId, logs> open_{none, none};
    std::array<std::array<SegmentId, max_survivors>, logs> survivors_;  // also open, by age
    std::array<std::array<SegmentId, buckets>, logs> bucket_heads_;

    std::uint64_t compacted_segments_ = 0;
    std::uint64_t compacted_bytes_ = 0;
    std::uint64_t evicted_segments_ = 0;
    std::uint64_t spared_entries_ = 0;
};

}  // namespace zcache
