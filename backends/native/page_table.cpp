#include "page_table.hpp"

#include <array>
#include <cstring>

namespace zcache {

namespace {

// Capacity of a node in items, by size class.
constexpr std::array<unsigned, 12> capacities{1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64};

std::size_t class_for(unsigned count) {
    std::size_t at = 0;
    while (capacities[at] < count) ++at;
    return at;
}

}  // namespace

SlabCache PageTable::make_slabs(Budget& budget) {
    std::vector<std::uint32_t> sizes;
    for (unsigned capacity : capacities) sizes.push_back(8 + 8 * capacity);
    return SlabCache(budget, std::move(sizes));
}

PageTable::Item* PageTable::find(PageIndex index) const {
    Node* node = root_;
    if (node == nullptr || index >= span(height_ + 1)) return nullptr;
    for (unsigned level = height_;; --level) {
        unsigned bit = digit(index, level);
        if (!node->has(bit)) return nullptr;
        std::uint64_t* at = &node->items[node->rank(bit)];
        if (level == 0) return at;
        node = child(*at);
    }
}

// Add an item to a node. Returns the node, or a larger copy if it was full.
PageTable::Node* PageTable::add(SlabCache& slabs, Node* node, unsigned bit, std::uint64_t value) {
    unsigned count = node->count();
    unsigned at = node->rank(bit);
    if (count == capacities[SlabCache::size_class(node)]) {
        auto* larger = static_cast<Node*>(slabs.allocate(class_for(count + 1)));
        larger->bitmap = node->bitmap;
        std::memcpy(larger->items, node->items, 8 * count);
        slabs.free(node);
        node = larger;
    }
    std::memmove(node->items + at + 1, node->items + at, 8 * (count - at));
    node->items[at] = value;
    node->bitmap |= std::uint64_t{1} << bit;
    return node;
}

// Remove an item from a node. Returns the node, a smaller copy if at most a third is used, null if none is left.
PageTable::Node* PageTable::remove(SlabCache& slabs, Node* node, unsigned bit) {
    unsigned at = node->rank(bit);
    node->bitmap &= ~(std::uint64_t{1} << bit);
    unsigned count = node->count();
    if (count == 0) {
        slabs.free(node);
        return nullptr;
    }
    std::memmove(node->items + at, node->items + at + 1, 8 * (count - at));
    if (count <= capacities[SlabCache::size_class(node)] / 3) {
        try {
            auto* smaller = static_cast<Node*>(slabs.allocate(class_for(count + 1)));
            std::memcpy(smaller, node, 8 + 8 * count);
            slabs.free(node);
            return smaller;
        } catch (const std::bad_alloc&) {
            // The node stays as large as it is.
        }
    }
    return node;
}

PageTable::Item& PageTable::insert(SlabCache& slabs, PageIndex index) {
    auto new_node = [&](unsigned bit, std::uint64_t value) {
        auto* node = static_cast<Node*>(slabs.allocate(0));
        node->bitmap = std::uint64_t{1} << bit;
        node->items[0] = value;
        return node;
    };
    if (Item* found = find(index)) return *found;
    if (root_ == nullptr) {
        unsigned height = 0;
        while (height + 1 < max_height && index >= span(height + 1)) ++height;
        height_ = height;
    }
    while (index >= span(height_ + 1)) {
        root_ = new_node(0, item(root_));
        ++height_;
    }

    // Where the path leaves the tree, attach a chain of nodes down to the leaf: all of it or none.
    unsigned level = height_;
    Node** link = &root_;
    while (*link != nullptr && (*link)->has(digit(index, level)) && level > 0) {
        Node* node = *link;
        link = reinterpret_cast<Node**>(&node->items[node->rank(digit(index, level))]);
        --level;
    }
    std::array<Node*, max_height> chain{};
    unsigned length = *link == nullptr ? level + 1 : level;
    try {
        for (unsigned i = 0; i < length; ++i) {
            chain[i] = new_node(digit(index, i), i == 0 ? 0 : item(chain[i - 1]));
        }
        if (*link != nullptr) {
            *link = add(slabs, *link, digit(index, level), length == 0 ? 0 : item(chain[length - 1]));
        } else {
            *link = chain[length - 1];
        }
    } catch (...) {
        for (Node* node : chain) {
            if (node != nullptr) slabs.free(node);
        }
        throw;
    }
    if (length > 0) return chain[0]->items[0];
    return (*link)->items[(*link)->rank(digit(index, 0))];
}

bool PageTable::erase(SlabCache& slabs, PageIndex index) {
    bool found = false;
    erase_range(slabs, index, index + 1, [&](PageIndex, Item) { found = true; });
    return found;
}

}  // namespace zcache
