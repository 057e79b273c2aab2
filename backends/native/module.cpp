// The Python module: cleanfs.backends.ops.Backend over the engine, with bytes objects as pages.
//
// The token of a loan is the address of the very bytes object that was handed out. The loan holds a
// reference to it, so no other page can have that address while the loan lasts.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <malloc.h>

#include <string>
#include <vector>

#include "fast_ops.hpp"
#include "zcache.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using zcache::FileKey;
using zcache::PageIndex;
using zcache::Token;

// A get into a caller's buffer releases the GIL from this many bytes on. Releasing and retaking it costs
// nothing if no other thread wants it, but 5 ms (sys.getswitchinterval()) if another thread computes. So it
// pays only for a get that takes longer (docs/zcache.md).
constexpr std::size_t release_gil_bytes = std::size_t{16} << 20;

constexpr std::size_t max_borrowed = 65536;

constexpr std::size_t max_count = std::size_t{1} << 52;

Token token_of(PyObject* page) { return reinterpret_cast<Token>(page); }

// cleanfs.backends.ops.FileKey, borrowed from the tuple. Raises if it is anything else.
FileKey parse_key(nb::handle key) {
    PyObject* tuple = key.ptr();
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 3 || !PyBytes_Check(PyTuple_GET_ITEM(tuple, 2))) {
        throw nb::type_error("a file key is (device, inode, generation)");
    }
    FileKey parsed;
    parsed.device = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(tuple, 0));
    if (PyErr_Occurred() == nullptr) parsed.inode = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(tuple, 1));
    if (PyErr_Occurred() != nullptr) throw nb::python_error();
    PyObject* generation = PyTuple_GET_ITEM(tuple, 2);
    parsed.generation = {PyBytes_AS_STRING(generation), static_cast<std::size_t>(PyBytes_GET_SIZE(generation))};
    return parsed;
}

zcache::Uuid parse_uuid(nb::handle uuid) {
    auto bytes = nb::cast<nb::bytes>(uuid.attr("bytes"));
    zcache::Uuid parsed;
    if (bytes.size() != parsed.size()) throw nb::type_error("a UUID has 16 bytes");
    std::memcpy(parsed.data(), bytes.c_str(), parsed.size());
    return parsed;
}

// Fills a list with bytes objects, and None for each page not found.
class ListSink final : public zcache::Sink {
public:
    ListSink(std::size_t count, std::size_t page_size)
        : list_(nb::steal<nb::list>(PyList_New(static_cast<Py_ssize_t>(count)))), page_size_(page_size) {
        if (!list_.is_valid()) throw nb::python_error();
        for (std::size_t at = 0; at < count; ++at) set(at, Py_NewRef(Py_None));
    }

    std::byte* page(std::size_t at) override {
        PyObject* page = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(page_size_));
        if (page == nullptr) {
            PyErr_Clear();
            return nullptr;
        }
        Py_DECREF(Py_None);
        set(at, page);
        return reinterpret_cast<std::byte*>(PyBytes_AS_STRING(page));
    }

    Token token(std::size_t at) override {
        return token_of(Py_NewRef(PyList_GET_ITEM(list_.ptr(), static_cast<Py_ssize_t>(at))));
    }

    void cancel(std::size_t at) override {
        PyObject* page = PyList_GET_ITEM(list_.ptr(), static_cast<Py_ssize_t>(at));
        set(at, Py_NewRef(Py_None));
        Py_DECREF(page);
    }

    nb::list list() { return std::move(list_); }

private:
    void set(std::size_t at, PyObject* page) { PyList_SET_ITEM(list_.ptr(), static_cast<Py_ssize_t>(at), page); }

    nb::list list_;
    const std::size_t page_size_;
};

// Fills a buffer, and a map with one byte per page: 1 if the page was found.
class BufferSink final : public zcache::Sink {
public:
    BufferSink(std::byte* buffer, std::byte* found, std::size_t page_size)
        : buffer_(buffer), found_(found), page_size_(page_size) {}

    std::byte* page(std::size_t at) override {
        found_[at] = std::byte{1};
        return buffer_ + at * page_size_;
    }
    void cancel(std::size_t at) override { found_[at] = std::byte{0}; }

private:
    std::byte* buffer_;
    std::byte* found_;
    const std::size_t page_size_;
};

