// The state of files and caches for Python (cleanfs.cache.state).
#include "bind_state.hpp"

#include <thread>

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "pages.hpp"
#include "state.hpp"
#include "to_python.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace cleanfs {

namespace {

FileState make_file_state(std::uint64_t serial, nb::tuple key) {
    FileState file;
    file.serial = serial;
    file.device = nb::cast<std::uint64_t>(key[0]);
    file.inode = nb::cast<std::uint64_t>(key[1]);
    const auto generation = nb::cast<nb::bytes>(key[2]);
    file.generation.assign(generation.c_str(), generation.size());
    return file;
}

// CacheState with what it refers to in Python. The method that reclaims belongs to an object that refers back to this one.
struct PyCacheState : CacheState {
    Pages* pages = nullptr;
    nb::object reclaim = nb::none();

    static int traverse(PyObject* self, visitproc visit, void* arg) {
        Py_VISIT(Py_TYPE(self));
        if (nb::inst_ready(self)) Py_VISIT(nb::inst_ptr<PyCacheState>(self)->reclaim.ptr());
        return 0;
    }
    static int clear(PyObject* self) {
        nb::inst_ptr<PyCacheState>(self)->reclaim = nb::none();
        return 0;
    }
    static inline PyType_Slot slots[] = {
        {Py_tp_traverse, reinterpret_cast<void*>(&traverse)},
        {Py_tp_clear, reinterpret_cast<void*>(&clear)},
        {0, nullptr},
    };
};

nb::object to_python(const std::optional<Stream::Span>& span) {
    return span ? nb::object(nb::make_tuple(span->offset, span->length)) : nb::none();
}

void use_resident(PyCacheState& caches, Pages* pages, nb::object reclaim) {
    caches.pages = pages;
    caches.reclaim = std::move(reclaim);
    caches.resident = pages == nullptr ? nullptr : &pages->resident();
    caches.discard = [](Resident* resident, Resident::Serial file, PageIndex first, PageIndex stop) noexcept {
        if (resident == nullptr || !resident->knows(file)) return;
        nb::gil_scoped_acquire locked;
        resident->discard(file, first, stop);
    };
    caches.insert = [](CacheState& state, const FileState& file, PageIndex first, const std::byte* data, std::size_t size) noexcept {
        auto& all = static_cast<PyCacheState&>(state);
        nb::gil_scoped_acquire locked;
        all.pages->insert_bytes(file.serial, first, reinterpret_cast<const char*>(data), size);
        if (all.resident->size() <= all.limit_pages) return;
        try {
            all.reclaim();
        } catch (nb::python_error& error) {
            error.discard_as_unraisable("the page cache's reclaim");
        }
    };
    caches.page_bytes = [](Resident::Page page) { return data_of(static_cast<PyObject*>(page)); };
}

void use_backend(PyCacheState& caches, nb::object fast_ops) {
    caches.backend = nullptr;
    while (caches.decoding > 0) std::this_thread::yield();  // for some microseconds, which need no lock of ours
    if (fast_ops.is_none()) return;
    const void* found = PyCapsule_GetPointer(fast_ops.ptr(), zcache::FastOps::capsule);
    if (found == nullptr) throw nb::python_error();
    caches.backend = static_cast<const zcache::FastOps*>(found);
}

void use_evictions(PyCacheState& caches, nb::object evictions) {
    caches.evictions = nullptr;
    if (evictions.is_none()) return;
    const void* found = PyCapsule_GetPointer(evictions.ptr(), Evictions::capsule);
    if (found == nullptr) throw nb::python_error();
    caches.evictions = static_cast<const Evictions*>(found);
}

}  // namespace

