#!/bin/sh
# A FUSE connection's number in fusectl is given to the next mount at once.
#
# /sys/fs/fuse/connections/N is what a supervisor writes to when a FUSE server hangs ("echo 1 > N/abort").
# N looks like a counter, as the libfuse and kernel documents show ever new ones. It is the minor number of
# the superblock's anonymous device, and the lowest that is free: a mount that goes and another one that
# comes, of whatever server, share it, and so does any other file system without a device. A supervisor
# that remembers N and writes a moment late severs a mount that was not there when it looked: its users
# get "Transport endpoint is not connected", and its server ends. An abort file that was *opened* while the
# first mount was there stays that mount's: a late write to it does nothing. So open the file early, or
# compare its inode number, which is never the same again.
#
# Takes root, FUSE and Debian's bindfs (1.14.7-1, with libfuse 3.14.0-4; installed if it is not there).
# Seen with Linux 6.18.44, Debian 12:
#   first mount: connection 39; second mount, after the first was unmounted: connection 39
#   a write to the abort file that was opened before: the second mount answers
#   a write to the abort file of the remembered number: Transport endpoint is not connected
set -eu

work=$(mktemp -d)
cleanup() {
    exec 3>&- 4>&-
    for name in second first control; do umount -l "$work/$name" 2>/dev/null || :; done
    rmdir "$work"/* "$work"
}
trap cleanup EXIT
mkdir "$work/source" "$work/first" "$work/second" "$work/control"

command -v bindfs >/dev/null || apt-get install -y -qq bindfs=1.14.7-1 >/dev/null
echo "Linux $(uname -r), $(bindfs --version | head -n 1)"
mount -t fusectl none "$work/control"

number() { # of the connection of a mount point
    stat -c %d "$1" | { read -r device; echo $((device & 0xff | device >> 12 & 0xfff00)); }
}

# Another mount of this machine may take the number in between: so more than one try.
for try in 1 2 3 4 5 6 7 8 9 10; do
    bindfs "$work/source" "$work/first"
    first=$(number "$work/first")
    exec 3>"$work/control/$first/abort"
    umount "$work/first"
    bindfs "$work/source" "$work/second"
    second=$(number "$work/second")
    [ "$first" != "$second" ] || break
    umount "$work/second"
done
echo "first mount: connection $first; second mount, after the first was unmounted: connection $second"
[ "$first" = "$second" ]

echo 1 >&3 || :
ls "$work/second" >/dev/null
echo "a write to the abort file that was opened before: the second mount answers"

echo 1 >"$work/control/$first/abort"
if said=$(LC_ALL=C ls "$work/second" 2>&1); then
    echo "the second mount answers still: the behaviour has changed"
    exit 1
fi
echo "a write to the abort file of the remembered number: ${said##*: }"
case $said in *"not connected"*) ;; *) exit 1 ;; esac
