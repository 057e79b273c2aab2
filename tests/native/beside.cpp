// Let threads serve READs, WRITEs and GETATTRs of a file under the state lock, as the queues of io_uring do, while the main
// thread writes, evicts, fills, swaps backends, and opens and closes. Each page has one writer, and says how often it was
// written: a read that began after a write has returned must not return what was there before. The kernel evicts pages of
// what the threads wrote, too.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string_view>
#include <thread>

#include "evicted_pages.hpp"
#include "eviction_ring.hpp"
#include "fast_path.hpp"
#include "pages.hpp"
#include "state_lock.hpp"
#include "zcache.hpp"

namespace {

using cleanfs::FastPath;
using cleanfs::PageIndex;
using cleanfs::Resident;
using cleanfs::StateLock;

constexpr std::size_t page_size = 4096, pages = 24, tail = 1000, size = pages * page_size - tail, limit_pages = 6;
constexpr std::string_view directory = "/tmp/";
constexpr std::uint64_t fh = 3, node = 2;
constexpr std::uint64_t threads = 3;  // beside the main one, which writes every fourth page

using Page = std::array<std::uint64_t, page_size / sizeof(std::uint64_t)>;

// It compresses, and differs in each page and version.
Page make_page(PageIndex index, std::uint64_t version) {
    Page page;
    for (std::size_t at = 0; at < page.size(); ++at) page[at] = index << 48 | version << 8 | at / 16;
    return page;
}

std::uint64_t version_of(const std::byte* data, PageIndex index, std::size_t length) {
    Page page;
    std::memcpy(&page, data, length);
    const std::uint64_t version = page[0] << 16 >> 24;
    EXPECT(std::memcmp(&page, make_page(index, version).data(), length) == 0);  // one write's, and of this page
    return version;
}

// The kernel's side of a ring of evicted pages, which all threads fill (BPF_MAP_TYPE_RINGBUF).
class Kernel {
public:
    static constexpr std::size_t ring_size = std::size_t{1} << 16;

