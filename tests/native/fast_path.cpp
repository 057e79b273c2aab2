// Have the fast path serve READs and WRITEs of a file, over a pair of sockets, and compare each reply with a model of
// the file. What it does not serve, the program does as Python would. Other processes are played by changes behind its
// back, also between the two stats of a write. Memory is short, and the backend fails, at random. Some messages have random
// fields.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <new>
#include <thread>

#include "fast_path.hpp"
#include "pages.hpp"
#include "zcache.hpp"

namespace {

thread_local std::uint64_t allocations_left = ~0ull;  // the next one throws std::bad_alloc

std::function<void()> before_second_stat;  // of a write
int stats = 0;                             // of the request under way
bool cuts_writes = false;                  // no space is left for the second half

}  // namespace

void* operator new(std::size_t size) {
    void* found = allocations_left == 0 ? nullptr : std::malloc(size);
    if (found == nullptr) throw std::bad_alloc();
    if (allocations_left != ~0ull) --allocations_left;
    return found;
}
void operator delete(void* pointer) noexcept { std::free(pointer); }
void operator delete(void* pointer, std::size_t) noexcept { std::free(pointer); }

extern "C" int __real_fstat(int fd, struct stat* st);
extern "C" int __wrap_fstat(int fd, struct stat* st) {
    if (++stats == 2 && before_second_stat) before_second_stat();
    return __real_fstat(fd, st);
}

extern "C" ssize_t __real_pwrite(int fd, const void* data, std::size_t size, off_t offset);
extern "C" ssize_t __wrap_pwrite(int fd, const void* data, std::size_t size, off_t offset) {
    return __real_pwrite(fd, data, cuts_writes ? size / 2 : size, offset);
}

namespace {

using cleanfs::PageIndex;
using cleanfs::Resident;

constexpr std::size_t page_size = 4096, max_pages = 40, limit_pages = 12, max_size = max_pages * page_size;

class Site : public cleanfs::CacheState {
public:
    Site(std::uint64_t seed, bool real_file)
        : random_(seed), resident_([](void* page) { std::free(page); }), engine_(options()) {
        file_fd_ = real_file ? open(".", O_TMPFILE | O_RDWR, 0600) : memfd_create("source", 0);
        EXPECT(file_fd_ >= 0);
        EXPECT(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, ends_) == 0);
        channel_.emplace(ends_[0], -1, 0);
        fast_.emplace(*this);
        set_up_caches();
        file_.serial = 7;
        file_.device = 1;
        file_.inode = 2;
        file_.generation = "generation";
        nowait_.nowait = real_file;
        handle_.file = &file_;
        handle_.kernel = &kernel_;
        handle_.reads = &reads_;
        handle_.writes = &writes_;
        handle_.nowait = &nowait_;
        handle_.stream = &stream_;
        handle_.fd = file_fd_;
        fast_->add(fh, handle_);
        shared = random_.below(4) > 0;
        change_behind();
    }

    ~Site() {
        for (int fd : {file_fd_, ends_[0], ends_[1]}) close(fd);
    }

    void step() {
        reads_.inline_calls = random_.below(8) > 0;
        writes_.inline_calls = random_.below(8) > 0;
        reads_.returned_at = writes_.returned_at = static_cast<double>(cleanfs::now_ns()) * 1e-9;
        handle_.drop_due = random_.below(16) == 0;
        file_.mutations = random_.below(16) == 0;
        file_.pending_writes = random_.below(16) == 0;
        file_.remembers_reads = random_.below(16) == 0;
        file_.reads_in_flight = random_.below(16) == 0;
        flush_fails_ = random_.below(16) == 0;
        scarce_ = random_.below(8) == 0;
        switch (random_.below(16)) {
            case 0: change_behind(); break;
            case 1: evict(resident_.size()); break;
            case 2: swap_backend(); break;
            case 3: send_any_fields(); break;
            case 4: case 5: case 6: case 7: case 8: write(); break;
            default: read();
        }
        resident_.check();
    }

