"""Frames of a video file, found by as little decoding as its key frames allow.

Packets are held back, undecoded, until one is at or behind the next wanted second. When a key frame comes before
that, what was held is dropped: the wanted frame builds on the key frame alone. Long gaps are leapt over by seeking.
Held are at most HELD packets, so that memory does not grow with the video's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from longllava.errors import InputError
from longllava.inputs.image import check_size

if TYPE_CHECKING:
    from PIL import Image

HELD = 512
REORDERED = 16  # frames between which a codec may exchange the order
SEEK_SECONDS = 20.0  # a gap worth a seek; nearer frames are reached by reading on
TORN = 0.95  # of the stated duration; less is a torn file, not a rounding
# containers of pictures and sound alone; playlists (hls, concat, dash) would make FFmpeg open other files
FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpeg", "mpegts", "flv", "ogg", "asf", "mxf", "ivf",
           "h264", "hevc", "obu", "m4v", "mjpeg", "nut", "wtv", "rm", "apng", "gif", "webp_anim")  # fmt: skip


def open_video(source: Any) -> Any:
    """An open container. source: a path, or a binary file. Raises: InputError when it cannot be opened."""
    try:
        import av
    except ImportError:
        raise InputError(
            "reading video files needs PyAV: pip install 'longllava[video]'"
            " (a folder of frames or a GIF is read without it)"
        ) from None
    try:
        return av.open(source, options={"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"})
    except av.FFmpegError as error:
        raise InputError(f"broken video, or of no known format: {error.strerror or error}") from None


class VideoFile:
    """One pass over the frames of an open container."""

    def __init__(self, container: Any):
        if not container.streams.video:
            raise InputError("the file has no video stream")
        self.container = container
        self.stream = container.streams.video[0]
        self.stream.thread_type = "AUTO"
        check_size(self.stream.codec_context.width or 1, self.stream.codec_context.height or 1)
        self.rate = float(self.stream.average_rate or 25)
        self.base = float(self.stream.time_base or 0)
        self.first: float | None = None  # when the first frame is shown; seconds count from there
        self.last = 0.0  # the latest second seen
        self.seeks = bool(self.base)
        self.leapt_from: float | None = None  # set until it is known whether a seek led forwards

    def duration(self) -> float:
        """Seconds, as the header says; 0 where it does not."""
        import av

        return (self.container.duration or 0) / av.time_base

    def frames(self, wanted: Callable[[], float]) -> Iterator[tuple[float, Callable[[], Image.Image]]]:
        """(second until which it is shown, what makes its picture) of frames in order.

        wanted: the next second that is asked for; frames that end before it may be left out.
        Raises: InputError when the file is broken or torn.
        """
        import av

        previous: tuple[float, Any] | None = None
        try:
            for frame in self.decoded(wanted):
                second = self.second_of(frame)
                if previous is not None and second <= previous[0]:
                    continue  # seen already: a seek went back to a key frame
                if previous is not None:  # a frame is on show until the next one comes
                    yield second, partial(upright, previous[1])
                previous = (second, frame)
        except av.FFmpegError as error:
            raise InputError(f"broken video: {error.strerror or error}") from None
        if previous is None:
            return
        if self.last < TORN * (self.duration() - 1):
            raise InputError(f"torn: frames end at {self.last:.1f} of {self.duration():.1f} seconds")
        yield previous[0] + 1 / self.rate, partial(upright, previous[1])

    def second_of(self, frame: Any) -> float:
        """When a frame is shown; one that does not say comes one frame after the latest."""
        if frame.time is None:
            return self.last + 1 / self.rate if self.first is not None else 0.0
        self.first = frame.time if self.first is None else self.first
        self.last = max(self.last, frame.time - self.first)
        return frame.time - self.first

    def decoded(self, wanted: Callable[[], float]) -> Iterator[Any]:
        held: list[Any] = []
        packets = self.container.demux(self.stream)
        while (packet := next(packets, None)) is not None:
            second = self.second_at(packet)
            if second is not None and self.leapt_from is not None:
                before, self.leapt_from = self.leapt_from, None
                self.seeks = before < second <= wanted()
                if second > wanted():  # the index led too far
                    self.seek(before)
                    packets = self.container.demux(self.stream)
                    continue
            if held and packet.is_keyframe and second is not None and second <= wanted():
                held.clear()
                self.stream.codec_context.flush_buffers()
            held.append(packet)
            if second is not None and second < wanted() and len(held) < HELD:
                if self.leap(second, wanted()):
                    held.clear()
                    packets = self.container.demux(self.stream)
                continue
            for waiting in held:
                yield from waiting.decode()
            held.clear()

    def second_at(self, packet: Any) -> float | None:
        """When a packet's frame is shown; None where that is not known (yet)."""
        known = self.first is not None and packet.pts is not None and self.base
        return packet.pts * self.base - self.first if known else None

    def leap(self, second: float, wanted: float) -> bool:
        """Seek from `second` to the last key frame before `wanted`, if it is far. No more once that led backwards."""
        import av

        if not self.seeks or self.leapt_from is not None or wanted - second < SEEK_SECONDS:
            return False
        try:
            self.seek(min(wanted, self.duration() or wanted))
        except av.FFmpegError:  # a stream that cannot be sought in
            self.seeks = False
            return False
        self.leapt_from = second
        return True

    def seek(self, second: float) -> None:
        """To a key frame before `second`. Files are sought in by decoding times, which come before those of showing."""
        margin = max(1.0, REORDERED / self.rate)
        self.container.seek(int((second - margin + (self.first or 0)) / self.base), stream=self.stream, backward=True)


def upright(frame: Any) -> Image.Image:
    """A decoded frame as RGB, turned as the file's display matrix says (phones film sideways)."""
    image = frame.to_image()
    turn = int(getattr(frame, "rotation", 0) or 0) % 360
    return image.rotate(turn, expand=True) if turn else image
