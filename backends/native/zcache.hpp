// The engine: the cleancache contract (cleanfs/ops.py) over index, staging, codec and allocator.
//
// Two threads meet here: the caller, and a worker that turns staged pages into stored ones and reclaims
// memory. One mutex protects everything. The worker holds it only to take a page out of the staging area
// and to put the compressed one into place; it compresses without it. It never takes Python's GIL, so
// a caller may wait for the mutex while it holds the GIL.
//
// The rules of the contract hold across the staging area because the index decides: a page is what its
// slot says, and whoever changes a slot, under the mutex, leaves nothing behind that could be found.
// When the worker comes back with a compressed page, it stores it only if the slot still means that page.
#pragma once

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <thread>

#include "allocator.hpp"
#include "codec.hpp"
#include "ghosts.hpp"
#include "index.hpp"
#include "loans.hpp"
#include "staging.hpp"

namespace zcache {

enum class AllocatorKind : std::uint8_t { log, zbud };

struct Options {
    std::size_t pool_limit = 0;
    CodecOptions codec;
    AllocatorKind allocator = AllocatorKind::log;
    bool keep_poor = true;     // raw, while there is room to spare; else they are refused
    bool was_active = false;   // when the pool is full, refuse what was not seen before
    bool checksum = false;     // of what is stored: 0.1 us for a get, of 1.1
};

// Where a get puts what it finds.
class Sink {
public:
    // Room for page `at` of the range; null if there is none, which makes it a miss: the page is discarded.
    virtual std::byte* page(std::size_t at) = 0;
    // A token for the page just filled, for a loan; no_token if there shall be none.
    virtual Token token(std::size_t) { return no_token; }
    // What was written to page `at` is not the page after all.
    virtual void cancel(std::size_t at) = 0;

protected:
    ~Sink() = default;
};

struct Put {
    PageIndex index = 0;
    const std::byte* data = nullptr;
    Token token = no_token;  // that a get gave for this very page, perhaps
};

class Zcache final : private IndexLink {
public:
    // Throws std::invalid_argument for what can not be, with a message for the user.
    explicit Zcache(const Options& options);
    ~Zcache();
    Zcache(const Zcache&) = delete;
    Zcache& operator=(const Zcache&) = delete;

    // -- the contract. A pool id that is none throws UnknownPool, an index out of range
    //    std::out_of_range; std::bad_alloc leaves the pages of that call discarded --------------------

    int init_fs(std::uint64_t page_size);
    int init_shared_fs(const Uuid& uuid, std::uint64_t page_size);
    void flush_fs(int pool);
    std::uint32_t page_size(int pool);

    // How many pages were found.
    std::size_t get(int pool, const FileKey& key, PageIndex first, std::size_t count, Sink& sink);
    // A get of all pages of the range, each of which is put back at once: they are copied to `to`, one after
    // the other, and stay. False, and nothing has changed, if one is not there or can not be read.
    bool borrow(int pool, const FileKey& key, PageIndex first, std::size_t count, std::byte* to);
    // Each page is as large as the pool's.
    void put(int pool, const FileKey& key, std::span<const Put> pages);
    void flush_pages(int pool, const FileKey& key, PageIndex first, PageIndex stop);
    void flush_inode(int pool, const FileKey& key);

    // -- size and counters ------------------------------------------------------------------------

    std::size_t pool_limit() const;
    // Evicts down to it before it returns. Throws std::invalid_argument, and nothing has changed;
    // std::bad_alloc, and it may be in force.
    void resize(std::size_t pool_limit);
    Counts counters() const;
    // Wait until no page is staged.
    void sync();
    // End all loans: their tokens are given back.
    void end_loans();
    // Tokens that no loan holds any more are moved to `tokens`.
    void take_returned(std::vector<Token>& tokens);
    // Hold the books against what they are about. Throws std::logic_error that names the first difference.
    void check() const;

private:
    using Lock = std::unique_lock<std::mutex>;

    struct Encoded {
        Kind kind = Kind::raw;
        Bytes bytes;
        std::uint32_t checksum = 0;
        bool poor = false;
        bool refused = false;
    };

