// The Python module: what cleanfs.fuse.channel calls, by name.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <system_error>

#include "busy_poll.hpp"
#include "histogram.hpp"
#include "py_channel.hpp"
#include "queues.hpp"
#include "raise_errno.hpp"
#include "requests.hpp"
#include "session.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using cleanfs::FastPath;
using cleanfs::Histogram;
using cleanfs::PyChannel;
using cleanfs::Request;
using cleanfs::Window;

// The counts of all buckets, and the sum in ns.
nb::tuple to_python(const Histogram& histogram) {
    nb::list counts;
    for (const std::uint64_t count : histogram.counts) counts.append(count);
    return nb::make_tuple(nb::tuple(counts), histogram.sum_ns);
}

// Those of reads from the page cache, cleancache and the source, and of writes.
nb::tuple histograms(PyChannel& channel) {
    const FastPath::Counters& counters = channel.fast_path().counters();
    return nb::make_tuple(to_python(counters.pagecache_hit), to_python(counters.cleancache_hit),
                          to_python(counters.source_read), to_python(counters.write));
}

// Reads of the source, and their bytes.
nb::tuple source_reads(PyChannel& channel) {
    const FastPath::Counters& counters = channel.fast_path().counters();
    return nb::make_tuple(counters.source_reads, counters.source_read_bytes);
}

// How many messages came, by opcode, without those of which none came.
nb::dict opcodes(PyChannel& channel) {
    nb::dict counts;
    for (std::size_t opcode = 0; const std::uint64_t count : channel.channel().opcodes()) {
        if (count > 0) counts[nb::int_(opcode)] = count;
        ++opcode;
    }
    return counts;
}

template <auto Field>
auto counter() {
    return [](PyChannel& channel) { return channel.fast_path().counters().*Field; };
}

template <auto Field>
auto header_field() {
    return [](const Request& request) { return request.header.*Field; };
}

void bind_for_tests(nb::module_& module) {
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
}

void bind_request(nb::module_& module) {
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
}

void bind_channel(nb::module_& module) {
    nb::class_<PyChannel>(module, "Channel")
        .def(nb::init<int, int, std::int64_t, nb::callable, nb::callable>(), "device"_a, "scheduler_fd"_a, "busy_poll_ns"_a, "init_reply"_a, "refused"_a)
        .def_prop_ro("device", [](PyChannel& channel) { return channel.channel().device(); })
        // Messages.
        .def("receive_now", &PyChannel::receive_now)
        .def("receive", &PyChannel::receive, "until_seconds"_a)
        .def("body", &PyChannel::body)
        .def("reply", &PyChannel::reply, "unique"_a, "error"_a, "body"_a = nb::bytes("", 0))
        .def("ended", &PyChannel::ended, "unique"_a)
        .def("request", &PyChannel::request, "unique"_a)
        .def("__len__", &PyChannel::in_progress)
        .def("direct_requests", &PyChannel::direct_requests)
        // libfuse's session.
        .def("attach", [](PyChannel& channel) { channel.session().attach(); })
        .def("close", [](PyChannel& channel) {
            channel.drop_queues();
            channel.session().detach();
        })
        .def("leave_to_libfuse", [](PyChannel& channel) { channel.session().leave_to_libfuse(); })
        // Queues of io_uring.
        .def("make_queues", [](PyChannel& channel) {
            try {
                channel.channel().make_queues();
            } catch (const std::system_error& error) {
                cleanfs::raise_errno(error.code().value());
            }
        })
        .def_prop_ro("queues", [](PyChannel& channel) {
            const auto& queues = channel.channel().queues();
            return queues && queues->started() ? queues->size() : 0;
        })
        // The fast path.
        .def("serve_from", [](PyChannel& channel, nb::object caches) { channel.fast_path().serve_from(std::move(caches)); }, "caches"_a)
        .def("serve_metadata", [](PyChannel& channel, nb::object inodes) { channel.fast_path().serve_metadata(std::move(inodes)); }, "inodes"_a)
        .def("add_handle",
             [](PyChannel& channel, std::uint64_t fh, nb::object handle) { channel.fast_path().add_handle(fh, std::move(handle)); },
             "fh"_a, "handle"_a)
        .def("remove_handle", [](PyChannel& channel, std::uint64_t fh) { channel.fast_path().remove_handle(fh); }, "fh"_a)
        .def("adopt_handle", [](PyChannel& channel, std::uint64_t fh) { return channel.fast_path().adopt_handle(fh); }, "fh"_a)
        .def_prop_ro("own_handles", [](PyChannel& channel) { return channel.fast_path().own_handles(); })
        .def("add_directory",
             [](PyChannel& channel, std::uint64_t fh, nb::object directory) { channel.fast_path().add_directory(fh, std::move(directory)); },
             "fh"_a, "directory"_a)
        .def("remove_directory", [](PyChannel& channel, std::uint64_t fh) { channel.fast_path().remove_directory(fh); }, "fh"_a)
        .def_prop_ro("own_writers", [](PyChannel& channel) { return channel.fast_path().own_writers(); })
        .def_prop_ro("syncing", &PyChannel::syncing)
        // Statistics.
        .def("opcodes", &opcodes)
        .def_prop_ro("window", [](PyChannel& channel) -> Window& { return channel.channel().window(); }, nb::rv_policy::reference_internal)
        .def_prop_ro("polled", [](PyChannel& channel) { return channel.channel().polled(); })
        .def_prop_ro("slept", [](PyChannel& channel) { return channel.channel().slept(); })
        .def_prop_ro("served", counter<&FastPath::Counters::served>())
        .def_prop_ro("writes_served", counter<&FastPath::Counters::writes>())
        .def_prop_ro("read_bytes", counter<&FastPath::Counters::read_bytes>())
        .def_prop_ro("write_bytes", counter<&FastPath::Counters::write_bytes>())
        .def("source_reads", &source_reads)
        .def("histograms", &histograms);
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
    bind_for_tests(module);
    bind_request(module);
    bind_channel(module);
}