struct WritableBuffer {
    Py_buffer view{};
    explicit WritableBuffer(nb::handle object) {
        if (PyObject_GetBuffer(object.ptr(), &view, PyBUF_WRITABLE) != 0) throw nb::python_error();
    }
    ~WritableBuffer() { PyBuffer_Release(&view); }
    WritableBuffer(const WritableBuffer&) = delete;
    WritableBuffer& operator=(const WritableBuffer&) = delete;
};

class Backend {
public:
    explicit Backend(const zcache::Options& options) : engine_(options) {
        fast_ops_.engine = &engine_;
        fast_ops_.borrow = [](void* engine, int pool, const FileKey& key, PageIndex first, std::size_t count, std::byte* to) {
            return attempt([&] { return static_cast<zcache::Zcache*>(engine)->borrow(pool, key, first, count, to); });
        };
        fast_ops_.copy_out = [](void* engine, int pool, const FileKey& key, PageIndex first, std::size_t count, zcache::StoredPages& to) {
            return attempt([&] { return static_cast<zcache::Zcache*>(engine)->copy_out(pool, key, first, count, to); });
        };
        fast_ops_.decode = [](void* engine, zcache::StoredPages& pages, std::byte* to) {
            return attempt([&] { return static_cast<zcache::Zcache*>(engine)->decode(pages, to); });
        };
        fast_ops_.missing = [](void* engine, int pool, const FileKey& key, PageIndex first, std::size_t count) {
            std::size_t missing = 0;
            attempt([&] {
                missing = static_cast<zcache::Zcache*>(engine)->missing(pool, key, first, count);
                return true;
            });
            return missing;
        };
        fast_ops_.flush = [](void* engine, int pool, const FileKey& key, PageIndex first, PageIndex stop) {
            return attempt([&] {
                static_cast<zcache::Zcache*>(engine)->flush_pages(pool, key, first, stop);
                return true;
            });
        };
        fast_ops_.put = [](void* engine, int pool, const FileKey& key, PageIndex index, const std::byte* page) {
            return attempt([&] {
                const zcache::Put put{index, page};
                static_cast<zcache::Zcache*>(engine)->put(pool, key, {&put, 1});
                return true;
            });
        };
    }

    ~Backend() {
        engine_.end_loans();
        collect();
    }

    int init_fs(nb::int_ page_size) { return engine_.init_fs(size_or_0(page_size)); }
    int init_shared_fs(nb::handle uuid, nb::int_ page_size) {
        return engine_.init_shared_fs(parse_uuid(uuid), size_or_0(page_size));
    }

    void flush_fs(int pool) {
        engine_.flush_fs(pool);
        collect();
    }

    nb::list get_pages(int pool, nb::handle key, PageIndex first, std::size_t count) {
        if (count > max_count) throw nb::value_error("the count of pages must be at most 2**52");
        ListSink sink(count, engine_.page_size(pool));
        engine_.get(pool, parse_key(key), first, count, sink);
        collect();
        return sink.list();
    }

    nb::object get_page(int pool, nb::handle key, PageIndex index) {
        return get_pages(pool, key, index, 1)[0];
    }

    nb::bytes get_pages_into(int pool, nb::handle key, PageIndex first, nb::handle buffer) {
        std::size_t page_size = engine_.page_size(pool);
        WritableBuffer into(buffer);
        auto size = static_cast<std::size_t>(into.view.len);
        if (size % page_size != 0) {
            throw nb::value_error(("the buffer is not a whole number of pages of " + std::to_string(page_size) + " bytes").c_str());
        }
        std::string found(size / page_size, '\0');
        BufferSink sink(static_cast<std::byte*>(into.view.buf), reinterpret_cast<std::byte*>(found.data()), page_size);
        FileKey parsed = parse_key(key);
        if (size >= release_gil_bytes) {
            nb::gil_scoped_release released;
            engine_.get(pool, parsed, first, found.size(), sink);
        } else {
            engine_.get(pool, parsed, first, found.size(), sink);
        }
        collect();
        return nb::bytes(found.data(), found.size());
    }

