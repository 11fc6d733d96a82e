"""What int8 costs in accuracy: layer by layer, and in the logits, against fp32, beside bf16.

    python benchmarks/int8_quality.py --save benchmarks/results/int8_quality-cpu.json

Models: nano on pictures of the built-in world; random ones (std 1/sqrt(width)), dense and with experts; and random ones
with outlier channels, in two ways. "outliers F": one hidden channel of every MLP and one output channel of every layer
are F times the others, as Jamba's activations are, which reach 4e6. "hidden gains F": one channel of every norm and MLP
is F times the others and the weights that read it F times smaller, so that in floats nothing changes; the hardest case
for a scale per token, whose other values are then below half a step.

Per layer: signal to noise (dB) of its output on the inputs that it has in the fp32 model; "int8" is what a layer gets
without a word (out_proj and down_proj rotated). Per model: mean KL divergence
of its next-token distribution from fp32's, how often both have the same likeliest token, signal to noise of the logits.
"""

import _environment  # noqa: F401

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _options import check_target
from torch import Tensor, nn

from longllava import LongLLaVA
from longllava.checkpoints.load import FP32_NAMES
from longllava.cli import run
from longllava.config import BackboneConfig, Int8Config, ModelConfig
from longllava.files import write_atomic, write_json
from longllava.model import Model
from longllava.nn import Context
from longllava.nn.attention import Attention
from longllava.nn.mlp import SwiGLU
from longllava.ops.int8_linear import quantize_weight
from longllava.quant import Inputs, Int8Linear, float_places, quantize_

FORMS: dict[str, Int8Config | None] = {
    "bf16": None,
    "int8": Int8Config(),
    "int8, nothing rotated": Int8Config(rotated=()),
    "int8, all rotated": Int8Config(rotated=("layers",)),
    "int8, inputs of out_proj and down_proj in two terms": Int8Config(two_terms=("out_proj", "down_proj")),
    "int8, all inputs in two terms": Int8Config(two_terms=("layers",)),
    "int8 weights only": Int8Config(weight_only=("layers",)),
}
WAYS = {
    "int8": Inputs(1),
    "not rotated": Inputs(1),
    "rotated": Inputs(1, rotated=True),
    "two terms": Inputs(1, two_terms=True),
    "weights only": Inputs(2**31),
}
WIDTH, LENGTH, ROWS = 256, 256, 4
BAR = 35.0  # dB, per layer
Feed = Callable[[Model], Any]


def random_model(n_experts: int) -> Model:
    backbone = BackboneConfig(
        vocab_size=2000, width=WIDTH, n_layers=8, attention_every=8, attention_at=4, n_heads=4, n_kv_heads=2,
        head_dim=WIDTH // 4, mlp_width=2 * WIDTH, n_experts=n_experts, dt_rank=WIDTH // 16, init_std=WIDTH**-0.5,
        embedding_std=1.0,
    )  # fmt: skip
    model = Model(ModelConfig(name="random", encoder=None, bridge=None, backbone=backbone))
    model.initialise_(0)
    return model.eval()


@torch.no_grad()
def with_outliers(model: Model, factor: float) -> Model:
    """One hidden channel of each MLP, and one output of each layer, are `factor` times the others."""
    for number, block in enumerate(model.backbone.blocks()):
        mixer_out = block.mixer.o_proj if isinstance(block.mixer, Attention) else block.mixer.out_proj
        mixer_out.weight[7 + number] *= factor
        for mlp in (module for module in block.ffn.modules() if isinstance(module, SwiGLU)):
            mlp.up_proj.weight[11] *= factor
    return model


@torch.no_grad()
def with_hidden_gains(model: Model, factor: float) -> Model:
    """The same function: gains of norms and of hidden channels, taken back where they are read."""
    for block in model.backbone.blocks():
        mlps = [module for module in block.ffn.modules() if isinstance(module, SwiGLU)]
        names = ("q_proj", "k_proj", "v_proj") if isinstance(block.mixer, Attention) else ("in_proj",)
        block.mixer_norm.weight[5] *= factor
        block.ffn_norm.weight[5] *= factor
        routers = [block.ffn.router] if hasattr(block.ffn, "router") else []
        ups = [linear for mlp in mlps for linear in (mlp.gate_proj, mlp.up_proj)]
        for linear in (*(getattr(block.mixer, name) for name in names), *routers, *ups):
            linear.weight[:, 5] /= factor
        for mlp in mlps:
            mlp.up_proj.weight[11] *= factor
            mlp.down_proj.weight[:, 11] /= factor
    return model


