// The words that the other files share: what names a page, what a stored page is, and the budget.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>

namespace zcache {

using Bytes = std::span<const std::byte>;
using MutableBytes = std::span<std::byte>;

// Number of a file with kept pages (tmem's object), used again after the file lost its last page.
using FileId = std::uint32_t;
inline constexpr FileId no_file = 0;

// Page index in a file. A file of 2^63 bytes has 2^(63 - log2(page size)) pages.
using PageIndex = std::uint64_t;

// Whom a stored page belongs to. Entries carry it, so that whoever moves or evicts them finds the
// index entry that must follow.
struct Owner {
    FileId file = no_file;
    PageIndex index = 0;
};

// Where an allocator put something. Only the allocator knows what it means; 56 bits are used.
using Location = std::uint64_t;

// How the bytes of a stored page are to be read.
enum class Kind : std::uint8_t {
    zpage,       // compressed
    dict_zpage,  // compressed with the trained dictionary
    raw,         // the page itself: it compressed poorly
    same,        // one 8-byte word, repeated
};

inline constexpr std::size_t min_page_size = 4096;
inline constexpr std::size_t max_page_size = std::size_t{1} << 20;
inline constexpr std::size_t min_pool_limit = std::size_t{1} << 20;
inline constexpr std::size_t word_bytes = 8;

// A pool id that init_fs never gave, or that flush_fs took back.
struct UnknownPool : std::out_of_range {
    using std::out_of_range::out_of_range;
};

// The limit, in bytes of real memory, and what counts against it: every mapping and table.
struct Budget {
    std::size_t limit = 0;
    std::size_t used = 0;

    bool room(std::size_t bytes) const { return used + bytes <= limit; }
};

}  // namespace zcache
