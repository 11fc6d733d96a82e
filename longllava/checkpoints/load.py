"""Weights into a model, checked before anything is changed.

A folder holds config.json, tokenizer.json and model.safetensors, or shards that model.safetensors.index.json
lists. Its keys are the module's own (encoder.*, bridge.*, backbone.*) or those of a published layout, which
longllava.checkpoints.names recognises part by part. A folder without an encoder names in config.encoder.weights
whose encoder it uses: a frozen encoder is stored once.

Memory: tensors are read one by one straight to their places, so the peak is the model and twice its largest
tensor (once as it is stored, once as it is wanted).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longllava.checkpoints.adapters import is_adapter, load_adapted
from longllava.checkpoints.folders import ASSETS as ASSETS
from longllava.checkpoints.folders import CONFIG, find_folder, listed
from longllava.checkpoints.int8 import Quantiser, damaged_scales, int8_config
from longllava.checkpoints.names import Naming, Source, recognise
from longllava.checkpoints.placing import FP32_NAMES as FP32_NAMES
from longllava.checkpoints.placing import check_room, most_stored, placement_of, stored_dtype
from longllava.checkpoints.published import read_config
from longllava.checkpoints.stored import Stored, check_same, read_entries, stamp
from longllava.checkpoints.towers import tower_entries
from longllava.config import Int8Config
from longllava.errors import CheckpointError, InputError
from longllava.plan.split import Placement

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from longllava.model import Model

PARTS = ("encoder.", "bridge.", "backbone.")
EMBEDDING = "backbone.embed_tokens.weight"
Shapes = Mapping[str, tuple[int, ...]]


def load_model(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    allow_missing: Sequence[str] = (),
    int8: Int8Config | None = None,
    device_map: str | Mapping[str, Any] | None = None,
) -> Model:
    """Build the model of a folder and read its weights into it, each tensor straight to its place.

    dtype: of the weights; None keeps what is stored. SSM parameters (A_log, D, dt bias) stay fp32.
    allow_missing: prefixes of parameters that keep their fresh values when the folder has none of them.
    int8: quantise floats while they are read; never more than one of them is held. A folder of int8 weights is loaded
    as what it is. A folder of peft is the model it was trained on, with the adapters in the weights.
    device_map: layers over several devices, "auto" or a table (see plan/split.py), instead of `device`.
    Raises: CheckpointError listing what is missing, unexpected, of wrong shape, or not finite.
    """
    import torch

    from longllava.quant import build_model

    folder = find_folder(folder)
    if is_adapter(folder):
        return load_adapted(folder, int8=int8, device=device, dtype=dtype, allow_missing=allow_missing,
                            device_map=device_map)  # fmt: skip
    began, stored = stamp(folder / CONFIG), read_config(folder)
    config = int8_config(stored, folder, int8)
    planned = dtype or most_stored(read_entries(folder).values())
    if config.int8 is not None and planned == torch.float16:
        asked = "float16" if dtype else f"{folder} is stored in float16, which"
        raise InputError(f"dtype: {asked} ends at 65504, sums of int8 layers do not; take bfloat16 or float32")
    if allow_missing:  # fresh values have to exist
        if config.int8 is not None:
            raise CheckpointError(
                f"{folder}: int8 weights have no fresh values to start from; take the model of floats"
            )
        model = build_model(config)
    else:
        with torch.device("meta"):
            model = build_model(config)
    placement = placement_of({"": str(device)} if device_map is None else device_map, model, planned)
    if not allow_missing:
        check_room(model, planned, placement)
    quantise = stored.int8 is None and config.int8 is not None
    load_weights_(model, folder, device=placement, dtype=dtype, allow_missing=allow_missing, quantise=quantise)
    check_same(folder / CONFIG, began)
    model.place_(placement.first, placement.layers)  # also what no checkpoint holds
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if tensor.is_meta and placement.device_of(name) != "meta"]  # fmt: skip
    assert not left, f"built on meta and not in the checkpoint: {left}"
    return model.eval()


def load_weights_(
    model: Model,
    source: str | Path,
    *,
    device: str | torch.device | Placement | None = None,
    dtype: torch.dtype | None = None,
    allow_missing: Sequence[str] = (),
    parts: tuple[str, ...] = (),
    quantise: bool = False,
) -> None:
    """Replace the parameters of `model` by those of a folder or a .safetensors file; on any error it is as it was.

    device, dtype: where and as what; None keeps the model's device, and the stored dtype.
    allow_missing: prefixes ("bridge.", "encoder.") whose parameters may be absent and then stay as they are.
    parts: only parameters with these prefixes, whatever else is there: ("bridge.",) for a stage-1 projector file.
    quantise: the source holds floats, and the model wants int8.
    """
    from longllava.quant import all_finite

    path = Path(source) if Path(source).is_file() else find_folder(source)
    wanted = {key: tensor for key, tensor in model.state_dict().items() if not parts or key.startswith(parts)}
    shapes = {key: tuple(tensor.shape) for key, tensor in wanted.items()}
    tensors = model.state_dict()

    def device_of(key: str) -> str | torch.device:
        return device.device_of(key) if isinstance(device, Placement) else device or tensors[key].device

    quantiser = Quantiser(model, device_of) if quantise else None
    places = find_places(path, model, quantiser.shapes(shapes) if quantiser else shapes, parts)
    places.check(path, allow_missing, whole=not parts)
    state: dict[str, Tensor] = {}
    not_finite: list[str] = []
    for key, where in places.sources.items():
        if where.names[0] not in places.stored:
            continue  # allowed to be missing
        if quantiser is not None and key in quantiser.places:
            not_finite += quantiser.take(key, where, places.stored)
            continue
        tensor = read(where, places.stored, key, wanted[key].shape, device_of(key), dtype)
        if not tensor.is_floating_point() and tensor.dtype != wanted[key].dtype:
            raise CheckpointError(f"{path}: {key} is {tensor.dtype}, expected {wanted[key].dtype}; it is damaged")
        if not all_finite(tensor):
            not_finite += where.names
        state[key] = tensor
    if not_finite:
        why = "the checkpoint is damaged" + (f", or has values beyond what {dtype} holds" if dtype else "")
        raise CheckpointError(f"{path}: NaN or infinite weights in {listed(not_finite)}; {why}")
    if damaged := damaged_scales(state):
        raise CheckpointError(
            f"{path}: scales of int8 weights that are not above 0 in {listed(damaged)}; it is damaged"
        )
    model.load_state_dict(state | (quantiser.state if quantiser else {}), strict=False, assign=True)


@dataclass(frozen=True)
class Places:
    """Where every wanted parameter lies, and what else lies there."""

    shapes: Shapes
    sources: dict[str, Source]
    stored: dict[str, Stored]
    unexpected: list[str]
    counters: Set[str] = frozenset()  # what holds whole numbers in the model too (a batch norm's count of batches)
    tied: Set[str] = frozenset()  # names under which an output layer may be stored that is the embedding

    def check(self, path: Path, allow_missing: Sequence[str], whole: bool) -> None:
        """One error that lists every fault of names and shapes. whole: names without a use are faults too."""
        missing, wrong = [], []
        whole_numbers: list[str] = []
        fractions: list[str] = []
        for key, source in self.sources.items():
            allowed = key.startswith(tuple(allow_missing)) and not any(name in self.stored for name in source.names)
            for name, shape in zip(source.names, source.shapes, strict=True):
                if name not in self.stored:
                    missing += [] if allowed else [name]
                elif self.stored[name].shape != shape:
                    wrong.append(f"{name} {self.stored[name].shape} instead of {shape}")
                elif self.stored[name].dtype.is_floating_point == (key in self.counters):
                    found = fractions if key in self.counters else whole_numbers
                    found.append(f"{name} {self.stored[name].dtype}")
        kinds = {"missing": missing, "unexpected": self.unexpected if whole else [], "of wrong shape": wrong,
                 "of whole numbers": whole_numbers, "not of whole numbers": fractions}  # fmt: skip
        faults = [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names]
        if faults:
            raise CheckpointError(f"{path}: weights do not fit its {CONFIG}; {'; '.join(faults)}")
        self.check_tied(path)

    def check_tied(self, path: Path) -> None:
        """An output layer that is stored though it is the embedding: left out, another one would be lost in silence."""
        import torch

        embedding = self.sources.get(EMBEDDING)
        if embedding is None or embedding.names[0] not in self.stored:
            return
        for name in sorted(self.tied & self.stored.keys()):
            head_VD, table_VD = self.stored[name].read(), self.stored[embedding.names[0]].read()
            if head_VD.shape != table_VD.shape or not torch.equal(head_VD, table_VD.to(head_VD.dtype)):
                raise CheckpointError(f"{path}: {name} is not the embedding, though {CONFIG} says that they are one; "
                                      "untie them there (tie_embeddings, or tie_word_embeddings, false)")  # fmt: skip


def find_places(path: Path, model: Model, shapes: Shapes, parts: tuple[str, ...]) -> Places:
    """Match the wanted parameters with what is stored under `path`, part by part."""
    stored: dict[str, Stored] = dict(read_entries(path))
    sources: dict[str, Source] = {}
    namings: list[Naming] = []
    borrowed: dict[str, Stored] = {}
    for part in PARTS:
        wanted = {key: shape for key, shape in shapes.items() if key.startswith(part)}
        naming = recognise(part[:-1], wanted, stored)
        if part == "encoder." and wanted and naming is None and not any(key.startswith(part) for key in stored):
            borrowed = borrowed_encoder(model, path)
            naming = recognise(part[:-1], wanted, borrowed)
            borrowed = {name: entry for name, entry in borrowed.items() if naming or name.startswith(part)}
        if naming is not None:
            namings.append(naming)
        for key, shape in wanted.items():
            sources[key] = (naming and naming.source(key, shape)) or Source((key,), (shape,))
    used = {name for source in sources.values() for name in source.names}
    tied = {"backbone.lm_head.weight"} if model.config.backbone.tie_embeddings else set()
    for naming in namings:  # a tied output layer may be stored beside the embedding it equals
        tied |= {name for key in list(tied) if (s := naming.source(key, (1,))) for name in s.names}
    used |= tied
    depth = model.config.encoder.n_layers if model.config.encoder else 0
    unexpected = [name for name in stored if name not in used
                  and not any(naming.has_no_use_for(name, depth) for naming in namings)]  # fmt: skip
    counters = {key for key, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    return Places(shapes, sources, stored | borrowed, unexpected, counters, tied)


def borrowed_encoder(model: Model, path: Path) -> dict[str, Stored]:
    """The tensors of whatever config.encoder.weights names; relative to the folder first."""
    source = model.config.encoder.weights if model.config.encoder else None
    return {} if source is None else tower_entries(source, path if path.is_dir() else path.parent)


def read(
    source: Source,
    stored: Mapping[str, Stored],
    key: str,
    shape: tuple[int, ...],
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> Tensor:
    """One of our parameters, in memory of its own, from the tensors it lies in."""
    import torch

    first = stored[source.names[0]].read()
    kept = stored_dtype(key, first.dtype, dtype)
    if len(source.names) == 1:
        return first.to(device, kept, copy=True).reshape(shape)
    tensor = torch.empty(shape, device=device, dtype=kept)
    for rows, name in zip(tensor.chunk(len(source.names)), source.names):
        rows.copy_(stored[name].read())
    return tensor
