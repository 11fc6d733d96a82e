"""A video as a list of frames: a folder of pictures, an animated GIF, WebP or PNG, a TIFF's pages, or what PyAV reads.

Frames of a folder stay paths, opened when they are needed. Others are sampled while decoding and kept as
RGB images no larger than the encoder looks at: 1,024 frames of 96 x 96 take 28 MB.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longllava.errors import InputError
from longllava.files import expanded
from longllava.inputs.colour import keyed_, rgb
from longllava.inputs.image import check_size, content_of, is_open_file, label
from longllava.inputs.video_file import VideoFile, open_video
from longllava.settings import check_count, is_real

if TYPE_CHECKING:
    from PIL import Image

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PAGED = ("GIF", "WEBP", "TIFF", "PNG")
PAGED_HEADS = (b"GIF8", b"II*\0", b"MM\0*", b"\x89PNG")
MAX_FRAMES = 1024
MIN_FPS, MAX_FPS = 1e-6, 120.0
FIRST_SECONDS = 60.0  # of decoding that a video is allowed,
FRAME_SECONDS = 10.0  # and for each frame that was taken


def read_frames(source: Any, *, fps: float = 1.0, max_frames: int = MAX_FRAMES, side: int | None = None) -> list[Any]:
    """Frames of a video, in order, as image sources (paths or PIL images).

    source: a path, the bytes of a file, or a file open for reading bytes. fps: frames taken per second of video; a
    folder's pictures and a TIFF's pages are all taken. Beyond max_frames they are spread evenly. side: frames are
    shrunk until their longer side is at most this. Raises: InputError naming the video.
    """
    fps, max_frames = check_sampling(fps, max_frames)
    if isinstance(source, (bytes, bytearray, memoryview)) or is_open_file(source):
        try:
            content = content_of(source) if is_open_file(source) else source
            return file_frames(io.BytesIO(content), fps, max_frames, side)
        except InputError as error:
            raise InputError(f"video: {error}") from None
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"video: expected a path, bytes or an open file, got {type(source).__name__}")
    if not os.fspath(source):  # to Path it would be the folder one stands in
        raise InputError("video: the name is empty; give a file or a folder of frames")
    path = expanded(os.fsdecode(source))
    if not os.path.exists(path):  # not Path.exists, which raises where a name is too long
        raise InputError(f"{label(path)}no such video file or folder of frames")
    try:
        if path.is_dir():
            frames = folder_frames(path)
            n_kept = min(len(frames), max_frames)
            return [frames[i * len(frames) // n_kept] for i in range(n_kept)]
        if not path.is_file():
            raise InputError("not a regular file")
        with path.open("rb") as file:
            return file_frames(file, fps, max_frames, side)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def leading_frames(path: Path, n: int, *, fps: float = 1.0) -> list[Image.Image]:
    """The first n frames of a video file at fps, or as many as it has; the rest is not read. Raises: InputError."""
    if not path.is_file():
        raise InputError("not a regular file")
    try:
        with path.open("rb") as file:
            return file_frames(file, fps, n, None, leading=True)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}") from None


def file_frames(file: Any, fps: float, max_frames: int, side: int | None, leading: bool = False) -> list[Image.Image]:
    """Frames of an open file, whose first bytes tell pictures with pages from videos. leading: as leading_frames."""
    head = file.read(12)
    file.seek(0)
    if head.startswith(PAGED_HEADS) or head[8:] == b"WEBP":
        frames = Sampler(fps, max_frames, side, leading=leading).take(page_frames(file, fps))
    else:
        with open_video(file) as container:
            video = VideoFile(container)
            sampler = Sampler(fps, max_frames, side, 0.0 if leading else video.duration(), leading)
            frames = sampler.take(video.frames(sampler.wanted))
            video.settle()
    if not frames:
        raise InputError("the video has no frames")
    return frames


def check_sampling(fps: float, max_frames: int) -> tuple[float, int]:
    """Both as Python's own numbers. Raises: InputError."""
    if not is_real(fps) or not MIN_FPS <= fps <= MAX_FPS:
        raise InputError(f"fps: got {fps!r}, allowed: {MIN_FPS:g} to {MAX_FPS:g}")
    return float(fps), check_count("max_frames", max_frames)


