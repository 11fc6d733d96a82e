"""What every test shares: no network, one seed, no time limits, GPU tests skipped where there is no GPU."""

from __future__ import annotations

import os
import random
import sys

import pytest
from hypothesis import settings

# Before any import of huggingface_hub: a test that reaches for the network fails instead of waiting for it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Two workers share two cores with whatever else runs there: time limits would only flake.
settings.register_profile("longllava", deadline=None, derandomize=True, database=None)
settings.load_profile("longllava")


@pytest.fixture(autouse=True)
def same_seed() -> None:
    """Each test starts from seed 0, whatever ran before it. Tests without torch do not pay for its import."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
