// The Python module: the page cache's resident pages, and the state that the FUSE channel reads.
#include <nanobind/nanobind.h>

#include "bind_state.hpp"
#include "directory_bindings.hpp"
#include "inode_bindings.hpp"
#include "pages.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using cleanfs::Pages;

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
    cleanfs::bind_state(module);
    cleanfs::bind_inode_states(module);
    cleanfs::bind_directory_state(module);
}
