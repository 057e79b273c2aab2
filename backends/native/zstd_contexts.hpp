// Ownership and parameters of zstd's contexts, the same for every use in the engine.
#pragma once

#include <zstd.h>

#include <memory>
#include <new>

namespace zcache {

struct FreeZstd {
    void operator()(ZSTD_CCtx* context) const { ZSTD_freeCCtx(context); }
    void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
    void operator()(ZSTD_CDict* dictionary) const { ZSTD_freeCDict(dictionary); }
    void operator()(ZSTD_DDict* dictionary) const { ZSTD_freeDDict(dictionary); }
};

// Take ownership of what zstd has made. Throws std::bad_alloc if that is null.
template <class T>
std::unique_ptr<T, FreeZstd> own(T* made) {
    if (made == nullptr) throw std::bad_alloc();
    return std::unique_ptr<T, FreeZstd>(made);
}

inline std::unique_ptr<ZSTD_CCtx, FreeZstd> new_compress_context(int level) {
    auto context = own(ZSTD_createCCtx());
    ZSTD_CCtx_setParameter(context.get(), ZSTD_c_compressionLevel, level);
    // Each of these would store some bytes in every page that are known anyway.
    ZSTD_CCtx_setParameter(context.get(), ZSTD_c_contentSizeFlag, 0);
    ZSTD_CCtx_setParameter(context.get(), ZSTD_c_checksumFlag, 0);
    ZSTD_CCtx_setParameter(context.get(), ZSTD_c_dictIDFlag, 0);
    return context;
}

}  // namespace zcache
