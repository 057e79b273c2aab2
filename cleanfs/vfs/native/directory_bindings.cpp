#include "directory_bindings.hpp"

#include <nanobind/stl/shared_ptr.h>

#include <algorithm>
#include <limits>

#include "directory_state.hpp"

namespace cleanfs {

namespace nb = nanobind;
using namespace nb::literals;

namespace {

nb::bytes name_at(const Names& names, std::size_t position) {
    if (position >= names.size()) throw nb::index_error();
    const std::string_view name = names[position];
    return nb::bytes(name.data(), name.size());
}

nb::list some(const Names& names, std::size_t position, std::size_t count) {
    nb::list found;
    const std::size_t stop = position + std::min(count, names.size() - std::min(position, names.size()));
    for (std::size_t at = position; at < stop; ++at) found.append(name_at(names, at));
    return found;
}

void pack(Names& names, nb::sequence all) {
    std::size_t size = 0;
    for (const nb::handle name : all) size += nb::cast<nb::bytes>(name).size() + 1;
    if (size > std::numeric_limits<std::uint32_t>::max()) throw nb::value_error("too many names");
    for (const nb::handle name : all) {
        const auto bytes = nb::cast<nb::bytes>(name);
        names.push_back({bytes.c_str(), bytes.size()});
    }
    names.shrink_to_fit();
}

}  // namespace

void bind_directory_state(nb::module_& module) {
    nb::class_<Names>(module, "Names", "cleanfs.source.listing.Names.")
        .def(nb::init<>())
        .def("__init__", [](Names* self, nb::sequence names) { pack(*new (self) Names, names); }, "names"_a)
        .def("__len__", &Names::size)
        .def("__getitem__", &name_at, "position"_a)
        .def("some", &some, "position"_a, "count"_a)
        .def_prop_ro("memory", &Names::memory);
    nb::class_<DirectoryState>(module, "DirectoryState", "cleanfs.vfs.directory_state.DirectoryState.")
        .def("__init__",
             [](DirectoryState* self, int fd) {
                 new (self) DirectoryState;
                 self->fd = fd;
             },
             "fd"_a)
        .def_ro("fd", &DirectoryState::fd)
        .def_prop_rw("names", [](const DirectoryState& state) { return std::const_pointer_cast<Names>(state.names); },
                     [](DirectoryState& state, std::shared_ptr<Names> names) { state.names = std::move(names); })
        .def_rw("rewinding", &DirectoryState::rewinding);
}

}  // namespace cleanfs
