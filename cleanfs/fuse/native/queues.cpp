#include "queues.hpp"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <future>
#include <string>
#include <system_error>
#include <thread>

#include "fast_path.hpp"
#include "fuse_uring.hpp"
#include "ring.hpp"

namespace cleanfs {

namespace {

// Entries of a queue at first, how many are added at a time, and of how many one must be free. Their buffers are memory
// only once they were used.
constexpr std::size_t first_entries = 16, more_entries = 16, spare_entries = 2;

// More requests than these at a time stay in the kernel (Channel.MAX_REQUESTS).
constexpr std::size_t max_entries = 10'000;

constexpr unsigned ring_entries = 256;

// What large requests leave in buffers is given back after a pause. Buffers up to this size stay.
constexpr std::int64_t trim_after_ns = 1'000'000'000;
constexpr std::size_t kept_bytes = std::size_t{64} << 10;

constexpr std::size_t page_bytes = 4096;

constexpr std::uint64_t wake_up = 0;  // the user data of the read of a worker's eventfd

// The number of queues: the kernel has one for each processor that there may ever be.
std::size_t possible_processors() {
    std::FILE* file = std::fopen("/sys/devices/system/cpu/possible", "re");
    char text[256] = "";
    if (file != nullptr) {
        if (std::fgets(text, sizeof text, file) == nullptr) text[0] = '\0';
        std::fclose(file);
    }
    std::string_view list(text, std::strcspn(text, "\n"));
    list.remove_prefix(std::min(list.size(), list.find_last_of(",-") + 1));
    std::size_t last = 0;
    if (std::from_chars(list.data(), list.data() + list.size(), last).ec != std::errc{}) throw std::system_error(ENOTSUP, std::generic_category(), "processors");
    return last + 1;
}

// Those that this process may use.
std::vector<int> processors() {
    cpu_set_t set;
    std::vector<int> found;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (CPU_ISSET(cpu, &set)) found.push_back(cpu);
        }
    }
    return found;
}

void write_event(int fd) {
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(fd, &one, sizeof one);  // it fails only if it is readable already
}

int make_event(int flags) {
    const int fd = eventfd(0, EFD_CLOEXEC | flags);
    if (fd == -1) throw std::system_error(errno, std::generic_category(), "eventfd");
    return fd;
}

}  // namespace

// A place for one request and its reply. In memory: the headers, then room for what precedes the payload in a message,
// then the payload.
struct Queues::Entry {
    Entry(Worker& of, std::uint16_t queue, std::size_t payload_size) : worker(of), qid(queue), size(page_bytes + payload_size) {
        void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) throw std::bad_alloc();
        memory = static_cast<std::byte*>(at);
        for (const int advice : {MADV_DONTFORK, MADV_DONTDUMP}) madvise(memory, size, advice);
        parts[0] = {memory, sizeof(fuse_uring_req_header)};
        parts[1] = {payload(), payload_size};
    }
    ~Entry() { munmap(memory, size); }
    Entry(const Entry&) = delete;
    Entry& operator=(const Entry&) = delete;

    fuse_uring_req_header& headers() const { return *reinterpret_cast<fuse_uring_req_header*>(memory); }
    std::byte* payload() const { return memory + page_bytes; }
    std::size_t payload_size() const { return size - page_bytes; }

    // The request that the kernel has put here, in one piece. None if it is not complete.
    std::optional<Message> message();
    // Put a reply here. False if it is too large.
    bool fill(const iovec* reply, int count);
    // Put the header of a reply of `length` bytes that are here already.
    void fill_header(std::uint64_t request, std::size_t length);

    Worker& worker;
    const std::uint16_t qid;
    const std::size_t size;
    std::byte* memory;
    iovec parts[2];
    std::uint64_t unique = 0;
    std::size_t touched = 0;  // bytes of the payload that are memory
    bool free = true;         // with the kernel
};

