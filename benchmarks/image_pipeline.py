"""720p JPEG files to what the encoder multiplies, per core: this library, and transformers' CLIPImageProcessor (PIL).

    python benchmarks/image_pipeline.py --save benchmarks/results/image_pipeline-cpu.json

Both sides make the same geometry, LLaVA's: padded to a square with the mean colour, 336 x 336, bicubic, normalised. One
thread each, the same files, already in the system's cache; decoding is included. The sides take turns, file by file in
small groups, so that what else runs on the machine slows both alike. Big JPEGs are decoded scaled here (the DCT at one
half), which changes the resampling; the difference is printed, in levels of 255.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import _environment  # noqa: F401
import numpy as np
import torch
from PIL import Image

from longllava.config import EncoderConfig
from longllava.inputs.image import square_pixels

CONFIG = EncoderConfig()  # CLIP ViT-L/14-336
GROUP = 8


def write_pictures(folder: Path, n: int) -> list[Path]:
    """Smooth shapes, edges and noise, as photographs have, 1280 x 720 at JPEG quality 90."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:720, 0:1280].astype(np.float32)
    paths = []
    for number in range(n):
        waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(-0.05, 0.05, (6, 3))]
        planes = np.stack([sum(waves[i::3]) for i in range(3)], -1) * 50 + 128
        left, top = rng.integers(0, 600, 2)
        planes[top : top + 120, left : left + 400] = rng.integers(0, 256, 3)
        planes += rng.normal(0, 6, planes.shape)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(planes.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def ours(path: Path) -> torch.Tensor:
    """As prefill does, and the encoder's first line."""
    pixels_3SS = square_pixels(path, CONFIG.image_size, CONFIG.mean)
    return (pixels_3SS.float() - MEAN) / STD


MEAN, STD = (torch.tensor(values).view(3, 1, 1) * 255 for values in (CONFIG.mean, CONFIG.std))


def theirs_of(processor):
    def theirs(path: Path) -> torch.Tensor:
        """LLaVA's expand2square, then the processor."""
        with Image.open(path) as file:
            image = file.convert("RGB")
        side = max(image.size)
        canvas = Image.new("RGB", (side, side), tuple(int(value * 255) for value in CONFIG.mean))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return processor(canvas, return_tensors="pt")["pixel_values"][0]

    return theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=64, help="files (default: %(default)s)")
    parser.add_argument("--save", type=Path, help="write the figures into this JSON file")
    options = parser.parse_args()
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    except ImportError:
        raise SystemExit("this comparison needs transformers 5: pip install transformers") from None
    torch.set_num_threads(1)
    side = {"height": CONFIG.image_size, "width": CONFIG.image_size}
    processor = CLIPImageProcessorPil(size={"shortest_edge": CONFIG.image_size}, crop_size=side)
    sides = {"longllava": ours, "transformers": theirs_of(processor)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    differences = []
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), options.pictures)
        for path in paths[:GROUP]:  # also the first calls, which import
            made = [make(path) * STD for make in sides.values()]
            differences.append((made[0] - made[1]).abs())
        for first in range(0, len(paths), GROUP):
            for name, make in sides.items():
                start = time.perf_counter()
                for path in paths[first : first + GROUP]:
                    make(path)
                seconds[name].append((time.perf_counter() - start) / len(paths[first : first + GROUP]))
    rates = {name: 1 / statistics.median(each) for name, each in seconds.items()}
    difference = torch.stack(differences)
    result = {
        "pictures": len(paths), "threads": 1, "pictures_per_second": {k: round(v, 1) for k, v in rates.items()},
        "ratio": round(rates["longllava"] / rates["transformers"], 2),
        "mean_difference_of_255": round(float(difference.mean()), 2),
        "largest_difference_of_255": round(float(difference.max()), 1),
    }  # fmt: skip
    for name, rate in rates.items():
        print(f"{name:>14}: {rate:6.1f} pictures/s on one core")
    print(f"ratio {result['ratio']}; difference of the pixels: mean {result['mean_difference_of_255']}"
          f" of 255, largest {result['largest_difference_of_255']}")  # fmt: skip
    if options.save:
        from longllava.files import write_json
        from longllava.train.record import environment

        write_json(options.save, {**result, "environment": environment()})


if __name__ == "__main__":
    main()
