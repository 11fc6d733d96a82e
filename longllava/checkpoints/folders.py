"""Where models lie: shipped names, folders, names of the hub; and what a folder of weights may hold."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longllava.errors import CheckpointError, InputError
from longllava.files import expanded

ASSETS = Path(__file__).resolve().parents[1] / "assets"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
RECORD = "training.json"  # of which stage a model is, for the stage that starts from it
# what a model folder holds besides weights and config.json, and what every layout keeps as it is
BESIDE = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
          "chat_template.jinja", "generation_config.json", "preprocessor_config.json",
          "processor_config.json")  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
UNFINISHED = ".unfinished-"  # a folder in a model's folder that holds what a save has yet to put in place
LISTED = 8  # names shown of each kind of fault


def shipped_models() -> list[str]:
    """Names of the models inside the package."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{CONFIG}"))


def find_folder(name: str | Path, **hub: Any) -> Path:
    """A model's folder: a shipped name, a path, or a hub name "owner/model" (downloaded once).

    hub: how it is downloaded (revision, token ...), as huggingface_hub.snapshot_download takes it.
    Raises: CheckpointError saying what there is.
    """
    if str(name) in shipped_models():
        if os.path.isfile(os.path.join(name, CONFIG)):
            warnings.warn(f"{name}: the shipped model is taken; for the folder of that name here write"
                          f" {os.path.join('.', name)}", stacklevel=2)  # fmt: skip
        return ASSETS / str(name)
    try:
        path = expanded(name)
    except InputError as error:
        shipped = ", ".join(shipped_models())
        raise CheckpointError(f"model: {error}, a hub name (owner/model) or one of those shipped: {shipped}") from None
    if os.path.isdir(path):  # not path.is_dir, which raises where a name is too long
        if not (path / CONFIG).is_file():
            raise CheckpointError(
                f"{path}: no {CONFIG} in it; a model folder holds {CONFIG}, tokenizer.json and {WEIGHTS}"
            )
        check_finished(path)
        return path
    if path.suffix in PICKLES or path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: give the folder that holds {CONFIG} and {WEIGHTS}, not a file of weights")
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        return download(str(name), **hub)
    raise CheckpointError(
        f"{name}: no such model; give a folder, a hub name (owner/model)"
        f" or one of those shipped: {', '.join(shipped_models()) or 'none'}"
    )


def check_finished(folder: Path) -> None:
    """Raises: CheckpointError where files of two saves may stand side by side."""
    if unfinished := sorted(folder.glob(f"{UNFINISHED}*")):
        raise CheckpointError(
            f"{folder}: a save stopped between two files, old ones and new ones are mixed; save again, or move what"
            f" {unfinished[0].name} holds into the folder and remove it"
        )


def download(name: str, **hub: Any) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "tokenizer.model"], **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{name}: not a folder here, and the hub says: {' '.join(str(error).split())}") from None


def refusal_of_pickle(path: Path) -> str:
    return (
        f"{path.name} is a pickle, which may run code when it is opened; turn it into safetensors with"
        f" `longllava convert {path.parent}`"
    )


def listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
