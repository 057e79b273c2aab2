// The memory limit: checking and changing it, reclaiming down to it, and accounting.
//
// The budget counts every byte of real memory: mappings count themselves, the index counts its nodes and
// tables, loans count their pages, and account_overhead() counts the rest. So pool_used is what the engine
// really takes. The price: tables that grew under a higher limit must be released when the limit is lowered
// (shrink_tables), because they may exceed it alone.
#include "zcache.hpp"

#include <algorithm>
#include <string>

namespace zcache {

// -- tunables -----------------------------------------------------------------------------------------

namespace {

// Part of the limit that pages on loan may take.
constexpr std::size_t loan_divisor = 8;

// The staging area is this part of the limit, within bounds.
constexpr std::size_t staging_divisor = 32;
constexpr std::size_t min_staging = 64 << 10;
constexpr std::size_t max_staging = 1 << 20;

// Part of the limit that the loans' records, and the admission history, may keep after the limit changes.
constexpr std::size_t table_divisor = 32;

// The least limit that compressor contexts (and, with a dictionary, its samples) leave room for pages in.
std::size_t least_limit(const CodecOptions& codec) {
    switch (codec.method) {
        case Method::none:
        case Method::lz4:
        case Method::lz4hc:
            return min_pool_limit;
        case Method::zstd:
            return (codec.dictionary ? 8 : 4) * min_pool_limit;
    }
    return min_pool_limit;
}

}  // namespace

void Zcache::check_limit(std::size_t pool_limit) const {
    std::size_t least = least_limit(options_.codec);
    if (pool_limit < least) {
        throw std::invalid_argument("pool limit " + std::to_string(pool_limit) + " is below " +
                                    std::to_string(least) + " bytes, the least with this compression");
    }
}

std::size_t Zcache::staging_bytes(std::size_t pool_limit) const {
    return round_up(std::clamp(pool_limit / staging_divisor, min_staging, max_staging), min_page_size);
}

std::size_t Zcache::max_loan_bytes() const { return budget_.limit / loan_divisor; }

bool Zcache::nearly_full() const { return budget_.used > budget_.limit / 8 * 7; }

// -- resizing -------------------------------------------------------------------------------------------

std::size_t Zcache::pool_limit() const {
    Lock lock(mutex_);
    return budget_.limit;
}

void Zcache::resize(std::size_t pool_limit) {
    check_limit(pool_limit);
    Lock lock(mutex_);
    if (staging_bytes(pool_limit) != staging_->capacity()) {
        auto fresh = std::make_unique<Staging>(budget_, staging_bytes(pool_limit));
        drain(lock);
        staging_ = std::move(fresh);
    }
    budget_.limit = pool_limit;
    account_overhead();
    bound_loans();
    for (auto& [page_size, allocator] : allocators_) allocator->resized();
    shrink();
    shrink_tables();
}

// Release table space that a higher limit left behind; it may exceed all that this limit allows.
void Zcache::shrink_tables() {
    index_.shrink_tables();
    for (auto& [page_size, allocator] : allocators_) allocator->shrink_tables();
    shrink_scratches();
    if (loans_.bytes() > budget_.limit / table_divisor) {
        while (!loans_.empty()) end_oldest_loan();
        loans_.shrink_tables();
    }
    if (admission_.bytes() > budget_.limit / table_divisor) admission_.reset();
    account_overhead();
    shrink();
}

// Renew the compressor contexts: they may be larger than the remaining pages need.
void Zcache::shrink_scratches() {
    auto shrink = [this](Scratch& scratch, std::size_t& bytes) {
        try {
            scratch.reset(codec_);
        } catch (const std::bad_alloc&) {
            // The context stays as large as it is.
        }
        bytes = scratch.bytes();
    };
    if (!working_) shrink(worker_scratch_, worker_scratch_bytes_);  // else the worker is using it
    // A thread that has inline_mutex_ waits for mutex_, which is held here: try, never wait.
    if (std::unique_lock<std::mutex> scratch(inline_mutex_, std::try_to_lock); scratch) {
        shrink(inline_scratch_, inline_scratch_bytes_);
    }
    std::size_t bytes = 0;
    shrink(get_scratch_, bytes);
    account_overhead();
}

// -- reclaiming -----------------------------------------------------------------------------------------

void Zcache::shrink() {
    while (budget_.used > budget_.limit && reclaim_any()) {
    }
}

// Make the largest allocator give something up; if none can, end the oldest loan.
bool Zcache::reclaim_any() {
    Allocator* largest = largest_allocator();
    if (largest != nullptr && largest->reclaim()) return true;
    if (loans_.empty()) return false;
    end_oldest_loan();
    return true;
}

bool Zcache::try_reclaim() {
    try {
        return reclaim_any();
    } catch (const std::bad_alloc&) {
        return false;  // compaction needs memory before it frees some
    }
}

bool Zcache::reclaim_elsewhere(const Allocator& asking) {
    Allocator* largest = largest_allocator();
    return largest != &asking && largest->bytes() > asking.bytes() && largest->reclaim();
}

Allocator* Zcache::largest_allocator() const {
    auto largest = std::max_element(allocators_.begin(), allocators_.end(), [](const auto& a, const auto& b) {
        return a.second->bytes() < b.second->bytes();
    });
    return largest == allocators_.end() ? nullptr : largest->second.get();
}

// -- accounting -----------------------------------------------------------------------------------------

// Count the memory that is neither a mapping nor part of the index.
void Zcache::account_overhead() {
    std::size_t bytes = sizeof *this + codec_.bytes() + worker_scratch_bytes_ +
                        inline_scratch_bytes_ + get_scratch_.bytes() +
                        loans_.bytes() + admission_.bytes() + staging_->table_bytes();
    budget_.used += bytes - overhead_;
    overhead_ = bytes;
}

}  // namespace zcache
