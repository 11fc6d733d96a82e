"""A random checkpoint of about 1 B parameters in the published layout of LongLLaVA-9B: loaded, saved, loaded again.

    python benchmarks/checkpoints.py
    python benchmarks/checkpoints.py --save benchmarks/results/checkpoints-cpu.json

The model is the 9B at a quarter of its width, with the whole CLIP ViT-L/14-336, in bfloat16 and several shards.
Loading is timed in a process of its own; its memory is the peak of resident pages above what it held before.
The loaded model is then written in LongLLaVA's names, and its language model in transformers' Jamba names, and each
folder is read again: every tensor must be the same. Exit code 1 when one differs, or memory passes its bound, the
model and twice its largest tensor.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _environment  # noqa: F401
import torch
from _options import check_target

from longllava.checkpoints import load_model, save_model
from longllava.checkpoints.convert import on_meta
from longllava.checkpoints.load import stored_dtype
from longllava.checkpoints.save import config_fields, renamed
from longllava.checkpoints.write import Output, write_folder
from longllava.cli import run
from longllava.config import BackboneConfig, BridgeConfig, EncoderConfig, ModelConfig
from longllava.files import write_json
from longllava.train.record import environment

SHARD_BYTES = 500_000_000
SLACK = 50_000_000  # modules of a model of this size, and the heap's own


class NoTokenizer:
    """Folders of this benchmark hold weights alone."""

    def save(self, folder: Path) -> None:
        pass


def scaled_config() -> ModelConfig:
    backbone = BackboneConfig(width=1024, n_heads=8, n_kv_heads=2, mlp_width=3584, dt_rank=64)
    encoder = EncoderConfig(weights="openai/clip-vit-large-patch14-336")
    return ModelConfig(encoder=encoder, bridge=BridgeConfig(hidden=1024), backbone=backbone)


def write_random(folder: Path) -> int:
    """The published layout, tensor by tensor; returns the number of parameters."""
    config = scaled_config()
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    outputs = {}
    for number, (key, tensor) in enumerate(on_meta(config).state_dict().items()):
        shape, dtype = tuple(tensor.shape), stored_dtype(key, torch.bfloat16, torch.bfloat16)

        def make(shape=shape, number=number) -> torch.Tensor:
            n = torch.Size(shape).numel()
            return values.roll(number).repeat(-(-n // len(values)))[:n].view(shape)

        outputs[key] = Output(shape, dtype, make)
    fields = config_fields(config, "longllava", outputs)
    named = renamed(outputs, "longllava")
    write_folder(folder, named, lambda staged: write_json(staged / "config.json", fields), SHARD_BYTES)
    return sum(torch.Size(output.shape).numel() for output in outputs.values())


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(folder: Path) -> dict:
    """Load, and write and read again in both schemes. In this process, which does nothing else."""
    import safetensors.torch  # noqa: F401

    on_meta(scaled_config())  # what is imported at first use is imported now
    before = resident("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    model = load_model(folder)
    seconds = time.perf_counter() - start
    state = model.state_dict()
    sizes = [tensor.numel() * tensor.element_size() for tensor in state.values()]
    row = {"seconds_to_load": round(seconds, 2), "peak_bytes": resident("VmHWM:") - before, "model_bytes": sum(sizes),
           "largest_tensor_bytes": max(sizes)}  # fmt: skip
    for scheme, parts in (("longllava", ()), ("jamba", ("backbone.",))):
        with tempfile.TemporaryDirectory(dir=folder) as other:
            start = time.perf_counter()
            save_model(model, NoTokenizer(), other, scheme=scheme, parts=parts, shard_bytes=SHARD_BYTES)  # type: ignore[arg-type]
            row[f"seconds_to_save_{scheme}"] = round(time.perf_counter() - start, 2)
            again = load_model(other).state_dict()
            wanted = [key for key in state if not parts or key.startswith(parts)]
            equal = list(again) == wanted and all(torch.equal(again[key], state[key]) for key in wanted)
            row[f"equal_{scheme}"] = equal
            del again
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", type=Path, help="write the figures into this JSON file")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    check_target(options.save)
    with tempfile.TemporaryDirectory() as folder:
        n_parameters = write_random(Path(folder))
        command = [sys.executable, __file__, "--measure", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        row = {"n_parameters": n_parameters, **json.loads(done.stdout)}
    bound = row["model_bytes"] + 2 * row["largest_tensor_bytes"] + SLACK
    row |= {"bound_bytes": bound, "within_bound": row["peak_bytes"] <= bound}
    print(json.dumps(row, indent=2))
    if options.save:
        write_json(options.save, {**row, "environment": environment("cpu")})
    sys.exit(not (row["within_bound"] and row["equal_longllava"] and row["equal_jamba"]))


if __name__ == "__main__":
    run(main, "checkpoints")
