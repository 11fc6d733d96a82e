"""One pickled file of weights into safetensors. Run as a process of its own: see longllava.checkpoints.convert.

    python -m longllava.checkpoints.unpickle SOURCE.bin TARGET.safetensors

torch.load with weights_only=True builds tensors and plain containers only. Should a file break through it all the
same, it meets a process that holds nothing and is waited for by one that reads no pickles.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MINIMUM = (2, 10)  # before it, crafted files got past weights_only (CVE-2025-32434, CVE-2026-24747)


def main(source: str, target: str) -> None:
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM:
        sys.exit(f"torch {torch.__version__}: pickles are opened with torch 2.10 or newer only; update torch")
    try:
        data = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        sys.exit(f"it is not a pickle of plain tensors ({first_line})")
    tensors = tensors_of(data)
    if not tensors:
        sys.exit("there are no tensors in it")
    write(tensors, Path(target))


def tensors_of(data: Any) -> dict[str, Any]:
    """The named tensors of a state dict, or of the one that lies under "state_dict" or "model"."""
    import torch

    for key in ("state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping):
        return {}
    return {str(name): value for name, value in data.items() if isinstance(value, torch.Tensor)}


def write(tensors: Mapping[str, Any], target: Path) -> None:
    from longllava.checkpoints.save import output
    from longllava.checkpoints.write import write_tensors

    write_tensors(target, {name: output(tensor, tensor.dtype) for name, tensor in tensors.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
