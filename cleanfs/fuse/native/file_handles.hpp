// NFS file handles of the source's files.
#pragma once

#include <optional>
#include <string>

namespace cleanfs {

// cleanfs.linux.syscalls.name_to_handle of an open file (O_PATH too): empty if the file system has none. None if that
// fails.
std::optional<std::string> handle_of(int fd);

}  // namespace cleanfs
