// The resident pages of the page cache, in the order of reclaim.
//
// The policy is that of cleanfs/cache/reclaim.py, which says where it comes from and why; the tests hold the two
// against each other step by step. Here each page has an entry that is a member of one of three lists:
// inactive, active, and the shadows of what was evicted. A file's entries hang on a radix tree, so that a
// range is found, and discarded, without looking at what else is there.
//
// Used from one thread. Pages are opaque: whoever gives one gives a reference, and gets it back from
// `evict`, or through `Release`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "page_table.hpp"

namespace cleanfs {

using zcache::PageIndex;

class Resident {
public:
    using Page = void*;
    using Release = void (*)(Page);
    using Serial = std::uint64_t;  // of a file; never used again

    struct Victim {
        Serial file;
        PageIndex index;
        Page page;
    };

    explicit Resident(Release release) : release_(release) {}
    ~Resident();
    Resident(const Resident&) = delete;
    Resident& operator=(const Resident&) = delete;

    // Pages that are resident.
    std::size_t size() const { return lists_[inactive].count + lists_[active].count; }
    std::uint64_t refaults() const { return refaults_; }
    std::uint64_t activations() const { return activations_; }

    // The pages of a range, null where there is none, and a reference noted for each that there is.
    // How many are missing.
    std::size_t look_up(Serial file, PageIndex first, std::size_t count, Page* pages);
    // A page has become resident; its reference is taken over. False, and it is not, if it is already or if
    // memory is short.
    bool insert(Serial file, PageIndex index, Page page);
    // Choose the next `count` pages to go; shadows take their places. Throws std::bad_alloc, and nothing
    // has changed.
    std::vector<Victim> evict(std::size_t count);
    // Release what is resident of first <= index < stop. Shadows stay: they are about use, not contents.
    void discard(Serial file, PageIndex first, PageIndex stop);
    // Call `seen(index)` for the resident pages of a file, in order.
    template <class Seen>
    void for_each(Serial file, Seen&& seen) const;

    // Hold the books against what they are about. Throws std::logic_error.
    void check() const;

private:
    enum ListName : std::uint8_t { inactive, active, shadows, free_entry };
    using Number = std::uint32_t;
    static constexpr Number none = ~Number{0};
    static constexpr double active_share = 0.5;  // reclaim.py: ACTIVE_SHARE

    struct File {
        Serial serial = 0;
        zcache::PageTable table;
    };

    struct Entry {
        File* file = nullptr;
        PageIndex index = 0;
        Page page = nullptr;  // null: a shadow
        Number older = none, younger = none;
        ListName list = free_entry;
        bool referenced = false;
    };

    struct List {
        Number oldest = none, youngest = none;
        std::size_t count = 0;
    };

    File* find(Serial serial) const;
    Number new_entry();
    void link(ListName list, Number number);
    void unlink(Number number);
    void move(Number number, ListName list) {
        unlink(number);
        link(list, number);
    }
    void free(Number number);
    void drop_oldest_shadow();
    void drop_if_empty(File* file);
    void shrink_active(std::size_t most);

    const Release release_;
    zcache::Budget budget_{~std::size_t{0} >> 1, 0};
    zcache::SlabCache slabs_ = zcache::PageTable::make_slabs(budget_);
    std::unordered_map<Serial, File> files_;
    mutable File* last_ = nullptr;  // the file of the last look
    std::vector<Entry> entries_;
    std::vector<Number> free_;
    List lists_[3];
    std::uint64_t refaults_ = 0, activations_ = 0;
};

template <class Seen>
void Resident::for_each(Serial file, Seen&& seen) const {
    if (const File* found = find(file)) {
        found->table.for_each([&](PageIndex index, zcache::PageTable::Item number) {
            if (entries_[number].page != nullptr) seen(index);
        });
    }
}

}  // namespace cleanfs