std::optional<Message> Queues::Entry::message() {
    const fuse_uring_ent_in_out& in = headers().ring_ent_in_out;
    fuse_in_header header;
    std::memcpy(&header, headers().in_out, sizeof header);
    unique = in.commit_id;
    touched = std::max<std::size_t>(touched, in.payload_sz);
    const std::size_t before = header.len - in.payload_sz;
    if (in.payload_sz > payload_size() || header.len < in.payload_sz || before < sizeof header || before - sizeof header > fuse_uring_op_in_size) {
        return std::nullopt;
    }
    std::byte* const start = payload() - before;
    std::memcpy(start, &header, sizeof header);
    std::memcpy(start + sizeof header, headers().op_in, before - sizeof header);
    auto found = Message::parse({start, header.len});
    if (found && !found->is_complete()) return std::nullopt;
    return found;
}

bool Queues::Entry::fill(const iovec* reply, int count) {
    fuse_out_header header;
    std::memcpy(&header, reply[0].iov_base, sizeof header);
    if (header.len - sizeof header > payload_size()) return false;
    std::byte* to = payload();
    for (int at = 0; at < count; ++at) {
        const std::size_t skipped = at == 0 ? sizeof header : 0, length = reply[at].iov_len - skipped;
        if (length > 0) std::memmove(to, static_cast<const std::byte*>(reply[at].iov_base) + skipped, length);
        to += length;
    }
    std::memcpy(headers().in_out, &header, sizeof header);
    headers().ring_ent_in_out.payload_sz = header.len - static_cast<std::uint32_t>(sizeof header);
    touched = std::max<std::size_t>(touched, header.len - sizeof header);
    return true;
}

void Queues::Entry::fill_header(std::uint64_t request, std::size_t length) {
    fuse_out_header header{};
    header.len = static_cast<std::uint32_t>(sizeof header + length);
    header.unique = request;
    std::memcpy(headers().in_out, &header, sizeof header);
    headers().ring_ent_in_out.payload_sz = static_cast<std::uint32_t>(length);
    touched = std::max(touched, length);
}

// A thread with its ring, for one processor, and for the queues of some that this process cannot use.
class Queues::Worker {
public:
    explicit Worker(Queues& queues) : queues_(queues), event_(make_event(0)) {}
    ~Worker() {
        if (thread_.joinable()) stop();
        close(event_);
    }
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;

    // Throws std::system_error.
    void make_ring(int processor);
    // Register entries for these queues with the kernel. Whether it took them.
    bool start(std::vector<std::uint16_t> qids);
    void stop();

    // Send the reply that an entry holds. For other threads.
    void commit(Entry& entry) {
        const std::lock_guard lock(mutex_);
        if (replied_.empty()) write_event(event_);
        replied_.push_back(&entry);
        has_replied_ = true;
    }
    // The entry of the request that this thread serves, if it has that id.
    static Entry* serving(std::uint64_t unique) { return serving_ != nullptr && serving_->unique == unique ? std::exchange(serving_, nullptr) : nullptr; }
    // Null on a thread that has no queue.
    static Worker* of_this_thread() { return of_this_thread_; }
    void submit() { ring_->submit(); }
    // Send the reply that an entry holds with the next submission. For this thread.
    void prepare_commit(Entry& entry);

private:
    struct Queue {
        std::uint16_t qid;
        std::size_t free = 0;  // entries
    };

    void run(std::promise<int>& made, int processor);
    void serve();
    bool prepare_replied();
    void serve(Entry& entry);
    bool serve_beside(Entry& entry, const Message& message);
    void add_entries(Queue& queue, std::size_t count);
    void prepare_wake_up();
    io_uring_sqe& prepare_command(std::uint32_t command, const Entry& entry, std::uint64_t commit_id);
    Queue& queue_of(const Entry& entry) {
        return *std::ranges::find(of_queues_, entry.qid, &Queue::qid);
    }
    void trim();

    static inline thread_local Entry* serving_ = nullptr;
    static inline thread_local Worker* of_this_thread_ = nullptr;

