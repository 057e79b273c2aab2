// Serve requests without Python: READs whose pages are all cached, and WRITEs to local files that nobody else changes.
//
// A request is served only where no rule holds it back. In all other cases nothing has been done or counted, and the
// caller hands the request to Python, which is the reference for every rule (cleanfs/vfs/handles.py and
// cleanfs/cache/pagecache.py; the tests compare the two).
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "attribute_changes.hpp"
#include "channel.hpp"
#include "directories.hpp"
#include "histogram.hpp"
#include "metadata.hpp"
#include "name_changes.hpp"
#include "open_handles.hpp"
#include "state.hpp"
#include "sync_threads.hpp"

namespace cleanfs {

class FastPath {
public:
    explicit FastPath(CacheState& caches) : caches_(caches) {}

    // Both must outlive the handle's time here.
    void add(std::uint64_t fh, HandleState& handle) { handles_[fh] = &handle; }
    void remove(std::uint64_t fh) { handles_.erase(fh); }

    // Serve names, attributes and directories, open files and remove names, too. `inodes` must outlive this object.
    void serve_metadata(InodeStates& inodes) {
        metadata_.emplace(inodes);
        directories_.emplace(inodes, *metadata_);
        open_handles_.emplace(caches_, inodes, *metadata_);
        name_changes_.emplace(inodes, *metadata_, *open_handles_);
        attribute_changes_.emplace(caches_, inodes, *metadata_);
    }

    // The files that were opened here; null before `serve_metadata`.
    OpenHandles* open_handles() { return open_handles_ ? &*open_handles_ : nullptr; }
    // Null before `serve_metadata`.
    Directories* directories() { return directories_ ? &*directories_ : nullptr; }

    // Serve a request and send the reply. False if Python must.
    bool serve(const Message& message, Channel& channel);

    // -- for threads beside the main one, with the state lock ---------------------------------------------

    // Pages of a READ that are still to be decoded.
    struct Borrowed {
        std::size_t size() const { return pages.pages.size() * pages.page_size; }

        zcache::StoredPages pages;
        const zcache::FastOps* backend = nullptr;
        std::int64_t began = 0;
    };
    enum class Outcome : std::uint8_t {
        none,      // nothing was done: the main thread must serve it
        borrowed,  // `decode` makes the reply
        replied,
        in_order,  // replied, and the kernel must have the reply before the lock is given up
    };
    // Whether `serve_beside` may serve such a request.
    static bool may_serve_beside(const Message& message);
    // Serve a request without a wait. Of Python, only pages are touched: CacheState's `discard` and `insert`.
    Outcome serve_beside(const Message& message, Channel& channel, Borrowed& borrowed);
    // Write the pages to `to`, without the lock. False if that failed: call `take_back`, with the lock: nothing was
    // done or counted.
    bool decode(Borrowed& borrowed, std::byte* to);
    void take_back(const Borrowed& borrowed, Channel& channel, const Message& message);

    // The FSYNC under way with that id, of which `take_synced` will tell; null if there is none.
    const fuse_in_header* syncing(std::uint64_t unique);
    // How many are under way.
    std::size_t syncing();
    // Those that were asked for by `syncing` and have had their reply.
    std::vector<SyncThreads::Done> take_synced();

    struct Counters {
        std::uint64_t served = 0, writes = 0;
        std::uint64_t read_bytes = 0, write_bytes = 0;
        std::uint64_t source_reads = 0, source_read_bytes = 0;
        Histogram pagecache_hit, cleancache_hit, source_read, write;
    };
    const Counters& counters() {
        const std::lock_guard lock(decoded_mutex_);
        counters_.cleancache_hit.add(std::exchange(decoded_, {}));
        return counters_;
    }

private:
    // The bytes of a READ, and the pages that hold them.
    struct Range {
        Range(std::uint64_t from, std::uint64_t to, std::uint64_t page_size)
            : offset(from), stop(to), first(from / page_size), start(first * page_size), count((to - 1) / page_size + 1 - first) {}

        std::uint64_t size() const { return stop - offset; }

        std::uint64_t offset, stop;
        PageIndex first;
        std::uint64_t start;  // of the first page
        std::uint64_t count;  // of pages
    };

    bool serve_here(const Message& message, Channel& channel);
    HandleState* find(std::uint64_t fh);
    Outcome read(const Message& message, Channel& channel, Borrowed* borrowed);
    bool borrow_later(const FileState& file, const Range& range, Borrowed& borrowed);
    bool borrow(const FileState& file, const Range& range, std::byte* to) const;
    std::optional<std::size_t> read_source(HandleState& handle, const FileState& file, const Range& range, std::byte* to);
    int fd_of(std::uint32_t opcode, std::uint64_t fh);
    bool sync(const Message& message, Channel& channel);
    void collect_synced();
    std::byte* buffer(std::size_t size);
    void reply(const Message& request, Channel& channel, const Range& range, Histogram& histogram, std::int64_t began);
    bool write(const Message& message, Channel& channel);
    bool flush(const FileState& file, std::uint64_t start, std::uint64_t stop);

    CacheState& caches_;
    std::optional<Metadata> metadata_;
    std::optional<Directories> directories_;
    std::optional<OpenHandles> open_handles_;
    std::optional<NameChanges> name_changes_;
    std::optional<AttributeChanges> attribute_changes_;
    std::unique_ptr<SyncThreads> sync_threads_;  // made for the first FSYNC
    struct Sync {
        fuse_in_header header;
        bool asked_for = false;
    };
    std::unordered_map<std::uint64_t, Sync> syncing_;  // by unique
    std::vector<SyncThreads::Done> done_, synced_;
    std::unordered_map<std::uint64_t, HandleState*> handles_;  // by fh
    std::vector<Resident::Page> pages_;                        // of the read under way
    std::vector<iovec> parts_;                                 // of its reply
    std::unique_ptr<std::byte[]> buffer_;                      // of pages that are not resident
    std::size_t buffer_size_ = 0;
    Counters counters_;
    std::mutex decoded_mutex_;
    Histogram decoded_;  // of `decode`, protected by the mutex
};

}  // namespace cleanfs
