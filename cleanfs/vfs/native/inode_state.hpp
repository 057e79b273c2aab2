// What the FUSE channel must know of inodes to reply with their attributes without Python.
//
// Python writes it, on trio's thread, where it decides (cleanfs/vfs/inode_state.py says what each field means). The
// channel reads and writes it on the same thread, so there is no lock.
#pragma once

#include <sys/stat.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "state.hpp"

namespace cleanfs {

// Mode, owner and group in one number, or a negative one (cleanfs.vfs.kernel_view).
__extension__ typedef __int128 Access;

// The part of cleanfs.vfs.kernel_view.KernelView that a reply with attributes reads or writes.
struct KernelViewState : KernelState {
    static constexpr Access not_told = -1, unsure = -2;

    struct Told {
        std::int64_t size;
        Access access;
        Nanoseconds access_ctime;
    };

    Access access = not_told;
    Nanoseconds access_ctime = 0;
    std::int64_t doubts = 0, doubts_settled = 0, size_doubt = 0;
    std::string acl;

    static Access access_of(std::uint32_t mode, std::uint32_t uid, std::uint32_t gid) {
        return Access{mode} | Access{uid} << 32 | Access{gid} << 64;
    }
    static Access access_of(const struct stat& st) { return access_of(st.st_mode, st.st_uid, st.st_gid); }

    Told told() const { return {size, access, access_ctime}; }
    void reply_sent(const struct stat& st) { tell(Stamps::of(st), access_of(st)); }
    void tell(const Stamps& now, Access now_access) {
        if (sent && *sent != now) doubt(now.size != size);
        sent = now;
        size = now.size;
        access = now_access;
        access_ctime = now.ctime_ns;
    }
    void rollback(const Told& before) {
        doubt(before.size != size);
        size = before.size;
        if (access == before.access) {
            access_ctime = before.access_ctime;
        } else {
            access = unsure;
        }
    }

private:
    void doubt(bool of_size) {
        ++doubts;
        if (of_size) size_doubt = doubts;
    }
};

// One inode: the native part of cleanfs.vfs.inode.Inode.
struct InodeState {
    static constexpr std::uint64_t root_node = 1;  // FUSE_ROOT_ID

    std::uint64_t device = 0, ino = 0;
    std::uint32_t kind = 0;  // of its mode
    std::uint64_t node = 0, generation = 0;
    KernelViewState* kernel = nullptr;

    int fd = -1;
    std::int64_t nlookup = 0;
    std::vector<int> open_fds;  // of its file handles
    bool local = false, suspect = false, used = false, polled = false, current = false;
    InodeState* parent = nullptr;  // the Python object keeps it alive
    std::string name;
    FileState* record = nullptr;

    // Whether its descriptor can be used here, and without a wait.
    bool is_ready() const { return local && fd >= 0 && !suspect; }
    bool is_parked() const { return local && fd < 0; }
};

// What is known of one file system of the source (cleanfs.source.io.SourceFs).
struct SourceFsState {
    InlineState *reads, *writes, *lookups, *names, *listings;
    NowaitState* nowait;
};

// An object of the source that has no inode yet.
struct Found {
    std::string_view name;
    struct stat st;
    std::optional<std::string> handle;  // none if not requested, or not available
};

// The inodes of one mount.
struct InodeStates {
    std::unordered_map<std::uint64_t, InodeState*> by_node;
    std::unordered_map<std::uint64_t, SourceFsState> file_systems;  // the local ones, by device

    bool wants_handles = false;
    double timeout = 0, unwatched_timeout = 0;
    std::unordered_set<std::uint64_t> watched;  // devices
    bool caches_absence = false;
    std::string control_name;
    std::size_t max_inodes = 0;
    bool writeback = false, can_act = false;
    std::size_t open_fds = 0, fd_budget = 0;
    std::unordered_set<std::uint64_t> invalidating;  // nodes
    std::unordered_set<std::uint32_t> refused;  // threads

