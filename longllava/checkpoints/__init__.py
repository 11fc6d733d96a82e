"""Model folders: config.json, tokenizer.json, safetensors; read and written whole or not at all."""

from longllava.checkpoints.load import find_folder, load_model, load_weights_, shipped_models
from longllava.checkpoints.save import save_model

__all__ = ["find_folder", "load_model", "load_weights_", "save_model", "shipped_models"]
