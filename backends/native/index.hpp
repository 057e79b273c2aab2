// The index, pool -> file -> sparse page table: which pages are stored, and where.
//
// These are tmem's pools and objects. A file is in the index exactly while it has pages there. Flushing
// a file or a pool walks its own pages only, so the cost is proportional to what is discarded.
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

// Names a file for as long as the file exists (FileKey of backends/ops.py). It does not own `generation`.
struct FileKey {
    std::uint64_t device = 0;
    std::uint64_t inode = 0;
    std::string_view generation;

    bool operator==(const FileKey&) const = default;
};

using Uuid = std::array<std::uint8_t, 16>;

struct Pool;

// A file with pages in the index: tmem's object. Its key's generation follows it in memory.
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

// The files of one mount, or of all mounts that share a UUID.
struct Pool {
    std::uint32_t page_size = 0;
    std::uint32_t sharers = 1;
    std::optional<Uuid> uuid;
    Allocator* allocator = nullptr;
    std::vector<File*> buckets;  // their number is a power of two
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
    // Remove a pool that has no files.
    void remove_pool(int id);
    template <class Seen>
    void for_each_pool(Seen&& seen) {
        for (auto& [id, pool] : pools_) seen(pool);
    }

    File* find(const Pool& pool, const FileKey& key) const;
    // Throws std::bad_alloc, and nothing has changed.
    File& find_or_add(Pool& pool, const FileKey& key);
    // The file with that id, which must be in the index.
    File& file(FileId id) { return *files_[id]; }
    std::size_t files() const { return file_count_; }
    // Bytes of metadata: files, nodes and tables, without the allocators' entry headers.
    std::size_t bytes() const { return slabs_.bytes() + file_bytes_ + table_bytes_; }

    // The item of a page (a Slot's), or null. Valid until the next insert or erase.
    static PageTable::Item* find(const File& file, PageIndex index) { return file.table.find(index); }
    // Add a page that is not in the index. Throws std::bad_alloc, and nothing has changed.
    void insert(File& file, PageIndex index, Slot slot);
    // Remove a page, and its file with the last page.
    void erase(FileId id, PageIndex index);
    // Remove a range of pages; `gone(index, slot)` is called for each, and must not use the index.
    template <class Gone>
    void erase_range(FileId id, PageIndex first, PageIndex stop, Gone&& gone);
    // Release unused table space. Throws std::bad_alloc, and the tables stay as large.
    void shrink_tables();
    // Remove a file that find_or_add made, if no page was added to it.
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
    std::size_t table_bytes_ = 0;  // of the vectors, as last counted in the budget
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
