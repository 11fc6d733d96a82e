"""Frames of a video file, found by as little decoding as its key frames allow.

Packets are held back, undecoded, until one is at or behind the next wanted second. When a key frame comes before
that, what was held is dropped: the wanted frame builds on the key frame alone. Long gaps are leapt over by seeking.
Held are at most HELD packets of HELD_BYTES, so that memory does not grow with the video's length.

Broken frames are left out, with those that build on them; one warning says how many and when. Above MAX_LOST it is an
error. What a codec without checks (VP9) decodes from flipped bits cannot be told from a picture.

Decoding runs in this process. FFmpeg's decoders come back after every packet, and the caller's time limit is looked at
between packets; frames are limited in size before they are allocated. A child process, which could also be ended inside
a packet, would cost its start for every video and a copy of every frame; a server that reads hostile files puts the
whole of it into a process that it can end.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from longllava.errors import InputError
from longllava.inputs.image import MAX_PIXELS, check_size

if TYPE_CHECKING:
    from PIL import Image

HELD = 512
HELD_BYTES = 64 << 20
REORDERED = 16  # frames between which a codec may exchange the order
GAP = 1.5  # frames; lost ones further apart are named apart
NAMED = 5  # stretches of lost frames that a message names
SEEK_SECONDS = 20.0  # a gap worth a seek; nearer frames are reached by reading on
TORN = 0.95  # of the stated duration; less is a torn file, not a rounding
MAX_LOST = 0.05  # of the frames that were decoded
MAX_TICKS = 2.0**62  # of a stream's clock
FROM_ZERO = ("matroska,webm", "asf", "nut")  # whose durations end with the last second, whenever a file begins
RATES = (1.0, 240.0)  # frames a second that are believed
# containers of pictures and sound alone; playlists (hls, concat, dash) would make FFmpeg open other files
FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpeg", "mpegts", "flv", "ogg", "asf", "mxf", "ivf",
           "h264", "hevc", "obu", "m4v", "mjpeg", "nut", "wtv", "rm", "apng", "gif", "webp_anim")  # fmt: skip


def open_video(source: Any) -> Any:
    """An open container. source: a path, or a binary file. Raises: InputError when it cannot be opened."""
    try:
        import av
    except Exception as error:
        raise InputError(
            f"reading video files needs PyAV ({error}); pip install 'longllava[video]'"
            " (a folder of frames or a GIF is read without it)"
        ) from None
    try:
        options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
        # Without it PyAV raises where metadata are no UTF-8; PyAV 19 has no such argument any more.
        spared: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
        return av.open(source, options=options, **spared)
    except av.FFmpegError as error:
        raise InputError(f"broken video, or of no known format: {error.strerror or error}") from None


class VideoFile:
    """One pass over the frames of an open container."""

    def __init__(self, container: Any):
        self.stream = container.streams.best("video")  # which a cover, one picture, is not where there are others
        if self.stream is None:
            raise InputError("the file has no video stream")
        self.container = container
        if self.stream.codec_context is None:
            raise InputError("its video is of a codec that PyAV cannot decode")
        self.stream.thread_type = "AUTO"
        self.stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # also of frames further on
        check_size(self.stream.codec_context.width or 1, self.stream.codec_context.height or 1)
        self.rate = min(max(float(self.stream.average_rate or 25), RATES[0]), RATES[1])
        self.base = float(self.stream.time_base or 0)
        self.first: float | None = None  # when the first frame is shown; seconds count from there
        self.last = 0.0  # the latest second seen
        self.seeks = bool(self.base)
        self.leapt_from: float | None = None  # set until it is known whether a seek led forwards
        self.n_decoded = 0
        self.lost: list[float] = []  # seconds of frames that are broken, or build on those
        self.cut: set[int | None] = set()  # when packets are shown that the container calls incomplete
        self.torn_at: float | None = None  # frames after this second build on a broken one, until a key frame
        self.entered_at = (
            -math.inf
        )  # the key frame at which decoding began anew; what is shown before may build on others

    def duration(self) -> float:
        """Seconds from the first frame, as the header says; 0 where it does not."""
        import av

        start, end = self.container.start_time or 0, self.container.duration or 0
        later = self.container.format.name in FROM_ZERO and 0 < start < end  # a part of a recording, for example
        return (end - start if later else end) / av.time_base

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
                if frame.is_corrupt or frame.pts in self.cut:  # filled in by the decoder, in grey or from other frames
                    self.cut.discard(frame.pts)
                    self.torn_at = second
                elif self.torn_at is not None and frame.key_frame and second > self.torn_at:
                    self.torn_at = None
                if self.torn_at is not None:
                    self.lost.append(second)
                    continue
                self.n_decoded += 1
                if previous is not None and second <= previous[0]:
                    continue  # seen already: a seek went back to a key frame
                if previous is not None:  # a frame is on show until the next one comes
                    yield second, partial(upright, previous[1])
                previous = (second, frame)
        except av.FFmpegError as error:
            raise InputError(f"broken video: {error.strerror or error}") from None
        self.settle()
        if previous is None:
            return
        if self.last < TORN * (self.duration() - 1):
            raise InputError(f"torn: frames end at {self.last:.1f} of {self.duration():.1f} seconds")
        yield previous[0] + 1 / self.rate, partial(upright, previous[1])

    def settle(self) -> None:
        """Warn of the frames that were lost so far. Raises: InputError when they are too many."""
        lost, self.lost = sorted(self.lost), []
        if not lost:
            return
        share = len(lost) / (len(lost) + self.n_decoded)
        starts = [0, *(i for i in range(1, len(lost)) if lost[i] - lost[i - 1] > GAP / self.rate), len(lost)]
        spans = [(lost[first], lost[last - 1]) for first, last in pairwise(starts)]
        named = ", ".join(f"{a:.1f}" if b - a < 0.05 else f"{a:.1f} to {b:.1f}" for a, b in spans[:NAMED])
        sentence = (f"{len(lost)} of {len(lost) + self.n_decoded} decoded frames are broken, at {named}"
                    f"{' ...' * (len(spans) > NAMED)} seconds")  # fmt: skip
        if share > MAX_LOST:
            raise InputError(f"{sentence}; at most {MAX_LOST:.0%} are left out")
        warnings.warn(f"{sentence}; they are left out", stacklevel=2)

    def second_of(self, frame: Any) -> float:
        """When a frame is shown; one that does not say comes one frame after the latest."""
        if frame.time is None:
            second = 0.0 if self.first is None else self.last + 1 / self.rate
            self.first = self.first or 0.0
        else:
            self.first = frame.time if self.first is None else self.first
            second = frame.time - self.first
        self.last = max(self.last, second)
        return second

    def decoded(self, wanted: Callable[[], float]) -> Iterator[Any]:
        held: list[Any] = []
        packets = self.container.demux(self.stream)
        while (packet := next(packets, None)) is not None:
            second = self.second_at(packet)
            if second is not None and self.leapt_from is not None:
                before, self.leapt_from = self.leapt_from, None
                self.seeks = before < second <= wanted()
                self.entered_at = second if second <= wanted() else -math.inf
                if second > wanted():  # the index led too far
                    self.seek(before)
                    packets = self.container.demux(self.stream)
                    continue
            if held and packet.is_keyframe and second is not None and second <= wanted():
                held.clear()
                self.stream.codec_context.flush_buffers()
                self.entered_at = second
            if second is not None and second < self.entered_at:
                continue
            held.append(packet)
            if second is not None and second < wanted() and len(held) < HELD and held_bytes(held) < HELD_BYTES:
                if self.leap(second, wanted()):
                    held.clear()
                    packets = self.container.demux(self.stream)
                continue
            for waiting in held:
                yield from self.decode(waiting)
            held.clear()

    def decode(self, packet: Any) -> list[Any]:
        """Frames that a packet brings forth. Broken, it is a loss, as is what follows until the next key frame."""
        import av

        if packet.is_corrupt and packet.size:  # MJPEG's decoder says nothing of what it fills in for the rest
            self.cut.add(packet.pts)
        try:
            return packet.decode()
        except av.FFmpegError:
            # decoders work ahead in threads, but answer in order: it is the frame after the latest
            self.last = max(self.last + 1 / self.rate, self.entered_at)
            self.lost.append(self.last)
            self.torn_at = self.last if self.first is not None else -math.inf
            return []

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
        ticks = (second - margin + (self.first or 0)) / self.base
        self.container.seek(int(min(max(ticks, -MAX_TICKS), MAX_TICKS)), stream=self.stream, backward=True)


def held_bytes(packets: list[Any]) -> int:
    return sum(packet.size for packet in packets)


def upright(frame: Any) -> Image.Image:
    """A decoded frame as RGB, turned as the file's display matrix says (phones film sideways)."""
    import av

    check_size(frame.width, frame.height)  # which may change within a stream
    try:
        image = frame.to_image()
    except (av.FFmpegError, ValueError) as error:
        raise InputError(f"broken video: {error}") from None
    turn = int(getattr(frame, "rotation", 0) or 0) % 360
    return image.rotate(turn, expand=True) if turn else image