def folder_frames(folder: Path) -> list[Path]:
    """Pictures of a folder, frame 2 before frame 10."""

    def natural(path: Path) -> list:
        parts = re.split(r"([0-9]+)", path.name)  # every second one is a number
        return [(0, int(part), "") if place % 2 else (1, 0, part) for place, part in enumerate(parts)]

    frames = sorted((p for p in folder.iterdir() if p.suffix.lower() in PICTURES and p.is_file()), key=natural)
    if not frames:
        raise InputError(f"the folder holds no pictures; known endings: {', '.join(PICTURES)}")
    return frames


Shown = tuple[float, Callable[[], Any]]  # the second until which a frame is on show; makes its RGB image


class Sampler:
    """Takes the frames on show at 0, 1/fps, 2/fps ... seconds, at most max_frames of them, evenly spread.

    duration: the video's, as far as its header says (0: it does not). Without it, or where it lies, every other frame
    is dropped whenever there are too many. leading: the first max_frames instead, and no more is looked at.
    """

    def __init__(self, fps: float, max_frames: int, side: int | None, duration: float = 0.0, leading: bool = False):
        self.max_frames, self.side, self.duration, self.leading = max_frames, side, duration, leading
        self.step = max(1 / fps, duration / max_frames)
        self.number = 0
        self.started = time.monotonic()
        self.kept: list[Image.Image] = []

    def wanted(self) -> float:
        """The next second to take a frame at. Raises: InputError when finding the frames takes too long."""
        if time.monotonic() - self.started > FIRST_SECONDS + FRAME_SECONDS * self.number:
            raise InputError(
                f"{len(self.kept)} frames were found in {time.monotonic() - self.started:.0f} seconds of decoding,"
                f" at most {FRAME_SECONDS:g} a frame are allowed; convert it to one with more key frames"
            )
        return self.number * self.step

    def take(self, shown: Iterator[Shown]) -> list[Image.Image]:
        for end, make in shown:
            image = None
            while self.wanted() < end - 1e-9:
                if len(self.kept) == self.max_frames and end <= 1.05 * self.duration + 1:
                    self.number += 1  # the header's duration was rounded
                    continue
                image = shrunk(make(), self.side) if image is None else image  # one that stands long is made once
                self.kept.append(image)
                self.number += 1
                if self.leading and len(self.kept) == self.max_frames:
                    return self.kept
                if len(self.kept) > self.max_frames:
                    self.kept, self.step, self.number = self.kept[::2], self.step * 2, (self.number + 1) // 2
        return self.kept


def shrunk(image: Image.Image, side: int | None) -> Image.Image:
    from PIL import Image

    if side and max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
    return image


def page_frames(file: Any, fps: float) -> Iterator[Shown]:
    """Frames of a GIF, WebP or PNG with their durations; pages of a TIFF, all of which are taken."""
    from PIL import Image, ImageSequence, UnidentifiedImageError

    try:
        with Image.open(file, formats=PAGED) as pages:
            check_size(*pages.size)
            second = 0.0
            for number, page in enumerate(ImageSequence.Iterator(pages), 1):
                check_size(*page.size)
                keyed_(page)
                page.load()  # a WebP says its durations no sooner
                if number == 1 and getattr(pages, "default_image", False):
                    continue  # a PNG's for programs that show no animation
                length = (page.info.get("duration") or 100) / 1000  # browsers show a frame of 0 ms for 100 ms
                # a TIFF's as Sampler counts: of a sum of 1,000 roundings it would see a page twice
                second = number * (1 / fps) if pages.format == "TIFF" else second + length
                yield second, partial(rgb, page)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError("broken picture: its header is torn") from None
    except Exception as error:  # on torn files Pillow raises struct.error, KeyError, SyntaxError...
        raise InputError(f"broken picture: {' '.join(str(error).split()) or type(error).__name__}") from None
