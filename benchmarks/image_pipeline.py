"""720p JPEG files to what the encoder multiplies, per core: this library, and transformers' CLIPImageProcessor (PIL).

    python benchmarks/image_pipeline.py --save benchmarks/results/image_pipeline-cpu.json

Both sides make the same geometry, LLaVA's: padded to a square with the mean colour, 336 x 336, bicubic, normalised. One
thread each, the same files, already in the system's cache; decoding is included. The sides take turns, eight files at
a time, and the ratio is the median of their turns' ratios, so that what else runs on the machine slows both alike. Big
JPEGs are decoded scaled here (the DCT at one half), which changes the resampling: by how much is printed, in levels of
255, beside the difference that is left when they are decoded whole.
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
from _options import check_target

from longllava.cli import run
from longllava.config import EncoderConfig
from longllava.errors import InputError
from longllava.inputs.image import open_image, square, square_pixels

CONFIG = EncoderConfig()  # CLIP ViT-L/14-336
GROUP = 8
QUALITIES = (75, 80, 85, 90)


def write_pictures(folder: Path, n: int) -> list[Path]:
    """Like photographs, 1280 x 720, JPEG quality 75 to 90, 4:2:0: noise with a photograph's 1/f spectrum, and edges."""
    rng = np.random.default_rng(0)
    amplitudes = 1 / np.maximum(np.hypot(np.fft.fftfreq(720)[:, None], np.fft.rfftfreq(1280)), 1 / 1280)
    paths = []
    for number in range(n):
        waves = rng.normal(size=(3, *amplitudes.shape, 2)).view(np.complex128)[..., 0]
        fields = np.fft.irfft2(waves * amplitudes, s=(720, 1280))
        fields /= fields.std(axis=(1, 2), keepdims=True)
        pixels = 120 + 45 * np.stack([0.9 * fields[0] + 0.3 * field for field in fields], -1)
        for _ in range(12):
            left, top, width, height = rng.integers((0, 0, 20, 20), (1100, 600, 200, 200))
            pixels[top : top + height, left : left + width] += rng.normal(0, 50, 3)
        paths.append(folder / f"{number}.jpg")
        quality = QUALITIES[number % len(QUALITIES)]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=quality, subsampling="4:2:0")
    return paths


def ours(paths: list[Path]) -> torch.Tensor:
    """As prefill does, and the encoder's first line."""
    pixels_N3SS = torch.stack([square_pixels(path, CONFIG.image_size, CONFIG.mean) for path in paths])
    return (pixels_N3SS.float() - MEAN) / STD


MEAN, STD = (torch.tensor(values).view(3, 1, 1) * 255 for values in (CONFIG.mean, CONFIG.std))


def theirs_of(processor):
    def theirs(paths: list[Path]) -> torch.Tensor:
        """LLaVA's expand2square, then the processor."""
        squares = []
        for path in paths:
            with Image.open(path) as file:
                image = file.convert("RGB")
            side = max(image.size)
            squares.append(Image.new("RGB", (side, side), tuple(int(value * 255) for value in CONFIG.mean)))
            squares[-1].paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return processor(squares, return_tensors="pt")["pixel_values"]

    return theirs


def undrafted(path: Path) -> torch.Tensor:
    """As ours, from the picture decoded whole."""
    return square(open_image(path), CONFIG.image_size, CONFIG.mean)


def levels(difference: torch.Tensor) -> dict[str, float]:
    """Of 255."""
    return {"mean": round(float(difference.abs().mean()), 3), "largest": round(float(difference.abs().max()), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=64, help="files (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="times that all are read (default: %(default)s)")
    parser.add_argument("--save", type=Path, help="write the figures into this JSON file")
    options = parser.parse_args()
    if options.pictures < 1 or options.repeat * -(-options.pictures // GROUP) < 2:
        raise InputError(f"--pictures and --repeat must be at least 1, and make two turns of {GROUP} pictures or more")
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    except ImportError:
        raise SystemExit("this comparison needs transformers 5: pip install transformers") from None
    check_target(options.save)
    torch.set_num_threads(1)
    side = {"height": CONFIG.image_size, "width": CONFIG.image_size}
    processor = CLIPImageProcessorPil(size={"shortest_edge": CONFIG.image_size}, crop_size=side)
    sides = {"longllava": ours, "transformers": theirs_of(processor)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), options.pictures)
        groups = [paths[first : first + GROUP] for first in range(0, len(paths), GROUP)]
        made = [make(groups[0]) * STD for make in sides.values()]  # also the first calls, which import
        exact = torch.stack([undrafted(path) for path in groups[0]]).float() - MEAN
        for _ in range(options.repeat):
            for group in groups:
                for name, make in sides.items():
                    start = time.perf_counter()
                    make(group)
                    seconds[name].append((time.perf_counter() - start) / len(group))
    ratios = [theirs / mine for mine, theirs in zip(seconds["longllava"], seconds["transformers"])]
    quarters = statistics.quantiles(ratios, n=4)
    result = {
        "pictures": len(paths), "repetitions": len(ratios), "threads": 1,
        "pictures_per_second": {name: round(1 / statistics.median(each), 1) for name, each in seconds.items()},
        "ratio": round(quarters[1], 2), "ratio_quarters": [round(quarters[0], 2), round(quarters[2], 2)],
        "levels_from_transformers": levels(made[0] - made[1]),
        "levels_from_transformers_decoded_whole": levels(exact - made[1]),
    }  # fmt: skip
    for name, rate in result["pictures_per_second"].items():
        print(f"{name:>14}: {rate:6.1f} pictures/s on one core")
    print(
        f"ratio {quarters[1]:.2f}, median of {len(ratios)} turns (half of them {quarters[0]:.2f} to {quarters[2]:.2f})"
    )
    for what in ("levels_from_transformers", "levels_from_transformers_decoded_whole"):
        print(f"{what.replace('_', ' ')}: mean {result[what]['mean']} of 255, largest {result[what]['largest']}")
    if options.save:
        from longllava.files import write_json
        from longllava.train.record import environment

        write_json(options.save, {**result, "environment": environment("cpu")})


if __name__ == "__main__":
    run(main, "image_pipeline")
