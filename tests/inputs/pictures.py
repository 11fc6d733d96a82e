"""Pictures of noise, as files and as pixels; PNG files put together by hand."""

import io
import zlib

import numpy as np
from PIL import Image

from longllava.inputs.image import open_image


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(width=6, height=4):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(source):
    return np.asarray(open_image(source))


def chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def animated_png(bits, colour, rows, key=(), default_first=False):
    """Frames of one row each, on show for a second; key: the transparent colour. default_first: the first row is the
    picture for programs that show no animation."""
    size = (len(rows[0]) * 8 // (bits * (3 if colour == 2 else 1))).to_bytes(4, "big") + (1).to_bytes(4, "big")
    chunks = [(b"IHDR", size + bytes([bits, colour, 0, 0, 0]))]
    chunks += [(b"acTL", (len(rows) - default_first).to_bytes(4, "big") + bytes(4))]
    chunks += [(b"tRNS", b"".join(value.to_bytes(2, "big") for value in key))] if key else []
    written = 0
    for number, row in enumerate(rows):
        if number or not default_first:
            chunks.append((b"fcTL", written.to_bytes(4, "big") + size + bytes(8) + bytes([0, 1, 0, 1, 0, 0])))
            written += 1
        data = zlib.compress(b"\0" + row)
        chunks.append((b"fdAT", written.to_bytes(4, "big") + data) if number else (b"IDAT", data))
        written += bool(number)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in [*chunks, (b"IEND", b"")])
