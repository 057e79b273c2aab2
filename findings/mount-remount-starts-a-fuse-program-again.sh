#!/bin/bash
# mount(8) remounts a FUSE mount in three ways, and which one depends on how the mount is named. None is what one expects.
#
# util-linux 2.38.1, libfuse 3.14.0 (mount.fuse), bindfs 1.14.7, Linux 6.18, Debian 12, as root. bindfs stands for all file
# systems of libfuse. One expects "mount -o remount,ro MNT" to be one mount(2) with MS_REMOUNT, as for ext4.
#
# * By the mount point alone, without a line in fstab, mount(8) finds the type fuse.bindfs and runs the helper mount.fuse, which
#   starts bindfs once more with what the first mount has for options. libfuse refuses "relatime", which the kernel shows of every
#   mount that has it by default: the remount fails, and the mount stays writable.
# * By source and mount point the helper is left out, and the kernel does it. Only the options of the command line
#   count then: nosuid and nodev, which libfuse had set unasked, are gone.
# * With -i (no helper) by the mount point alone it works as expected, and keeps both.
#
# Seen: "by mount point: fuse: unknown option `relatime'", then the options of the mount: "rw,nosuid,nodev,relatime",
# "by source and mount point: ro,relatime", "with -i: ro,nosuid,nodev,relatime"
set -eu
if [ "${1-}" != inside ]; then
    exec unshare -m bash "$0" inside # what is mounted here goes with the namespace
fi
work=$(mktemp -d)
trap 'umount -n -l "$work/mnt" "$(readlink -f /sbin)" "$work/sbin" /usr/local/bin || true; umount -n -l /run; rm -rf "$work"' EXIT
mount -n -t tmpfs none /run # mount(8) keeps notes in /run/mount
for package in bindfs=1.14.7-1 fuse3=3.14.0-4 libfuse3-3=3.14.0-4; do
    (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$package" && dpkg -x ./"${package%%=*}"_*.deb root)
done
mount --version | grep -q 'util-linux 2\.38\.1'
library=$(dirname "$(find "$work/root" -name 'libfuse3.so.3')")
printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$library" "$work/root/usr/bin/bindfs" > "$work/bindfs"
chmod +x "$work/bindfs"
mkdir "$work/src" "$work/mnt" "$work/bin" "$work/sbin"
cp "$work/bindfs" "$work/bin/bindfs"
mount -n --bind "$work/bin" /usr/local/bin # where mount.fuse looks for programs
mount -n -t tmpfs none "$work/sbin"
mkdir "$work/sbin/upper" "$work/sbin/work"
mount -n -t overlay none -o "lowerdir=$(readlink -f /sbin),upperdir=$work/sbin/upper,workdir=$work/sbin/work" "$(readlink -f /sbin)"
rm -f /sbin/mount.fuse.bindfs
cp "$(find "$work/root" -name mount.fuse3)" /sbin/mount.fuse
options() {
    grep " $work/mnt " /proc/self/mountinfo | cut -d ' ' -f 6
}
again() {
    umount -n -l "$work/mnt" 2>/dev/null || true
    bindfs -o subtype=bindfs "$work/src" "$work/mnt"
}
again
by_mountpoint=$(mount -n -o remount,ro "$work/mnt" 2>&1 | grep unknown) || true
echo "by mount point: $by_mountpoint"
first=$(options)
echo "$first"
mount -n -o remount,ro "$work/src" "$work/mnt"
second=$(options)
echo "by source and mount point: $second"
again
mount -n -i -o remount,ro "$work/mnt"
third=$(options)
echo "with -i: $third"
[[ $by_mountpoint == *relatime* ]]
[ "$first" = rw,nosuid,nodev,relatime ]
[ "$second" = ro,relatime ]
[ "$third" = ro,nosuid,nodev,relatime ]
