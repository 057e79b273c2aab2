#include "fast_path.hpp"

#include <fcntl.h>
#include <limits.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <utility>

#include "inline_calls.hpp"

namespace cleanfs {

namespace {

// The largest READ that is served here: in pages, as an iovec for each, and one for the header, make a reply; and in
// bytes, which a buffer takes for good. The kernel's largest is 1 MiB, and its pages may begin and end outside.
constexpr std::uint64_t max_pages = IOV_MAX - 1;
constexpr std::uint64_t max_bytes = std::uint64_t{2} << 20;

// Of Linux 6.14, newer than some headers.
constexpr int rwf_dontcache = 0x80;

// Far beyond any file, and far below where offsets overflow.
constexpr std::uint64_t max_offset = std::uint64_t{1} << 62;

}  // namespace

bool FastPath::serve(const Message& message, Channel& channel) {
    bool served = false;
    try {
        served = serve_here(message, channel);
    } catch (const std::bad_alloc&) {
        // Nothing was sent: what may throw comes before the reply.
    }
    if (served) ++counters_.served;
    return served;
}

bool FastPath::serve_here(const Message& message, Channel& channel) {
    switch (message.header().opcode) {
        case FUSE_READ: return read(message, channel, nullptr) != Outcome::none;
        case FUSE_WRITE: return write(message, channel);
        case FUSE_FSYNC:
        case FUSE_FSYNCDIR: return sync(message, channel);
        case FUSE_SETATTR: return attribute_changes_ && attribute_changes_->set(message, channel);
        case FUSE_OPEN: return open_handles_ && open_handles_->open(message, channel);
        case FUSE_RELEASE: return open_handles_ && open_handles_->release(message, channel);
        case FUSE_CREATE: return name_changes_ && name_changes_->create(message, channel);
        case FUSE_UNLINK: return name_changes_ && name_changes_->unlink(message, channel);
        default: return metadata_ && (metadata_->serve(message, channel) || directories_->serve(message, channel));
    }
}

bool FastPath::may_serve_beside(const Message& message) {
    switch (message.header().opcode) {
        case FUSE_READ:
        case FUSE_WRITE:
        case FUSE_OPEN:
        case FUSE_RELEASE:
            return true;
        default:
            return Metadata::may_serve_beside(message);
    }
}

FastPath::Outcome FastPath::serve_beside(const Message& message, Channel& channel, Borrowed& borrowed) {
    Outcome outcome = Outcome::none;
    if (metadata_) metadata_->may_call_python = false;
    try {
        if (message.header().opcode == FUSE_READ) {
            outcome = read(message, channel, &borrowed);
        } else if (may_serve_beside(message) && serve_here(message, channel)) {
            outcome = Outcome::in_order;
        }
    } catch (const std::bad_alloc&) {
        // Nothing was sent: what may throw comes before the reply.
    }
    if (metadata_) metadata_->may_call_python = true;
    if (outcome == Outcome::none) return outcome;
    ++counters_.served;
    channel.count(message);
    return outcome;
}

bool FastPath::decode(Borrowed& borrowed, std::byte* to) {
    const bool decoded = borrowed.backend->decode(borrowed.backend->engine, borrowed.pages, to);
    --caches_.decoding;
    if (!decoded) return false;
    const std::lock_guard lock(decoded_mutex_);
    decoded_.record(now_ns() - borrowed.began);
    return true;
}

void FastPath::take_back(const Borrowed& borrowed, Channel& channel, const Message& message) {
    channel.count(message, -1);
    const std::size_t count = borrowed.pages.pages.size();
    caches_.misses -= count;
    caches_.succ_gets -= count;
    caches_.puts -= count;
    counters_.read_bytes -= borrowed.size();
    --counters_.served;
}

HandleState* FastPath::find(std::uint64_t fh) {
    const auto found = handles_.find(fh);
    if (found != handles_.end()) return found->second;
    return open_handles_ ? open_handles_->find(fh) : nullptr;
}

// FileHandle.read and PageCache.read, of a file whose reads wait for no write and need not be remembered.
//
// A read that is not short says nothing about the file but its bytes. So its reply may be sent, and its pages be decoded,
// while the state changes: it is one that began before the change.
FastPath::Outcome FastPath::read(const Message& message, Channel& channel, Borrowed* borrowed) {
    const auto in = message.body_as<fuse_read_in>();
    if (!in || caches_.resident == nullptr) return Outcome::none;
    HandleState* handle = find(in->fh);
    if (handle == nullptr) return Outcome::none;
    caches_.opener_ran(*handle);
    const FileState& file = *handle->file;
    if (file.pending_writes > 0 || file.remembers_reads) return Outcome::none;
    if (in->size == 0 || in->offset >= file.size || file.size > max_offset) return Outcome::none;

    const std::int64_t began = now_ns();
    const Range range(in->offset, std::min(file.size, in->offset + in->size), caches_.page_size);
    if (range.count > max_pages || range.count * caches_.page_size > max_bytes) return Outcome::none;
    // KernelView.read_ended: the kernel sees a later end of the file.
    if (range.size() < in->size && static_cast<std::int64_t>(range.stop) < handle->kernel->size) return Outcome::none;
    const Outcome replied = range.size() < in->size ? Outcome::in_order : Outcome::replied;

    const std::uint64_t evicted = caches_.drain_evictions();
    parts_.resize(1);  // for the header
    pages_.resize(range.count);
    const std::size_t missing = caches_.resident->look_up(file.serial, range.first, range.count, pages_.data());
    if (missing == 0) {
        for (std::uint64_t at = range.offset; at < range.stop;) {
            const std::uint64_t within = at % caches_.page_size, length = std::min(caches_.page_size - within, range.stop - at);
            parts_.push_back({caches_.page_bytes(pages_[(at - range.start) / caches_.page_size]) + within, length});
            at += length;
        }
        caches_.hits += range.count;
        reply(message, channel, range, counters_.pagecache_hit, began);
        return replied;
    }
    if (missing != range.count || (caches_.pool_id >= 0 && caches_.backend == nullptr)) return Outcome::none;
    const bool whole_pages = range.offset == range.start && range.size() == range.count * caches_.page_size;
    if (borrowed != nullptr && replied == Outcome::replied && whole_pages && borrow_later(file, range, *borrowed)) {
        borrowed->began = began;
        return Outcome::borrowed;
    }
    std::byte* const to = buffer(range.count * caches_.page_size);
    parts_.push_back({to + (range.offset - range.start), range.size()});
    if (borrow(file, range, to)) {
        caches_.misses += range.count;
        caches_.succ_gets += range.count;
        caches_.puts += range.count;
        reply(message, channel, range, counters_.cleancache_hit, began);
        return replied;
    }
    handle->file->evictions_after = std::max(file.evictions_after, evicted);  // the kernel will have newer pages
    const auto got = read_source(*handle, file, range, to);
    if (!got) return Outcome::none;
    caches_.misses += range.count;
    reply(message, channel, range, counters_.source_read, began);
    const bool kernel_caches = (in->flags & O_DIRECT) == 0;
    if (kernel_caches && caches_.takes_evictions()) return replied;
    // The requester need not wait for this. Nothing has changed the file since, as nothing else has the state.
    channel.push();
    if (caches_.limit_pages > 0 || caches_.pool_id >= 0) caches_.insert(caches_, file, range.first, to, *got);
    return replied;
}

bool FastPath::borrow_later(const FileState& file, const Range& range, Borrowed& borrowed) {
    if (caches_.pool_id < 0) return false;
    borrowed.backend = caches_.backend;
    if (!borrowed.backend->copy_out(borrowed.backend->engine, caches_.pool_id, file.key(), range.first, range.count, borrowed.pages)) return false;
    ++caches_.decoding;
    caches_.misses += range.count;
    caches_.succ_gets += range.count;
    caches_.puts += range.count;
    counters_.read_bytes += range.size();
    return true;
}

// Send the reply that `parts_` makes, from the second part on. If its requester is gone, nothing is to be undone.
void FastPath::reply(const Message& request, Channel& channel, const Range& range, Histogram& histogram, std::int64_t began) {
    fuse_out_header header{};
    header.len = static_cast<std::uint32_t>(sizeof header + range.size());
    header.unique = request.header().unique;
    parts_[0] = {&header, sizeof header};
    histogram.record(now_ns() - began);  // without the reply, as Python
    if (channel.send(parts_.data(), static_cast<int>(parts_.size())) == Sent::failed) {
        channel.reply(header.unique, -EIO, {});  // many parts need memory of the kernel; a program must not wait for ever
    }
    counters_.read_bytes += range.size();
}

std::byte* FastPath::buffer(std::size_t size) {
    if (buffer_size_ < size) {
        buffer_ = std::make_unique_for_overwrite<std::byte[]>(size);
        buffer_size_ = size;
    }
    return buffer_.get();
}

bool FastPath::borrow(const FileState& file, const Range& range, std::byte* to) const {
    if (caches_.pool_id < 0) return false;
    return caches_.backend->borrow(caches_.backend->engine, caches_.pool_id, file.key(), range.first, range.count, to);
}

// SourceReads.read_whole and SourceFile.read, where that does not wait: of pages that no cache has, while nothing else
// reads the file's source. None if Python must read. Returns the bytes read: all that were asked for, or all up to the
// end of the file. (A part of a page must not be inserted for a whole one.)
std::optional<std::size_t> FastPath::read_source(HandleState& handle, const FileState& file, const Range& range, std::byte* to) {
    if (handle.reads == nullptr || file.reads_in_flight > 0) return std::nullopt;
    if (caches_.pool_id >= 0) {
        const zcache::FastOps& backend = *caches_.backend;
        if (backend.missing(backend.engine, caches_.pool_id, file.key(), range.first, range.count) != range.count) return std::nullopt;
    }
    const auto offset = static_cast<std::int64_t>(range.start);
    const auto size = static_cast<std::int64_t>(range.count * caches_.page_size);
    const auto file_size = static_cast<std::int64_t>(file.size);
    Stream stream = *handle.stream;
    const bool lingers = caches_.drop_behind && stream.lingers(offset, size, file_size);
    if (lingers && stream.passed(offset, size)) return std::nullopt;  // a span goes, in a thread

    NowaitState& able = *handle.nowait;
    InlineState& policy = *handle.reads;
    const bool may_wait = !able.nowait && is_inline(policy, now_ns());
    if (!may_wait && !able.worthwhile()) return std::nullopt;
    const bool drop = caches_.drop_behind && !lingers;
    const bool dontcache = drop && able.dontcache;
    const iovec part{to, static_cast<std::size_t>(size)};
    const long sleeps = may_wait ? sleeps_of_thread() : 0;
    const std::int64_t began = now_ns();
    const ssize_t got = preadv2(handle.fd, &part, 1, offset, (may_wait ? 0 : RWF_NOWAIT) | (dontcache ? rwf_dontcache : 0));
    if (may_wait) note_return(policy, began, sleeps);
    if (got < std::min(size, file_size - offset)) {
        if (!may_wait && (got >= 0 || errno == EAGAIN)) {  // Python need not try again
            able.refused = got > 0 ? 0 : able.refused + 1;
            handle.nowait_tried_at = offset;
        }
        return std::nullopt;
    }
    if (may_wait) {
        if (drop && !dontcache) posix_fadvise(handle.fd, offset, size, POSIX_FADV_DONTNEED);
    } else {
        able.refused = 0;
    }
    *handle.stream = stream;
    ++counters_.source_reads;
    counters_.source_read_bytes += static_cast<std::uint64_t>(got);
    caches_.failed_gets += caches_.pool_id >= 0 ? range.count : 0;
    return static_cast<std::size_t>(got);
}

// FileHandle.write, of a file that is in this machine's memory: nothing here waits. Nothing else runs between the stat
// before the write and the one after, except other processes. If their work shows, Python makes the write once more,
// finds another fingerprint than the known one, and drops the file here and in the kernel. So it does after a write that
// failed, or was cut short. The reply cannot be refused: a requester waits for a request that was read, also if killed.
bool FastPath::write(const Message& message, Channel& channel) {
    const auto in = message.body_as<fuse_write_in>();
    if (!in || message.body().size() - sizeof *in != in->size || in->size == 0) return false;
    HandleState* handle = find(in->fh);
    if (handle == nullptr) return false;
    caches_.opener_ran(*handle);
    if (handle->writes == nullptr) return false;
    FileState& file = *handle->file;
    if (file.mutations > 0 || file.pending_writes > 0 || file.remembers_reads || !file.stamps) return false;
    if ((in->flags & O_DIRECT) != 0 && caches_.evictions != nullptr) return false;
    if ((in->flags & (O_SYNC | O_DSYNC)) != 0 || ((in->flags & O_APPEND) != 0 && caches_.shared)) return false;
    const std::int64_t began = now_ns();
    InlineState& policy = *handle->writes;
    if (!is_inline(policy, began)) return false;
    if (in->offset > max_offset - in->size) return false;

    struct stat st;
    if (fstat(handle->fd, &st) != 0) return false;
    if ((st.st_mode & (S_ISUID | S_ISGID)) != 0) return false;  // they may go, and the kernel must hear of it
    const mode_t mode = st.st_mode;
    const Stamps before = Stamps::of(st);
    if (caches_.shared && before != *file.stamps) return false;

    const std::uint64_t stop = in->offset + in->size;
    caches_.drain_evictions();  // for the pages that stay valid
    if (!flush(file, in->offset, stop)) return false;
    const long sleeps = sleeps_of_thread();
    const ssize_t written = pwrite(handle->fd, message.body().data() + sizeof *in, in->size, static_cast<off_t>(in->offset));
    note_return(policy, began, sleeps);
    caches_.new_version(file);  // a read of the source that began before is stale
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
    counters_.write.record(now_ns() - began);
    channel.reply(message.header().unique, 0, {reinterpret_cast<const std::byte*>(&out), sizeof out});
    counters_.write_bytes += in->size;
    ++counters_.writes;
    return true;
}

// That of an open file or directory; -1 if it is not known here.
int FastPath::fd_of(std::uint32_t opcode, std::uint64_t fh) {
    if (opcode == FUSE_FSYNCDIR) return directories_ ? directories_->fd_of(fh) : -1;
    const HandleState* handle = find(fh);
    return handle == nullptr ? -1 : handle->fd;
}

// FileHandle.sync and DirHandle.sync. Its thread replies.
bool FastPath::sync(const Message& message, Channel& channel) {
    const auto in = message.body_as<fuse_fsync_in>();
    const int fd = in ? fd_of(message.header().opcode, in->fh) : -1;
    if (fd < 0) return false;
    if (!sync_threads_) sync_threads_ = std::make_unique<SyncThreads>(channel.device(), channel.queues());
    const bool data_only = (in->fsync_flags & FUSE_FSYNC_FDATASYNC) != 0;
    const std::uint64_t unique = message.header().unique;
    collect_synced();
    syncing_[unique] = {message.header()};  // first, as the call may end at once
    if (sync_threads_->start(unique, fd, data_only)) return true;
    syncing_.erase(unique);
    return false;
}

const fuse_in_header* FastPath::syncing(std::uint64_t unique) {
    collect_synced();
    const auto found = syncing_.find(unique);
    if (found == syncing_.end()) return nullptr;
    found->second.asked_for = true;
    return &found->second.header;
}

std::size_t FastPath::syncing() {
    collect_synced();
    return syncing_.size();
}

std::vector<SyncThreads::Done> FastPath::take_synced() {
    if (!syncing_.empty()) collect_synced();
    return std::exchange(synced_, {});
}

void FastPath::collect_synced() {
    if (!sync_threads_) return;
    sync_threads_->take_done(done_);
    for (const SyncThreads::Done& call : done_) {
        const auto found = syncing_.find(call.unique);
        if (found->second.asked_for) synced_.push_back(call);
        syncing_.erase(found);
    }
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
