"""`longllava data check | init`: what a recipe holds, and a small one of one's own."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from longllava.errors import DataError

Only = Annotated[str | None, typer.Option("--source", metavar="NAME", help="One source.", show_default="all")]
Output = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Report, lengths.png, quarantine.txt.", show_default="runs/check/RECIPE"),
]


def check(
    recipe: Annotated[str, typer.Argument(help="A recipe's YAML, or the name of a shipped one: nano/stage3.")],
    model: Annotated[str, typer.Option(help="Whose tokenizer and layout count; its weights are not read.")] = "nano",
    tokens_per_image: Annotated[
        int | None, typer.Option("--tokens-per-image", "-t", help="After pooling.", show_default="the model's own")
    ] = None,
    row_length: Annotated[int | None, typer.Option(min=1, help="Of a stage: longer samples are counted.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Samples of each source that are looked at.")] = 1000,
    show: Annotated[int, typer.Option(min=0, help="Samples of each source that are printed in colour.")] = 1,
    only: Only = None,
    output: Output = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Count a recipe's samples and tokens, name what is left out and why, and show in colour what is learned.

    Every record is read; media of the samples that are looked at are opened. Exit code 1 where a source is missing.
    """
    from longllava.checkpoints import find_folder
    from longllava.checkpoints.published import read_config
    from longllava.data.check import check_recipe
    from longllava.data.check_report import show_check, write_check
    from longllava.files import writable_folder
    from longllava.inputs.processor import Processor
    from longllava.inputs.tokenizer import Tokenizer
    from longllava.shipped import shipped

    target = writable_folder(output) if output else None  # said now, not after every record was read
    path = Path(recipe)
    if not path.is_file() and not recipe.endswith(".yaml"):
        path = shipped("data_recipes", recipe)
    folder = find_folder(model)
    model_config = read_config(folder)
    processor = Processor(model_config, Tokenizer.from_folder(folder, model_config.prompt))
    config, checks = check_recipe(path, processor, limit=limit, show=show, row_length=row_length,
                                  tokens_per_image=tokens_per_image, only=only)  # fmt: skip
    written = write_check(target or Path(f"runs/check/{config.name}"), config, checks)
    if as_json:
        print(json.dumps({"recipe": config.name, "sources": [one.as_dict() for one in checks]}))
    else:
        from rich.console import Console

        show_check(Console(), config, checks, processor.tokenizer)
        print("\n".join(map(str, written)))
    missing = [one.config.name for one in checks if one.missing is not None]
    if missing:
        raise DataError(f"{path}: {len(missing)} of {len(checks)} sources cannot be used: {', '.join(missing)}")


def init(
    folder: Annotated[str, typer.Argument(help="Folder to write into.")],
    n: Annotated[int, typer.Option("--number", "-n", min=10, help="How many pictures.")] = 50,
    seed: Annotated[int, typer.Option(help="Another seed, other things.")] = 0,
) -> None:
    """Write a small data set of one's own: pictures, LLaVA's JSON, a recipe, and a stage that trains in a minute."""
    from longllava.data.own import write_own_data

    for path in write_own_data(folder, n, seed):
        print(path)
    recipe, stage = (shlex.quote(f"{folder}/{name}.yaml") for name in ("recipe", "stage"))
    print(f"next: longllava data check {recipe}, then longllava train {stage}")
