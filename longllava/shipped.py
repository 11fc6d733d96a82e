"""Where the YAML files of the library lie: in the wheel, or in the checkout it was installed from."""

from __future__ import annotations

import difflib
from pathlib import Path

from longllava.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent
KINDS = ("configs", "data_recipes")


def shipped_folder(kind: str) -> Path:
    """Folder of `kind`, "configs" or "data_recipes".

    A wheel holds it inside the package; in an editable checkout it lies beside the package.
    """
    if kind not in KINDS:
        raise ConfigError(f"shipped files: no kind {kind!r}; have {', '.join(KINDS)}")
    for folder in (PACKAGE / kind, PACKAGE.parent / kind):
        if folder.is_dir():
            return folder
    raise ConfigError(f"shipped files: {kind}/ is neither in {PACKAGE} nor beside it; reinstall longllava")


def shipped_names(kind: str) -> list[str]:
    """Names of all YAML files of `kind`, without the ending, such as "models/nano"."""
    folder = shipped_folder(kind)
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def shipped(kind: str, name: str) -> Path:
    """Path of the shipped YAML `name` of `kind`: shipped("configs", "models/nano"), ending or none.

    Raises ConfigError, with the nearest names, if there is none.
    """
    stem = name.removesuffix(".yaml")
    names = shipped_names(kind)
    if stem not in names:
        near = difflib.get_close_matches(stem, names, n=3) or names
        raise ConfigError(f"{kind}: no file {stem!r}; have {', '.join(near)}")
    return shipped_folder(kind) / f"{stem}.yaml"
