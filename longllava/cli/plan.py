"""`longllava plan`: what a prompt would take, without weights or pictures."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from longllava.errors import InputError

FLOATS = ("bfloat16", "float16", "float32")
PREFIXES = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def plan(
    model: Annotated[str, typer.Argument(help="A shipped name, a folder, or a config: nano, longllava-9b ...")],
    images: Annotated[int, typer.Option(min=0, help="Pictures of the prompt.")] = 1000,
    tokens_per_image: Annotated[
        int | None, typer.Option("--tokens-per-image", "-t", help="After pooling.", show_default="the model's own")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(FLOATS)}.")] = "bfloat16",
    int8: Annotated[bool, typer.Option("--int8", help="Linear layers in int8.")] = False,
    kv_int8: Annotated[bool, typer.Option("--kv-int8", help="Keys and values in int8.")] = False,
    text_tokens: Annotated[int, typer.Option(min=0, help="Tokens of the question.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    chunk_tokens: Annotated[
        int | None, typer.Option(min=1, help="Read at a time.", show_default="8192, on a CPU 2048")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ... of this machine.", show_default="its GPUs, or the CPU")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Free on each GPU of another machine: 80GB, 24GiB.")] = None,
    gpus: Annotated[int, typer.Option(min=1, max=64, help="With --memory: how many GPUs.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say what a prompt takes (tokens, memory, operations), whether it fits, and how many pictures would."""
    from longllava.choices import checked_dtype
    from longllava.plan_report import Plan, Request

    request = Request(images, tokens_per_image, text_tokens, max_new_tokens, checked_dtype(dtype, None), int8,
                      kv_int8, chunk_tokens)  # fmt: skip
    found = Plan(model, request, devices(device, memory, gpus)).as_dict()
    if as_json:
        print(json.dumps(found))
    else:
        show(found)


def devices(device: str | None, memory: str | None, gpus: int) -> dict[str, int]:
    """Names and bytes free."""
    from longllava.plan.memory import free_bytes, parse_size

    if memory is not None:
        if device is not None:
            raise InputError("--device and --memory: give one of them")
        return {f"cuda:{i}": parse_size(memory, "--memory") for i in range(gpus)}
    if gpus > 1:
        raise InputError("--gpus: say with --memory how much each of them has free")
    import torch

    from longllava.choices import checked_device

    several = device is None and torch.cuda.is_available()
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if several else [str(checked_device(device))]
    free = {name: free_bytes(name) for name in names}
    known = {name: size for name, size in free.items() if size is not None}
    if not known:
        raise InputError(f"this system does not say how much memory {names[0]} has free; give --memory")
    return known


def scaled(number: float) -> str:
    """ "630.1 T"."""
    for size, prefix in PREFIXES:
        if number >= size:
            return f"{number / size:,.2f} {prefix}FLOP"
    return f"{number:,.0f} FLOP"


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from longllava.plan.memory import sized

    console, tokens, memory = Console(highlight=False), found["tokens"], found["bytes"]
    how = f"{found['dtype']}{', int8 layers' * found['int8']}{', int8 keys and values' * found['int8_cache']}"
    console.print(f"[bold]{found['model']}[/bold] in {how}: {found['images']:,} pictures in one prompt")
    around = f"{tokens['per_image']} + {tokens['tags_per_image']} of tags ({tokens['tags_are']})"
    rows = [
        ("tokens", f"{tokens['prompt']:,} of the prompt, {tokens['answer']:,} of the answer; a picture {around}"),
        ("weights", sized(memory["weights"])),
        ("keys and values", f"{sized(memory['keys_values'])}, {memory['per_token']:,} bytes a token"),
        ("state", sized(memory["state"])),
        ("workspace", sized(memory["workspace"])),
        ("together", sized(memory["total"])),
        ("operations", scaled(found["operations"]["total"])),
    ]
    parts = ", ".join(f"{name} {scaled(n)}" for name, n in found["operations"].items() if n and name != "total")
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in [*rows, ("  of them", parts)]:
        table.add_row(name, value)
    console.print(table)
    split = Table("device", "free", "layers", "weights", "keys and values", "workspace, state", "left", box=None)
    for row in found["devices"] if found["fits"] else ():
        beside = row["workspace"] + row["state"]
        split.add_row(row["device"], sized(row["free"]), str(row["layers"]), sized(row["weights"]),
                      sized(row["keys_values"]), sized(beside), sized(row["left"]))  # fmt: skip
    if found["fits"]:
        console.print(split)
    console.print(verdict(found))


def verdict(found: dict[str, Any]) -> str:
    from longllava.plan.memory import sized

    have = ", ".join(f"{row['device']} ({sized(row['free'])} free)" for row in found["devices"])
    needed, most = found["devices_needed"], found["most_images"]
    if found["fits"]:
        text = f"It fits on {have}."
    else:
        more = f"{needed} such devices hold it" if needed else "no number of such devices holds it"
        text = f"It does not fit on {have}; {more}."
    if most is not None:
        text += f" At most {most:,} pictures fit."
    return text
