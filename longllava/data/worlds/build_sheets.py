"""Rebuild the sprite sheets and things.json from the artists' npm packages, unpacked on disk.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz   # and so on
    python -m longllava.data.worlds.build_sheets --noto NOTO/package --fluent FLUENT/package
    python -m longllava.data.worlds.build_sheets --openmoji OPENMOJI/package --out sheets   # tests only

Noto images are Apache-2.0 (Google), emoji.json MIT, Fluent 3D MIT (Microsoft). OpenMoji is CC-BY-SA 4.0:
its sheet is for tests and is never shipped; its SVGs need cairosvg.

Things are the base emoji of five categories that both artists drew. Left out: clock faces (24 of a kind),
and near-twins, by one rule: two things whose drawings differ by less than NEAR_TWIN in both styles are one
thing to the eye at 48 pixels, and the later one goes.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from longllava.data.worlds.sheets import CELL, COLUMNS, FOLDER, things
from longllava.files import write_atomic, write_json

# Root mean square difference of premultiplied RGBA in [0, 1] at 16 x 16; the median pair is at 0.43.
NEAR_TWIN = 0.185
GROUPS = {"Animals & Nature": "animal", "Food & Drink": "food", "Travel & Places": "place",
          "Activities": "game", "Objects": "object"}  # fmt: skip
BY_SUBCATEGORY = {"plant-flower": "plant", "plant-other": "plant", "transport-ground": "vehicle",
                  "transport-air": "vehicle", "transport-water": "vehicle",
                  "sky & weather": "weather", "clothing": "clothing", "tool": "tool",
                  "musical-instrument": "instrument", "dishware": "object"}  # fmt: skip


def candidates(noto: Path, fluent: Path) -> list[tuple[dict, Image.Image, Image.Image]]:
    rows = json.loads((noto / "emoji.json").read_text("utf-8"))
    found = []
    for row in sorted(rows, key=lambda row: row["sort_order"]):
        if row["category"] not in GROUPS or row["short_name"].startswith("clock"):
            continue
        other = find_fluent(fluent, row["unified"].lower())
        if row["has_img_google"] and other is not None:
            found.append((row, fitted(noto / "img/google/64" / row["image"]), fitted(other)))
    return found


def find_fluent(fluent: Path, code: str) -> Path | None:
    for name in (code, code.replace("-fe0f", ""), f"{code}-fe0f"):
        if (path := fluent / "assets" / f"{name}.webp").is_file():
            return path
    return None


def fitted(source: Path | io.BytesIO) -> Image.Image:
    """The drawing cropped to its ink and centred in a cell, so that both artists draw at one size."""
    image = Image.open(source).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox())
    scale = CELL / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(image, ((CELL - image.width) // 2, (CELL - image.height) // 2))
    return cell


def thumbnail(image: Image.Image) -> np.ndarray:
    rgba = np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    return rgba.reshape(-1)


def without_twins(found: list) -> tuple[list, list[tuple[str, str]]]:
    kept: list[tuple] = []
    dropped = []
    for row, *drawings in found:
        looks = [thumbnail(drawing) for drawing in drawings]
        twin = next((name for name, _, _, others in kept
                     if max(rms(a, b) for a, b in zip(looks, others, strict=True)) < NEAR_TWIN), None)  # fmt: skip
        if twin:
            dropped.append((name_of(row), twin))
        else:
            kept.append((name_of(row), row, drawings, looks))
    return [(name, row, drawings) for name, row, drawings, _ in kept], dropped


def rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


def name_of(row: dict) -> str:
    return row["short_name"].replace("_", " ").replace("-", " ").lower()


def write_sheet(cells: list[Image.Image | None], path: Path) -> None:
    sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(cells) // COLUMNS) * CELL))
    for index, cell in enumerate(cells):
        if cell is not None:
            sheet.paste(cell, (index % COLUMNS * CELL, index // COLUMNS * CELL))
    write_atomic(path, lambda file: sheet.save(file, format="PNG", optimize=True))
    print(f"{path}: {sum(cell is not None for cell in cells)} drawings, {path.stat().st_size / 1e6:.1f} MB")


def openmoji_cells(folder: Path) -> list[Image.Image | None]:
    import cairosvg

    cells: list[Image.Image | None] = []
    for thing in things():
        names = (thing.code.upper(), thing.code.upper().replace("-FE0F", ""))
        path = next((p for n in names if (p := folder / "color/svg" / f"{n}.svg").is_file()), None)
        if path is None:
            cells.append(None)
            continue
        png = cairosvg.svg2png(url=str(path), output_width=144, output_height=144)
        cells.append(fitted(io.BytesIO(png)))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noto", type=Path)
    parser.add_argument("--fluent", type=Path)
    parser.add_argument("--openmoji", type=Path)
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    if args.openmoji:
        write_sheet(openmoji_cells(args.openmoji), args.out / "openmoji.png")
    if not (args.noto and args.fluent):
        return
    kept, dropped = without_twins(candidates(args.noto, args.fluent))
    write_json(args.out / "things.json", [
        {"name": name, "group": BY_SUBCATEGORY.get(row["subcategory"], GROUPS[row["category"]]),
         "code": row["unified"].lower()} for name, row, _ in kept])  # fmt: skip
    for index, style in enumerate(("noto", "fluent")):
        write_sheet([drawings[index] for _, _, drawings in kept], args.out / f"{style}.png")
    print(f"{len(kept)} things; near-twins left out: " + ", ".join(f"{a} (of {b})" for a, b in dropped))


if __name__ == "__main__":
    main()
