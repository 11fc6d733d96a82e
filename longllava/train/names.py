"""Training aid: a fresh language model's words for things start as the codes that the encoder knows them by.

CLIP's image and text embeddings share a space; a small language model trained for minutes on text alone has no
such luck, and its 797 names, seen a few times each, end up close together (cosines of 0.38 RMS), too close to
tell one picture of a thousand by. Here the encoder's fixed codes (longllava.train.vision, cosines of 0.08) are
turned into the model's width by an orthonormal map, at the embeddings' own scale. The other words are moved to
the directions that are left, so that what a picture shows and what is told of it (its number, its frame) do not
mix where a name is looked up.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from longllava.data.worlds.sheets import things
from longllava.errors import TrainingError
from longllava.inputs.tokenizer import Tokenizer
from longllava.nn.priors import orthonormal
from longllava.train.parts import read_tensors

FILE = "name_readout.safetensors"


@torch.no_grad()
def name_codes_(embeddings_VD: Tensor, tokenizer: Tokenizer, folder: Path, seed: int = 0) -> None:
    """Overwrite the rows of the things' names, and turn the others away from them.

    folder: a vision foundation's, with its name_readout.safetensors.
    Raises: TrainingError when the file is missing or not narrower than the embeddings, or a name is several tokens.
    """
    path = folder / FILE
    if not path.is_file():
        raise TrainingError(f"aids.name_codes: no {path}; train the vision foundation first (make foundation)")
    codes_NC = read_tensors(path)["codes"].float()
    n, width = codes_NC.shape
    if n != len(things()) or width >= embeddings_VD.shape[1]:
        raise TrainingError(
            f"{path}: {n} codes of {width} numbers; the world has {len(things())} things, and embeddings"
            f" {embeddings_VD.shape[1]} numbers"
        )
    ids = [tokenizer.encode(thing.name) for thing in things()]
    if long := [thing.name for thing, pieces in zip(things(), ids, strict=True) if len(pieces) != 1]:
        raise TrainingError(f"aids.name_codes: the tokenizer cuts {', '.join(long[:5])}; names must be single tokens")
    turn_CD = orthonormal(torch.Size((width, embeddings_VD.shape[1])), torch.Generator().manual_seed(seed))
    norm_V1 = embeddings_VD.norm(dim=1, keepdim=True)
    embeddings_VD -= embeddings_VD @ turn_CD.T @ turn_CD
    embeddings_VD *= norm_V1 / embeddings_VD.norm(dim=1, keepdim=True)
    embeddings_VD[torch.tensor(ids)[:, 0]] = codes_NC @ turn_CD * norm_V1.mean()