    Kernel() : fd_(memfd_create("ring", MFD_CLOEXEC)) {
        EXPECT(fd_ >= 0 && ftruncate(fd_, static_cast<off_t>(data_at + 2 * ring_size)) == 0);
        void* const at = mmap(nullptr, data_at + ring_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
        EXPECT(at != MAP_FAILED);
        memory_ = static_cast<std::byte*>(at);
        ring_.emplace(fd_, ring_size);
    }
    ~Kernel() {
        munmap(memory_, data_at + ring_size);
        close(fd_);
    }
    Kernel(const Kernel&) = delete;
    Kernel& operator=(const Kernel&) = delete;

    cleanfs::EvictionRing& ring() { return *ring_; }

    // Without room the page is lost.
    void evict(PageIndex index, const Page& content) {
        const std::lock_guard lock(mutex_);
        std::uint64_t& produced = *reinterpret_cast<std::uint64_t*>(memory_ + page_size);
        const std::uint64_t consumed = std::atomic_ref(*reinterpret_cast<std::uint64_t*>(memory_)).load();
        const std::size_t place = produced % ring_size;
        constexpr std::size_t step = 8 + sizeof(eviction);
        static_assert(step % 8 == 0);
        const std::size_t left = ring_size - place;
        if (left < step + 8) {  // discard the rest
            if (produced + left - consumed > ring_size) return;
            put_header(place, static_cast<std::uint32_t>(left - 8) | discarded);
            std::atomic_ref(produced).store(produced + left);
            return;
        }
        if (produced + step - consumed > ring_size) return;
        eviction record{};
        record.inode = node;
        record.index = index;
        record.file_size = ::size;
        record.readable = 1;
        std::memcpy(record.page, content.data(), sizeof record.page);
        std::memcpy(memory_ + data_at + place + 8, &record, sizeof record);
        put_header(place, busy | std::uint32_t{sizeof record});
        std::atomic_ref(produced).store(produced + step);
        put_header(place, sizeof record);
    }

private:
    static constexpr std::size_t data_at = 2 * page_size;
    static constexpr std::uint32_t busy = std::uint32_t{1} << 31, discarded = std::uint32_t{1} << 30;

    void put_header(std::size_t place, std::uint32_t header) {
        std::atomic_ref(*reinterpret_cast<std::uint32_t*>(memory_ + data_at + place)).store(header);
    }

    std::mutex mutex_;
    const int fd_;
    std::byte* memory_ = nullptr;
    std::optional<cleanfs::EvictionRing> ring_;
};

[[noreturn]] void fail_call() { fail(__FILE__, __LINE__, "a thread beside the main one calls Python"); }

class Site : public cleanfs::CacheState {
public:
    explicit Site(std::uint64_t seed) : random_(seed), resident_([](void* page) { std::free(page); }), fast_(*this) {
        file_fd_ = mkstemp(path_);  // a file without a name is Python's to close
        EXPECT(file_fd_ >= 0 && ftruncate(file_fd_, size) == 0);
        for (PageIndex at = 0; at < pages; ++at) store(at, 0);
        CacheState::page_size = ::page_size;
        CacheState::limit_pages = ::limit_pages;
        CacheState::resident = &resident_;
        page_bytes = [](Resident::Page page) { return static_cast<char*>(page); };
        ops_.borrow = [](void* engine, int pool, const zcache::FileKey& key, PageIndex first, std::size_t count, std::byte* to) {
            return static_cast<zcache::Zcache*>(engine)->borrow(pool, key, first, count, to);
        };
        ops_.copy_out = [](void* engine, int pool, const zcache::FileKey& key, PageIndex first, std::size_t count,
                           zcache::StoredPages& to) { return static_cast<zcache::Zcache*>(engine)->copy_out(pool, key, first, count, to); };
        ops_.decode = [](void* engine, zcache::StoredPages& stored, std::byte* to) {
            return static_cast<zcache::Zcache*>(engine)->decode(stored, to);
        };
        ops_.missing = [](void* engine, int pool, const zcache::FileKey& key, PageIndex first, std::size_t count) {
            return static_cast<zcache::Zcache*>(engine)->missing(pool, key, first, count);
        };
        ops_.put = [](void* engine, int pool, const zcache::FileKey& key, PageIndex index, const std::byte* page) {
            const zcache::Put put{index, page};
            static_cast<zcache::Zcache*>(engine)->put(pool, key, {&put, 1});
            return true;
        };
        ops_.flush = [](void* engine, int pool, const zcache::FileKey& key, PageIndex first, PageIndex stop) {
            static_cast<zcache::Zcache*>(engine)->flush_pages(pool, key, first, stop);
            return true;
        };
        discard = [](Resident* all, Resident::Serial serial, PageIndex first, PageIndex stop) noexcept {
            all->discard(serial, first, stop);
        };
        file_.serial = 7;
        file_.device = 1;
        file_.inode = node;
        handle_.file = &file_;
        handle_.kernel = &kernel_;
        handle_.writes = &inline_writes_;
        handle_.fd = file_fd_;
        struct stat st;
        EXPECT(fstat(file_fd_, &st) == 0);
        inode_.device = st.st_dev;
        inode_.ino = st.st_ino;
        inode_.node = node;
        inode_.parent = &root_;
        inode_.name = path_ + directory.size();
        inode_.kernel = &kernel_;
        inode_.fd = file_fd_;
        inode_.local = true;
        inode_.record = &file_;
        inode_.kind = S_IFREG;
        inodes_.by_node[node] = &inode_;
        inodes_.max_inodes = inodes_.fd_budget = 10;
        inodes_.file_systems[st.st_dev] = {&inline_writes_, &inline_writes_, &inline_writes_, &inline_writes_, &nowait_};
        root_.fd = open(directory.data(), O_PATH | O_DIRECTORY);
        EXPECT(root_.fd >= 0 && fstat(root_.fd, &st) == 0);
        root_.device = st.st_dev;
        root_.node = cleanfs::InodeState::root_node;
        root_.ino = st.st_ino;
        root_.kernel = &root_kernel_;
        root_.local = true;
        inodes_.by_node[root_.node] = &root_;
        // What calls trio.
        inodes_.enter = [](cleanfs::InodeStates&, std::uint64_t, const cleanfs::Found&, int) noexcept -> std::uint64_t { fail_call(); };
        inodes_.poll = [](cleanfs::InodeStates&, std::uint64_t) noexcept -> bool { fail_call(); };
        inodes_.hold = [](cleanfs::InodeStates&, std::uint64_t, int) noexcept -> bool { fail_call(); };
        inodes_.begin_writing = inodes_.end_writing = [](cleanfs::InodeStates&, std::uint64_t, cleanfs::FileState&) noexcept { fail_call(); };
        inodes_.drop_unused = [](cleanfs::InodeStates&, std::span<const std::uint64_t>) noexcept -> bool { fail_call(); };
        fast_.serve_metadata(inodes_);
        fast_.add(fh, handle_);
        look();
        swap_backend();
        evicted_.emplace(kernel.ring(), inodes_, *this);
        evictions = &evicted_->table();
        shared = seed % 2 == 0;
    }
    ~Site() {
        unlink(path_);
        close(root_.fd);
        close(file_fd_);
    }

