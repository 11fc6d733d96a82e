"""A Model as transformers' generate, pipelines and Trainer know models.

Its parts are the library's own, under their own names, so that a state dict is that of our folders. B rows, L tokens of
this call, S tokens with those of the cache, N pictures, M tokens a picture, P pixels a side, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from longllava.bridges import pool_features
from longllava.checkpoints import load_model
from longllava.checkpoints.adapters import is_adapter
from longllava.checkpoints.folders import WEIGHTS
from longllava.checkpoints.int8 import write_manifest
from longllava.checkpoints.write import SHARDS, remove_stale
from longllava.errors import InputError
from longllava.generation.prefill import MAX_BATCH, PIXELS_PER_BATCH
from longllava.integrations.transformers.cache import CACHE, LongLLaVACache, context
from longllava.integrations.transformers.configuration import LongLLaVAConfig, token_ids
from longllava.integrations.transformers.generation import LongLLaVAGenerationMixin
from longllava.integrations.transformers.loading import (
    as_one_dtype_,
    checked_device_map,
    checked_dtype,
    folder_of,
    generation_of,
)
from longllava.integrations.transformers.processing import check_pixels
from longllava.model import Model
from longllava.nn import Context
from longllava.quant import quantize_
from longllava.train.loss import answer_loss

CHUNK_TOKENS = 2048  # of all rows, prefilled at a time: 144,000 tokens of a 9B at once are 4.7 GB in each Mamba layer
ANSWER_TOKENS = 16_384  # that room is made for at once, 256 MiB in a 9B: max_new_tokens may stand for no end at all


class LongLLaVAForConditionalGeneration(PreTrainedModel, LongLLaVAGenerationMixin):
    """Text, and pictures where the attention mask is 1 and the id is config.image_token_id, to the next token.

    Without an encoder it reads text only: AutoModelForCausalLM makes it too. An encoder is frozen unless its parameters
    are told to require gradients.
    """

    config_class = LongLLaVAConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch
    _no_split_modules = ["Block", "VisionBlock"]
    _is_stateful = True  # no assisted decoding
    config: LongLLaVAConfig

    def __init__(self, config: LongLLaVAConfig, model: Model | None = None):
        super().__init__(config)
        if model is None:
            described = config.model_config()
            model = Model(replace(described, int8=None))
            if not model.backbone.embed_tokens.weight.is_meta:
                model.initialise_(int(torch.randint(2**31, ())))
            if described.int8 is not None:
                quantize_(model, described.int8)
        self.encoder, self.bridge = model.encoder, model.bridge
        self.backbone, self.fusion = model.backbone, model.fusion
        if self.encoder is not None:
            self.encoder.requires_grad_(False)
        self.post_init()
        if config.eos_token_id is not None:  # rows that are done go on with eos: pad is what pictures stand on
            self.generation_config.eos_token_id = self.generation_config.pad_token_id = config.eos_token_id

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are there: loaded, or drawn as Model draws them."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: LongLLaVAConfig | None = None,
        dtype: Any = None, torch_dtype: Any = None, device_map: Any = None, **kwargs: Any,
    ) -> LongLLaVAForConditionalGeneration:  # fmt: skip
        """Read a folder of ours or of LongLLaVA's layout, checked and streamed as LongLLaVA.from_pretrained reads it.

        dtype: None or "auto" as stored, or of several the one that most weights have. device_map: None for the CPU, a
        device, {"": device}, or "auto".
        Raises: CheckpointError, ConfigError, InputError for an argument that has no meaning here.
        """
        adapter = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")  # of the Auto classes
        folder = folder_of(pretrained_model_name_or_path, kwargs)
        dtype = dtype if torch_dtype is None else torch_dtype
        if dtype is None and config is not None:  # where Auto classes of transformers 5.6 leave it
            dtype = config.dtype
        model = load_model(folder, device=checked_device_map(device_map), dtype=checked_dtype(dtype))
        as_one_dtype_(model)
        config = config or LongLLaVAConfig(**asdict(model.config))
        for name, number in token_ids(folder, model.config).items():  # a name of the hub had none of its files yet
            setattr(config, name, number)
        made = cls(config, model)
        made.name_or_path = config.name_or_path = str(pretrained_model_name_or_path)
        made.generation_config = generation_of(folder, config, made.generation_config)
        if adapter is not None and not is_adapter(folder):  # a folder that holds both is read as what they make
            made.load_adapter(str(adapter))
        return made.eval()

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *arguments: Any, **named: Any) -> None:
        """As transformers saves, which of earlier weights leaves the index, or the one file, and int8's list."""
        super().save_pretrained(save_directory, is_main_process, *arguments, **named)
        folder = Path(save_directory)
        if is_main_process and not is_adapter(folder):
            remove_stale(folder, [path.name for path in folder.glob(SHARDS)] or [WEIGHTS])
            if self.config.int8 is not None:
                write_manifest(folder)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LongLLaVACache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        tokens_per_image: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: LongLLaVACache | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """attention_mask (B, S): 0 is padding, on either side. pixel_values (N, 3, P, P): of all rows in
        order, uint8 as the processor gives them. labels (B, L): the ids themselves where they are learned, -100
        elsewhere; the loss is the mean over them, or their sum over num_items_in_batch. While training, labels are
        answered without logits: all of 40,960 tokens would be 10.7 GB. cache: newer transformers' past_key_values.
        Raises: InputError when pictures and their places disagree, or labels and tokens.
        """
        if output_attentions or output_hidden_states:
            raise InputError("output_attentions, output_hidden_states: this model gives logits and its cache only")
        if (input_ids is None) == (inputs_embeds is None) or input_ids is None and pixel_values is not None:
            raise InputError("forward: give input_ids, with pixel_values or without, or inputs_embeds alone")
        given = past_key_values if cache is None else cache
        if input_ids is not None:
            past = given.n_tokens if isinstance(given, LongLLaVACache) else 0
            inputs_embeds = self.embedded(input_ids, attention_mask, past, pixel_values, tokens_per_image)
        assert inputs_embeds is not None
        if labels is not None and labels.shape != (expected := inputs_embeds.shape[:2]):
            raise InputError(f"labels: got {tuple(labels.shape)}, expected {tuple(expected)}, one for each token")
        filled = self.cache_of(given, use_cache, labels)
        keep = logits_to_keep if isinstance(logits_to_keep, int) and labels is None else 0
        hidden_BLD = self.hidden(inputs_embeds, attention_mask, filled, keep)
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
        loss = None
        if labels is not None:
            answers = answer_loss(self.backbone.logits, hidden_BLD[:, :-1], labels[:, 1:])
            loss = answers.total / (max(1, answers.n_labels) if num_items_in_batch is None else num_items_in_batch)
        logits = None if labels is not None and self.training else self.backbone.logits(hidden_BLD[:, kept])
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: filled})  # type: ignore[arg-type]
        return output if return_dict or return_dict is None else output.to_tuple()

    def cache_of(self, given: Any, use_cache: bool | None, labels: Tensor | None) -> LongLLaVACache | None:
        """The cache to read from and to fill; none where gradients flow, unless it is asked for."""
        if given is None:
            wanted = labels is None and not torch.is_grad_enabled() if use_cache is None else use_cache
            return LongLLaVACache() if wanted else None
        if not isinstance(given, LongLLaVACache):
            raise InputError(f"{CACHE}: got a {type(given).__name__}; this model's layers keep a LongLLaVACache"
                             " (leave it out, or take the one that an earlier call returned)")  # fmt: skip
        return given

    def hidden(self, x_BLD: Tensor, mask_BS: Tensor | None, cache: LongLLaVACache | None, keep: int) -> Tensor:
        """Hidden states (B, L, D), or of at least the last `keep` tokens. With a cache and no gradients in chunks."""
        batch, length, _ = x_BLD.shape
        start = cache.n_tokens if cache else 0
        ctx = context(cache.mask(length) if cache and mask_BS is None else mask_BS, start, batch, length)
        if cache is None:
            return self.backbone(x_BLD, ctx)[0]
        state = cache.state_of(batch)
        if state is None:
            room = length + min(max(0, cache.capacity - length), ANSWER_TOKENS)
            state = self.backbone.empty_state(batch, room, x_BLD.device, self.backbone.embed_tokens.weight.dtype)
        step = length if torch.is_grad_enabled() else max(1, CHUNK_TOKENS // batch)
        parts = []
        for begin in range(0, length, step):
            end = min(begin + step, length)
            seq_idx_BL = None if ctx.seq_idx_BL is None else ctx.seq_idx_BL[:, begin:end]
            positions_BL = None if ctx.positions_BL is None else ctx.positions_BL[:, begin:end]
            part = Context(seq_idx_BL, positions_BL, start + begin)
            last_only = (keep == 1 or 0 < keep <= length - end) and not torch.is_grad_enabled()
            hidden_BLD, state = self.backbone(x_BLD[:, begin:end], part, state, last_only)
            if not keep or end > length - keep:
                parts.append(hidden_BLD)
        cache.state, cache.n_tokens = state, start + length
        return torch.cat(parts, dim=1)

    def embedded(
        self, ids_BL: Tensor, mask_BS: Tensor | None, past: int, pixels_N3PP: Tensor | None, n_tokens: int | None
    ) -> Tensor:
        """Word embeddings with the pictures' tokens in their places, row by row: (B, L, D)."""
        text_BLD = self.backbone.embed_tokens(ids_BL)
        if pixels_N3PP is None or len(pixels_N3PP) == 0:
            return text_BLD
        slots_BL, _ = self.slots(ids_BL, mask_BS, past, len(pixels_N3PP), n_tokens)
        check_pixels(pixels_N3PP, self.config.encoder)
        tokens_NMD = self.image_tokens(pixels_N3PP, n_tokens)
        place_T2 = slots_BL.nonzero()
        ones_T = torch.ones_like(place_T2[:, 0])
        # every token of a picture is placed as a picture of one token
        spans_T4 = torch.stack([place_T2[:, 0], place_T2[:, 1], ones_T, ones_T.cumsum(0) - 1], dim=1)
        return self.fusion.embed(text_BLD, spans_T4, tokens_NMD.flatten(0, 1)[:, None])

    def slots(
        self, ids_BL: Tensor, mask_BS: Tensor | None, past: int, n_images: int, n_tokens: int | None
    ) -> tuple[Tensor, list[int]]:
        """Where pictures' tokens stand (B, L), and how many pictures each row has."""
        if self.bridge is None or self.config.pad_token_id is None:
            raise InputError("pixel_values: " + ("this model reads text only" if self.bridge is None else
                             "config.pad_token_id says where pictures stand, and is not set"))  # fmt: skip
        slots_BL = ids_BL == self.config.pad_token_id
        if mask_BS is not None:
            slots_BL = slots_BL & (mask_BS[:, past : past + ids_BL.shape[1]] != 0)
        n_each = n_tokens or self.config.bridge["tokens_per_image"]
        n_slots_B = slots_BL.sum(1)
        if int(n_slots_B.sum()) != n_images * n_each or bool((n_slots_B % n_each).any()):
            raise InputError(
                f"pixel_values: {n_images} pictures are {n_images} x {n_each} tokens, but the rows of input_ids have"
                f" room for {n_slots_B.tolist()}; give input_ids, attention_mask and pixel_values of one processor call"
            )
        return slots_BL, (n_slots_B // n_each).tolist()

    def image_tokens(self, pixels_N3PP: Tensor, n_tokens: int | None) -> Tensor:
        """(N, M, D), a batch of pictures at a time."""
        assert self.encoder is not None and self.bridge is not None
        n_each = n_tokens or self.config.bridge["tokens_per_image"]
        batch = max(1, min(MAX_BATCH, PIXELS_PER_BATCH // pixels_N3PP.shape[-1] ** 2))
        tokens = []
        for pixels in pixels_N3PP.split(batch):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_trains()):
                features_NMC = pool_features(self.encoder(pixels), n_each, self.config.bridge["pool"])
            tokens.append(self.bridge(features_NMC.to(self.backbone.embed_tokens.weight.dtype), n_each))
        return torch.cat(tokens)

    def encoder_trains(self) -> bool:
        return self.encoder is not None and any(part.requires_grad for part in self.encoder.parameters())

    def train(self, mode: bool = True) -> LongLLaVAForConditionalGeneration:
        """A frozen encoder stays as it is: its batch norms would learn."""
        super().train(mode)
        if self.encoder is not None and not self.encoder_trains():
            self.encoder.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.embed_tokens

    def get_output_embeddings(self) -> nn.Module | None:
        return self.backbone.lm_head

    def resize_token_embeddings(self, *arguments: Any, **named: Any) -> Any:
        raise InputError("resize_token_embeddings: vocab_size is in the model's config; make a model with another one")
