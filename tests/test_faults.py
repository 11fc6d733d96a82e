"""What was wrong in the original (FreedomIntelligence/LongLLaVA @f349366), fault by fault, and the tests that would
fail on it here. Those that no other file holds are below."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import longllava
from longllava.api import LongLLaVA
from longllava.checkpoints import load_model
from longllava.errors import InputError
from tests.checkpoints import published
from tests.tiny import tiny_model, tiny_pictures

TESTS = Path(__file__).parent
ROOT = TESTS.parent
MODEL = tiny_model()
SOURCES = [*ROOT.glob("longllava/**/*.py"), *ROOT.glob("benchmarks/*.py")]

FAULTS = {
    "a chatbot that cannot be made from its folder": ["test_api.py::test_a_saved_model_answers_the_same"],
    "a picture is ignored when the question has no <image>": [
        "inputs/test_formats.py::test_one_question", "test_api.py::test_places_of_images_matter",
    ],
    "turns are not kept; a later picture takes the first one's place; a follow-up without a picture loses all": [
        "test_faults.py::test_later_turns_see_all_pictures_at_their_places",
        "generation/test_session.py::test_kept_turns_are_the_conversation",
        "test_cli.py::test_chat_keeps_history_and_survives_a_wrong_path",
    ],
    "the name of a folder chooses the model's class; 8 bits and a GPU whatever is asked": [
        "test_faults.py::test_the_name_of_a_folder_decides_nothing", "test_api.py::test_dtypes",
    ],
    "training chooses the model by its path, and stage 3 finds none": [
        "test_faults.py::test_no_code_asks_for_a_models_name",
        "train/test_curriculum_smoke.py::test_three_stages_of_nano",
    ],
    "scripts import modules that do not exist": ["test_faults.py::test_every_module_can_be_imported"],
    "paths of one machine in the code": ["test_faults.py::test_no_path_of_a_machine_is_in_the_code"],
    "an answer is judged by its first letter": [
        "evals/test_curriculum.py::test_an_answer_is_right_when_each_of_its_tokens_is",
        "evals/test_curriculum.py::test_an_answer_that_does_not_end_is_not_right",
        "evals/test_vniah.py::test_forced_and_generated_are_told_apart",
    ],
    "a kind of question with no right answer leaves the mean": [
        "evals/test_curriculum.py::test_an_answer_is_right_when_each_of_its_tokens_is",
        "evals/test_vniah.py::test_files_have_longvas_format",
    ],
    "padding reaches the state of the Mamba layers": ["nn/test_backbone.py::test_a_padded_batch_equals_each_row_alone"],
    "several tokens at once begin a new state": [
        "nn/test_backbone.py::test_a_sequence_cut_anywhere_gives_the_same_hidden_states_and_state",
        "generation/test_session.py::test_any_chunking_is_the_whole",
    ],
    "without the GPU kernels a state of every token is held": [
        "test_faults.py::test_the_scan_holds_no_state_of_each_token",
    ],
    "logits of a whole prompt in fp32": ["train/test_loss.py::test_no_more_logits_than_a_chunk_exist_at_once"],
    "no package, no licence, requirements that do not fit": [
        "test_house.py::test_the_tested_set_covers_every_requirement",
        "test_house.py::test_an_installed_wheel_works_outside_the_clone",
    ],
    "too few pictures drop their marks; the count of pictures runs on over the rows of a batch": [
        "test_faults.py::test_marks_and_pictures_are_counted_row_by_row",
        "inputs/test_processor.py::test_marks_must_equal_images",
        "generation/test_batch.py::test_a_batch_is_its_prompts",
        "data/test_packing.py::test_a_batch_holds_each_item_at_its_place",
    ],
    "what is too long is cut without a word": [
        "test_faults.py::test_nothing_of_a_long_prompt_is_cut",
        "data/test_packing.py::test_windows_use_every_sample_once_and_cut_none",
    ],
    "one bad picture's record ends training": ["data/test_sources.py::test_bad_lines_are_listed_with_their_place"],
    "a person's text is split at <image>": [
        "inputs/test_processor.py::test_messages_with_parts", "test_api.py::test_marks_in_messages_are_text",
    ],
    "a video that cannot be read is no frames": ["inputs/test_video_file.py::test_torn_video_is_one_sentence"],
    "all frames are decoded before some are taken": [
        "inputs/test_video_file.py::test_few_frames_are_decoded_and_none_is_read_twice",
    ],
    "code from a checkpoint is run, and pickles are opened": [
        "test_faults.py::test_code_beside_a_checkpoint_is_not_run", "test_faults.py::test_nothing_trusts_what_it_loads",
        "checkpoints/test_load.py::test_pickles_are_refused_unopened",
    ],
    "kernels count in 32 bits": [
        "ops/test_selective_scan.py::test_offsets_beyond_32_bits",
        "ops/test_causal_conv1d.py::test_offsets_beyond_32_bits",
    ],
    "the config forgets how pictures were pooled": [
        "checkpoints/test_save.py::test_round_trip",
        "checkpoints/test_layouts.py::test_pooling_as_the_original_reads_it",
    ],
    "packing drops rows and texts, and samples of a row see each other": [
        "data/test_packing.py::test_windows_use_every_sample_once_and_cut_none",
        "nn/test_backbone.py::test_packed_samples_equal_each_alone_gradients_included",
    ],
    "a picture's last tiles are a pixel short; a second picture's tiles go into the first": [
        "inputs/test_tiles.py::test_tiles_are_the_picture_centred_on_white",
        "inputs/test_formats.py::test_one_question",
    ],
    "what is read and what is learned are two strings": [
        "inputs/test_formats.py::test_several_turns_and_what_is_learned",
    ],
    "dense_downcycling.py means all experts and takes the first": [
        "checkpoints/test_downcycle.py::test_an_expert_and_the_mean",
        "checkpoints/test_downcycle.py::test_downcycling_as_the_original_script",
    ],
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_its_test(fault):
    for place in FAULTS[fault]:
        file, name = place.split("::")
        tree = ast.parse((TESTS / file).read_text("utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, place


def test_later_turns_see_all_pictures_at_their_places(monkeypatch):
    """Three turns: one picture, another, none. The original gave the second turn the first one's picture."""
    first, second = tiny_pictures(2)
    talk = [
        {"role": "user", "content": [{"type": "image", "image": first}, {"type": "text", "text": "what is this?"}]},
        {"role": "assistant", "content": "a red heart"},
        {"role": "user", "content": [{"type": "text", "text": "is "}, {"type": "image", "image": second}]},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "what?"},
    ]
    for n_turns, seen in ((1, [first]), (3, [first, second]), (5, [first, second])):
        pieces, sources = MODEL.pieces(talk[:n_turns], None, None, MODEL.fresh())
        encoded = MODEL.processor.encode_pieces(pieces)
        assert [sources[span.image] for span in encoded.spans] == seen
        turn_starts = [at for at, number in enumerate(encoded.ids) if number == MODEL.tokenizer.bos_id]
        assert len(turn_starts) == n_turns + 1
        assert turn_starts[0] < encoded.spans[0].start < turn_starts[1]
        assert n_turns == 1 or turn_starts[2] < encoded.spans[1].start < turn_starts[3]
        text = MODEL.tokenizer.decode(encoded.ids)
        assert ["a red heart" in text, text.count("what") == 2] == [n_turns > 1, n_turns == 5]


