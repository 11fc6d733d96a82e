"""`longllava train`, `eval`, `world` and `doctor`: each hands over to the room that does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[str, typer.Argument(help="A stage's YAML, or the name of a shipped one: nano/stage1.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the YAML to set otherwise.")
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say what each process would need; do nothing.")] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="For --estimate: how many there would be.")] = None,
) -> None:
    """Train one stage. Started again with the same output folder, it goes on where it stopped."""
    from longllava.shipped import shipped

    if processes is not None and not estimate:
        raise typer.BadParameter("it goes with --estimate; to train on several, use torchrun or accelerate launch",
                                 param_hint="--processes")  # fmt: skip
    is_path = Path(config).is_file() or config.endswith(".yaml")
    path = config if is_path else str(shipped("configs", f"train/{config}"))
    if estimate:
        from longllava.train.preview import preview

        print(preview(path, list(overrides or ()), processes))
        return
    from longllava.train import main

    main(path, list(overrides or ()))


def world(
    out: Annotated[str, typer.Argument(help="Folder to write into.")],
    n: Annotated[int, typer.Option("--number", "-n", min=1, help="How many samples.")] = 24,
    seed: Annotated[int, typer.Option(help="Another seed, another world.")] = 0,
    task: Annotated[str | None, typer.Option(help="needle, order ...; default: caption and single.")] = None,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
) -> None:
    """Write a sample of the picture world: pictures, their conversations as JSON, and a contact sheet."""
    from longllava.data.worlds.export import export_world

    written = export_world(out, n, seed, task, split=split)
    for path in written[-2:]:
        print(path)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say what each part uses on this machine, why not something faster, and what to install."""
    from longllava.doctor import examine, show

    show(examine(), as_json=as_json)
