// Have the channel serve requests for names, attributes, opens and listings with any bytes in them, over a small
// directory. Each request that is served gets one reply, or none if it wants none; the kernel's references are counted by
// what it was told. The input is libFuzzer's, or random.
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "directories.hpp"
#include "attribute_changes.hpp"
#include "fuzz_main.hpp"
#include "metadata.hpp"
#include "name_changes.hpp"
#include "open_handles.hpp"
#include "pages.hpp"

namespace {

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "fuzz_metadata: %s\n", what);
    std::abort();
}

bool refuses = false;               // the requester is gone
std::vector<std::byte> last_reply;  // empty if there was none
int replies = 0;

}  // namespace

extern "C" ssize_t __wrap_writev(int, const iovec* parts, int count) {
    ++replies;
    last_reply.clear();
    for (int at = 0; at < count; ++at) {
        const auto* from = static_cast<const std::byte*>(parts[at].iov_base);
        last_reply.insert(last_reply.end(), from, from + parts[at].iov_len);
    }
    if (refuses) return errno = ENOENT, -1;
    return static_cast<ssize_t>(last_reply.size());
}

namespace {

using cleanfs::Channel;
using cleanfs::Directories;
using cleanfs::DirectoryState;
using cleanfs::Found;
using cleanfs::InodeState;
using cleanfs::InodeStates;
using cleanfs::KernelViewState;
using cleanfs::Message;
using cleanfs::Metadata;
using cleanfs::NameChanges;
using cleanfs::OpenHandles;

constexpr const char* names[] = {"a", "b", "dir", "link", "none", "..", "a/b", ".cleancache", ""};
constexpr std::uint32_t opcodes[] = {FUSE_LOOKUP,   FUSE_LOOKUP,   FUSE_GETATTR, FUSE_FORGET,
                                     FUSE_READLINK, FUSE_GETXATTR, FUSE_BATCH_FORGET, FUSE_RENAME2,
                                     FUSE_OPEN,     FUSE_OPEN,     FUSE_RELEASE, FUSE_UNLINK, FUSE_SETATTR, FUSE_CREATE, FUSE_CREATE,
                                     FUSE_OPENDIR,  FUSE_READDIRPLUS, FUSE_READDIRPLUS, FUSE_RELEASEDIR,
                                     FUSE_STATFS};
constexpr std::uint64_t max_fh = 4;  // of directories

// A directory that lasts as long as the program.
int source() {
    static const int fd = [] {
        char path[] = "/tmp/fuzz-metadata-XXXXXX";
        if (mkdtemp(path) == nullptr) fail("no directory");
        const int directory = open(path, O_RDONLY | O_DIRECTORY);
        if (mkdirat(directory, "dir", 0700) != 0) fail("no directory");
        static const std::string made = path;
        std::atexit([] { std::filesystem::remove_all(made); });
        return directory;
    }();
    return fd;
}

struct Inode : InodeState {
    KernelViewState view;
    cleanfs::FileState file;
};

class Table : public InodeStates {
public:
    Table() {
        timeout = unwatched_timeout = 1.5;
        control_name = ".cleancache";
        max_inodes = 100;
        drop_unused = [](InodeStates& states, std::span<const std::uint64_t> unused) noexcept {
            auto& table = static_cast<Table&>(states);
            for (const std::uint64_t node : unused) table.drop(node);
            return unused.size() % 2 == 0;
        };
        hold = [](InodeStates& states, std::uint64_t node, int fd) noexcept {
            static_cast<Table&>(states).inodes_.at(node)->fd = fd;
            return true;
        };
        poll = [](InodeStates& states, std::uint64_t node) noexcept { return states.find(node)->polled = true; };
        unlinked = [](InodeStates& states, const Unlinked& name) noexcept {
            struct stat st;
            const int directory = states.find(name.parent)->fd;
            if (fstatat(directory, std::string(name.name).c_str(), &st, AT_SYMLINK_NOFOLLOW) == 0) fail("the name is there");
            return states.find(name.node) == nullptr;
        };
        unlink_refused = [](InodeStates&, const Unlinked&) noexcept {};
        begin_writing = end_writing = [](InodeStates&, std::uint64_t, cleanfs::FileState&) noexcept {};
        created = [](InodeStates& states, const Created& file) noexcept {
            auto& table = static_cast<Table&>(states);
            struct stat st;
            fstat(file.path_fd, &st);
            if (table.find(st.st_ino) != nullptr) {  // a parked file had that number
                close(file.path_fd);
                return Made{nullptr, false};
            }
            InodeState* inode = table.add(st, file.path_fd, file.name, table.find(file.parent));
            inode->nlookup = 1;
            table.nodes.push_back(inode->node);
            return Made{inode, false};
        };
        change_refused = [](InodeStates& states, std::uint64_t node, const KernelViewState::Told& before) noexcept {
            states.find(node)->kernel->rollback(before);
        };
        create_refused = [](InodeStates& states, std::uint64_t node) noexcept { states.find(node)->nlookup = 0; };
        can_act = true;
        enter = [](InodeStates& states, std::uint64_t parent, const Found& found, int fd) noexcept {
            auto& table = static_cast<Table&>(states);
            if (table.refuses_new) return std::uint64_t{0};
            return table.add(found.st, fd, found.name, table.find(parent))->node;
        };
        enter_listed = [](InodeStates& states, std::uint64_t directory, std::span<const Found> all, std::uint64_t* to) noexcept {
            auto& table = static_cast<Table&>(states);
            if (table.refuses_new) return false;
            for (const Found& found : all) {
                InodeState* inode = table.find(found.st.st_ino);
                if (inode == nullptr) inode = table.add(found.st, -1, found.name, table.find(directory));
                inode->name = found.name;
                inode->parent = table.find(directory);
                *to++ = inode->node;
            }
            return true;
        };
        ask_to_forget = [](InodeStates& states) noexcept { return states.by_node.size() % 2 == 0; };
        open_directory = [](InodeStates& states, std::uint64_t, int fd) noexcept { return static_cast<Table&>(states).open(fd); };
        close_directory = [](InodeStates& states, std::uint64_t fh) noexcept { return static_cast<Table&>(states).close_open(fh); };
        fd_budget = 8;
        names_.inline_calls = true;
        names_.returned_at = 1e18;  // always a moment ago
        struct stat root;
        fstat(source(), &root);
        listings.inline_calls = true;
        listings.returned_at = 1e18;
        file_systems[root.st_dev] = {&reads_, &writes_, &names_, &listings, &nowait_};
        unlinkat(source(), "none", 0);
        for (const char* name : {"a", "b"}) close(openat(source(), name, O_CREAT | O_WRONLY, 0600));
        if (symlinkat("target", source(), "link") != 0 && errno != EEXIST) fail("no link");
        root_ = add(InodeState::root_node, ".", nullptr);
        for (const char* name : {"a", "b", "dir", "link"}) {
            struct stat st;
            if (fstatat(source(), name, &st, AT_SYMLINK_NOFOLLOW) != 0) fail("a file is missing");
            nodes.push_back(st.st_ino);
            add(st.st_ino, name, root_);
        }
    }
    ~Table() {
        for (auto& [node, inode] : inodes_) park(*inode);
        for (auto& [fh, state] : open_) close(state->fd);
    }
    Table(const Table&) = delete;
    Table& operator=(const Table&) = delete;

