// What the FUSE channel must know of files and caches to serve a request without Python.
//
// Python writes it, on trio's thread, where it decides (cleanfs/cache/state.py says what each field means). The channel
// reads it on the same thread; others take the lock that this thread holds meanwhile (state_lock.hpp).
#pragma once

#include <sys/stat.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "fast_ops.hpp"
#include "resident.hpp"
#include "stream.hpp"

namespace cleanfs {

// Since 1970. 64 bits end in 2262, but a file's mtime may be any number of seconds.
__extension__ typedef __int128 Nanoseconds;

// What moves when the content of a file does: size, mtime and ctime, as stat(2) reports them.
struct Stamps {
    std::int64_t size = 0;
    Nanoseconds mtime_ns = 0, ctime_ns = 0;

    static Stamps of(const struct stat& st) {
        return {st.st_size, nanoseconds(st.st_mtim), nanoseconds(st.st_ctim)};
    }
    static Nanoseconds nanoseconds(const timespec& time) { return Nanoseconds{time.tv_sec} * 1'000'000'000 + time.tv_nsec; }

    bool operator==(const Stamps&) const = default;
};

// One file: the native part of cleanfs.cache.files.CachedFile.
struct FileState {
    Resident::Serial serial = 0;
    std::uint64_t device = 0, inode = 0;
    std::string generation;
    std::uint64_t size = 0;
    std::optional<Stamps> stamps;  // the fingerprint
    bool racy = true;
    std::uint64_t version = 0;
    std::uint32_t mutations = 0, pending_writes = 0, reads_in_flight = 0;
    bool remembers_reads = false;
    bool forgotten = false;  // no record any more
    std::int64_t pins = 0;
    std::uint32_t handles = 0, drops_due = 0;
    bool used = false;
    std::uint64_t evictions_after = 0;  // a page that the kernel evicted before this position is stale (Evictions)

    zcache::FileKey key() const { return {device, inode, generation}; }
};

// One inode as the kernel may see it: the native part of cleanfs.vfs.kernel_view.KernelView.
struct KernelState {
    std::optional<Stamps> sent;
    std::int64_t size = -1;
    std::uint64_t dropped_for = 0;  // a handle's serial, or 0
    double pages_dropped_by = 0;
};

// Whether calls of one kind to one file system are made inline: the native part of
// cleanfs.source.inline_policy.InlinePolicy. Times are those of CLOCK_MONOTONIC, in seconds.
struct InlineState {
    bool inline_calls = false;
    double returned_at = 0;
    double waited_seconds = 0;  // an inline call waited, which the policy has not heard of yet
};

// What reads of one file system of the source can do: the native part of cleanfs.source.io.SourceFs.
struct NowaitState {
    static constexpr std::uint32_t max_refusals = 16, step = 8;  // inline_policy.NowaitProbe

    bool nowait = true;     // RWF_NOWAIT works
    bool dontcache = true;  // RWF_DONTCACHE works
    std::uint32_t refused = 0;

    bool worthwhile() const { return nowait && (refused < max_refusals || refused % step == 0); }
};

// One open file: the native part of cleanfs.vfs.handles.FileHandle.
struct HandleState {
    FileState* file = nullptr;
    KernelState* kernel = nullptr;
    InlineState* writes = nullptr;  // null if writes through this handle wait for the source
    InlineState* reads = nullptr;   // null if reads do
    NowaitState* nowait = nullptr;
    Stream* stream = nullptr;
    int fd = -1;
    bool drop_due = false;
    std::int64_t nowait_tried_at = -1;
    std::uint64_t serial = 0;  // of Python's handles

    // FileHandle.opener_ran: a request by this handle has come, so the kernel has applied the reply to its OPEN.
    void opener_ran() {
        if (drop_due) {
            drop_due = false;
            --file->drops_due;
        }
        if (serial != 0 && kernel->dropped_for == serial) {
            kernel->dropped_for = 0;
            kernel->pages_dropped_by = 0;
        }
    }
};

// Pages that the kernel has evicted, in order (cleanfs/vfs/native/evicted_pages.hpp). They wait to be put.
struct Evictions {
    static constexpr const char* capsule = "cleanfs.vfs.evictions";

    void* pages = nullptr;
    // Put those that wait, or many of them. It needs no GIL.
    void (*drain)(void* pages) noexcept = nullptr;
    // Whatever is evicted from now on has this position or a later one.
    std::uint64_t (*position)(void* pages) noexcept = nullptr;
};

// One mount's caches.
struct CacheState {
    std::size_t page_size = 0;
    bool shared = true;       // others may change the source, and where a file ends
    bool drop_behind = true;  // what reads leave in the source's page cache goes
    std::uint64_t clock = 0;  // of versions

    Resident* resident = nullptr;
    std::size_t limit_pages = 0;  // that may be resident
    char* (*page_bytes)(Resident::Page) = nullptr;
    // The next two take the GIL, since pages are Python's. Resident::discard:
    void (*discard)(Resident* resident, Resident::Serial file, PageIndex first, PageIndex stop) noexcept = nullptr;
    // Make the pages of a file, from an index on, resident; evict as many as there are too many. The last one may be short.
    void (*insert)(CacheState& caches, const FileState& file, PageIndex first, const std::byte* data, std::size_t size) noexcept = nullptr;

    int pool_id = -1;
    const zcache::FastOps* backend = nullptr;  // the one that gave the pool, if it has them
    std::atomic<std::size_t> decoding = 0;     // threads that use it without the state lock

    const Evictions* evictions = nullptr;  // if the kernel hands over what it evicts

    // Whether that fills the pool. Then reads make no pages resident: the kernel keeps them.
    bool takes_evictions() const { return evictions != nullptr && (pool_id < 0 || backend != nullptr); }

    // Put what the kernel has evicted by now, or much of it. Returns the position that ends it.
    std::uint64_t drain_evictions() const {
        if (evictions == nullptr) return 0;
        const std::uint64_t position = evictions->position(evictions->pages);
        evictions->drain(evictions->pages);
        return position;
    }
    // Reads that began before now are stale, and so is what the kernel has evicted.
    void new_version(FileState& file) {
        file.version = ++clock;
        forget_evictions(file);
    }
    // HandleState::opener_ran. What the kernel evicted before that may be stale.
    void opener_ran(HandleState& handle) const {
        if (handle.drop_due) forget_evictions(*handle.file);
        handle.opener_ran();
    }

    // Of requests served by the channel, in pages; flushes in calls.
    std::uint64_t hits = 0, misses = 0, succ_gets = 0, failed_gets = 0, puts = 0, flushes = 0;

private:
    void forget_evictions(FileState& file) const {
        if (evictions != nullptr) file.evictions_after = evictions->position(evictions->pages);
    }
};

}  // namespace cleanfs
