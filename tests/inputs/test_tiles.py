"""Huge pictures in parts. Where each pixel goes is worked out by hand."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from longllava.errors import InputError
from longllava.inputs.image import open_image
from longllava.inputs.tiles import parse_tiles, split
from tests.tiny import tiny_model


def picture(width, height):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 200, (height, width, 3), dtype=np.uint8))


def tiles_of(source, tiles, side):
    parts = split(source, tiles, side)
    whole, *places = parts.sources()
    assert whole is source and len(places) == parts.rows * parts.columns
    return parts, [np.asarray(open_image(place)) for place in places]


def test_tiles_are_the_picture_centred_on_white():
    image = picture(20, 9)  # 3 x 2 tiles of 8: 24 x 16, with 2 + 2 columns and 3 + 4 rows of white
    parts, tiles = tiles_of(image, "fit", 8)
    assert (parts.rows, parts.columns) == (2, 3)
    canvas = np.full((16, 24, 3), 255, np.uint8)
    canvas[3:12, 2:22] = np.asarray(image)
    for row in range(2):
        for column in range(3):
            wanted = canvas[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            assert np.array_equal(tiles[row * 3 + column], wanted)


def test_a_picture_that_fits_is_one_tile():
    parts, tiles = tiles_of(picture(8, 8), "fit", 8)
    assert (parts.rows, parts.columns) == (1, 1)
    assert np.array_equal(tiles[0], np.asarray(picture(8, 8)))


def test_a_fixed_grid_holds_the_scaled_picture():
    image = picture(50, 50)
    _, tiles = tiles_of(image, (1, 2), 16)  # 32 x 16: the picture becomes 16 x 16, 8 columns of white on each side
    joined = np.concatenate(tiles, axis=1)
    assert np.array_equal(joined[:, 8:24], np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)))
    assert (joined[:, :8] == 255).all() and (joined[:, 24:] == 255).all()


def test_tiles_of_a_turned_picture(tmp_path):
    image, exif = picture(20, 9), Image.Exif()
    exif[0x0112] = 6  # shown with width and height exchanged
    image.save(tmp_path / "a.png", exif=exif)
    parts, tiles = tiles_of(tmp_path / "a.png", "fit", 16)
    assert (parts.rows, parts.columns) == (2, 1)
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(np.concatenate(tiles)[6:26, 3:12], upright)


def test_it_is_decoded_once_and_dropped(monkeypatch):
    from longllava.inputs import tiles as module

    n_decoded = []
    monkeypatch.setattr(module, "open_image", lambda *a, **b: n_decoded.append(1) or open_image(*a, **b))
    file = io.BytesIO()
    picture(40, 40).save(file, "PNG")
    parts, first = tiles_of(file.getvalue(), "fit", 16)
    assert len(n_decoded) == 1 and parts.picture is None
    again = [np.asarray(place()) for place in parts.sources()[1:]]
    assert len(n_decoded) == 2 and all(map(np.array_equal, first, again))


@pytest.mark.parametrize(("tiles", "expected"), [(None, None), ("fit", "fit"), ("2x3", (2, 3)), ("32x32", (32, 32))])
def test_grids(tiles, expected):
    assert parse_tiles(tiles) == expected


@pytest.mark.parametrize("tiles", ["", "2", "0x2", "2x", "33x32", "2x3 ", "-1x2", 3, (2, 3)])
def test_bad_grids_get_a_sentence(tiles):
    with pytest.raises(InputError, match="tiles: got .*, allowed: 'fit', or rows x columns such as '2x3'"):
        parse_tiles(tiles)


def test_bad_pictures_get_a_sentence(tmp_path):
    with pytest.raises(InputError, match=r"none\.png: no such file"):
        split("none.png", "fit", 16)
    with pytest.raises(InputError, match="33 x 32 tiles, at most 1024 are allowed; give the number of rows"):
        split(picture(32, 33), "fit", 1)
    file = io.BytesIO()
    picture(40, 40).save(file, "PNG")
    (tmp_path / "torn.png").write_bytes(file.getvalue()[:2000])
    parts = split(tmp_path / "torn.png", "fit", 16)  # the header is sound
    with pytest.raises(InputError, match=r"torn\.png: broken picture"):
        open_image(parts.sources()[1])


MODEL = tiny_model()
SHORT = {"max_new_tokens": 8}


def test_a_model_reads_the_whole_and_its_tiles():
    """As if the tiles had been cut by hand and written as rows, everywhere that pictures are given."""
    image = picture(40, 20)
    parts = split(image, "fit", 16)
    marks = "\n".join(["<image>", *["<image>" * 3] * 2])
    by_hand = MODEL.generate(f"{marks}\nwhat is this?", [np.asarray(open_image(s)) for s in parts.sources()], **SHORT)
    assert MODEL.generate("what is this?", image, tiles="fit", **SHORT) == by_hand
    assert MODEL.generate("<image>\nwhat is this?", image, tiles="fit", **SHORT) == by_hand
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is this?"}]
    assert MODEL.generate([{"role": "user", "content": content}], tiles="fit", **SHORT) == by_hand
    album = MODEL.session(images=image, tiles="fit")
    assert album.n_images == 7
    assert album.ask("what is this?", **SHORT) == by_hand
    assert MODEL.session(tiles="fit").ask("what is this?", images=image, **SHORT) == by_hand
    assert MODEL.generate("what is this?", image, **SHORT) != by_hand
    with pytest.raises(InputError, match=r"image 2 of 2: no\.png: no such file"):
        MODEL.generate("a", [image, "no.png"], tiles="fit")


@pytest.mark.parametrize("tiles", ["fit", "2x3"])
def test_errors_count_pictures_not_tiles(tiles, tmp_path):
    file, torn = io.BytesIO(), tmp_path / "torn.png"
    picture(40, 40).save(file, "PNG")
    torn.write_bytes(file.getvalue()[:2000])
    with pytest.raises(InputError, match=r"^image 2 of 3: .*torn\.png: broken picture"):
        MODEL.generate("a", [picture(40, 20), torn, picture(40, 20)], tiles=tiles)
    with pytest.raises(InputError, match=r"^image 3: got a tensor"):
        MODEL.generate("a", [picture(9, 9), picture(40, 9), torch.zeros(2, 3)])


def test_errors_about_a_header_count_all_pictures_of_the_messages():
    def asked(*pictures):
        return {"role": "user", "content": [*({"type": "image", "image": one} for one in pictures),
                                            {"type": "text", "text": "a"}]}  # fmt: skip

    talk = [asked(picture(20, 9)), {"role": "assistant", "content": "b"}, asked(picture(20, 9), b"no picture")]
    with pytest.raises(InputError, match="^image 3 of 3: not a picture of a known format"):
        MODEL.generate(talk, tiles="fit")


@pytest.mark.parametrize("tiles", ["fit", "1x2"])
def test_features_are_not_cut(tiles):
    features = MODEL.encode(picture(20, 9))
    with pytest.raises(InputError, match="^image 2 of 2: a tensor of features or pixels is not cut into tiles; give"):
        MODEL.generate("a", [picture(20, 9), *features], tiles=tiles)
