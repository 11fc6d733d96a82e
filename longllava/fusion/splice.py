"""LongLLaVA's fusion: image tokens stand in the text sequence, where their slots were kept."""

from __future__ import annotations

import torch
from torch import Tensor

from longllava.errors import InputError
from longllava.nn import Block


class Splice:
    """Places image tokens over the slots of their spans; blocks stay as they are."""

    def embed(self, text_BLD: Tensor, spans_S4: Tensor, image_tokens_NMD: Tensor | None) -> Tensor:
        """spans_S4: int64 rows of (row, start, length, image), over (B, L). Returns (B, L, D).

        Each span takes the first `length` tokens of its image. Spans on the host are checked there, without waiting
        for a GPU. Raises: InputError when an image has another number of tokens than its span, or a span names an
        image that is not there.
        """
        if len(spans_S4) == 0:
            return text_BLD
        n_images, n_tokens = (0, 0) if image_tokens_NMD is None else image_tokens_NMD.shape[:2]
        lengths, last = spans_S4[:, 2], int(spans_S4[:, 3].max())
        if image_tokens_NMD is None or last >= n_images:
            raise InputError(f"the prompt names image {last + 1}, but {n_images} images were given")
        if not bool((lengths == n_tokens).all()):
            wrong = int((lengths != n_tokens).nonzero()[0])
            raise InputError(
                f"image {int(spans_S4[wrong, 3]) + 1}: the prompt reserves {int(lengths[wrong])} tokens, the bridge"
                f" made {n_tokens}; use one tokens_per_image for both"
            )
        flat_TD = text_BLD.flatten(0, 1)
        first_S = spans_S4[:, 0] * text_BLD.shape[1] + spans_S4[:, 1]
        at_SM = first_S[:, None] + torch.arange(n_tokens, device=spans_S4.device)
        image_S = spans_S4[:, 3]
        if image_S.device.type != "cpu" or not torch.equal(image_S, torch.arange(n_images)):
            image_tokens_NMD = image_tokens_NMD[sent(image_S, flat_TD.device)]
        images_TD = image_tokens_NMD.flatten(0, 1).to(flat_TD.dtype)
        return flat_TD.index_copy(0, sent(at_SM.flatten(), flat_TD.device), images_TD).view_as(text_BLD)

    def adapt(self, block: Block, layer: int) -> Block:
        return block


def sent(index: Tensor, device: torch.device) -> Tensor:
    """An index on the device; from the host to a GPU without waiting for it."""
    if device.type == "cuda" and index.device.type == "cpu":
        return index.pin_memory().to(device, non_blocking=True)
    return index.to(device)
