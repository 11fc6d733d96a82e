"""A sample of the world for people to look at: pictures, LLaVA-format JSON, and a contact sheet."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from longllava.data.images import open_reference
from longllava.data.samples import Sample
from longllava.data.worlds.pictures import GRID, PREFIX, PicturePool, parse_reference
from longllava.data.worlds.render import SIDE
from longllava.data.worlds.tasks import WorldTask
from longllava.data.worlds.words import caption
from longllava.errors import DataError
from longllava.files import whole_folder, write_atomic, write_json

DEFAULT_TASKS = ("caption", "single")
ROLES = {"user": "human", "assistant": "gpt"}
COLUMNS = 6
ZOOM = 2
TEXT_HEIGHT = 44
FONT_SIZE = 11
LETTERS_A_LINE = 34


def export_world(
    out: str | Path, n: int = 24, seed: int = 0, task: str | None = None, *, split: str = "train"
) -> list[Path]:
    """Write n samples below `out`: images/*.png, world.json, contact-sheet.png; or nothing. Returns what was written.

    task: one of worlds.tasks.TASKS; without it, captions and single-picture questions in turn (one picture a
    sample). A seed is a pool of its own. Raises: ConfigError for an unknown task; DataError for n < 1.
    """
    if n < 1:
        raise DataError(f"n: got {n} samples, must be above 0")
    out = Path(out)
    pool = PicturePool(split, seed)
    names = (task,) if task else DEFAULT_TASKS
    tasks = [WorldTask(name, split=split, seed=seed, pool=pool) for name in names]
    samples = [tasks[index % len(tasks)].sample(index) for index in range(n)]
    files: dict[str, str] = {}
    with whole_folder(out) as staged:
        for reference in (reference for sample in samples for reference in sample.images):
            if reference not in files:
                files[reference] = f"images/{len(files):05d}.png"
                write_png(open_reference(reference), staged / files[reference])
        write_json(staged / "world.json", [record(sample, files) for sample in samples])
        if files:
            write_png(contact_sheet(list(files)), staged / "contact-sheet.png")
    return [out / name for name in (*files.values(), "world.json", *(["contact-sheet.png"] if files else []))]


def record(sample: Sample, files: dict[str, str]) -> dict[str, Any]:
    """A sample in LLaVA's format; "world" tells how each picture was made, "evidence" is our loader's."""
    value: dict[str, Any] = {"id": sample.id}
    if sample.images:
        value["image"] = [files[reference] for reference in sample.images]
    value["conversations"] = [{"from": ROLES[turn.role], "value": turn.text} for turn in sample.turns]
    if sample.evidence:
        value["evidence"] = [
            {key: part for key, part in asdict(item).items() if part is not None} for item in sample.evidence
        ]
    if sample.images:
        value["world"] = list(sample.images)
    return value


def contact_sheet(references: list[str]) -> Image.Image:
    """Pictures in rows of six, each with its caption below."""
    side = SIDE * ZOOM
    rows = -(-len(references) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (side + 8) + 8, rows * (side + TEXT_HEIGHT + 8) + 8), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for index, reference in enumerate(references):
        x = 8 + index % COLUMNS * (side + 8)
        y = 8 + index // COLUMNS * (side + TEXT_HEIGHT + 8)
        picture = open_reference(reference)
        picture.thumbnail((side, side))
        sheet.paste(picture.resize((side, picture.height * side // picture.width)), (x, y))
        is_grid = reference.startswith(PREFIX + GRID)
        text = "a grid of pictures" if is_grid else caption(parse_reference(reference))
        lines = textwrap.wrap(text, LETTERS_A_LINE)[:3]
        draw.text((x, y + side + 2), "\n".join(lines), fill="black", font=font)
    return sheet


def write_png(image: Image.Image, path: Path) -> Path:
    return write_atomic(path, lambda file: image.save(file, format="PNG"))
