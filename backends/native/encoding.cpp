#include "encoding.hpp"

#include <cstring>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace zcache {

namespace {

// A page that takes more than this part of itself is poor (the kernel zcache's zv_max_zsize).
constexpr std::size_t poor_numerator = 7, poor_denominator = 8;

bool is_same_filled(Bytes page) {
    return std::memcmp(page.data(), page.data() + word_bytes, page.size() - word_bytes) == 0;
}

void fill(MutableBytes page, std::uint64_t word) {
    for (std::size_t at = 0; at < page.size(); at += word_bytes) std::memcpy(page.data() + at, &word, word_bytes);
}

std::uint32_t checksum_of(Bytes bytes) {
    return static_cast<std::uint32_t>(XXH3_64bits(bytes.data(), bytes.size()));
}

}  // namespace

std::uint64_t first_word(Bytes bytes) {
    std::uint64_t word;
    std::memcpy(&word, bytes.data(), sizeof word);
    return word;
}

Encoded Encoding::encode(Scratch& scratch, Bytes page) const {
    Encoded encoded;
    if (is_same_filled(page)) {
        encoded.kind = Kind::same;
        encoded.bytes = page.first(word_bytes);
    } else if (codec_.options().method == Method::none) {
        encoded.bytes = page;
    } else if (auto compressed =
                   codec_.compress(scratch, page, page.size() * poor_numerator / poor_denominator)) {
        encoded.kind = compressed->with_dictionary ? Kind::dict_zpage : Kind::zpage;
        encoded.bytes = compressed->bytes;
    } else {
        encoded.bytes = page;
        encoded.poor = true;
        encoded.refused = !keep_poor_;
    }
    if (checksum_ && !encoded.refused) encoded.checksum = checksum_of(encoded.bytes);
    return encoded;
}

bool Encoding::decode(Scratch& scratch, const Stored& stored, Kind kind, MutableBytes page) const {
    if (checksum_ && checksum_of(stored.bytes) != stored.checksum) return false;
    switch (kind) {
        case Kind::same:
            if (stored.bytes.size() != word_bytes) return false;
            fill(page, first_word(stored.bytes));
            return true;
        case Kind::raw:
            if (stored.bytes.size() != page.size()) return false;
            std::memcpy(page.data(), stored.bytes.data(), page.size());
            return true;
        case Kind::zpage:
        case Kind::dict_zpage:
            return codec_.decompress(scratch, stored.bytes, kind == Kind::dict_zpage, page);
    }
    return false;
}

}  // namespace zcache