    // From another thread.
    void read_counters() { engine_.counters(); }

    std::uint64_t served() { return fast_->counters().served; }

private:
    static constexpr std::uint64_t fh = 3;

    static zcache::Options options() {
        zcache::Options chosen;
        chosen.pool_limit = 1 << 20;
        return chosen;
    }

    void set_up_caches() {
        CacheState::page_size = ::page_size;
        CacheState::limit_pages = ::limit_pages;
        CacheState::resident = &resident_;
        page_bytes = [](Resident::Page page) { return static_cast<char*>(page); };
        discard = [](Resident* all, Resident::Serial serial, PageIndex first, PageIndex stop) noexcept {
            all->discard(serial, first, stop);
        };
        insert = [](CacheState& caches, const cleanfs::FileState& file, PageIndex first, const std::byte* data,
                    std::size_t size) noexcept { static_cast<Site&>(caches).insert_pages(file.serial, first, data, size); };
        ops_.engine = this;
        ops_.borrow = [](void* engine, int pool, const zcache::FileKey& key, PageIndex first, std::size_t count, std::byte* to) {
            return static_cast<Site*>(engine)->engine_.borrow(pool, key, first, count, to);
        };
        ops_.missing = [](void* engine, int pool, const zcache::FileKey& key, PageIndex first, std::size_t count) {
            return static_cast<Site*>(engine)->engine_.missing(pool, key, first, count);
        };
        ops_.flush = [](void* engine, int pool, const zcache::FileKey& key, PageIndex first, PageIndex stop) {
            if (static_cast<Site*>(engine)->flush_fails_) return false;
            static_cast<Site*>(engine)->engine_.flush_pages(pool, key, first, stop);
            return true;
        };
        swap_backend();
    }

    void swap_backend() {
        if (pool_id >= 0) {
            engine_.flush_fs(pool_id);
            pool_id = -1;
            backend = nullptr;
        } else {
            pool_id = engine_.init_fs(::page_size);
            backend = &ops_;
        }
    }

    void insert_pages(Resident::Serial serial, PageIndex first, const std::byte* data, std::size_t size) {
        allocations_left = ~0ull;  // Python's part
        for (std::size_t at = 0; at < size; at += ::page_size, ++first) {
            void* page = std::calloc(1, ::page_size);
            std::memcpy(page, data + at, std::min(::page_size, size - at));
            if (!resident_.insert(serial, first, page)) std::free(page);
        }
        if (resident_.size() > ::limit_pages) evict(resident_.size() - ::limit_pages);
    }

    void evict(std::size_t count) {
        for (const Resident::Victim& victim : resident_.evict(count)) {
            const zcache::Put put{victim.index, static_cast<const std::byte*>(victim.page), zcache::no_token};
            if (pool_id >= 0) engine_.put(pool_id, file_.key(), {&put, 1});
            std::free(victim.page);
        }
    }

    void flush_everything() {
        if (pool_id >= 0) engine_.flush_inode(pool_id, file_.key());
        resident_.discard(file_.serial, 0, ~PageIndex{0});
    }

    // Another process writes a new file, and an open finds that.
    void change_behind() {
        model_.resize(random_.below(max_size));
        for (std::byte& byte : model_) byte = static_cast<std::byte>(random_.next());
        EXPECT(ftruncate(file_fd_, 0) == 0);
        EXPECT(pwrite(file_fd_, model_.data(), model_.size(), 0) == static_cast<ssize_t>(model_.size()));
        look();
    }

    // Take the present state of the file for the known one.
    void look() {
        flush_everything();
        struct stat st;
        EXPECT(__real_fstat(file_fd_, &st) == 0);
        model_.resize(static_cast<std::size_t>(st.st_size));
        EXPECT(pread(file_fd_, model_.data(), model_.size(), 0) == st.st_size);
        file_.stamps = cleanfs::Stamps::of(st);
        file_.size = static_cast<std::uint64_t>(st.st_size);
        kernel_.sent = file_.stamps;
        kernel_.size = st.st_size;
    }

