// The engine: the cleancache contract (backends/ops.py) over index, staging area, codec and allocators.
//
// A put copies the page into the staging area and returns; a worker thread compresses staged pages, stores
// them, and reclaims memory. So a put costs the caller one copy. The price: a page waits uncompressed, and
// a full staging area makes the caller compress its own page.
//
// One mutex protects everything. The worker holds it only to take a page out of the staging area and to
// put the compressed page into place; it compresses without it. The worker never takes Python's GIL, so a
// caller may wait for the mutex while it holds the GIL.
//
// The contract holds across the staging area because the index decides: a page is where its slot says.
// A call that changes a slot, under the mutex, also discards what the slot referred to. When the worker has
// compressed a page, it stores the page only if the slot still refers to it.
//
// The class is implemented in four files:
//
//    zcache.cpp         pools, get, put, flush, loans, and what the allocators report
//    zcache_worker.cpp  the worker thread, which empties the staging area
//    zcache_limit.cpp   the memory limit: resizing, reclaiming, accounting
//    zcache_stats.cpp   counters, and the check that they agree with the data structures
#pragma once

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <thread>

#include "admission.hpp"
#include "allocator.hpp"
#include "codec.hpp"
#include "encoding.hpp"
#include "index.hpp"
#include "loans.hpp"
#include "staging.hpp"
#include "statistics.hpp"
#include "stored_pages.hpp"

namespace zcache {

enum class AllocatorKind : std::uint8_t { log, zbud };

struct Options {
    std::size_t pool_limit = 0;
    CodecOptions codec;
    AllocatorKind allocator = AllocatorKind::log;
    bool keep_poor = true;    // store poor pages raw while there is room to spare; else refuse them
    bool was_active = false;  // when the cache is nearly full, refuse pages not seen before
    bool checksum = false;    // of stored bytes: 0.1 us of a get's 1.1
};

// The destination of a get.
class Sink {
public:
    // A buffer for page `at` of the range. If null, the page is discarded and the get is a miss.
    virtual std::byte* page(std::size_t at) = 0;
    // A token for the page just filled, which makes it a loan; no_token for no loan.
    virtual Token token(std::size_t) { return no_token; }
    // Page `at` could not be decoded: what its buffer holds is not the page.
    virtual void cancel(std::size_t at) = 0;

protected:
    ~Sink() = default;
};

struct Put {
    PageIndex index = 0;
    const std::byte* data = nullptr;
    Token token = no_token;  // if equal to the token of this page's loan, the put revives the page
};

class Zcache final : private IndexLink {
public:
    // Throws std::invalid_argument, with a message for the user, for options that do not work together.
    explicit Zcache(const Options& options);
    ~Zcache();
    Zcache(const Zcache&) = delete;
    Zcache& operator=(const Zcache&) = delete;

    // -- the contract. Throws UnknownPool for an unknown pool id, std::out_of_range for a page index out of
    //    range, and std::bad_alloc, after which all pages of that call are discarded --------------------

    int init_fs(std::uint64_t page_size);
    int init_shared_fs(const Uuid& uuid, std::uint64_t page_size);
    void flush_fs(int pool);
    std::uint32_t page_size(int pool);

    // The number of pages found.
    std::size_t get(int pool, const FileKey& key, PageIndex first, std::size_t count, Sink& sink);
    // Copy all pages of the range to `to`, one after the other. They stay, as if each had been got and put
    // back. False if a page is missing, and nothing has changed, or corrupt, and that page is discarded.
    bool borrow(int pool, const FileKey& key, PageIndex first, std::size_t count, std::byte* to);
    // The same in two steps, as far as nothing is corrupt. The first copies pages as they are stored. The second decodes
    // them, without the mutex; false if one is corrupt.
    bool copy_out(int pool, const FileKey& key, PageIndex first, std::size_t count, StoredPages& to);
    bool decode(StoredPages& pages, std::byte* to) const;
    // How many pages of the range a get would not find.
    std::size_t missing(int pool, const FileKey& key, PageIndex first, std::size_t count);
    // Each page has the pool's page size.
    void put(int pool, const FileKey& key, std::span<const Put> pages);
    void flush_pages(int pool, const FileKey& key, PageIndex first, PageIndex stop);
    void flush_inode(int pool, const FileKey& key);

