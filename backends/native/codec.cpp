#include "codec.hpp"

#include <lz4.h>
#include <lz4hc.h>

#include <algorithm>
#include <string>

namespace zcache {

namespace {

const char* chars(const std::byte* bytes) { return reinterpret_cast<const char*>(bytes); }
char* chars(std::byte* bytes) { return reinterpret_cast<char*>(bytes); }

void check_level(const CodecOptions& options, int least, int most) {
    if (options.level < least || options.level > most) {
        throw std::invalid_argument("compression level " + std::to_string(options.level) + " is not " +
                                    std::to_string(least) + " to " + std::to_string(most));
    }
}

}  // namespace

struct Scratch::Contexts {
    std::vector<std::byte> lz4;  // LZ4's or LZ4HC's state
    std::unique_ptr<ZSTD_CCtx, FreeZstd> compress;
    std::unique_ptr<ZSTD_DCtx, FreeZstd> decompress;
};

Scratch::Scratch(const Codec& codec, Use use) : use_(use) { reset(codec); }

void Scratch::reset(const Codec& codec) {
    auto fresh = std::make_unique<Contexts>();
    const CodecOptions& options = codec.options();
    if (use_ == Use::decompress) {
        if (options.method == Method::zstd) fresh->decompress = own(ZSTD_createDCtx());
    } else if (options.method == Method::lz4) {
        fresh->lz4.resize(static_cast<std::size_t>(LZ4_sizeofState()));
    } else if (options.method == Method::lz4hc) {
        fresh->lz4.resize(static_cast<std::size_t>(LZ4_sizeofStateHC()));
    } else if (options.method == Method::zstd) {
        fresh->compress = new_compress_context(options.level);
    }
    contexts_ = std::move(fresh);
    std::vector<std::byte>().swap(out_);
}

Scratch::~Scratch() = default;

bool Scratch::serves(const Codec& codec) const {
    return use_ == Use::decompress && (codec.options().method != Method::zstd || contexts_->decompress);
}

std::size_t Scratch::bytes() const {
    std::size_t bytes = contexts_->lz4.size() + out_.capacity();
    if (contexts_->compress) bytes += ZSTD_sizeof_CCtx(contexts_->compress.get());
    if (contexts_->decompress) bytes += ZSTD_sizeof_DCtx(contexts_->decompress.get());
    return bytes;
}

Codec::Codec(CodecOptions options, std::size_t sample_bytes)
    : options_(options), dictionary_(options.level, std::min(sample_bytes, max_sample_bytes)) {
    switch (options.method) {
        case Method::none:
            break;
        case Method::lz4:
            check_level(options, 1, 65537);
            break;
        case Method::lz4hc:
            check_level(options, 1, LZ4HC_CLEVEL_MAX);
            break;
        case Method::zstd:
            check_level(options, ZSTD_minCLevel(), ZSTD_maxCLevel());
            break;
    }
    if (options.dictionary && options.method != Method::zstd) {
        throw std::invalid_argument("only zstd trains a dictionary");
    }
}

Codec::~Codec() = default;

std::optional<Codec::Compressed> Codec::compress(Scratch& scratch, Bytes page, std::size_t most) const {
    if (options_.method == Method::none) return std::nullopt;
    // zstd is some percent faster if it does not have to check for the end of its output.
    std::size_t out_size = options_.method == Method::zstd ? ZSTD_compressBound(page.size()) : most;
    if (scratch.out_.size() < out_size) scratch.out_.resize(out_size);
    std::byte* out = scratch.out_.data();
    Scratch::Contexts& contexts = *scratch.contexts_;
    auto in_size = static_cast<int>(page.size());
    auto capacity = static_cast<int>(most);
    std::size_t size = 0;
    bool with_dictionary = false;
    switch (options_.method) {
        case Method::none:
            break;
        case Method::lz4:
            size = static_cast<std::size_t>(LZ4_compress_fast_extState(
                contexts.lz4.data(), chars(page.data()), chars(out), in_size, capacity, options_.level));
            break;
        case Method::lz4hc:
            size = static_cast<std::size_t>(LZ4_compress_HC_extStateHC(
                contexts.lz4.data(), chars(page.data()), chars(out), in_size, capacity, options_.level));
            break;
        case Method::zstd: {
            const ZSTD_CDict* dictionary = dictionary_.compress();
            with_dictionary = dictionary != nullptr;
            if (ZSTD_isError(ZSTD_CCtx_refCDict(contexts.compress.get(), dictionary)) != 0) return std::nullopt;
            size = ZSTD_compress2(contexts.compress.get(), out, out_size, page.data(), page.size());
            if (ZSTD_isError(size) != 0) size = 0;
            break;
        }
    }
    if (size == 0 || size > most) return std::nullopt;
    return Compressed{{out, size}, with_dictionary};
}

std::size_t Codec::context_bytes(std::size_t page_size) const {
    Scratch scratch(*this, Scratch::Use::compress);
    compress(scratch, std::vector<std::byte>(page_size), page_size);
    return scratch.bytes();
}

bool Codec::decompress(Scratch& scratch, Bytes in, bool with_dictionary, MutableBytes out) const {
    switch (options_.method) {
        case Method::none:
            return false;
        case Method::lz4:
        case Method::lz4hc:
            return LZ4_decompress_safe(chars(in.data()), chars(out.data()), static_cast<int>(in.size()),
                                       static_cast<int>(out.size())) == static_cast<int>(out.size());
        case Method::zstd: {
            ZSTD_DCtx* context = scratch.contexts_->decompress.get();
            std::size_t size;
            if (with_dictionary) {
                const ZSTD_DDict* dictionary = dictionary_.decompress();
                if (dictionary == nullptr) return false;
                size = ZSTD_decompress_usingDDict(context, out.data(), out.size(), in.data(), in.size(), dictionary);
            } else {
                size = ZSTD_decompressDCtx(context, out.data(), out.size(), in.data(), in.size());
            }
            return ZSTD_isError(size) == 0 && size == out.size();
        }
    }
    return false;
}

}  // namespace zcache