    Queues& queues_;
    const int event_;
    std::uint64_t event_value_ = 0;
    std::thread thread_;
    std::unique_ptr<Ring> ring_;
    std::vector<Queue> of_queues_;
    std::vector<std::unique_ptr<Entry>> entries_;
    FastPath::Borrowed borrowed_;
    bool trimmed_ = true;
    std::promise<std::vector<std::uint16_t>> begin_;
    std::promise<bool> registered_;

    std::mutex mutex_;
    // Protected by mutex_.
    std::vector<Entry*> replied_;
    bool stopping_ = false;
    std::atomic<bool> has_replied_ = false;  // there is something in `replied_`
};

// -- the main thread ------------------------------------------------------------------------------------

Queues::Queues(int device) : device_(device), handed_over_fd_(make_event(EFD_NONBLOCK)) {
    try {
        const std::vector<int> usable = processors();
        if (usable.empty()) throw std::system_error(ENOTSUP, std::generic_category(), "processors");
        for (const int processor : usable) {
            workers_.push_back(std::make_unique<Worker>(*this));
            workers_.back()->make_ring(processor);
        }
    } catch (...) {
        workers_.clear();
        close(handed_over_fd_);
        throw;
    }
}

Queues::~Queues() {
    stop();
    workers_.clear();
    close(handed_over_fd_);
}

bool Queues::start(std::size_t max_payload, Channel& channel, FastPath* fast_path) {
    channel_ = &channel;
    fast_path_ = fast_path;
    max_payload_ = max_payload;
    state_.lock();
    started_ = true;
    const std::vector<int> usable = processors();
    std::vector<std::vector<std::uint16_t>> qids(workers_.size());
    for (std::size_t qid = 0, spare = 0; qid < possible_processors(); ++qid) {
        const auto found = std::ranges::find(usable, static_cast<int>(qid));
        const std::size_t worker = found == usable.end() ? spare++ : static_cast<std::size_t>(found - usable.begin());
        qids[worker % workers_.size()].push_back(static_cast<std::uint16_t>(qid));
    }
    bool all = true;
    for (std::size_t at = 0; at < workers_.size(); ++at) all = workers_[at]->start(std::move(qids[at])) && all;
    return all;
}

void Queues::stop() {
    if (started_) state_.unlock();
    for (const auto& worker : workers_) worker->stop();
    if (started_) state_.lock();
}

void Queues::hand_over(Entry& entry, const Message& message) {
    {
        const std::lock_guard lock(mutex_);
        in_progress_[message.header().unique] = &entry;
        handed_over_.push_back(message);
    }
    if (main_waits_.exchange(false)) write_event(handed_over_fd_);
}

std::optional<Message> Queues::take() {
    const std::lock_guard lock(mutex_);
    if (handed_over_.empty()) return std::nullopt;
    const Message message = handed_over_.front();
    handed_over_.pop_front();
    return message;
}

bool Queues::await() {
    main_waits_ = true;
    const std::lock_guard lock(mutex_);
    return handed_over_.empty();
}

void Queues::awake(bool readable) {
    main_waits_ = false;
    std::uint64_t count;
    if (readable) [[maybe_unused]] const ssize_t got = read(handed_over_fd_, &count, sizeof count);
}

Queues::Entry* Queues::release(std::uint64_t unique) {
    const std::lock_guard lock(mutex_);
    const auto found = in_progress_.find(unique);
    if (found == in_progress_.end()) return nullptr;
    Entry* entry = found->second;
    in_progress_.erase(found);
    return entry;
}

std::optional<Sent> Queues::send(const iovec* parts, int count) {
    fuse_out_header header;
    if (count < 1 || parts[0].iov_len < sizeof header) return std::nullopt;
    std::memcpy(&header, parts[0].iov_base, sizeof header);
    if (Entry* entry = Worker::serving(header.unique)) {
        if (entry->fill(parts, count)) {
            entry->worker.prepare_commit(*entry);
            return Sent::taken;
        }
    } else if ((entry = release(header.unique)) != nullptr) {
        if (entry->fill(parts, count)) {
            entry->worker.commit(*entry);
            return Sent::taken;
        }
        const std::lock_guard lock(mutex_);
        in_progress_[header.unique] = entry;
    } else {
        return std::nullopt;
    }
    errno = EINVAL;  // as write(2) of the device
    return Sent::failed;
}

