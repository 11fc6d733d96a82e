"""The curriculum's results: a table, a plot, what must hold between stages, and all of it as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from longllava.evals.curriculum import Generated, Outcome
from longllava.evals.curriculum_task import STAGES, TASKS, Task

if TYPE_CHECKING:
    from rich.table import Table

ALLOWED_LOSS = 0.02  # of single-image questions, from stage 2 to stage 3
DETAILED = ("words", "single")  # tasks whose kinds of question have rows of their own
COLOURS = ("#c8c8c8", "#9ecae1", "#4292c6", "#08306b")  # in the order of the stages


@dataclass(frozen=True)
class Column:
    """One model. stage: where it stands in the curriculum; None outside it."""

    label: str
    stage: str | None
    folder: str
    outcomes: dict[str, Outcome]
    seconds: float
    generated: list[Generated] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """What must hold between two stages, and whether it does."""

    text: str
    passed: bool


def checks(columns: Sequence[Column]) -> list[Check]:
    """Each stage beats the one before it on its own tasks; stage 3 keeps what stage 2 could.

    Where stages are missing, a model is compared with the nearest before it, on all tasks taught in between.
    """
    known = sorted((c for c in columns if c.stage in STAGES), key=lambda c: STAGES.index(c.stage or ""))
    found = []
    for before, after in zip(known, known[1:]):
        taught = STAGES[STAGES.index(before.stage or "") + 1 : STAGES.index(after.stage or "") + 1]
        for task in TASKS:
            if task.stage in taught and task.name in before.outcomes and task.name in after.outcomes:
                was, now = (column.outcomes[task.name].accuracy for column in (before, after))
                text = f"{after.label} beats {before.label} on {task.name}: {percent(was)} -> {percent(now)}"
                found.append(Check(text, now > was))
    of_stage = {column.stage: column for column in known}
    if {"stage2", "stage3"} <= of_stage.keys() and "single" in of_stage["stage3"].outcomes:
        points = round(100 * ALLOWED_LOSS)
        was, now = (of_stage[stage].outcomes["single"].accuracy for stage in ("stage2", "stage3"))
        text = f"stage 3 loses at most {points} points on single-image questions: {percent(was)} -> {percent(now)}"
        found.append(Check(text, now >= was - ALLOWED_LOSS))
    return found


def percent(value: float) -> str:
    return f"{value * 100:.1f} %"


def measured_tasks(columns: Sequence[Column]) -> list[Task]:
    return [task for task in TASKS if any(task.name in column.outcomes for column in columns)]


def table_of(columns: Sequence[Column]) -> Table:
    """Rows are tasks, by the stage that teaches them; columns are models. Bold: a model of that stage."""
    from rich.table import Table

    table = Table(title="Right answers in %: every token of the answer, on held-out pictures")
    for heading in ("taught by", "task"):
        table.add_column(heading, no_wrap=True)
    table.add_column("questions", justify="right")
    for column in columns:
        table.add_column(column.label, justify="right")
    previous = None
    for task in measured_tasks(columns):
        if previous not in (None, task.stage):
            table.add_section()
        outcomes = [column.outcomes.get(task.name) for column in columns]
        n = next(outcome.n for outcome in outcomes if outcome is not None)
        cells = [
            shown(None if outcome is None else outcome.accuracy, bold=column.stage == task.stage)
            for column, outcome in zip(columns, outcomes)
        ]
        owner = "" if task.stage == previous else task.stage
        table.add_row(owner, f"{task.name} [dim]{task.about}[/dim]", str(n), *cells)
        if task.name in DETAILED:
            add_kinds(table, outcomes)
        previous = task.stage
    return table


def shown(value: float | None, *, bold: bool = False) -> str:
    text = "-" if value is None else f"{value * 100:.1f}"
    return f"[bold]{text}[/bold]" if bold else text


def add_kinds(table: Table, outcomes: Sequence[Outcome | None]) -> None:
    kinds = next(outcome.kinds for outcome in outcomes if outcome is not None)
    for kind, (_, n) in kinds.items():
        shares = [None if outcome is None else outcome.kinds.get(kind) for outcome in outcomes]
        cells = [shown(None if share is None else share[0] / share[1]) for share in shares]
        table.add_row("", f"  {kind}", str(n), *cells, style="dim")


def print_report(columns: Sequence[Column]) -> bool:
    """The table, the generated answers, and the checks. Returns whether all hold."""
    from rich.console import Console

    console = Console(width=max(120, Console().width), highlight=False)
    console.print(table_of(columns))
    for column in columns:
        if column.generated:
            n, n_right, n_agree = (
                sum(getattr(one, name) for one in column.generated) for name in ("n", "n_right", "n_agree")
            )
            console.print(
                f"{column.label}, asked through generate: {n_right} of {n} right,"
                f" {n_agree} of {n} judged as teacher-forced"
            )
    results = checks(columns)
    for check in results:
        console.print(("[green]pass[/green]  " if check.passed else "[red]FAIL[/red]  ") + check.text)
    return all(check.passed for check in results)


def as_json(columns: Sequence[Column], **facts: Any) -> dict[str, Any]:
    """facts: what else is known of the run: machine, versions, seed."""
    return {
        "benchmark": "curriculum",
        "score": "share of answers of which every token, and the end, is the likeliest (teacher-forced)",
        **facts,
        "models": [column_json(column) for column in columns],
        "checks": [{"check": check.text, "passed": check.passed} for check in checks(columns)],
    }


def column_json(column: Column) -> dict[str, Any]:
    return {
        "label": column.label,
        "stage": column.stage,
        "folder": column.folder,
        "about": column.about,
        "seconds": column.seconds,
        "tasks": {name: outcome_json(outcome) for name, outcome in column.outcomes.items()},
        "generated": {
            one.task: {"n": one.n, "right": one.n_right, "as_teacher_forced": one.n_agree} for one in column.generated
        },
    }


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "accuracy": round(outcome.accuracy, 4),
        "questions": outcome.n,
        "right": outcome.n_right,
        "samples": outcome.n_samples,
        "tokens": outcome.n_tokens,
        "pictures": outcome.n_pictures,
        "seconds": outcome.seconds,
        "kinds": {kind: {"right": right, "questions": n} for kind, (right, n) in outcome.kinds.items()},
    }


def draw_plot(columns: Sequence[Column], file: Any) -> None:
    """Bars in groups: a group is a task, a bar is a model; tasks of a stage stand on one ground."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = measured_tasks(columns)
    figure = Figure(figsize=(max(7.0, 1.4 + 0.95 * len(tasks)), 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(columns)
    for number, column in enumerate(columns):
        places = [place - 0.4 + width * (number + 0.5) for place, task in enumerate(tasks)]
        heights = [100 * column.outcomes[task.name].accuracy if task.name in column.outcomes else 0 for task in tasks]
        axes.bar(places, heights, width * 0.92, label=number, color=colour_of(column, number), zorder=2)
    ground(axes, tasks)
    axes.set_xticks(range(len(tasks)), [task.name for task in tasks])
    axes.tick_params(length=0)
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("right answers, %")
    axes.grid(axis="y", color="white", zorder=1)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    legend = figure.legend(loc="outside lower center", ncols=len(columns), frameon=False)
    for text, column in zip(legend.get_texts(), columns):  # as a label, what begins with _ would have no entry
        text.set(text=column.label, parse_math=False)  # nor is a name with $ a formula
    axes.set_title("What each stage brought: held-out pictures, teacher-forced exact match", fontsize=10)
    figure.savefig(file, format="png")


def colour_of(column: Column, number: int) -> str:
    place = STAGES.index(column.stage) if column.stage in STAGES else number + 2
    return COLOURS[place % len(COLOURS)]


def ground(axes: Any, tasks: Sequence[Task]) -> None:
    """A shade behind the tasks of each stage, and the stage's name above them."""
    for number, stage in enumerate(STAGES):
        places = [place for place, task in enumerate(tasks) if task.stage == stage]
        if places:
            shade = "#f2f2f2" if number % 2 else "#e6e6e6"
            axes.axvspan(places[0] - 0.5, places[-1] + 0.5, color=shade, zorder=0, linewidth=0)
            axes.text((places[0] + places[-1]) / 2, 102, stage, ha="center", fontsize=9, color="#555555")
