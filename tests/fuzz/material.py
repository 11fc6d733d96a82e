"""Sound files, what spoils them, and how an outcome is judged."""

import functools
import io
import signal
import threading
import time
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from longllava.errors import LongLLaVAError

SECONDS = 5.0  # of this process's time: others on the machine do not count


# what no setting takes, or not all of them do
VALUES = [None, True, 0, -1, 7, 0.5, 2.5, 1e308, float("nan"), "", "a", "fit", "2x3", "0x1", "1x99999", "\u0661x\u0662",
          [], ["*"], [None], {}, b"", "http://a"]  # fmt: skip


class Hang(BaseException):
    """More than SECONDS, wherever it was."""


@contextmanager
def watched():
    """Ends what takes too long; where no signal can (inside a library), tells afterwards."""

    def ring(*_):
        raise Hang

    main = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    before = signal.signal(signal.SIGPROF, ring) if main else None
    if main:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
    started = time.process_time()
    try:
        yield
    except Hang:
        raise AssertionError(f"it took more than {SECONDS} seconds") from None
    finally:
        if main:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
    assert time.process_time() - started < SECONDS


def outcome(call):
    """What a call gives, None for one LongLLaVAError of one line; warnings are no matter here."""
    with watched(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except LongLLaVAError as error:
            text = str(error)
            assert len(text) > 8 and "\n" not in text and " at 0x" not in text and len(text) < 4000, text
            return None


def picture(width=40, height=30):
    """Smooth, so that broken parts stand out."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [40 + 4 * x, 60 + 5 * y, 230 - 2 * x - 2 * y]
    return Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8))


def file_of(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture_files():
    image, exif = picture(), Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    alpha = image.copy()
    alpha.putalpha(image.getchannel(0))
    pages = {"save_all": True, "append_images": [picture().rotate(90 * i, expand=True) for i in (1, 2, 3)]}
    return [
        file_of(image, "JPEG", quality=90, exif=exif), file_of(image, "JPEG", progressive=True),
        file_of(image.convert("CMYK"), "JPEG"), file_of(image.convert("L"), "JPEG", restart_marker_rows=1),
        file_of(image, "PNG"), file_of(alpha.convert("P"), "PNG", transparency=3), file_of(deep, "PNG"),
        file_of(alpha, "PNG", exif=exif), file_of(image.convert("1"), "PNG"), file_of(image, "PNG", **pages),
        file_of(image, "GIF"), file_of(image, "GIF", duration=90, loop=0, **pages), file_of(image, "BMP"),
        file_of(image, "WEBP"), file_of(alpha, "WEBP", lossless=True),
        file_of(image, "WEBP", save_all=True, append_images=[picture().rotate(180)]),
        file_of(image, "TIFF", exif=exif), file_of(image, "TIFF", compression="tiff_lzw", **pages),
        file_of(image, "TIFF", compression="jpeg"), file_of(deep, "TIFF"),
        file_of(image.convert("1"), "TIFF", compression="group4"),
    ]  # fmt: skip


def video_file(kind, codec, n=40):
    av = pytest.importorskip("av")
    file, base = io.BytesIO(), picture(160, 60)
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.gop_size = 64, 48, 8
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(n):
            container.mux(stream.encode(av.VideoFrame.from_image(base.crop((i, i // 4, i + 64, i // 4 + 48)))))
        container.mux(stream.encode())
    return file.getvalue()


def cut(data, draw):
    return data[: draw.randrange(len(data))]


def mutated(data, draw):
    """A file with one to four faults."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(data))
        fault = draw.randrange(7)
        if fault <= 1:
            data[at] ^= 1 << draw.randrange(8)
        elif fault == 2:
            data[at] = draw.choice((0, 1, 127, 128, 255))
        elif fault == 3:
            data[at : at + draw.randrange(1, 40)] = draw.randbytes(draw.randrange(40))
        elif fault == 4:  # a number of a header
            data[at : at + 4] = draw.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x10000, 89_478_486)).to_bytes(
                4, draw.choice(("big", "little"))
            )
        elif fault == 5:
            data[at:at] = data[at : at + draw.randrange(1, 200)]
        else:
            data[at : at + draw.randrange(1, 400)] = bytes(draw.randrange(400))
        data = data or bytearray(b"\0")
    return bytes(data)


@functools.cache
def files(kind):
    """Sound files of a kind: pictures, pages (pictures that are videos too), videos."""
    if kind == "pictures":
        return picture_files()
    if kind == "pages":
        return [data for data in files("pictures") if data[:3] in (b"GIF", b"RIF", b"II*", b"\x89PN")][:6]
    pytest.importorskip("av")
    found = [video_file("mp4", "mpeg4"), video_file("matroska", "mpeg4"), video_file("avi", "mjpeg")]
    try:
        found += [video_file("mp4", "libx264"), video_file("webm", "libvpx-vp9")]
    except ValueError:  # a PyAV without these encoders
        pass
    return found
