"""Pictures of every mode, opened and fitted. Expected pixels are worked out by hand."""

import io
import re
import resource
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from longllava.errors import InputError
from longllava.inputs import image as image_module
from longllava.inputs.colour import rgb
from longllava.inputs.image import named, open_image, square, square_pixels, upright_size
from longllava.inputs.media import listed
from longllava.inputs.processor import Processor
from tests.inputs.pictures import chunk, encoded, picture, pixels
from tests.tiny import tiny_config, tiny_tokenizer

MEAN = (0.5, 0.25, 0.75)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_their_pixels(kind, tmp_path):
    image = picture()
    data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    (tmp_path / "a").write_bytes(data)
    for source in (data, bytearray(data), tmp_path / "a", str(tmp_path / "a"), image, np.asarray(image)):
        assert np.array_equal(pixels(source), np.asarray(image))


def test_open_files_are_read_from_their_beginning_as_often_as_asked(tmp_path):
    (tmp_path / "a").write_bytes(data := encoded(picture(), "PNG"))
    with (tmp_path / "a").open("rb") as file:
        for source in (file, io.BytesIO(data)):
            source.seek(9)
            assert listed(source) == [source] and listed([source]) == [source]
            assert upright_size(source) == picture().size
            for _ in range(2):
                assert np.array_equal(pixels(source), np.asarray(picture()))
    with pytest.raises(InputError, match="cannot be read from its beginning: seek of closed file; give its bytes"):
        open_image(file)
    with (tmp_path / "a").open(encoding="latin-1") as text:
        with pytest.raises(InputError, match="a file opened as text; open it with 'rb'"):
            open_image(text)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_pictures_upright(kind, orientation):
    """TIFF is turned by Pillow itself, and must not be turned twice."""
    image = picture() if kind != "JPEG" else picture().resize((48, 32))
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    turned = image.transpose(Image.Transpose[undo[orientation]]) if orientation > 1 else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(turned, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert upright_size(data) == image.size
    difference = np.abs(pixels(data).astype(int) - np.asarray(image))
    assert difference.max() == 0 if kind != "JPEG" else difference.mean() < 10  # turned wrongly: above 40


def test_alpha_lies_on_white():
    rgba = Image.fromarray(np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [0, 0, 0, 51]]], np.uint8))
    assert pixels(encoded(rgba)).tolist() == [[[200, 100, 0], [255, 255, 255], [204, 204, 204]]]
    grey = Image.fromarray(np.array([[[80, 255], [80, 0]]], np.uint8), "LA")
    assert pixels(encoded(grey)).tolist() == [[[80] * 3, [255] * 3]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert pixels(encoded(palette, transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8))
    assert pixels(encoded(keyed, transparency=(1, 2, 3))).tolist() == [[[255] * 3, [9] * 3]]


def test_alpha_that_no_band_holds_lies_on_white():
    """In the colours of a palette, multiplied into grey, or as the one value of 16 bits that is transparent."""
    rgba = Image.fromarray(np.array([[[200, 100, 0, 255], [0, 0, 0, 0]]], np.uint8))
    assert np.array(rgb(rgba.quantize())).tolist() == [[[200, 100, 0], [255] * 3]]
    grey = Image.fromarray(np.array([[[80, 255], [80, 0]]], np.uint8), "LA")
    assert np.array(rgb(grey.convert("La"))).tolist() == [[[80] * 3, [255] * 3]]
    keyed = encoded(Image.fromarray(np.array([[257, 514]], np.uint16)))
    chunk = b"tRNS" + (257).to_bytes(2, "big")
    at = keyed.index(b"IDAT") - 4
    data = keyed[:at] + (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + keyed[at:]
    assert pixels(data).tolist() == [[[255] * 3, [2] * 3]]


@pytest.mark.parametrize(
    ("bits", "colour", "row", "key", "expected"),
    [
        (2, 0, b"\x1b", (1,), [[0] * 3, [255] * 3, [170] * 3, [255] * 3]),
        (4, 0, b"\x12", (1,), [[255] * 3, [34] * 3]),
        (4, 0, b"\x12", (999,), [[17] * 3, [34] * 3]),
        (16, 2, bytes(range(12)), (0x0001, 0x0203, 0x0405), [[255] * 3, [6, 8, 10]]),
        (16, 2, bytes(range(12)), (0x00FF, 0x02FF, 0x04FF), [[255] * 3, [6, 8, 10]]),  # the lower 8 are not read
        (16, 2, bytes(range(12)), (6, 8, 10), [[0, 2, 4], [6, 8, 10]]),
    ],
)
def test_a_colour_that_stands_for_nothing_is_white_at_any_depth(bits, colour, row, key, expected):
    width = len(row) * 8 // (bits * (3 if colour else 1))
    header = width.to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([bits, colour, 0, 0, 0])
    transparent = b"".join(value.to_bytes(2, "big") for value in key)
    chunks = {b"IHDR": header, b"tRNS": transparent, b"IDAT": zlib.compress(b"\0" + row), b"IEND": b""}
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks.items())
    for source in (data, Image.open(io.BytesIO(data))):
        assert pixels(source).tolist() == [expected]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    deep = Image.fromarray(np.array([[0, 128 * 257, 65535]], np.uint16))
    assert pixels(encoded(deep, kind))[0, :, 0].tolist() == [0, 128, 255]


def test_float_pictures():
    assert pixels(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)))[0, :, 1].tolist() == [0, 128, 255]
    assert pixels(Image.fromarray(np.array([[0, 7, 255]], np.float32)))[0, :, 1].tolist() == [0, 7, 255]
    for bad in (np.nan, np.inf, -1, 256):
        with pytest.raises(InputError, match="NaN|pixels from"):
            open_image(Image.fromarray(np.array([[0, bad]], np.float32)))


