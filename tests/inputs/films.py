"""Videos of grey frames, and how grey they are read."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image


def grey(value, side=32):
    return Image.new("RGB", (side, side), (value, value, value))


def levels(frames):
    return [round(float(np.asarray(frame).mean())) for frame in frames]


def write_video(path, values, rate=4, gop=12, b_frames=0, side=32, start=None):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = side
        stream.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        for number, value in enumerate(values):
            frame = av.VideoFrame.from_image(grey(value, side))
            if start is not None:  # the second of the first frame
                frame.pts, frame.time_base = start * rate + number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
