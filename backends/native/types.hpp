// Types that the other files share: names of pages, kinds of stored pages, and the budget.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>

namespace zcache {

using Bytes = std::span<const std::byte>;
using MutableBytes = std::span<std::byte>;

// Number of a file in the index (tmem's object); reused after the file has lost its last page.
using FileId = std::uint32_t;
inline constexpr FileId no_file = 0;

// Page index in a file. A file of 2^63 bytes has 2^(63 - log2(page size)) pages.
using PageIndex = std::uint64_t;

// The page that a stored entry is of. Entries carry it, so that an allocator that moves or evicts one can
// name the slot to update.
struct Owner {
    FileId file = no_file;
    PageIndex index = 0;
};

// Where an allocator stored an entry. Only the allocator can interpret it; 56 bits are used.
using Location = std::uint64_t;

// How to decode a stored page.
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

// Thrown for a pool id that init_fs never returned, or that flush_fs closed.
struct UnknownPool : std::out_of_range {
    using std::out_of_range::out_of_range;
};

// The limit, and the use that counts against it, in bytes of real memory: every mapping and table.
struct Budget {
    std::size_t limit = 0;
    std::size_t used = 0;

    bool has_room(std::size_t bytes) const { return used + bytes <= limit; }
};

}  // namespace zcache