    nb::object borrow_pages(int pool, nb::handle key, PageIndex first, std::size_t count) {
        if (count > max_borrowed) throw nb::value_error("at most 65536 pages can be borrowed at once");
        std::size_t size = count * engine_.page_size(pool);
        nb::object pages = nb::steal(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size)));
        if (!pages.is_valid()) throw nb::python_error();
        bool found = engine_.borrow(pool, parse_key(key), first, count, reinterpret_cast<std::byte*>(PyBytes_AS_STRING(pages.ptr())));
        return found ? pages : nb::none();
    }

    nb::capsule fast_ops() { return nb::capsule(&fast_ops_, zcache::FastOps::capsule); }

    void put_page(int pool, nb::handle key, PageIndex index, nb::bytes page) {
        zcache::Put put = parse_put(index, page.ptr(), engine_.page_size(pool));
        engine_.put(pool, parse_key(key), {&put, 1});
        collect();
    }

    void put_pages(int pool, nb::handle key, nb::sequence pages) {
        auto fast = nb::steal<nb::object>(PySequence_Fast(pages.ptr(), "pages are a sequence of (index, page)"));
        if (!fast.is_valid()) throw nb::python_error();
        std::size_t page_size = engine_.page_size(pool);
        auto count = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(fast.ptr()));
        std::vector<zcache::Put> puts;
        puts.reserve(count);
        for (std::size_t at = 0; at < count; ++at) {
            PyObject* pair = PySequence_Fast_GET_ITEM(fast.ptr(), static_cast<Py_ssize_t>(at));
            if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2) throw nb::type_error("pages are put as tuples (index, page)");
            PageIndex index = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(pair, 0));
            if (PyErr_Occurred() != nullptr) throw_bad_index();
            puts.push_back(parse_put(index, PyTuple_GET_ITEM(pair, 1), page_size));
        }
        engine_.put(pool, parse_key(key), puts);
        collect();
    }

    void flush_page(int pool, nb::handle key, PageIndex index) { flush_range(pool, key, index, index + 1); }

    void flush_pages(int pool, nb::handle key, PageIndex start, nb::object stop) {
        flush_range(pool, key, start, stop.is_none() ? ~PageIndex{0} : nb::cast<PageIndex>(stop));
    }

    void flush_inode(int pool, nb::handle key) {
        engine_.flush_inode(pool, parse_key(key));
        collect();
    }

    std::size_t pool_limit() const { return engine_.pool_limit(); }

    void resize(nb::int_ pool_limit) {
        std::size_t limit = size_or_0(pool_limit);
        {
            nb::gil_scoped_release released;
            engine_.resize(limit);
        }
        collect();
        nb::gil_scoped_release released;
        malloc_trim(0);  // the pages that were on loan may leave malloc much free memory
    }

    // The number, or 0, which is refused everywhere, if it is negative or has more than 64 bits.
    static std::size_t size_or_0(nb::int_ number) {
        std::size_t size = 0;
        return nb::try_cast(number, size) ? size : 0;
    }

    nb::dict counters() const {
        nb::dict counts;
        for (const auto& [name, value] : engine_.counters()) counts[name.c_str()] = value;
        return counts;
    }

    void sync() {
        nb::gil_scoped_release released;
        engine_.sync();
    }

    void check() const {
        try {
            engine_.check();
        } catch (const std::logic_error& error) {
            throw std::runtime_error(error.what());
        }
    }

private:
    template <class Call>
    static bool attempt(Call&& call) {
        try {
            return call();
        } catch (const std::exception&) {
            return false;
        }
    }

    [[noreturn]] static void throw_bad_index() {
        PyErr_Clear();
        throw nb::value_error("a page index is >= 0");
    }

    static zcache::Put parse_put(PageIndex index, PyObject* page, std::size_t page_size) {
        if (!PyBytes_Check(page)) throw nb::type_error("a page is bytes");
        if (static_cast<std::size_t>(PyBytes_GET_SIZE(page)) != page_size) {
            throw nb::value_error(("a page of this pool is " + std::to_string(page_size) + " bytes").c_str());
        }
        return {index, reinterpret_cast<const std::byte*>(PyBytes_AS_STRING(page)), token_of(page)};
    }

    void flush_range(int pool, nb::handle key, PageIndex start, PageIndex stop) {
        engine_.flush_pages(pool, parse_key(key), start, stop);
        collect();
    }

    // Drop the references that ended loans held.
    void collect() {
        engine_.take_returned(returned_);
        for (Token token : returned_) Py_DECREF(reinterpret_cast<PyObject*>(token));
    }

    zcache::Zcache engine_;
    zcache::FastOps fast_ops_;
    std::vector<Token> returned_;
};