void Queues::push() {
    if (Worker* worker = Worker::of_this_thread()) worker->submit();
}

// -- the threads ----------------------------------------------------------------------------------------

void Queues::Worker::make_ring(int processor) {
    std::promise<int> made;
    // A new thread inherits the mask: signals are Python's, on the main thread.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        thread_ = std::thread([this, &made, processor] { run(made, processor); });
    } catch (...) {
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (const int error = made.get_future().get(); error != 0) throw std::system_error(error, std::generic_category(), "io_uring");
}

bool Queues::Worker::start(std::vector<std::uint16_t> qids) {
    begin_.set_value(std::move(qids));
    return registered_.get_future().get();
}

void Queues::Worker::stop() {
    if (!thread_.joinable()) return;
    {
        const std::lock_guard lock(mutex_);
        stopping_ = true;
        write_event(event_);
    }
    if (!queues_.started_) begin_.set_value({});
    thread_.join();
}

void Queues::Worker::run(std::promise<int>& made, int processor) {
    pthread_setname_np(pthread_self(), ("fuse-cpu-" + std::to_string(processor)).c_str());
    // Where the requester runs: to wake a thread on another processor takes longer.
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(processor, &set);
    sched_setaffinity(0, sizeof set, &set);
    try {
        ring_ = std::make_unique<Ring>(ring_entries);
        made.set_value(0);
    } catch (const std::system_error& error) {
        made.set_value(error.code().value());
        return;
    }
    of_this_thread_ = this;
    const std::vector<std::uint16_t> qids = begin_.get_future().get();
    for (const std::uint16_t qid : qids) of_queues_.push_back({qid});
    for (Queue& queue : of_queues_) add_entries(queue, first_entries);
    prepare_wake_up();
    ring_->submit();
    ring_->for_each_completion([&](std::uint64_t data, int) {  // nothing else completes before this thread waits
        if (data != wake_up) --queue_of(*reinterpret_cast<Entry*>(data)).free;
    });
    registered_.set_value(std::ranges::all_of(of_queues_, [](const Queue& queue) { return queue.free > 0; }));
    if (!qids.empty()) serve();
}

void Queues::Worker::serve() {
    for (;;) {
        const int error = ring_->submit_and_wait(trimmed_ ? -1 : trim_after_ns);
        if (error == ETIME) trim();
        bool stopping = false;
        ring_->for_each_completion([&](std::uint64_t data, int result) {
            if (data == wake_up) {
                prepare_replied();
                prepare_wake_up();
                const std::lock_guard lock(mutex_);
                stopping = stopping_ && replied_.empty();
                return;
            }
            // Less than 0: the connection has ended.
            if (result >= 0) serve(*reinterpret_cast<Entry*>(data));
        });
        if (!stopping) continue;
        ring_->submit();
        return;
    }
}

// Whether there were replies of other threads.
bool Queues::Worker::prepare_replied() {
    std::vector<Entry*> replied;
    {
        const std::lock_guard lock(mutex_);
        replied.swap(replied_);
        has_replied_ = false;
    }
    for (Entry* entry : replied) prepare_commit(*entry);
    return !replied.empty();
}

void Queues::Worker::serve(Entry& entry) {
    entry.free = false;
    Queue& queue = queue_of(entry);
    --queue.free;
    if (queue.free < spare_entries && entries_.size() < max_entries) add_entries(queue, more_entries);
    const auto message = entry.message();
    if (entry.touched > kept_bytes) trimmed_ = false;
    if (!message) {  // no kernel sends such a message
        entry.fill_header(entry.unique, 0);
        fuse_out_header header{sizeof header, -EIO, entry.unique};
        std::memcpy(entry.headers().in_out, &header, sizeof header);
        prepare_commit(entry);
        return;
    }
    if (!serve_beside(entry, *message)) queues_.hand_over(entry, *message);
}

