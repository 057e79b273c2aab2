// What a frontend may call without Python: a table of functions of one engine.
//
// The engine's Python object gives it out in a capsule (cleanfs.backends.ops.FastOps). No call may throw, wait, or need
// the GIL.
#pragma once

#include "index.hpp"
#include "stored_pages.hpp"
#include "types.hpp"

namespace zcache {

struct FastOps {
    static constexpr const char* capsule = "cleanfs.backends.fast_ops";

    void* engine = nullptr;
    // Zcache::borrow. False also if the call failed; then nothing has changed.
    bool (*borrow)(void* engine, int pool, const FileKey& key, PageIndex first, std::size_t count, std::byte* to) = nullptr;
    // Zcache::copy_out and decode. The second may be called by any thread, as long as the engine lives.
    bool (*copy_out)(void* engine, int pool, const FileKey& key, PageIndex first, std::size_t count, StoredPages& to) = nullptr;
    bool (*decode)(void* engine, StoredPages& pages, std::byte* to) = nullptr;
    // Zcache::missing. 0 if the call failed.
    std::size_t (*missing)(void* engine, int pool, const FileKey& key, PageIndex first, std::size_t count) = nullptr;
    // Zcache::flush_pages. False if the call failed.
    bool (*flush)(void* engine, int pool, const FileKey& key, PageIndex first, PageIndex stop) = nullptr;
    // Zcache::put, of one page. False if the call failed; then no get finds what was there before.
    bool (*put)(void* engine, int pool, const FileKey& key, PageIndex index, const std::byte* page) = nullptr;
};

}  // namespace zcache
