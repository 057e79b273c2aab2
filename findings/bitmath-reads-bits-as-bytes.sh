#!/bin/bash
# bitmath's lenient parser reads sizes in bits as bytes, eight times as much, but for one unit: `b` itself.
#
# bitmath 2.1.1, Python 3.11. The package tells bits from bytes by the case of the last letter, and its strict parser
# reads "8Mb" as Mb(8), which is 1 MB. With strict=False, meant for what people type ("8M", "8 mb"), one expects an
# explicit "Mib" to stay bits, or to be refused. It is 8 MiB. Only "8b" is Bit(8), so a guard such as
# isinstance(parsed, bitmath.Bit) finds that and nothing else.
#
# Seen: "strict '8Mb': 1000000 bytes", "strict '8Mib': 1048576 bytes", "lenient '8Mb', '8Mib', '8MiB': 8388608 bytes each",
# "lenient '8b': 1 bytes"
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install bitmath==2.1.1
"$work/venv/bin/python" - <<'EOF'
import bitmath


def strict(text):
    return bitmath.parse_string(text).bytes


def lenient(text):
    return bitmath.parse_string(text, strict=False, system=bitmath.NIST).bytes


print(f"strict '8Mb': {strict('8Mb'):.0f} bytes")
print(f"strict '8Mib': {strict('8Mib'):.0f} bytes")
[each] = {lenient(text) for text in ("8Mb", "8Mib", "8MiB")}
print(f"lenient '8Mb', '8Mib', '8MiB': {each:.0f} bytes each")
print(f"lenient '8b': {lenient('8b'):.0f} bytes")
assert (strict("8Mb"), strict("8Mib"), each, lenient("8b")) == (1_000_000, 1 << 20, 8 << 20, 1)
assert not isinstance(bitmath.parse_string("8Mib", strict=False, system=bitmath.NIST), bitmath.Bit)
EOF