    // Of the main thread, which has the lock.
    void step() {
        inline_writes_.inline_calls = true;
        inline_writes_.returned_at = static_cast<double>(cleanfs::now_ns()) * 1e-9;
        inode_.nlookup = root_.nlookup = random_.below(4) > 0;
        inode_.polled = random_.below(2) > 0;
        inode_.fd = random_.below(4) > 0 ? file_fd_ : -1;
        switch (random_.below(12)) {
            case 0: swap_backend(); break;
            case 1: evict(resident_.size()); break;
            case 2: reopen(); break;
            case 11: drain_evictions(); break;
            case 3: case 4: write(random_.below(pages / (threads + 1)) * (threads + 1)); break;
            default: fill();
        }
        EXPECT(fast_.counters().served >= served_);
        served_ = fast_.counters().served;
        state.yield();
    }

    // Of the main thread, too: files may be closed.
    void end() { inode_.nlookup = 1; }

    StateLock state;
    Kernel kernel;
    std::array<std::atomic<std::uint64_t>, pages> begun{}, written{};

    FastPath& fast() { return fast_; }
    const cleanfs::EvictedPages::Counters& evicted() const { return evicted_->counters(); }
    std::string_view name() const { return path_ + directory.size(); }

private:
    void store(PageIndex index, std::uint64_t version) {
        const Page page = make_page(index, version);
        const std::size_t length = std::min(::page_size, ::size - index * ::page_size);
        EXPECT(pwrite(file_fd_, page.data(), length, static_cast<off_t>(index * ::page_size)) == static_cast<ssize_t>(length));
    }

    void look() {
        struct stat st;
        EXPECT(fstat(file_fd_, &st) == 0);
        file_.stamps = cleanfs::Stamps::of(st);
        file_.size = ::size;
        file_.racy = false;
        kernel_.sent = file_.stamps;
        kernel_.size = ::size;
    }

    void flush(PageIndex index) {
        if (pool_id >= 0) engine_->flush_pages(pool_id, file_.key(), index, index + 1);
        resident_.discard(file_.serial, index, index + 1);
    }

    // As Python writes, with other requests in the middle of it.
    void write(PageIndex index) {
        const std::uint64_t version = ++begun[index];
        ++file_.pending_writes;
        flush(index);
        state.yield();
        store(index, version);
        new_version(file_);
        state.yield();
        flush(index);
        look();
        --file_.pending_writes;
        written[index] = version;
    }

    void fill() {
        for (PageIndex index = random_.below(pages), stop = std::min(pages, index + 8); index < stop; ++index) {
            const std::size_t length = std::min(::page_size, ::size - index * ::page_size);
            void* page = std::calloc(1, ::page_size);
            EXPECT(pread(file_fd_, page, length, static_cast<off_t>(index * ::page_size)) == static_cast<ssize_t>(length));
            if (!resident_.insert(file_.serial, index, page)) std::free(page);
        }
        if (resident_.size() > ::limit_pages) evict(resident_.size() - ::limit_pages);
    }

    void evict(std::size_t count) {
        for (const Resident::Victim& victim : resident_.evict(count)) {
            const zcache::Put put{victim.index, static_cast<const std::byte*>(victim.page), zcache::no_token};
            if (pool_id >= 0) engine_->put(pool_id, file_.key(), {&put, 1});
            std::free(victim.page);
        }
    }

    void reopen() {
        fast_.remove(fh);
        state.yield();
        fast_.add(fh, handle_);
    }

