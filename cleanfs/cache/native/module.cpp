// The Python module: implements cleanfs.cache.resident.Resident, with bytes objects as pages, and the state that the
// FUSE channel reads (cleanfs.cache.state).
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "inode_bindings.hpp"
#include "resident.hpp"
#include "state.hpp"
#include "to_python.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using cleanfs::CacheState;
using cleanfs::FileState;
using cleanfs::HandleState;
using cleanfs::PageIndex;
using cleanfs::InlineState;
using cleanfs::KernelState;
using cleanfs::NowaitState;
using cleanfs::Resident;
using cleanfs::Stream;
using cleanfs::to_python;
using cleanfs::to_stamps;

constexpr std::size_t max_count = std::size_t{1} << 24;
// The bound of a page index (resident.INDEX_BITS): more than any file has pages, less than the trees hold.
constexpr PageIndex end_of_file = PageIndex{1} << 52;
constexpr std::size_t max_page_size = std::size_t{1} << 30;

void release(void* page) { Py_DECREF(static_cast<PyObject*>(page)); }

std::size_t size_of(const PyObject* page) { return static_cast<std::size_t>(Py_SIZE(page)); }

char* data_of(PyObject* page) { return PyBytes_AS_STRING(page); }

class Pages {
public:
    explicit Pages(std::size_t page_size) : page_size_(page_size), resident_(release) {
        if (page_size == 0 || page_size > max_page_size) throw nb::value_error("not a page size");
    }

    std::size_t size() const { return resident_.size(); }
    std::uint64_t refaults() const { return resident_.refaults(); }
    std::uint64_t activations() const { return resident_.activations(); }

    nb::object look_up(std::uint64_t file, PageIndex first, std::size_t count, std::size_t start, std::size_t stop) {
        if (count > max_count || start > stop || stop > count * page_size_) throw nb::value_error("not a range of these pages");
        found_.resize(count);
        if (resident_.look_up(file, first, count, found_.data()) > 0) return list_of_found();
        if (count == 1 && stop - start == page_size_) return nb::borrow(static_cast<PyObject*>(found_[0]));
        nb::object reply = nb::steal(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(stop - start)));
        if (!reply.is_valid()) throw nb::python_error();
        char* to = data_of(reply.ptr());
        for (std::size_t at = start; at < stop;) {
            std::size_t within = at % page_size_, length = std::min(page_size_ - within, stop - at);
            std::memcpy(to, data_of(static_cast<PyObject*>(found_[at / page_size_])) + within, length);
            to += length;
            at += length;
        }
        return reply;
    }

    void insert(std::uint64_t file, PageIndex first, nb::list pages) {
        check_range(first, pages.size());
        for (std::size_t at = 0; at < pages.size(); ++at) {
            PyObject* page = PyList_GET_ITEM(pages.ptr(), static_cast<Py_ssize_t>(at));
            if (page == Py_None) continue;
            if (!PyBytes_Check(page) || size_of(page) != page_size_) throw nb::value_error("not a page");
            if (resident_.insert(file, first + at, page)) Py_INCREF(page);
        }
    }

    void insert_data(std::uint64_t file, PageIndex first, nb::handle data) {
        Py_buffer view;
        if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_CONTIG_RO) != 0) throw nb::python_error();
        auto size = static_cast<std::size_t>(view.len);
        const bool fits = is_range(first, size / page_size_ + (size % page_size_ != 0));
        if (fits) insert_bytes(file, first, static_cast<const char*>(view.buf), size);
        PyBuffer_Release(&view);
        if (!fits) throw nb::value_error("not a range of pages");
    }

    // With the GIL.
    void insert_bytes(std::uint64_t file, PageIndex first, const char* from, std::size_t size) {
        for (std::size_t at = 0; at < size; at += page_size_, ++first) {
            PyObject* page = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(page_size_));
            if (page == nullptr) {
                PyErr_Clear();  // a cache may have fewer pages
                break;
            }
            std::size_t length = std::min(page_size_, size - at);
            std::memcpy(data_of(page), from + at, length);
            std::memset(data_of(page) + length, 0, page_size_ - length);
            if (!resident_.insert(file, first, page)) Py_DECREF(page);
        }
    }

    // [(file, [(index, page), ...]), ...]
    nb::list evict(std::size_t count) {
        std::vector<Resident::Victim> victims = resident_.evict(count);
        nb::list runs;
        for (std::size_t at = 0; at < victims.size();) {
            std::uint64_t file = victims[at].file;
            std::size_t stop = at + 1;
            while (stop < victims.size() && victims[stop].file == file) ++stop;
            nb::list pages = nb::steal<nb::list>(PyList_New(static_cast<Py_ssize_t>(stop - at)));
            if (!pages.is_valid()) throw nb::python_error();
            for (Py_ssize_t to = 0; at < stop; ++at, ++to) {
                nb::object page = nb::steal(static_cast<PyObject*>(victims[at].page));
                PyList_SET_ITEM(pages.ptr(), to, nb::make_tuple(victims[at].index, page).release().ptr());
            }
            runs.append(nb::make_tuple(file, pages));
        }
        return runs;
    }

    void discard(std::uint64_t file, PageIndex first, nb::object stop) {
        resident_.discard(file, first, stop.is_none() ? ~PageIndex{0} : nb::cast<PageIndex>(stop));
    }

    nb::list indices(std::uint64_t file) const {
        nb::list found;
        resident_.for_each(file, [&](PageIndex index) { found.append(index); });
        return found;
    }

    Resident& resident() { return resident_; }

    void check() const {
        try {
            resident_.check();
        } catch (const std::logic_error& error) {
            throw std::runtime_error(error.what());
        }
    }

