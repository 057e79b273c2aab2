#!/bin/bash
# A value of 4096 bytes, a page, costs 5.2 KB in redis; one 16 bytes smaller costs 4.2.
#
# redis 7.0.15 of Debian 12, with jemalloc. One expects a key and some 100 bytes of overhead for each page. The string has a
# header and a NUL, so 4096 bytes of data ask for more than 4096, and the next size class of jemalloc is 5120: a quarter of
# the memory is lost. So a cache of pages in redis pays to store a bit less than a page, or several in one value.
# MEMORY USAGE shows it; maxmemory counts it.
#
# Seen: "4096 bytes: 5222 bytes a key", "4080 bytes: 4189 bytes a key"
set -eu
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || true; wait; rm -rf "$work"' EXIT
cd "$work"
packages="redis-server redis-tools libhiredis0.14 libjemalloc2 liblua5.1-0 liblzf1 lua-bitop lua-cjson"
apt-get -q -o APT::Sandbox::User=root download $packages >apt.log 2>&1 || { cat apt.log >&2; exit 2; }
for package in *.deb; do dpkg -x "$package" root; done
export LD_LIBRARY_PATH=$(echo "$work"/root/usr/lib/*-linux-gnu)
root/usr/bin/redis-server --version | grep -q 'v=7\.0\..*malloc=jemalloc' || { echo "another redis" >&2; exit 1; }
root/usr/bin/redis-server --port 0 --unixsocket "$work/socket" --save '' --daemonize no >server.log &
server=$!
until [ -S socket ]; do kill -0 $server; sleep 0.1; done
redis() { root/usr/bin/redis-cli -s "$work/socket" "$@"; }
used() { redis info memory | tr -d '\r' | sed -n 's/^used_memory://p'; }

# Bytes that redis counts for each of 10,000 keys of 20 bytes with values of a size, the table of keys included.
each() {
    redis flushall >/dev/null
    local before=$(used)
    python3 -c '
import sys
size = int(sys.argv[1])
for number in range(10000):
    value = b"x" * size
    key = b"page:%015d" % number
    sys.stdout.buffer.write(b"*3\r\n$3\r\nSET\r\n$20\r\n%s\r\n$%d\r\n%s\r\n" % (key, size, value))
' "$1" | redis --pipe >/dev/null
    [ "$(redis dbsize)" = 10000 ]
    echo $((($(used) - before) / 10000))
}

page=$(each 4096) less=$(each 4080)
echo "4096 bytes: $page bytes a key"
echo "4080 bytes: $less bytes a key"
[ "$page" -gt 5100 ] && [ "$less" -lt 4400 ]
