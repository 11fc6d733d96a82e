"""How seconds and memory grow with the number of pictures in one prompt.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --images 1,10,100,1000,3000 --tokens 36 --save benchmarks/results/scaling-cpu.json
    python benchmarks/scaling.py --model longllava-9b --device cuda --pixels device --int8    # random weights

Each point is a process of its own: load, read the pictures from PNG files (64 different ones, each decoded and
encoded as often as it stands in the prompt), answer with one token. Seconds are of reading and answering, memory is
the process's peak (on a GPU, torch's). With --pixels device the pictures are pixels where the model is, and on a GPU
each point has the least seconds that its arithmetic takes at rates measured there; gpu_first_token.py measures many
prompts in one process. A point that would take more than --budget seconds, judged by the one before it, is not
measured, and the table says so. Writes the points, log-log slopes and, beside the JSON, a chart, after each point.
"""

import _environment  # noqa: F401

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from _limits import ceilings, prompt_limit
from _models import is_random, key_value_bytes, open_model
from _options import check_target, whole_numbers

from longllava.cli import run
from longllava.errors import InputError
from longllava.evals.memory import PeakMemory

N_FILES = 64
SLOPE_FROM = 100  # pictures; below, starting costs hide the slope


def write_pictures(folder: Path) -> None:
    from longllava.data.images import open_reference
    from longllava.evals.vniah_task import Settings, draw_haystack

    for number, picture in enumerate(draw_haystack(Settings(images=(N_FILES,), n_needles=1, seed=0), N_FILES)):
        open_reference(picture).save(folder / f"{number}.png")


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One point, in a process that does nothing else."""
    model = open_model(task["model"], task["device"], task["dtype"], task["tokens"], int8=task["int8"])
    device = model.fresh().reader.device
    rates = ceilings(device) if device.type == "cuda" else None
    if task["pixels"] == "device":
        different = random_pixels(model.model.config.encoder.image_size, device)
        paths: list[Any] = [different[number % len(different)] for number in range(task["images"])]
    else:
        paths = [Path(task["folder"]) / f"{number % N_FILES}.png" for number in range(task["images"])]
    model.session(images=paths[:1]).ask("What is this?", max_new_tokens=1)  # threads, buffers and imports
    if rates is not None:  # kernels are compiled for long prompts too
        model.session(images=(paths * 300)[:300]).ask("What is this?", max_new_tokens=1)
    memory = PeakMemory()
    memory.start()
    started = time.perf_counter()
    album = model.session(images=paths)
    read = time.perf_counter() - started
    album.ask("What number is on the last picture?", max_new_tokens=1)
    answered = time.perf_counter() - started - read
    point: dict[str, Any] = {}
    if rates is not None:
        point["limit"] = prompt_limit(model.model.config, album.n_tokens, task["images"], rates, task["int8"])["total"]
    return point | {
        "images": task["images"],
        "tokens_per_image": task["tokens"],
        "prompt_tokens": album.n_tokens,
        "seconds_to_read": read,
        "seconds_to_answer": answered,
        "milliseconds_per_image": read / task["images"] * 1e3,
        "peak_bytes": memory.bytes(),
        "key_value_bytes": album.n_tokens * key_value_bytes(model),
    }


def random_pixels(side: int, device: Any) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (256, 3, side, side), dtype=torch.uint8, generator=generator).to(device)


def in_a_process_of_its_own(task: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"{task['images']} pictures: the measured process ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def expected_seconds(before: dict[str, Any] | None, images: int) -> float:
    """No more than this: as if the time of the point before were all attention's, which grows with the square."""
    if before is None or before["images"] < SLOPE_FROM:
        return 0.0
    return before.get("seconds_to_read", math.inf) * (images / before["images"]) ** 2


def slope(points: list[dict[str, Any]], value: str) -> float | None:
    """Least squares of log value on log images, from SLOPE_FROM pictures on; None with fewer than two points."""
    xy = [(math.log(p["images"]), math.log(p[value])) for p in points if value in p and p["images"] >= SLOPE_FROM]
    if len(xy) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(xy) for values in zip(*xy, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in xy) / sum((x - mean_x) ** 2 for x, _ in xy)


