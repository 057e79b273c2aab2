// The Python module: the kernel's evictions (cleanfs.vfs.evictions).
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <sys/mman.h>

#include <cerrno>
#include <system_error>

#include "eviction_program.hpp"
#include "evicted_pages.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace cleanfs {

namespace {

// Have the kernel bring a file into its page cache, as a program does that reads a mapping.
void touch(int fd, std::size_t size) {
    const nb::gil_scoped_release unlocked;  // this process itself may have to serve the reads
    void* const mapped = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (mapped == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "cannot map a file of the mount");
    const volatile char* bytes = static_cast<const char*>(mapped);
    char sum = 0;
    for (std::size_t at = 0; at < size; at += EVICTION_PAGE_SIZE) sum = static_cast<char>(sum ^ bytes[at]);
    munmap(mapped, size);
}

// [(index, cause, direct_map, page or None)]: the records since the last call.
nb::list trial_pages(EvictionProgram& program) {
    nb::list pages;
    program.ring().consume(~std::size_t{0}, [&](const eviction& page, EvictionRing::Position) {
        const nb::object bytes = page.readable != 0 ? nb::object(nb::bytes(page.page, sizeof page.page)) : nb::none();
        pages.append(nb::make_tuple(page.index, page.cause, page.direct_map, bytes));
    });
    return pages;
}

nb::dict counts(const EvictionProgram& program) {
    const eviction_counts now = program.counts();
    nb::dict all;
    all["seen"] = now.seen;
    all["removed"] = now.removed;
    all["unclean"] = now.unclean;
    all["unreadable"] = now.unreadable;
    all["lost"] = now.lost;
    return all;
}

// EvictedPages with a ring of its own.
struct PyEvictedPages {
    PyEvictedPages(int fd, std::size_t size, const InodeStates& inodes, CacheState& caches) : ring(fd, size), pages(ring, inodes, caches) {}

    nb::dict counters() const {
        const EvictedPages::Counters& now = pages.counters();
        nb::dict all;
        all["put"] = now.put;
        all["kept"] = now.kept;
        all["stale"] = now.stale;
        all["unknown"] = now.unknown;
        all["past_end"] = now.past_end;
        all["refused"] = now.refused;
        all["ring_high_water"] = now.high_water;
        all["held_nodes"] = pages.held_nodes();
        return all;
    }

    EvictionRing ring;
    EvictedPages pages;
};

}  // namespace

}  // namespace cleanfs

NB_MODULE(_evictions, module) {
    using namespace cleanfs;
    module.doc() = "The kernel's evictions.";
    nb::module_::import_("cleanfs.cache._pagecache");  // the types of inodes and caches
    nb::set_leak_warnings(false);                      // a process may end while it has a mount
    nb::class_<EvictionProgram>(module, "EvictionProgram", "cleanfs.vfs.evictions.Program.")
        .def(nb::init<std::size_t>(), "ring_bytes"_a, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("fd", [](EvictionProgram& program) { return program.ring().fd(); })
        .def_prop_ro("ring_bytes", [](EvictionProgram& program) { return program.ring().size(); })
        .def("watch", &EvictionProgram::watch, "device"_a, "wake_bytes"_a)
        .def_static("touch", &touch, "fd"_a, "size"_a)
        .def("begin_trial",
             [](EvictionProgram& program, std::uint64_t inode, std::uint64_t mark) {
                 program.settings().trial_mark = mark;
                 program.settings().trial_inode = inode;
             },
             "inode"_a, "mark"_a)
        .def("seek",
             [](EvictionProgram& program, std::uint64_t base) {
                 program.settings().trial_base = base;
                 program.settings().seeks = 1;
             },
             "base"_a)
        .def("use_direct_map",
             [](EvictionProgram& program, std::uint64_t direct_map) {
                 program.settings().direct_map = direct_map;
                 program.settings().seeks = 0;
             },
             "direct_map"_a)
        .def("end_trial", [](EvictionProgram& program) { program.settings().trial_inode = 0; })
        .def("trial_pages", &trial_pages)
        .def("counts", &counts);
    nb::class_<PyEvictedPages>(module, "EvictedPages", "cleanfs.vfs.evictions.EvictedPages.")
        .def(nb::init<int, std::size_t, const InodeStates&, CacheState&>(), "fd"_a, "ring_bytes"_a, "inodes"_a, "caches"_a,
             nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
        .def("table", [](const PyEvictedPages& evicted) { return nb::capsule(&evicted.pages.table(), Evictions::capsule); })
        .def("drain", [](PyEvictedPages& evicted, std::size_t most) { return evicted.pages.drain(most); }, "most"_a,
             nb::call_guard<nb::gil_scoped_release>())
        .def("hold", [](PyEvictedPages& evicted, std::uint64_t node) { evicted.pages.hold(node); }, "node"_a)
        .def("release", [](PyEvictedPages& evicted, std::uint64_t node) { evicted.pages.release(node); }, "node"_a)
        .def("forget", [](PyEvictedPages& evicted, std::uint64_t node) { evicted.pages.forget(node); }, "node"_a)
        .def("counters", &PyEvictedPages::counters);
}
