"""What each stage brought: foundation, stage 1, 2 and 3 on held-out tasks of the picture world.

    python benchmarks/curriculum.py                            the stages in runs/nano, else the shipped nano
    python benchmarks/curriculum.py --folders runs/a/stage2/model runs/a/stage3/model

The foundation is judged as stage 1 begins: with a bridge that has learned nothing. What it measures:
longllava/evals/curriculum.py.
"""

import argparse
import sys
import time
from pathlib import Path

import _environment  # noqa: F401

from longllava.cli import run
from longllava.errors import InputError, LongLLaVAError
from longllava.settings import check_count

RESULTS = Path(__file__).resolve().parent / "results"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--folders", nargs="+", metavar="DIR", help="model folders, in order (default: what runs/MODEL holds)")
    for name, kind, default, metavar, meaning in (
        ("--model", str, "nano", "NAME", "whose stages"),
        ("--questions", int, 300, "N", "questions per task; three times as many about single pictures"),
        ("--generated", int, 4, "N", "per task, samples that the last model answers through generate too"),
        ("--seed", int, 0, "N", "draws the questions"),
    ):
        add(name, type=kind, default=default, metavar=metavar, help=f"{meaning} (default: %(default)s)")
    add("--output", metavar="DIR", help="receives curriculum-DEVICE.json and .png (default: benchmarks/results, with "
                                        "--tasks or --folders none)")  # fmt: skip
    add("--tasks", metavar="NAME,NAME", help="some of the tasks (default: all)")
    add("--device", help="cpu, cuda ... (default: a GPU if there is one)")
    return parser.parse_args()


def main() -> bool:
    chosen = options()
    check_count("--questions", chosen.questions)
    if chosen.generated < 0:
        raise InputError(f"--generated: got {chosen.generated}, expected 0 or more")
    from longllava.evals.curriculum_report import Column, as_json, draw_plot, print_report
    from longllava.evals.curriculum_task import TASKS, tasks_named
    from longllava.files import writable_folder, write_atomic, write_json

    output = chosen.output or (None if chosen.tasks or chosen.folders else RESULTS)  # which are of all of them
    target = writable_folder(output) if output else None  # said now, not after the measuring
    tasks = tasks_named(chosen.tasks.split(",")) if chosen.tasks else list(TASKS)
    folders = folders_of(chosen)
    columns: list[Column] = []
    for number, (label, folder) in enumerate(folders):
        n_generated = chosen.generated if number == len(folders) - 1 else 0
        columns.append(column_of(chosen, label, folder, tasks, n_generated))
    everything_holds = print_report(columns)
    if target is None:
        return everything_holds

    from longllava.train.record import environment

    device = columns[-1].about["device"].partition(":")[0]
    facts = {**environment(columns[-1].about["device"]), "seed": chosen.seed, "questions_per_task": chosen.questions}
    written = write_json(target / f"curriculum-{device}.json", as_json(columns, **facts))
    picture = write_atomic(target / f"curriculum-{device}.png", lambda file: draw_plot(columns, file))
    print(f"{written}\n{picture}")
    return everything_holds


def folders_of(chosen: argparse.Namespace) -> list[tuple[str | None, Path | None]]:
    """(stage, folder) of each model; (foundation, None) is put together. Raises: LongLLaVAError."""
    from longllava.checkpoints import find_folder, shipped_models

    if chosen.folders:
        return [(None, find_folder(folder)) for folder in chosen.folders]
    runs = Path("runs") / chosen.model
    finished = [(stage, runs / stage / "model") for stage in ("stage1", "stage2", "stage3")]
    finished = [(stage, folder) for stage, folder in finished if (folder / "training.json").is_file()]
    if not finished:
        if chosen.model not in shipped_models():
            raise LongLLaVAError(f"no finished stage in {runs}, and no shipped model {chosen.model!r}; train a stage")
        finished = [("stage3", find_folder(chosen.model))]
    return [("foundation", None), *finished]


def column_of(chosen, stage, folder, tasks, n_generated):
    """A model's answers to all tasks."""
    from longllava import LongLLaVA
    from longllava.evals.curriculum import generated, measure
    from longllava.evals.curriculum_report import Column
    from longllava.train.record import read_record

    started = time.perf_counter()
    if folder is None:
        talker, about = foundation(chosen)
    else:
        talker, about = LongLLaVA.from_pretrained(folder, device=chosen.device), read_record(folder)
    stage = stage or about.get("stage")
    label = stage or folder.name
    print(f"{label}: {folder or about['started_from']}", flush=True)
    counted = {"n_questions": chosen.questions, "seed": chosen.seed}
    outcomes = measure(talker.model, talker.processor, tasks, show=show, **counted)
    seconds = round(time.perf_counter() - started, 1)
    free = [generated(talker, task, one, n_generated, **counted)
            for task, one in zip(tasks, outcomes) if n_generated and not task.by_word]  # fmt: skip
    weight = talker.model.backbone.embed_tokens.weight
    about = {**about, "device": str(weight.device), "dtype": str(weight.dtype).removeprefix("torch.")}
    return Column(label, stage, str(folder or "foundation"), {one.task: one for one in outcomes}, seconds, free, about)


def foundation(chosen):
    """The model as stage 1 begins: encoder and language model as they are, the bridge fresh from the seed."""
    from longllava import LongLLaVA
    from longllava.api import checked_device
    from longllava.shipped import shipped
    from longllava.train.config import load_stage
    from longllava.train.stage import build_start, load_tokenizer, model_config_of, start_folders

    config = load_stage(shipped("configs", f"train/{chosen.model}/stage1"))
    model_config = model_config_of(config)
    folders = start_folders(config, model_config)
    tokenizer = load_tokenizer(model_config, folders)
    model = build_start(config, model_config, folders, tokenizer).to(checked_device(chosen.device))
    about = {
        "started_from": {part: str(path) for part, path in folders.items()},
        "bridge": f"fresh, seed {config.seed}",
    }
    return LongLLaVA(model, tokenizer), about


def show(outcome) -> None:
    share = f"{outcome.accuracy * 100:5.1f} %"
    print(f"  {outcome.task:10} {share}  {outcome.n} questions, {outcome.seconds} s", flush=True)


if __name__ == "__main__":
    run(lambda: sys.exit(0 if main() else 1), "curriculum")
