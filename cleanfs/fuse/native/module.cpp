// The Python module: cleanfs.fuse.channel is its only user, and says what it is for.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <system_error>
#include <unordered_map>

#include "channel.hpp"
#include "fast_path.hpp"
#include "session.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using cleanfs::Bytes;
using cleanfs::CacheState;
using cleanfs::Channel;
using cleanfs::FastPath;
using cleanfs::HandleState;
using cleanfs::Histogram;
using cleanfs::Message;
using cleanfs::Sent;
using cleanfs::Window;

// A request of the kernel, from its header on to the reply.
struct Request {
    explicit Request(const fuse_in_header& of) : header(of) {}
    explicit Request(const Message& message) : header(message.header()), flags(message.flags()), file_flags(message.file_flags()) {}

    fuse_in_header header;
    std::uint32_t flags = 0, file_flags = 0;
    nb::object rollback = nb::none();
    bool interrupted = false;
    nb::object on_interrupt = nb::none();
};

nb::bytes to_bytes(Bytes bytes) { return nb::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size()); }

[[noreturn]] void raise_errno(int error) {
    errno = error;
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
}

// The counts of all buckets, and the sum in ns.
nb::tuple to_python(const Histogram& histogram) {
    nb::list counts;
    for (const std::uint64_t count : histogram.counts) counts.append(count);
    return nb::make_tuple(nb::tuple(counts), histogram.sum_ns);
}

class PyChannel {
public:
    PyChannel(int device, int scheduler_fd, std::int64_t busy_poll_ns, nb::callable init_reply, nb::callable refused)
        : channel_(device, scheduler_fd, busy_poll_ns), init_reply_(std::move(init_reply)), refused_(std::move(refused)) {}

    ~PyChannel() { close(); }
    PyChannel(const PyChannel&) = delete;
    PyChannel& operator=(const PyChannel&) = delete;

    // Have libfuse read and write through this channel. Raises OSError.
    void attach() {
        fuse_session* session = cleanfs::mounted_session();
        if (session == nullptr) raise_errno(ENOTCONN);
        static const fuse_custom_io io = [] {
            fuse_custom_io calls{};
            calls.read = [](int fd, void* to, std::size_t size, void*) -> ssize_t {
                return attached == nullptr ? read(fd, to, size) : attached->channel_.read_for_libfuse(to, size);
            };
            calls.writev = [](int fd, iovec* parts, int count, void*) -> ssize_t {
                return attached == nullptr ? writev(fd, parts, count) : attached->write_for_libfuse(parts, count);
            };
            return calls;
        }();
        const int result = fuse_session_custom_io(session, &io, channel_.device());
        if (result != 0) raise_errno(result < 0 ? -result : EINVAL);
        attached = this;
    }

    int device() const { return channel_.device(); }
    Window& window() { return channel_.window(); }

    void close() {
        if (attached == this) attached = nullptr;
    }

    // None if there is no message now.
    std::optional<nb::object> receive_now() {
        end_synced();
        return request_of([&] { return channel_.receive_now(fast_path_.get()); });
    }

    // `until_seconds` from now on, the scheduler must run. None if it must run before a message is there.
    std::optional<nb::object> receive(double until_seconds) {
        const auto ns = static_cast<std::int64_t>(std::clamp(until_seconds, 0.0, 1e6) * 1e9);
        return request_of([&] {
            nb::gil_scoped_release unlocked;  // while it polls, serves or sleeps, worker threads run
            return channel_.receive(cleanfs::now_ns() + ns, fast_path_.get());
        });
    }

    nb::bytes body() const {
        if (!message_) throw nb::value_error("nothing was received");
        return to_bytes(message_->body());
    }

    void leave_to_libfuse() {
        if (message_ && message_->header().opcode == FUSE_INIT) init_request_ = to_bytes(message_->bytes());
        channel_.leave_to_libfuse();
    }

    bool reply(std::uint64_t unique, int error, nb::bytes body) {
        const Bytes bytes{static_cast<const std::byte*>(body.data()), body.size()};
        const Sent sent = channel_.reply(unique, error, bytes);
        if (sent == Sent::failed) raise_errno(errno);
        return sent == Sent::taken;
    }

    void ended(std::uint64_t unique) { in_flight_.erase(unique); }

    nb::object request(std::uint64_t unique) {
        const auto found = in_flight_.find(unique);
        if (found != in_flight_.end()) return found->second;
        end_synced();
        const fuse_in_header* header = fast_path_ == nullptr ? nullptr : fast_path_->syncing(unique);
        return header == nullptr ? nb::none() : in_flight_[unique] = nb::cast(Request(*header));
    }

    std::size_t size() const { return in_flight_.size(); }
    // FSYNCs under way in native threads.
    std::size_t syncing() {
        end_synced();
        return fast_path_ == nullptr ? 0 : fast_path_->syncing();
    }

