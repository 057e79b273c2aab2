// Perform operations on an engine and check every result against a model.
//
// The model is a std::map of the pages put. A get may miss, but a page that it finds is the last one put
// there. There are no more misses than the pages that the counters report as evicted or refused.
// A random generator or a fuzzer chooses the operations (choices.hpp).
#pragma once

#include <map>
#include <new>
#include <set>
#include <string_view>
#include <system_error>
#include <typeinfo>
#include <utility>

#include "choices.hpp"
#include "pages.hpp"
#include "zcache.hpp"

// Called around each call of the engine: faults.cpp makes memory scarce there.
struct Scarcity {
    virtual ~Scarcity() = default;
    virtual void begin() {}
    virtual void end() {}
};

class Machine {
public:
    Machine(const zcache::Options& options, Choices& choices, Scarcity& scarcity)
        : options_(options), choices_(choices), scarcity_(scarcity), engine_(options),
          least_(least_limit(options)), free_tokens_(200) {
        for (std::size_t i = 0; i < free_tokens_.size(); ++i) free_tokens_[i] = 1000 + i;
    }

    void step() {
        std::uint64_t choice = choices_.below(200);
        if (pools_.empty() || choice == 0) open_pool();
        else if (choice < 60) put();
        else if (choice < 90) put_back();
        else if (choice < 150) get();
        else if (choice < 160) borrow();
        else if (choice < 175) flush_range();
        else if (choice < 178) flush_inode();
        else if (choice == 178) close_pool();
        else if (choice < 181) resize();
        else if (choice < 184) sync();
        else if (choice == 184) end_loans();
        else if (choice < 193) collect();
        else if (choice < 196) wrong_calls();
        else check();
    }

    void check() {
        if (choices_.one_in(2)) engine_.sync();
        engine_.check();
        collect();
        zcache::Counts counts = engine_.counters();
        std::uint64_t lost = losses(counts);
        std::size_t pages = 0;
        for (const auto& [id, pool] : pools_) pages += pool.pages.size();
        EXPECT(counts["corrupt_zpages"] == 0);
        EXPECT(counts["loaned_zpages"] == out_.size());
        EXPECT(counts["eph_zpages"] <= pages);
        EXPECT(scarce() || counts["eph_zpages"] + lost >= pages);
        EXPECT(scarce() || misses_ <= lost);
        EXPECT(counts["pool_limit"] == options_.pool_limit);
    }

    // Close all pools. No page may be left.
    void finish() {
        check();
        counts_ = engine_.counters();
        end_loans();
        collect();
        EXPECT(out_.empty());
        while (!pools_.empty()) close_pool();
        check();
        zcache::Counts counts = engine_.counters();
        EXPECT(counts["obj_count"] == 0 && counts["eph_zpages"] == 0 && counts["staged_pages"] == 0);
        EXPECT(counts["eph_zbytes"] == 0 && counts["eph_pagebytes"] == 0);
    }

    std::uint64_t hits() const { return hits_; }
    std::uint64_t misses() const { return misses_; }
    // The counters as of finish(), before the pools were closed.
    const zcache::Counts& counts() const { return counts_; }

private:
    using Handle = std::pair<std::size_t, zcache::PageIndex>;  // number of the file's key, and page

    struct Pool {
        std::uint32_t page_size = 0;
        int uuid = -1;
        unsigned sharers = 1;
        std::map<Handle, Content> pages;
    };

    // The loan that a token stands for.
    struct Loan {
        int pool = 0;
        Handle handle;
        Content content;
        std::uint32_t page_size = 0;
    };

    struct Sink final : zcache::Sink {
        Sink(Machine& machine, std::size_t count, std::size_t page_size)
            : machine_(machine), page_size_(page_size), pages(count * page_size), filled(count), refused(count),
              tokens(count) {}

        std::byte* page(std::size_t at) override {
            EXPECT(at < filled.size() && !filled[at]);
            if (machine_.choices_.one_in(50)) {
                refused[at] = true;
                return nullptr;
            }
            filled[at] = true;
            return pages.data() + at * page_size_;
        }
        zcache::Token token(std::size_t at) override {
            EXPECT(filled[at] && tokens[at] == zcache::no_token);
            if (machine_.free_tokens_.empty() || machine_.choices_.one_in(4)) return zcache::no_token;
            tokens[at] = machine_.free_tokens_.back();
            machine_.free_tokens_.pop_back();
            return tokens[at];
        }
        void cancel(std::size_t) override { fail(__FILE__, __LINE__, "a page can be decoded"); }

        zcache::Bytes bytes(std::size_t at) const { return {pages.data() + at * page_size_, page_size_}; }

