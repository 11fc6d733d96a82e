"""Pictures that are torn, lie or explode, and what is no picture: one sentence each, and nothing else happens."""

import io
import os
import resource
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from longllava.errors import InputError
from longllava.inputs import image as image_module
from longllava.inputs.image import open_image, upright_size
from tests.inputs.pictures import encoded, picture


def test_every_cut_of_every_format_is_an_error():
    """A torn file never comes back as a half-grey picture."""
    image = picture(40, 30)
    for kind in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"):
        data = encoded(image, kind)
        for cut in [*range(0, len(data) - 64, 64), len(data) * 9 // 10]:
            with pytest.raises(InputError, match=r"broken picture|known format|cannot be read"):
                open_image(data[:cut])


@settings(max_examples=150)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]), st.integers(0, 10**6), st.integers(1, 255))
def test_flipped_bytes_give_a_picture_or_one_error(kind, position, flip):
    data = bytearray(encoded(picture(20, 10), kind))
    data[position % len(data)] ^= flip
    try:
        assert open_image(bytes(data)).mode == "RGB"
    except InputError as error:
        assert "0x" not in str(error)


def test_a_png_with_a_wrong_checksum_is_no_picture():
    """Its pixels decode, to others; its size is known all the same."""
    data = encoded(Image.linear_gradient("L").resize((40, 30)), compress_level=0)
    at = data.index(b"IDAT") + 4
    length = int.from_bytes(data[at - 8 : at - 4], "big")
    rows = bytearray(zlib.decompress(data[at : at + length]))
    rows[300] ^= 64
    other = zlib.compress(rows, 0)
    assert len(other) == length
    broken = data[:at] + other + data[at + length :]
    assert Image.open(io.BytesIO(broken)).convert("L").size == (40, 30)
    with pytest.raises(InputError, match="broken picture"):
        open_image(broken)
    assert upright_size(broken) == (40, 30)


def bomb(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (b"", "not a picture of a known format"),
        (b"%!PS-Adobe-3.0 EPSF", "not a picture of a known format; allowed: JPEG, PNG"),
        (bomb(50_000, 50_000), "89,478,485"),
        (bomb(9_500, 9_500), "89,478,485"),
        (encoded(Image.new("1", (1, 201))), "over 200 times the other"),
        ("missing.png", "no such file"),
        ("/", "not a regular file"),
        ("https://example.org/a.png", "not downloaded"),
        (7, "got int"),
        (np.zeros((2, 2), np.uint8), r"expected uint8 of shape \(H, W, 3\)"),
        (np.zeros((2, 2, 3), np.float32), "array float32"),
        (np.zeros((0, 2, 3), np.uint8), "it is empty"),
    ],
)
def test_bad_pictures_get_a_sentence(source, sentence):
    with pytest.raises(InputError, match=sentence):
        open_image(source)


def test_no_parser_of_another_format_is_entered(monkeypatch):
    """EPS runs Ghostscript, others hold pictures of theirs: none of them is asked what a file is."""
    Image.init()
    asked = []
    for name, (_, accept) in list(Image.OPEN.items()):
        if name not in image_module.FORMATS:
            monkeypatch.setitem(Image.OPEN, name, (lambda *_, name=name: asked.append(name), accept))
    for name in ("ICO", "JPEG2000", "PPM", "TGA", "PCX", "DDS", "ICNS", "SGI"):
        with pytest.raises(InputError, match="not a picture of a known format"):
            open_image(encoded(Image.new("RGB", (16, 16)), kind=name))
    assert not asked and len(Image.OPEN) > 20


def test_bombs_beside_the_pixels():
    """Text that unpacks to 64 MB, and a GIF's frame far beyond its picture."""
    text = zlib.compress(b"a" * (64 << 20), 9)
    chunk = b"zTXta\0\0" + text
    data = encoded(Image.new("RGB", (8, 8)))
    bomb = data[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="broken picture: .*(TEXT_CHUNK|[Tt]ext)"):
        open_image(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10
    gif = bytearray(encoded(Image.new("P", (8, 8)), kind="GIF"))
    at = gif.index(b",\0\0\0\0\x08\0\x08\0")
    gif[at + 5 : at + 9] = struct.pack("<HH", 60_000, 60_000)
    with pytest.raises(InputError):
        open_image(bytes(gif))


def test_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        open_image(tmp_path / "pipe")