    // Serve hits from these caches from now on.
    void serve_from(nb::object caches) {
        fast_path_ = std::make_unique<FastPath>(nb::cast<CacheState&>(caches));
        caches_ = std::move(caches);
    }

    void serve_metadata(nb::object inodes) {
        if (fast_path_ == nullptr) return;
        fast_path_->serve_metadata(nb::cast<cleanfs::InodeStates&>(inodes));
        inodes_ = std::move(inodes);
    }

    void add_handle(std::uint64_t fh, nb::object handle) {
        if (fast_path_ == nullptr) return;
        fast_path_->add(fh, nb::cast<HandleState&>(handle));
        handles_[fh] = std::move(handle);
    }

    void remove_handle(std::uint64_t fh) {
        if (fast_path_ != nullptr) fast_path_->remove(fh);
        handles_.erase(fh);
    }

    // How many messages came, by opcode, without those of which none came.
    nb::dict opcodes() const {
        nb::dict counts;
        for (std::size_t opcode = 0; opcode < channel_.opcodes().size(); ++opcode) {
            if (channel_.opcodes()[opcode] > 0) counts[nb::int_(opcode)] = channel_.opcodes()[opcode];
        }
        return counts;
    }

    // Reads of the source, and their bytes.
    nb::tuple source_reads() const {
        if (fast_path_ == nullptr) return nb::make_tuple(0, 0);
        return nb::make_tuple(fast_path_->counters().source_reads, fast_path_->counters().source_read_bytes);
    }

    std::uint64_t polled() const { return channel_.polled(); }
    std::uint64_t slept() const { return channel_.slept(); }
    std::uint64_t served() const { return fast_path_ == nullptr ? 0 : fast_path_->counters().served; }
    std::uint64_t writes_served() const { return fast_path_ == nullptr ? 0 : fast_path_->counters().writes; }
    std::uint64_t write_bytes() const { return fast_path_ == nullptr ? 0 : fast_path_->counters().write_bytes; }
    std::uint64_t read_bytes() const { return fast_path_ == nullptr ? 0 : fast_path_->counters().read_bytes; }

    // Those of reads from the page cache, cleancache and the source, and of writes.
    nb::tuple histograms() const {
        static const FastPath::Counters none;
        const FastPath::Counters& counters = fast_path_ == nullptr ? none : fast_path_->counters();
        return nb::make_tuple(to_python(counters.pagecache_hit), to_python(counters.cleancache_hit),
                              to_python(counters.source_read), to_python(counters.write));
    }

private:
    template <class Receive>
    std::optional<nb::object> request_of(Receive&& receive) {
        message_.reset();
        try {
            message_ = receive();
        } catch (const std::system_error& error) {
            raise_errno(error.code().value());
        }
        if (!message_) return std::nullopt;
        nb::object request = nb::cast(Request(*message_));
        if (message_->has_reply()) in_flight_[message_->header().unique] = request;
        return request;
    }

    void end_synced() {
        if (fast_path_ == nullptr) return;
        for (const auto& [unique, refused] : fast_path_->take_synced()) {
            const auto found = in_flight_.find(unique);
            if (found == in_flight_.end()) continue;
            nb::object request = std::move(found->second);
            in_flight_.erase(found);
            if (refused) call_refused(request);
        }
    }

    ssize_t write_for_libfuse(iovec* parts, int count) {
        fuse_out_header header;
        if (count < 1 || parts[0].iov_len < sizeof header) return errno = EINVAL, -1;
        std::memcpy(&header, parts[0].iov_base, sizeof header);
        if (header.unique == 0) return writev(channel_.device(), parts, count);  // a notification, from any thread
        nb::gil_scoped_acquire locked;
        nb::object request = nb::none();
        if (const auto found = in_flight_.find(header.unique); found != in_flight_.end()) {
            request = std::move(found->second);
            in_flight_.erase(found);
        }
        Sent sent;
        if (!request.is_none() && nb::cast<Request&>(request).header.opcode == FUSE_INIT) {
            sent = send_init_reply(parts, count);
        } else {
            sent = channel_.send(parts, count);
        }
        if (sent == Sent::failed) return -1;
        if (sent == Sent::refused && !request.is_none()) call_refused(request);
        return header.len;
    }

    Sent send_init_reply(iovec* parts, int count) {
        try {
            std::string whole;
            for (int at = 0; at < count; ++at) whole.append(static_cast<const char*>(parts[at].iov_base), parts[at].iov_len);
            nb::object changed = init_reply_(init_request_, nb::bytes(whole.data(), whole.size()));
            nb::bytes reply = nb::cast<nb::bytes>(changed);
            make_room(reply);
            const iovec one{const_cast<void*>(reply.data()), reply.size()};
            return channel_.send(&one, 1);
        } catch (nb::python_error& error) {
            error.discard_as_unraisable("the reply to FUSE_INIT");
            return channel_.send(parts, count);
        }
    }

