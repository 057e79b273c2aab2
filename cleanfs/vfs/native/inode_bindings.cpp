#include "inode_bindings.hpp"

#include <utility>
#include <vector>

#include "file_handles.hpp"
#include "inode_state.hpp"
#include "to_python.hpp"

using namespace nanobind::literals;

namespace cleanfs {

namespace {

nb::bytes to_bytes(const std::string& text) { return nb::bytes(text.data(), text.size()); }
std::string to_string(const nb::bytes& bytes) { return {bytes.c_str(), bytes.size()}; }

// InodeStates with what it refers to in Python: methods of objects that refer back to it.
struct PyInodeStates : InodeStates {
    nb::object calls = nb::none(), task_ready = nb::none();
    nb::object stat_result = nb::module_::import_("os").attr("stat_result");
    std::vector<nb::object> referenced;  // policies of file systems

    template <class... Args>
    nb::object call(const char* name, Args&&... args) const {
        return calls.attr(name)(std::forward<Args>(args)...);
    }
    bool is_task_ready() const { return nb::cast<bool>(task_ready()); }

    static int traverse(PyObject* self, visitproc visit, void* arg) {
        Py_VISIT(Py_TYPE(self));
        if (nb::inst_ready(self)) {
            Py_VISIT(nb::inst_ptr<PyInodeStates>(self)->calls.ptr());
            Py_VISIT(nb::inst_ptr<PyInodeStates>(self)->task_ready.ptr());
        }
        return 0;
    }
    static int clear(PyObject* self) {
        auto& states = *nb::inst_ptr<PyInodeStates>(self);
        states.calls = states.task_ready = nb::none();
        return 0;
    }
    static inline PyType_Slot slots[] = {
        {Py_tp_traverse, reinterpret_cast<void*>(&traverse)},
        {Py_tp_clear, reinterpret_cast<void*>(&clear)},
        {0, nullptr},
    };
};

bool call_hold(InodeStates& states, std::uint64_t node, int fd) noexcept {
    const nb::gil_scoped_acquire locked;
    try {
        return nb::cast<bool>(static_cast<PyInodeStates&>(states).call("hold_parked", node, fd));
    } catch (nb::python_error& error) {
        error.discard_as_unraisable("the opening of a parked inode");
        return false;
    }
}

bool call_drop_unused(InodeStates& states, std::span<const std::uint64_t> nodes) noexcept {
    const nb::gil_scoped_acquire locked;
    try {
        nb::list list;
        for (const std::uint64_t node : nodes) list.append(node);
        const auto& all = static_cast<PyInodeStates&>(states);
        all.call("drop_unused", list);
        return all.is_task_ready();
    } catch (nb::python_error& error) {
        error.discard_as_unraisable("the drop of unused inodes");
        return true;
    }
}

bool call_poll(InodeStates& states, std::uint64_t node) noexcept {
    const nb::gil_scoped_acquire locked;
    try {
        const auto& all = static_cast<PyInodeStates&>(states);
        all.call("poll_open", node);
        return all.is_task_ready();
    } catch (nb::python_error& error) {
        error.discard_as_unraisable("the note of an open file");
        return true;
    }
}

void call_begin_writing(InodeStates& states, std::uint64_t node, FileState& file) noexcept {
    const nb::gil_scoped_acquire locked;
    try {
        static_cast<PyInodeStates&>(states).call("begin_writing", node, nb::find(file));
    } catch (nb::python_error& error) {
        error.discard_as_unraisable("the note of a writer");
    }
}

void call_end_writing(InodeStates& states, std::uint64_t node, FileState& file) noexcept {
    const nb::gil_scoped_acquire locked;
    try {
        static_cast<PyInodeStates&>(states).call("end_writing", node, nb::find(file));
    } catch (nb::python_error& error) {
        error.discard_as_unraisable("the note of a writer that is gone");
    }
}

void call_change_refused(InodeStates& states, std::uint64_t node, const KernelViewState::Told& before) noexcept {
    const nb::gil_scoped_acquire locked;
    try {
        static_cast<PyInodeStates&>(states).call("change_refused", node, before.size, to_python(before.access), to_python(before.access_ctime));
    } catch (nb::python_error& error) {
        error.discard_as_unraisable("the rollback of a refused reply");
    }
}

InodeStates::Made call_created(InodeStates& states, const InodeStates::Created& created) noexcept {
    const nb::gil_scoped_acquire locked;
    try {
        const nb::bytes name(created.name.data(), created.name.size());
        const auto& table = static_cast<PyInodeStates&>(states);
        const nb::object node = table.call("created", created.parent, name, created.fd, created.path_fd, created.writable);
        return {states.find(nb::cast<std::uint64_t>(node)), table.is_task_ready()};
    } catch (nb::python_error& error) {
        error.discard_as_unraisable("the record of a new file");
        return {nullptr, true};
    }
}

void call_create_refused(InodeStates& states, std::uint64_t node) noexcept {
    const nb::gil_scoped_acquire locked;
    try {
        static_cast<PyInodeStates&>(states).call("create_refused", node);
    } catch (nb::python_error& error) {
        error.discard_as_unraisable("the rollback of a refused reply");
    }
}

nb::object stamps_of(const struct stat& st) { return to_python(std::optional(Stamps::of(st))); }

nb::bytes name_of(const InodeStates::Unlinked& unlinked) { return nb::bytes(unlinked.name.data(), unlinked.name.size()); }

bool call_unlinked(InodeStates& states, const InodeStates::Unlinked& unlinked) noexcept {
    const nb::gil_scoped_acquire locked;
    try {
        const nb::object before = stamps_of(unlinked.before), after = unlinked.after == nullptr ? nb::none() : stamps_of(*unlinked.after);
        const bool gone = unlinked.after != nullptr && unlinked.after->st_nlink == 0;
        const auto& all = static_cast<PyInodeStates&>(states);
        all.call("unlinked", unlinked.parent, name_of(unlinked), unlinked.node, unlinked.fd, before, after, gone);
        return all.is_task_ready();
    } catch (nb::python_error& error) {
        error.discard_as_unraisable("the record of a removed name");
        return true;
    }
}

void call_unlink_refused(InodeStates& states, const InodeStates::Unlinked& unlinked) noexcept {
    const nb::gil_scoped_acquire locked;
    try {
        static_cast<PyInodeStates&>(states).call("unlink_refused", unlinked.parent, name_of(unlinked), unlinked.node);
    } catch (nb::python_error& error) {
        error.discard_as_unraisable("the rollback of a refused reply");
    }
}

// The ten fields that os.stat_result has as a tuple.
nb::object to_python(const PyInodeStates& states, const struct stat& st) {
    return states.stat_result(nb::make_tuple(st.st_mode, st.st_ino, st.st_dev, st.st_nlink, st.st_uid, st.st_gid, st.st_size,
                                             st.st_atim.tv_sec, st.st_mtim.tv_sec, st.st_ctim.tv_sec));
}

nb::object to_python(const std::optional<std::string>& handle) { return handle ? nb::object(to_bytes(*handle)) : nb::none(); }

nb::bytes to_bytes(std::string_view name) { return nb::bytes(name.data(), name.size()); }

std::uint64_t call_enter(InodeStates& states, std::uint64_t parent, const Found& found, int fd) noexcept {
    const nb::gil_scoped_acquire locked;
    try {
        const auto& all = static_cast<PyInodeStates&>(states);
        const nb::object st = to_python(all, found.st), handle = to_python(found.handle);
        return nb::cast<std::uint64_t>(all.call("enter_opened", fd, st, parent, to_bytes(found.name), handle));
    } catch (nb::python_error& error) {
        error.discard_as_unraisable("the entry of an inode");
        return 0;
    }
}

bool call_enter_listed(InodeStates& states, std::uint64_t directory, std::span<const Found> found, std::uint64_t* nodes) noexcept {
    const nb::gil_scoped_acquire locked;
    try {
        const auto& all = static_cast<PyInodeStates&>(states);
        nb::list entries;
        for (const Found& one : found) entries.append(nb::make_tuple(to_python(all, one.st), to_bytes(one.name), to_python(one.handle)));
        const nb::object entered = all.call("enter_listed", directory, entries);
        if (entered.is_none()) return false;
        for (const nb::handle node : entered) *nodes++ = nb::cast<std::uint64_t>(node);
        return true;
    } catch (nb::python_error& error) {
        error.discard_as_unraisable("the entry of listed inodes");
        return false;
    }
}

bool call_ask_to_forget(InodeStates& states) noexcept {
    const nb::gil_scoped_acquire locked;
    try {
        const auto& all = static_cast<PyInodeStates&>(states);
        all.call("ask_to_forget");
        return all.is_task_ready();
    } catch (nb::python_error& error) {
        error.discard_as_unraisable("the note that there are too many inodes");
        return true;
    }
}

std::uint64_t call_open_directory(InodeStates& states, std::uint64_t node, int fd) noexcept {
    const nb::gil_scoped_acquire locked;
    try {
        return nb::cast<std::uint64_t>(static_cast<PyInodeStates&>(states).call("open_directory", node, fd));
    } catch (nb::python_error& error) {
        error.discard_as_unraisable("the opening of a directory");
        return 0;
    }
}

bool call_close_directory(InodeStates& states, std::uint64_t fh) noexcept {
    const nb::gil_scoped_acquire locked;
    try {
        return nb::cast<bool>(static_cast<PyInodeStates&>(states).call("close_directory", fh));
    } catch (nb::python_error& error) {
        error.discard_as_unraisable("the closing of a directory");
        return false;
    }
}

nb::tuple to_python(const std::vector<int>& fds) {
    nb::list list;
    for (const int fd : fds) list.append(fd);
    return nb::tuple(list);
}

}  // namespace

nb::bytes name_to_handle(int fd) {
    const auto handle = handle_of(fd);
    if (handle) return to_bytes(*handle);
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
}

void bind_inode_states(nb::module_& module) {
    module.def("name_to_handle", &name_to_handle, "fd"_a);
    nb::class_<KernelViewState, KernelState>(module, "KernelViewState", "cleanfs.vfs.inode_state.KernelViewState.")
        .def(nb::init<>())
        .def_prop_rw("access", [](const KernelViewState& kernel) { return to_python(kernel.access); },
                     [](KernelViewState& kernel, nb::handle access) { kernel.access = to_nanoseconds(access); })
        .def_prop_rw("access_ctime", [](const KernelViewState& kernel) { return to_python(kernel.access_ctime); },
                     [](KernelViewState& kernel, nb::handle ctime) { kernel.access_ctime = to_nanoseconds(ctime); })
        .def("tell",
             [](KernelViewState& kernel, std::int64_t size, nb::handle mtime_ns, nb::handle ctime_ns, std::uint32_t mode,
                std::uint32_t uid, std::uint32_t gid) {
                 kernel.tell({size, to_nanoseconds(mtime_ns), to_nanoseconds(ctime_ns)}, KernelViewState::access_of(mode, uid, gid));
             },
             "size"_a, "mtime_ns"_a, "ctime_ns"_a, "mode"_a, "uid"_a, "gid"_a)
        .def_rw("doubts", &KernelViewState::doubts)
        .def_rw("doubts_settled", &KernelViewState::doubts_settled)
        .def_rw("size_doubt", &KernelViewState::size_doubt)
        .def_prop_rw("acl", [](const KernelViewState& kernel) { return to_bytes(kernel.acl); },
                     [](KernelViewState& kernel, const nb::bytes& acl) { kernel.acl = to_string(acl); });
    nb::class_<InodeState>(module, "InodeState", "cleanfs.vfs.inode_state.InodeState.")
        .def("__init__",
             [](InodeState* self, std::uint64_t device, std::uint64_t ino, std::uint32_t kind, std::uint64_t node,
                std::uint64_t generation, KernelViewState* kernel) {
                 new (self) InodeState;
                 self->device = device;
                 self->ino = ino;
                 self->kind = kind;
                 self->node = node;
                 self->generation = generation;
                 self->kernel = kernel;
             },
             "device"_a, "ino"_a, "kind"_a, "node"_a, "generation"_a, "kernel"_a)
        .def_ro("device", &InodeState::device)
        .def_rw("ino", &InodeState::ino)
        .def_rw("kind", &InodeState::kind)
        .def_ro("node", &InodeState::node)
        .def_ro("generation", &InodeState::generation)
        .def_rw("fd", &InodeState::fd)
        .def_rw("nlookup", &InodeState::nlookup)
        .def_prop_ro("open_fds", [](const InodeState& inode) { return to_python(inode.open_fds); })
        .def_prop_ro("opens", [](const InodeState& inode) { return inode.open_fds.size(); })
        .def("add_open_fd", [](InodeState& inode, int fd) { inode.open_fds.push_back(fd); }, "fd"_a)
        .def("remove_open_fd", [](InodeState& inode, int fd) { std::erase(inode.open_fds, fd); }, "fd"_a)
        .def_rw("polled", &InodeState::polled)
        .def_rw("local", &InodeState::local)
        .def_rw("suspect", &InodeState::suspect)
        .def_rw("used", &InodeState::used)
        .def_rw("current", &InodeState::current)
        .def_prop_ro("name", [](const InodeState& inode) { return to_bytes(inode.name); })
        .def("set_place",
             [](InodeState& inode, InodeState* parent, const nb::bytes& name) {
                 inode.parent = parent;
                 inode.name = to_string(name);
             },
             "parent"_a.none(), "name"_a)
        .def("set_record", [](InodeState& inode, FileState* record) { inode.record = record; }, "record"_a.none());
    nb::class_<InodeStates>(module, "NativeInodeStates");
    nb::class_<PyInodeStates, InodeStates>(module, "InodeStates", "cleanfs.vfs.inode_state.InodeStates.",
                                           nb::type_slots(PyInodeStates::slots))
        .def(nb::init<>())
        .def_prop_ro_static("native", [](nb::handle) { return true; })
        .def("__len__", [](const PyInodeStates& states) { return states.by_node.size(); })
        .def("add", [](PyInodeStates& states, InodeState* inode) { states.by_node[inode->node] = inode; }, "inode"_a)
        .def("remove",
             [](PyInodeStates& states, const InodeState* inode) {
                 if (states.find(inode->node) == inode) states.by_node.erase(inode->node);
             },
             "inode"_a)
        .def("use_table",
             [](PyInodeStates& states, nb::object calls, nb::object task_ready) {
                 states.calls = std::move(calls);
                 states.task_ready = std::move(task_ready);
                 states.drop_unused = call_drop_unused;
                 states.hold = call_hold;
                 states.enter = call_enter;
                 states.enter_listed = call_enter_listed;
                 states.poll = call_poll;
                 states.ask_to_forget = call_ask_to_forget;
                 states.open_directory = call_open_directory;
                 states.close_directory = call_close_directory;
                 states.begin_writing = call_begin_writing;
                 states.end_writing = call_end_writing;
                 states.change_refused = call_change_refused;
                 states.created = call_created;
                 states.create_refused = call_create_refused;
                 states.unlinked = call_unlinked;
                 states.unlink_refused = call_unlink_refused;
             },
             "calls"_a, "task_ready"_a)
        .def("use_file_system",
             [](PyInodeStates& states, std::uint64_t device, nb::object nowait, nb::object reads, nb::object writes, nb::object lookups,
                nb::object names, nb::object listings) {
                 states.file_systems[device] = {nb::cast<InlineState*>(reads), nb::cast<InlineState*>(writes), nb::cast<InlineState*>(lookups), nb::cast<InlineState*>(names),
                                                nb::cast<InlineState*>(listings), nb::cast<NowaitState*>(nowait)};
                 for (nb::object* object : {&nowait, &reads, &writes, &lookups, &names, &listings}) states.referenced.push_back(std::move(*object));
             },
             "device"_a, "nowait"_a, "reads"_a, "writes"_a, "lookups"_a, "names"_a, "listings"_a)
        .def_rw("wants_handles", &PyInodeStates::wants_handles)
        .def_rw("timeout", &PyInodeStates::timeout)
        .def_rw("unwatched_timeout", &PyInodeStates::unwatched_timeout)
        .def("watch", [](PyInodeStates& states, std::uint64_t device) { states.watched.insert(device); }, "device"_a)
        .def_rw("caches_absence", &PyInodeStates::caches_absence)
        .def_prop_rw("control_name", [](const PyInodeStates& states) { return to_bytes(states.control_name); },
                     [](PyInodeStates& states, const nb::bytes& name) { states.control_name = to_string(name); })
        .def_rw("max_inodes", &PyInodeStates::max_inodes)
        .def_rw("writeback", &PyInodeStates::writeback)
        .def_rw("can_act", &PyInodeStates::can_act)
        .def_rw("open_fds", &PyInodeStates::open_fds)
        .def_rw("fd_budget", &PyInodeStates::fd_budget)
        .def("set_invalidating",
             [](PyInodeStates& states, std::uint64_t node, bool pending) {
                 if (pending) {
                     states.invalidating.insert(node);
                 } else {
                     states.invalidating.erase(node);
                 }
             },
             "node"_a, "pending"_a)
        .def("refuse", [](PyInodeStates& states, std::uint32_t thread) { states.refused.insert(thread); }, "thread"_a)
        .def("stop_refusing", [](PyInodeStates& states, std::uint32_t thread) { states.refused.erase(thread); }, "thread"_a);
}

}  // namespace cleanfs
