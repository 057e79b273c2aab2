// Admission to a nearly full cache: every page, or only those seen before (WasActive; see ghosts.hpp).
//
// The history has an entry for each page that the cache holds, so it spans about one turnover. It is
// made when the cache first fills up, and made anew, empty, when the cache has come to hold twice as many
// pages. A refused page enters the history, and so does one that a get took out; both are admitted when
// they are offered again.
#pragma once

#include "ghosts.hpp"
#include "index.hpp"

namespace zcache {

class Admission {
public:
    // Make the history large enough for that many pages. Whether its size changed.
    // Throws std::bad_alloc, and the history is empty.
    bool fit(std::size_t pages);
    // Whether the page was seen before. If not, it is remembered.
    bool admit(const FileKey& key, PageIndex index);
    // A page leaves the cache although it was of use: admit it when it comes back.
    void remember(const FileKey& key, PageIndex index);
    // Forget everything and release the memory.
    void reset() { ghosts_.resize(0); }

    // Pages that the history has entries for.
    std::size_t capacity() const { return ghosts_.capacity(); }
    std::size_t bytes() const { return ghosts_.bytes(); }

private:
    Ghosts ghosts_;
};

}  // namespace zcache
