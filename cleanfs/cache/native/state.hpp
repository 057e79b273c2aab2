// What the FUSE channel must know of files and caches to serve a request without Python.
//
// Python writes it, on trio's thread, where it decides (cleanfs/cache/state.py says what each field means). The channel
// reads it on the same thread, so there is no lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "fast_ops.hpp"
#include "resident.hpp"

namespace cleanfs {

// One file: the native part of cleanfs.cache.files.CachedFile.
struct FileState {
    Resident::Serial serial = 0;
    std::uint64_t device = 0, inode = 0;
    std::string generation;
    std::uint64_t size = 0;
    std::uint32_t pending_writes = 0;
    bool remembers_reads = false;

    zcache::FileKey key() const { return {device, inode, generation}; }
};

// One open file: the native part of cleanfs.vfs.handles.FileHandle.
struct HandleState {
    FileState* file = nullptr;
    bool drop_due = false;
};

// One mount's caches.
struct CacheState {
    std::size_t page_size = 0;
    Resident* resident = nullptr;
    char* (*page_bytes)(Resident::Page) = nullptr;
    const zcache::FastOps* backend = nullptr;
    int pool_id = -1;

    std::uint64_t hits = 0, misses = 0, succ_gets = 0, puts = 0;  // of requests served by the channel, in pages
};

}  // namespace cleanfs
