// Pool -> file -> sparse page table: what is kept, and where.
//
// tmem's pools and objects. A file is in the index exactly while it has pages here. Flushing a file or
// a pool walks what it has, so it costs what it discards.
#pragma once

#include <array>
#include <cstring>
#include <map>
#include <optional>
#include <string_view>
#include <vector>

#include "page_table.hpp"
#include "slot.hpp"

namespace zcache {

class Allocator;

// What names a file for as long as it exists: cleanfs/ops.py's FileKey. Does not own its generation.
struct FileKey {
    std::uint64_t device = 0;
    std::uint64_t inode = 0;
    std::string_view generation;

    bool operator==(const FileKey&) const = default;
};

using Uuid = std::array<std::uint8_t, 16>;

struct Pool;

// A file with kept pages: tmem's object. The bytes of its key's generation follow it in memory.
struct File {
    File* next = nullptr;  // in its bucket of the pool's hash table
    Pool* pool = nullptr;
    std::uint64_t pages = 0;
    PageTable table;
    std::uint64_t device = 0;
    std::uint64_t inode = 0;
    FileId id = no_file;
    std::uint32_t hash = 0;
    std::uint32_t generation_size = 0;

    const char* generation() const { return reinterpret_cast<const char*>(this + 1); }
    FileKey key() const { return {device, inode, {generation(), generation_size}}; }
};

// What a mount, or the sharers of a UUID, hold an id of.
struct Pool {
    std::uint32_t page_size = 0;
    std::uint32_t sharers = 1;
    std::optional<Uuid> uuid;
    Allocator* allocator = nullptr;
    std::vector<File*> buckets;  // a power of two of them
    std::size_t files = 0;

    bool is_private() const { return !uuid; }
};

class Index {
public:
    explicit Index(Budget& budget);
    ~Index();
    Index(const Index&) = delete;
    Index& operator=(const Index&) = delete;

    int add_pool(std::uint32_t page_size, std::optional<Uuid> uuid, Allocator* allocator);
    std::optional<int> find_shared(const Uuid& uuid) const;
    // Throws UnknownPool.
    Pool& pool(int id);
    // A pool without files.
    void remove_pool(int id);
    template <class Seen>
    void for_each_pool(Seen&& seen) {
        for (auto& [id, pool] : pools_) seen(pool);
    }

    File* find(const Pool& pool, const FileKey& key) const;
    // Throws std::bad_alloc, and nothing has changed.
    File& find_or_add(Pool& pool, const FileKey& key);
    // The file of that number, which has pages.
    File& file(FileId id) { return *files_[id]; }
    std::size_t files() const { return file_count_; }
    // Bytes of all files, nodes and tables: the metadata, but for the headers that allocators need.
    std::size_t bytes() const { return slabs_.bytes() + file_bytes_ + table_bytes_; }

    // The item of a page (a Slot's), or null. Valid until the next insert or erase.
    static PageTable::Item* find(const File& file, PageIndex index) { return file.table.find(index); }
    // A page that is not in the index enters it. Throws std::bad_alloc, and nothing has changed.
    void insert(File& file, PageIndex index, Slot slot);
    // A page leaves the index, and the file with its last one.
    void erase(FileId id, PageIndex index);
    // The same for a range; `gone(index, slot)` is called for each page, and must not use the index.
    template <class Gone>
    void erase_range(FileId id, PageIndex first, PageIndex stop, Gone&& gone);
    // Give up room in tables that is not needed. Throws std::bad_alloc, and they stay as large.
    void shrink_tables();
    // Drop a file that find_or_add made and that got no page.
    void drop_if_empty(FileId id);

private:
    static std::uint32_t hash(const FileKey& key);
    File** bucket(const Pool& pool, std::uint32_t hash) const;
    void rehash(Pool& pool, std::size_t buckets);
    void remove(File& file);
    void account_tables();

    Budget& budget_;
    SlabCache slabs_;
    std::map<int, Pool> pools_;
    int next_pool_ = 0;
    std::vector<File*> files_{nullptr};  // by id
    std::vector<FileId> free_ids_;
    std::size_t file_count_ = 0;
    std::size_t bucket_count_ = 0;
    std::size_t file_bytes_ = 0;
    std::size_t table_bytes_ = 0;  // of the vectors, as the budget was told
};

template <class Gone>
void Index::erase_range(FileId id, PageIndex first, PageIndex stop, Gone&& gone) {
    File& of = file(id);
    of.table.erase_range(slabs_, first, stop, [&](PageIndex index, PageTable::Item item) {
        --of.pages;
        gone(index, Slot::of_item(item));
    });
    drop_if_empty(id);
}

}  // namespace zcache
