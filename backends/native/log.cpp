#include "log.hpp"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstddef>
#include <cstring>
#include <new>
#include <utility>

namespace zcache {

namespace {

constexpr std::size_t min_segment = 64 << 10;
constexpr std::size_t max_segment = 2 << 20;

// Segments that the limit has room for. There are many, so that a reserve of one and an eviction of one are
// small steps, but not too many for the kernel's limit of mappings.
constexpr std::size_t segments_per_limit = 512;

// The least number of segments of a log that is not small: the segment being filled is mostly empty.
constexpr std::size_t segments_per_log = 64;

// A segment has room for at least this many uncompressed pages, so that its unused end is small.
constexpr std::size_t pages_per_segment = 8;

// Part of the limit that freed segments may take, so that pages that come and go need no system calls.
constexpr std::size_t spare_divisor = 16;

// The most freed segments that are kept; their table is allocated in advance.
constexpr std::size_t max_spares = std::size_t{1} << 20;

// A closed segment is worth compacting from this bucket on: an eighth of it is holes. To gain an eighth,
// seven eighths are copied: seven short copies for each page put, beside compressing it.
constexpr unsigned worth_compacting = 2;

// A location is the number of a segment and an offset in it.
constexpr unsigned offset_bits = 24;
static_assert(pages_per_segment * max_page_size < std::size_t{1} << offset_bits);
static_assert(max_segment < std::size_t{1} << offset_bits);

Location location(std::uint32_t segment, std::uint32_t offset) {
    return static_cast<Location>(segment) << offset_bits | offset;
}
std::uint32_t segment_of(Location at) { return static_cast<std::uint32_t>(at >> offset_bits); }
std::uint32_t offset_of(Location at) {
    return static_cast<std::uint32_t>(at & ((Location{1} << offset_bits) - 1));
}

// Stands before each entry, packed. Index and size share one word: index < 2^63 / page size and
// size <= page size fit exactly. The checksum is there if checksums are on.
struct Header {
    std::uint64_t index_and_size = 0;
    FileId file = no_file;  // no_file: a hole
    std::uint32_t checksum = 0;
};

constexpr std::size_t checksum_bytes = sizeof(Header::checksum);
static_assert(sizeof(Header) == 16 && offsetof(Header, checksum) == 12);

}  // namespace

LogAllocator::LogAllocator(Budget& budget, IndexLink& index, std::uint32_t page_size, bool checksums)
    : budget_(budget),
      index_(index),
      page_size_(page_size),
      header_bytes_(sizeof(Header) - (checksums ? 0 : checksum_bytes)),
      size_bits_(static_cast<unsigned>(std::bit_width(page_size))) {
    for (auto& of_log : survivors_) of_log.fill(none);
    for (auto& of_log : bucket_heads_) of_log.fill(none);
    resized();
}

LogAllocator::~LogAllocator() = default;

void LogAllocator::resized() {
    std::size_t wanted = std::bit_floor(std::max<std::size_t>(budget_.limit / segments_per_limit, 1));
    segment_bytes_ = std::clamp(wanted, min_segment, max_segment);
    segment_bytes_ = std::max<std::size_t>(segment_bytes_, pages_per_segment * page_size_);
    // Where the limit is small for such pages, four segments of at least one page each.
    std::size_t quarter = budget_.limit / 4 & ~std::size_t{4095};
    std::size_t least = round_up(entry_bytes(page_size_), 4096);
    segment_bytes_ = std::max(least, std::min(segment_bytes_, quarter));
    min_segment_bytes_ = std::min(segment_bytes_, std::max<std::size_t>(min_segment, pages_per_segment * page_size_));
    while (drop_spare()) {
    }
    std::size_t spare_bytes = std::max(budget_.limit / spare_divisor, segment_bytes_);
    try {  // free_segment must not fail: it keeps no more spares than this capacity
        spares_.reserve(std::min(spare_bytes / min_segment_bytes_, max_spares));
    } catch (const std::bad_alloc&) {
    }
    max_spare_bytes_ = spare_bytes;
}

void LogAllocator::shrink_tables() {
    while (!segments_.empty() && !segments_.back().memory) segments_.pop_back();
    std::erase_if(free_ids_, [&](SegmentId id) { return id >= segments_.size(); });
    segments_.shrink_to_fit();
}

// Give a segment that holds nothing back to the system.
bool LogAllocator::drop_spare() {
    if (spares_.empty()) return false;
    bytes_ -= spares_.back().size();
    spare_bytes_ -= spares_.back().size();
    spares_.pop_back();
    return true;
}

std::size_t LogAllocator::bytes() const { return bytes_; }

// -- entries ------------------------------------------------------------------------------------

Entry LogAllocator::entry_at(const Segment& segment, std::uint32_t offset) const {
    Header header;
    std::memcpy(&header, segment.memory.data() + offset, header_bytes_);
    std::size_t size = header.index_and_size & ((std::uint64_t{1} << size_bits_) - 1);
    return {.owner = {header.file, header.index_and_size >> size_bits_},
            .checksum = header.checksum,
            .bytes = {segment.memory.data() + offset + header_bytes_, size},
            .poor = segment.log == raw_pages};
}

bool LogAllocator::fits(SegmentId id, std::size_t bytes) const {
    return id != none && segments_[id].filled + bytes <= segments_[id].memory.size();
}

Location LogAllocator::append(SegmentId id, const Entry& entry) {
    Segment& segment = segments_[id];
    std::uint32_t offset = segment.filled;
    Header header{entry.owner.index << size_bits_ | entry.bytes.size(), entry.owner.file, entry.checksum};
    std::byte* at = segment.memory.data() + offset;
    std::memcpy(at, &header, header_bytes_);
    std::memcpy(at + header_bytes_, entry.bytes.data(), entry.bytes.size());
    auto taken = static_cast<std::uint32_t>(entry_bytes(entry.bytes.size()));
    segment.filled += taken;
    segment.live_bytes += taken;
    ++segment.live;
    live_bytes_ += taken;
    return location(id, offset);
}

Stored LogAllocator::load(Location at) const {
    Entry entry = entry_at(segments_[segment_of(at)], offset_of(at));
    return {entry.owner, entry.checksum, entry.bytes};
}

// An entry of `bytes` is no longer live in the segment.
void LogAllocator::forget(Segment& segment, std::size_t bytes) {
    segment.live_bytes -= static_cast<std::uint32_t>(bytes);
    --segment.live;
    live_bytes_ -= bytes;
}

void LogAllocator::mark_hole(const Entry& entry) const {
    std::byte* header = const_cast<std::byte*>(entry.bytes.data()) - header_bytes_;
    std::memcpy(header + offsetof(Header, file), &no_file, sizeof no_file);
}

void LogAllocator::release(Location at) {
    SegmentId id = segment_of(at);
    Segment& segment = segments_[id];
    Entry entry = entry_at(segment, offset_of(at));
    assert(entry.owner.file != no_file);
    mark_hole(entry);
    forget(segment, entry_bytes(entry.bytes.size()));
    if (segment.open) return;
    if (segment.live == 0) {
        free_segment(id);
    } else if (bucket_of(segment) != segment.bucket) {
        unlink_bucket(id);
        link_bucket(id);
    }
}

std::optional<Location> LogAllocator::store(const Entry& entry) {
    Log log = entry.poor ? raw_pages : zpages;
    std::size_t need = entry_bytes(entry.bytes.size());
    if (!fits(open_[log], need)) {
        close(open_[log]);
        if (!make_room(log)) return std::nullopt;
        // Making room may have opened one already, to copy used entries forward.
        if (!fits(open_[log], need)) reopen(open_[log], log, need, none, segment_bytes_);
    }
    return append(open_[log], entry);
}

// -- room -----------------------------------------------------------------------------------------

// Make room for one more segment beside the reserve, evicting if needed. Spares count as room.
bool LogAllocator::make_room(Log log) {
    auto has_room = [this](std::size_t segments) {
        return budget_.used - spare_bytes_ + segments * segment_bytes_ <= budget_.limit;
    };
    while (!has_room(2)) {
        if (log == raw_pages) {  // raw pages displace only raw pages
            if (!compact_one(raw_pages) && !evict_oldest(raw_pages)) return false;
            continue;
        }
        if (index_.reclaim_elsewhere(*this)) continue;
        if (!reclaim_segment()) return has_room(1);
    }
    return true;
}

bool LogAllocator::reclaim() {
    return drop_spare() || reclaim_segment();
}

bool LogAllocator::reclaim_segment() {
    return compact_one(raw_pages) || evict_oldest(raw_pages) || compact_one(zpages) ||
           evict_oldest(zpages);
}

bool LogAllocator::compact_one(Log log) {
    for (unsigned bucket = buckets; bucket-- > worth_compacting;) {
        if (bucket_heads_[log][bucket] == none) continue;
        compact(bucket_heads_[log][bucket]);
        return true;
    }
    return false;
}

void LogAllocator::compact(SegmentId id) {
    ++compacted_segments_;
    SegmentId& survivor = survivor_of_age(id);
    Log log = segments_[id].log;
    for_each_live(id, [&](const Entry& entry) {
        std::size_t need = entry_bytes(entry.bytes.size());
        if (!fits(survivor, need)) {
            reopen(survivor, log, need, id, segments_[id].memory.size());
            segments_[survivor].age = segments_[id].age;
        }
        Location to = append(survivor, entry);
        forget(segments_[id], need);
        index_.moved(entry.owner, to);
        compacted_bytes_ += need;
    });
    free_segment(id);
}

// The open segment for entries copied from segments of about that age.
LogAllocator::SegmentId& LogAllocator::survivor_of_age(SegmentId id) {
    const Segment& segment = segments_[id];
    std::uint64_t first = segments_[oldest_[segment.log]].age;
    std::uint64_t age = std::max(segment.age, first) - first;
    // With few segments, the survivors need no order, and there is no room for several open segments.
    std::uint64_t classes =
        std::clamp<std::uint64_t>((segments_.size() - free_ids_.size()) / 32, 1, max_survivors);
    return survivors_[segment.log][std::min(age * classes / (next_age_ - first), classes - 1)];
}

bool LogAllocator::evict_oldest(Log log) {
    SegmentId id = oldest_[log];
    if (id == none) return false;
    if (segments_[id].open) {  // the next store opens another
        if (open_[log] == id) open_[log] = none;
        std::replace(survivors_[log].begin(), survivors_[log].end(), id, none);
        segments_[id].open = false;
        link_bucket(id);
    }
    ++evicted_segments_;
    bool alone = id == youngest_[log];
    std::size_t spare_room = alone ? 0 : segments_[id].memory.size() / 2;
    for_each_live(id, [&](const Entry& entry) {
        std::size_t need = entry_bytes(entry.bytes.size());
        if (need <= spare_room && index_.take_referenced(entry.owner)) {
            if (!fits(open_[log], need)) reopen(open_[log], log, need, none, segments_[id].memory.size());
            Location to = append(open_[log], entry);
            index_.moved(entry.owner, to);
            spare_room -= need;
            ++spared_entries_;
        } else {
            index_.evicted(entry.owner, entry.bytes.size(), entry.poor);
        }
        forget(segments_[id], need);
    });
    free_segment(id);
    return true;
}

// Call `each` for every live entry. It must move or evict the entry, or throw before it has done so.
template <class Each>
void LogAllocator::for_each_live(SegmentId id, Each&& each) {
    for (std::uint32_t offset = 0; offset < segments_[id].filled;) {
        Entry entry = entry_at(segments_[id], offset);
        offset += static_cast<std::uint32_t>(entry_bytes(entry.bytes.size()));
        if (entry.owner.file == no_file) continue;
        each(entry);
        mark_hole(entry);  // at once: if the next call throws, the segment stays
    }
}

// -- segments -------------------------------------------------------------------------------------

// Open a segment with room for an entry, just older than `before`, or at the young end. A caller that
// frees a segment by copying opens none that is larger than it (`at_most`).
LogAllocator::SegmentId LogAllocator::new_segment(Log log, std::size_t bytes, SegmentId before,
                                                  std::size_t at_most) {
    std::size_t share = std::min(std::bit_floor(log_bytes_[log] / segments_per_log), at_most);
    std::size_t size = std::max(std::clamp(share, min_segment_bytes_, segment_bytes_), round_up(bytes, 4096));
    if (free_ids_.empty()) {
        segments_.emplace_back();
        free_ids_.reserve(segments_.capacity());
        free_ids_.push_back(static_cast<SegmentId>(segments_.size() - 1));
    }
    Mapping memory = memory_for_segment(size);
    SegmentId id = free_ids_.back();
    free_ids_.pop_back();
    Segment& segment = segments_[id];
    segment = Segment{};
    segment.memory = std::move(memory);
    segment.log = log;
    segment.open = true;
    segment.age = next_age_++;
    log_bytes_[log] += size;
    link_age(id, before);
    return id;
}

// A spare of that size, or new memory; other spares are dropped if there is no room beside them.
Mapping LogAllocator::memory_for_segment(std::size_t size) {
    auto spare = std::find_if(spares_.rbegin(), spares_.rend(), [size](const Mapping& m) { return m.size() == size; });
    if (spare != spares_.rend()) {
        std::swap(*spare, spares_.back());
        Mapping memory = std::move(spares_.back());
        spares_.pop_back();
        spare_bytes_ -= size;
        return memory;
    }
    while (!budget_.has_room(size) && drop_spare()) {
    }
    Mapping memory = Mapping::populated(budget_, size);
    bytes_ += size;
    return memory;
}

// Close the segment, if there is one, and open another with room for an entry.
void LogAllocator::reopen(SegmentId& open, Log log, std::size_t bytes, SegmentId before, std::size_t at_most) {
    close(open);
    open = new_segment(log, bytes, before, at_most);
}

void LogAllocator::close(SegmentId& open) {
    SegmentId id = std::exchange(open, none);
    if (id == none) return;
    segments_[id].open = false;
    if (segments_[id].live == 0) free_segment(id);
    else link_bucket(id);
}

void LogAllocator::free_segment(SegmentId id) {
    Segment& segment = segments_[id];
    if (segment.bucket != no_bucket) unlink_bucket(id);
    unlink_age(id);
    Mapping memory = std::move(segment.memory);
    log_bytes_[segment.log] -= memory.size();
    segment = Segment{};
    free_ids_.push_back(id);
    if (spare_bytes_ + memory.size() <= max_spare_bytes_ && spares_.size() < spares_.capacity()) {
        spare_bytes_ += memory.size();
        spares_.push_back(std::move(memory));
    } else {
        bytes_ -= memory.size();
    }
}

void LogAllocator::link_age(SegmentId id, SegmentId before) {
    Segment& segment = segments_[id];
    Log log = segment.log;
    segment.younger = before;
    segment.older = before == none ? youngest_[log] : segments_[before].older;
    (segment.older == none ? oldest_[log] : segments_[segment.older].younger) = id;
    (segment.younger == none ? youngest_[log] : segments_[segment.younger].older) = id;
}

void LogAllocator::unlink_age(SegmentId id) {
    Segment& segment = segments_[id];
    Log log = segment.log;
    (segment.older == none ? oldest_[log] : segments_[segment.older].younger) = segment.younger;
    (segment.younger == none ? youngest_[log] : segments_[segment.younger].older) = segment.older;
}

// By sixteenths of the segment that are holes. The unused end is no hole: compaction cannot gain it.
unsigned LogAllocator::bucket_of(const Segment& segment) const {
    std::uint64_t holes = segment.filled - segment.live_bytes;
    return static_cast<unsigned>(std::min<std::uint64_t>(holes * buckets / segment.memory.size(), buckets - 1));
}

void LogAllocator::link_bucket(SegmentId id) {
    Segment& segment = segments_[id];
    segment.bucket = static_cast<std::uint8_t>(bucket_of(segment));
    SegmentId& head = bucket_heads_[segment.log][segment.bucket];
    segment.bucket_prev = none;
    segment.bucket_next = head;
    if (head != none) segments_[head].bucket_prev = id;
    head = id;
}

void LogAllocator::unlink_bucket(SegmentId id) {
    Segment& segment = segments_[id];
    SegmentId& head = bucket_heads_[segment.log][segment.bucket];
    (segment.bucket_prev == none ? head : segments_[segment.bucket_prev].bucket_next) = segment.bucket_next;
    if (segment.bucket_next != none) segments_[segment.bucket_next].bucket_prev = segment.bucket_prev;
    segment.bucket = no_bucket;
}

void LogAllocator::count(Counts& counts) const {
    counts["log_segments"] += segments_.size() - free_ids_.size();
    counts["log_bytes"] += bytes_;
    counts["log_hole_bytes"] += bytes_ - spare_bytes_ - live_bytes_;
    counts["log_compacted_segments"] += compacted_segments_;
    counts["log_compacted_bytes"] += compacted_bytes_;
    counts["log_evicted_segments"] += evicted_segments_;
    counts["log_spared_entries"] += spared_entries_;
}

}  // namespace zcache
