"""Weights from a model folder, checked before anything is changed.

A folder holds config.json, tokenizer.json and model.safetensors, or shards that model.safetensors.index.json
lists. Keys are the module's own (encoder.*, bridge.*, backbone.*). A folder without
encoder.* names in config.encoder.weights whose encoder it uses: a frozen encoder is stored once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longllava.config import ModelConfig
from longllava.errors import CheckpointError
from longllava.settings import load

if TYPE_CHECKING:
    import torch

    from longllava.model import Model

ASSETS = Path(__file__).resolve().parents[1] / "assets"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# what a recurrence of ten thousand steps is sensitive to stays in fp32, whatever the model's dtype
FP32_NAMES = ("A_log_EN", "D_E", "dt_bias_E", "log_length_H")
LISTED = 8  # names shown of each kind of fault


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    file: Path
    shape: tuple[int, ...]


def shipped_models() -> list[str]:
    """Names of the models inside the package."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{CONFIG}"))


def find_folder(name: str | Path) -> Path:
    """A model's folder: a shipped name, a path, or a hub name "owner/model" (downloaded once).

    Raises: CheckpointError saying what there is.
    """
    if str(name) in shipped_models():
        return ASSETS / str(name)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise CheckpointError(
                f"{path}: no {CONFIG} in it; a model folder holds {CONFIG}, tokenizer.json and {WEIGHTS}"
            )
        return path
    if path.suffix in PICKLES or path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: give the folder that holds {CONFIG} and {WEIGHTS}, not a file of weights")
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        return download(str(name))
    raise CheckpointError(
        f"{name}: no such model; give a folder, a hub name (owner/model)"
        f" or one of those shipped: {', '.join(shipped_models()) or 'none'}"
    )


def download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{name}: not a folder here, and the hub says: {' '.join(str(error).split())}") from None


def load_model(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    allow_missing: Sequence[str] = (),
) -> Model:
    """Build the model of a folder and read its weights into it, each tensor straight to its place.

    dtype: of the weights; None keeps what is stored. SSM parameters (A_log, D, dt bias) stay fp32.
    allow_missing: prefixes of parameters that keep their fresh values when the folder has none of them.
    Raises: CheckpointError listing what is missing, unexpected, of wrong shape, or not finite.
    """
    import torch

    from longllava.model import Model

    folder = find_folder(folder)
    config = load(ModelConfig, folder / CONFIG)
    if allow_missing:  # fresh values have to exist
        model = Model(config).to(device)
    else:
        with torch.device("meta"):
            model = Model(config)
    load_weights_(model, folder, device=device, dtype=dtype, allow_missing=allow_missing)
    model.to(device)  # buffers that no checkpoint holds
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"built on meta and not in the checkpoint: {left}"
    return model.eval()


def load_weights_(
    model: Model,
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    allow_missing: Sequence[str] = (),
) -> None:
    """Replace the parameters of `model` by those of a folder; on any error the model is as it was.

    device, dtype: where and as what; None keeps the model's device, and the stored dtype.
    allow_missing: prefixes ("bridge.", "encoder.") whose parameters may be absent and then stay as they are.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    folder = find_folder(folder)
    wanted = model.state_dict()
    entries = read_entries(folder)
    if not any(key.startswith("encoder.") for key in entries) and model.config.encoder is not None:
        entries |= borrowed_encoder(model.config, folder, allow_missing)
    check_names(folder, {key: tuple(value.shape) for key, value in wanted.items()}, entries, allow_missing)
    state: dict[str, torch.Tensor] = {}
    not_finite = []
    for file in dict.fromkeys(entry.file for entry in entries.values()):
        try:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                for key in (key for key, entry in entries.items() if entry.file == file):
                    tensor = tensors.get_tensor(key)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        not_finite.append(key)
                    target = device if device is not None else wanted[key].device
                    state[key] = tensor.to(target, stored_dtype(key, tensor.dtype, dtype), copy=True)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    if not_finite:
        raise CheckpointError(f"{folder}: NaN or infinite weights in {listed(not_finite)}; the checkpoint is damaged")
    model.load_state_dict(state, strict=False, assign=True)


def stored_dtype(key: str, stored: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    import torch

    if not stored.is_floating_point:
        return stored
    return torch.float32 if key.rsplit(".", 1)[-1] in FP32_NAMES else (asked or stored)


def read_entries(folder: Path) -> dict[str, Entry]:
    """All tensors of a folder by name, from the files' headers. Raises: CheckpointError."""
    index, single = folder / INDEX, folder / WEIGHTS
    if not index.is_file():
        if not single.is_file():
            raise CheckpointError(f"{folder}: {no_weights(folder)}")
        return dict(header(single))
    weight_map = read_index(index)
    files = {name: folder / name for name in sorted(set(weight_map.values()))}
    if missing := [name for name, path in files.items() if not path.is_file()]:
        raise CheckpointError(
            f"{folder}: missing {listed(missing)} of {len(files)} weight files; copy the folder again"
        )
    entries: dict[str, Entry] = {}
    for name, path in files.items():
        found = dict(header(path))
        expected = {key for key, file in weight_map.items() if file == name}
        if expected != set(found):
            raise CheckpointError(
                f"{path}: its tensors are not those that {INDEX} lists; they differ in"
                f" {listed(sorted(expected ^ set(found)))}"
            )
        entries |= found
    return entries


def read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path}: not an index; expected JSON with a weight_map") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is not a table of tensor names to file names")
    for name in weight_map.values():
        plain = isinstance(name, str) and name == Path(name).name and "\\" not in name and ":" not in name
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {name!r:.80} is not the plain name of a .safetensors file in this folder")
    return weight_map


def header(path: Path) -> Iterator[tuple[str, Entry]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as tensors:
            for key in tensors.keys():
                yield key, Entry(path, tuple(tensors.get_slice(key).get_shape()))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


def no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return f"{pickles[0]} is a pickle, which may run code when it is opened; convert it to safetensors first"
    return f"no {WEIGHTS} or {INDEX} in it"


def borrowed_encoder(config: ModelConfig, folder: Path, allow_missing: Sequence[str]) -> dict[str, Entry]:
    """encoder.* of the model that config.encoder.weights names; relative to the folder first."""
    source = config.encoder.weights if config.encoder else None
    if source is None:
        return {}
    beside = folder / source
    other = beside if (beside / CONFIG).is_file() else find_folder(source)
    entries = {key: entry for key, entry in read_entries(other).items() if key.startswith("encoder.")}
    if not entries and "encoder." not in allow_missing:
        raise CheckpointError(f"{other}: it has no encoder, which {folder / CONFIG} wants from it (encoder.weights)")
    return entries


def check_names(
    folder: Path, wanted: dict[str, tuple[int, ...]], entries: dict[str, Entry], allow_missing: Sequence[str]
) -> None:
    """One error that lists every fault of names and shapes."""
    missing = [key for key in wanted if key not in entries and not key.startswith(tuple(allow_missing))]
    unexpected = [key for key in entries if key not in wanted]
    wrong = [f"{key} {entries[key].shape} instead of {shape}" for key, shape in wanted.items()
             if key in entries and entries[key].shape != shape]  # fmt: skip
    faults = [f"{len(names)} {kind}: {listed(names)}"
              for kind, names in (("missing", missing), ("unexpected", unexpected), ("of wrong shape", wrong))
              if names]  # fmt: skip
    if faults:
        raise CheckpointError(f"{folder}: weights do not fit its {CONFIG}; {'; '.join(faults)}")


def listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
