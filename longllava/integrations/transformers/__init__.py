"""Our models for transformers: import this once, and its Auto classes, generate and pipelines know our folders.

    import longllava.integrations.transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    processor.batch_decode(model.generate(**inputs, max_new_tokens=64), skip_special_tokens=True)

A folder is one that save_pretrained wrote, ours or transformers', or LongLLaVA's published layout (model_type
llava_jamba). Plain Jamba and stock Llava folders stay transformers' own. No code of a folder is run.
"""

from __future__ import annotations

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longllava.integrations.transformers.cache import LongLLaVACache
from longllava.integrations.transformers.configuration import LongLLaVAConfig, PublishedConfig
from longllava.integrations.transformers.modeling import LongLLaVAForConditionalGeneration
from longllava.integrations.transformers.processing import LongLLaVAProcessor
from longllava.integrations.transformers.tokenization import LongLLaVATokenizer

__all__ = [
    "LongLLaVACache",
    "LongLLaVAConfig",
    "LongLLaVAForConditionalGeneration",
    "LongLLaVAProcessor",
    "LongLLaVATokenizer",
]

for config in (LongLLaVAConfig, PublishedConfig):
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
for name in ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForMultimodalLM"):
    getattr(transformers, name).register(LongLLaVAConfig, LongLLaVAForConditionalGeneration, exist_ok=True)
# a table of names: Trainer, where it smooths labels, shifts those of these classes, and text-generation expects them
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[LongLLaVAConfig.model_type] = LongLLaVAForConditionalGeneration.__name__
transformers.AutoTokenizer.register(LongLLaVAConfig, fast_tokenizer_class=LongLLaVATokenizer, exist_ok=True)
transformers.AutoProcessor.register(LongLLaVAConfig, LongLLaVAProcessor, exist_ok=True)
