// A zstd dictionary, trained from the pages that the engine compresses.
//
// Pages of one source share much that no single page repeats, so a dictionary makes them denser
// (docs/zcache.md has figures). One thread offers samples and trains; other threads may use the dictionary
// at any time. There is none until it is trained, and none at all if the pages turn out not to be alike.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "types.hpp"
#include "zstd_contexts.hpp"

namespace zcache {

class Dictionary {
public:
    // Samples take up to `sample_bytes`.
    Dictionary(int level, std::size_t sample_bytes) : level_(level), sample_bytes_(sample_bytes) {}

    // -- for the thread that trains -------------------------------------------------------------------

    bool wants_samples() const { return !trained_.load(std::memory_order_relaxed); }
    // Offer a page. Once there are enough samples, train, which takes some 40 milliseconds.
    void sample(Bytes page);

    // -- for all threads ------------------------------------------------------------------------------

    // Null while there is no dictionary.
    const ZSTD_CDict* compress() const { return is_trained() ? compress_.get() : nullptr; }
    const ZSTD_DDict* decompress() const { return is_trained() ? decompress_.get() : nullptr; }
    // Bytes of the dictionary in its three forms and of the samples.
    std::size_t bytes() const { return bytes_.load(std::memory_order_relaxed); }
    // Bytes of the dictionary itself.
    std::size_t content_bytes() const { return content_bytes_.load(std::memory_order_relaxed); }

private:
    bool is_trained() const { return trained_.load(std::memory_order_acquire); }
    void train();
    std::size_t compressed_samples(std::size_t first, const ZSTD_CDict* dictionary) const;

    const int level_;
    const std::size_t sample_bytes_;
    std::vector<std::byte> samples_;
    std::vector<std::size_t> sample_sizes_;
    std::uint64_t offered_ = 0;
    std::unique_ptr<ZSTD_CDict, FreeZstd> compress_;
    std::unique_ptr<ZSTD_DDict, FreeZstd> decompress_;
    std::atomic<bool> trained_ = false;  // set last: the two above do not change afterwards
    std::atomic<std::size_t> bytes_ = 0;
    std::atomic<std::size_t> content_bytes_ = 0;
};

}  // namespace zcache
