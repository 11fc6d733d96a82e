"""A picture of any mode as upright RGB: alpha laid on white, 16 bits scaled."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from longllava.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
         7: "TRANSVERSE", 8: "ROTATE_90"}  # fmt: skip  # EXIF orientation -> Image.Transpose
ORIENTATION = 0x0112
KEYED = "longllava_keyed"  # in a picture's info, which all frames of an animated PNG share
STEPS = {"L;2": 85, "L;4": 17}  # what Pillow multiplies grey of 2 and 4 bits by


def rgb(image: Image.Image, copied: bool = True) -> Image.Image:
    """Any mode to an RGB image, upright; a new one where that is asked for."""
    from PIL import Image

    keyed_(image)
    image.load()  # which turns a TIFF and says so in its EXIF block
    orientation = upright_by(image)
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        result = eight_bits(image).convert("RGB")
    elif image.has_transparency_data:
        with_alpha = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # Pillow has no other way
        result = Image.new("RGB", image.size, (255, 255, 255))
        result.paste(with_alpha, mask=with_alpha.getchannel("A"))
    else:
        result = image if image.mode == "RGB" else image.convert("RGB")
    if orientation in TURNS:
        result = result.transpose(Image.Transpose[TURNS[orientation]])
    return result.copy() if copied and result is image else result


def upright_by(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where the EXIF block is missing or torn."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # the picture itself is sound; Pillow's EXIF parser raises whatever it meets
        return 1


def eight_bits(image: Image.Image) -> Image.Image:
    """One channel of 16-bit, 32-bit or float values, scaled to 8 bits."""
    import numpy as np
    from PIL import Image

    values = np.array(image, np.float32)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError("pixels are NaN or infinite")
    full = 1.0 if image.mode == "F" and high <= 1 else 255.0 if image.mode == "F" else 65535.0
    if low < 0 or high > full:
        raise InputError(f"mode {image.mode}: pixels from {low:g} to {high:g}; expected 0 to {full:g}")
    key = image.info.get("transparency")  # the value that a PNG shows nothing for: white, as rgb lays it
    if isinstance(key, int):
        values[values == key] = full
    values *= 255 / full
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))


def keyed_(image: Image.Image) -> None:
    """The colour that a PNG shows nothing for, as its pixels are about to be decoded; Pillow leaves it as it is stored.

    Of 16 bits a colour Pillow reads the upper 8: colours that differ in the others alone are white too.
    """
    key, tile = image.info.get("transparency"), getattr(image, "tile", None)
    if image.format != "PNG" or not tile or KEYED in image.info:  # no tile once they are decoded
        return
    stored = tile[0][3]
    if stored in STEPS and isinstance(key, int):
        image.info |= {"transparency": key * STEPS[stored], KEYED: True}
    elif stored == "RGB;16B" and isinstance(key, tuple):
        image.info |= {"transparency": tuple(value >> 8 for value in key), KEYED: True}
