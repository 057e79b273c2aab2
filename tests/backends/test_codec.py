"""Every page codec restores the page that it compressed, and wrong names are refused with a message."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleanfs.backends.codec import Codec, CorruptError, lz4_compressor, lz4_decompressor, parse
from tests.backends.pages import noise, text

GOOD = ["lz4", "lz4:1", "lz4:17", "lz4:65537", "lz4hc", "lz4hc:1", "lz4hc:12"]


@pytest.mark.parametrize("spec", GOOD)
@pytest.mark.parametrize("page_size", [4096, 1 << 20])
def test_a_page_survives_the_round_trip(spec: str, page_size: int) -> None:
    compress = lz4_compressor(parse(spec))
    decompress = lz4_decompressor(page_size)
    for page in (bytes(page_size), text("x", page_size), noise(1, page_size)):
        assert decompress(compress(page)) == page


@given(st.sampled_from(GOOD), st.binary(min_size=64, max_size=64), st.integers(0, 4032))
def test_any_page_survives_the_round_trip(spec: str, part: bytes, start: int) -> None:
    page = (bytes(start) + part).ljust(4096, part[:1])
    assert lz4_decompressor(4096)(lz4_compressor(parse(spec))(page)) == page


def test_acceleration_and_level_reach_the_compressor() -> None:
    page = b"".join(b"%d:%d " % (i, i * i) for i in range(2000))[:4096]
    sizes = {spec: len(lz4_compressor(parse(spec))(page)) for spec in ("lz4:65537", "lz4", "lz4hc:12")}
    assert sizes["lz4:65537"] > sizes["lz4"] > sizes["lz4hc:12"]


@pytest.mark.parametrize("spec", ["lz4", "lz4hc"])
def test_the_default_parameters_are_1_and_9(spec: str) -> None:
    page = b"".join(b"%d:%d " % (i, i * i) for i in range(2000))[:4096]
    explicit = {"lz4": "lz4:1", "lz4hc": "lz4hc:9"}[spec]
    assert lz4_compressor(parse(spec))(page) == lz4_compressor(parse(explicit))(page)


def test_zpages_carry_no_size_header() -> None:
    assert len(lz4_compressor(parse("lz4"))(bytes(4096))) < 30


@pytest.mark.parametrize("zpage", [b"", b"\xff" * 10, lz4_compressor(parse("lz4"))(bytes(8192))])
def test_bytes_not_made_by_a_compressor_are_corrupt(zpage: bytes) -> None:
    with pytest.raises(CorruptError):
        lz4_decompressor(4096)(zpage)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "LZ4",
        "lz4 ",
        "lz4:",
        "lz4:0",
        "lz4:65538",
        "lz4:-1",
        "lz4:x",
        "lz4:1.5",
        "lz4:1:2",
        "lz4hc:",
        "lz4hc:0",
        "lz4hc:13",
        ":1",
        "lz4+dict",
        "lz4hc:9+dict",
        "none:0",
        "none:1",
        "none+dict",
        "zstd:",
        "zstd:0",
        "zstd:20",
        "zstd:-1",
        "zstd:x",
        "zstd+",
        "zstd+dictionary",
        "zstd+dict+dict",
        "zstd+dict:3",
        "zstd:\u0663",
    ],
)
def test_a_bad_name_is_refused_and_named(spec: str) -> None:
    with pytest.raises(ValueError, match="compression") as caught:
        parse(spec)
    assert repr(spec) in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "method", "level", "dictionary"),
    [
        ("lz4", "lz4", 1, False),
        ("lz4:65537", "lz4", 65537, False),
        ("lz4hc", "lz4hc", 9, False),
        ("zstd", "zstd", 3, False),
        ("zstd:19", "zstd", 19, False),
        ("zstd+dict", "zstd", 3, True),
        ("zstd:7+dict", "zstd", 7, True),
        ("none", "none", 0, False),
    ],
)
def test_a_name_says_method_level_and_dictionary(
    spec: str, method: str, level: int, dictionary: bool
) -> None:
    assert parse(spec) == Codec(spec, method, level, dictionary)


@pytest.mark.parametrize("spec", ["zstd", "zstd:3+dict", "none"])
def test_codecs_of_the_native_engine_are_refused_in_python(spec: str) -> None:
    with pytest.raises(ValueError, match="native"):
        lz4_compressor(parse(spec))
