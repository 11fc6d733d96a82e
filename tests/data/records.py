"""Records in LLaVA's format, and files of them."""

from __future__ import annotations

import json
from pathlib import Path

ASKED = {"from": "human", "value": "<image>\nWhat is this?"}
TOLD = {"from": "gpt", "value": "a cat"}
GOOD = {"id": "7", "image": "a.png", "conversations": [ASKED, TOLD]}


def write_lines(root: Path, records: list, newline: str = "\n", bom: bool = False) -> Path:
    lines = [item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in records]
    data = newline.join(lines).encode("utf-8", "surrogatepass")
    path = root / "data.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + data)
    return path


def numbered(n: int) -> list[dict]:
    return [{**GOOD, "id": str(i)} for i in range(n)]


def asked(text: str, **media) -> dict:
    return {"conversations": [{"from": "human", "value": text}, TOLD], **media}


def write(folder: Path, records: list[dict]) -> Path:
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"