def random_tokens(model: Model) -> Any:
    ids_BL = torch.randint(3, 2000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return model(model.embed(ids_BL), Context())


def cases(n_pictures: int) -> dict[str, tuple[Model, Feed]]:
    nano = LongLLaVA.from_pretrained("nano", device="cpu", dtype="float32")
    found: dict[str, tuple[Model, Feed]] = {"nano": (nano.model, pictures_feed(nano, n_pictures))}
    for words, n_experts in (("random, dense", 1), ("random, 4 experts", 4)):
        found[words] = (random_model(n_experts), random_tokens)
    for factor in (4e3, 1e4):
        found[f"outliers {factor:.0e}"] = (with_outliers(random_model(1), factor), random_tokens)
        found[f"hidden gains {factor:.0e}"] = (with_hidden_gains(random_model(1), factor), random_tokens)
    return found


def pictures_feed(nano: LongLLaVA, n_pictures: int) -> Feed:
    """V-NIAH's pictures, then a question and its answer, teacher-forced."""
    from longllava.evals.vniah_task import Settings, draw_haystack, draw_needles

    settings = Settings(images=(n_pictures,), n_needles=4)
    needles = draw_needles(settings)
    pictures = [*draw_haystack(settings, n_pictures), *(needle.picture for needle in needles)]
    features = nano.encode(pictures)

    def feed(model: Model) -> None:
        session = LongLLaVA(model, nano.tokenizer).session(images=[one.to(dtype_of(model)) for one in features])
        for needle in needles:
            session.score(needle.question, needle.answer)

    return feed


def dtype_of(model: Model) -> torch.dtype:
    return model.backbone.embed_tokens.weight.dtype


@contextmanager
def every_token(model: Model) -> Iterator[list[Tensor]]:
    """Prompts are read to the end of the last layer for every token, not the last alone: logits (T, V) of each call."""
    found: list[Tensor] = []
    backbone = model.backbone
    forward = backbone.forward

    def whole(x_BLD: Tensor, ctx: Context, state: Any = None, last_only: bool = False) -> tuple[Tensor, Any]:
        hidden_BLD, state = forward(x_BLD, ctx, state)
        found.append(model.logits(hidden_BLD).float().flatten(0, -2))
        return hidden_BLD[:, -1:] if last_only else hidden_BLD, state

    backbone.forward = whole  # type: ignore[method-assign]
    try:
        with torch.inference_mode():
            yield found
    finally:
        del backbone.forward


def logits_of(model: Model, feed: Feed) -> Tensor:
    with every_token(model) as found:
        feed(model)
    return torch.cat(found)


def decibels(truth: Tensor, got: Tensor) -> float:
    noise = float((truth.double() - got.double()).square().sum())
    return 10 * math.log10(float(truth.double().square().sum()) / noise) if noise else 200.0


def layers_of(model: Model, feed: Feed) -> list[dict[str, Any]]:
    """Signal to noise of each layer that int8 replaces, on its own inputs, in each way."""
    places = float_places(quantize_(copy.deepcopy(model)))
    names = {key.removesuffix(".weight"): place.rotated for key, place in places.items()}
    rows: dict[str, dict[str, Any]] = {}

    def hook_of(name: str, linear: nn.Linear) -> Callable[..., None]:
        layers = {}
        for way, inputs in (WAYS | {"int8": Inputs(1, rotated=names[name])}).items():
            layer = Int8Linear(linear.in_features, linear.out_features, linear.bias, linear.weight.device, inputs)
            values, scale = quantize_weight(linear.weight, rotated=inputs.rotated)
            layer.weight_NK.copy_(values)
            layer.scale_N.copy_(scale)
            layers[way] = layer

        def measure(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            x = args[0]
            if name in rows or x.shape[-2] < 8:  # once, on a prompt's first chunk
                return
            row: dict[str, Any] = {
                "layer": name,
                "largest_input": float(x.abs().max()),
                "absmax_over_rms": float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean()),
            }
            for way, layer in layers.items():
                row[way] = round(decibels(out, layer(x)), 2)
            rows[name] = row  # fmt: skip

        return measure

    hooks = [model.get_submodule(name).register_forward_hook(hook_of(name, model.get_submodule(name)))
             for name in names]  # fmt: skip
    try:
        with every_token(model):
            feed(model)
    finally:
        for hook in hooks:
            hook.remove()
    return [rows[name] for name in sorted(rows)]


def formed(model: Model, config: Int8Config | None) -> Model:
    """A copy in int8, or in bf16 where no config says how (what the scan is sensitive to stays fp32)."""
    model = copy.deepcopy(model)
    if config is not None:
        return quantize_(model, config)
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] not in FP32_NAMES:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def compare(truth_TV: Tensor, got_TV: Tensor) -> dict[str, float]:
    p_TV, q_TV = truth_TV.log_softmax(-1), got_TV.log_softmax(-1)
    return {
        "kl": float((p_TV.exp() * (p_TV - q_TV)).sum(-1).mean()),
        "top1": float((truth_TV.argmax(-1) == got_TV.argmax(-1)).float().mean()),
        "logits_db": round(decibels(truth_TV, got_TV), 2),
    }


