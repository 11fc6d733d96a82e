"""Peak memory of a packed training step against the estimate that a run prints before it starts.

    python benchmarks/training_memory.py --save benchmarks/results/training-memory-cpu.json

The model has LongLLaVA-9B's layout, 32 layers with attention in every eighth, and a fraction of its width; the row has
40,960 tokens, most of them of pictures. Two steps by the engine of the training loop, so that AdamW's state is there.
Measured on a CPU is the resident memory of the process (VmHWM) above what it was before the model was made, on a GPU
what torch allocated. glibc is told to give every large block back when it is freed (MALLOC_MMAP_THRESHOLD_): else it
keeps the holes between them, and what is measured is its heap.
"""

import _environment  # noqa: F401

import dataclasses
import gc
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from _options import check_target

from longllava.cli import run
from longllava.errors import InputError

GLIBC = "MALLOC_MMAP_THRESHOLD_"  # read when a process starts
SAMPLE, LEARNED = 4096, 64  # tokens of a sample, and of its end that are learned


def shrunken(name: str, factor: int) -> Any:
    """The config of a shipped model with all widths divided by `factor`; an encoder of one layer stands for its own."""
    from longllava.config import ModelConfig
    from longllava.settings import load
    from longllava.shipped import shipped

    config = load(ModelConfig, shipped("configs", f"models/{name}.yaml"))
    if config.encoder is None or config.bridge is None:
        raise InputError(f"--model {name}: it reads text only; give one that reads pictures, such as longllava-9b")
    backbone = config.backbone
    small = dataclasses.replace(
        backbone, width=backbone.width // factor, mlp_width=backbone.mlp_width // factor,
        head_dim=max(8, backbone.head_dim * 8 // factor), n_heads=backbone.n_heads // 8,
        n_kv_heads=backbone.n_kv_heads // 8, dt_rank=max(1, backbone.dt_rank // factor),
        vocab_size=backbone.vocab_size // factor,
    )  # fmt: skip
    encoder = dataclasses.replace(config.encoder, width=1024 // factor, n_layers=1, n_heads=1, mlp_width=4096 // factor,
                                  select_layer=-1, weights=None)  # fmt: skip
    bridge = dataclasses.replace(config.bridge, hidden=config.bridge.hidden // factor)
    return dataclasses.replace(config, backbone=small, encoder=encoder, bridge=bridge, n_parameters=None)


def packed_row(config: Any, n_tokens: int) -> tuple[Any, Any]:
    """Samples of pictures and a short answer, and the pictures' features."""
    import torch

    from longllava.data.packing import Batch

    per_image = config.bridge.tokens_per_image
    at = torch.arange(n_tokens)
    places = [start + i for start in range(0, n_tokens, SAMPLE)
              for i in range(0, SAMPLE - 2 * LEARNED - per_image, per_image)]  # fmt: skip
    spans = torch.tensor([(0, place, per_image, number) for number, place in enumerate(places)])
    labels_BL = torch.where(at % SAMPLE >= SAMPLE - LEARNED, 7, -100)[None]
    n_samples = -(-n_tokens // SAMPLE)
    batch = Batch(
        torch.full((1, n_tokens), 5), labels_BL, (at // SAMPLE).int()[None], (at % SAMPLE)[None], spans,
        [str(number) for number in range(len(places))], torch.zeros(0, 4, dtype=torch.int64), n_tokens,
        int((labels_BL >= 0).sum()), ["sample"] * n_samples, ["source"] * n_samples,
    )  # fmt: skip
    return batch, torch.randn(len(places), per_image, config.encoder.width)


def peak_of_steps(stage: Any, config: Any, n_tokens: int, dtype: Any) -> tuple[int, int]:
    """(bytes above those before the model, bytes before)."""
    from longllava.evals.memory import PeakMemory
    from longllava.model import Model
    from longllava.train.engines import Plain
    from longllava.train.forward import Forward
    from longllava.train.optimizer import select_parts

    def steps(config: Any, n_tokens: int) -> None:
        model = Model(config)
        model.initialise_(0)
        parameters = select_parts(model, stage.train_only)
        model.backbone.gradient_checkpointing = stage.gradient_checkpointing
        model.backbone.offload_activations = stage.offload_activations
        engine = Plain(stage, dtype)
        engine.prepare(Forward(model, stage.aids), parameters, None)
        batch, features = packed_row(config, n_tokens)
        for _ in range(2):
            inputs = batch.to(engine.device), features.to(engine.device), None, False
            engine.run(inputs, scale=1 / batch.n_labels, last=True)
            engine.step(1e-4)

    steps(config, SAMPLE)  # libraries, threads and their buffers
    gc.collect()
    memory = PeakMemory()
    memory.start()
    before = memory.bytes()
    steps(config, n_tokens)
    return memory.bytes() - before, before


def training_memory(
    model: Annotated[str, typer.Option(help="A config of configs/models.")] = "longllava-9b",
    factor: Annotated[int, typer.Option(min=1, help="By which widths are divided.")] = 32,
    tokens: Annotated[int, typer.Option(min=SAMPLE, help="Of the packed row.")] = 40960,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing.")] = True,
    device: Annotated[str, typer.Option(help="cpu, or auto for the GPU.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    save: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    """Two packed steps of a shrunken model: peak memory, measured and as estimated."""
    check_target(save)
    if sys.platform == "linux" and GLIBC not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, GLIBC: "65536"})
    from longllava.api import checked_dtype
    from longllava.settings import load
    from longllava.train.config import TrainConfig
    from longllava.train.memory import estimate

    if device not in ("cpu", "auto"):
        raise InputError(f"--device: got {device!r}, allowed: cpu, auto")
    kind, config = checked_dtype(dtype, None), shrunken(model, factor)
    stage = load(TrainConfig, {
        "stage": "stage3", "model": model, "recipe": "", "train_only": ["bridge", "backbone"], "device": device,
        "gradient_checkpointing": checkpointing, "phases": [{"steps": 2, "row_length": tokens}],
    })  # fmt: skip
    expected = estimate(stage, config, 1, kind.itemsize)
    measured, before = peak_of_steps(stage, config, tokens, kind)
    print(f"estimate: {expected}")
    print(f"measured: {measured / 1e6:,.0f} MB above {before / 1e6:,.0f} MB; estimate / measured ="
          f" {expected.total() / measured:.3f}")  # fmt: skip
    if save is not None:
        from longllava.files import write_json
        from longllava.train.record import environment

        report = {**environment("cpu" if device == "cpu" else None), "model": model, "factor": factor,
                  "tokens": tokens, "dtype": dtype, "gradient_checkpointing": checkpointing,
                  "estimate_bytes": expected.total(), "estimate": dataclasses.asdict(expected),
                  "measured_bytes": measured, "before_bytes": before,
                  "estimate_over_measured": round(expected.total() / measured, 4)}  # fmt: skip
        print(write_json(save, report))


if __name__ == "__main__":
    run(lambda: typer.run(training_memory), "training_memory")
