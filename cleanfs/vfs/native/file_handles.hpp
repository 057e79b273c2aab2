// NFS file handles of the source's files.
#pragma once

#include <fcntl.h>

#include <cerrno>
#include <cstdint>
#include <optional>
#include <string>

namespace cleanfs {

// cleanfs.linux.syscalls.name_to_handle of an open file (O_PATH too): empty if the file system has none. None and errno if
// that fails.
inline std::optional<std::string> handle_of(int fd) {
    alignas(file_handle) unsigned char bytes[sizeof(file_handle) + MAX_HANDLE_SZ];
    auto* handle = reinterpret_cast<file_handle*>(bytes);
    handle->handle_bytes = MAX_HANDLE_SZ;
    int mount_id;
    if (name_to_handle_at(fd, "", handle, &mount_id, AT_EMPTY_PATH) != 0) {
        const bool has_none = errno == EOPNOTSUPP || errno == EOVERFLOW || errno == ENOSYS || errno == EPERM;
        return has_none ? std::optional<std::string>("") : std::nullopt;
    }
    std::string found;
    const auto kind = static_cast<std::uint32_t>(handle->handle_type);
    for (int shift = 0; shift < 32; shift += 8) found.push_back(static_cast<char>(kind >> shift));  // little-endian
    return found.append(reinterpret_cast<const char*>(handle->f_handle), handle->handle_bytes);
}

}  // namespace cleanfs
