// The buddy allocator of the kernel (mm/zbud.c, zcache2): two entries to a page frame.
//
// A frame is as large as a page, in 64 chunks; the first chunk is its header. One entry lies at the
// front, its buddy ends at the back. Frames with one entry are *unbuddied* and listed by their free
// chunks, so that a new entry takes the frame that it fits best. All frames are in one LRU list. When no
// frame is available, the oldest is evicted with both its entries and reused at once: *ouroboros*.
//
// It holds at most two pages in the room of one, however well they compress, and wastes the rest of the
// frame. But evicting a frame always frees a whole frame, with no copying: simple and deterministic.
#pragma once

#include <array>
#include <vector>

#include "allocator.hpp"

namespace zcache {

class ZbudAllocator final : public Allocator {
public:
    ZbudAllocator(Budget& budget, IndexLink& index, std::uint32_t page_size);
    ~ZbudAllocator() override;

    std::optional<Location> store(const Entry& entry) override;
    Stored load(Location at) const override;
    void release(Location at) override;
    bool reclaim() override;
    std::size_t bytes() const override { return bytes_; }
    void resized() override;
    void shrink_tables() override;
    void count(Counts& counts) const override;

private:
    using FrameId = std::uint32_t;
    static constexpr FrameId none = ~FrameId{0};
    static constexpr unsigned chunks = 64;

    struct Buddy {
        std::uint64_t index = 0;
        FileId file = no_file;
        std::uint32_t size = 0;
        std::uint32_t checksum = 0;
    };

    // In the first chunk of its frame.
    struct Header {
        std::array<Buddy, 2> buddies;  // at the front, at the back
    };

    // Kept apart from the frame, so that lists are walked without touching frames.
    struct Frame {
        FrameId lru_prev = none, lru_next = none;
        FrameId list_prev = none, list_next = none;
        std::uint8_t chunks[2] = {0, 0};
        bool resident = false;
    };

    std::byte* memory(FrameId id) const;
    Header& header(FrameId id) const { return *reinterpret_cast<Header*>(memory(id)); }
    unsigned chunks_for(std::size_t size) const;
    unsigned free_chunks(const Frame& frame) const;
    bool unbuddied(const Frame& frame) const { return (frame.chunks[0] == 0) != (frame.chunks[1] == 0); }

    FrameId find_unbuddied(unsigned chunks) const;
    FrameId get_frame();
    FrameId evict_oldest();
    void free_frame(FrameId id);
    void add_region();
    void release_regions(std::size_t keep);
    void drop_free_frames();
    void move_frame(FrameId from, FrameId to);
    void account_tables();

    void link_lru(FrameId id);
    void unlink_lru(FrameId id);
    void link_unbuddied(FrameId id);
    void unlink_unbuddied(FrameId id);

    Budget& budget_;
    IndexLink& index_;
    const std::size_t frame_bytes_;
    const std::size_t chunk_bytes_;
    const unsigned frames_per_region_;
    std::vector<std::byte*> regions_;
    std::vector<Frame> frames_;
    std::vector<FrameId> free_;       // frames without entries: resident ones last
    std::size_t resident_free_ = 0;
    std::size_t max_resident_free_ = 0;
    FrameId lru_oldest_ = none, lru_youngest_ = none;
    std::array<FrameId, chunks> unbuddied_;  // heads, by free chunks
    std::size_t bytes_ = 0;
    std::size_t table_bytes_ = 0;

    std::uint64_t frames_used_ = 0, zpages_ = 0, zbytes_ = 0, unbuddied_count_ = 0;
    std::uint64_t evicted_frames_ = 0;
};

}  // namespace zcache
