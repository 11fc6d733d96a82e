"""Pictures of samples: what the look ahead of training lets pass can be opened when its step comes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longllava.data.images import check_picture, open_picture, tile_reference
from longllava.errors import InputError

WHOLE = np.arange(20 * 12, dtype=np.float32).reshape(12, 20)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (WHOLE, None),
        (WHOLE * 1000, "mode F: pixels from 0 to 239000"),
        (np.where(WHOLE > 3, np.nan, WHOLE), "pixels are NaN or infinite"),
        (WHOLE.astype(np.uint16) * 256, None),
        (WHOLE.astype(np.int32) - 3, "mode I: pixels from -3 to 236"),
    ],
)
def test_pixels_that_are_no_bytes_are_told_ahead(tmp_path: Path, pixels: np.ndarray, message: str | None) -> None:
    path = str(tmp_path / "depth.tif")
    Image.fromarray(pixels).save(path)
    for look in (check_picture, open_picture):
        if message is None:
            look(path)
            continue
        with pytest.raises(InputError, match=message) as raised:
            look(path)
        assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F"])
def test_pictures_of_every_mode_pass(tmp_path: Path, mode: str) -> None:
    path = str(tmp_path / "any.tif")
    Image.new(mode, (20, 12)).save(path)
    check_picture(path)
    assert open_picture(path).size == (20, 12)


def test_tiles_of_a_picture_that_was_drawn_anew(tmp_path: Path) -> None:
    """They were the old ones', and their features stayed in the cache as the new ones'."""
    path = tmp_path / "a.png"
    for colour in ((255, 0, 0), (0, 0, 255)):
        Image.new("RGB", (40, 40), colour).save(path)
        tile = open_picture(tile_reference(str(path), (0, 1), (2, 2), 20, False))
        assert tile.getpixel((0, 0)) == colour