void bind_state(nb::module_& module) {
    nb::class_<FileState>(module, "FileState", "cleanfs.cache.state.FileState.")
        .def("__init__", [](FileState* self, std::uint64_t serial, nb::tuple key) { new (self) FileState(make_file_state(serial, key)); },
             "serial"_a, "key"_a)
        .def_ro("serial", &FileState::serial)
        .def_rw("size", &FileState::size)
        .def_prop_rw("stamps", [](const FileState& file) { return to_python(file.stamps); },
                     [](FileState& file, nb::object stamps) { file.stamps = to_stamps(stamps); }, nb::arg().none())
        .def_rw("racy", &FileState::racy)
        .def_rw("version", &FileState::version)
        .def_rw("mutations", &FileState::mutations)
        .def_rw("pending_writes", &FileState::pending_writes)
        .def_rw("reads_in_flight", &FileState::reads_in_flight)
        .def_rw("remembers_reads", &FileState::remembers_reads)
        .def_rw("forgotten", &FileState::forgotten)
        .def_rw("pins", &FileState::pins)
        .def_rw("handles", &FileState::handles)
        .def_rw("drops_due", &FileState::drops_due)
        .def_rw("used", &FileState::used)
        .def_rw("evictions_after", &FileState::evictions_after);

    nb::class_<KernelState>(module, "KernelState", "cleanfs.cache.state.KernelState.")
        .def(nb::init<>())
        .def_prop_rw("sent", [](const KernelState& kernel) { return to_python(kernel.sent); },
                     [](KernelState& kernel, nb::object stamps) { kernel.sent = to_stamps(stamps); }, nb::arg().none())
        .def_rw("size", &KernelState::size)
        .def_rw("dropped_for", &KernelState::dropped_for)
        .def_rw("pages_dropped_by", &KernelState::pages_dropped_by);

    nb::class_<InlineState>(module, "InlineState", "cleanfs.cache.state.InlineState.")
        .def(nb::init<>())
        .def_rw("inline", &InlineState::inline_calls)
        .def_rw("returned_at", &InlineState::returned_at)
        .def_rw("waited_seconds", &InlineState::waited_seconds);

    nb::class_<NowaitState>(module, "NowaitState", "cleanfs.cache.state.NowaitState.")
        .def(nb::init<>())
        .def_rw("nowait", &NowaitState::nowait)
        .def_rw("dontcache", &NowaitState::dontcache)
        .def_rw("refused", &NowaitState::refused);

    nb::class_<Stream>(module, "Stream", "cleanfs.source.drop_behind.Stream.")
        .def(nb::init<>())
        .def("lingers", &Stream::lingers, "offset"_a, "size"_a, "file_size"_a)
        .def("passed", [](Stream& stream, std::int64_t offset, std::int64_t size) { return to_python(stream.passed(offset, size)); },
             "offset"_a, "size"_a)
        .def("rest", [](const Stream& stream) { return to_python(stream.rest()); });

    nb::class_<HandleState>(module, "HandleState", "cleanfs.cache.state.HandleState.")
        .def("__init__", [](HandleState* self, FileState* file, KernelState* kernel, int fd) {
                 static std::uint64_t last_serial = 0;
                 new (self) HandleState;
                 self->serial = ++last_serial;
                 self->file = file;
                 self->kernel = kernel;
                 self->fd = fd;
             },
             "file"_a, "kernel"_a, "fd"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
        .def("write_inline", [](HandleState& handle, InlineState* writes) { handle.writes = writes; }, "writes"_a, nb::keep_alive<1, 2>())
        .def("read_inline", [](HandleState& handle, InlineState* reads, NowaitState* nowait, Stream* stream) {
                 handle.reads = reads;
                 handle.nowait = nowait;
                 handle.stream = stream;
             },
             "reads"_a, "nowait"_a, "stream"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>())
        .def_ro("serial", &HandleState::serial)
        .def_rw("drop_due", &HandleState::drop_due)
        .def_rw("nowait_tried_at", &HandleState::nowait_tried_at);

    nb::class_<CacheState>(module, "NativeCaches");

    nb::class_<PyCacheState, CacheState>(module, "CacheState", "cleanfs.cache.state.CacheState.", nb::type_slots(PyCacheState::slots))
        .def("__init__", [](PyCacheState* self, std::size_t page_size) {
                 new (self) PyCacheState;
                 self->page_size = page_size;
             }, "page_size"_a)
        .def_prop_ro_static("native", [](nb::handle) { return true; })
        .def("use_resident", &use_resident, "pages"_a.none(), "reclaim"_a.none(), nb::keep_alive<1, 2>())
        .def("use_backend", &use_backend, "fast_ops"_a.none())
        .def("use_evictions", &use_evictions, "evictions"_a.none())
        .def_prop_ro("takes_evictions", &CacheState::takes_evictions)
        .def("drain_evictions", [](const PyCacheState& caches) { return caches.drain_evictions(); })
        .def("opener_ran", [](const PyCacheState& caches, HandleState& handle) { caches.opener_ran(handle); }, "handle"_a)
        .def("new_version", [](PyCacheState& caches, FileState& file) { caches.new_version(file); }, "file"_a)
        .def_ro("page_size", &CacheState::page_size)
        .def_rw("pool_id", &CacheState::pool_id)
        .def_rw("clock", &CacheState::clock)
        .def_rw("shared", &CacheState::shared)
        .def_rw("drop_behind", &CacheState::drop_behind)
        .def_rw("limit_pages", &CacheState::limit_pages)
        .def_ro("flushes", &CacheState::flushes)
        .def_ro("failed_gets", &CacheState::failed_gets)
        .def_ro("hits", &CacheState::hits)
        .def_ro("misses", &CacheState::misses)
        .def_ro("succ_gets", &CacheState::succ_gets)
        .def_ro("puts", &CacheState::puts);
}

}  // namespace cleanfs