    void make_room(const nb::bytes& init_reply) {
        fuse_init_out init;
        if (init_reply.size() < sizeof(fuse_out_header) + sizeof init) return;
        std::memcpy(&init, static_cast<const std::byte*>(init_reply.data()) + sizeof(fuse_out_header), sizeof init);
        message_.reset();
        channel_.set_max_write(init.max_write);
    }

    void call_refused(nb::handle request) {
        try {
            refused_(request);
        } catch (nb::python_error& error) {
            error.discard_as_unraisable("the rollback of a refused reply");
        }
    }

    static inline PyChannel* attached = nullptr;  // to the session of this process

    Channel channel_;
    std::unique_ptr<FastPath> fast_path_;
    nb::object caches_, inodes_;                              // what it refers to
    std::unordered_map<std::uint64_t, nb::object> handles_;  // too, by fh
    std::optional<Message> message_;  // received last
    nb::bytes init_request_{"", 0};
    std::unordered_map<std::uint64_t, nb::object> in_flight_;  // by unique
    nb::callable init_reply_, refused_;
};

template <auto Field>
auto header_field() {
    return [](const Request& request) { return request.header.*Field; };
}

}  // namespace

NB_MODULE(_channel, module) {
    module.doc() = "The FUSE channel.";
    nb::set_leak_warnings(false);  // a process may end while it has a channel
    module.def("session_fd", []() -> std::optional<int> {
        fuse_session* session = cleanfs::mounted_session();
        if (session == nullptr) return std::nullopt;
        return fuse_session_fd(session);
    });
    nb::class_<Window>(module, "Window", "For tests.")
        .def(nb::init<std::int64_t>(), "limit_ns"_a)
        .def_prop_ro("ns", &Window::ns)
        .def("open", &Window::open)
        .def("waited", &Window::waited, "ns"_a)
        .def_ro_static("GROW_START_NS", &Window::grow_start_ns)
        .def_ro_static("WAKE_NS", &Window::wake_ns);
    nb::class_<Histogram>(module, "Histogram", "For tests.")
        .def(nb::init<>())
        .def("record", &Histogram::record, "ns"_a)
        .def_prop_ro("snapshot", &to_python);

    nb::class_<Request>(module, "Request")
        .def_prop_ro("unique", header_field<&fuse_in_header::unique>())
        .def_prop_ro("opcode", header_field<&fuse_in_header::opcode>())
        .def_prop_ro("nodeid", header_field<&fuse_in_header::nodeid>())
        .def_prop_ro("uid", header_field<&fuse_in_header::uid>())
        .def_prop_ro("gid", header_field<&fuse_in_header::gid>())
        .def_prop_ro("pid", header_field<&fuse_in_header::pid>())
        .def_ro("flags", &Request::flags)
        .def_ro("file_flags", &Request::file_flags)
        .def_rw("rollback", &Request::rollback, nb::arg().none())
        .def_rw("interrupted", &Request::interrupted)
        .def_rw("on_interrupt", &Request::on_interrupt, nb::arg().none());
    nb::class_<PyChannel>(module, "Channel")
        .def(nb::init<int, int, std::int64_t, nb::callable, nb::callable>(), "device"_a, "scheduler_fd"_a, "busy_poll_ns"_a, "init_reply"_a, "refused"_a)
        .def_prop_ro("device", &PyChannel::device)
        .def_prop_ro("window", &PyChannel::window, nb::rv_policy::reference_internal)
        .def("attach", &PyChannel::attach)
        .def("close", &PyChannel::close)
        .def("receive_now", &PyChannel::receive_now)
        .def("receive", &PyChannel::receive, "until_seconds"_a)
        .def("body", &PyChannel::body)
        .def("leave_to_libfuse", &PyChannel::leave_to_libfuse)
        .def("reply", &PyChannel::reply, "unique"_a, "error"_a, "body"_a = nb::bytes("", 0))
        .def("ended", &PyChannel::ended, "unique"_a)
        .def("request", &PyChannel::request, "unique"_a)
        .def("__len__", &PyChannel::size)
        .def("serve_from", &PyChannel::serve_from, "caches"_a)
        .def("serve_metadata", &PyChannel::serve_metadata, "inodes"_a)
        .def("add_handle", &PyChannel::add_handle, "fh"_a, "handle"_a)
        .def("remove_handle", &PyChannel::remove_handle, "fh"_a)
        .def_prop_ro("syncing", &PyChannel::syncing)
        .def("opcodes", &PyChannel::opcodes)
        .def("source_reads", &PyChannel::source_reads)
        .def_prop_ro("polled", &PyChannel::polled)
        .def_prop_ro("slept", &PyChannel::slept)
        .def_prop_ro("served", &PyChannel::served)
        .def_prop_ro("writes_served", &PyChannel::writes_served)
        .def_prop_ro("read_bytes", &PyChannel::read_bytes)
        .def_prop_ro("write_bytes", &PyChannel::write_bytes)
        .def("histograms", &PyChannel::histograms);
}
