#include "fast_path.hpp"

#include <fcntl.h>
#include <limits.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <bit>

namespace cleanfs {

namespace {

// The largest READ that is served here, in pages: an iovec for each, and one for the header, make a reply.
constexpr std::uint64_t max_pages = IOV_MAX - 1;

// InlinePolicy's RECENT_SECONDS and SLOW_SECONDS.
constexpr double recent_seconds = 0.1;
constexpr std::int64_t slow_ns = 1'000'000;

// Of Linux 6.14, newer than some headers.
constexpr int rwf_dontcache = 0x80;

constexpr std::uint64_t max_offset = std::uint64_t{1} << 62;

// How often this thread has slept. Preemption does not count: it is no wait.
long sleeps_of_thread() {
    rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nvcsw : 0;
}

double seconds(std::int64_t ns) { return static_cast<double>(ns) * 1e-9; }

// As cleanfs.source.io.watched: an inline call has returned, and may have waited.
void note_return(InlineState& policy, std::int64_t began, long sleeps_before) {
    const std::int64_t returned = now_ns();
    policy.returned_at = seconds(returned);
    if (returned - began > slow_ns && sleeps_of_thread() > sleeps_before) {
        policy.waited_seconds = seconds(returned - began);
        policy.inline_calls = false;
    }
}

}  // namespace

void Histogram::record(std::int64_t duration) {
    const auto ns = static_cast<std::uint64_t>(duration);
    const auto shift = static_cast<unsigned>(std::bit_width(ns >> 3));
    ++counts[std::min<std::size_t>((shift << 2) + (ns >> shift), buckets - 1)];
    sum_ns += ns;
}

bool FastPath::serve(const Message& message, Channel& channel) {
    bool served = false;
    switch (message.header().opcode) {
        case FUSE_READ: served = read(message, channel); break;
        case FUSE_WRITE: served = write(message, channel); break;
        default: served = metadata_ && metadata_->serve(message, channel); break;
    }
    if (served) ++counters_.served;
    return served;
}

HandleState* FastPath::find(std::uint64_t fh) const {
    const auto found = handles_.find(fh);
    return found == handles_.end() ? nullptr : found->second;
}

// FileHandle.read and PageCache.read, of a file whose reads wait for no write and need not be remembered.
bool FastPath::read(const Message& message, Channel& channel) {
    const auto in = message.body_as<fuse_read_in>();
    if (!in || caches_.resident == nullptr) return false;
    HandleState* handle = find(in->fh);
    if (handle == nullptr || handle->drop_due) return false;
    const FileState& file = *handle->file;
    if (file.pending_writes > 0 || file.remembers_reads) return false;
    if (in->offset >= file.size || in->size == 0) return false;

    const std::int64_t began = now_ns();
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
        if (missing != count || (caches_.pool_id >= 0 && caches_.backend == nullptr)) return false;
        std::byte* const to = buffer(count * page_size);
        std::size_t inserted = 0;
        if (borrow(file, first, count, to)) {
            caches_.succ_gets += count;
            caches_.puts += count;
            histogram = &counters_.cleancache_hit;
        } else {
            const auto got = read_source(*handle, file, first, count, to);
            if (!got || start + *got < stop) return false;
            inserted = *got;
            histogram = &counters_.source_read;
        }
        caches_.misses += count;
        parts_.push_back({to + (in->offset - start), stop - in->offset});
        send(channel, *histogram, began);
        counters_.read_bytes += stop - in->offset;
        if (inserted > 0 && (caches_.limit_pages > 0 || caches_.pool_id >= 0)) caches_.insert(caches_, file, first, to, inserted);
        return true;
    }
    send(channel, *histogram, began);
    counters_.read_bytes += stop - in->offset;
    return true;
}

// Send the reply that `parts_` makes. If its requester is gone, nothing is to be undone.
void FastPath::send(Channel& channel, Histogram& histogram, std::int64_t began) {
    channel.send(parts_.data(), static_cast<int>(parts_.size()));
    histogram.record(now_ns() - began);
}

std::byte* FastPath::buffer(std::size_t size) {
    if (buffer_size_ < size) {
        buffer_size_ = size;
        buffer_ = std::make_unique_for_overwrite<std::byte[]>(size);
    }
    return buffer_.get();
}

bool FastPath::borrow(const FileState& file, PageIndex first, std::size_t count, std::byte* to) const {
    if (caches_.pool_id < 0) return false;
    return caches_.backend->borrow(caches_.backend->engine, caches_.pool_id, file.key(), first, count, to);
}