zcache::Options parse_options(std::size_t pool_limit, const std::string& method, int level, bool dictionary,
                              const std::string& allocator, bool keep_poor, bool was_active, bool checksum) {
    zcache::Options options;
    options.pool_limit = pool_limit;
    options.codec.level = level;
    options.codec.dictionary = dictionary;
    options.keep_poor = keep_poor;
    options.was_active = was_active;
    options.checksum = checksum;
    if (method == "none") options.codec.method = zcache::Method::none;
    else if (method == "lz4") options.codec.method = zcache::Method::lz4;
    else if (method == "lz4hc") options.codec.method = zcache::Method::lz4hc;
    else if (method == "zstd") options.codec.method = zcache::Method::zstd;
    else throw nb::value_error(("unknown compression method " + method).c_str());
    if (allocator == "log") options.allocator = zcache::AllocatorKind::log;
    else if (allocator == "zbud") options.allocator = zcache::AllocatorKind::zbud;
    else throw nb::value_error(("unknown allocator " + allocator).c_str());
    return options;
}

}  // namespace

NB_MODULE(_zcache, module) {
    module.doc() = "zcache's native engine.";
    nb::set_leak_warnings(false);  // a process may end while it has an engine
    nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
        try {
            std::rethrow_exception(thrown);
        } catch (const zcache::UnknownPool& error) {
            PyErr_SetString(PyExc_KeyError, error.what());
        } catch (const std::logic_error& error) {
            // std::out_of_range or std::invalid_argument: a wrong argument either way.
            PyErr_SetString(PyExc_ValueError, error.what());
        }
    });

    nb::class_<Backend>(module, "Engine", "The cleancache contract over compressed RAM (cleanfs.backends.ops.Backend).")
        .def("__init__",
             [](Backend* self, nb::int_ pool_limit, const std::string& method, int level, bool dictionary,
                const std::string& allocator, bool keep_poor, bool was_active, bool checksum) {
                 new (self) Backend(parse_options(Backend::size_or_0(pool_limit), method, level, dictionary, allocator, keep_poor,
                                                  was_active, checksum));
             },
             "pool_limit"_a, nb::kw_only(), "method"_a = "lz4", "level"_a = 1, "dictionary"_a = false,
             "allocator"_a = "log", "keep_poor"_a = true, "was_active"_a = false, "checksum"_a = false)
        .def_prop_ro("name", [](const Backend&) { return "zcache"; })
        .def_prop_ro("engine", [](const Backend&) { return "native"; })
        .def("init_fs", &Backend::init_fs, "page_size"_a)
        .def("init_shared_fs", &Backend::init_shared_fs, "uuid"_a, "page_size"_a)
        .def("flush_fs", &Backend::flush_fs, "pool_id"_a)
        .def("get_page", &Backend::get_page, "pool_id"_a, "key"_a, "index"_a)
        .def("get_pages", &Backend::get_pages, "pool_id"_a, "key"_a, "first"_a, "count"_a)
        .def("get_pages_into", &Backend::get_pages_into, "pool_id"_a, "key"_a, "first"_a, "buffer"_a)
        .def("borrow_pages", &Backend::borrow_pages, "pool_id"_a, "key"_a, "first"_a, "count"_a)
        .def("fast_ops", &Backend::fast_ops)
        .def("put_page", &Backend::put_page, "pool_id"_a, "key"_a, "index"_a, "page"_a)
        .def("put_pages", &Backend::put_pages, "pool_id"_a, "key"_a, "pages"_a)
        .def("flush_page", &Backend::flush_page, "pool_id"_a, "key"_a, "index"_a)
        .def("flush_pages", &Backend::flush_pages, "pool_id"_a, "key"_a, "start"_a, "stop"_a.none())
        .def("flush_inode", &Backend::flush_inode, "pool_id"_a, "key"_a)
        .def_prop_ro("pool_limit", &Backend::pool_limit)
        .def("resize", &Backend::resize, "pool_limit"_a)
        .def("counters", &Backend::counters)
        .def("sync", &Backend::sync)
        .def("check", &Backend::check);
}