    // As use_backend (bind_state.cpp).
    void swap_backend() {
        backend = nullptr;
        while (decoding > 0) std::this_thread::yield();
        pool_id = -1;
        zcache::Options options;
        options.pool_limit = 4 << 20;
        options.codec.method = random_.below(2) == 0 ? zcache::Method::lz4 : zcache::Method::zstd;
        options.checksum = random_.below(2) == 0;
        engine_ = std::make_unique<zcache::Zcache>(options);
        pool_id = engine_->init_fs(::page_size);
        ops_.engine = engine_.get();
        backend = &ops_;
    }

    Random random_;
    Resident resident_;
    std::unique_ptr<zcache::Zcache> engine_;
    zcache::FastOps ops_;
    char path_[32] = "/tmp/cleanfs-beside-XXXXXX";  // in `directory`
    int file_fd_ = -1;
    FastPath fast_;
    cleanfs::FileState file_;
    cleanfs::KernelViewState kernel_, root_kernel_;
    cleanfs::NowaitState nowait_;
    cleanfs::HandleState handle_;
    cleanfs::InlineState inline_writes_;
    cleanfs::InodeState inode_, root_;
    cleanfs::InodeStates inodes_;
    std::optional<cleanfs::EvictedPages> evicted_;
    std::uint64_t served_ = 0;
};

// A thread that serves hits, and the kernel that asks it.
class Server {
public:
    Server(Site& site, std::uint64_t thread, std::uint64_t seed)
        : site_(site), thread_(thread), random_(seed), ends_(make_ends()), channel_(ends_[0], -1, 0) {}
    ~Server() {
        for (const int fd : ends_) close(fd);
    }

    void step() {
        if (random_.below(8) == 0) {
            fuse_getattr_in in{};
            if (!serve(FUSE_GETATTR, in)) return;
            fuse_attr_out out;
            EXPECT(reply_.size() == sizeof out);
            std::memcpy(&out, reply_.data(), sizeof out);
            EXPECT(out.attr.size == ::size);
            return;
        }
        if (random_.below(8) == 0) {
            open_or_look_up();
            return;
        }
        if (random_.below(16) == 0) {
            write(random_.below(pages / (threads + 1)) * (threads + 1) + thread_);
            return;
        }
        if (random_.below(4) == 0) evict(random_.below(pages / (threads + 1)) * (threads + 1) + thread_);
        const PageIndex first = random_.below(pages), count = 1 + random_.below(std::min<std::uint64_t>(8, pages - first));
        std::array<std::uint64_t, pages> before{};
        for (PageIndex at = first; at < first + count; ++at) before[at] = site_.written[at];
        fuse_read_in in{};
        in.fh = fh;
        in.offset = first * ::page_size;
        in.size = static_cast<std::uint32_t>(count * ::page_size);
        if (!serve(FUSE_READ, in)) return;
        EXPECT(reply_.size() == std::min(count * ::page_size, ::size - in.offset));
        for (PageIndex at = first; at < first + count; ++at) {
            const std::size_t start = (at - first) * ::page_size;
            const std::uint64_t version = version_of(reply_.data() + start, at, std::min(::page_size, reply_.size() - start));
            EXPECT(version >= before[at] && version <= site_.begun[at]);
        }
        ++hits;
    }

    std::uint64_t hits = 0, writes = 0, opens = 0;

private:
    void open_or_look_up() {
        if (random_.below(4) == 0) {
            std::array<char, 32> name{};
            site_.name().copy(name.data(), name.size() - 1);
            EXPECT(!serve(FUSE_LOOKUP, name, {}, cleanfs::InodeState::root_node));  // its node is not its number
            return;
        }
        fuse_open_in in{};
        in.flags = random_.below(2) == 0 ? O_RDONLY : O_RDWR;
        if (!serve(FUSE_OPEN, in)) return;
        ++opens;
        EXPECT(in.flags == O_RDONLY);
        fuse_open_out out;
        EXPECT(reply_.size() == sizeof out);
        std::memcpy(&out, reply_.data(), sizeof out);
        fuse_release_in release{};
        release.fh = out.fh;
        while (!serve(FUSE_RELEASE, release)) continue;  // the main thread would, where a count is 0
    }