    // IndexLink, under the mutex
    bool take_referenced(Owner owner) override;
    void moved(Owner owner, Location to) override;
    void evicted(Owner owner, std::size_t bytes, bool poor) override;
    bool reclaim_elsewhere(const Allocator& asking) override;

    void check_options(std::size_t pool_limit) const;
    int new_pool(std::uint64_t page_size, std::optional<Uuid> uuid);
    Allocator& allocator_for(std::uint32_t page_size);
    Allocator& allocator_of(FileId file) { return *index_.file(file).pool->allocator; }

    void put_page(Lock& lock, int pool, const FileKey& key, const Put& page);
    bool revive(PageTable::Item& item, Token token);
    bool admit(const FileKey& key, PageIndex index);
    void put_inline(Lock& lock, int pool, const FileKey& key, const Put& page);
    Encoded encode(Scratch& scratch, Bytes page) const;
    void store(Owner owner, const Encoded& encoded);
    bool fetch(File& file, PageIndex index, Slot slot, std::size_t at, Sink& sink);
    bool read(File& file, PageIndex index, Slot slot, MutableBytes page);
    bool decode(const Stored& stored, Kind kind, MutableBytes page);
    void lend(const File& file, PageTable::Item& item, PageIndex index, Token token);
    void remember_active(const File& file, PageIndex index);
    void discard(const Pool& pool, Slot slot);
    void discard_page(FileId file, PageIndex index);
    void discard_pages(int pool, const FileKey& key, std::span<const Put> pages);
    Loans::Loan end_loan(Loans::Number number);
    void bound_loans();
    void end_oldest_loan();
    void account(const Stored& stored, Kind kind, std::uint32_t page_size, int sign);

    void shrink();
    bool reclaim_any();
    bool try_reclaim();
    Allocator* largest_allocator() const;
    void shrink_tables();
    void shrink_scratches();
    bool nearly_full() const;
    void account_overhead();

    void start_worker();
    void work();
    void work_on_front(Lock& lock);
    bool work_is_due() const;
    void wake_worker();
    void drain(Lock& lock);
    std::size_t staging_bytes(std::size_t pool_limit) const;

    const Options options_;
    Codec codec_;

    mutable std::mutex mutex_;
    // Everything below is protected by mutex_, but for worker_scratch_ (the worker's) and
    // inline_scratch_ (inline_mutex_'s, which is never taken while mutex_ is held).
    Budget budget_;
    std::map<std::uint32_t, std::unique_ptr<Allocator>> allocators_;  // by page size
    Index index_;
    std::unique_ptr<Staging> staging_;
    Loans loans_;
    Ghosts ghosts_;
    Scratch get_scratch_;
    Scratch worker_scratch_;
    std::mutex inline_mutex_;
    Scratch inline_scratch_;

    std::thread worker_;
    std::condition_variable worker_wakes_;
    std::condition_variable worker_done_;  // with a page, or with all
    bool working_ = false;                 // on the front page, without the mutex
    bool draining_ = false;
    bool stopping_ = false;

    std::size_t overhead_ = 0;       // bytes that the budget was told for all that has no mapping
    std::size_t worker_scratch_bytes_ = 0, inline_scratch_bytes_ = 0;  // when they were last used

    struct Gauges {
        std::uint64_t pages = 0;  // stored, on loan or not
        std::uint64_t zbytes = 0, pagebytes = 0;
        std::uint64_t raw = 0, same_filled = 0, zero_filled = 0;
        std::uint64_t staged = 0, staged_lent = 0;
    } gauges_;

    struct Tally {
        std::uint64_t obj_count_max = 0, eph_zpages_max = 0;
        std::uint64_t evicted_eph_zpages = 0, evicted_raw_pages = 0;
        std::uint64_t compress_poor = 0, failed_eph_puts = 0, staging_full = 0;
        std::uint64_t eph_nonactive_puts_ignored = 0;
        std::uint64_t revived_zpages = 0, corrupt_zpages = 0;
        std::uint64_t flush_total = 0, flush_found = 0, flobj_total = 0, flobj_found = 0;
    } tally_;
};

}  // namespace zcache
