"""V-NIAH with a model: a shared prefix gives what a fresh prompt gives, and the command runs to its picture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from longllava.cli import evaluate
from longllava.errors import LongLLaVAError
from longllava.evals import vniah
from longllava.evals.journal import Journal
from longllava.evals.vniah_task import Settings, draw_haystack, draw_needles, position

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny():
    from longllava.api import LongLLaVA
    from longllava.model import Model
    from tests.tiny import tiny_config, tiny_tokenizer

    model = Model(tiny_config())
    model.initialise_()
    return LongLLaVA(model, tiny_tokenizer())


class Recording:
    """A session that notes the log-probabilities of what it scores."""

    def __init__(self, session, scores: list):
        self.session, self.scores = session, scores

    def fork(self):
        return Recording(self.session.fork(), self.scores)

    def score(self, question, answer):
        self.scores.append(self.session.score(question, answer).log_probabilities)
        return self.session.score(question, answer)

    def __getattr__(self, name):
        return getattr(self.session, name)


def test_a_shared_prefix_is_a_fresh_prompt(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vniah, "MAX_NEW_TOKENS", 3)
    settings = Settings(images=(9,), depths=(0.0, 0.3, 0.7, 1.0), n_needles=2)
    shared: list = []
    judged = SimpleNamespace(encode=tiny.encode, session=lambda: Recording(tiny.session(), shared))
    cells = vniah.run(judged, settings, Journal(tmp_path / "cells.jsonl", {}))
    hay, needles = draw_haystack(settings, 9), draw_needles(settings)
    for cell, scores in zip(cells, shared, strict=True):
        index, needle = position(cell.depth, 9), needles[cell.needle]
        images, question = [*hay[:index], needle.picture, *hay[index:]], needle.question
        fresh = tiny.score(question, needle.answer, images=images)
        assert scores == pytest.approx(fresh.log_probabilities, abs=1e-4)
        assert cell.teacher_forced == fresh.exact
        assert cell.said == tiny.generate(question, images=images, max_new_tokens=3)
        # bos, "<|User|>\n", and ten pictures of 4 tokens and 2 tags, the last of which waits for the question
        assert cell.tokens == 1 + len(tiny.tokenizer.encode("<|User|>\n")) + 10 * (4 + 2) - 1


def test_what_is_encoded_once_stands_for_the_picture(tiny) -> None:
    pictures = draw_haystack(Settings(), 5)
    features = tiny.encode(pictures)
    assert [tuple(feature.shape) for feature in features] == [(4, 16)] * 5
    mixed = [features[0], pictures[1], features[2], features[3], pictures[4]]
    expected = tiny.score("what", "heart", images=pictures).log_probabilities
    for images in (features, mixed):
        assert tiny.score("what", "heart", images=images).log_probabilities == pytest.approx(expected, abs=1e-5)
    swapped = tiny.score("what", "heart", images=[*features[1:], features[0]]).log_probabilities
    assert swapped != pytest.approx(expected, abs=1e-5)
    with pytest.raises(LongLLaVAError, match=r"image 2: got a tensor of torch.float32 \(3, 16\), expected floats"):
        tiny.score("what", "heart", images=[pictures[0], features[0][:3]])


def test_the_command_line_from_start_to_picture(tiny, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny.save_pretrained(tmp_path / "tiny")
    out = tmp_path / "out"
    options = {"model": str(tmp_path / "tiny"), "depths": "2", "needles": 2, "output": str(out)}
    evaluate.vniah(["3,6"], **options)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == str(out / "heatmap.png")
    assert printed.err == ""
    assert sum(" images, depth " in line for line in printed.out.splitlines()) == 8
    assert {path.name for path in out.iterdir()} == {
        "all_accuracies.json", "cells.csv", "cells.jsonl", "heatmap.png", "lock"
    }  # fmt: skip
    before = (out / "cells.csv").read_bytes()
    evaluate.vniah(["3,6"], **options)
    again = capsys.readouterr().out
    assert again.startswith(f"8 finished prompts in {out / 'cells.jsonl'}; going on from there")
    assert " images, depth " not in again
    assert (out / "cells.csv").read_bytes() == before
    kept = (out / "cells.jsonl").read_text()
    (out / "cells.jsonl").write_text(kept.replace('"device": "cpu"', '"device": "cuda"'))
    evaluate.vniah(["3,6"], **options)
    assert capsys.readouterr().out.startswith("starting anew: device was 'cuda', is 'cpu'; the finished part is kept")


def test_two_evaluations_do_not_write_one_journal(tiny, tmp_path: Path) -> None:
    """With other options the second would take the first one's answers for its own."""
    pytest.importorskip("fcntl")
    tiny.save_pretrained(tmp_path / "tiny")
    out = tmp_path / "out"
    code = f"""
from pathlib import Path
from longllava.train.lock import run_lock
with run_lock(Path({str(out)!r})):
    print("held", flush=True)
    input()
"""
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert first.stdout is not None and first.stdout.readline() == b"held\n"
        with pytest.raises(LongLLaVAError, match=f"{out}: process {first.pid} on .* works in this folder and holds"):
            evaluate.vniah(["3"], model=str(tmp_path / "tiny"), depths="2", needles=1, output=str(out))
        assert [path.name for path in out.iterdir()] == ["lock"]
    finally:
        first.communicate(b"\n")
