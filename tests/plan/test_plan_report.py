"""`longllava plan`: tokens as a prompt has them, bytes as weights take, and the last picture that fits."""

import json

import pytest
import torch
from typer.testing import CliRunner

from longllava.cli import app
from longllava.cli.plan import scaled
from longllava.errors import CheckpointError, ConfigError, InputError
from longllava.inputs.chat import Message, string_pieces
from longllava.inputs.processor import Processor
from longllava.plan.split import fits
from longllava.plan_report import MOST, Plan, Request
from tests.tiny import tiny_model

GB = 10**9
CARD = {"cuda:0": 80 * GB}


def plan(name="longllava-9b", free=CARD, **changes):
    return Plan(name, Request(**changes), free)


@pytest.mark.parametrize("per_image", [36, 144])
def test_tokens_are_those_of_the_prompt(per_image):
    mine = plan("nano", tokens_per_image=per_image, text_tokens=0)
    processor = Processor(mine.config, mine.tokenizer)
    for n in (1, 2, 3, 50):
        message = Message("user", tuple(string_pieces("", n, 0, processor.prompt)))
        assert mine.n_tokens(n) == len(processor.encode_messages([message], per_image, True).ids)
    assert plan("nano", text_tokens=7).n_tokens(3) == plan("nano", text_tokens=0).n_tokens(3) + 7


def test_the_9b_model_on_one_card():
    found = plan(images=1000).as_dict()
    assert found["tokens"] == {"per_image": 144, "tags_per_image": 6, "template": 12, "text": 32, "prompt": 150_044,
                               "answer": 256, "tags_are": "assumed: there is no tokenizer"}  # fmt: skip
    in_fp32 = 28 * 8192 * (16 + 2)  # A, D and the bias of delta
    assert found["bytes"]["weights"] == 2 * (9_602_579_328 + in_fp32)
    assert found["bytes"]["per_token"] == 16_384 and found["bytes"]["keys_values"] == 150_300 * 16_384
    assert found["operations"]["total"] == sum(n for name, n in found["operations"].items() if name != "total")
    (row,) = found["devices"]
    assert row["layers"] == 32 and found["fits"] and found["devices_needed"] == 1
    parts = ("weights", "keys_values", "state", "workspace", "left")
    assert sum(row[part] for part in parts) == row["free"] == 80 * GB
    assert found["bytes"]["total"] == row["free"] - row["left"]


def test_the_last_picture_that_fits():
    """78 GiB, 36 tokens: 97,000 pictures by hand, at three tokens of tags each; here at six."""
    mine = plan(free={"cuda:0": 78 << 30}, tokens_per_image=36)
    most = mine.most_images()
    assert most == pytest.approx(97_000 * 39 / 42, rel=0.02)
    assert fits(*mine.costs(most), mine.free) and not fits(*mine.costs(most + 1), mine.free)
    assert plan(free={"cuda:0": 78 << 30}, images=most, tokens_per_image=36).as_dict()["fits"]
    assert not plan(free={"cuda:0": 78 << 30}, images=most + 1, tokens_per_image=36).as_dict()["fits"]
    assert plan(free={"cuda:0": 15 * GB}).as_dict()["most_images"] is None
    in_int8 = plan(free={"cuda:0": 78 << 30}, tokens_per_image=36, int8=True, int8_cache=True).most_images()
    assert in_int8 == pytest.approx(221_000 * 39 / 42, rel=0.03)


def test_the_53b_model_takes_two_cards_or_int8():
    one, two = (plan("longllava-53b-a13b", dict.fromkeys(["cuda:0", "cuda:1"][:n], 80 * GB)).as_dict() for n in (1, 2))
    assert not one["fits"] and one["devices_needed"] == 2 and one["most_images"] is None
    assert two["fits"] and [row["layers"] for row in two["devices"]] == [16, 16]
    assert sum(row["weights"] for row in two["devices"]) == two["bytes"]["weights"] > 103 * GB
    assert sum(row["keys_values"] for row in two["devices"]) == two["bytes"]["keys_values"]
    in_int8 = plan("longllava-53b-a13b", int8=True).as_dict()
    assert in_int8["fits"] and 52 * GB < in_int8["bytes"]["weights"] < 54 * GB and in_int8["int8"]
    assert plan("longllava-53b-a13b", {"cuda:0": 3 * GB}).as_dict()["devices_needed"] is None


