"""The paper's table of efficiency: 100,000 text tokens in, 1 and 1,000 tokens out.

    python benchmarks/efficiency.py --save benchmarks/results/efficiency-cpu.json
    python benchmarks/efficiency.py --model longllava-9b --device cuda       # random weights in the true shape

Rows, each a process of its own: this library, and with --peer-tokens transformers' Jamba beside it (its kernels where
they are installed, else its torch path, which holds three (channels, tokens, 16) fp32 tensors per layer: give it as
many tokens as fit). A trained model's peers read one folder in transformers' layout, so that both have the same
weights, and the logits after the prompt are compared; what transformers' Jamba has no word for (nano's norms of queries
and keys, its length scale) is left out of both. Random models have the same shape only. Below them the rows that the
paper published, on an A100 of 80 GB with vLLM and Int8 (arXiv 2409.02889v3, table 1): other hardware, other software,
for orientation only. Prefill is the time to the first token, tokens/s = (out - 1) / (time of all - prefill), memory is
the process's peak (on a GPU, torch's).
"""

import _environment  # noqa: F401

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from _models import is_random, made_in, open_model
from _options import check_target, whole_numbers

from longllava.cli import run
from longllava.errors import InputError
from longllava.evals.memory import PeakMemory

Measured = tuple[float, float, list[float]]
PUBLISHED = (
    # model, prefill s, tokens/s, GB
    ("Falcon-Mamba-V 7B (Mamba)", 14.3, 72.6, 32.1),
    ("LLaVA-1.6 13B (transformer)", 34.0, 14.7, 79.4),
    ("LongLLaVA-9B", 16.5, 62.1, 38.7),
    ("LongLLaVA-A13B (53B)", 25.5, 37.6, 79.1),
)


def measure_ours(task: dict[str, Any]) -> Measured:
    """Seconds to the first token, and of the others; the logits of the first."""
    import torch

    from longllava.generation.sampling import Sampling
    from longllava.inputs.processor import Encoded

    model = open_model(task["model"], task["device"], task["dtype"], int8=task["int8"])
    session = model.fresh(chunk_tokens=task["chunk_tokens"])
    reader = session.reader
    ids = token_ids(task)
    reader.read(Encoded(ids[:64]), (), reader.empty_state(64), 0)  # threads and buffers
    model.tokenizer.eos_id = -1  # no answer ends early
    started = time.perf_counter()
    state = reader.empty_state(len(ids) + task["new_tokens"])
    hidden_1D, state = reader.read(Encoded(ids), (), state, 0)
    drawn = session.tokens(hidden_1D, state, len(ids), Sampling(max_new_tokens=task["new_tokens"]))
    next(drawn)
    first = time.perf_counter() - started
    if sum(1 for _ in drawn) != task["new_tokens"] - 1:
        raise InputError("decoding ended early")
    seconds = time.perf_counter() - started - first
    with torch.inference_mode():
        return first, seconds, model.model.logits(hidden_1D)[0].float().tolist()


def token_ids(task: dict[str, Any]) -> list[int]:
    import torch

    return torch.randint(3, task["highest"], (task["tokens"],), generator=torch.Generator().manual_seed(0)).tolist()


def measure_transformers(task: dict[str, Any]) -> Measured:
    import torch
    from transformers import JambaConfig, JambaForCausalLM
    from transformers.utils import logging

    from longllava.api import checked_device, checked_dtype
    from longllava.checkpoints.published import BACKBONE

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it says at every layer which kernels are missing
    backbone = open_config(task["model"]).backbone
    device = checked_device(task["device"])
    torch.manual_seed(0)
    fields = {theirs: getattr(backbone, ours) for theirs, ours in BACKBONE.items()}
    fields |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "attn_implementation": "sdpa"}
    kernels = device.type == "cuda"
    config, dtype = JambaConfig(**fields, use_mamba_kernels=kernels), checked_dtype(task["dtype"], device)
    if is_random(task["model"]):
        model = made_in(dtype, device, lambda: JambaForCausalLM(config))
    else:
        model = JambaForCausalLM.from_pretrained(task["model"], config=config, dtype=dtype).to(device)
    model = model.to(dtype).eval()
    ids_1L = torch.tensor([token_ids(task)], device=device)
    with torch.inference_mode():
        model(ids_1L[:, :64])
        started = time.perf_counter()
        out = model(ids_1L, use_cache=True, logits_to_keep=1)
        logits_V = out.logits[0, -1]
        token_11 = out.logits[:, -1:].argmax(-1)
        token_11.item()
        first = time.perf_counter() - started
        for number in range(task["new_tokens"] - 1):
            position_1 = torch.tensor([task["tokens"] + number], device=device)
            out = model(token_11, past_key_values=out.past_key_values, use_cache=True, position_ids=position_1[None])
            token_11 = out.logits[:, -1:].argmax(-1)
            token_11.item()
    return first, time.perf_counter() - started - first, logits_V.float().tolist()


