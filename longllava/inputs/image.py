"""One image, from wherever it lies, to a square of uint8 pixels.

One rule: turned as EXIF says, alpha laid on white, 16 bits scaled, not clipped; a torn file is an error.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from longllava.errors import InputError, LongLLaVAError
from longllava.files import expanded
from longllava.inputs.colour import keyed_, rgb, upright_by

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 89_478_485  # Pillow's own warning limit: 256 MiB of RGB
MAX_RATIO = 200
MAX_NAME = 4096  # characters of a path, in Linux
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
SLAB = 1 << 22  # pixels that are copied out of a picture at a time
LOADING = threading.Lock()  # Pillow's, of one picture in two threads, fails
T = TypeVar("T")


def open_image(
    source: Any, *, wanted_side: int | None = None, open_reference: Callable | None = None, used_once: bool = False
) -> Image.Image:
    """Any image source as an RGB PIL image of its own.

    source: a path, the bytes of a file, a file open for reading bytes, a PIL image, a numpy array (H, W, 3) uint8, a
    function that makes one of these, or "scheme:..." which `open_reference` turns into one. wanted_side: big JPEGs are
    decoded to no less than one and a half of this. used_once: what only looks at the result may get the caller's own
    image, or that of a file that is closed. Of a file with several pictures the first is taken, and a warning says so.
    Raises: InputError naming the reason (not the source: see `named`).
    """

    def decoded(image: Image.Image) -> Image.Image:
        if image.format in ("GIF", "WEBP", "TIFF", "PNG") and getattr(image, "is_animated", False) and not image.tell():
            warnings.warn(f"{label(source)}of a {image.format} with several pictures the first is read; give it as a"
                          " video for all", stacklevel=2)  # fmt: skip
        if wanted_side and image.format == "JPEG":
            factor = 1.5 * wanted_side / max(image.size)
            image.draft(image.mode, (math.ceil(image.width * factor), math.ceil(image.height * factor)))
        return rgb(image, copied=not used_once)

    return visit(source, open_reference, decoded)


def upright_size(source: Any, open_reference: Callable | None = None) -> tuple[int, int]:
    """Width and height of what open_image would give, from the header of a file."""

    def size(image: Image.Image) -> tuple[int, int]:
        if image.format == "TIFF" and upright_by(image) in SIDEWAYS:
            image.load()  # Pillow turns these itself; from which moment on its size says so depends on its version
        return image.size[::-1] if upright_by(image) in SIDEWAYS else image.size

    return visit(source, open_reference, size, checked=False)


def visit(source: Any, open_reference: Callable | None, use: Callable[[Image.Image], T], checked: bool = True) -> T:
    """What `use` makes of a source's picture, whose size was checked and whose pixels may not be decoded yet.

    checked: by its checksums too, which takes reading the whole file.
    """
    from PIL import Image

    if callable(source) and not isinstance(source, Image.Image):
        source = source()
    if isinstance(source, str) and open_reference is not None and (is_address(source) or is_reference(source)):
        source = open_reference(source)
    if isinstance(source, Image.Image):
        with one_sentence():
            check_size(*source.size)
            with LOADING:
                keyed_(source)
                source.load()
                upright_by(source)  # the first look takes it out of one table and into another: one thread at a time
            return use(source)
    if hasattr(source, "__array_interface__") and not isinstance(source, str):  # NumPy's strings have one
        return use(from_array(source))
    if is_open_file(source):
        source = content_of(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode(io.BytesIO(source), use, checked)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"expected a path, bytes, an open file, a PIL image or an array, got {type(source).__name__}")
    if is_address(os.fsdecode(source)):
        raise InputError("addresses are not downloaded here; save the picture to a file first")
    path = expanded(os.fsdecode(source))
    if not os.path.exists(path):
        raise InputError("no such file")
    if not path.is_file():  # a folder, a device, a pipe
        raise InputError("not a regular file")
    try:
        with path.open("rb") as file:
            return decode(file, use, checked)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}") from None


def is_open_file(source: Any) -> bool:
    return callable(getattr(source, "read", None)) and callable(getattr(source, "seek", None))


def content_of(file: Any) -> bytes:
    """All that a file open for reading holds, from its beginning, as often as it is asked for. Raises: InputError."""
    try:
        with LOADING:  # one thread at a time: it has one position
            file.seek(0)
            content = file.read()
    except (OSError, ValueError) as error:  # closed, or a stream that cannot go back
        raise InputError(f"cannot be read from its beginning: {error}; give its bytes") from None
    if not isinstance(content, bytes):
        raise InputError(f"a file opened as text; open it with 'rb' (got {type(file).__name__})")
    return content


def is_address(text: str) -> bool:
    return "://" in text


def is_data(text: str) -> bool:
    """Whether `text` holds a file's bytes: "data:image/png;base64,..."; schemes are written large or small."""
    return text[:5].lower() == "data:" and is_reference(text)


