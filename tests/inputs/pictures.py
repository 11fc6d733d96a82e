"""Pictures of noise, as files and as pixels."""

import io

import numpy as np
from PIL import Image

from longllava.inputs.image import open_image


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(width=6, height=4):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(source):
    return np.asarray(open_image(source))