def test_the_name_of_a_folder_decides_nothing(tmp_path):
    published.longllava(tmp_path / "a", 4)
    expected = load_model(tmp_path / "a").state_dict()
    for name in ("MultiImageSFT", "longllava-8bit", "zamba", "Qwen2-VL"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
        model = load_model(tmp_path / name)
        assert model.config.backbone.n_experts == 4
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_no_code_asks_for_a_models_name():
    """No `"jamba" in path.lower()`: nowhere is a family's name looked for in a string."""
    families = re.compile(r"jamba|longllava|zamba|llama|qwen|nano|clip", re.IGNORECASE)
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
                word, inside = node.left, node.comparators[0]
                if isinstance(word, ast.Constant) and families.search(str(word.value)):
                    names = {part.id for part in ast.walk(inside) if isinstance(part, ast.Name)}
                    found += [f"{path.name}:{node.lineno}"] if names & {"name", "path", "folder", "model"} else []
    assert found == []


def test_every_module_can_be_imported():
    for module in pkgutil.walk_packages(longllava.__path__, "longllava."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError as missing:  # an optional package, never a part of this one
                assert not (missing.name or "").startswith("longllava"), module.name


def test_no_path_of_a_machine_is_in_the_code():
    """Absolute paths, and those below a home or a working folder; Linux's own /proc, /dev and /sys are no machine's."""
    files = [*SOURCES, *ROOT.glob("configs/**/*.yaml"), *ROOT.glob("data_recipes/**/*.yaml")]
    pattern = re.compile(r"""["'\s](?:/(?!proc/|dev/|sys/)[\w.-]+/[\w.-]|\./[\w-]+/|~/)[^"'\s]*""")
    found = {}
    for path in files:
        if path.suffix == ".py":
            tree = ast.parse(path.read_text("utf-8"))
            texts = [f'"{node.value}' for node in ast.walk(tree) if isinstance(node, ast.Constant)
                     and isinstance(node.value, str) and "\n" not in node.value and " " not in node.value]  # fmt: skip
        else:
            texts = path.read_text("utf-8").splitlines()
        if hits := [text for text in texts if pattern.search(text)]:
            found[path.name] = hits
    assert found == {}


PEAK = """
import sys, torch
from longllava.ops.selective_scan import selective_scan
def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))
L, E, N = 2048, 512, 16
def run(length):
    u = torch.randn(1, length, E)
    return selective_scan(u, u, -torch.rand(E, N), u[..., :N], u[..., N:2 * N], torch.ones(E), u, backend=sys.argv[1])
with torch.inference_mode():
    run(64)
    before = status("VmRSS:")
    open("/proc/self/clear_refs", "w").write("5")
    run(L)
print((status("VmHWM:") - before) / (4 * L * E * N))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_scan_holds_no_state_of_each_token(backend):
    """2,048 tokens of 512 channels and 16 states: one copy of all states would be 67 MB; the original holds three."""
    done = subprocess.run([sys.executable, "-c", PEAK, backend], capture_output=True, text=True)
    if backend == "cpu" and "BackendError" in done.stderr:
        pytest.skip("no C++ kernels here")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.9


@pytest.mark.parametrize("counts", [((2, 1), (1, 2)), ((0, 1), (2, 1)), ((1, 1), (1, 0), (1, 2)), ((3, 2), (2, 3))])
def test_marks_and_pictures_are_counted_row_by_row(counts):
    """(marks, pictures) of each prompt; over the batch both sum to the same. A row without marks takes its pictures."""
    prompts = ["a" + "<image>" * marks for marks, _ in counts]
    pictures = [tiny_pictures(n) for _, n in counts]
    number, (marks, n) = next((k, row) for k, row in enumerate(counts, 1) if row[0] not in (0, row[1]))
    words = f"prompt {number} of {len(counts)}: the text has {marks} <image> marks?, but the number of .* is {n};"
    with pytest.raises(InputError, match=words):
        MODEL.generate_batch(prompts, pictures)


def test_nothing_of_a_long_prompt_is_cut():
    """44,000 tokens, more than any length that the original allows."""
    text = "a red heart of what " * 11_000
    pieces, _ = MODEL.pieces(text, None, None, MODEL.fresh())
    ids = MODEL.processor.encode_pieces(pieces).ids
    assert len(ids) > 40_960 and text.strip() in MODEL.tokenizer.decode(ids)


def test_code_beside_a_checkpoint_is_not_run(tmp_path):
    published.jamba(tmp_path, 1)
    marker = tmp_path / "marker"
    for name in ("modeling_jamba", "configuration_jamba", "tokenization"):
        (tmp_path / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\nclass A: pass\n")
    MODEL.tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_jamba.A", "AutoModelForCausalLM": "modeling_jamba.A"}
    config |= {"vocab_size": 60, "trust_remote_code": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_model(tmp_path)
    with pytest.raises(InputError, match="they do not belong together"):
        LongLLaVA.from_pretrained(tmp_path, device="cpu")
    assert not marker.exists()


def test_nothing_trusts_what_it_loads():
    """Every torch.load says weights_only=True; trust_remote_code is never set, pickle never read, eval never called."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            bad = given.get("trust_remote_code", "False") != "False"
            bad |= name == "torch.load" and given.get("weights_only") != "True"
            bad |= name in ("eval", "exec", "pickle.load", "pickle.loads", "joblib.load")
            bad |= name.endswith("load") and given.get("allow_pickle", "False") != "False"
            found += [f"{path.relative_to(ROOT)}:{node.lineno} {name}"] if bad else []
    assert found == []
