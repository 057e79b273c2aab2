#include "ghosts.hpp"

#include <algorithm>
#include <bit>

namespace zcache {

void Ghosts::resize(std::size_t names) {
    std::vector<Set>().swap(sets_);
    if (names > 0) sets_.resize(std::bit_ceil((names + ways - 1) / ways));
}

void Ghosts::remember(std::uint64_t name_hash) {
    if (sets_.empty()) return;
    Set& set = set_of(name_hash);
    std::uint32_t tag = tag_of(name_hash);
    auto last = std::find(set.begin(), set.end() - 1, tag);
    std::move_backward(set.begin(), last, last + 1);
    set[0] = tag;
}

bool Ghosts::take(std::uint64_t name_hash) {
    if (sets_.empty()) return false;
    Set& set = set_of(name_hash);
    auto found = std::find(set.begin(), set.end(), tag_of(name_hash));
    if (found == set.end()) return false;
    std::move(found + 1, set.end(), found);
    set.back() = 0;
    return true;
}

}  // namespace zcache