def chart(report: list[dict[str, Any]], file: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 4))
    shown = report[:3]
    kinds = sorted({row["layer"].rpartition(".")[2] for case in shown for row in case["layers"]})
    for number, case in enumerate(shown):
        places = [kinds.index(row["layer"].rpartition(".")[2]) + 0.22 * (number - 1) for row in case["layers"]]
        left.plot(places, [row["int8"] for row in case["layers"]], "o", ms=4, alpha=0.6, label=case["model"])
    left.axhline(BAR, color="grey", lw=0.8, ls="--")
    left.set_xticks(range(len(kinds)), kinds, rotation=30)
    left.set_ylabel("signal to noise of a layer's output, dB")
    left.set_title("int8 weights and inputs, each layer alone", fontsize=10)
    left.legend(fontsize=8)
    forms = list(FORMS)
    for number, form in enumerate(forms):
        values = [max(case["forms"][form]["kl"], 1e-9) for case in report]
        places = [place + 0.12 * (number - len(forms) // 2) for place in range(len(report))]
        right.bar(places, values, 0.11, label=form)
    right.set_yscale("log")
    right.set_xticks(range(len(report)), [case["model"] for case in report], rotation=20, fontsize=8)
    right.set_ylabel("KL divergence from fp32, nats a token")
    right.set_title("whole models", fontsize=10)
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png")


def int8_quality(
    pictures: Annotated[int, typer.Option(min=1, help="Pictures that nano looks at.")] = 60,
    save: Annotated[Path | None, typer.Option(help="JSON file; the chart lies beside it.")] = None,
) -> None:
    """Accuracy of int8 layers and models against fp32, beside bf16."""
    check_target(save)
    report: list[dict[str, Any]] = []
    for name, (model, feed) in cases(pictures).items():
        layers, truth_TV = layers_of(model, feed), logits_of(model, feed)
        forms = {form: compare(truth_TV, logits_of(formed(model, config), feed)) for form, config in FORMS.items()}
        report.append({"model": name, "positions": len(truth_TV), "forms": forms, "layers": layers})
        print(f"{name}: {len(truth_TV):,} positions, largest input of a layer"
              f" {max(row['largest_input'] for row in layers):.2g}")  # fmt: skip
        for way in WAYS:
            found = sorted(row[way] for row in layers)
            below = sum(value < BAR for value in found)
            print(f"  layers, {way:13} {found[0]:6.1f} dB at worst, {found[len(found) // 2]:6.1f} in the middle;"
                  f" {below} of {len(found)} below {BAR:.0f}")  # fmt: skip
        for form, found_form in forms.items():
            print(f"  {form:52} KL {found_form['kl']:.2e}  top-1 {100 * found_form['top1']:6.2f} %"
                  f"  logits {found_form['logits_db']:6.1f} dB", flush=True)  # fmt: skip
    if save is not None:
        from longllava.train.record import environment

        print(write_json(save, {**environment("cpu"), "bar_db": BAR, "cases": report}))
        print(write_atomic(save.with_suffix(".png"), lambda file: chart(report, file)))


if __name__ == "__main__":
    run(lambda: typer.run(int8_quality), "int8_quality")
