"""Choose the examples of bad input: the same in every run, or many others.

``CLEANFS_FUZZ=N`` tries N times as many, chosen by ``--hypothesis-seed`` (``scripts/run check/fuzz``).
"""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FACTOR = int(os.environ.get("CLEANFS_FUZZ", "0"))


def examples(count: int, steps: int = 20) -> settings:
    """Make settings for ``count`` examples, or FACTOR times as many; ``steps`` of a state machine."""
    return settings(
        max_examples=count * max(FACTOR, 1),
        stateful_step_count=steps,
        derandomize=not FACTOR,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )


NUMBERS = st.sampled_from((
    "", "0", "1", "-1", "+1", "-0", "00", "007", "0x10", "1e9", "1e999999999", "1E-999999999", "1_000",
    "1,000", "0.5", ".5", "5.", ".", "..", "nan", "-nan", "inf", "-inf", "1/2", "\u0663",
    "\uff11\uff12", "\u00b2", "\u00bd", "\u2167",
    "4095", "4096", "4097", "65536", "1048575", "1048576", "4611686018427387904", "4611686018427387905",
    "9223372036854775807", "9223372036854775808", "18446744073709551616", "9" * 400, "9" * 5000,
    "0" * 5000, "1.0000000000000000000000000001",
))  # fmt: skip

UNITS = st.sampled_from((
    "", "b", "B", "k", "K", "KB", "kb", "Kib", "KiB", "kIb", "m", "M", "MiB", "G", "T", "P", "E", "EiB",
    "Z", "Y", "Q", "bit", "Byte", "Bytes", "X", "i", "iB", "%", "s", "ms", "\u212a", "\uff2d",
))  # fmt: skip

BLANKS = st.sampled_from(("", "", "", " ", "\t", "\n", "\u00a0", "\u2003", "\x1c", "\0", "  ", "\r"))

SIZES = st.one_of(
    st.tuples(BLANKS, NUMBERS, BLANKS, UNITS, BLANKS).map("".join),
    st.tuples(st.integers(-3, 1 << 64).map(str), UNITS).map("".join),
    st.text(max_size=20),
)
"""Texts that are sizes, nearly sizes, and anything."""

ARGUMENTS = st.text(st.characters(exclude_categories=(), exclude_characters="\0"), max_size=30).filter(
    lambda text: not any("\ud800" <= c <= "\udc7f" or "\udd00" <= c <= "\udfff" for c in text)
)
"""Arguments of a program: without NUL, and with bytes outside UTF-8 as surrogates."""
