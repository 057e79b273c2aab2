// Page codecs: lz4, lz4hc, zstd with or without a dictionary, and none.
//
// Threads share a codec. The buffers and contexts that compressing needs are a Scratch, one per thread.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "dictionary.hpp"
#include "types.hpp"

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
    // Whether it has what this codec needs.
    bool serves(const Codec& codec) const;

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

    // -- the dictionary; only the worker calls the first two -----------------------------------------

    bool wants_samples() const { return options_.dictionary && dictionary_.wants_samples(); }
    void sample(Bytes page) { dictionary_.sample(page); }
    std::size_t bytes() const { return dictionary_.bytes(); }
    std::size_t dictionary_bytes() const { return dictionary_.content_bytes(); }

private:
    static constexpr std::size_t max_sample_bytes = std::size_t{1} << 20;

    const CodecOptions options_;
    Dictionary dictionary_;
};

}  // namespace zcache