        Machine& machine_;
        const std::size_t page_size_;
        std::vector<std::byte> pages;
        std::vector<bool> filled, refused;
        std::vector<zcache::Token> tokens;
    };

    // Run a call of the engine. Return false if it was out of memory.
    template <class Call>
    bool run(Call&& call) {
        scarcity_.begin();
        try {
            call();
            scarcity_.end();
            return true;
        } catch (const std::bad_alloc&) {
        } catch (const std::system_error&) {  // no thread
        } catch (...) {
            scarcity_.end();
            throw;
        }
        scarcity_.end();
        EXPECT(scarce());
        return false;
    }

    bool scarce() const { return typeid(scarcity_) != typeid(Scarcity); }

    static std::uint64_t sum(const zcache::Counts& counts, std::initializer_list<const char*> names) {
        std::uint64_t sum = 0;
        for (const char* name : names) sum += counts.at(name);
        return sum;
    }
    std::uint64_t losses(const zcache::Counts& counts) const {
        return sum(counts, {"evicted_eph_zpages", "evicted_raw_pages", "failed_eph_puts",
                            "eph_nonactive_puts_ignored"}) +
               (options_.keep_poor ? 0 : counts.at("compress_poor"));
    }

    // -- choices ------------------------------------------------------------------------------------

    std::map<int, Pool>::iterator choose_pool() {
        return std::next(pools_.begin(), static_cast<std::ptrdiff_t>(choices_.below(pools_.size())));
    }

    std::uint32_t choose_page_size() {
        static constexpr std::uint32_t sizes[] = {4096, 4096, 4096, 4096, 4096, 4096, 8192,
                                                   16384, 65536, 1 << 20};
        return sizes[choices_.below(std::size(sizes))];
    }

    static constexpr std::size_t keys = 12;

    // Some keys differ in one part only; one empty generation has a null pointer.
    static zcache::FileKey key(std::size_t number) {
        static const std::string generations[] = {"", "a", std::string("a\0b", 3), std::string(128, 'g')};
        std::string_view generation = generations[number / 2 % 4];
        if (number == 0) generation = {};
        return {1 + number / 8, 100 + number % 2, generation};
    }

    // Choose a mostly dense index; otherwise any, but from few enough for hits.
    zcache::PageIndex choose_index(std::uint32_t page_size) {
        zcache::PageIndex end = (zcache::PageIndex{1} << 63) / page_size;
        if (!choices_.one_in(4)) return choices_.below(150);
        zcache::PageIndex index = (zcache::PageIndex{1} << choices_.below(52)) - 1 + choices_.below(3);
        return std::min(index, end - 1);
    }

    Content choose_content() {
        Content content{static_cast<Content::Look>(choices_.below(Content::looks)), 0, 0};
        if (content.look == Content::mixed) content.noisy_part = static_cast<std::uint8_t>(choices_.below(33));
        if (content.look != Content::zero) content.seed = ++contents_;
        return content;
    }

    // -- operations -----------------------------------------------------------------------------------

    void open_pool() {
        if (pools_.size() > 5) return;
        std::uint32_t page_size = choose_page_size();
        int id = -1;
        if (choices_.one_in(2)) {
            if (!run([&] { id = engine_.init_fs(page_size); })) return;
            add_pool(id, page_size, -1);
            return;
        }
        int uuid = static_cast<int>(choices_.below(2));
        zcache::Uuid bytes{};
        bytes[7] = static_cast<std::uint8_t>(uuid);
        if (!run([&] { id = engine_.init_shared_fs(bytes, page_size); })) return;
        for (auto& [known, pool] : pools_) {
            if (pool.uuid != uuid) continue;
            EXPECT(id == (pool.page_size == page_size ? known : -1));
            if (id == known) ++pool.sharers;
            return;
        }
        add_pool(id, page_size, uuid);
    }

    // Large pages are refused if their compressor contexts do not fit into the limit.
    void add_pool(int id, std::uint32_t page_size, int uuid) {
        EXPECT(!pools_.contains(id));
        EXPECT(id >= 0 || page_size > 4096);
        if (id < 0) return;
        pools_[id].page_size = page_size;
        pools_[id].uuid = uuid;
    }

    void close_pool() {
        auto pool = choose_pool();
        EXPECT(run([&] { engine_.flush_fs(pool->first); }));
        if (--pool->second.sharers == 0) pools_.erase(pool);
    }

