"""Prefill of a long prompt in bf16, fp32 and int8, side by side in one process.

    python benchmarks/int8_prefill.py --save benchmarks/results/int8_prefill-cpu.json

The same tokens, read by the same weights in each form, in turns; the median of the rounds. int8 quantises inputs as it
goes, which is part of its time; what is not int8 is fp32, or bf16 where its name says so. Whether a processor
multiplies bf16 or int8 in hardware stands in the first line: without bf16, torch's bf16 products are slower than fp32.
"""

import _environment  # noqa: F401

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from _models import is_random, open_model
from _options import check_target

from longllava.cli import run
from longllava.errors import InputError
from longllava.files import write_json

FORMS = {"fp32": ("float32", False), "bf16": ("bfloat16", False), "int8": ("float32", True),
         "int8-bf16": ("bfloat16", True)}  # fmt: skip
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")


def hardware() -> str:
    path = Path("/proc/cpuinfo")
    words = set(path.read_text("utf-8", errors="replace").split()) if path.is_file() else set()
    return ", ".join(flag for flag in FLAGS if flag in words) or "unknown"


def prefill_seconds(model: Any, ids: list[int], chunk_tokens: int | None) -> float:
    import torch

    from longllava.inputs.processor import Encoded

    reader = model.fresh(chunk_tokens=chunk_tokens).reader
    started = time.perf_counter()
    hidden_1D, _ = reader.read(Encoded(ids), (), reader.empty_state(len(ids)), 0)
    with torch.inference_mode():
        int(reader.logits(hidden_1D).argmax())  # a GPU has finished
    return time.perf_counter() - started


def int8_prefill(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 36_000,
    rounds: Annotated[int, typer.Option(min=1, help="Times each form reads them, in turns.")] = 3,
    forms: Annotated[str, typer.Option(help=f"Of {', '.join(FORMS)}.")] = ",".join(FORMS),
    model: Annotated[str, typer.Option(help="A shipped model, a folder, or a config (then random weights).")] = "nano",
    device: Annotated[str | None, typer.Option(help="cpu, cuda; default: a GPU if there is one.")] = None,
    chunk_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens prefilled at a time.")] = None,
    save: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    """Seconds that each form takes to read the prompt."""
    import torch

    wanted = [form.strip() for form in forms.split(",")]
    if unknown := [form for form in wanted if form not in FORMS]:
        raise InputError(f"--forms: got {unknown[0]!r}, allowed: {', '.join(FORMS)}")
    check_target(save)
    models = {form: open_model(model, device, FORMS[form][0], int8=FORMS[form][1]) for form in wanted}
    highest = min(one.tokenizer.vocab_size for one in models.values())
    ids = torch.randint(3, highest, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    print(f"{model}, {tokens:,} tokens, {torch.get_num_threads()} threads; this processor has {hardware()}", flush=True)
    for one in models.values():
        prefill_seconds(one, ids[:2048], chunk_tokens)  # threads, buffers, compiled kernels
    times: dict[str, list[float]] = {form: [] for form in wanted}
    for _ in range(rounds):
        for form, one in models.items():
            times[form].append(prefill_seconds(one, ids, chunk_tokens))
    rows = [{"form": form, "seconds": statistics.median(found), "rounds": [round(second, 3) for second in found]}
            for form, found in times.items()]  # fmt: skip
    for row in rows:
        ratios = ", ".join(f"{other['seconds'] / row['seconds']:.2f} x {other['form']}" for other in rows
                           if other is not row)  # fmt: skip
        print(f"{row['form']:10} {row['seconds']:8.2f} s  {tokens / row['seconds']:9,.0f} tokens/s  speed: {ratios}")
    if save is not None:
        from longllava.train.record import environment

        weights = "random, in the true shape" if is_random(model) else "trained"
        print(write_json(save, {**environment(device), "processor_has": hardware(), "model": model, "weights": weights,
                                "tokens": tokens, "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    run(lambda: typer.run(int8_prefill), "int8_prefill")
