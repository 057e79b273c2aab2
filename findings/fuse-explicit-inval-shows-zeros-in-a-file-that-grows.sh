#!/usr/bin/env bash
# With FUSE_EXPLICIT_INVAL_DATA a file that grows on the server is read with zeros in place of its new bytes.
#
# One expects of "do not drop pages by yourself" that old bytes stay; not that bytes appear that the file
# never had. When a reply tells of a larger size, Linux only cuts its pages to it (truncate_pagecache), which
# keeps the page that held the old end. Behind that end it has zeros, and these are now inside the file.
# The server has to drop that page (FUSE_NOTIFY_INVAL_INODE) before it tells of the size, not after.
# With the default (FUSE_AUTO_INVAL_DATA) the same reply drops all pages, and the bytes are right.
#
# Needs Debian's libfuse3-dev, pkg-config, gcc and fuse3, and /dev/fuse. Ends with 1 if it is otherwise.
# Seen on Linux 6.18.44 with libfuse 3.14.0:
#   auto: 100 old, 100 new
#   explicit: 100 old, 100 zeros
set -euo pipefail
top=$(mktemp -d)
trap 'fusermount3 -uq "$top/m" || true; rm -rf "$top"' EXIT
dpkg -s libfuse3-dev fuse3 gcc pkg-config >/dev/null 2>&1 ||
    apt-get install -y -qq libfuse3-dev fuse3 gcc pkg-config >/dev/null
mkdir "$top/m"
cat >"$top/grow.c" <<'C'
#define FUSE_USE_VERSION 34
#include <fuse_lowlevel.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
static char data[200];
static off_t size = 100;          /* 200 once somebody has looked up "grow" */
static int explicit_inval;
static void attributes(fuse_ino_t ino, struct stat *st) {
    memset(st, 0, sizeof *st);
    st->st_ino = ino;
    st->st_nlink = 1;
    st->st_mode = ino == 1 ? S_IFDIR | 0755 : S_IFREG | 0644;
    st->st_size = ino == 1 ? 0 : size;
    st->st_mtime = size;
}
static void init(void *user, struct fuse_conn_info *conn) {
    (void)user;
    if (explicit_inval) {
        conn->want &= ~FUSE_CAP_AUTO_INVAL_DATA;
        conn->want |= FUSE_CAP_EXPLICIT_INVAL_DATA;
    }
}
static void lookup(fuse_req_t req, fuse_ino_t parent, const char *name) {
    (void)parent;
    if (!strcmp(name, "grow"))
        size = 200;
    if (strcmp(name, "f")) {
        fuse_reply_err(req, ENOENT);
        return;
    }
    struct fuse_entry_param e = {.ino = 2};
    attributes(2, &e.attr);
    fuse_reply_entry(req, &e);
}
static void getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi) {
    struct stat st;
    (void)fi;
    attributes(ino, &st);
    fuse_reply_attr(req, &st, 0);
}
static void open_file(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi) {
    (void)ino;
    fi->keep_cache = 1;
    fuse_reply_open(req, fi);
}
static void read_file(fuse_req_t req, fuse_ino_t ino, size_t n, off_t at, struct fuse_file_info *fi) {
    (void)ino;
    (void)fi;
    if (at >= size)
        fuse_reply_buf(req, NULL, 0);
    else
        fuse_reply_buf(req, data + at, (off_t)n > size - at ? (size_t)(size - at) : n);
}
int main(int argc, char **argv) {
    struct fuse_lowlevel_ops ops = {
        .init = init, .lookup = lookup, .getattr = getattr, .open = open_file, .read = read_file};
    char *arguments[] = {argv[0], NULL};
    struct fuse_args args = FUSE_ARGS_INIT(1, arguments);
    if (argc != 3)
        return 2;
    explicit_inval = !strcmp(argv[2], "explicit");
    memset(data, 'o', 100);
    memset(data + 100, 'n', 100);
    struct fuse_session *se = fuse_session_new(&args, &ops, sizeof ops, NULL);
    if (!se || fuse_session_mount(se, argv[1]))
        return 1;
    int status = fuse_session_loop(se);
    fuse_session_unmount(se);
    fuse_session_destroy(se);
    return !!status;
}
C
# shellcheck disable=SC2046  # flags are words
gcc -o "$top/grow" "$top/grow.c" $(pkg-config --cflags --libs fuse3)
look='
import os, sys
fd = os.open(sys.argv[1] + "/f", os.O_RDONLY)
assert os.pread(fd, 1000, 0) == b"o" * 100
try:
    os.stat(sys.argv[1] + "/grow")
except FileNotFoundError:
    pass
assert os.fstat(fd).st_size == 200
data = os.pread(fd, 1000, 0)
kinds = {b"o"[0]: "old", b"n"[0]: "new", 0: "zeros"}
print(", ".join(f"{data.count(byte)} {name}" for byte, name in kinds.items() if byte in data))
'
for mode in auto explicit; do
    "$top/grow" "$top/m" "$mode" &
    server=$!
    for _ in $(seq 100); do mountpoint -q "$top/m" && break; sleep 0.1; done
    seen=$(timeout 20 python3 -c "$look" "$top/m")
    fusermount3 -u "$top/m"
    wait "$server"
    echo "$mode: $seen"
    case $mode in auto) expected="100 old, 100 new" ;; explicit) expected="100 old, 100 zeros" ;; esac
    [ "$seen" = "$expected" ] || { echo "expected: $expected" >&2; exit 1; }
done
