"""The scan's int8 epilogue on and off, for gpu_first_token.py: time to the first token, and what becomes of its logits.

off: out_proj quantises what the scan wrote. maxima: the scan finds each token's largest value, so that the pass that
quantises reads y once. int8: the scan writes int8 itself, where the GPU holds all its blocks at once. Beside these
out_proj with inputs in floats, which is what the int8 of the others is compared with: the three differ in no bit. For
all these its weights are read as if they were not rotated, a model as random as the other. rotated: the pass that
quantises rotates, too, which is what a model does by itself; its time alone can be compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _gpu_measures import Run

from longllava.nn.mamba import Mamba
from longllava.ops.selective_scan import cuda_launch
from longllava.quant import Inputs, Int8Linear, fuse_scans_
from longllava.quant.layers import NEVER

ROUNDS = 2
WAYS = ("floats", "off", "maxima", "int8", "rotated")


@contextmanager
def set_to(model: Any, way: str) -> Iterator[None]:
    readers = [m.out_proj for m in model.modules() if isinstance(m, Mamba) and isinstance(m.out_proj, Int8Linear)]
    before, chosen = [reader.inputs for reader in readers], cuda_launch.EPILOGUE
    try:
        for reader in readers if way != "rotated" else ():
            reader.inputs = Inputs(NEVER) if way == "floats" else reader.inputs._replace(rotated=False)
        fuse_scans_(model, way in ("maxima", "int8"))
        cuda_launch.EPILOGUE = way
        yield
    finally:
        for reader, inputs in zip(readers, before, strict=True):
            reader.inputs = inputs
        cuda_launch.EPILOGUE = chosen
        fuse_scans_(model, model.config.int8.scan_epilogue)


def kernel_writes_int8(run: Run) -> bool:
    """Whether "int8" is possible for a chunk of this model here."""
    reader, backbone = run.model.fresh().reader, run.model.model.config.backbone
    wide, few = (
        torch.empty(1, 1, n, device=run.device, dtype=reader.dtype).expand(1, reader.chunk, n)
        for n in (backbone.d_inner(), backbone.state_size)
    )
    return run.on_gpu and cuda_launch.writes_int8(wide, wide, few, few, wide, None)


def measure_epilogue(run: Run, n_images: int, tokens: int) -> None:
    """Rows of one prompt, each way in turn, so that all see the same machine."""
    kind = {"row": "scan epilogue", "images": n_images, "tokens": tokens}
    if run.late(**kind):
        return
    run.collect()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    logits: dict[str, torch.Tensor] = {}
    for number in range(ROUNDS + 1):
        for way in WAYS:
            if run.late(**kind, way=way):
                return
            with set_to(run.model.model, way):
                spent, _, hidden_1D, state, session = run.first_token(n_images, tokens)
                with torch.inference_mode():
                    logits[way] = session.reader.logits(hidden_1D)[0].float().log_softmax(-1)
            del state, session
            if number:  # the first round is for what is done once
                seconds[way].append(spent)
    truth = logits["floats"]
    for way in WAYS:
        row = {**kind, "way": way, "seconds": statistics.median(seconds[way])}
        if way != "rotated":
            row["kl_to_floats"] = float((truth.exp() * (truth - logits[way])).sum())
            row["same_token"] = bool(truth.argmax() == logits[way].argmax())
            row["same_bits_as_off"] = torch.equal(logits[way], logits["off"])
        if way == "int8":
            row["kernel_writes_int8"] = kernel_writes_int8(run)
        run.add(**row)
