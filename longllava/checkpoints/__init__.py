"""Model folders: config.json, tokenizer.json, safetensors; of ours and of the published layouts."""

from longllava.checkpoints.folders import find_folder, shipped_models
from longllava.checkpoints.load import load_model, load_weights_
from longllava.checkpoints.quantize import quantize_folder
from longllava.checkpoints.save import save_model

__all__ = ["find_folder", "load_model", "load_weights_", "quantize_folder", "save_model", "shipped_models"]
