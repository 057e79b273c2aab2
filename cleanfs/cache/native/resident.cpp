#include "resident.hpp"

#include <algorithm>
#include <new>
#include <stdexcept>

namespace cleanfs {

Resident::~Resident() {
    for (Entry& entry : entries_) {
        if (entry.page != nullptr) release_(entry.page);
    }
    for (auto& [serial, file] : files_) {
        file.table.erase_range(slabs_, 0, ~PageIndex{0}, [](PageIndex, zcache::PageTable::Item) {});
    }
}

std::size_t Resident::look_up(Serial serial, PageIndex first, std::size_t count, Page* pages) {
    std::fill(pages, pages + count, nullptr);
    File* file = find(serial);
    if (file == nullptr) return count;
    std::size_t missing = 0;
    for (std::size_t at = 0; at < count; ++at) {
        zcache::PageTable::Item* item = file->table.find(first + at);
        if (item != nullptr && entries_[*item].page != nullptr) {
            pages[at] = entries_[*item].page;
            entries_[*item].referenced = true;
        } else {
            ++missing;
        }
    }
    return missing;
}

bool Resident::insert(Serial serial, PageIndex index, Page page) {
    File* file = find(serial);
    if (file != nullptr) {
        if (zcache::PageTable::Item* item = file->table.find(index)) {
            auto number = static_cast<Number>(*item);
            if (entries_[number].page != nullptr) return false;
            ++refaults_;
            entries_[number].page = page;
            move(number, active);
            return true;
        }
    }
    try {
        Number number = new_entry();
        if (file == nullptr) {
            file = &files_[serial];
            file->serial = serial;
        }
        try {
            file->table.insert(slabs_, index) = number;
        } catch (const std::bad_alloc&) {
            drop_if_empty(file);
            throw;
        }
        free_.pop_back();
        Entry& entry = entries_[number];
        entry.file = file;
        entry.index = index;
        entry.page = page;
        entry.referenced = false;
        link(inactive, number);
        return true;
    } catch (const std::bad_alloc&) {
        return false;
    }
}

std::vector<Resident::Victim> Resident::evict(std::size_t count) {
    const std::size_t resident = size();
    count = std::min(count, resident);
    std::vector<Victim> victims;
    victims.reserve(count);
    List& cold = lists_[inactive];
    shrink_active(static_cast<std::size_t>(static_cast<double>(resident - count) * active_share));
    while (victims.size() < count) {
        if (cold.count == 0) {  // every page left is active: at least one must come back
            shrink_active(static_cast<std::size_t>(static_cast<double>(size()) * active_share));
        }
        Number number = cold.oldest;
        Entry& entry = entries_[number];
        if (entry.referenced) {
            entry.referenced = false;
            ++activations_;
            move(number, active);
        } else {
            victims.push_back({entry.file->serial, entry.index, entry.page});
            entry.page = nullptr;
            move(number, shadows);
        }
    }
    while (lists_[shadows].count > resident) drop_oldest_shadow();
    return victims;
}

void Resident::discard(Serial serial, PageIndex first, PageIndex stop) {
    File* file = find(serial);
    if (file == nullptr) return;
    // Shadows are erased with the rest and inserted again; a shadow for which memory is short is forgotten.
    std::vector<Number> kept;
    file->table.erase_range(slabs_, first, stop, [&](PageIndex, zcache::PageTable::Item item) {
        auto number = static_cast<Number>(item);
        if (entries_[number].page == nullptr) {
            try {
                kept.push_back(number);
                return;
            } catch (const std::bad_alloc&) {
            }
        } else {
            release_(entries_[number].page);
        }
        free(number);
    });
    for (Number number : kept) {
        try {
            file->table.insert(slabs_, entries_[number].index) = number;
        } catch (const std::bad_alloc&) {
            free(number);
        }
    }
    drop_if_empty(file);
}

void Resident::shrink_active(std::size_t most) {
    List& hot = lists_[active];
    std::size_t rounds = hot.count;
    while (hot.count > most) {
        Number number = hot.oldest;
        Entry& entry = entries_[number];
        if (entry.referenced && rounds > 0) {
            entry.referenced = false;
            move(number, active);
        } else {
            move(number, inactive);
        }
        if (rounds > 0) --rounds;
    }
}

void Resident::drop_oldest_shadow() {
    Number number = lists_[shadows].oldest;
    File* file = entries_[number].file;
    file->table.erase(slabs_, entries_[number].index);
    free(number);
    drop_if_empty(file);
}

Resident::File* Resident::find(Serial serial) const {
    if (last_ != nullptr && last_->serial == serial) return last_;
    auto found = files_.find(serial);
    if (found == files_.end()) return nullptr;
    return last_ = const_cast<File*>(&found->second);
}

void Resident::drop_if_empty(File* file) {
    if (!file->table.empty()) return;
    if (last_ == file) last_ = nullptr;
    files_.erase(file->serial);
}

// Return a free entry, the last one of free_. Throws std::bad_alloc.
Resident::Number Resident::new_entry() {
    if (free_.empty()) {
        if (entries_.size() == none) throw std::bad_alloc();
        if (entries_.size() == entries_.capacity()) {
            std::size_t more = std::max<std::size_t>(64, 2 * entries_.size());
            free_.reserve(more);  // so that free() never needs memory
            entries_.reserve(more);
        }
        entries_.emplace_back();
        free_.push_back(static_cast<Number>(entries_.size() - 1));
    }
    return free_.back();
}

void Resident::free(Number number) {
    unlink(number);
    entries_[number] = Entry{};
    free_.push_back(number);
}

void Resident::link(ListName name, Number number) {
    List& list = lists_[name];
    Entry& entry = entries_[number];
    entry.list = name;
    entry.older = list.youngest;
    entry.younger = none;
    (list.youngest == none ? list.oldest : entries_[list.youngest].younger) = number;
    list.youngest = number;
    ++list.count;
}

void Resident::unlink(Number number) {
    Entry& entry = entries_[number];
    List& list = lists_[entry.list];
    (entry.older == none ? list.oldest : entries_[entry.older].younger) = entry.younger;
    (entry.younger == none ? list.youngest : entries_[entry.younger].older) = entry.older;
    --list.count;
}

void Resident::check() const {
    auto must = [](bool holds, const char* what) {
        if (!holds) throw std::logic_error(what);
    };
    std::size_t linked = 0;
    for (ListName name : {inactive, active, shadows}) {
        std::size_t count = 0;
        Number before = none;
        for (Number number = lists_[name].oldest; number != none; number = entries_[number].younger) {
            const Entry& entry = entries_[number];
            must(entry.list == name && entry.older == before, "a list is not what its entries say");
            must((entry.page == nullptr) == (name == shadows), "a shadow has a page, or a page has none");
            must(name != shadows || !entry.referenced, "a shadow is referenced");
            const zcache::PageTable::Item* item = entry.file->table.find(entry.index);
            must(item != nullptr && *item == number, "an entry is not in the table of its file");
            before = number;
            ++count;
        }
        must(lists_[name].youngest == before && lists_[name].count == count, "a list has another length");
        linked += count;
    }
    must(linked + free_.size() == entries_.size(), "entries are lost");
    std::size_t in_tables = 0;
    for (const auto& [serial, file] : files_) {
        must(serial == file.serial && !file.table.empty(), "a file without entries");
        file.table.for_each([&](PageIndex, zcache::PageTable::Item) { ++in_tables; });
    }
    must(in_tables == linked, "a table has entries that are in no list");
}

}  // namespace cleanfs