    // A version that was not written is begun again.
    void write(PageIndex index) {
        const std::uint64_t version = site_.written[index] + 1;
        site_.begun[index] = version;
        const Page page = make_page(index, version);
        fuse_write_in in{};
        in.fh = fh;
        in.offset = index * ::page_size;
        in.size = static_cast<std::uint32_t>(std::min(::page_size, ::size - in.offset));
        if (!serve(FUSE_WRITE, in, {reinterpret_cast<const std::byte*>(page.data()), in.size})) return;
        site_.written[index] = version;
        ++writes;
    }

    // It knows what the kernel has: nobody else writes that page.
    void evict(PageIndex index) {
        const std::uint64_t version = site_.written[index];
        if (version == site_.begun[index]) site_.kernel.evict(index, make_page(index, version));
    }

    static std::array<int, 2> make_ends() {
        std::array<int, 2> ends;
        EXPECT(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, ends.data()) == 0);
        return ends;
    }

    template <class In>
    bool serve(std::uint32_t opcode, const In& in, cleanfs::Bytes data = {}, std::uint64_t of = node) {
        fuse_in_header header{};
        header.len = static_cast<std::uint32_t>(sizeof header + sizeof in + data.size());
        header.opcode = opcode;
        header.unique = unique_ += 2;
        header.nodeid = of;
        std::vector<std::byte> bytes(header.len);
        std::memcpy(bytes.data(), &header, sizeof header);
        std::memcpy(bytes.data() + sizeof header, &in, sizeof in);
        std::ranges::copy(data, bytes.begin() + sizeof header + sizeof in);
        const auto message = cleanfs::Message::parse(bytes);
        EXPECT(FastPath::may_serve_beside(*message));
        FastPath::Outcome outcome;
        {
            const StateLock::Turn turn(site_.state);
            outcome = site_.fast().serve_beside(*message, channel_, borrowed_);
        }
        if (outcome == FastPath::Outcome::none) return false;
        if (outcome == FastPath::Outcome::borrowed) {
            reply_.resize(borrowed_.size());
            EXPECT(site_.fast().decode(borrowed_, reply_.data()));
            return true;
        }
        reply_.resize(sizeof(fuse_out_header) + pages * ::page_size);
        const ssize_t got = recv(ends_[1], reply_.data(), reply_.size(), 0);
        EXPECT(got >= static_cast<ssize_t>(sizeof(fuse_out_header)));
        reply_.erase(reply_.begin(), reply_.begin() + sizeof(fuse_out_header));
        reply_.resize(static_cast<std::size_t>(got) - sizeof(fuse_out_header));
        return true;
    }

    Site& site_;
    const std::uint64_t thread_;
    Random random_;
    std::array<int, 2> ends_;
    cleanfs::Channel channel_;
    FastPath::Borrowed borrowed_;
    std::vector<std::byte> reply_;
    std::uint64_t unique_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
    Arguments arguments(argc, argv);
    const auto start = std::chrono::steady_clock::now();
    std::uint64_t seed = arguments.seed, hits = 0;
    do {
        std::printf("beside: --seconds 0 --seed %llu\n", static_cast<unsigned long long>(seed));
        std::fflush(stdout);
        Site site(seed);
        site.state.lock();
        std::atomic<bool> over{false};
        std::atomic<std::uint64_t> found{0}, written{0}, opened{0};
        std::vector<std::thread> servers;
        for (std::uint64_t number = 1; number <= threads; ++number) {
            servers.emplace_back([&, number] {
                Server server(site, number, seed + number);
                while (!over) server.step();
                found += server.hits;
                written += server.writes;
                opened += server.opens;
            });
        }
        for (int step = 0; step < 1000; ++step) {
            site.step();
            if (step % 8 == 0) {  // the channel sleeps
                site.state.unlock();
                std::this_thread::yield();
                site.state.lock();
            }
        }
        over = true;
        site.end();
        site.state.unlock();
        for (std::thread& server : servers) server.join();
        EXPECT(found > 20 && written > 5 && (opened > 5 || site.shared));
        EXPECT(site.evicted().put > 5 && site.evicted().stale > 0);
        hits += found;
        ++seed;
    } while (std::chrono::steady_clock::now() - start < std::chrono::duration<double>(arguments.seconds));
    std::printf("beside: %llu reads served\n", static_cast<unsigned long long>(hits));
}