def is_reference(text: str) -> bool:
    """Whether `text` is "scheme:..." (C:\\ is a drive) and no file of that name exists."""
    scheme, colon, rest = text.partition(":")
    named_so = bool(colon) and len(scheme) > 1 and scheme.isalpha() and not rest.startswith("//")
    return named_so and not os.path.exists(text)  # not Path.exists, which raises where a name is too long


def decode(file: Any, use: Callable[[Image.Image], T], checked: bool) -> T:
    """Open a picture file: size checked from the header, before any pixel is decoded."""
    from PIL import Image

    with one_sentence():
        with Image.open(file, formats=FORMATS) as image:
            check_size(*image.size)
            if image.format != "PNG" or not checked:
                return use(image)
            image.verify()  # its checksums, which Pillow does not look at when it decodes; 1 GB a second
        file.seek(0)
        with Image.open(file, formats=FORMATS) as image:
            return use(image)


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """What Pillow raises, as an InputError."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"not a picture of a known format; allowed: {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"more than {MAX_PIXELS:,} pixels; make it smaller") from None
    except Exception as error:  # on torn files Pillow raises struct.error, KeyError, SyntaxError...
        raise InputError(f"broken picture: {' '.join(str(error).split()) or type(error).__name__}") from None


def check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise InputError(f"{width} x {height} pixels: it is empty")
    if width * height > MAX_PIXELS:
        raise InputError(f"{width} x {height} pixels, at most {MAX_PIXELS:,} are allowed; make it smaller")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise InputError(f"{width} x {height} pixels: one side is over {MAX_RATIO} times the other; crop it")


def from_array(array: Any) -> Image.Image:
    import numpy as np
    from PIL import Image

    pixels = np.asarray(array)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise InputError(f"array {pixels.dtype} {pixels.shape}; expected uint8 of shape (H, W, 3)")
    check_size(pixels.shape[1], pixels.shape[0])
    return Image.fromarray(np.ascontiguousarray(pixels)).copy()


def square(image: Image.Image, side: int, mean: Sequence[float]) -> Tensor:
    """Fit an RGB image into uint8 (3, side, side), bicubic with anti-aliasing, centred on the encoder's mean colour.

    As LLaVA, which pads first and resizes then (mm_utils.expand2square), but without the square of the long side (of a
    133,000 x 668 strip it would take 53 GB): the long side is resized first, a slab of the picture at a time. Wide
    pictures come out the same to one level of rounding, hardly a value to two; tall ones, in which the two passes
    change places, to more where the filter overshoots. torch resizes bytes with AVX2, in a third of Pillow's time
    (1280 x 720 at one half: 0.7 ms).
    """
    import numpy as np
    import torch
    from torch.nn.functional import interpolate

    def resized(pixels_13HW: Tensor, size: tuple[int, int]) -> Tensor:
        return interpolate(pixels_13HW, size=size, mode="bicubic", antialias=True)

    width, height = image.size
    wide, long, short = width >= height, max(width, height), min(width, height)
    colour = bytes(int(value * 255) for value in mean)
    canvas_HW3 = torch.frombuffer(bytearray(colour) * (long * side), dtype=torch.uint8)
    canvas_13HW = canvas_HW3.view(1, *((long, side) if wide else (side, long)), 3).permute(0, 3, 1, 2)
    before, thickness = (long - short) // 2, max(1, SLAB // long)
    for start in range(0, short, thickness):
        end = min(start + thickness, short)
        slab = (
            image if end - start == short else image.crop((0, start, width, end) if wide else (start, 0, end, height))
        )
        # the batch's axis first: with another stride torch takes it for planes, which take twice as long
        slab_13HW = torch.from_numpy(np.array(slab))[None].permute(0, 3, 1, 2)
        place_13HW = canvas_13HW.narrow(2 if wide else 3, before + start, end - start)
        place_13HW.copy_(resized(slab_13HW, (end - start, side) if wide else (side, end - start)))
    return resized(canvas_13HW, (side, side))[0]


def square_pixels(source: Any, side: int, mean: Sequence[float], open_reference: Callable | None = None) -> Tensor:
    """Image source -> uint8 (3, side, side)."""
    image = open_image(source, wanted_side=side, open_reference=open_reference, used_once=True)
    return square(image, side, mean)


@contextlib.contextmanager
def named(index: int, total: int, source: Any) -> Iterator[None]:
    """Errors inside name the image: "image 417 of 1000: album/417.jpg: truncated"."""
    try:
        yield
    except LongLLaVAError as error:  # an InputError, or a DataError about a reference
        raise InputError(f"image {index + 1} of {total}: {label(source)}{error}") from None


def label(source: Any) -> str:
    """What a sentence about a source begins with: "album/417.jpg: ", or nothing where it has no name."""
    if isinstance(source, str) and source[:5].lower() == "data:":
        return f"{source.partition(',')[0]:.40}: "  # not the megabytes that it holds
    if not isinstance(source, (str, os.PathLike)):
        return ""
    name = os.fsdecode(source)
    return f"{name}: " if len(name) <= MAX_NAME else f"{name[:80]}...: "  # a file in base64 that is taken for a path