def test_other_modes_become_rgb():
    assert pixels(Image.new("1", (2, 2), 1)).tolist() == [[[255] * 3] * 2] * 2
    assert pixels(Image.new("CMYK", (1, 1), (255, 0, 0, 0))).tolist() == [[[0, 255, 255]]]


def test_the_first_frame_of_a_gif():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        data = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        with pytest.warns(
            UserWarning, match=f"of a {kind} with several pictures the first is read; give it as a video"
        ):
            assert pixels(data)[0, 0].tolist() == [255, 0, 0]
        with Image.open(io.BytesIO(data)) as image:  # without a warning: it was chosen
            image.seek(1)
            assert pixels(image)[0, 0].tolist() == [0, 0, 255]


def test_a_warning_names_the_file(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    (tmp_path / "a.gif").write_bytes(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    for source in (tmp_path / "a.gif", str(tmp_path / "a.gif")):
        with pytest.warns(UserWarning, match=f"^{re.escape(str(source))}: of a GIF with several pictures the first"):
            open_image(source)
    with pytest.warns(UserWarning, match="^of a GIF with"):
        open_image((tmp_path / "a.gif").read_bytes())


def test_sources_stay_untouched():
    image, array = picture(), np.asarray(picture())
    for source in (image, array):
        opened = open_image(source)
        opened.paste((1, 2, 3), (0, 0, 6, 4))
    assert np.array_equal(np.asarray(image), np.asarray(picture()))
    lazy = Image.open(io.BytesIO(encoded(picture(1024, 512), "JPEG")))
    open_image(lazy, wanted_side=96)
    assert lazy.size == (1024, 512)  # not drafted, which would have changed the caller's
    read_only = np.asarray(picture())
    read_only.setflags(write=False)
    assert np.array_equal(pixels(read_only[:, ::-1]), read_only[:, ::-1])


def test_pictures_opened_by_the_caller_are_read_as_files_are():
    """Not loaded yet: torn ones are one sentence, and one picture in several threads is read once."""
    data = encoded(picture(1024, 512), "JPEG")
    with pytest.raises(InputError, match="broken picture: image file is truncated"):
        open_image(Image.open(io.BytesIO(data[: len(data) // 2])))
    lazy = Image.open(io.BytesIO(data))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(open_image, [lazy] * 16))
    assert all(np.array_equal(np.asarray(result), pixels(data)) for result in results)


def test_one_picture_in_several_threads_is_turned_in_all_of_them(monkeypatch):
    """Pillow takes a tag out of what it has read when it is first asked for it; who asks meanwhile finds none."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(io.BytesIO(encoded(picture(), "JPEG", exif=exif)))
    read, pauses = ImageFileDirectory_v2.__getitem__, cycle((0.1, 0.3))
    monkeypatch.setattr(ImageFileDirectory_v2, "__getitem__", lambda *call: (time.sleep(next(pauses)), read(*call))[1])
    with ThreadPoolExecutor(2) as pool:
        sizes = {opened.size for opened in pool.map(open_image, [turned] * 2)}
    assert sizes == {picture().size[::-1]}


def test_a_name_too_long_for_a_file_is_a_reference_or_a_missing_file():
    image = Image.new("RGB", (4, 4), (9, 8, 7))
    assert open_image("world:" + "7" * 300, open_reference=lambda text: image).size == (4, 4)
    with pytest.raises(InputError, match="no such file"):
        open_image("7" * 300)


def test_references_go_through_the_callable(tmp_path):
    image = picture()
    assert np.array_equal(np.asarray(open_image("world:7", open_reference=lambda text: image)), np.asarray(image))
    with pytest.raises(InputError, match="no such file"):
        open_image("world:7")


def fitted(image, side):
    return square(image, side, MEAN).permute(1, 2, 0).numpy()


def test_fit_pads_with_the_mean_colour():
    out = fitted(Image.new("RGB", (8, 4), (10, 20, 30)), 8)
    assert out.shape == (8, 8, 3)
    assert (out[2:6] == (10, 20, 30)).all() and (out[:2] == (127, 63, 191)).all() and (out[6:] == (127, 63, 191)).all()


@given(st.integers(1, 90), st.integers(1, 90))
def test_any_size_fits(width, height):
    tensor = square_pixels(Image.new("RGB", (width, height)), 16, MEAN)
    assert tuple(tensor.shape) == (3, 16, 16)


@example(11, 10, 18)  # one value of 972
@example(3, 3, 39)  # two of 4,563
@given(st.integers(1, 90), st.integers(1, 90), st.integers(8, 40))
def test_fitting_is_padding_then_resizing(width, height, side):
    """LLaVA's expand2square and a bicubic resize: to one level if wide, but for a value or two where both passes round
    the other way (16 of some 7,000 sizes), on average if tall (noise overshoots most)."""
    image, long = picture(width, height), max(width, height)
    padded = Image.new("RGB", (long, long), (127, 63, 191))
    padded.paste(image, ((long - width) // 2, (long - height) // 2))
    expected = np.asarray(padded.resize((side, side), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(fitted(image, side).astype(int) - expected)
    if width < height:
        assert difference.mean() < 1
    else:
        assert difference.max() <= 2 and np.count_nonzero(difference > 1) <= 2


def test_a_long_strip_needs_no_square_of_its_length():
    """40,000 x 250 pixels either way, of which the padded square would hold 4.8 GB."""
    for size in ((40_000, 250), (250, 40_000)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KB
        out = fitted(Image.new("RGB", size, (10, 20, 30)), 336)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
        out = out if size[0] > size[1] else out.transpose(1, 0, 2)
        assert (out[[*range(164), *range(172, 336)]] == (127, 63, 191)).all()
        assert np.abs(out[[167, 168]].astype(int) - (10, 20, 30)).max() < 20  # 2.1 pixels high


@pytest.mark.parametrize("size", [(50, 37), (37, 50)])
def test_slabs_are_the_whole(size, monkeypatch):
    whole = fitted(picture(*size), 16).astype(int)
    monkeypatch.setattr(image_module, "SLAB", 200)
    assert np.abs(fitted(picture(*size), 16) - whole).max() <= 1  # 0 with AVX2


def test_big_jpegs_are_decoded_small():
    """DCT-scaled decoding: what comes back is at least 1.5 times the wanted side, and far below the whole."""
    data = encoded(Image.linear_gradient("L").resize((1024, 512)).convert("RGB"), "JPEG")
    small = open_image(data, wanted_side=96)
    assert small.size == (256, 128)
    full = fitted(open_image(data), 96).astype(int)
    assert abs(fitted(small, 96) - full).mean() < 2


def test_pixels_name_the_bad_picture(tmp_path):
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"image 2 of 3: .*b\.png: not a picture"):
        Processor(tiny_config(), tiny_tokenizer()).pixels([picture(), tmp_path / "b.png", picture()])
    with pytest.raises(InputError, match="^image 5 of 9: torn$"), named(4, 9, b"bytes"):
        raise InputError("torn")


def test_pixels_are_the_pictures():
    wide, exact = picture(32, 16), picture(16, 16)
    batch = Processor(tiny_config(), tiny_tokenizer()).pixels([wide, exact])
    assert np.array_equal(batch[1].permute(1, 2, 0).numpy(), np.asarray(exact))
    assert tuple(batch[0, :, 0, 0]) == (
        122,
        116,
        104,
    )  # CLIP's mean colour, cut to whole numbers as LLaVA does
