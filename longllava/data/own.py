"""A small data set of one's own, to look at and to start from: pictures as files, LLaVA's JSON, a recipe, a stage.

What it teaches is in no model: who owns the things on its pictures. `longllava data init FOLDER` writes it, and
`longllava train FOLDER/stage.yaml` trains adapters on it within a minute on a CPU.
"""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path
from typing import Any

from longllava.data.worlds.export import write_png
from longllava.data.worlds.pictures import PicturePool
from longllava.data.worlds.render import render
from longllava.data.worlds.words import name_of, one
from longllava.errors import DataError
from longllava.files import whole_folder, write_json, write_text

OWNERS = ("Tom", "Ann", "Ben", "Theo", "Ina")
THINGS_EACH = 2
QUESTION = "Whose is this?"
NAMING = "What is this?"

RECIPE = """\
# Data of one's own: a JSON in LLaVA's format, and the folder that its pictures lie in.
# What it holds, how long it is and what is learned of it: longllava data check {folder}/recipe.yaml
name: own
about: whose the things on {n} pictures are
sources:
  - {{name: own, kind: llava, path: own.json, image_root: images, count: {n}, format: json,
     licence: Apache-2.0, origin: drawn by longllava data init}}
"""
STAGE = """\
# Adapters on the language model that ships, and its bridge, learn what recipe.yaml names.
# longllava train {folder}/stage.yaml        then: longllava merge nano {folder}/run/model {folder}/merged
stage: own
model: nano
recipe: recipe.yaml
start_from: {{all: stage3}}
init_from: {{all: nano}}
train_only: [bridge, backbone]
lora: {{rank: 16, alpha: 32, parts: [backbone]}}
output: {output}
dtype: float32
threads: 1
window: 16
phases:
  - {{steps: 60, row_length: 512, learning_rate: 1.0e-2, final_learning_rate: 1.0e-3, warmup: 5, decay: cosine}}
save_every: 30
log_every: 10
"""


def write_own_data(folder: str | Path, n: int = 50, seed: int = 0) -> list[Path]:
    """Write images/, own.json, recipe.yaml and stage.yaml, or nothing. Returns what was written beside the pictures.

    Raises: DataError where something would be written over.
    """
    folder = Path(folder)
    if n < len(OWNERS) * THINGS_EACH:
        raise DataError(f"n: got {n} pictures, must be at least {len(OWNERS) * THINGS_EACH}, one of each thing")
    names = ("own.json", "recipe.yaml", "stage.yaml", "images")
    for name in names:
        if (folder / name).exists():
            raise DataError(f"{folder / name}: exists already; name an empty folder")
    records = []
    output = json.dumps(f"{folder.as_posix()}/run", ensure_ascii=False)  # in YAML "a #b" would end at the sign
    written = {"folder": shlex.quote(folder.as_posix()), "output": output, "n": n}
    with whole_folder(folder) as staged:
        for number, (spec_index, owner) in enumerate(drawn(n, seed)):
            spec = pool(seed).spec(spec_index)
            write_png(render(spec), staged / "images" / f"{number:03d}.png")
            records.append(record(f"{number:03d}", owner, one(name_of(spec.thing))))
        write_json(staged / "own.json", records)
        write_text(staged / "recipe.yaml", RECIPE.format(**written))
        write_text(staged / "stage.yaml", STAGE.format(**written))
    return [folder / name for name in names if name != "images"]


def drawn(n: int, seed: int, first: int = 0) -> list[tuple[int, str]]:
    """(picture of the pool, its owner) of n pictures, thing by thing; first: how many of each thing to pass over."""
    pictures = pool(seed)
    things = random.Random(f"own {seed}").sample(pictures.things, len(OWNERS) * THINGS_EACH)
    return [(pictures.index(things[number % len(things)], first + number // len(things)), OWNERS[number % len(OWNERS)])
            for number in range(n)]  # fmt: skip


def pool(seed: int) -> PicturePool:
    return PicturePool("train", seed)


def record(name: str, owner: str, thing: str) -> dict[str, Any]:
    turns = [("human", f"<image>\n{QUESTION}"), ("gpt", owner), ("human", NAMING), ("gpt", thing)]
    return {"id": name, "image": f"{name}.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
