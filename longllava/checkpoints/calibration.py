"""How much a router gives each of its experts when a text is read.

The model is run block by block: one block's weights are in memory at a time, beside the hidden states of the text.
L tokens of a window, D width, X experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longllava.checkpoints.convert import Source
from longllava.errors import CheckpointError
from longllava.inputs.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from longllava.nn import Block

WINDOW = 1024  # tokens read as one text, bos included
MAX_TOKENS = 16_384  # their hidden states are 268 MB at a width of 4,096; shares are then known to 1/128 of themselves
CHARACTERS = 64 * MAX_TOKENS  # read of a text, which may be far longer: no words fill so many with fewer tokens


def windows(source: Source, path: Path) -> list[list[int]]:
    """The beginning of a file's text as token ids, in windows that begin with bos. Raises: CheckpointError."""
    tokenizer = Tokenizer.from_folder(source.folder, source.model.config.prompt)
    try:
        with path.open(encoding="utf-8") as file:
            ids = tokenizer.encode(file.read(CHARACTERS))[:MAX_TOKENS]
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    n_words = source.model.config.backbone.vocab_size
    if not ids or max(ids) >= n_words:
        fault = f"its tokens do not belong to a model of {n_words}" if ids else "there is no text in it"
        raise CheckpointError(f"{path}: {fault}")
    return [[tokenizer.bos_id, *ids[at : at + WINDOW - 1]] for at in range(0, len(ids), WINDOW - 1)]


def measured_shares(source: Source, path: Path) -> dict[str, list[float]]:
    """{"backbone.layers.1": what each expert is given of all that its router gives}, in fp32."""
    import torch

    embeddings_VD = source.make("backbone.embed_tokens.weight")
    texts = [embeddings_VD[torch.tensor(ids)].float()[None] for ids in windows(source, path)]
    del embeddings_VD
    shares = {}
    for number, block in enumerate(source.model.backbone.blocks()):
        name = f"backbone.layers.{number}"
        weights = {key: source.make(f"{name}.{key}").float() for key in block.state_dict()}
        block.load_state_dict(weights, assign=True)
        with torch.inference_mode():
            texts, given_X = read(block, texts)
        if given_X is not None:
            shares[name] = (given_X / given_X.sum()).tolist()
        block.to("meta")
    return shares


def read(block: Block, texts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """Hidden states (1, L, D) after a block, and what its router gave each expert (X,), if it has one."""
    import torch

    from longllava.nn import Context
    from longllava.nn.mlp import MixtureOfExperts

    if not isinstance(block.ffn, MixtureOfExperts):
        return [block(text_1LD, Context(), None)[0] for text_1LD in texts], None
    routed: list[Tensor] = []
    hook = block.ffn.router.register_forward_hook(lambda module, inputs, logits_TX: routed.append(logits_TX))
    after = [block(text_1LD, Context(), None)[0] for text_1LD in texts]
    hook.remove()
    return after, given(torch.cat(routed), block.ffn.n_per_token)


def given(logits_TX: Tensor, n_per_token: int) -> Tensor:
    """Logits of a router -> the weights it gives each expert, summed over tokens: (X,)."""
    import torch

    weights_TX = torch.softmax(logits_TX, dim=-1)
    chosen = weights_TX.topk(n_per_token, dim=-1)
    return torch.zeros_like(weights_TX).scatter_(1, chosen.indices, chosen.values).sum(0)
