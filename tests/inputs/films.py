"""Videos of grey frames, and how grey they are read."""

import numpy as np
import pytest
from PIL import Image


def grey(value, side=32):
    return Image.new("RGB", (side, side), (value, value, value))


def levels(frames):
    return [round(float(np.asarray(frame).mean())) for frame in frames]


def write_video(path, values, rate=4, gop=12, b_frames=0, side=32):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = side
        stream.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        for value in values:
            container.mux(stream.encode(av.VideoFrame.from_image(grey(value, side))))
        container.mux(stream.encode())
    return path
