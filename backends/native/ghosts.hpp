// Ghosts: which pages were seen before, though they are not kept. For the WasActive admission.
//
// Dan Magenheimer's WasActive let zcache know whether a page had ever been active, because a page that
// streams past once is not worth another page's place. Here a page counts as active if it was put before.
// Then its ghost, 32 bits of a hash of its name, is in a table with as many entries as the pool has pages.
// A wrong match admits a page that could have been refused, no more.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace zcache {

class Ghosts {
public:
    // Make room for about that many names, and forget all.
    void resize(std::size_t names);
    void remember(std::uint64_t name_hash);
    // Whether the name was remembered. It is forgotten.
    bool take(std::uint64_t name_hash);
    std::size_t capacity() const { return sets_.size() * ways; }
    std::size_t bytes() const { return sets_.capacity() * sizeof(Set); }

private:
    static constexpr std::size_t ways = 8;
    // Newest first; 0: none.
    using Set = std::array<std::uint32_t, ways>;

    Set& set_of(std::uint64_t name_hash) { return sets_[name_hash & (sets_.size() - 1)]; }
    static std::uint32_t tag_of(std::uint64_t name_hash) {
        return static_cast<std::uint32_t>(name_hash >> 32) | 1;
    }

    std::vector<Set> sets_;
};

}  // namespace zcache
