"""Frames of a source's videos as files in the cache, taken once and read at random ever after.

    $LONGLLAVA_CACHE/frames/HASH/00000.jpg ...   HASH of the video's path, size, time and of how it is sampled

A folder appears whole or not at all. It may be deleted between runs; the frames are then taken again.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

from longllava.data.embedded import file_of, is_embedded, read_embedded
from longllava.errors import InputError
from longllava.files import whole_folder
from longllava.inputs.video import folder_frames, read_frames

QUALITY = 95  # of JPEG


def frames_of(video: str, *, fps: float, max_frames: int, side: int, cache: Path) -> list[str]:
    """References of a video's frames in order; a folder of frames is used as it is. Raises: InputError."""
    if os.path.isdir(video):
        found = folder_frames(Path(video))
        n_kept = min(len(found), max_frames)
        return [str(found[i * len(found) // n_kept]) for i in range(n_kept)]
    folder = cache / "frames" / digest(video, fps, max_frames, side)
    if not folder.is_dir():
        with warnings.catch_warnings():  # a few lost frames are within what a video may lose
            warnings.simplefilter("ignore", UserWarning)
            source = read_embedded(video) if is_embedded(video) else video
            frames = read_frames(source, fps=fps, max_frames=max_frames, side=side)
        if not folder.is_dir():  # else another process was quicker
            with whole_folder(folder) as staged:
                for number, frame in enumerate(frames):
                    frame.save(staged / f"{number:05d}.jpg", quality=QUALITY)
    return [str(path) for path in sorted(folder.glob("*.jpg"))]


def digest(video: str, fps: float, max_frames: int, side: int) -> str:
    try:
        status = os.stat(file_of(video))
    except OSError as error:
        raise InputError(f"{video}: {error.strerror or error}") from None
    text = f"{os.path.abspath(video)} {status.st_size} {status.st_mtime_ns} {fps} {max_frames} {side}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]
