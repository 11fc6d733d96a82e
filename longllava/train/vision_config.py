"""What a run of the vision foundation is: a YAML file, with presets as other stages have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longllava.errors import ConfigError
from longllava.settings import at_most, build, not_negative, positive, read_mapping
from longllava.train.config import MAX_THREADS, read_stage


@dataclass(frozen=True, kw_only=True)
class VisionTrainConfig:
    """One run of the vision foundation.

    model: a shipped model config ("nano"), a YAML or a model folder, of which the encoder is trained.
    pool_tokens: the tokens a picture is read through. Read is the mean of a random 1 to max_tokens_read of
    them; in the first easy_share of the steps of half to all, so that names are learned before routing.
    """

    model: str
    out: str = "runs/nano/foundation-vision"
    seed: int = 0
    batch: int = 64
    crop_steps: int = 2800
    whole_steps: int = 2200
    name_steps: int = 2000
    crop_learning_rate: float = 2e-3
    whole_learning_rate: float = 1.2e-3
    name_learning_rate: float = 1.0e-3
    weight_decay: float = 0.05
    pool_tokens: int = 36
    max_tokens_read: int = 12
    easy_share: float = 0.2
    restyle: float = 0.25
    save_seconds: float = 60.0
    n_threads: int = 0
    n_test: int = 2000

    def __post_init__(self) -> None:
        positive(self, "batch", "crop_learning_rate", "whole_learning_rate", "name_learning_rate", "pool_tokens",
                 "max_tokens_read", "n_test")  # fmt: skip
        not_negative(self, "crop_steps", "whole_steps", "name_steps", "weight_decay", "save_seconds", "n_threads")
        at_most(self, n_threads=MAX_THREADS)
        if abs(self.seed) >= 1 << 63:
            raise ConfigError(f"seed: got {self.seed}, must be smaller than 2^63")
        if self.max_tokens_read > self.pool_tokens:  # means of more would not sum to 1
            raise ConfigError(f"max_tokens_read: got {self.max_tokens_read}, at most pool_tokens, {self.pool_tokens}")
        for name in ("easy_share", "restyle"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, a share from 0 to 1")

    def steps(self, phase: str) -> int:
        """Steps of "crops", "whole" or "names"."""
        return {"crops": self.crop_steps, "whole": self.whole_steps, "names": self.name_steps}[phase]

    def learning_rate(self, phase: str) -> float:
        """The highest of the phase."""
        rates = {"crops": self.crop_learning_rate, "whole": self.whole_learning_rate, "names": self.name_learning_rate}
        return rates[phase]


def is_vision(path: str | Path) -> bool:
    """Whether a YAML is the vision foundation's: stages have a name and phases, recipes have sources."""
    return not {"stage", "phases", "sources"} & read_mapping(path).keys()


def load_vision(path: str, overrides: Sequence[str] = ()) -> VisionTrainConfig:
    """Read the YAML at `path`; "preset=NAME" and key=value as for every stage. Raises: ConfigError."""
    data = read_stage(path, overrides)
    data.pop("preset", None)
    return build(VisionTrainConfig, data, path)