def slopes(points: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """By tokens a picture."""
    of_each: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        of_each.setdefault(str(point["tokens_per_image"]), []).append(point)
    return {n: {value: slope(own, value) for value in ("seconds_to_read", "peak_bytes")} for n, own in of_each.items()}


def line(point: dict[str, Any]) -> str:
    head = f"{point['images']:7,} pictures x {point['tokens_per_image']:3}"
    if "not_measured" in point:
        return f"{head}: not measured, {point['not_measured']}"
    return (
        f"{head}: {point['prompt_tokens']:9,} tokens, read in {point['seconds_to_read']:8.2f} s"
        f" ({point['milliseconds_per_image']:6.2f} ms each), answered in {point['seconds_to_answer']:6.3f} s,"
        f" peak {point['peak_bytes'] / 1e6:8,.0f} MB, of it keys and values {point['key_value_bytes'] / 1e6:7,.0f} MB"
    )


def chart(points: list[dict[str, Any]], title: str, file: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    time_axes, memory_axes = figure.subplots(1, 2)
    for tokens in sorted({point["tokens_per_image"] for point in points}):
        measured = [p for p in points if p["tokens_per_image"] == tokens and "seconds_to_read" in p]
        images = [p["images"] for p in measured]
        label = f"{tokens} tokens a picture"
        time_axes.plot(images, [p["milliseconds_per_image"] for p in measured], "o-", label=label)
        (drawn,) = memory_axes.plot(images, [p["peak_bytes"] / 1e6 for p in measured], "o-", label=label)
        memory_axes.plot(
            images, [p["key_value_bytes"] / 1e6 for p in measured], ":", color=drawn.get_color(),
            label="of it keys and values",
        )  # fmt: skip
    for axes, ylabel in ((time_axes, "milliseconds a picture"), (memory_axes, "peak memory, MB")):
        axes.set_xscale("log")
        axes.set_xlabel("pictures in one prompt")
        axes.set_ylabel(ylabel)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10, parse_math=False)  # a name may hold $
    figure.savefig(file, format="png")


def write_report(
    save: Path, points: list[dict[str, Any]], model: str, device: str | None, pixels: str, int8: bool
) -> tuple[Path, Path]:
    from longllava.files import write_atomic, write_json
    from longllava.train.record import environment

    weights = "random, in the true shape" if is_random(model) else "trained"
    weights += ", int8" if int8 else ""
    report = {
        **environment(device),
        "model": model,
        "weights": weights,
        "pixels": pixels,
        "slopes": slopes(points),
        "points": points,
    }
    where = f"{report['device'] if report['device'] != 'cpu' else report['processor']}, {report['threads']} threads"
    title = f"{model} on {where}"
    return write_json(save, report), write_atomic(save.with_suffix(".png"), lambda file: chart(points, title, file))


def scaling(
    images: Annotated[str, typer.Option(help="Pictures of the prompts.")] = "1,10,100,300,1000,3000,10000",
    tokens: Annotated[str, typer.Option(help="Image tokens per picture.")] = "36,144",
    model: Annotated[str, typer.Option(help="A shipped model, a folder, or a config (then random weights).")] = "nano",
    device: Annotated[str | None, typer.Option(help="cpu, cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16; default: what the hardware is fast at.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="With int8 weights.")] = False,
    pixels: Annotated[str, typer.Option(help="files: PNG files are read; device: pixels lie there.")] = "files",
    budget: Annotated[float, typer.Option(help="Seconds that one point may take.")] = 120.0,
    save: Annotated[Path | None, typer.Option(help="JSON file; the chart lies beside it.")] = None,
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Seconds and memory from one picture to ten thousand."""
    if child:
        print(json.dumps(measure(json.loads(child))))
        return
    if pixels not in ("files", "device"):
        raise InputError(f"--pixels: got {pixels!r}, allowed: files, device")
    check_target(save)
    sizes, poolings = whole_numbers(images, "--images"), whole_numbers(tokens, "--tokens")
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="longllava-pictures-") as folder:
        write_pictures(Path(folder))
        for per_image in poolings:
            before: dict[str, Any] | None = None
            for n in sizes:
                task = {"images": n, "tokens": per_image, "model": model, "device": device, "dtype": dtype,
                        "folder": folder, "int8": int8, "pixels": pixels}  # fmt: skip
                if (expected := expected_seconds(before, n)) > budget:
                    reason = f"up to {expected:,.0f} s, budget {budget:,.0f}" if expected < math.inf else "as before"
                    before = {"images": n, "tokens_per_image": per_image, "not_measured": reason}
                else:
                    before = in_a_process_of_its_own(task)
                print(line(before), flush=True)
                points.append(before)
                if save is not None:  # a point may take minutes, and the next may be stopped
                    written = write_report(save, points, model, device, pixels, int8)
    print(f"log-log slopes from {SLOPE_FROM} pictures on: {slopes(points)}")
    if save is not None:
        print(*written, sep="\n")


if __name__ == "__main__":
    run(lambda: typer.run(scaling), "scaling")
