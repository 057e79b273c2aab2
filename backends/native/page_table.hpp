// The sparse table of a file's pages: tmem's object with its tree.
//
// It is a radix tree with 64-fold nodes, like the kernel's xarray. But a node stores only the items that it
// has, packed, beside a bitmap of their positions (as in a HAMT). A dense file takes 520 bytes for 64 pages,
// a lone page 16 for each level above it. A flush costs the items that it finds and the depth of the tree
// (9 at most), however many other items there are.
#pragma once

#include <bit>
#include <cstdint>
#include <utility>

#include "slab.hpp"
#include "types.hpp"

namespace zcache {

class PageTable {
public:
    using Item = std::uint64_t;

    PageTable() = default;
    PageTable(const PageTable&) = delete;
    PageTable& operator=(const PageTable&) = delete;
    // The owner has erased all items.
    ~PageTable() = default;

    // A slab cache for the nodes of page tables.
    static SlabCache make_slabs(Budget& budget);

    // The item at `index`, or null. Valid until the next insert or erase.
    Item* find(PageIndex index) const;
    // The item at `index`, created as 0 if there was none. Throws std::bad_alloc, and nothing has changed.
    Item& insert(SlabCache& slabs, PageIndex index);
    // Remove the item at `index`. Whether there was one.
    bool erase(SlabCache& slabs, PageIndex index);
    // Remove the items at first <= index < stop, after calling `gone(index, item)` for each in order.
    template <class Gone>
    void erase_range(SlabCache& slabs, PageIndex first, PageIndex stop, Gone&& gone);
    // Call `seen(index, item)` for each item in order.
    template <class Seen>
    void for_each(Seen&& seen) const;
    bool empty() const { return root_ == nullptr; }

private:
    static constexpr unsigned bits = 6;
    static constexpr unsigned max_height = 9;  // 54 bits of index

    struct Node {
        std::uint64_t bitmap;
        std::uint64_t items[1];  // as many as the size class has room for: items, or child nodes

        unsigned count() const { return static_cast<unsigned>(std::popcount(bitmap)); }
        bool has(unsigned bit) const { return bitmap >> bit & 1; }
        unsigned rank(unsigned bit) const {
            return static_cast<unsigned>(std::popcount(bitmap & ((std::uint64_t{1} << bit) - 1)));
        }
    };

    static Node* child(std::uint64_t item) { return reinterpret_cast<Node*>(item); }
    static std::uint64_t item(const Node* node) { return reinterpret_cast<std::uint64_t>(node); }
    static unsigned digit(PageIndex index, unsigned level) { return index >> (level * bits) & 63; }
    // Pages below one item of a node at `level`.
    static PageIndex span(unsigned level) { return PageIndex{1} << (level * bits); }

    static Node* add(SlabCache& slabs, Node* node, unsigned bit, std::uint64_t value);
    static Node* remove(SlabCache& slabs, Node* node, unsigned bit);
    template <class Gone>
    static Node* erase_below(SlabCache& slabs, Node* node, unsigned level, PageIndex base,
                             PageIndex first, PageIndex last, Gone& gone);
    template <class Seen>
    static void visit(const Node* node, unsigned level, PageIndex base, Seen& seen);

    Node* root_ = nullptr;
    unsigned height_ = 0;  // level of the root; leaves are at 0
};

template <class Gone>
void PageTable::erase_range(SlabCache& slabs, PageIndex first, PageIndex stop, Gone&& gone) {
    PageIndex end = span(height_ + 1);  // height_ < max_height, so this is at most 2^54
    if (root_ == nullptr || first >= stop || first >= end) return;
    root_ = erase_below(slabs, root_, height_, 0, first, (stop < end ? stop : end) - 1, gone);
    if (root_ == nullptr) height_ = 0;
}

template <class Gone>
PageTable::Node* PageTable::erase_below(SlabCache& slabs, Node* node, unsigned level, PageIndex base,
                                        PageIndex first, PageIndex last, Gone& gone) {
    unsigned low = first <= base ? 0 : digit(first, level);
    unsigned high = last - base >= span(level + 1) - 1 ? 63 : digit(last, level);
    for (std::uint64_t todo = node->bitmap & (~std::uint64_t{0} << low) & (~std::uint64_t{0} >> (63 - high));
         todo != 0; todo &= todo - 1) {
        auto bit = static_cast<unsigned>(std::countr_zero(todo));
        PageIndex index = base + bit * span(level);
        unsigned at = node->rank(bit);
        if (level == 0) {
            gone(index, node->items[at]);
            node = remove(slabs, node, bit);
        } else {
            Node* below = erase_below(slabs, child(node->items[at]), level - 1, index, first, last, gone);
            if (below == nullptr) node = remove(slabs, node, bit);
            else node->items[at] = item(below);
        }
    }
    return node;
}

template <class Seen>
void PageTable::for_each(Seen&& seen) const {
    if (root_ != nullptr) visit(root_, height_, 0, seen);
}

template <class Seen>
void PageTable::visit(const Node* node, unsigned level, PageIndex base, Seen& seen) {
    unsigned at = 0;
    for (std::uint64_t todo = node->bitmap; todo != 0; todo &= todo - 1, ++at) {
        PageIndex index = base + static_cast<unsigned>(std::countr_zero(todo)) * span(level);
        if (level == 0) seen(index, node->items[at]);
        else visit(child(node->items[at]), level - 1, index, seen);
    }
}

}  // namespace zcache