    void put() {
        auto chosen = choose_pool();
        int id = chosen->first;
        Pool& pool = chosen->second;
        std::size_t file = choices_.below(keys);
        std::size_t most = pool.page_size > 65536 ? 2 : 33;
        std::size_t count = choices_.one_in(2) ? 1 : 1 + choices_.below(most);
        std::vector<std::byte> data(count * pool.page_size);
        std::vector<zcache::Put> puts;
        std::vector<std::pair<Handle, Content>> meant;
        zcache::PageIndex index = choose_index(pool.page_size);
        bool scattered = choices_.one_in(4);
        for (std::size_t at = 0; at < count; ++at) {
            Content content = choose_content();
            zcache::MutableBytes page{data.data() + at * pool.page_size, pool.page_size};
            fill_page(content, page);
            puts.push_back({index, page.data(), choices_.one_in(8) ? Random(contents_).below(1300) : 0});
            // A token may be put only with the page of its loan.
            if (out_.contains(puts.back().token)) puts.back().token = zcache::no_token;
            meant.push_back({{file, index}, content});
            if (scattered) index = choose_index(pool.page_size);
            else if (index + 1 < (zcache::PageIndex{1} << 63) / pool.page_size) ++index;
        }
        // Without memory, some pages may be missing, but no older page may be found.
        run([&] { engine_.put(id, key(file), puts); });
        for (auto& [handle, content] : meant) pool.pages.insert_or_assign(handle, content);
    }

    // Put back a page that a get returned, with its token, mostly at its own handle.
    void put_back() {
        if (lent_.empty()) return;
        auto loan = std::next(lent_.begin(), static_cast<std::ptrdiff_t>(choices_.below(lent_.size())));
        zcache::Token token = loan->first;
        const Loan& was = loan->second;
        auto found = pools_.find(was.pool);
        if (found == pools_.end() || found->second.page_size != was.page_size) return;
        Pool& pool = found->second;
        Handle handle = was.handle;
        if (choices_.one_in(8)) handle.second = choose_index(pool.page_size);
        std::vector<std::byte> data(pool.page_size);
        fill_page(was.content, data);
        zcache::Put put{handle.second, data.data(), token};
        run([&] { engine_.put(was.pool, key(handle.first), {&put, 1}); });
        pool.pages.insert_or_assign(handle, was.content);
    }

    void get() {
        auto chosen = choose_pool();
        int id = chosen->first;
        Pool& pool = chosen->second;
        std::size_t file = choices_.below(keys);
        zcache::PageIndex first = choose_index(pool.page_size);
        std::size_t most = pool.page_size > 65536 ? 3 : 40;
        std::size_t count = choices_.one_in(2) ? 1 : choices_.below(most);
        count = std::min<std::size_t>(count, (zcache::PageIndex{1} << 63) / pool.page_size - first);
        Sink sink(*this, count, pool.page_size);
        std::size_t found = 0;
        EXPECT(run([&] { found = engine_.get(id, key(file), first, count, sink); }));
        for (std::size_t at = 0; at < count; ++at) {
            Handle handle{file, first + at};
            auto expected = pool.pages.find(handle);
            if (sink.refused[at]) {
                EXPECT(expected != pool.pages.end());
                pool.pages.erase(expected);  // the sink refused it: a miss from now on
                continue;
            }
            if (!sink.filled[at]) {  // a miss from now on
                if (expected != pool.pages.end()) {
                    ++misses_;
                    pool.pages.erase(expected);
                }
                continue;
            }
            --found;
            ++hits_;
            EXPECT(expected != pool.pages.end());
            EXPECT(is_page(expected->second, sink.bytes(at)));
            if (zcache::Token token = sink.tokens[at]; token != zcache::no_token) {
                EXPECT(pool.uuid < 0);
                EXPECT(out_.insert(token).second);
                lent_[token] = {id, handle, expected->second, pool.page_size};
            }
            if (pool.uuid < 0) pool.pages.erase(expected);
        }
        EXPECT(found == 0);
    }

    void borrow() {
        auto chosen = choose_pool();
        int id = chosen->first;
        Pool& pool = chosen->second;
        std::size_t file = choices_.below(keys);
        zcache::PageIndex first = choose_index(pool.page_size);
        std::size_t count = choices_.one_in(2) ? 1 : choices_.below(pool.page_size > 65536 ? 3 : 12);
        count = std::min<std::size_t>(count, (zcache::PageIndex{1} << 63) / pool.page_size - first);
        std::vector<std::byte> pages(count * pool.page_size);
        bool found = false;
        EXPECT(run([&] { found = engine_.borrow(id, key(file), first, count, pages.data()); }));
        if (!found) return;
        for (std::size_t at = 0; at < count; ++at) {
            auto expected = pool.pages.find({file, first + at});
            EXPECT(expected != pool.pages.end());
            EXPECT(is_page(expected->second, {pages.data() + at * pool.page_size, pool.page_size}));
        }
    }