private:
    static bool is_range(PageIndex first, std::size_t count) {
        return first <= end_of_file && count <= end_of_file - first;
    }

    static void check_range(PageIndex first, std::size_t count) {
        if (!is_range(first, count)) throw nb::value_error("not a range of pages");
    }

    nb::object list_of_found() const {
        nb::object list = nb::steal(PyList_New(static_cast<Py_ssize_t>(found_.size())));
        if (!list.is_valid()) throw nb::python_error();
        for (std::size_t at = 0; at < found_.size(); ++at) {
            PyObject* page = found_[at] == nullptr ? Py_None : static_cast<PyObject*>(found_[at]);
            PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(at), Py_NewRef(page));
        }
        return list;
    }

    const std::size_t page_size_;
    Resident resident_;
    std::vector<Resident::Page> found_;  // of the lookup under way
};

FileState make_file_state(std::uint64_t serial, nb::tuple key) {
    FileState file;
    file.serial = serial;
    file.device = nb::cast<std::uint64_t>(key[0]);
    file.inode = nb::cast<std::uint64_t>(key[1]);
    const auto generation = nb::cast<nb::bytes>(key[2]);
    file.generation.assign(generation.c_str(), generation.size());
    return file;
}

// CacheState with what it refers to in Python.
struct PyCacheState : CacheState {
    Pages* pages = nullptr;
    nb::object reclaim = nb::none();
};

nb::object to_python(const std::optional<Stream::Span>& span) {
    return span ? nb::object(nb::make_tuple(span->offset, span->length)) : nb::none();
}

void use_resident(PyCacheState& caches, Pages* pages, nb::object reclaim) {
    caches.pages = pages;
    caches.reclaim = std::move(reclaim);
    caches.resident = pages == nullptr ? nullptr : &pages->resident();
    caches.discard = [](Resident* resident, Resident::Serial file, PageIndex first, PageIndex stop) {
        if (resident == nullptr || !resident->knows(file)) return;
        nb::gil_scoped_acquire locked;
        resident->discard(file, first, stop);
    };
    caches.insert = [](CacheState& state, const FileState& file, PageIndex first, const std::byte* data, std::size_t size) {
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
    if (fast_ops.is_none()) return;
    const void* found = PyCapsule_GetPointer(fast_ops.ptr(), zcache::FastOps::capsule);
    if (found == nullptr) throw nb::python_error();
    caches.backend = static_cast<const zcache::FastOps*>(found);
}

}  // namespace

NB_MODULE(_pagecache, module) {
    module.doc() = "The page cache's resident pages, and the state of files and caches, natively.";
    nb::set_leak_warnings(false);  // a process may end while it has a page cache
    nb::class_<Pages>(module, "NativeResident", "cleanfs.cache.resident.Resident.")
        .def(nb::init<std::size_t>(), "page_size"_a)
        // 153 bytes were measured for the pages of large files, 287 where each file has one page.
        .def_prop_ro("overhead", [](const Pages&) { return 288; })
        .def("__len__", &Pages::size)
        .def_prop_ro("refaults", &Pages::refaults)
        .def_prop_ro("activations", &Pages::activations)
        .def("look_up", &Pages::look_up, "file"_a, "first"_a, "count"_a, "start"_a, "stop"_a)
        .def("insert", &Pages::insert, "file"_a, "first"_a, "pages"_a)
        .def("insert_data", &Pages::insert_data, "file"_a, "first"_a, "data"_a)
        .def("evict", &Pages::evict, "count"_a)
        .def("discard", &Pages::discard, "file"_a, "first"_a, "stop"_a.none())
        .def("indices", &Pages::indices, "file"_a)
        .def("check", &Pages::check);

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
        .def_rw("forgotten", &FileState::forgotten);
    nb::class_<KernelState>(module, "KernelState", "cleanfs.cache.state.KernelState.")
        .def(nb::init<>())
        .def_prop_rw("sent", [](const KernelState& kernel) { return to_python(kernel.sent); },
                     [](KernelState& kernel, nb::object stamps) { kernel.sent = to_stamps(stamps); }, nb::arg().none())
        .def_rw("size", &KernelState::size);
    cleanfs::bind_inode_states(module);
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
                 new (self) HandleState;
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
        .def_rw("drop_due", &HandleState::drop_due);
    nb::class_<CacheState>(module, "NativeCaches");
    nb::class_<PyCacheState, CacheState>(module, "CacheState", "cleanfs.cache.state.CacheState.")
        .def("__init__", [](PyCacheState* self, std::size_t page_size) {
                 new (self) PyCacheState;
                 self->page_size = page_size;
             }, "page_size"_a)
        .def_prop_ro_static("native", [](nb::handle) { return true; })
        .def("use_resident", &use_resident, "pages"_a.none(), "reclaim"_a.none(), nb::keep_alive<1, 2>())
        .def("use_backend", &use_backend, "fast_ops"_a.none())
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