    InodeState* add(std::uint64_t node, const char* name, InodeState* parent) {
        const int fd = openat(source(), name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
        struct stat st;
        if (fstat(fd, &st) != 0) fail("a file cannot be opened");
        InodeState* inode = add(st, fd, name, parent, node);
        inode->nlookup = told[node] = 1;
        return inode;
    }
    InodeState* add(const struct stat& st, int fd, std::string_view name, InodeState* parent, std::uint64_t node = 0) {
        if (node == 0) node = st.st_ino;
        auto inode = std::make_unique<Inode>();
        inode->fd = fd;
        inode->current = true;
        inode->device = st.st_dev;
        inode->ino = st.st_ino;
        inode->kind = st.st_mode & S_IFMT;
        inode->node = node;
        inode->kernel = &inode->view;
        inode->view.sent = inode->file.stamps = cleanfs::Stamps::of(st);
        inode->file.racy = false;
        if (inode->kind == S_IFREG) inode->record = &inode->file;
        inode->local = true;
        inode->name = name;
        inode->parent = parent;
        by_node[node] = inode.get();
        return (inodes_[node] = std::move(inode)).get();
    }
    void drop(std::uint64_t node) {
        const auto found = inodes_.find(node);
        if (found == inodes_.end()) return;  // twice in a batch
        InodeState& inode = *found->second;
        if (!inode.open_fds.empty()) {  // no kernel forgets more than it has
            inode.nlookup = std::max(inode.nlookup, std::int64_t{0});
            return;
        }
        park(*found->second);
        by_node.erase(node);
        dropped_.push_back(std::move(found->second));
        inodes_.erase(found);
    }
    static void park(InodeState& inode) {
        if (inode.fd >= 0) close(inode.fd);
        inode.fd = -1;
    }

    std::uint64_t open(int fd) {
        if (refuses_new || open_.size() == max_fh) return 0;
        std::uint64_t fh = 1;
        while (open_.contains(fh)) ++fh;
        auto state = std::make_unique<DirectoryState>();
        state->fd = fd;
        directories->add(fh, *state);
        open_[fh] = std::move(state);
        return fh;
    }
    bool close_open(std::uint64_t fh) {
        if (refuses_new) return false;  // it is in use
        const auto found = open_.find(fh);
        if (found == open_.end()) fail("a directory that is not open is closed");
        directories->remove(fh);
        close(found->second->fd);
        open_.erase(found);
        return true;
    }

    Directories* directories = nullptr;
    cleanfs::InlineState listings;
    bool refuses_new = false;
    std::vector<std::uint64_t> nodes{InodeState::root_node, 0, 12345};
    std::map<std::uint64_t, std::int64_t> told;  // the kernel's references, by what it was told
    std::vector<std::uint64_t> opened{0, 77};    // fhs, and two that no file has

private:
    cleanfs::InlineState reads_, writes_, names_;
    cleanfs::NowaitState nowait_;
    InodeState* root_;
    std::map<std::uint64_t, std::unique_ptr<Inode>> inodes_;
    std::vector<std::unique_ptr<Inode>> dropped_;  // which may be the directory of another
    std::map<std::uint64_t, std::unique_ptr<DirectoryState>> open_;  // by fh
};

// Bytes of the input, zeros when it has ended.
class Input {
public:
    Input(const std::uint8_t* data, std::size_t size) : data_(data), left_(size) {}
    bool ended() const { return left_ == 0; }
    std::uint8_t byte() {
        if (left_ == 0) return 0;
        --left_;
        return *data_++;
    }
    std::size_t below(std::size_t bound) { return byte() % bound; }

private:
    const std::uint8_t* data_;
    std::size_t left_;
};

template <class Struct>
void append(std::vector<std::byte>& to, const Struct& part) {
    const auto* bytes = reinterpret_cast<const std::byte*>(&part);
    to.insert(to.end(), bytes, bytes + sizeof part);
}

void append_name(std::vector<std::byte>& to, const char* name) {
    for (const char* at = name; *at != 0; ++at) to.push_back(static_cast<std::byte>(*at));
    to.push_back(std::byte{0});
}

std::vector<std::byte> make_message(Input& input, const Table& table) {
    fuse_in_header header{};
    header.opcode = opcodes[input.below(std::size(opcodes))];
    header.unique = 2;
    header.nodeid = table.nodes[input.below(table.nodes.size())];
    header.uid = geteuid();
    header.gid = getegid();
    std::vector<std::byte> body;
    switch (header.opcode) {
        case FUSE_FORGET:
            append(body, fuse_forget_in{input.below(4) == 0 ? ~std::uint64_t{0} : input.below(3)});
            break;
        case FUSE_BATCH_FORGET: {
            const auto count = static_cast<std::uint32_t>(input.below(5));
            append(body, fuse_batch_forget_in{count, 0});
            for (std::uint32_t at = 0; at < count; ++at) {
                append(body, fuse_forget_one{table.nodes[input.below(table.nodes.size())], input.below(3)});
            }
            break;
        }
        case FUSE_GETXATTR:
            append(body, fuse_getxattr_in{});
            append_name(body, input.below(2) == 0 ? "security.capability" : "system.posix_acl_access");
            break;
        case FUSE_GETATTR:
            append(body, fuse_getattr_in{});
            break;
        case FUSE_OPENDIR:
            append(body, fuse_open_in{});
            break;
        case FUSE_READDIRPLUS: {
            fuse_read_in in{};
            in.fh = input.below(max_fh + 2);
            in.offset = input.below(8) == 0 ? ~std::uint64_t{0} - input.below(4) : input.below(8);
            in.size = static_cast<std::uint32_t>(input.below(8) == 0 ? input.below(64) : 200 * input.below(8));
            append(body, in);
            break;
        }
        case FUSE_RELEASEDIR:
            append(body, fuse_release_in{input.below(max_fh + 2), 0, 0, 0});
            break;
        case FUSE_OPEN:
            append(body, fuse_open_in{input.below(4) == 0 ? input.byte() : std::uint32_t{O_RDONLY}, 0});
            break;
        case FUSE_SETATTR: {
            fuse_setattr_in in{};
            in.valid = input.below(4) == 0 ? input.byte() : input.byte() & (FATTR_MODE | FATTR_UID | FATTR_MTIME | FATTR_MTIME_NOW);
            in.mode = 0700;
            in.uid = geteuid();
            in.mtime = input.byte();
            append(body, in);
            break;
        }
        case FUSE_CREATE:
            append(body, fuse_create_in{static_cast<std::uint32_t>(input.below(3)), 0100644, 022, 0});
            append_name(body, names[input.below(std::size(names))]);
            break;
        case FUSE_RELEASE: {
            fuse_release_in release{};
            release.fh = table.opened[input.below(table.opened.size())];
            append(body, release);
            break;
        }
        default:
            append_name(body, names[input.below(std::size(names))]);
    }
    if (input.below(4) == 0) {  // any bytes, and any length
        body.resize(input.below(64));
        for (std::byte& byte : body) byte = static_cast<std::byte>(input.byte());
    }
    std::vector<std::byte> message;
    header.len = static_cast<std::uint32_t>(sizeof header + body.size());
    append(message, header);
    message.insert(message.end(), body.begin(), body.end());
    return {message.begin(), message.end()};  // of just that capacity, so that reading beyond it is seen
}

void forget(Table& table, std::uint64_t node, std::uint64_t count) {
    if (node == InodeState::root_node || !table.told.contains(node)) return;
    table.told[node] -= static_cast<std::int64_t>(std::min(count, std::uint64_t{1} << 40));
    if (table.told[node] <= 0) table.told.erase(node);
}

// Note the entries of a listing, which must be whole.
void note_entries(Table& table, std::uint32_t size) {
    const std::size_t begin = sizeof(fuse_out_header);
    if (last_reply.size() - begin > size) fail("a listing that is too large");
    for (std::size_t at = begin; at < last_reply.size();) {
        fuse_direntplus entry;
        constexpr std::size_t fixed = FUSE_NAME_OFFSET_DIRENTPLUS;
        if (last_reply.size() - at < fixed) fail("a listing that ends within an entry");
        std::memcpy(&entry, last_reply.data() + at, fixed);
        const std::string name(reinterpret_cast<const char*>(last_reply.data()) + at + fixed, entry.dirent.namelen);
        at += FUSE_DIRENT_ALIGN(fixed + name.size());
        if (at > last_reply.size()) fail("a listing that ends within a name");
        if (name != "." && name != ".." && !refuses) ++table.told[entry.entry_out.nodeid];
    }
}

// Note what the kernel makes of a request that was served.
void note(Table& table, const Message& message) {
    fuse_out_header header{};
    if (!last_reply.empty()) std::memcpy(&header, last_reply.data(), sizeof header);
    if (header.len != last_reply.size()) fail("a reply of another length");
    switch (message.header().opcode) {
        case FUSE_LOOKUP:
            if (header.error == 0 && !refuses) {
                fuse_entry_out out;
                std::memcpy(&out, last_reply.data() + sizeof header, sizeof out);
                if (out.nodeid != 0) ++table.told[out.nodeid];
            }
            break;
        case FUSE_OPEN:
            if (header.error != 0) fail("an error of an OPEN is Python's");
            if (!refuses) {
                fuse_open_out out;
                std::memcpy(&out, last_reply.data() + sizeof header, sizeof out);
                table.opened.push_back(out.fh);
            }
            break;
        case FUSE_CREATE:
            if (header.error == 0 && !refuses) {
                fuse_entry_out entry;
                fuse_open_out out;
                std::memcpy(&entry, last_reply.data() + sizeof header, sizeof entry);
                std::memcpy(&out, last_reply.data() + sizeof header + sizeof entry, sizeof out);
                ++table.told[entry.nodeid];
                table.opened.push_back(out.fh);
            }
            break;
        case FUSE_RELEASE:
            std::erase(table.opened, message.body_as<fuse_release_in>()->fh);
            break;
        case FUSE_READDIRPLUS:
            note_entries(table, message.body_as<fuse_read_in>()->size);
            break;
        case FUSE_FORGET:
            forget(table, message.header().nodeid, message.body_as<fuse_forget_in>()->nlookup);
            break;
        case FUSE_BATCH_FORGET:
            for (std::uint32_t at = 0; at < message.body_as<fuse_batch_forget_in>()->count; ++at) {
                fuse_forget_one one;
                std::memcpy(&one, message.body().data() + sizeof(fuse_batch_forget_in) + at * sizeof one, sizeof one);
                forget(table, one.nodeid, one.nlookup);
            }
            break;
        default:
            break;
    }
}

void act(Table& table, Input& input) {
    const std::uint64_t node = table.nodes[input.below(table.nodes.size())];
    InodeState* inode = table.find(node);
    table.listings.inline_calls = input.below(8) > 0;
    table.refuses_new = input.below(8) == 0;
    table.max_inodes = input.below(8) == 0 ? 3 : 100;
    table.wants_handles = input.below(2) == 0;
    if (inode == nullptr || node == InodeState::root_node) return;
    switch (input.below(7)) {
        case 6: inode->current = !inode->current; break;
        case 0: Table::park(*inode); break;
        case 1: inode->suspect = !inode->suspect; break;
        case 2:
            if (table.invalidating.erase(node) == 0) table.invalidating.insert(node);
            break;
        case 3: table.caches_absence = !table.caches_absence; break;
        case 4: inode->kernel->size_doubt = static_cast<std::int64_t>(input.below(2)); break;
        default: inode->kernel->dropped_for = input.below(2); break;
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const int device = open("/dev/null", O_RDWR);
    Channel channel(device, -1, 0);
    Table table;
    Metadata metadata(table);
    cleanfs::CacheState caches;
    OpenHandles handles(caches, table, metadata);
    NameChanges changes(table, metadata, handles);
    cleanfs::AttributeChanges attributes(caches, table, metadata);
    Directories directories(table, metadata);
    table.directories = &directories;
    const auto serve = [&](const Message& message) {
        switch (message.header().opcode) {
            case FUSE_OPEN: return handles.open(message, channel);
            case FUSE_RELEASE: return handles.release(message, channel);
            case FUSE_CREATE: return changes.create(message, channel);
            case FUSE_SETATTR: return attributes.set(message, channel);
            case FUSE_UNLINK: return changes.unlink(message, channel);
            default: return metadata.serve(message, channel) || directories.serve(message, channel);
        }
    };
    Input input(data, size);
    while (!input.ended()) {
        if (input.below(4) == 0) act(table, input);
        const std::vector<std::byte> bytes = make_message(input, table);
        const auto message = Message::parse(bytes);
        refuses = input.below(4) == 0;
        replies = 0;
        last_reply.clear();
        std::map<std::uint64_t, std::int64_t> doubts;
        for (const auto& [node, inode] : table.by_node) doubts[node] = inode->kernel->doubts;
        const bool served = serve(*message);
        if (replies != (served && message->has_reply() ? 1 : 0)) fail("a reply too few or too many");
        if (served) note(table, *message);
        if (handles.size() != table.opened.size() - 2 || table.open_fds != handles.size()) fail("another count of open files");
        std::size_t fds = 0, pins = 0;
        for (const auto& [node, inode] : table.by_node) {
            fds += inode->open_fds.size();
            if (inode->record != nullptr) pins += static_cast<std::size_t>(inode->record->pins);
        }
        if (fds != handles.size() || pins != handles.size()) fail("a file that was opened is not held");
        for (const auto& [node, inode] : table.by_node) {
            if (inode->nlookup != table.told[node]) fail("another count of references");
            const bool told = served && refuses && last_reply.size() > sizeof(fuse_out_header) && node == message->header().nodeid;
            if (message->header().opcode == FUSE_GETATTR && told && inode->kernel->doubts == doubts[node]) fail("no doubt after a refusal");
        }
    }
    return 0;
}

#ifndef LIBFUZZER
int main(int argc, char** argv) {
    fuzz("fuzz_metadata", argc, argv, 2048, 1024, [](Random& random) { return random.next(); });
}
#endif