    void flush_range() {
        auto chosen = choose_pool();
        int id = chosen->first;
        Pool& pool = chosen->second;
        std::size_t file = choices_.below(keys);
        zcache::PageIndex first = choose_index(pool.page_size);
        zcache::PageIndex stop = first + 1;
        if (choices_.one_in(8)) stop = ~zcache::PageIndex{0};
        else if (choices_.one_in(4)) stop = choose_index(pool.page_size);
        else if (choices_.one_in(2)) stop = first + choices_.below(100);
        EXPECT(run([&] { engine_.flush_pages(id, key(file), first, stop); }));
        if (first >= stop) return;
        pool.pages.erase(pool.pages.lower_bound({file, first}), pool.pages.lower_bound({file, stop}));
    }

    void flush_inode() {
        auto chosen = choose_pool();
        int id = chosen->first;
        Pool& pool = chosen->second;
        std::size_t file = choices_.below(keys);
        EXPECT(run([&] { engine_.flush_inode(id, key(file)); }));
        pool.pages.erase(pool.pages.lower_bound({file, 0}), pool.pages.lower_bound({file + 1, 0}));
    }

    void resize() {
        std::size_t limit = choices_.one_in(4) ? least_ : least_ + choices_.below(3 * least_);
        if (choices_.one_in(16)) limit = 40 << 20;  // with a staging area for the largest pages
        bool done = run([&] { engine_.resize(limit); });
        options_.pool_limit = engine_.pool_limit();
        if (!done) return;
        EXPECT(options_.pool_limit == limit);
        zcache::Counts counts = engine_.counters();
        EXPECT(counts["pool_used"] <= limit || counts["eph_zpages"] <= counts["staged_pages"]);
    }

    void sync() {
        if (run([&] { engine_.sync(); })) EXPECT(engine_.counters()["staged_pages"] == 0);
    }

    void end_loans() {
        EXPECT(run([&] { engine_.end_loans(); }));
        collect();
        EXPECT(out_.empty());
    }

    void collect() {
        std::vector<zcache::Token> returned{7, 7};
        engine_.take_returned(returned);
        for (zcache::Token token : returned) {
            EXPECT(out_.erase(token) == 1);
            free_tokens_.push_back(token);
        }
    }

    // Make wrong calls: they throw and change nothing.
    void wrong_calls() {
        auto throws = [](auto&& call, auto expected) {
            try {
                call();
            } catch (const decltype(expected)&) {
                return true;
            }
            return false;
        };
        Sink sink(*this, 1, 4096);
        std::byte page[4096]{};
        zcache::Put put{0, page, zcache::no_token};
        int none = 1 << 30;
        EXPECT(throws([&] { engine_.get(none, key(0), 0, 1, sink); }, zcache::UnknownPool("")));
        EXPECT(throws([&] { engine_.put(none, key(0), {&put, 1}); }, zcache::UnknownPool("")));
        EXPECT(throws([&] { engine_.flush_pages(none, key(0), 0, 1); }, zcache::UnknownPool("")));
        EXPECT(throws([&] { engine_.flush_inode(-1, key(0)); }, zcache::UnknownPool("")));
        EXPECT(throws([&] { engine_.flush_fs(-1); }, zcache::UnknownPool("")));
        EXPECT(throws([&] { engine_.resize(least_ - 1); }, std::invalid_argument("")));
        int id = pools_.begin()->first;
        put.index = ~zcache::PageIndex{0};
        EXPECT(throws([&] { engine_.put(id, key(0), {&put, 1}); }, std::out_of_range("")));
        EXPECT(throws([&] { engine_.get(id, key(0), ~zcache::PageIndex{0}, 1, sink); }, std::out_of_range("")));
        for (std::uint64_t size : {0ULL, 2048ULL, 12288ULL, 2ULL << 20, 1ULL << 44}) {
            EXPECT(engine_.init_fs(size) < 0);
        }
    }

    zcache::Options options_;
    Choices& choices_;
    Scarcity& scarcity_;
    zcache::Zcache engine_;
    const std::size_t least_;
    std::map<int, Pool> pools_;
    std::vector<zcache::Token> free_tokens_;
    std::set<zcache::Token> out_;
    std::map<zcache::Token, Loan> lent_;
    zcache::Counts counts_;
    std::uint64_t contents_ = 0;
    std::uint64_t hits_ = 0, misses_ = 0;
};
