"""What stands in a call's images and video, as sources that can be read one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longllava.errors import InputError
from longllava.inputs.address import download, held
from longllava.inputs.chat import outline
from longllava.inputs.image import is_address, is_data, is_open_file, label, named
from longllava.inputs.tiles import parse_tiles, split
from longllava.inputs.video import MAX_FRAMES, check_sampling, read_frames


@dataclass(frozen=True, kw_only=True)
class MediaOptions:
    """How media are read.

    fps: a video's frames taken per second. max_frames: at most so many. tiles: pictures also as tiles, "fit" or
    "rows x columns" such as "2x3" (inputs/tiles.py). allow_hosts: hosts that media may be downloaded from, "*" for
    any public one; none by default. Raises: InputError for unusable values.
    """

    fps: float = 1.0
    max_frames: int = MAX_FRAMES
    tiles: str | None = None
    allow_hosts: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, value in zip(("fps", "max_frames"), check_sampling(self.fps, self.max_frames)):
            object.__setattr__(self, name, value)
        parse_tiles(self.tiles)
        hosts = self.allow_hosts
        if not isinstance(hosts, (list, tuple, set, frozenset)) or not all(isinstance(host, str) for host in hosts):
            raise InputError(f"allow_hosts: got {self.allow_hosts!r}, expected a list of names such as ['example.org']")


@dataclass(frozen=True)
class MediaReader:
    """Sources by options. side: what the encoder looks at. open_scheme: turns "world:..." into pictures."""

    options: MediaOptions
    side: int | None
    open_scheme: Callable[[str], Any] | None = None

    def open_reference(self, reference: str) -> Any:
        """The picture behind an address or another reference, for open_image."""
        if is_data(reference):
            return held(reference)
        if is_address(reference):
            return download(reference, self.options.allow_hosts)
        if self.open_scheme is None:
            raise InputError("no such file")
        return self.open_scheme(reference)

    def image(self, source: Any) -> Any:
        """A picture, to be split where tiles are asked for."""
        tiles = parse_tiles(self.options.tiles)
        if tiles is None or self.side is None:
            return source
        import torch

        if isinstance(source, torch.Tensor):
            raise InputError("a tensor of features or pixels is not cut into tiles; give its picture, or no tiles")
        return split(source, tiles, self.side, self.open_reference)

    def images(self, sources: Sequence[Any]) -> list[Any]:
        """Several pictures; errors name which."""
        result = []
        for number, source in enumerate(sources):
            with named(number, len(sources), None):  # a split names its source itself
                result.append(self.image(source))
        return result

    def media(self, images: Any, video: Any) -> tuple[list[Any], int, int]:
        """Images and a video's frames as one list of sources, and how many there are of each."""
        sources = self.images(listed(images))
        frames = [] if video is None else self.video(video)
        return [*sources, *frames], len(sources), len(frames)

    def video(self, source: Any) -> list[Any]:
        """Frames of a video."""
        sampling: dict[str, Any] = {"fps": self.options.fps, "max_frames": self.options.max_frames, "side": self.side}
        if not isinstance(source, str) or not (is_address(source) or is_data(source)):
            return read_frames(source, **sampling)
        try:
            return read_frames(self.open_reference(source), **sampling)
        except InputError as error:
            raise InputError(f"{label(source)}{error}") from None


def listed(images: Any) -> list[Any]:
    """One image or several, as a list.

    Raises: InputError for a dictionary, of which the keys would be taken, and a set, which has no order.
    """
    if images is None:
        return []
    if isinstance(images, (Mapping, set, frozenset)):
        raise InputError(f"images: got {outline(images)}; expected one image or a list of them")
    import torch

    if isinstance(images, torch.Tensor):  # one picture's features or pixels, or a batch of them
        single = images.ndim == (3 if images.dtype == torch.uint8 else 2)
    else:
        paths = getattr(images, "ndim", 0) == 1 and images.dtype.kind in "UO"  # in an array of NumPy's
        single = (
            isinstance(images, (str, bytes, bytearray, memoryview, os.PathLike))
            or (hasattr(images, "__array_interface__") and not paths)
            or is_open_file(images)
        )
    return [images] if single or not isinstance(images, Iterable) else list(images)


def n_cores() -> int:
    """Cores that this process may use, which is how many pictures it had better decode at a time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
