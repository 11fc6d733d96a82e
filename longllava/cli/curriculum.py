"""`longllava eval curriculum`: what one model can do of what the three stages teach."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longllava.cli.talk import Device, Int8, Model

if TYPE_CHECKING:
    from longllava.evals.curriculum import Outcome

DType = Annotated[str | None, typer.Option(help="float32, bfloat16, float16.", show_default="the fast one")]
Tasks = Annotated[str | None, typer.Option(metavar="NAME,NAME", help="Some of the tasks.", show_default="all")]
Output = Annotated[str | None, typer.Option(metavar="DIR", help="Receives curriculum.json and .png.")]


def curriculum(
    model: Model = "nano",
    questions: Annotated[int, typer.Option(min=1, help="Per task; three times as many about single pictures.")] = 300,
    tasks: Tasks = None,
    seed: Annotated[int, typer.Option(help="Draws the questions.")] = 0,
    device: Device = None,
    dtype: DType = None,
    int8: Int8 = False,
    output: Output = None,
) -> None:
    """Captions, questions about one picture and about several, on held-out pictures of the built-in world.

    Score: a teacher-forced exact match of the whole answer. benchmarks/curriculum.py compares stages.
    """
    started = time.perf_counter()
    from longllava.evals.curriculum_task import TASKS, tasks_named
    from longllava.files import writable_folder, write_atomic, write_json

    wanted = tasks_named(tasks.split(",")) if tasks else list(TASKS)
    folder = writable_folder(output) if output else None  # said now, not after the measuring

    from longllava.api import LongLLaVA
    from longllava.evals.curriculum import measure
    from longllava.evals.curriculum_report import Column, as_json, draw_plot, print_report

    talker = LongLLaVA.from_pretrained(model, device=device, dtype=dtype, int8=int8)
    outcomes = measure(talker.model, talker.processor, wanted, n_questions=questions, seed=seed, show=show)
    seconds = round(time.perf_counter() - started, 1)
    column = Column(Path(model).name, None, model, {one.task: one for one in outcomes}, seconds)
    print_report([column])
    print(f"{seconds:.0f} s in all")
    if folder is not None:
        written = write_json(folder / "curriculum.json", as_json([column], seed=seed))
        picture = write_atomic(folder / "curriculum.png", lambda file: draw_plot([column], file))
        print(f"{written}\n{picture}")


def show(outcome: Outcome) -> None:
    share = f"{outcome.accuracy * 100:5.1f} %"
    print(f"{outcome.task:10} {share}  {outcome.n} questions, {outcome.seconds} s", flush=True)
