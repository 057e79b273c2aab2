// What an allocator of stored pages must do, and what it asks of the index above it.
//
// Pages are ephemeral, so an allocator may give any of them up; it says so, and the index forgets them.
// Each entry carries its owner, so that the allocator can move and evict without anybody's list.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "memory.hpp"
#include "types.hpp"

namespace zcache {

class Allocator;

// How the index above follows what an allocator does on its own.
class IndexLink {
public:
    // Whether the page was used since it was stored or last asked about; asking clears that.
    virtual bool take_referenced(Owner owner) = 0;
    // The entry has moved.
    virtual void moved(Owner owner, Location to) = 0;
    // The entry is about to go.
    virtual void evicted(Owner owner, std::size_t bytes, bool poor) = 0;
    // Make an allocator that has more than the asking one give something up. False if there is none.
    virtual bool reclaim_elsewhere(const Allocator& asking) = 0;

protected:
    ~IndexLink() = default;
};

// A stored page as its allocator keeps it.
struct Stored {
    Owner owner;
    std::uint32_t checksum = 0;
    Bytes bytes;
};

// Bytes about to be stored.
struct Entry {
    Owner owner;
    std::uint32_t checksum = 0;
    Bytes bytes;
    bool poor = false;  // kept raw: must not displace an entry that is not
};

using Counts = std::map<std::string, std::uint64_t>;

class Allocator {
public:
    virtual ~Allocator() = default;

    // Keep the bytes, at the expense of the oldest entries. None if there is no room for them even so.
    // Throws std::bad_alloc.
    virtual std::optional<Location> store(const Entry& entry) = 0;
    virtual Stored load(Location at) const = 0;
    // Forget an entry. What load() gave stays readable until the next call.
    virtual void release(Location at) = 0;
    // Give up something: the least useful first. False if there is nothing left.
    virtual bool reclaim() = 0;
    // Bytes that it has from the system.
    virtual std::size_t bytes() const = 0;
    // Follow a new limit, short of evicting.
    virtual void resized() = 0;
    // Give up room in tables that is not needed. Throws std::bad_alloc, and they stay as large.
    virtual void shrink_tables() = 0;
    // Add its gauges and counters to those that are there.
    virtual void count(Counts& counts) const = 0;
};

}  // namespace zcache