    // -- size and counters ------------------------------------------------------------------------

    std::size_t pool_limit() const;
    // Set the limit and evict down to it before returning. Throws std::invalid_argument, and nothing has
    // changed, or std::bad_alloc, and the new limit may be in force.
    void resize(std::size_t pool_limit);
    Counts counters() const;
    // Wait until no page is staged.
    void sync();
    // End all loans and give their tokens back.
    void end_loans();
    // Move the tokens that were given back to `tokens`.
    void take_returned(std::vector<Token>& tokens);
    // Check gauges and cross-references against the data structures. Throws std::logic_error that names
    // the first difference.
    void check() const;

private:
    using Lock = std::unique_lock<std::mutex>;

    // IndexLink, called by the allocators under the mutex
    bool take_referenced(Owner owner) override;
    void moved(Owner owner, Location to) override;
    void evicted(Owner owner, std::size_t bytes, bool poor) override;
    bool reclaim_elsewhere(const Allocator& asking) override;

    // pools
    int new_pool(std::uint64_t page_size, std::optional<Uuid> uuid);
    Allocator& allocator_for(std::uint32_t page_size);
    Allocator& allocator_of(FileId file) { return *index_.file(file).pool->allocator; }

    // get
    bool fetch(File& file, PageIndex index, Slot slot, std::size_t at, Sink& sink);
    File* find_with(Pool& pool, const FileKey& key, PageIndex first, std::size_t count);
    bool read(File& file, PageIndex index, Slot slot, MutableBytes page);

    // put
    void put_page(Lock& lock, int pool, const FileKey& key, const Put& page);
    bool admit(const FileKey& key, PageIndex index);
    void put_inline(Lock& lock, int pool, const FileKey& key, const Put& page);
    void store(Owner owner, const Encoded& encoded);

    // discard
    void discard(const Pool& pool, Slot slot);
    void discard_page(FileId file, PageIndex index);
    void discard_pages(int pool, const FileKey& key, std::span<const Put> pages);

    // loans
    void lend(const File& file, PageTable::Item& item, PageIndex index, Token token);
    bool revive(PageTable::Item& item, Token token);
    Loans::Loan end_loan(Loans::Number number);
    void bound_loans();
    void end_oldest_loan();
    void remember_active(const File& file, PageIndex index);

    // limit
    void check_limit(std::size_t pool_limit) const;
    std::size_t staging_bytes(std::size_t pool_limit) const;
    bool nearly_full() const;
    std::size_t max_loan_bytes() const;
    void shrink();
    bool reclaim_any();
    bool try_reclaim();
    Allocator* largest_allocator() const;
    void shrink_tables();
    void shrink_scratches();
    void account_overhead();

    // worker
    void start_worker();
    void stop_worker();
    void work();
    void work_on_front(Lock& lock);
    bool work_is_due() const;
    void wake_worker();
    void drain(Lock& lock);

    const Options options_;
    Codec codec_;
    const Encoding encoding_;

    mutable std::mutex mutex_;
    // Everything below is protected by mutex_, except worker_scratch_, which is the worker's, and
    // inline_scratch_, which inline_mutex_ protects. inline_mutex_ is never waited for under mutex_.
    Budget budget_;
    std::map<std::uint32_t, std::unique_ptr<Allocator>> allocators_;  // by page size
    Index index_;
    std::unique_ptr<Staging> staging_;
    Loans loans_;
    Admission admission_;
    Scratch get_scratch_;
    Scratch worker_scratch_;
    std::mutex inline_mutex_;
    Scratch inline_scratch_;

    std::thread worker_;
    std::condition_variable worker_wakes_;
    std::condition_variable worker_done_;  // the worker has finished a page or emptied the staging area
    bool working_ = false;                 // the worker has the front page and has released the mutex
    bool draining_ = false;
    bool stopping_ = false;

    std::size_t overhead_ = 0;  // bytes that account_overhead() has added to the budget
    std::size_t worker_scratch_bytes_ = 0, inline_scratch_bytes_ = 0;  // after their last use

    Gauges gauges_;
    Counters counters_;
};

}  // namespace zcache
