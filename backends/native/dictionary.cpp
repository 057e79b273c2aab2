#include "dictionary.hpp"

#include <malloc.h>
#include <zdict.h>

#include <algorithm>

namespace zcache {

namespace {

// Bytes of a dictionary. 64 KiB from 1 MiB of samples is within 3 % of the density of 112 KiB from 8 MiB
// (Python source, 4 KiB pages; docs/zcache.md).
constexpr std::size_t dictionary_capacity = std::size_t{64} << 10;

// A dictionary is used if it shrinks the validation samples to at most this percentage.
constexpr std::size_t worthwhile_percent = 97;

// One page in so many is a sample, so that samples come from many files.
constexpr std::uint64_t sample_every = 8;

}  // namespace

void Dictionary::sample(Bytes page) {
    if (offered_++ % sample_every != 0) return;
    if (samples_.empty()) samples_.reserve(sample_bytes_ + max_page_size);
    samples_.insert(samples_.end(), page.begin(), page.end());
    sample_sizes_.push_back(page.size());
    bytes_.store(samples_.capacity(), std::memory_order_relaxed);
    if (samples_.size() >= sample_bytes_) train();
}

// Total size of the samples from `first` on, compressed one by one.
std::size_t Dictionary::compressed_samples(std::size_t first, const ZSTD_CDict* dictionary) const {
    auto owned = new_compress_context(level_);
    ZSTD_CCtx* context = owned.get();
    std::vector<std::byte> out(ZSTD_compressBound(max_page_size));
    std::size_t total = 0, offset = 0;
    for (std::size_t at = 0; at < sample_sizes_.size(); offset += sample_sizes_[at++]) {
        if (at < first) continue;
        ZSTD_CCtx_refCDict(context, dictionary);
        total += ZSTD_compress2(context, out.data(), out.size(), samples_.data() + offset, sample_sizes_[at]);
    }
    return total;
}

void Dictionary::train() {
    std::size_t train_on = sample_sizes_.size() - sample_sizes_.size() / 8;  // the others are for validation
    std::vector<std::byte> content(std::min(dictionary_capacity, samples_.size() / 16));
    std::size_t size = ZDICT_trainFromBuffer(content.data(), content.size(), samples_.data(),
                                             sample_sizes_.data(),
                                             static_cast<unsigned>(train_on));
    std::size_t bytes = 0;
    if (ZDICT_isError(size) == 0) {  // else such pages yield no dictionary
        auto compress = own(ZSTD_createCDict(content.data(), size, level_));
        auto decompress = own(ZSTD_createDDict(content.data(), size));
        // Pages that are not alike (programs, for one) compress worse with a dictionary than without.
        if (compressed_samples(train_on, compress.get()) * 100 <
            compressed_samples(train_on, nullptr) * worthwhile_percent) {
            bytes = ZSTD_sizeof_CDict(compress.get()) + ZSTD_sizeof_DDict(decompress.get());
            content_bytes_.store(size, std::memory_order_relaxed);
            compress_ = std::move(compress);
            decompress_ = std::move(decompress);
        }
    }
    std::vector<std::byte>().swap(samples_);
    std::vector<std::size_t>().swap(sample_sizes_);
    malloc_trim(0);  // training took some megabytes
    bytes_.store(bytes, std::memory_order_relaxed);
    trained_.store(true, std::memory_order_release);
}

}  // namespace zcache
