"""Names of parameters in the checkpoints of others: tables of their names and ours.

One table serves both ways. Read: every parameter we want says under which names it lies there. Written: every
parameter says what it is to be called. {i} is a layer, {j} an expert, {w} weight or bias, {root} what stands
before all names of a part. A row with several names joins several tensors.

Sources: LongLLaVA's modeling_jamba.py @f349366; transformers 5.23 (models jamba, llava, clip, siglip); open_clip
3.3 (transformer.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

CONVOLUTION = "mixer.conv_weight_EK"  # theirs is a Conv1d's, with an axis of size 1 in the middle
HOLES = {"i": r"(?P<i>\d{1,4})", "j": r"(?P<j>\d{1,4})", "w": r"(?P<w>weight|bias)"}

MIXERS = {
    "{root}embed_tokens.weight": "embed_tokens.weight",
    "{root}final_layernorm.weight": "final_norm.weight",
    "{root}layers.{i}.input_layernorm.weight": "layers.{i}.mixer_norm.weight",
    "{root}layers.{i}.self_attn.q_proj.weight": "layers.{i}.mixer.q_proj.weight",
    "{root}layers.{i}.self_attn.k_proj.weight": "layers.{i}.mixer.k_proj.weight",
    "{root}layers.{i}.self_attn.v_proj.weight": "layers.{i}.mixer.v_proj.weight",
    "{root}layers.{i}.self_attn.o_proj.weight": "layers.{i}.mixer.o_proj.weight",
    "{root}layers.{i}.mamba.in_proj.{w}": "layers.{i}.mixer.in_proj.{w}",
    "{root}layers.{i}.mamba.x_proj.weight": "layers.{i}.mixer.x_proj.weight",
    "{root}layers.{i}.mamba.out_proj.{w}": "layers.{i}.mixer.out_proj.{w}",
    "{root}layers.{i}.mamba.conv1d.weight": "layers.{i}.mixer.conv_weight_EK",
    "{root}layers.{i}.mamba.conv1d.bias": "layers.{i}.mixer.conv_bias_E",
    "{root}layers.{i}.mamba.dt_proj.weight": "layers.{i}.mixer.dt_proj.weight",
    "{root}layers.{i}.mamba.dt_proj.bias": "layers.{i}.mixer.dt_bias_E",
    "{root}layers.{i}.mamba.dt_layernorm.weight": "layers.{i}.mixer.dt_norm.weight",
    "{root}layers.{i}.mamba.A_log": "layers.{i}.mixer.A_log_EN",
    "{root}layers.{i}.mamba.D": "layers.{i}.mixer.D_E",
}
# LongLLaVA's own: every layer's MLP is a mixture, a plain one has one expert and no router
LONGLLAVA_ONLY = {
    "{root}layers.{i}.mamba.B_layernorm.weight": "layers.{i}.mixer.B_norm.weight",
    "{root}layers.{i}.mamba.C_layernorm.weight": "layers.{i}.mixer.C_norm.weight",
    "{root}layers.{i}.pre_moe_layernorm.weight": "layers.{i}.ffn_norm.weight",
    "{root}layers.{i}.moe.router.weight": "layers.{i}.ffn.router.weight",
}
LONGLLAVA_ONLY |= {
    f"{{root}}layers.{{i}}.moe.experts.{j}.{kind}_proj.weight": f"layers.{{i}}.ffn{ours}.{kind}_proj.weight"
    for kind in ("gate", "up", "down")
    for j, ours in (("{j}", ".experts.{j}"), ("0", ""))
}
JAMBA_ONLY = {
    "{root}layers.{i}.mamba.b_layernorm.weight": "layers.{i}.mixer.B_norm.weight",
    "{root}layers.{i}.mamba.c_layernorm.weight": "layers.{i}.mixer.C_norm.weight",
    "{root}layers.{i}.pre_ff_layernorm.weight": "layers.{i}.ffn_norm.weight",
    "{root}layers.{i}.feed_forward.router.weight": "layers.{i}.ffn.router.weight",
}
JAMBA_ONLY |= {
    f"{{root}}layers.{{i}}.feed_forward{j}.{kind}_proj.weight": f"layers.{{i}}.ffn{j}.{kind}_proj.weight"
    for kind in ("gate", "up", "down")
    for j in ("", ".experts.{j}")
}
VISION = {
    "{root}embeddings.class_embedding": "class_embedding",
    "{root}embeddings.patch_embedding.{w}": "patches.{w}",
    "{root}embeddings.position_embedding.weight": "position_embedding",
    "{root}pre_layrnorm.{w}": "pre_norm.{w}",
    "{root}encoder.layers.{i}.layer_norm1.{w}": "layers.{i}.attention_norm.{w}",
    "{root}encoder.layers.{i}.self_attn.q_proj.{w} + {root}encoder.layers.{i}.self_attn.k_proj.{w}"
    " + {root}encoder.layers.{i}.self_attn.v_proj.{w}": "layers.{i}.qkv.{w}",
    "{root}encoder.layers.{i}.self_attn.out_proj.{w}": "layers.{i}.out.{w}",
    "{root}encoder.layers.{i}.layer_norm2.{w}": "layers.{i}.mlp_norm.{w}",
    "{root}encoder.layers.{i}.mlp.fc1.{w}": "layers.{i}.up.{w}",
    "{root}encoder.layers.{i}.mlp.fc2.{w}": "layers.{i}.down.{w}",
}
OPEN_CLIP = {
    "{root}class_embedding": "class_embedding",
    "{root}conv1.weight": "patches.weight",
    "{root}positional_embedding": "position_embedding",
    "{root}ln_pre.{w}": "pre_norm.{w}",
    "{root}transformer.resblocks.{i}.ln_1.{w}": "layers.{i}.attention_norm.{w}",
    "{root}transformer.resblocks.{i}.attn.in_proj_{w}": "layers.{i}.qkv.{w}",
    "{root}transformer.resblocks.{i}.attn.out_proj.{w}": "layers.{i}.out.{w}",
    "{root}transformer.resblocks.{i}.ln_2.{w}": "layers.{i}.mlp_norm.{w}",
    "{root}transformer.resblocks.{i}.mlp.c_fc.{w}": "layers.{i}.up.{w}",
    "{root}transformer.resblocks.{i}.mlp.c_proj.{w}": "layers.{i}.down.{w}",
}


@dataclass(frozen=True)
class Source:
    """Where one of our parameters lies: names and shapes there. Stacked along their rows and reshaped they are ours."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Naming:
    """How one part (encoder, bridge, backbone) is named. unused: names beside the table's that we have no use for."""

    part: str
    table: Mapping[str, str]
    root: str = ""
    unused: tuple[str, ...] = ()

    @cached_property
    def rows(self) -> list[tuple[re.Pattern, tuple[str, ...]]]:
        """(pattern of our name, their names)."""
        return [
            (pattern(f"{self.part}.{ours}"), tuple(theirs.replace("{root}", self.root).split(" + ")))
            for theirs, ours in self.table.items()
        ]

    @cached_property
    def useless(self) -> list[re.Pattern]:
        known = [name for _, names in self.rows for name in names] if self.part == "encoder" else []
        return [*map(pattern, known), *(re.compile(re.escape(self.root) + name) for name in self.unused)]

    def has_no_use_for(self, name: str, n_layers: int) -> bool:
        """Vision towers carry layers after the one selected, a last norm and a pooling head: we build none of them.

        n_layers: of the whole tower. One that it has not got is another tower's, and select_layer counts from the end.
        """
        matches = filter(None, (known.fullmatch(name) for known in self.useless))
        return any(int(match.groupdict().get("i", 0)) < n_layers for match in matches)

    def source(self, key: str, shape: tuple[int, ...]) -> Source | None:
        """Of one of our parameters; None when this naming has no name for it."""
        for ours, theirs in self.rows:
            if match := ours.fullmatch(key):
                names = tuple(name.format(**match.groupdict()) for name in theirs)
                if key.endswith(CONVOLUTION):
                    return Source(names, ((shape[0], 1, shape[1]),))
                return Source(names, ((shape[0] // len(names), *shape[1:]),) * len(names))
        return None


def pattern(name: str) -> re.Pattern:
    """A name with holes as a pattern; a hole named twice must be filled alike."""
    parts = re.split(r"\{([ijw])\}", name)
    seen: set[str] = set()
    text = ""
    for k, part in enumerate(parts):
        if k % 2 == 0:
            text += re.escape(part)
        else:
            text += f"(?P={part})" if part in seen else HOLES[part]
            seen.add(part)
    return re.compile(text)


def backbone(only: Mapping[str, str], root: str, head: str) -> Naming:
    return Naming("backbone", {**MIXERS, **only, head: "lm_head.weight"}, root)


def bridge(up: str, down: str) -> Naming:
    return Naming("bridge", {f"{up}.{{w}}": "up.{w}", f"{down}.{{w}}": "down.{w}"})


def vision(root: str) -> Naming:
    return Naming("encoder", VISION, root, (r"post_layernorm\..*", r"head\..*", r"embeddings\.position_ids"))


# How whole checkpoints are written. The names of the schemes are what `longllava convert --to` takes.
SCHEMES: dict[str, tuple[Naming, ...]] = {
    "longllava": (
        backbone(LONGLLAVA_ONLY, "model.", "lm_head.weight"),
        bridge("model.mm_projector.0", "model.mm_projector.2"),
        vision("model.vision_tower.vision_tower.vision_model."),
    ),
    "jamba": (backbone(JAMBA_ONLY, "model.", "lm_head.weight"),),
    "llava": (
        backbone(JAMBA_ONLY, "language_model.model.", "language_model.lm_head.weight"),
        bridge("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
        vision("vision_tower.vision_model."),
    ),
}
# What is read besides: the same tables behind other roots. transformers 5 leaves "vision_model." out, its modules
# call Llava's parts model.*; a vision tower alone has its own roots.
OTHERS = (
    backbone(JAMBA_ONLY, "model.language_model.", "lm_head.weight"),
    bridge("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
    bridge("mm_projector.0", "mm_projector.2"),
    *(vision(root) for root in ("vision_model.", "vision_tower.", "model.vision_tower.", "",
                                "model.vision_tower.vision_model.", "model.vision_tower.vision_tower.")),
    *(Naming("encoder", OPEN_CLIP, root, (r"ln_post\..*", "proj")) for root in ("visual.", "")),
)  # fmt: skip


def recognise(part: str, wanted: Mapping[str, tuple[int, ...]], stored: Iterable[str]) -> Naming | None:
    """The naming that finds most of the wanted parameters of a part among the stored names; None: they are ours."""
    stored = set(stored)
    candidates = [naming for naming in (*(n for names in SCHEMES.values() for n in names), *OTHERS)
                  if naming.part == part]  # fmt: skip

    def found(naming: Naming) -> int:
        sources = [naming.source(key, shape) for key, shape in wanted.items()]
        return sum(all(name in stored for name in source.names) for source in sources if source)

    best = max(candidates, key=found)
    return best if found(best) > sum(key in stored for key in wanted) else None
