"""One prompt of 1,000 pictures from files on disk: seconds to the first answer, process start included, and memory.

    python benchmarks/prompt1000.py
    python benchmarks/prompt1000.py --tokens-per-image 144 --repeat 3 --save benchmarks/results/prompt1000-cpu.json

Each prompt runs in a process of its own, which is what a person who types one command waits for. Its memory is
the peak of its resident pages. A second size (twice the first) tells what a further picture costs, beside the
keys and values that the attention layers must keep of it. The pictures are PNG files of the built-in world,
written before and so still in the system's cache; one of them is asked about.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _environment  # noqa: F401
from _options import check_target

from longllava.errors import InputError, LongLLaVAError

PRINTED = "ANSWER "  # begins the child's one line that is no answer text


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--images", type=int, default=1000, metavar="N", help="pictures of the prompt (default: %(default)s)")
    add("--more", type=int, metavar="N", help="the second, larger prompt; 0 for none (default: twice --images)")
    add("--tokens-per-image", type=int, metavar="N", help="nano: 36 or 144 (default: the model's own)")
    add("--model", default="nano", metavar="NAME", help="a shipped name or a folder (default: %(default)s)")
    add("--dtype", help="float32, bfloat16, float16 (default: what the hardware multiplies fast)")
    add("--repeat", type=int, default=1, metavar="N", help="runs of each size; the median counts (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="draws the pictures (default: 0)")
    add("--save", metavar="FILE", help="write the result as JSON")
    add("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    chosen = options()
    if chosen.child:
        answer_one(json.loads(chosen.child))
        return
    more = 2 * chosen.images if chosen.more is None else chosen.more
    if chosen.images < 1 or chosen.repeat < 1 or (more and more <= chosen.images):
        raise InputError("--images and --repeat must be at least 1, and --more above --images, or 0")
    check_target(chosen.save)
    sizes = [chosen.images, more] if more else [chosen.images]
    with tempfile.TemporaryDirectory(prefix="longllava-pictures-") as folder:
        question, answer = write_pictures(Path(folder), sizes, chosen.seed)
        runs = {n: [one_prompt(chosen, folder, n, question) for _ in range(chosen.repeat)] for n in sizes}
    result = {"question": question, "right_answer": answer, "prompts": [summary(n, runs[n]) for n in sizes]}
    result |= growth(result["prompts"]) if len(sizes) > 1 else {}
    report(result)
    if chosen.save:
        from longllava.files import write_json
        from longllava.train.record import environment

        print(write_json(chosen.save, {**environment("cpu"), **result}))


def write_pictures(folder: Path, sizes: list[int], seed: int) -> tuple[str, str]:
    """PNG files 0.png ... of a haystack and one needle, amid the smaller prompt; the question and its answer."""
    from longllava.data.images import open_reference
    from longllava.evals.vniah_task import Settings, draw_haystack, draw_needles

    settings = Settings(images=tuple(sizes), n_needles=1, seed=seed)
    needle = draw_needles(settings)[0]
    pictures = draw_haystack(settings, sizes[-1] - 1)
    pictures.insert(sizes[0] // 2, needle.picture)
    for i, picture in enumerate(pictures):
        open_reference(picture).save(folder / f"{i}.png")
    return needle.question, needle.answer


def one_prompt(chosen: argparse.Namespace, folder: str, n: int, question: str) -> dict:
    """Start a process that answers, and time it from outside."""
    task = {"folder": folder, "n": n, "question": question, "model": chosen.model, "dtype": chosen.dtype,
            "tokens_per_image": chosen.tokens_per_image}  # fmt: skip
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, __file__, "--child", json.dumps(task)], stdout=subprocess.PIPE, text=True)
    first = child.stdout.readline()
    seconds = time.perf_counter() - started
    rest = child.stdout.read()
    if child.wait() or not first.startswith(PRINTED):
        sys.exit(child.returncode or 1)  # it has said why
    return {"first_piece": json.loads(first.removeprefix(PRINTED)), "seconds": seconds, **json.loads(rest)}


def answer_one(task: dict) -> None:
    """The measured process: load, read, answer. What it says first is printed as soon as it is there."""
    from longllava import LongLLaVA
    from longllava.evals.memory import resident_peak

    model = LongLLaVA.from_pretrained(
        task["model"], device="cpu", dtype=task["dtype"], tokens_per_image=task["tokens_per_image"]
    )
    paths = [Path(task["folder"]) / f"{i}.png" for i in range(task["n"])]
    pieces = model.generate(task["question"], images=paths, max_new_tokens=16, stream=True)
    first = next(pieces, "")
    print(PRINTED + json.dumps(first), flush=True)
    cpu_seconds = round(time.process_time(), 2)
    answer = first + "".join(pieces)
    peak = resident_peak()
    config, weight = model.model.config.backbone, model.model.backbone.embed_tokens.weight
    n_attention = config.mixers().count("attention")
    per_token = 2 * n_attention * config.n_kv_heads * config.head_dim * weight.element_size()
    per_image = model.session(images=paths[:1] * 2).n_tokens - model.session(images=paths[:1]).n_tokens
    measured = {
        "answer": answer.strip(),
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak,
        "tokens_per_image_with_tags": per_image,
        "key_value_bytes_per_image": per_image * per_token,
        "dtype": str(weight.dtype).removeprefix("torch."),
    }
    print(json.dumps(measured))


def summary(n: int, runs: list[dict]) -> dict:
    """Of the runs of one size: median and all times, highest peak, the answer."""
    seconds = [round(run["seconds"], 2) for run in runs]
    kept = {name: runs[0][name] for name in ("answer", "dtype", "cpu_seconds", "tokens_per_image_with_tags",
                                             "key_value_bytes_per_image")}  # fmt: skip
    peak = max(run["peak_bytes"] for run in runs)
    return {"images": n, "seconds_to_first_answer": round(statistics.median(seconds), 2), "all_seconds": seconds,
            "peak_bytes": peak, **kept}  # fmt: skip


def growth(prompts: list[dict]) -> dict:
    """What a further picture adds to the peak, beside its keys and values."""
    small, large = prompts
    bytes_per_image = (large["peak_bytes"] - small["peak_bytes"]) / (large["images"] - small["images"])
    return {
        "bytes_per_further_image": round(bytes_per_image),
        "times_its_keys_and_values": round(bytes_per_image / small["key_value_bytes_per_image"], 2),
    }


def report(result: dict) -> None:
    for row in result["prompts"]:
        times = f" (all: {', '.join(map(str, row['all_seconds']))})" if len(row["all_seconds"]) > 1 else ""
        print(
            f"{row['images']:,} pictures, {row['tokens_per_image_with_tags']} tokens each with their tags,"
            f" {row['dtype']}: first answer after {row['seconds_to_first_answer']} s{times}, process start included"
            f" ({row['cpu_seconds']} s of processor time); peak memory {row['peak_bytes'] / 1e6:,.0f} MB;"
            f" said {row['answer']!r}, right is {result['right_answer']!r}"
        )
    if "bytes_per_further_image" in result:
        print(f"a further picture: {result['bytes_per_further_image']:,} bytes,"
              f" {result['times_its_keys_and_values']} times its keys and values"
              f" ({result['prompts'][0]['key_value_bytes_per_image']:,})")  # fmt: skip


if __name__ == "__main__":
    try:  # not cli.run, whose imports would be part of the time of the process that is measured
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (LongLLaVAError, OSError) as error:
        sys.exit(f"prompt1000: {error}")
