"""A video as a list of frames: a folder of pictures, an animated GIF, or a file that PyAV reads.

Frames of a folder stay paths, opened when they are needed. Others are sampled while decoding and kept as
RGB images no larger than the encoder looks at: 1,024 frames of 96 x 96 take 28 MB.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longllava.errors import InputError
from longllava.inputs.image import check_size, rgb

if TYPE_CHECKING:
    from PIL import Image

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_FRAMES = 1024
MAX_FPS = 120.0


def read_frames(
    source: str | os.PathLike, *, fps: float = 1.0, max_frames: int = MAX_FRAMES, side: int | None = None
) -> list[Any]:
    """Frames of a video, in order, as image sources (paths or PIL images).

    fps: frames taken per second of video; a folder's pictures are all taken. Beyond max_frames they are
    thinned out evenly. side: frames are shrunk until their longer side is at most this.
    Raises: InputError naming the video.
    """
    check_sampling(fps, max_frames)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"video: expected a path, got {type(source).__name__}")
    path = Path(source)
    if not path.exists():
        raise InputError(f"{path}: no such video file or folder of frames")
    try:
        if path.is_dir():
            frames: list[Any] = folder_frames(path)
            n_kept = min(len(frames), max_frames)
            return [frames[i * len(frames) // n_kept] for i in range(n_kept)]
        if not path.is_file():
            raise InputError("not a regular file")
        reader = gif_frames if path.suffix.lower() == ".gif" else file_frames
        return sampled(reader(path), fps, max_frames, side)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def check_sampling(fps: float, max_frames: int) -> None:
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps <= MAX_FPS:
        raise InputError(f"fps: got {fps!r}, allowed: above 0, at most {MAX_FPS:g}")
    if isinstance(max_frames, bool) or not isinstance(max_frames, int) or max_frames < 1:
        raise InputError(f"max_frames: got {max_frames!r}, expected a whole number above 0")


def folder_frames(folder: Path) -> list[Path]:
    """Pictures of a folder, frame 2 before frame 10."""

    def natural(path: Path) -> list:
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name)]

    frames = sorted((p for p in folder.iterdir() if p.suffix.lower() in PICTURES and p.is_file()), key=natural)
    if not frames:
        raise InputError(f"the folder holds no pictures; known endings: {', '.join(PICTURES)}")
    return frames


Shown = tuple[float, Callable[[], Any]]  # the second until which a frame is on show; makes its RGB image


def sampled(shown: Iterator[Shown], fps: float, max_frames: int, side: int | None) -> list[Image.Image]:
    """The frames on show at 0, 1/fps, 2/fps ... seconds; when too many, every other one is dropped."""
    kept: list[Image.Image] = []
    step, number = 1 / fps, 0
    for end, image in shown:
        while number * step < end - 1e-9:
            kept.append(image())
            shrink_(kept[-1], side)
            number += 1
            if len(kept) > max_frames:
                kept, step, number = kept[::2], step * 2, (number + 1) // 2
    if not kept:
        raise InputError("the video has no frames")
    return kept


def shrink_(image: Image.Image, side: int | None) -> None:
    from PIL import Image

    if side and max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.BICUBIC)


def gif_frames(path: Path) -> Iterator[Shown]:
    from PIL import Image, ImageSequence

    try:
        with Image.open(path, formats=("GIF",)) as gif:
            check_size(*gif.size)
            second = 0.0
            for frame in ImageSequence.Iterator(gif):
                length = (frame.info.get("duration") or 100) / 1000  # browsers show a frame of 0 ms for 100 ms
                yield second + length, partial(rgb, frame)
                second += length
    except InputError:
        raise
    except Exception as error:  # on torn files Pillow raises struct.error, KeyError, SyntaxError...
        raise InputError(f"broken GIF: {' '.join(str(error).split()) or type(error).__name__}") from None


def file_frames(path: Path) -> Iterator[Shown]:
    try:
        import av
    except ImportError:
        raise InputError(
            "reading video files needs PyAV: pip install 'longllava[video]'"
            " (a folder of frames or a GIF is read without it)"
        ) from None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError("the file has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            check_size(stream.codec_context.width or 1, stream.codec_context.height or 1)
            rate = float(stream.average_rate or 25)
            first, previous = None, None
            for number, frame in enumerate(container.decode(stream)):
                second = frame.time if frame.time is not None else number / rate
                first = second if first is None else first
                if previous is not None:  # a frame is on show until the next one comes
                    yield second - first, previous[1]
                previous = (second - first, partial(upright, frame))
            whole = (container.duration or 0) / av.time_base - 1
            if previous is not None and previous[0] < 0.95 * whole:
                raise InputError(f"torn: frames end at {previous[0]:.1f} of {whole + 1:.1f} seconds")
            if previous is not None:
                yield previous[0] + 1 / rate, previous[1]
    except av.FFmpegError as error:
        raise InputError(f"broken video: {error.strerror or error}") from None


def upright(frame: Any) -> Image.Image:
    """A decoded frame as RGB, turned as the file's display matrix says (phones film sideways)."""
    image = frame.to_image()
    turn = int(getattr(frame, "rotation", 0) or 0) % 360
    return image.rotate(turn, expand=True) if turn else image