def test_a_model_of_text(tmp_path):
    tiny = tiny_model(encoder=None, bridge=None)
    folder = plan(str(tiny.save_pretrained(tmp_path)), images=0, text_tokens=0)  # one with a tokenizer
    assert folder.n_tokens(0) == len(tiny.session().encode(tiny.pieces("a", None, None, tiny.session())[0]).ids) - 1
    found = plan("jamba-reasoning-3b", images=0, dtype=torch.float32).as_dict()
    assert found["tokens"]["per_image"] == found["tokens"]["tags_per_image"] == 0 == found["operations"]["encoder"]
    assert found["most_images"] is None and found["bytes"]["weights"] == 4 * 3_029_337_472
    with pytest.raises(InputError, match="model 'jamba-reasoning-3b' reads text only; plan it with --images 0"):
        plan("jamba-reasoning-3b")


def test_what_cannot_be_planned():
    with pytest.raises(CheckpointError, match="longllava-8b: neither a folder here nor a known config; have .*nano"):
        plan("longllava-8b")
    with pytest.raises(InputError, match="tokens_per_image: got 100, allowed"):
        plan(tokens_per_image=100)
    with pytest.raises(InputError, match="images: got -1, expected at least 0"):
        plan(images=-1)
    with pytest.raises(InputError, match="dtype: float16 ends at 65504"):  # nor is it loaded so
        plan(int8=True, dtype=torch.float16)


@pytest.mark.parametrize("name", ["images", "text_tokens", "answer_tokens", "chunk_tokens"])
def test_absurd_counts_are_refused(name):
    with pytest.raises(InputError, match=f"^{name}: got 1,000,000,000,000,000, expected at most 4,294,967,296$"):
        Request(**{name: 10**15})
    assert getattr(Request(**{name: MOST}), name) == MOST


def test_operations_have_units_up_to_the_largest_request():
    found = [scaled(10.0**power) for power in (9, 12, 15, 18, 21, 24)]
    assert found == [f"1.00 {prefix}FLOP" for prefix in "GTPEZY"]
    most = plan(images=MOST, tokens_per_image=576).as_dict()["operations"]["total"]
    assert len(scaled(most)) < 20, scaled(most)


def call(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command():
    done = call("longllava-53b-a13b", "--memory", "80GB", "--gpus", "2", "--json", "--images", "10")
    assert done.exit_code == 0 and json.loads(done.stdout)["devices"][1]["device"] == "cuda:1"
    text = " ".join(call("longllava-9b", "--memory", "24GB", "--tokens-per-image", "576").stdout.split())
    assert "in bfloat16: 1,000 pictures in one prompt" in text and "16,384 bytes a token" in text
    assert "It does not fit on cuda:0 (24.0 GB free); 2 such devices hold it. At most" in text
    text = " ".join(call("nano", "--device", "cpu", "--int8", "--dtype", "float32").stdout.split())
    assert "nano in float32, int8 layers" in text and "counted by the tokenizer" in text and "It fits on cpu" in text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--memory", "many"), ConfigError, "--memory: got 'many'"),
        (("--memory", "8GB", "--device", "cpu"), InputError, "--device and --memory: give one of them"),
        (("--gpus", "2"), InputError, "--gpus: say with --memory how much"),
        (("--dtype", "int4"), InputError, "dtype: got 'int4'"),
    ],
)
def test_options_that_contradict(arguments, error, message):
    done = call("nano", *arguments)
    assert isinstance(done.exception, error) and message in str(done.exception)
