"""`longllava eval`: evaluations from their options to their report."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longllava.cli.talk import Device, Int8, Model

if TYPE_CHECKING:
    from longllava.api import LongLLaVA
    from longllava.evals.journal import Journal
    from longllava.evals.vniah import Cell
    from longllava.evals.vniah_task import Settings

STYLES = "noto,fluent"
Haystack = Annotated[
    str | None, typer.Option(metavar="PATH", help="A folder or a video.", show_default="the world's pictures")
]
Tokens = Annotated[int | None, typer.Option(min=1, help="nano: 36 or 144.", show_default="the model's own")]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16, float16.", show_default="the fast one")]
Output = Annotated[
    str | None, typer.Option(metavar="DIR", help="Report and journal.", show_default="runs/vniah/MODEL-TOKENS")
]


def vniah(
    images: Annotated[list[str], typer.Option(metavar="N,N", help="Pictures in the haystack. Repeatable.")] = ["1000"],  # noqa: B006
    depths: Annotated[str, typer.Option(metavar="COUNT|D,D", help="How many from 0 to 1, or which.")] = "11",
    needles: Annotated[int, typer.Option(help="Different needles, each asked at every depth.")] = 20,
    seed: Annotated[int, typer.Option(help="Draws needles and haystack.")] = 0,
    style: Annotated[str, typer.Option(help="noto, fluent, or the path of a sheet.")] = STYLES,
    model: Model = "nano",
    tokens_per_image: Tokens = None,
    haystack: Haystack = None,
    device: Device = None,
    dtype: DType = None,
    int8: Int8 = False,
    output: Output = None,
) -> None:
    """One needle among N pictures, at every depth, by default in the built-in picture world.

    Two scores: a teacher-forced exact match (LongVA's), and whether the greedy answer is right.

    Stopped and started again with the same options, it goes on where it was.
    """
    started = time.perf_counter()
    from longllava.evals.vniah_options import settings_of

    settings = settings_of(images, depths, str(needles), str(seed), style, haystack)

    from longllava.api import LongLLaVA
    from longllava.evals import vniah_report
    from longllava.evals.memory import PeakMemory
    from longllava.evals.vniah_task import draw_haystack
    from longllava.train.lock import run_lock

    draw_haystack(settings, max(settings.images))  # says now what is wrong with a folder or a style
    talker = LongLLaVA.from_pretrained(model, device=device, dtype=dtype, tokens_per_image=tokens_per_image, int8=int8)
    n_tokens = talker.processor.tokens_per_image(tokens_per_image)
    parts = names(model, n_tokens, style, haystack, int8)
    folder = Path(output or f"runs/vniah/{'-'.join(parts)}")
    memory = PeakMemory()
    with run_lock(folder):
        journal = open_journal(folder, settings, model, talker, n_tokens)
        cells = measured(talker, settings, journal, memory)
        title = vniah_report.title_of(cells, ", ".join([*parts[:1], f"{n_tokens} tokens an image", *parts[2:]]))
        picture = vniah_report.write_report(cells, folder, title)
    vniah_report.print_summary(cells)
    memory.bytes()  # nothing may have been left to ask
    print(f"{time.perf_counter() - started:.0f} s in all, peak memory {memory.highest / 1e6:,.0f} MB")
    print(f"{folder}/all_accuracies.json  cells.csv\n{picture}")


def names(model: str, n_tokens: int, style: str, haystack: str | None, int8: bool = False) -> list[str]:
    """What tells this evaluation from others: model, tokens; style and haystack unless they are the usual."""
    found = [Path(model).name, str(n_tokens), *(["int8"] if int8 else [])]
    if style != STYLES:
        found += [Path(one).stem for one in style.split(",")]
    return [*found, Path(haystack).stem] if haystack else found


def open_journal(folder: Path, settings: Settings, model: str, talker: LongLLaVA, n_tokens: int) -> Journal:
    """The finished prompts of an earlier start with the same options, or none."""
    from longllava.evals.journal import Journal
    from longllava.evals.vniah import journal_settings
    from longllava.evals.vniah_task import digest
    from longllava.generation.saving import fingerprint

    weights = {"model": model, "weights": fingerprint(talker.model), "tokens_per_image": n_tokens,
               "device": talker.model.backbone.embed_tokens.weight.device.type}  # fmt: skip
    journal = Journal(folder / "cells.jsonl", journal_settings(settings, digest(settings), **weights))
    if journal.news:
        print(journal.news)
    elif journal.records:
        print(f"{len(journal.records)} finished prompts in {journal.path}; going on from there")
    if settings.haystack is not None:
        print("the needles are pictures of the built-in world: they differ from the haystack in more than")
        print("what they show, and are easier to find than their like")
    return journal


def measured(talker: Any, settings: Settings, journal: Journal, memory: Any) -> list[Cell]:
    """All cells; each is printed when it is done, above a bar on a terminal's stderr."""
    from tqdm import tqdm

    from longllava.evals import vniah, vniah_report

    total = vniah.work_left(settings, journal)
    silent = not sys.stderr.isatty() or not total
    show = partial(show_line, vniah_report.line_of)
    try:
        with tqdm(total=total, unit="image", dynamic_ncols=True, disable=silent) as bar:
            return vniah.run(talker, settings, journal, show=show, move=bar.update, memory=memory)
    except KeyboardInterrupt:
        print(f"\nstopped; {journal.path} keeps what is finished, and the same command goes on from there")
        raise


def show_line(line_of: Any, cell: Cell) -> None:
    from tqdm import tqdm

    tqdm.write(line_of(cell), file=sys.stdout)
    sys.stdout.flush()