def as_jamba(name: str, folder: Path) -> str:
    """A trained model's language model as transformers writes it; what it has no word for is left out."""
    import dataclasses

    import torch

    from longllava.checkpoints import find_folder, load_model, save_model
    from longllava.inputs.tokenizer import Tokenizer
    from longllava.model import Model

    model = load_model(find_folder(name), dtype=torch.float32)
    tokenizer = Tokenizer.from_folder(find_folder(name), model.config.prompt)
    backbone = dataclasses.replace(model.config.backbone, qk_norm=False, log_length_scale=False)
    config = dataclasses.replace(model.config, encoder=None, bridge=None, backbone=backbone, n_parameters=None)
    plain = Model(config)
    plain.load_state_dict({key: tensor for key, tensor in model.state_dict().items() if key in plain.state_dict()})
    return str(save_model(plain, tokenizer, folder, scheme="jamba"))


def open_config(name: str) -> Any:
    from longllava.checkpoints.folders import shipped_models
    from longllava.checkpoints.published import read_config
    from longllava.config import ModelConfig
    from longllava.settings import load
    from longllava.shipped import shipped

    if name in shipped_models() or Path(name).is_dir():
        from longllava.checkpoints import find_folder

        return read_config(find_folder(name))
    return load(ModelConfig, shipped("configs", f"models/{name}.yaml"))


WAYS = {"longllava": measure_ours, "transformers": measure_transformers}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    memory = PeakMemory()
    memory.start()
    first, rest, logits = WAYS[task["way"]](task)
    return {
        "way": task["way"],
        "tokens_in": task["tokens"],
        "tokens_out": task["new_tokens"],
        "prefill_seconds": first,
        "tokens_per_second": (task["new_tokens"] - 1) / rest,
        "peak_bytes": memory.bytes(),
        "logits": logits,
    }


def in_a_process_of_its_own(task: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"{task['way']}: the measured process ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def shown(task: dict[str, Any]) -> dict[str, Any]:
    row = in_a_process_of_its_own(task)
    print(line(row), flush=True)
    return row


def highest_id(name: str) -> int:
    """Ids below it are tokens of ours (random models read with nano's tokenizer) and of transformers' alike."""
    from longllava.checkpoints import find_folder
    from longllava.inputs.tokenizer import Tokenizer

    folder = find_folder("nano" if is_random(name) else name)
    return Tokenizer.from_folder(folder, open_config(str(folder)).prompt).vocab_size


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['way']:28} {row['tokens_in']:8,} in, {row['tokens_out']:5,} out: prefill {row['prefill_seconds']:8.2f} s"
        f" ({row['tokens_in'] / row['prefill_seconds']:9,.0f} tokens/s),"
        f" then {row['tokens_per_second']:7.1f} tokens/s, {row['peak_bytes'] / 1e9:6.2f} GB"
    )


