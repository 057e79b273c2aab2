#include "fast_path.hpp"

#include <limits.h>
#include <time.h>

#include <algorithm>
#include <bit>

namespace cleanfs {

namespace {

// The largest READ that is served here, in pages: an iovec for each, and one for the header, make a reply.
constexpr std::uint64_t max_pages = IOV_MAX - 1;

std::uint64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(now.tv_nsec);
}

}  // namespace

void Histogram::record(std::uint64_t ns) {
    const auto shift = static_cast<unsigned>(std::bit_width(ns >> 3));
    ++counts[std::min<std::size_t>((shift << 2) + (ns >> shift), buckets - 1)];
    sum_ns += ns;
}

bool FastPath::serve(const Message& message, Channel& channel) {
    if (message.header().opcode != FUSE_READ || !read(message, channel)) return false;
    ++counters_.served;
    return true;
}

bool FastPath::read(const Message& message, Channel& channel) {
    const auto in = message.body_as<fuse_read_in>();
    if (!in) return false;
    const auto found = handles_.find(in->fh);
    if (found == handles_.end() || caches_.resident == nullptr) return false;
    const HandleState& handle = *found->second;
    const FileState& file = *handle.file;
    if (handle.drop_due || file.pending_writes > 0 || file.remembers_reads) return false;
    if (in->offset >= file.size || in->size == 0) return false;

    const std::uint64_t began = now_ns();
    const std::uint64_t stop = std::min(file.size, in->offset + in->size);
    const std::uint64_t page_size = caches_.page_size;
    const std::uint64_t first = in->offset / page_size;
    const std::uint64_t start = first * page_size;
    const std::uint64_t count = (stop - 1) / page_size + 1 - first;
    if (stop <= in->offset || count > max_pages) return false;

    fuse_out_header header{};
    header.len = static_cast<std::uint32_t>(sizeof header + (stop - in->offset));
    header.unique = message.header().unique;
    parts_.assign(1, {&header, sizeof header});
    pages_.resize(count);
    const std::size_t missing = caches_.resident->look_up(file.serial, first, count, pages_.data());
    Histogram* histogram = nullptr;
    if (missing == 0) {
        for (std::uint64_t at = in->offset; at < stop;) {
            const std::uint64_t within = at % page_size, length = std::min(page_size - within, stop - at);
            parts_.push_back({caches_.page_bytes(pages_[(at - start) / page_size]) + within, length});
            at += length;
        }
        caches_.hits += count;
        histogram = &counters_.pagecache_hit;
    } else {
        if (missing != count || caches_.backend == nullptr || caches_.pool_id < 0) return false;
        if (buffer_size_ < count * page_size) {
            buffer_size_ = count * page_size;
            buffer_ = std::make_unique_for_overwrite<std::byte[]>(buffer_size_);
        }
        const zcache::FastOps& backend = *caches_.backend;
        if (!backend.borrow(backend.engine, caches_.pool_id, file.key(), first, count, buffer_.get())) return false;
        parts_.push_back({buffer_.get() + (in->offset - start), stop - in->offset});
        caches_.misses += count;
        caches_.succ_gets += count;
        caches_.puts += count;
        histogram = &counters_.cleancache_hit;
    }
    channel.send(parts_.data(), static_cast<int>(parts_.size()));  // if its requester is gone, nothing is to be undone
    histogram->record(now_ns() - began);
    counters_.read_bytes += stop - in->offset;
    return true;
}

}  // namespace cleanfs
