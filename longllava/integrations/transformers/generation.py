"""What transformers' generate asks of a model, where its own answer would not do for ours.

B rows, L tokens of a prompt, N pictures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from longllava.errors import InputError
from longllava.integrations.transformers.cache import CACHE, LongLLaVACache, check_padding, check_prompt
from longllava.integrations.transformers.configuration import LongLLaVAConfig


class LongLLaVAGenerationMixin(GenerationMixin):
    """For a model whose pictures stand among its ids. transformers knows who can generate by this name's end."""

    config: LongLLaVAConfig

    if TYPE_CHECKING:  # of the model

        def slots(
            self, ids_BL: Tensor, mask_BS: Tensor | None, past: int, n_images: int, n_tokens: int | None
        ) -> tuple[Tensor, list[int]]: ...

    def _prepare_special_tokens(self, generation_config: Any, *rest: Any, **named: Any) -> None:  # type: ignore[override]
        """Rows that are done do not go on with the id on which pictures stand, which Trainer sets and callers give,
        where these are looked for at each step: without a cache."""
        if generation_config.use_cache is False and generation_config.pad_token_id == self.config.image_token_id:
            generation_config.pad_token_id = self.config.eos_token_id
        super()._prepare_special_tokens(generation_config, *rest, **named)  # type: ignore[misc]

    def _prepare_attention_mask_for_generation(  # type: ignore[override]
        self, inputs_tensor: Tensor, generation_config: Any, model_kwargs: dict
    ) -> Tensor:
        """Where no mask is given pad ids at a row's ends are padding, those between them are pictures' places."""
        ids_BL = given if (given := model_kwargs.get("input_ids")) is not None and given.shape[1] else inputs_tensor
        if ids_BL.ndim != 2 or self.config.image_token_id is None:  # embeddings
            return torch.ones(ids_BL.shape[:2], dtype=torch.long, device=ids_BL.device)
        real_BL = (ids_BL != self.config.image_token_id).long()
        return real_BL.cummax(1).values & real_BL.flip(1).cummax(1).values.flip(1)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict, *rest: Any
    ) -> None:
        """Room for the prompt and all that is to come, at once. Raises: InputError for rows that end in padding."""
        check_settings(generation_config)
        check_padding(model_kwargs.get("attention_mask"))
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = LongLLaVACache(generation_config.max_length)

    def init_continuous_batching(self, *arguments: Any, **named: Any) -> Any:
        """What generate_batch begins with, and generate where a paged cache is asked for."""
        raise InputError("continuous batching: a Mamba layer's state has no pages; give generate padded rows")

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Rows that are repeated, for beams and several answers, each bring all of their pictures."""
        pixels_N3PP = kwargs.pop("pixel_values", None)
        if pixels_N3PP is not None and len(pixels_N3PP) and expand_size > 1:
            mask_BS, n_tokens = kwargs.get("attention_mask"), kwargs.get("tokens_per_image")
            _, n_images_B = self.slots(input_ids, mask_BS, 0, len(pixels_N3PP), n_tokens)
            pixels_N3PP = torch.cat([own for own in pixels_N3PP.split(n_images_B) for _ in range(expand_size)])
        rows = (expand_size, is_encoder_decoder, input_ids)
        ids, kwargs = super()._expand_inputs_for_generation(*rows, **kwargs)  # type: ignore[misc]
        return ids, {**kwargs, "pixel_values": pixels_N3PP}

    def prepare_inputs_for_generation(
        self, input_ids: Any, *arguments: Any, inputs_embeds: Any = None, pixel_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Pictures are read with the prompt, once. generate looks here for the name of inputs_embeds."""
        if kwargs.get("is_first_iteration"):
            check_prompt((input_ids if inputs_embeds is None else inputs_embeds).shape[1], kwargs.get(CACHE))
        given = {**kwargs, "inputs_embeds": inputs_embeds}
        inputs = super().prepare_inputs_for_generation(input_ids, *arguments, **given)  # type: ignore[misc]
        if kwargs.get("is_first_iteration") or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        # the mask and the cache know places; the others are of generate itself
        for name in ("position_ids", "tokenizer", "assistant_tokenizer"):
            inputs.pop(name, None)
        return inputs


def check_settings(generation_config: Any) -> None:
    """Raises: InputError for settings that would be heeded by nobody, or lose a part of the prompt."""
    if (asked := generation_config.cache_implementation) not in (None, "dynamic"):
        raise InputError(f"cache_implementation: got {asked!r}, allowed: 'dynamic'; layers have their own states")
    if generation_config.prefill_chunk_size is not None:
        raise InputError("prefill_chunk_size: a prompt is read in chunks as it is; leave it out")
    if generation_config.token_healing:
        raise InputError("token_healing: a prompt's pictures and special tokens would be lost; leave it out")
