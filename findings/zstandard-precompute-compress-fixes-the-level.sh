#!/bin/bash
# A dictionary of python-zstandard on which precompute_compress was called has one level for every later compressor.
#
# zstandard 0.25.0, Python 3.11. precompute_compress(level) is documented as a way to save work when a dictionary is
# used by several compressors. One expects a ZstdCompressor(level=19, dict_data=...) to compress at level 19 with it, or
# an error. It compresses at the precomputed level, without a word, whatever level it was made with.
#
# Seen, of pages of Python's own source: "levels 1 and 19: 97518 and 76295 bytes",
# "after precompute_compress(level=1): 97518 and 97518 bytes"
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install zstandard==0.25.0
"$work/venv/bin/python" - <<'EOF'
import pathlib
import sysconfig

import zstandard

sources = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
pages = []
for source in sources:
    data = source.read_bytes()
    pages += [data[at : at + 4096] for at in range(0, len(data), 4096)]
trained = zstandard.train_dictionary(64 << 10, pages[::8]).as_bytes()


def total(dictionary, level):
    compressor = zstandard.ZstdCompressor(level=level, dict_data=dictionary)
    return sum(len(compressor.compress(page)) for page in pages[1::16])


plain = zstandard.ZstdCompressionDict(trained)
low, high = total(plain, 1), total(plain, 19)
precomputed = zstandard.ZstdCompressionDict(trained)
precomputed.precompute_compress(level=1)
low_then, high_then = total(precomputed, 1), total(precomputed, 19)
print(f"levels 1 and 19: {low} and {high} bytes")
print(f"after precompute_compress(level=1): {low_then} and {high_then} bytes")
assert high < low * 0.97
assert low_then == high_then > high
EOF
