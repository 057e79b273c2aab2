// The resident pages for Python: cleanfs.cache.resident.Resident, with bytes objects as pages.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "resident.hpp"

namespace cleanfs {

namespace nb = nanobind;

inline void release(void* page) { Py_DECREF(static_cast<PyObject*>(page)); }

inline std::size_t size_of(const PyObject* page) { return static_cast<std::size_t>(Py_SIZE(page)); }

inline char* data_of(PyObject* page) { return PyBytes_AS_STRING(page); }

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
    static constexpr std::size_t max_count = std::size_t{1} << 24;
    // The bound of a page index (resident.INDEX_BITS): more than any file has pages, less than the trees hold.
    static constexpr PageIndex end_of_file = PageIndex{1} << 52;
    static constexpr std::size_t max_page_size = std::size_t{1} << 30;

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

}  // namespace cleanfs