    // Operations' begin_writing and end_writing, with the GIL.
    void (*begin_writing)(InodeStates& states, std::uint64_t node, FileState& file) noexcept = nullptr;
    void (*end_writing)(InodeStates& states, std::uint64_t node, FileState& file) noexcept = nullptr;
    // Operations' change_refused, with the GIL: the kernel was not told that a file has changed.
    void (*change_refused)(InodeStates& states, std::uint64_t node, const KernelViewState::Told& before) noexcept = nullptr;
    // A file that the channel created.
    struct Created {
        std::uint64_t parent;
        std::string_view name;
        int fd, path_fd;
        bool writable;
    };
    struct Made {
        InodeState* inode;  // null if it failed
        bool task_ready;    // a task of trio can run
    };
    // Opener.created and its rollback, with the GIL.
    Made (*created)(InodeStates& states, const Created& created) noexcept = nullptr;
    void (*create_refused)(InodeStates& states, std::uint64_t node) noexcept = nullptr;
    // An unlink that the channel made.
    struct Unlinked {
        std::uint64_t parent;
        std::string_view name;
        std::uint64_t node;
        int fd;  // of the file
        const struct stat& before;
        const struct stat* after;  // null if it is not known
    };
    // NameChanges.unlinked and its rollback, with the GIL. The first returns whether a task of trio can run.
    bool (*unlinked)(InodeStates& states, const Unlinked& unlinked) noexcept = nullptr;
    void (*unlink_refused)(InodeStates& states, const Unlinked& unlinked) noexcept = nullptr;
    // InodeTable.drop_unused, with the GIL. Returns whether a task of trio can run.
    bool (*drop_unused)(InodeStates& states, std::span<const std::uint64_t> nodes) noexcept = nullptr;
    // OpenFiles.opened, with the GIL. Returns whether a task of trio can run.
    bool (*poll)(InodeStates& states, std::uint64_t node) noexcept = nullptr;
    // InodeTable.hold_parked, with the GIL. Returns whether the descriptor, which has the right number, was taken.
    bool (*hold)(InodeStates& states, std::uint64_t node, int fd) noexcept = nullptr;

    // InodeTable.enter_opened, with the GIL. Returns the node of the new inode, to which the kernel has no reference yet, and
    // which holds the descriptor; 0 if nothing was done.
    std::uint64_t (*enter)(InodeStates& states, std::uint64_t parent, const Found& found, int fd) noexcept = nullptr;
    // InodeTable.enter_listed, with the GIL: as above for each, without descriptors; and have known inodes moved. Gives the
    // node of each. False if nothing was done.
    bool (*enter_listed)(InodeStates& states, std::uint64_t directory, std::span<const Found> found, std::uint64_t* nodes) noexcept = nullptr;
    // Tree.ask_to_forget, with the GIL. Returns whether a task of trio can run.
    bool (*ask_to_forget)(InodeStates& states) noexcept = nullptr;
    // OpenDirectories.open and HandleTable.close_directory, with the GIL.
    std::uint64_t (*open_directory)(InodeStates& states, std::uint64_t node, int fd) noexcept = nullptr;
    bool (*close_directory)(InodeStates& states, std::uint64_t fh) noexcept = nullptr;

    // Of the first file system, where node ids are inode numbers.
    std::uint64_t device() const { return find(InodeState::root_node)->device; }
    const SourceFsState* source_fs(const InodeState& inode) const {
        const auto found = file_systems.find(inode.device);
        return found == file_systems.end() ? nullptr : &found->second;
    }

    // Entries.timeout_of, of an inode that is local.
    double timeout_of(const InodeState& inode) const {
        return watched.contains(inode.device) ? timeout : unwatched_timeout;
    }

    InodeState* find(std::uint64_t node) const {
        const auto found = by_node.find(node);
        return found == by_node.end() ? nullptr : found->second;
    }
};

}  // namespace cleanfs
