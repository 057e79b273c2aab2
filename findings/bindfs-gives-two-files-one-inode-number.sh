#!/bin/sh
# bindfs over two file systems shows two files with one device and inode number, and tar loses one of them.
#
# A directory with other file systems mounted below it (a home with a data disk, a root file system) is one file
# system when it is seen through bindfs: one st_dev. POSIX says that st_dev and st_ino together name one file, and
# one expects a FUSE server to see to that, as its nodes have numbers of their own (libfuse's, which without use_ino
# are what stat shows; overlayfs and mergerfs go to some length for it). bindfs passes on the numbers of the file
# systems below, which are small and alike: tmpfs, ext4 and xfs all begin anew. Two files with hard links, one on
# each, then are links of one file to whoever goes by (st_dev, st_ino): GNU tar and cp -a write one and link the
# other to it, without a word. A cache that finds files by that pair gives one file's bytes for the other's.
#
# Takes root, FUSE and Debian's bindfs (1.14.7-1, with libfuse 3.14.0-4; installed if it is not there); tar 1.34,
# coreutils 9.1. Seen with Linux 6.18.44, Debian 12:
#   through bindfs: device and inode number of a/file and b/file are the same; they read "one" and "two"
#   extracted from tar's archive: b/file reads "one"; copied with cp -a: b/file reads "one"
set -eu

work=$(mktemp -d)
cleanup() {
    for name in bound below/a below/b; do umount -l "$work/$name" 2>/dev/null || :; done
    rm -rf --one-file-system "$work"
}
trap cleanup EXIT
mkdir -p "$work/below/a" "$work/below/b" "$work/bound" "$work/extracted"

command -v bindfs >/dev/null || apt-get install -y -qq bindfs=1.14.7-1 >/dev/null
echo "Linux $(uname -r), $(bindfs --version | head -n 1), $(tar --version | head -n 1)"
for pair in a:one b:two; do
    directory=$work/below/${pair%:*}
    mount -t tmpfs none "$directory"
    echo "${pair#*:}" >"$directory/file"
    ln "$directory/file" "$directory/link"
done
bindfs "$work/below" "$work/bound"
cd "$work/bound"

names=$(stat -c %d:%i a/file b/file | sort -u | wc -l)
below=$(stat -c %d:%i ../below/a/file ../below/b/file | sort -u | wc -l)
[ "$below" = 2 ] && [ "$names" = 1 ] && [ "$(cat a/file b/file | xargs)" = "one two" ]
echo 'through bindfs: device and inode number of a/file and b/file are the same; they read "one" and "two"'

tar cf - a b | tar xf - -C ../extracted
cp -a . ../copied
for how in extracted copied; do
    echo "$how: b/file reads \"$(cat "../$how/b/file")\""
    [ "$(cat "../$how/b/file")" = one ]
done
cd /
