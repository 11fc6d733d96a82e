"""From pixels to the first token on a GPU, in one process: the model is made once, then read with every prompt.

    python benchmarks/gpu_first_token.py --save benchmarks/results/gpu_first_token-h100.json
    python benchmarks/gpu_first_token.py --weights int8-all --prompts 1000x36,100000 --no-peer
    python benchmarks/gpu_first_token.py --model nano --device cpu --weights bf16 --prompts 20x36,500 --once "" \
        --batches "" --files 20 --answer 20 --no-peer --no-fit

Prompts: 1000x36 is 1,000 pictures of 36 tokens each, whose pixels lie on the device; 100000 is text. Weights: bf16,
int8 (the language model's layers), int8-all (bridge and encoder too). A model of configs/models has random weights in
its true shape and nano's tokenizer, and the table says how many tokens each prompt has, tags included. Every prompt
but those of --once is read twice: `first` has what is done once a process and length (cuDNN plans its attention),
`seconds` is the second time, layout of the prompt and sampling included. Files, sessions and batches are measured with
the last weights. `limit` is what the prompt's arithmetic takes at the rates measured at the start. What does not begin
within --seconds is not measured, and its row says so.
"""

import _environment  # noqa: F401

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from _gpu_epilogue import measure_epilogue
from _gpu_measures import Run
from _limits import ceilings
from _models import is_random, open_model
from _options import check_target, whole_numbers

from longllava.cli import run
from longllava.errors import InputError

WEIGHTS = ("bf16", "int8", "int8-all")


def prompts_of(text: str, option: str) -> list[tuple[int, int]]:
    """(images, tokens per image), or (0, text tokens)."""
    found = []
    for part in filter(None, text.split(",")):
        images, _, tokens = part.rpartition("x")
        if not tokens.isdigit() or not (images or "0").isdigit():
            raise InputError(f"{option}: got {part!r}, expected 1000x36 or a number of text tokens")
        found.append((int(images or 0), int(tokens)))
    return found


def make_int8(model: Any, weights: str) -> None:
    from longllava.config import Int8Config
    from longllava.quant import quantize_

    parts = ("backbone", "bridge", "encoder") if weights == "int8-all" else ("backbone",)
    quantize_(model.model, Int8Config(parts=parts))


def gpu_first_token(
    model: Annotated[str, typer.Option(help="A config (then random weights), a folder, or a shipped model.")] = (
        "longllava-9b"
    ),
    weights: Annotated[str, typer.Option(help="bf16,int8 or bf16,int8-all, or one of them.")] = ("bf16,int8"),
    prompts: Annotated[str, typer.Option(help="Prompts read twice.")] = "1000x36,1000x144,100000",
    once: Annotated[str, typer.Option(help="Prompts read once, with the first weights.")] = "10000x36",
    answer: Annotated[int, typer.Option(min=8, help="Tokens decoded after the longest text prompt.")] = 256,
    batches: Annotated[str, typer.Option(help="Rows decoded together, 8,192 tokens each; empty: none.")] = "1,8,64",
    peer: Annotated[bool, typer.Option(help="transformers beside: Jamba with its kernels, and CLIP.")] = True,
    epilogue: Annotated[bool, typer.Option(help="The scan's int8 epilogue on and off, first of --prompts.")] = True,
    fit: Annotated[bool, typer.Option(help="The most pictures that fit: keys and values allocated.")] = True,
    files: Annotated[int, typer.Option(min=0, help="JPEG files on disk to the first token; 0: none.")] = 1000,
    seconds: Annotated[float, typer.Option(help="Nothing new begins after this long.")] = 200.0,
    device: Annotated[str, typer.Option(help="cuda; or cpu, for a small --model and few pictures.")] = "cuda",
    save: Annotated[Path | None, typer.Option(help="JSON file, written anew after every measurement.")] = None,
) -> None:
    """Pixels to the first token, decoding, memory; beside limits and transformers."""
    started = time.perf_counter()
    order = [name for name in weights.split(",") if name]
    if any(name not in WEIGHTS for name in order) or len(order) not in (1, 2) or order[1:] and order[0] != "bf16":
        raise InputError(f"--weights: got {weights!r}, allowed: one of {', '.join(WEIGHTS)}, or bf16 and one of int8's")
    twice, last = prompts_of(prompts, "--prompts"), prompts_of(once, "--once")
    rows = whole_numbers(batches, "--batches") if batches else []
    check_target(save)
    whole_in_int8 = order == ["int8"]  # made in int8: the floats may not fit
    opened = open_model(model, device, "bfloat16", int8=whole_in_int8)
    measured = Run(opened, model, is_random(model), save, started + seconds)
    measured.note(ceilings=ceilings(measured.device) if measured.on_gpu else ceilings(measured.device, 512, 2**24))
    measured.note(seconds_until_ready=time.perf_counter() - started)
    for name in order:
        if name != "bf16" and not whole_in_int8:
            make_int8(opened, name)
        measured.begin(name)
        measured.warm()
        for images, tokens in twice:
            measured.prompt(images, tokens, repeat=True, answer=0 if images else answer)
        for images, tokens in last if name == order[0] else ():
            measured.prompt(images, tokens, repeat=False)
        if name != order[-1]:
            continue
        measured.files(files)
        if epilogue and name != "bf16" and twice:
            measure_epilogue(measured, *twice[0])
        measured.session(next((prompt for prompt in twice if prompt[0]), None))
        for n_rows in rows:
            measured.batch(n_rows)
    if fit:
        measured.fit([tokens for images, tokens in twice if images])
    if peer:
        measured.release()
        measured.peer(twice)
    measured.finish()


if __name__ == "__main__":
    run(lambda: typer.run(gpu_first_token), "gpu_first_token")
