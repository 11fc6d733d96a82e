"""Vision towers by name: folders of CLIP and SigLIP as transformers writes them, and open_clip's models.

`open_clip:ViT-L-14-336/openai` is architecture and pretrained tag (or the path of a file of weights) as
open_clip.create_model takes them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longllava.checkpoints.folders import CONFIG, find_folder
from longllava.checkpoints.stored import Loaded, Stored, read_entries
from longllava.config import EncoderConfig
from longllava.errors import CheckpointError, ConfigError
from longllava.settings import build, read_mapping

OPEN_CLIP = "open_clip:"
PREPROCESSOR = "preprocessor_config.json"
BICUBIC = 3  # Pillow's number
# the towers that published checkpoints name; others are read from their own config.json
KNOWN = {
    "clip-vit-large-patch14-336": EncoderConfig(weights="openai/clip-vit-large-patch14-336"),
    "clip-vit-large-patch14": EncoderConfig(image_size=224, weights="openai/clip-vit-large-patch14"),
}
FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "width",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "mlp_width",
    "layer_norm_eps": "norm_eps",
    "hidden_act": "activation",
}
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# what the configs leave out where it equals transformers' default; and what the families differ in
CLIP: dict[str, Any] = {
    "image_size": 224, "patch_size": 32, "width": 768, "n_layers": 12, "n_heads": 12, "mlp_width": 3072,
    "activation": "quick_gelu", "norm_eps": 1e-5, "class_token": True, "pre_norm": True, "patch_bias": False,
}  # fmt: skip
SIGLIP: dict[str, Any] = {
    **CLIP, "patch_size": 16, "activation": "gelu_tanh", "norm_eps": 1e-6, "mean": (0.5,) * 3, "std": (0.5,) * 3,
    "class_token": False, "pre_norm": False, "patch_bias": True,
}  # fmt: skip
KEPT: list[Any] = []  # what torch.library defines lasts as long as its object
FAMILIES = {"clip_vision_model": CLIP, "clip": CLIP, "siglip_vision_model": SIGLIP, "siglip": SIGLIP}


def tower_entries(source: str, beside: Path) -> dict[str, Stored]:
    """Tensors of the tower that config.encoder.weights names. A path is relative to `beside` first."""
    if source.startswith(OPEN_CLIP):
        tower = open_clip_tower(source)
        return {key: Loaded(tensor) for key, tensor in tower.state_dict().items()}
    return dict(read_entries(tower_folder(source, beside)))


def tower_folder(source: str, beside: Path) -> Path:
    if os.path.isfile(beside / source / CONFIG):  # not Path.is_file, which raises where a name is too long
        return beside / source
    try:
        return find_folder(source)
    except CheckpointError as error:
        raise CheckpointError(f"{beside}: its vision tower: {error}") from None


def tower_config(source: str, beside: Path = Path(), select_layer: int = -2) -> EncoderConfig:
    """The encoder that a name stands for: a folder, open_clip:..., or a known name. Raises: CheckpointError."""
    if source.startswith(OPEN_CLIP):
        values = open_clip_values(source)
    else:
        short = short_name(source)
        if short in KNOWN and not (beside / source / CONFIG).is_file():
            values = {**vars(KNOWN[short])}
        else:
            folder = tower_folder(source, beside)
            values = vision_values(read_mapping(folder / CONFIG), folder)
    return build(EncoderConfig, {"weights": source, **values, "select_layer": select_layer}, f"{beside}: {source}")


def short_name(source: str) -> str:
    return source.rstrip("/").rsplit("/", 1)[-1].lower().replace("_", "-")


def is_here(source: str) -> bool:
    """Whether `tower_config` answers without a download, nor a package that may be missing."""
    return short_name(source) in KNOWN or os.path.isfile(os.path.join(source, CONFIG))


def vision_values(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings of an EncoderConfig from a config.json of CLIP or SigLIP, or the vision part of one."""
    where = f"{folder / CONFIG}"
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: vision_config: expected a mapping, got {data!r:.80}")
    family = data.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(f"{where}: vision model_type {family!r}; allowed: {', '.join(FAMILIES)}")
    vision = data.get("vision_config", data)
    if not isinstance(vision, dict):
        raise ConfigError(f"{where}: vision_config: expected a mapping, got {vision!r}")
    values = {**FAMILIES[family], **{FIELDS[key]: value for key, value in vision.items() if key in FIELDS}}
    values["activation"] = ACTIVATIONS.get(str(values["activation"]), values["activation"])
    if (folder / PREPROCESSOR).is_file():
        preprocessor = read_mapping(folder / PREPROCESSOR)
        values |= {ours: preprocessor[theirs] for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))
                   if theirs in preprocessor}  # fmt: skip
    return {key: value for key, value in vars(build(EncoderConfig, values, where)).items() if key != "weights"}


