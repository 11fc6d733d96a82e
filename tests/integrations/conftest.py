"""A tiny model's folder, and what transformers and the library make of it."""

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

import longllava.integrations.transformers  # noqa: F401
from longllava.api import LongLLaVA
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Experts, qk_norm and log_length_scale: what positions and padding could go wrong with."""
    return tiny_model(3, seed=1).save_pretrained(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def library(folder):
    return LongLLaVA.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder)
