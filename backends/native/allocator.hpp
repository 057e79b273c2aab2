// The interface of an allocator of stored pages, and of the index above it.
//
// Pages are ephemeral: an allocator may evict any of them. It tells the index, which forgets them. Each
// entry carries its owner, so that an allocator can move and evict entries without a list of the index's.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "memory.hpp"
#include "types.hpp"

namespace zcache {

class Allocator;

// How the index learns what an allocator does of its own accord.
class IndexLink {
public:
    // Whether the page was used since it was stored or last queried; a query clears that.
    virtual bool take_referenced(Owner owner) = 0;
    // The entry has moved.
    virtual void moved(Owner owner, Location to) = 0;
    // The entry is about to be evicted.
    virtual void evicted(Owner owner, std::size_t bytes, bool poor) = 0;
    // Make an allocator larger than the asking one give something up. False if there is none.
    virtual bool reclaim_elsewhere(const Allocator& asking) = 0;

protected:
    ~IndexLink() = default;
};

// A stored page, in its allocator's memory.
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
    bool poor = false;  // stored raw: must not displace an entry that is not poor
};

using Counts = std::map<std::string, std::uint64_t>;

class Allocator {
public:
    virtual ~Allocator() = default;

    // Store an entry, evicting the oldest if needed. nullopt if there is no room even so.
    // Throws std::bad_alloc.
    virtual std::optional<Location> store(const Entry& entry) = 0;
    virtual Stored load(Location at) const = 0;
    // Forget an entry. The result of load() stays readable until the next call.
    virtual void release(Location at) = 0;
    // Give something up, the least useful first. False if there is nothing left.
    virtual bool reclaim() = 0;
    // Bytes obtained from the system.
    virtual std::size_t bytes() const = 0;
    // Adapt to a new limit, without evicting.
    virtual void resized() = 0;
    // Release unused table space. Throws std::bad_alloc, and the tables stay as large.
    virtual void shrink_tables() = 0;
    // Add this allocator's gauges and counters to `counts`.
    virtual void count(Counts& counts) const = 0;
};

}  // namespace zcache