    template <class In>
    bool is_served(std::uint32_t opcode, const In& in, const std::byte* data = nullptr, std::size_t size = 0) {
        fuse_in_header header{};
        header.len = static_cast<std::uint32_t>(sizeof header + sizeof in + size);
        header.opcode = opcode;
        header.unique = unique_ += 2;
        std::vector<std::byte> message(header.len);
        std::memcpy(message.data(), &header, sizeof header);
        std::memcpy(message.data() + sizeof header, &in, sizeof in);
        if (size > 0) std::memcpy(message.data() + sizeof header + sizeof in, data, size);
        EXPECT(::send(ends_[1], message.data(), message.size(), 0) == static_cast<ssize_t>(message.size()));
        const std::uint64_t before = served();
        stats = 0;
        if (scarce_) allocations_left = random_.below(4);
        const bool handed = channel_->receive_now(&*fast_).has_value();
        allocations_left = ~0ull;
        EXPECT(handed == (served() == before));
        reply_.resize(sizeof(fuse_out_header) + 2 * max_size);
        const ssize_t got = recv(ends_[1], reply_.data(), reply_.size(), MSG_DONTWAIT);
        EXPECT(handed == (got < 0));
        if (handed) return false;
        fuse_out_header out;
        std::memcpy(&out, reply_.data(), sizeof out);
        EXPECT(out.unique == header.unique && out.error == 0 && out.len == static_cast<std::size_t>(got));
        reply_.erase(reply_.begin(), reply_.begin() + sizeof out);
        reply_.resize(static_cast<std::size_t>(got) - sizeof out);
        return true;
    }

    void read() {
        fuse_read_in in{};
        in.fh = fh;
        in.offset = random_.below(max_size);
        if (random_.below(4) > 0) in.offset -= in.offset % ::page_size;
        in.size = static_cast<std::uint32_t>(1 + random_.below(8 * ::page_size));
        if (!is_served(FUSE_READ, in)) return;
        EXPECT(!handle_.drop_due && file_.pending_writes == 0 && !file_.remembers_reads);
        EXPECT(in.offset < model_.size());
        const std::size_t size = std::min<std::size_t>(in.size, model_.size() - in.offset);
        EXPECT(reply_.size() == size && std::equal(reply_.begin(), reply_.end(), model_.begin() + static_cast<std::ptrdiff_t>(in.offset)));
    }

    void write() {
        std::vector<std::byte> data(1 + random_.below(4 * ::page_size));
        for (std::byte& byte : data) byte = static_cast<std::byte>(random_.next());
        fuse_write_in in{};
        in.fh = fh;
        in.offset = random_.below(max_size - data.size());
        in.size = static_cast<std::uint32_t>(data.size());
        in.flags = random_.below(8) == 0 ? O_APPEND : 0;
        bool disturbed = false;
        before_second_stat = nullptr;
        if (random_.below(4) == 0) {
            before_second_stat = [&] {
                disturbed = true;
                if (random_.below(2) == 0) {
                    EXPECT(fchmod(file_fd_, 0600 + static_cast<mode_t>(++modes_ % 8)) == 0);
                } else {
                    EXPECT(ftruncate(file_fd_, static_cast<off_t>(model_.size() + max_size + 1)) == 0);
                }
            };
        }
        const bool was_known = !shared || knows_source();
        cuts_writes = in.size > 1 && in.offset + in.size <= model_.size() && random_.below(4) == 0;
        const bool served = is_served(FUSE_WRITE, in, data.data(), data.size());
        if (cuts_writes) EXPECT(!served);
        cuts_writes = false;
        before_second_stat = nullptr;
        if (disturbed) {
            EXPECT(!served);
            EXPECT(ftruncate(file_fd_, static_cast<off_t>(std::max(model_.size(), in.offset + data.size()))) == 0);
            look();
            return;
        }
        if (!served) return look();  // it may have written
        EXPECT(was_known && !handle_.drop_due && file_.mutations == 0 && file_.pending_writes == 0 && !file_.remembers_reads);
        EXPECT((!shared || (in.flags & O_APPEND) == 0) && (!flush_fails_ || pool_id < 0));
        EXPECT(reply_.size() == sizeof(fuse_write_out));
        model_.resize(std::max(model_.size(), in.offset + data.size()));
        std::copy(data.begin(), data.end(), model_.begin() + static_cast<std::ptrdiff_t>(in.offset));
        EXPECT(file_.size == model_.size() && kernel_.size == static_cast<std::int64_t>(model_.size()) && file_.racy && knows_source());
        std::vector<std::byte> source(model_.size() + 1);
        EXPECT(pread(file_fd_, source.data(), source.size(), 0) == static_cast<ssize_t>(model_.size()));
        source.pop_back();
        EXPECT(source == model_);
    }

