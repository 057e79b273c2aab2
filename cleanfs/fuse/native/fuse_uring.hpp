// FUSE over io_uring as Linux 6.14 defines it (include/uapi/linux/fuse.h), newer than some headers.
#pragma once

#include <cstdint>

namespace cleanfs {

// In FUSE_INIT's `flags2`: FUSE_OVER_IO_URING, 1 << 41 of all 64 bits.
constexpr std::uint32_t fuse_over_io_uring_flags2 = 1u << 9;

// Sizes of the buffers for a fuse_in_header or fuse_out_header, and for the struct of an operation.
constexpr std::size_t fuse_uring_in_out_header_size = 128, fuse_uring_op_in_size = 128;

struct fuse_uring_ent_in_out {
    std::uint64_t flags;
    std::uint64_t commit_id;
    std::uint32_t payload_sz;
    std::uint32_t padding;
    std::uint64_t reserved;
};

struct fuse_uring_req_header {
    char in_out[fuse_uring_in_out_header_size];
    char op_in[fuse_uring_op_in_size];
    fuse_uring_ent_in_out ring_ent_in_out;
};
static_assert(sizeof(fuse_uring_req_header) == 288);

enum fuse_uring_cmd : std::uint32_t {
    FUSE_IO_URING_CMD_REGISTER = 1,
    FUSE_IO_URING_CMD_COMMIT_AND_FETCH = 2,
};

// In the second half of a submission queue entry of 128 bytes.
struct fuse_uring_cmd_req {
    std::uint64_t flags;
    std::uint64_t commit_id;
    std::uint16_t qid;
    std::uint8_t padding[6];
};
static_assert(sizeof(fuse_uring_cmd_req) == 24);

}  // namespace cleanfs
