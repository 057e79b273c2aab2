// Page encodings: the forms in which a page is stored, with a checksum if one is wanted.
//
// A page is stored in the first of these forms that fits it:
//
//  * same: one 8-byte word, if the page repeats that word (zswap's same-filled pages);
//  * zpage, dict_zpage: compressed, if that takes at most 7/8 of the page;
//  * raw: the page itself. Such a page is *poor*: it costs the memory of two that compress. The options
//    say whether poor pages are stored or refused (docs/poor-pages.md).
//
// Encoding needs no lock: it reads the page and the codec, and writes to the scratch of its thread.
#pragma once

#include "allocator.hpp"
#include "codec.hpp"

namespace zcache {

struct Encoded {
    Kind kind = Kind::raw;
    Bytes bytes;  // in the scratch or in the page
    std::uint32_t checksum = 0;
    bool poor = false;
    bool refused = false;
};

// The first word of a page or of a same-filled page's stored form.
std::uint64_t first_word(Bytes bytes);

class Encoding {
public:
    Encoding(const Codec& codec, bool keep_poor, bool checksum)
        : codec_(codec), keep_poor_(keep_poor), checksum_(checksum) {}

    Encoded encode(Scratch& scratch, Bytes page) const;
    // Restore a page. False, with the page's contents undefined, if its stored form is corrupt.
    bool decode(Scratch& scratch, const Stored& stored, Kind kind, MutableBytes page) const;

private:
    const Codec& codec_;
    const bool keep_poor_;
    const bool checksum_;
};

}  // namespace zcache
