"""V-NIAH's results as files and as a table: LongVA's JSON and heat map, a CSV of all cells, a summary."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longllava.evals.vniah import Cell
from longllava.files import write_atomic, write_json, write_text

if TYPE_CHECKING:
    from rich.table import Table

COLOURS = ("#F0496E", "#EBB839", "#9ad5b3")  # LongVA's, from 0 over 0.5 to 1
MEGABYTE = 1e6
LABELLED_CELLS = 200  # a heat map of more would not be readable with numbers in it


def share(values: Iterable[bool]) -> float:
    values = list(values)
    return sum(values) / len(values)


def columns(cells: Sequence[Cell]) -> dict[tuple[int, float], list[Cell]]:
    """Cells of each (images, depth), sorted."""
    grouped: dict[tuple[int, float], list[Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell.images, cell.depth), []).append(cell)
    return dict(sorted(grouped.items()))


def write_report(cells: Sequence[Cell], folder: str | Path, title: str) -> Path:
    """Write all_accuracies.json, cells.csv and heatmap.png, each whole or not at all; the last one's path."""
    folder = Path(folder)
    write_json(folder / "all_accuracies.json", accuracies(cells))
    write_text(folder / "cells.csv", as_csv(cells))
    return write_atomic(folder / "heatmap.png", lambda file: draw_heatmap(cells, title, file))


def accuracies(cells: Sequence[Cell]) -> list[dict[str, float]]:
    """LongVA's format: one row per number of frames and depth, its score the mean over needles."""
    return [
        {
            "Num. Frame": n,
            "Frame Depth": round(depth * 100, 6),
            "Score": share(cell.teacher_forced for cell in group),
        }
        for (n, depth), group in columns(cells).items()
    ]


def as_csv(cells: Sequence[Cell]) -> str:
    """One row per prompt; truth values as 0 and 1, memory in bytes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Cell)], lineterminator="\n")
    writer.writeheader()
    for cell in cells:
        row = asdict(cell)
        writer.writerow({**row, "teacher_forced": int(cell.teacher_forced), "generated": int(cell.generated)})
    return text.getvalue()


def draw_heatmap(cells: Sequence[Cell], title: str, file: Any) -> None:
    """Teacher-forced accuracy, pictures from left to right, depths from top to bottom."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    scores = {key: share(cell.teacher_forced for cell in group) for key, group in columns(cells).items()}
    sizes, depths = sorted({n for n, _ in scores}), sorted({depth for _, depth in scores})
    grid = [[scores[n, depth] for n in sizes] for depth in depths]
    labelled = len(scores) <= LABELLED_CELLS
    figure = Figure(figsize=(max(6.0, 2.6 + 0.9 * len(sizes)), max(3.2, 1.6 + 0.42 * len(depths))), dpi=150,
                    layout="constrained")  # fmt: skip
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = LinearSegmentedColormap.from_list("vniah", COLOURS)
    image = axes.pcolormesh(grid, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=1)
    axes.invert_yaxis()
    axes.set_xticks([i + 0.5 for i in range(len(sizes))], [f"{n:,}" for n in sizes])
    axes.set_yticks([i + 0.5 for i in range(len(depths))], depth_labels(depths))
    axes.tick_params(length=0)
    axes.set_xlabel("pictures in the haystack")
    axes.set_ylabel("depth of the needle")
    axes.set_title(title, fontsize=10, parse_math=False)  # a name may hold $
    for y, row in enumerate(grid if labelled else []):
        for x, score in enumerate(row):
            axes.text(x + 0.5, y + 0.5, f"{score * 100:.0f}", ha="center", va="center", fontsize=9)
    figure.colorbar(image, ax=axes, label="exact match, teacher-forced")
    figure.savefig(file, format="png")


def depth_labels(depths: Sequence[float]) -> list[str]:
    """In percent, with as few decimals as tell them apart."""
    for n_decimals in range(7):
        labels = [f"{depth * 100:.{n_decimals}f} %" for depth in depths]
        if len(set(labels)) == len(depths):
            break
    return labels


@dataclass(frozen=True)
class Summary:
    """Cells of one number of images, added up. seconds: of all its prompts, what they share counted once."""

    images: int
    n_cells: int
    teacher_forced: float
    generated: float
    by_kind: dict[str, float]
    seconds: float
    seconds_per_cell: float
    tokens: int
    peak_memory: int


def summarise(cells: Sequence[Cell]) -> list[Summary]:
    sizes = sorted({cell.images for cell in cells})
    return [summary_of(n, [cell for cell in cells if cell.images == n]) for n in sizes]


def summary_of(n: int, cells: Sequence[Cell]) -> Summary:
    seconds = sum(cell.seconds for cell in cells)
    kinds = sorted({cell.kind for cell in cells}, reverse=True)
    return Summary(
        n, len(cells), share(c.teacher_forced for c in cells), share(c.generated for c in cells),
        {kind: share(c.generated for c in cells if c.kind == kind) for kind in kinds},
        seconds + max(c.shared_seconds for c in cells), seconds / len(cells), max(c.tokens for c in cells),
        max(c.peak_memory for c in cells),
    )  # fmt: skip


def title_of(cells: Sequence[Cell], label: str) -> str:
    forced, generated = share(c.teacher_forced for c in cells), share(c.generated for c in cells)
    n_needles = len({cell.needle for cell in cells})
    scores = f"teacher-forced {percent(forced)}, generated {percent(generated)}"
    return f"V-NIAH: {label}, {n_needles} needles\n{scores}"


def percent(value: float) -> str:
    return f"{value * 100:.1f} %"


def line_of(cell: Cell) -> str:
    """A cell in one line of a terminal."""
    right = {(True, True): "right", (True, False): "right when forced", (False, True): "right when free"}
    judged = right.get((cell.teacher_forced, cell.generated), f"wrong: {cell.answer!r}")
    return (
        f"{cell.images:5,} images, depth {cell.depth * 100:3.0f} %: {cell.seconds:6.2f} s,"
        f" {cell.tokens:7,} tokens, {cell.peak_memory / MEGABYTE:5,.0f} MB; {cell.kind} of the {cell.name}:"
        f" {cell.said.strip()!r:.30}, {judged}"
    )


def print_summary(cells: Sequence[Cell]) -> None:
    from rich.console import Console

    Console(width=max(100, Console().width), highlight=False).print(summary_table(cells))


def summary_table(cells: Sequence[Cell]) -> Table:
    """A row per number of images: both accuracies, the generated answers' by kind of question, costs."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    rows = summarise(cells)
    kinds = sorted({kind for row in rows for kind in row.by_kind}, reverse=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    names = ("\nimages", "\nprompts", "teacher-\nforced", "\ngenerated", *(f"of it:\n{kind}" for kind in kinds))
    for name in (*names, "\nseconds", "seconds\na prompt", "\ntokens", "peak\nMB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.images:,}",
            str(row.n_cells),
            percent(row.teacher_forced),
            percent(row.generated),
            *(percent(row.by_kind[kind]) for kind in kinds),
            f"{row.seconds:.0f}",
            f"{row.seconds_per_cell:.2f}",
            f"{row.tokens:,}",
            f"{row.peak_memory / MEGABYTE:,.0f}",
        )
    return table
