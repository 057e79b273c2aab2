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

constexpr std::uint64_t max_offset = std::uint64_t{1} << 62;

// How often this thread has slept. Preemption does not count: it is no wait.
long sleeps_of_thread() {
    rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nvcsw : 0;
}

double seconds(std::int64_t ns) { return static_cast<double>(ns) * 1e-9; }

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
        default: break;
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
    const HandleState* handle = find(in->fh);
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
    const std::int64_t returned = now_ns();
    policy.returned_at = seconds(returned);
    if (returned - began > slow_ns && sleeps_of_thread() > sleeps) policy.waited_seconds = seconds(returned - began);
    if (policy.waited_seconds > 0) policy.inline_calls = false;
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
