// The staging area: pages as they were put, until the worker has compressed them.
//
// A ring of bytes and a ring of records, first in, first out. A put copies its page in and returns. A
// staged page is as good as a stored one: a get copies it out. A page that is flushed, or put again,
// is only marked dead; the worker skips it. Only the worker frees space, in order, so a page stays in place
// while the worker reads it without the mutex.
#pragma once

#include <optional>
#include <vector>

#include "memory.hpp"

namespace zcache {

class Staging {
public:
    using Sequence = std::uint64_t;

    struct Page {
        Owner owner;  // no_file: dead
        std::uint32_t size = 0;
        std::size_t end = 0;  // of its bytes, in the ring's running count
        const std::byte* data = nullptr;

        bool dead() const { return owner.file == no_file; }
        Bytes bytes() const { return {data, size}; }
    };

    // Throws std::bad_alloc.
    Staging(Budget& budget, std::size_t bytes);

    // Copy a page in; nullopt if there is no room.
    std::optional<Sequence> push(Owner owner, Bytes page);
    Page& at(Sequence sequence) { return pages_[sequence % pages_.size()]; }
    void kill(Sequence sequence) { at(sequence).owner.file = no_file; }

    Sequence front() const { return front_; }
    Sequence back() const { return back_; }  // one after the last
    bool empty() const { return front_ == back_; }
    void pop_front();
    // Bytes in use, dead pages included.
    std::size_t used() const { return head_ - tail_; }
    std::size_t capacity() const { return ring_.size(); }
    // Bytes of the records beside the ring.
    std::size_t table_bytes() const { return pages_.capacity() * sizeof(Page); }

private:
    Mapping ring_;
    std::vector<Page> pages_;
    Sequence front_ = 0, back_ = 0;
    std::size_t head_ = 0, tail_ = 0;  // running counts of bytes
};

}  // namespace zcache