    bool knows_source() const {
        struct stat st;
        EXPECT(__real_fstat(file_fd_, &st) == 0);
        return file_.stamps == cleanfs::Stamps::of(st);
    }

    std::uint64_t any_number() {
        const std::uint64_t edges[] = {0, 1, fh, ::page_size, max_size, 1ull << 31, 1ull << 32, 1ull << 62, 1ull << 63, ~0ull};
        return edges[random_.below(std::size(edges))] + random_.below(3) - 1;
    }

    void send_any_fields() {
        if (random_.below(2) == 0) {
            fuse_read_in in{};
            in.fh = random_.below(2) == 0 ? fh : any_number();
            in.offset = any_number();
            in.size = static_cast<std::uint32_t>(any_number());
            if (is_served(FUSE_READ, in)) EXPECT(in.fh == fh && in.offset < model_.size() && reply_.size() <= in.size);
        } else {
            fuse_write_in in{};
            in.fh = random_.below(2) == 0 ? fh : any_number();
            in.offset = any_number();
            in.flags = static_cast<std::uint32_t>(any_number());
            in.write_flags = static_cast<std::uint32_t>(any_number());
            const std::byte data[3]{};
            in.size = static_cast<std::uint32_t>(random_.below(4));
            if (is_served(FUSE_WRITE, in, data, sizeof data)) EXPECT(in.fh == fh && in.size == 3 && in.offset < 1ull << 62);
            EXPECT(ftruncate(file_fd_, static_cast<off_t>(std::min(max_size, model_.size()))) == 0);
            look();
        }
    }

    Random random_;
    Resident resident_;
    zcache::Zcache engine_;
    zcache::FastOps ops_;
    int file_fd_ = -1, ends_[2];
    std::optional<cleanfs::Channel> channel_;
    std::optional<cleanfs::FastPath> fast_;
    cleanfs::FileState file_;
    cleanfs::KernelState kernel_;
    cleanfs::InlineState reads_, writes_;
    cleanfs::NowaitState nowait_;
    cleanfs::Stream stream_;
    cleanfs::HandleState handle_;
    std::vector<std::byte> model_, reply_;
    std::uint64_t unique_ = 0, modes_ = 0;
    bool flush_fails_ = false, scarce_ = false;
};

}  // namespace

int main(int argc, char** argv) {
    Arguments arguments(argc, argv);
    const auto start = std::chrono::steady_clock::now();
    std::uint64_t seed = arguments.seed, served = 0;
    do {
        std::printf("fast_path: --seconds 0 --seed %llu\n", static_cast<unsigned long long>(seed));
        std::fflush(stdout);
        Site site(seed, seed % 2 == 0);
        std::atomic<bool> over{false};
        std::thread other([&] {
            while (!over) site.read_counters();
        });
        for (int step = 0; step < 2000; ++step) site.step();
        over = true;
        other.join();
        EXPECT(site.served() > 100);
        served += site.served();
        ++seed;
    } while (std::chrono::steady_clock::now() - start < std::chrono::duration<double>(arguments.seconds));
    std::printf("fast_path: %llu requests served\n", static_cast<unsigned long long>(served));
}