bool Queues::Worker::serve_beside(Entry& entry, const Message& message) {
    if (queues_.fast_path_ == nullptr || !FastPath::may_serve_beside(message)) return false;
    FastPath& fast_path = *queues_.fast_path_;
    if (has_replied_ && prepare_replied()) ring_->submit();  // the main thread may keep the lock for a while
    {
        const StateLock::Turn turn(queues_.state_);
        serving_ = &entry;
        const FastPath::Outcome outcome = fast_path.serve_beside(message, *queues_.channel_, borrowed_);
        serving_ = nullptr;
        switch (outcome) {
            case FastPath::Outcome::none: return false;
            case FastPath::Outcome::in_order: ring_->submit(); return true;
            case FastPath::Outcome::replied: return true;
            case FastPath::Outcome::borrowed: break;
        }
    }
    if (fast_path.decode(borrowed_, entry.payload())) {
        entry.fill_header(entry.unique, borrowed_.size());
        if (entry.touched > kept_bytes) trimmed_ = false;
        prepare_commit(entry);
        return true;
    }
    const StateLock::Turn turn(queues_.state_);
    fast_path.take_back(borrowed_, *queues_.channel_, message);
    return false;
}

// -- the ring ---------------------------------------------------------------------------------------------

io_uring_sqe& Queues::Worker::prepare_command(std::uint32_t command, const Entry& entry, std::uint64_t commit_id) {
    io_uring_sqe& sqe = ring_->prepare();
    sqe.opcode = IORING_OP_URING_CMD;
    sqe.fd = queues_.device_;
    sqe.cmd_op = command;
    sqe.user_data = reinterpret_cast<std::uint64_t>(&entry);
    fuse_uring_cmd_req request{};
    request.commit_id = commit_id;
    request.qid = entry.qid;
    std::memcpy(sqe.cmd, &request, sizeof request);
    return sqe;
}

void Queues::Worker::prepare_commit(Entry& entry) {
    prepare_command(FUSE_IO_URING_CMD_COMMIT_AND_FETCH, entry, entry.unique);
    entry.free = true;
    ++queue_of(entry).free;
}

void Queues::Worker::add_entries(Queue& queue, std::size_t count) {
    try {
        for (std::size_t at = 0; at < count; ++at) {
            entries_.push_back(std::make_unique<Entry>(*this, queue.qid, queues_.max_payload_));
            Entry& entry = *entries_.back();
            io_uring_sqe& sqe = prepare_command(FUSE_IO_URING_CMD_REGISTER, entry, 0);
            sqe.addr = reinterpret_cast<std::uint64_t>(entry.parts);
            sqe.len = 2;
            ++queue.free;
        }
    } catch (const std::bad_alloc&) {
        // Requests wait in the kernel for the entries that there are.
    }
}

void Queues::Worker::prepare_wake_up() {
    io_uring_sqe& sqe = ring_->prepare();
    sqe.opcode = IORING_OP_READ;
    sqe.fd = event_;
    sqe.addr = reinterpret_cast<std::uint64_t>(&event_value_);
    sqe.len = sizeof event_value_;
    sqe.user_data = wake_up;
}

// Nothing came for a while. The kernel fills buffers only while this thread waits, so those of free entries hold nothing.
void Queues::Worker::trim() {
    trimmed_ = true;
    for (const auto& entry : entries_) {
        if (entry->touched <= kept_bytes) continue;
        if (!entry->free) {
            trimmed_ = false;
            continue;
        }
        madvise(entry->payload() + kept_bytes, entry->payload_size() - kept_bytes, MADV_DONTNEED);
        entry->touched = kept_bytes;
    }
}

}  // namespace cleanfs
