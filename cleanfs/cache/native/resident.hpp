// The resident pages of the page cache, in the order of reclaim.
//
// The policy is that of cleanfs/cache/reclaim.py, which gives its source and reasons; the tests compare the two
// step by step. Each page has an entry on one of three lists: inactive, active, and the shadows of evicted
// pages. A radix tree for each file finds its entries, so that a range is looked up, and discarded, without
// visiting other entries.
//
// Not thread-safe: one thread only. Pages are opaque: `insert` takes a reference over, and `evict` or `Release`
// gives it back.
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

    // How many pages are resident.
    std::size_t size() const { return lists_[inactive].count + lists_[active].count; }
    std::uint64_t refaults() const { return refaults_; }
    std::uint64_t activations() const { return activations_; }

    // Look up the pages of a range, null where one is missing, and mark the others referenced.
    // Returns how many are missing.
    std::size_t look_up(Serial file, PageIndex first, std::size_t count, Page* pages);
    // Make a page resident and take its reference over. False, and nothing has changed, if the index is
    // resident already or memory is short.
    bool insert(Serial file, PageIndex index, Page page);
    // Evict `count` pages, the first to go first; shadows take their places. Throws std::bad_alloc, and
    // nothing has changed then.
    std::vector<Victim> evict(std::size_t count);
    // Whether any page of the file is resident, or was of late.
    bool knows(Serial file) const { return find(file) != nullptr; }
    // Release the resident pages first <= index < stop. Shadows stay: they record use, not contents.
    void discard(Serial file, PageIndex first, PageIndex stop);
    // Call `seen(index)` for the resident pages of a file, in order.
    template <class Seen>
    void for_each(Serial file, Seen&& seen) const;

    // Check all invariants of the lists and trees. Throws std::logic_error.
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
    mutable File* last_ = nullptr;  // the file of the last lookup
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