def chart(rows: list[dict[str, Any]], title: str, file: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = [f"{row['way']}, {row['tokens_in']:,} in" for row in rows]
    figure = Figure(figsize=(10, 1.4 + 0.5 * len(rows)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    values = (
        ("tokens read per second", [row["tokens_in"] / row["prefill_seconds"] for row in rows]),
        ("tokens written per second", [row["tokens_per_second"] for row in rows]),
        ("peak memory, GB", [row["peak_bytes"] / 1e9 for row in rows]),
    )
    for axes, (name, numbers) in zip(figure.subplots(1, 3, sharey=True), values, strict=True):
        bars = axes.barh(range(len(rows)), numbers[::-1], tick_label=labels[::-1])  # alike, they would share a place
        shown = [f"{number:,.0f}" if number >= 10 else f"{number:.2f}" for number in numbers[::-1]]
        axes.bar_label(bars, shown, padding=3, fontsize=8)
        axes.set_xlim(right=1.25 * max(numbers))
        axes.set_title(name, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, parse_math=False)  # a name may hold $
    figure.savefig(file, format="png")


def efficiency(
    tokens: Annotated[int, typer.Option(min=0, help="Text tokens of the prompt; 0: only the peers' rows.")] = 100_000,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the answer.")] = 1000,
    peer_tokens: Annotated[str, typer.Option(help="Prompts for transformers and us, side by side; empty: none.")] = "",
    peer_new_tokens: Annotated[int, typer.Option(min=2, help="Their answers' tokens.")] = 32,
    model: Annotated[str, typer.Option(help="A shipped model, a folder, or a config (then random weights).")] = "nano",
    device: Annotated[str | None, typer.Option(help="cpu, cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16; default: what the hardware is fast at.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Our rows with int8 weights.")] = False,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Tokens prefilled at a time.")] = 2048,
    save: Annotated[Path | None, typer.Option(help="JSON file; the chart lies beside it.")] = None,
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """100,000 text tokens in, 1 and 1,000 tokens out."""
    if child:
        print(json.dumps(measure(json.loads(child))))
        return
    check_target(save)
    lengths = whole_numbers(peer_tokens, "--peer-tokens") if peer_tokens else []
    if not tokens and not lengths:
        raise InputError("--tokens 0: nothing is left to measure without --peer-tokens")
    task = {"device": device, "dtype": dtype, "chunk_tokens": chunk_tokens, "int8": int8,
            "highest": highest_id(model)}  # fmt: skip
    rows = [] if not tokens else [
        shown({**task, "model": model, "way": "longllava", "tokens": tokens, "new_tokens": new_tokens})
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        peer = model if is_random(model) or not lengths else as_jamba(model, Path(folder) / Path(model).name)
        for length in lengths:
            one = {**task, "model": peer, "tokens": length, "new_tokens": peer_new_tokens}
            ours, theirs = (shown({**one, "way": way}) for way in ("longllava", "transformers"))
            rows += [ours, theirs]
            if peer != model:
                error = max(abs(a - b) for a, b in zip(ours.pop("logits"), theirs.pop("logits"), strict=True))
                ours["largest_difference_of_logits"] = error
                first = theirs["prefill_seconds"] / ours["prefill_seconds"]
                after = ours["tokens_per_second"] / theirs["tokens_per_second"]
                print(f"  {first:.1f} times as fast to the first token, {after:.1f} times after it; the same weights,"
                      f" logits differ by at most {error:.1e}", flush=True)  # fmt: skip
    for row in rows:
        row.pop("logits", None)
    print("published, on an A100 with vLLM and Int8 (100,000 in, 1,000 out):")
    for name, seconds, rate, gigabytes in PUBLISHED:
        print(f"{name:28} prefill {seconds:6.1f} s, then {rate:5.1f} tokens/s, {gigabytes:5.1f} GB")
    if save is not None:
        from longllava.api import checked_device, checked_dtype
        from longllava.files import write_atomic, write_json
        from longllava.train.record import environment

        used = str(checked_dtype(dtype, checked_device(device))).removeprefix("torch.") + ", ours int8" * int8
        weights = "random, in the true shape" if is_random(model) else "trained; beside transformers without qk_norm"
        columns = ("model", "prefill_seconds", "tokens_per_second", "gigabytes")
        published = [dict(zip(columns, row, strict=True)) for row in PUBLISHED]
        report = {**environment(device), "model": model, "dtype": used, "weights": weights, "rows": rows,
                  "published_on_a100": published}  # fmt: skip
        print(write_json(save, report))
        where = f"{report['device'] if report['device'] != 'cpu' else report['processor']}, {report['threads']} threads"
        print(write_atomic(save.with_suffix(".png"), lambda file: chart(rows, f"{model} in {used} on {where}", file)))


if __name__ == "__main__":
    run(lambda: typer.run(efficiency), "efficiency")