// SourceReads.read_whole and SourceFile.read, where that does not wait: of pages that no cache has, while nothing else
// reads the file's source. None if Python must read. Returns the bytes read, short at the end of the file.
std::optional<std::size_t> FastPath::read_source(HandleState& handle, const FileState& file, PageIndex first, std::size_t count,
                                                 std::byte* to) {
    if (handle.reads == nullptr || file.reads_in_flight > 0) return std::nullopt;
    if (caches_.pool_id >= 0) {
        const zcache::FastOps& backend = *caches_.backend;
        if (backend.missing(backend.engine, caches_.pool_id, file.key(), first, count) != count) return std::nullopt;
    }
    const auto offset = static_cast<std::int64_t>(first * caches_.page_size);
    const auto size = static_cast<std::int64_t>(count * caches_.page_size);
    if (offset > static_cast<std::int64_t>(max_offset) - size) return std::nullopt;
    const bool lingers = caches_.drop_behind && handle.stream->lingers(offset, size, static_cast<std::int64_t>(file.size));
    Stream stream = *handle.stream;
    if (lingers && stream.passed(offset, size)) return std::nullopt;  // a span goes, in a thread

    const bool drop = caches_.drop_behind && !lingers;
    NowaitState& able = *handle.nowait;
    int flags = drop && able.dontcache ? rwf_dontcache : 0;
    if (!able.nowait && handle.reads->inline_calls && seconds(now_ns()) - handle.reads->returned_at < recent_seconds) {
        // It may wait, but did not of late.
    } else if (able.worthwhile()) {
        flags |= RWF_NOWAIT;
    } else {
        return std::nullopt;
    }
    const iovec part{to, static_cast<std::size_t>(size)};
    const long sleeps = sleeps_of_thread();
    const std::int64_t began = now_ns();
    const ssize_t got = preadv2(handle.fd, &part, 1, offset, flags);
    if (got <= 0) return std::nullopt;
    if ((flags & RWF_NOWAIT) != 0) {
        able.refused = 0;
    } else {
        if (drop && flags == 0) posix_fadvise(handle.fd, offset, size, POSIX_FADV_DONTNEED);
        note_return(*handle.reads, began, sleeps);
    }
    *handle.stream = stream;
    ++counters_.source_reads;
    counters_.source_read_bytes += static_cast<std::uint64_t>(got);
    caches_.failed_gets += caches_.pool_id >= 0 ? count : 0;
    return static_cast<std::size_t>(got);
}

// FileHandle.write, of a file that is in this machine's memory: nothing here waits. Nothing else runs between the stat
// before the write and the one after, except other processes. If their work shows, Python makes the write once more,
// and finds their work as it would have. So it does after a write that failed, or was cut short.
bool FastPath::write(const Message& message, Channel& channel) {
    const auto in = message.body_as<fuse_write_in>();
    if (!in || message.body().size() - sizeof *in != in->size || in->size == 0) return false;
    HandleState* handle = find(in->fh);
    if (handle == nullptr || handle->drop_due || handle->writes == nullptr) return false;
    FileState& file = *handle->file;
    if (file.mutations > 0 || file.pending_writes > 0 || file.remembers_reads || !file.stamps) return false;
    if ((in->flags & (O_SYNC | O_DSYNC)) != 0 || ((in->flags & O_APPEND) != 0 && caches_.shared)) return false;
    const std::int64_t began = now_ns();
    InlineState& policy = *handle->writes;
    if (!policy.inline_calls || seconds(began) - policy.returned_at >= recent_seconds) return false;
    if (in->offset > max_offset - in->size) return false;

    struct stat st;
    if (fstat(handle->fd, &st) != 0) return false;
    const bool clears_set_id = (in->write_flags & FUSE_WRITE_KILL_SUIDGID) != 0;
    if (clears_set_id && (st.st_mode & (S_ISUID | S_ISGID)) != 0) return false;
    const mode_t mode = st.st_mode;
    const Stamps before = Stamps::of(st);
    if (caches_.shared && before != *file.stamps) return false;

    const std::uint64_t stop = in->offset + in->size;
    if (!flush(file, in->offset, stop)) return false;
    const long sleeps = sleeps_of_thread();
    const ssize_t written = pwrite(handle->fd, message.body().data() + sizeof *in, in->size, static_cast<off_t>(in->offset));
    note_return(policy, began, sleeps);
    file.version = ++caches_.clock;  // a read of the source that began before is stale
    if (!flush(file, in->offset, stop) || written != static_cast<ssize_t>(in->size) || fstat(handle->fd, &st) != 0) return false;
    const Stamps after = Stamps::of(st);
    if (st.st_mode != mode || after.size != std::max(before.size, static_cast<std::int64_t>(stop))) return false;

    file.stamps = after;
    file.racy = true;
    file.size = static_cast<std::uint64_t>(after.size);
    KernelState& kernel = *handle->kernel;
    kernel.size = std::max(kernel.size, static_cast<std::int64_t>(stop));
    if (kernel.sent == before) kernel.sent = after;
    const fuse_write_out out{in->size, 0};
    channel.reply(message.header().unique, 0, {reinterpret_cast<const std::byte*>(&out), sizeof out});
    counters_.write.record(now_ns() - began);
    counters_.write_bytes += in->size;
    ++counters_.writes;
    return true;
}

// PageCache.invalidate. False if the backend failed, which Python must deal with.
bool FastPath::flush(const FileState& file, std::uint64_t start, std::uint64_t stop) {
    const std::uint64_t first = start / caches_.page_size, end = (stop - 1) / caches_.page_size + 1;
    if (caches_.pool_id >= 0) {
        if (caches_.backend == nullptr) return false;
        if (!caches_.backend->flush(caches_.backend->engine, caches_.pool_id, file.key(), first, end)) return false;
        ++caches_.flushes;
    }
    caches_.discard(caches_.resident, file.serial, first, end);
    return true;
}

}  // namespace cleanfs