def family_of(config: EncoderConfig) -> str:
    return "clip_vision_model" if config.class_token else "siglip_vision_model"


def vision_faults(config: EncoderConfig) -> list[str]:
    """Settings that transformers' towers have no word for."""
    family = family_of(config)
    differ = [key for key in ("pre_norm", "patch_bias") if getattr(config, key) != FAMILIES[family][key]]
    differ += ["stem_widths"] if config.stem_widths else []
    differ += ["kind"] if config.kind != "vit" else []
    return [f"encoder.{key}: transformers' {family} has no such setting" for key in differ]


def vision_fields(config: EncoderConfig) -> dict[str, Any]:
    """The other way: a vision_config for transformers."""
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    return {**fields, "hidden_act": names[config.activation], "model_type": family_of(config), "num_channels": 3}


def preprocessor_fields(config: EncoderConfig) -> dict[str, Any]:
    """Padded to a square with the mean colour, then resized, as LLaVA does."""
    side = config.image_size
    return {
        "image_processor_type": "LlavaImageProcessor", "processor_class": "LlavaProcessor", "do_convert_rgb": True,
        "do_pad": True, "do_resize": True, "size": {"shortest_edge": side}, "resample": BICUBIC,
        "do_center_crop": True, "crop_size": {"height": side, "width": side}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(config.mean), "image_std": list(config.std),
    }  # fmt: skip


def split_name(source: str) -> tuple[str, str | None]:
    """(architecture, pretrained tag) of open_clip:architecture/tag."""
    architecture, _, tag = source.removeprefix(OPEN_CLIP).partition("/")
    return architecture, tag or None


def open_clip_values(source: str) -> dict[str, Any]:
    open_clip = import_open_clip()
    architecture, tag = split_name(source)
    settings = open_clip.get_model_config(architecture)
    if settings is None:
        raise CheckpointError(f"{source}: open_clip has no model {architecture!r}; see open_clip.list_models()")
    vision, pretrained = settings["vision_cfg"], open_clip.get_pretrained_cfg(architecture, tag or "") or {}
    plain = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
    if not isinstance(vision.get("layers"), int) or set(vision) - plain:
        raise CheckpointError(f"{source}: only open_clip's plain vision transformers can be read, such as ViT-L-14-336")
    quick = settings.get("quick_gelu", False) or pretrained.get("quick_gelu", False)
    return {
        "image_size": vision.get("image_size", 224),
        "patch_size": vision["patch_size"],
        "width": vision["width"],
        "n_layers": vision["layers"],
        "n_heads": vision["width"] // vision.get("head_width", 64),
        "mlp_width": math.floor(vision["width"] * vision.get("mlp_ratio", 4.0)),
        "activation": "quick_gelu" if quick else "gelu",
        "mean": tuple(pretrained.get("mean", EncoderConfig.mean)),
        "std": tuple(pretrained.get("std", EncoderConfig.std)),
    }


def open_clip_tower(source: str) -> Any:
    """The vision transformer that open_clip builds and fills; without a tag its weights would be random."""
    open_clip = import_open_clip()
    architecture, tag = split_name(source)
    if tag is None:
        raise CheckpointError(
            f"{source}: name the weights too, open_clip:{architecture}/TAG, TAG one of"
            f" {', '.join(open_clip.list_pretrained_tags_by_model(architecture)) or 'none'}"
        )
    try:
        return open_clip.create_model(architecture, pretrained=tag).visual
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"{source}: open_clip says: {' '.join(str(error).split())}") from None


def import_open_clip() -> Any:
    """open_clip, with what torchvision lacks beside a CPU build of torch: the schemas of two of its operators."""
    import torch

    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass  # open_clip's own import says so
    except RuntimeError:  # operator torchvision::nms does not exist
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)
    try:
        import open_clip
    except ImportError as error:
        raise CheckpointError(f"open_clip: {error}; pip install 'longllava[openclip]'") from None
    return open_clip
