#include "codec.hpp"

#include <lz4.h>
#include <lz4hc.h>
#include <malloc.h>
#include <zdict.h>
#include <zstd.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <string>

namespace zcache {

namespace {

// Bytes of a dictionary. 64 KiB from 1 MiB of samples is within 3 % of the density of 112 KiB from 8 MiB
// (Python source, 4 KiB pages; docs/zcache.md).
constexpr std::size_t dictionary_capacity = std::size_t{64} << 10;

// A dictionary is used if it shrinks the validation samples to at most this percentage.
constexpr std::size_t worthwhile_percent = 97;

// One page in so many is a sample, so that samples come from many files.
constexpr std::uint64_t sample_every = 8;

const char* chars(const std::byte* bytes) { return reinterpret_cast<const char*>(bytes); }
char* chars(std::byte* bytes) { return reinterpret_cast<char*>(bytes); }

void check_level(const CodecOptions& options, int least, int most) {
    if (options.level < least || options.level > most) {
        throw std::invalid_argument("compression level " + std::to_string(options.level) + " is not " +
                                    std::to_string(least) + " to " + std::to_string(most));
    }
}

template <class T>
T* must(T* made) {
    if (made == nullptr) throw std::bad_alloc();
    return made;
}

struct Free {
    void operator()(ZSTD_CCtx* context) const { ZSTD_freeCCtx(context); }
    void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
    void operator()(ZSTD_CDict* dictionary) const { ZSTD_freeCDict(dictionary); }
    void operator()(ZSTD_DDict* dictionary) const { ZSTD_freeDDict(dictionary); }
};

}  // namespace

struct Codec::Dictionary {
    std::unique_ptr<ZSTD_CDict, Free> compress;
    std::unique_ptr<ZSTD_DDict, Free> decompress;
};

struct Scratch::Contexts {
    std::vector<std::byte> lz4;  // LZ4's or LZ4HC's state
    std::unique_ptr<ZSTD_CCtx, Free> compress;
    std::unique_ptr<ZSTD_DCtx, Free> decompress;
};

Scratch::Scratch(const Codec& codec, Use use) : use_(use) { reset(codec); }

void Scratch::reset(const Codec& codec) {
    auto fresh = std::make_unique<Contexts>();
    const CodecOptions& options = codec.options();
    if (use_ == Use::decompress) {
        if (options.method == Method::zstd) fresh->decompress.reset(must(ZSTD_createDCtx()));
    } else if (options.method == Method::lz4) {
        fresh->lz4.resize(static_cast<std::size_t>(LZ4_sizeofState()));
    } else if (options.method == Method::lz4hc) {
        fresh->lz4.resize(static_cast<std::size_t>(LZ4_sizeofStateHC()));
    } else if (options.method == Method::zstd) {
        fresh->compress.reset(must(ZSTD_createCCtx()));
        ZSTD_CCtx* context = fresh->compress.get();
        ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, options.level);
        // Each of these would store some bytes in every page that are known anyway.
        ZSTD_CCtx_setParameter(context, ZSTD_c_contentSizeFlag, 0);
        ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 0);
        ZSTD_CCtx_setParameter(context, ZSTD_c_dictIDFlag, 0);
    }
    contexts_ = std::move(fresh);
    std::vector<std::byte>().swap(out_);
}

Scratch::~Scratch() = default;

std::size_t Scratch::bytes() const {
    std::size_t bytes = contexts_->lz4.size() + out_.capacity();
    if (contexts_->compress) bytes += ZSTD_sizeof_CCtx(contexts_->compress.get());
    if (contexts_->decompress) bytes += ZSTD_sizeof_DCtx(contexts_->decompress.get());
    return bytes;
}

Codec::Codec(CodecOptions options, std::size_t sample_bytes)
    : options_(options), sample_bytes_(std::min(sample_bytes, max_sample_bytes)) {
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
    std::size_t room = options_.method == Method::zstd ? ZSTD_compressBound(page.size()) : most;
    if (scratch.out_.size() < room) scratch.out_.resize(room);
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
            with_dictionary = trained_.load(std::memory_order_acquire) && dictionary_ != nullptr;
            const ZSTD_CDict* dictionary = with_dictionary ? dictionary_->compress.get() : nullptr;
            if (ZSTD_isError(ZSTD_CCtx_refCDict(contexts.compress.get(), dictionary)) != 0) return std::nullopt;
            size = ZSTD_compress2(contexts.compress.get(), out, room, page.data(), page.size());
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
                if (!trained_.load(std::memory_order_acquire) || dictionary_ == nullptr) return false;
                size = ZSTD_decompress_usingDDict(context, out.data(), out.size(), in.data(), in.size(),
                                                  dictionary_->decompress.get());
            } else {
                size = ZSTD_decompressDCtx(context, out.data(), out.size(), in.data(), in.size());
            }
            return ZSTD_isError(size) == 0 && size == out.size();
        }
    }
    return false;
}

void Codec::sample(Bytes page) {
    if (offered_++ % sample_every != 0) return;
    if (samples_.empty()) samples_.reserve(sample_bytes_ + max_page_size);
    samples_.insert(samples_.end(), page.begin(), page.end());
    sample_sizes_.push_back(page.size());
    bytes_.store(samples_.capacity(), std::memory_order_relaxed);
    if (samples_.size() >= sample_bytes_) train();
}

// Total size of the samples from `first` on, compressed one by one.
std::size_t Codec::compressed_samples(std::size_t first, const ZSTD_CDict_s* dictionary) const {
    Scratch scratch(*this, Scratch::Use::compress);
    ZSTD_CCtx* context = scratch.contexts_->compress.get();
    std::vector<std::byte> out(ZSTD_compressBound(max_page_size));
    std::size_t total = 0, offset = 0;
    for (std::size_t at = 0; at < sample_sizes_.size(); offset += sample_sizes_[at++]) {
        if (at < first) continue;
        ZSTD_CCtx_refCDict(context, dictionary);
        total += ZSTD_compress2(context, out.data(), out.size(), samples_.data() + offset, sample_sizes_[at]);
    }
    return total;
}

void Codec::train() {
    std::size_t train_on = sample_sizes_.size() - sample_sizes_.size() / 8;  // the others are for validation
    std::vector<std::byte> content(std::min(dictionary_capacity, samples_.size() / 16));
    std::size_t size = ZDICT_trainFromBuffer(content.data(), content.size(), samples_.data(),
                                             sample_sizes_.data(),
                                             static_cast<unsigned>(train_on));
    std::size_t bytes = 0;
    if (ZDICT_isError(size) == 0) {  // else such pages yield no dictionary
        auto made = std::make_unique<Dictionary>();
        made->compress.reset(must(ZSTD_createCDict(content.data(), size, options_.level)));
        made->decompress.reset(must(ZSTD_createDDict(content.data(), size)));
        // Pages that are not alike (programs, for one) compress worse with a dictionary than without.
        if (compressed_samples(train_on, made->compress.get()) * 100 <
            compressed_samples(train_on, nullptr) * worthwhile_percent) {
            bytes = ZSTD_sizeof_CDict(made->compress.get()) + ZSTD_sizeof_DDict(made->decompress.get());
            dictionary_bytes_.store(size, std::memory_order_relaxed);
            dictionary_ = std::move(made);
        }
    }
    std::vector<std::byte>().swap(samples_);
    std::vector<std::size_t>().swap(sample_sizes_);
    malloc_trim(0);  // training took some megabytes
    bytes_.store(bytes, std::memory_order_relaxed);
    trained_.store(true, std::memory_order_release);
}

}  // namespace zcache
