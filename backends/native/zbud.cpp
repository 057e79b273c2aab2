#include "zbud.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cassert>
#include <cstring>
#include <new>
#include <utility>

namespace zcache {

namespace {

constexpr std::size_t region_bytes = std::size_t{1} << 20;

// Part of the limit that free frames may take, so that pages that come and go need no system calls.
constexpr std::size_t resident_free_divisor = 16;

// The most old frames that are spared in a row because they were used.
constexpr unsigned max_spared = 8;

Location location(std::uint32_t frame, unsigned buddy) { return static_cast<Location>(frame) << 1 | buddy; }
std::uint32_t frame_of(Location at) { return static_cast<std::uint32_t>(at >> 1); }
unsigned buddy_of(Location at) { return at & 1; }

// Reserve room for more items, growing by at least half.
template <class T>
void grow(std::vector<T>& items, std::size_t more) {
    std::size_t need = items.size() + more;
    if (items.capacity() < need) items.reserve(std::max(need, items.capacity() * 3 / 2));
}

}  // namespace

ZbudAllocator::ZbudAllocator(Budget& budget, IndexLink& index, std::uint32_t page_size)
    : budget_(budget),
      index_(index),
      frame_bytes_(page_size),
      chunk_bytes_(page_size / chunks),
      frames_per_region_(static_cast<unsigned>(std::max<std::size_t>(region_bytes / page_size, 1))) {
    static_assert(sizeof(Header) <= min_page_size / chunks);
    unbuddied_.fill(none);
    resized();
}

void ZbudAllocator::resized() {
    max_resident_free_ = std::max<std::size_t>(budget_.limit / resident_free_divisor / frame_bytes_, 1);
}

ZbudAllocator::~ZbudAllocator() {
    release_regions(0);
    budget_.used -= bytes_ + table_bytes_;
}

void ZbudAllocator::release_regions(std::size_t keep) {
    for (std::size_t at = keep; at < regions_.size(); ++at) munmap(regions_[at], frames_per_region_ * frame_bytes_);
    regions_.resize(keep);
}

// Tables have an entry for every frame there ever was: move the frames of the last regions to free ones,
// then release those regions.
void ZbudAllocator::shrink_tables() {
    drop_free_frames();
    std::size_t keep = (frames_used_ + frames_per_region_ - 1) / frames_per_region_;
    if (keep == regions_.size()) return;
    auto end = static_cast<FrameId>(keep * frames_per_region_);
    std::erase_if(free_, [end](FrameId id) { return id >= end; });
    for (FrameId id = end; id < frames_.size(); ++id) {
        if (!frames_[id].resident) continue;
        move_frame(id, free_.back());
        free_.pop_back();
    }
    release_regions(keep);
    frames_.resize(end);
    regions_.shrink_to_fit();
    frames_.shrink_to_fit();
    // A new vector instead of shrink_to_fit: free_frame() relies on the capacity even if this throws.
    std::vector<FrameId> free;
    free.reserve(frames_.capacity());
    free.assign(free_.begin(), free_.end());
    std::swap(free, free_);
    account_tables();
}

// Move a frame with entries to a free frame that is not resident.
void ZbudAllocator::move_frame(FrameId from, FrameId to) {
    std::memcpy(memory(to), memory(from), frame_bytes_);
    Frame& frame = frames_[to] = frames_[from];
    (frame.lru_prev == none ? lru_oldest_ : frames_[frame.lru_prev].lru_next) = to;
    (frame.lru_next == none ? lru_youngest_ : frames_[frame.lru_next].lru_prev) = to;
    if (unbuddied(frame)) {
        (frame.list_prev == none ? unbuddied_[free_chunks(frame)] : frames_[frame.list_prev].list_next) = to;
        if (frame.list_next != none) frames_[frame.list_next].list_prev = to;
    }
    frames_[from].resident = false;
    for (unsigned at = 0; at < 2; ++at) {
        const Buddy& buddy = header(to).buddies[at];
        if (buddy.file != no_file) index_.moved({buddy.file, buddy.index}, location(to, at));
    }
}

std::byte* ZbudAllocator::memory(FrameId id) const {
    return regions_[id / frames_per_region_] + id % frames_per_region_ * frame_bytes_;
}

unsigned ZbudAllocator::chunks_for(std::size_t size) const {
    return static_cast<unsigned>((size + chunk_bytes_ - 1) / chunk_bytes_);
}

unsigned ZbudAllocator::free_chunks(const Frame& frame) const {
    return chunks - 1 - frame.chunks[0] - frame.chunks[1];
}

// -- entries ----------------------------------------------------------------------------------------

std::optional<Location> ZbudAllocator::store(const Entry& entry) {
    unsigned need = chunks_for(entry.bytes.size());
    if (need > chunks - 1) return std::nullopt;  // a raw page does not fit beside the header
    FrameId id = find_unbuddied(need);
    if (id != none) {
        unlink_unbuddied(id);
        unlink_lru(id);
    } else {
        id = get_frame();
        if (id == none) return std::nullopt;
        new (memory(id)) Header;
        ++frames_used_;
    }
    Frame& frame = frames_[id];
    unsigned at = frame.chunks[0] == 0 ? 0 : 1;
    frame.chunks[at] = static_cast<std::uint8_t>(need);
    auto size = static_cast<std::uint32_t>(entry.bytes.size());
    header(id).buddies[at] = {entry.owner.index, entry.owner.file, size, entry.checksum};
    std::memcpy(const_cast<std::byte*>(load(location(id, at)).bytes.data()), entry.bytes.data(), size);
    link_lru(id);
    if (unbuddied(frame)) link_unbuddied(id);
    ++zpages_;
    zbytes_ += size;
    return location(id, at);
}

Stored ZbudAllocator::load(Location at) const {
    FrameId id = frame_of(at);
    const Buddy& buddy = header(id).buddies[buddy_of(at)];
    std::byte* start = memory(id) + (buddy_of(at) == 0 ? chunk_bytes_
                                                       : frame_bytes_ - frames_[id].chunks[1] * chunk_bytes_);
    return {{buddy.file, buddy.index}, buddy.checksum, {start, buddy.size}};
}

void ZbudAllocator::release(Location at) {
    FrameId id = frame_of(at);
    Frame& frame = frames_[id];
    if (unbuddied(frame)) unlink_unbuddied(id);
    Buddy& buddy = header(id).buddies[buddy_of(at)];
    assert(buddy.file != no_file);
    --zpages_;
    zbytes_ -= buddy.size;
    buddy.file = no_file;
    frame.chunks[buddy_of(at)] = 0;
    if (unbuddied(frame)) {
        link_unbuddied(id);
    } else {
        unlink_lru(id);
        free_frame(id);
    }
}

bool ZbudAllocator::reclaim() {
    if (resident_free_ == 0) {
        FrameId id = evict_oldest();
        if (id == none) return false;
        free_frame(id);
    }
    drop_free_frames();
    return true;
}

// Return the memory of frames without entries to the system.
void ZbudAllocator::drop_free_frames() {
    while (resident_free_ > 0) {
        FrameId id = free_[free_.size() - resident_free_];
        madvise(memory(id), frame_bytes_, MADV_DONTNEED);
        frames_[id].resident = false;
        --resident_free_;
        bytes_ -= frame_bytes_;
        budget_.used -= frame_bytes_;
    }
}

// -- frames -------------------------------------------------------------------------------------------

// The unbuddied frame that an entry fits best, or none.
ZbudAllocator::FrameId ZbudAllocator::find_unbuddied(unsigned need) const {
    for (unsigned free = need; free < chunks; ++free) {
        if (unbuddied_[free] != none) return unbuddied_[free];
    }
    return none;
}

// A frame without entries: a free one, a new one, or the oldest after eviction.
ZbudAllocator::FrameId ZbudAllocator::get_frame() {
    if (resident_free_ == 0) {
        while (!budget_.has_room(frame_bytes_) && index_.reclaim_elsewhere(*this)) {
        }
        if (!budget_.has_room(frame_bytes_)) {
            FrameId oldest = evict_oldest();
            if (oldest != none) --frames_used_;
            return oldest;
        }
        if (free_.empty()) add_region();
    }
    FrameId id = free_.back();
    free_.pop_back();
    if (frames_[id].resident) {
        --resident_free_;
    } else {
        frames_[id].resident = true;
        bytes_ += frame_bytes_;
        budget_.used += frame_bytes_;
    }
    return id;
}

// Evict the entries of the oldest frame that was not used lately. The frame is then in no list.
ZbudAllocator::FrameId ZbudAllocator::evict_oldest() {
    for (unsigned spared = 0; lru_oldest_ != none; ++spared) {
        FrameId id = lru_oldest_;
        Frame& frame = frames_[id];
        bool used = false;
        for (const Buddy& buddy : header(id).buddies) {
            if (buddy.file != no_file && index_.take_referenced({buddy.file, buddy.index})) used = true;
        }
        unlink_lru(id);
        if (used && spared < max_spared) {
            link_lru(id);
            continue;
        }
        if (unbuddied(frame)) unlink_unbuddied(id);
        for (Buddy& buddy : header(id).buddies) {
            if (buddy.file == no_file) continue;
            index_.evicted({buddy.file, buddy.index}, buddy.size, false);
            --zpages_;
            zbytes_ -= buddy.size;
            buddy.file = no_file;
        }
        frame.chunks[0] = frame.chunks[1] = 0;
        ++evicted_frames_;
        return id;
    }
    return none;
}

// Invariant: the last resident_free_ of free_ are resident, the others are not.
void ZbudAllocator::free_frame(FrameId id) {
    --frames_used_;
    if (resident_free_ >= max_resident_free_) {
        FrameId first = free_[free_.size() - resident_free_];
        madvise(memory(first), frame_bytes_, MADV_DONTNEED);
        frames_[first].resident = false;
        --resident_free_;
        bytes_ -= frame_bytes_;
        budget_.used -= frame_bytes_;
    }
    free_.push_back(id);
    ++resident_free_;
}

// Map a region of frames when none is free. It takes no memory until it is touched.
void ZbudAllocator::add_region() {
    grow(regions_, 1);
    grow(frames_, frames_per_region_);
    if (free_.capacity() < frames_.capacity()) free_.reserve(frames_.capacity());  // free_frame must not fail
    std::size_t size = frames_per_region_ * frame_bytes_;
    void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    // With huge pages, the first touch of one frame would make all of them resident.
    madvise(at, size, MADV_NOHUGEPAGE);
    madvise(at, size, MADV_DONTDUMP);
    regions_.push_back(static_cast<std::byte*>(at));
    for (unsigned i = 0; i < frames_per_region_; ++i) {
        free_.push_back(static_cast<FrameId>(frames_.size()));
        frames_.emplace_back();
    }
    account_tables();
}

void ZbudAllocator::account_tables() {
    std::size_t tables = frames_.capacity() * sizeof(Frame) + free_.capacity() * sizeof(FrameId) +
                         regions_.capacity() * sizeof(std::byte*);
    budget_.used += tables - table_bytes_;
    table_bytes_ = tables;
}

// -- lists --------------------------------------------------------------------------------------------

void ZbudAllocator::link_lru(FrameId id) {
    Frame& frame = frames_[id];
    frame.lru_prev = lru_youngest_;
    frame.lru_next = none;
    (lru_youngest_ == none ? lru_oldest_ : frames_[lru_youngest_].lru_next) = id;
    lru_youngest_ = id;
}

void ZbudAllocator::unlink_lru(FrameId id) {
    Frame& frame = frames_[id];
    (frame.lru_prev == none ? lru_oldest_ : frames_[frame.lru_prev].lru_next) = frame.lru_next;
    (frame.lru_next == none ? lru_youngest_ : frames_[frame.lru_next].lru_prev) = frame.lru_prev;
}

void ZbudAllocator::link_unbuddied(FrameId id) {
    Frame& frame = frames_[id];
    FrameId& head = unbuddied_[free_chunks(frame)];
    frame.list_prev = none;
    frame.list_next = head;
    if (head != none) frames_[head].list_prev = id;
    head = id;
    ++unbuddied_count_;
}

void ZbudAllocator::unlink_unbuddied(FrameId id) {
    Frame& frame = frames_[id];
    (frame.list_prev == none ? unbuddied_[free_chunks(frame)] : frames_[frame.list_prev].list_next) =
        frame.list_next;
    if (frame.list_next != none) frames_[frame.list_next].list_prev = frame.list_prev;
    --unbuddied_count_;
}

void ZbudAllocator::count(Counts& counts) const {
    counts["zbud_eph_pageframes"] += frames_used_;
    counts["zbud_eph_zpages"] += zpages_;
    counts["zbud_eph_zbytes"] += zbytes_;
    counts["zbud_eph_unbuddied_count"] += unbuddied_count_;
    counts["zbud_eph_buddied_count"] += frames_used_ - unbuddied_count_;
    counts["zbud_eph_evicted_pageframes"] += evicted_frames_;
}

}  // namespace zcache
