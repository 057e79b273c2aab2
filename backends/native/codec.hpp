// Page codecs: lz4, lz4hc, zstd and none, and the dictionary that zstd can train from the pages.
//
// Threads share a codec. The buffers and contexts that compressing needs are a Scratch, one per thread.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "types.hpp"

struct ZSTD_CDict_s;

namespace zcache {

enum class Method : std::uint8_t { none, lz4, lz4hc, zstd };

struct CodecOptions {
    Method method = Method::lz4;
    int level = 1;            // lz4: acceleration
    bool dictionary = false;  // zstd: train a dictionary
};

class Codec;

// Buffers and contexts of one thread.
class Scratch {
public:
    enum class Use { compress, decompress };

    Scratch(const Codec& codec, Use use);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // Bytes of buffers and contexts.
    std::size_t bytes() const;
    // Start afresh: contexts grow with the largest page that they have seen. Throws std::bad_alloc, and
    // nothing has changed.
    void reset(const Codec& codec);

private:
    friend class Codec;
    struct Contexts;
    const Use use_;
    std::unique_ptr<Contexts> contexts_;
    std::vector<std::byte> out_;
};

class Codec {
public:
    // Throws std::invalid_argument for a level that the method does not have.
    // The samples for a dictionary take up to `sample_bytes`.
    explicit Codec(CodecOptions options, std::size_t sample_bytes = max_sample_bytes);
    ~Codec();
    Codec(const Codec&) = delete;
    Codec& operator=(const Codec&) = delete;

    const CodecOptions& options() const { return options_; }

    struct Compressed {
        Bytes bytes;  // in the scratch; valid until its next use
        bool with_dictionary = false;
    };
    // The page compressed to at most `most` bytes; nullopt if it does not compress that far.
    std::optional<Compressed> compress(Scratch& scratch, Bytes page, std::size_t most) const;
    // Bytes of a Scratch that has compressed a page of that size. Throws std::bad_alloc.
    std::size_t context_bytes(std::size_t page_size) const;
    // Decompress `in`. Whether it filled exactly `out`; nothing is written beyond `out`, whatever `in` is.
    bool decompress(Scratch& scratch, Bytes in, bool with_dictionary, MutableBytes out) const;

    // -- the dictionary: only the worker calls these -------------------------------------------------

    bool wants_samples() const { return options_.dictionary && !trained_.load(std::memory_order_relaxed); }
    // Offer a page for training. Once there are enough samples, the dictionary is trained, which takes some
    // 40 milliseconds, and used from then on.
    void sample(Bytes page);
    // Bytes of the dictionary in its three forms and of the samples.
    std::size_t bytes() const { return bytes_.load(std::memory_order_relaxed); }
    std::size_t dictionary_bytes() const { return dictionary_bytes_.load(std::memory_order_relaxed); }

private:
    struct Dictionary;

    void train();
    std::size_t compressed_samples(std::size_t first, const ZSTD_CDict_s* dictionary) const;

    static constexpr std::size_t max_sample_bytes = std::size_t{1} << 20;

    const CodecOptions options_;
    const std::size_t sample_bytes_;
    std::vector<std::byte> samples_;
    std::vector<std::size_t> sample_sizes_;
    std::uint64_t offered_ = 0;
    std::unique_ptr<Dictionary> dictionary_;
    std::atomic<bool> trained_ = false;  // set last: dictionary_ does not change afterwards
    std::atomic<std::size_t> bytes_ = 0;
    std::atomic<std::size_t> dictionary_bytes_ = 0;
};

}  // namespace zcache
