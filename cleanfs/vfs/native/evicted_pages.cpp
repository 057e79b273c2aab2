#include "evicted_pages.hpp"

#include <algorithm>
#include <array>
#include <cstring>

namespace cleanfs {

EvictedPages::EvictedPages(EvictionRing& ring, const InodeStates& inodes, CacheState& caches)
    : ring_(ring), inodes_(inodes), caches_(caches) {
    table_.pages = this;
    table_.drain = [](void* pages) noexcept { static_cast<EvictedPages*>(pages)->drain(many); };
    table_.position = [](void* pages) noexcept { return static_cast<EvictedPages*>(pages)->ring_.produced(); };
}

std::size_t EvictedPages::drain(std::size_t most) noexcept {
    if (is_empty()) return 0;
    counters_.high_water = std::max(counters_.high_water, ring_.produced() - ring_.consumed());
    return ring_.consume(most, [this](const eviction& page, Position position) { use(page, position); });
}

void EvictedPages::use(const eviction& page, Position position) {
    if (page.readable == 0) return;  // counted by the program
    const InodeState* inode = inodes_.find(page.inode);
    if (inode == nullptr || inode->record == nullptr || inode->record->forgotten) {
        ++counters_.unknown;
        return;
    }
    const FileState& file = *inode->record;
    if (position < file.evictions_after || file.drops_due > 0 || is_held(page.inode, position)) {
        ++counters_.stale;
        return;
    }
    const std::uint64_t start = page.index * sizeof page.page;
    const std::uint64_t stop = std::min(start + sizeof page.page, file.size);
    if (start >= file.size || page.file_size < stop) {
        ++counters_.past_end;
        return;
    }
    if (caches_.pool_id < 0 || caches_.backend == nullptr) {
        ++counters_.refused;
        return;
    }
    const zcache::FastOps& backend = *caches_.backend;
    if (backend.missing(backend.engine, caches_.pool_id, file.key(), page.index, 1) == 0) {
        ++counters_.kept;
        return;
    }
    const auto* bytes = reinterpret_cast<const std::byte*>(page.page);
    std::array<std::byte, sizeof page.page> last;  // a program may have stored past the end, through a mapping
    if (stop - start < last.size()) {
        std::memcpy(last.data(), bytes, stop - start);
        std::memset(last.data() + (stop - start), 0, last.size() - (stop - start));
        bytes = last.data();
    }
    if (backend.put(backend.engine, caches_.pool_id, file.key(), page.index, bytes)) {
        ++counters_.put;
        ++caches_.puts;
    } else {
        ++counters_.refused;
    }
}

bool EvictedPages::is_held(std::uint64_t node, Position position) const {
    const auto found = holds_.find(node);
    return found != holds_.end() && (found->second.holders > 0 || position < found->second.until);
}

void EvictedPages::hold(std::uint64_t node) { ++holds_[node].holders; }

void EvictedPages::release(std::uint64_t node) {
    const auto found = holds_.find(node);
    if (found == holds_.end() || found->second.holders == 0) return;
    --found->second.holders;
    drop_older(node);
}

void EvictedPages::forget(std::uint64_t node) {
    drain(many);
    drop_older(node);
}

// What is in the ring now is not put if it is of this node.
void EvictedPages::drop_older(std::uint64_t node) {
    holds_[node].until = ring_.produced();
    if (holds_.size() < max_holds_) return;
    std::erase_if(holds_, [this](const auto& hold) { return hold.second.holders == 0 && hold.second.until <= ring_.consumed(); });
    max_holds_ = std::max(many, 2 * holds_.size());
}

}  // namespace cleanfs
