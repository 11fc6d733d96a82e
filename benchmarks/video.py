"""Seconds and memory of sampling 720p videos at one frame a second, at two lengths: memory must not grow with length.

    python benchmarks/video.py --save benchmarks/results/video-cpu.json

The videos are made here: half a minute of a photograph-like picture under a slow camera (H.264 with a key frame every 2
seconds, or MPEG-4 without libx264), its packets repeated to the length, which a decoder cannot tell from new ones. Each
is read by a process of its own, whose peak of resident pages counts, above what it held before. Frames are kept at 336
pixels; they are counted apart, because their number is the video's length, up to 1,024.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _environment  # noqa: F401
import numpy as np
from _options import check_target

from longllava.cli import run
from longllava.errors import InputError
from longllava.settings import check_count

SIDE, RATE = 336, 25
FPS = 1.0
CLIP = 30  # seconds that are encoded


def write_video(path: Path, seconds: int) -> str:
    """1280 x 720 pixels; the camera glides over a picture of 1/f noise, as photographs have."""
    try:
        import av
    except ImportError:
        raise InputError("making the videos needs PyAV: pip install 'longllava[video]'") from None

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    rng = np.random.default_rng(0)
    amplitudes = 1 / np.maximum(np.hypot(np.fft.fftfreq(1440)[:, None], np.fft.rfftfreq(2560)), 1 / 2560)
    field = np.fft.irfft2(rng.normal(size=(*amplitudes.shape, 2)).view(np.complex128)[..., 0] * amplitudes)
    luma = (120 + 45 * field / field.std()).clip(0, 255).astype(np.uint8)
    chroma = np.stack([luma[::2, ::2], luma[1::2, 1::2]]) // 2 + 64
    packets = []
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options={"preset": "veryfast"} if codec == "libx264" else {})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 1280, 720, "yuv420p", 2 * RATE
        for number in range(CLIP * RATE + 1):
            left, top = 2 * int(number * 0.8), 2 * int(number * 0.4)
            planes = [luma[top : top + 720, left : left + 1280],
                      *chroma[:, top // 2 : top // 2 + 360, left // 2 : left // 2 + 640]]  # fmt: skip
            frame = None
            if number < CLIP * RATE:
                yuv = np.concatenate([plane.reshape(-1, 1280) for plane in planes])
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(yuv), format="yuv420p")
            packets += [(packet.pts, packet.dts, packet.is_keyframe, bytes(packet)) for packet in stream.encode(frame)]
        ticks = round(1 / (RATE * stream.codec_context.time_base))  # of a frame
        for number in range(seconds * RATE):
            pts, dts, is_keyframe, content = packets[number % len(packets)]
            packet, shift = av.Packet(content), number // len(packets) * len(packets) * ticks
            packet.pts, packet.dts, packet.is_keyframe = pts + shift, dts + shift, is_keyframe
            packet.time_base, packet.stream = stream.codec_context.time_base, stream
            container.mux(packet)
    return codec


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(path: str) -> dict:
    """In a process that does nothing else. Frames kept are counted apart: their number is the video's length."""
    import av  # noqa: F401

    from longllava.inputs.video import read_frames

    before = resident("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    frames = read_frames(path, fps=FPS, side=SIDE)
    seconds = time.perf_counter() - start
    kept = sum(frame.width * frame.height * 4 for frame in frames)  # Pillow keeps four bytes a pixel
    return {"frames": len(frames), "seconds": round(seconds, 2), "peak_bytes": resident("VmHWM:") - before,
            "frames_bytes": kept}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, default=600, help="of the longer video (default: %(default)s)")
    parser.add_argument("--save", type=Path, help="write the figures into this JSON file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    check_count("--seconds", options.seconds)
    check_target(options.save)
    rows = []
    for seconds in (max(1, options.seconds // 10), options.seconds):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video.mp4"
            codec = write_video(path, seconds)
            command = [sys.executable, __file__, "--measure", str(path)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise InputError(f"{seconds} s of {codec}: the measured process ended with code {done.returncode}")
            rows.append({"video_seconds": seconds, "codec": codec, "file_bytes": path.stat().st_size,
                         **json.loads(done.stdout)})  # fmt: skip
        row = rows[-1]
        beside = row["peak_bytes"] - row["frames_bytes"]
        print(f"{seconds:5} s of {codec}: {row['frames']} frames in {row['seconds']} s; peak"
              f" {row['peak_bytes'] / 1e6:.0f} MB, of them the frames {row['frames_bytes'] / 1e6:.0f} MB,"
              f" decoding {beside / 1e6:.0f} MB")  # fmt: skip
    if options.save:
        from longllava.files import write_json
        from longllava.train.record import environment

        write_json(options.save, {"videos": rows, "fps": FPS, "environment": environment("cpu")})


if __name__ == "__main__":
    run(main, "video")
