"""How likely an answer is, without ever holding all positions' logits: 40,960 times 65,536 in fp32 are 10.7 GB.

Shapes: L tokens that are read at once, P positions whose logits are made at once, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longllava.generation.prefill import Reader
from longllava.generation.sampling import Sampling, check_finite, drawn
from longllava.nn import Context, State

POSITIONS = 256  # 64 MiB of fp32 logits at 65,536 words


@dataclass(frozen=True)
class Score:
    """How likely an answer is, token by token, given what came before it (teacher-forced).

    log_probabilities: natural, of each token of the answer (not its end). exact: all are the likeliest.
    """

    log_probabilities: tuple[float, ...]
    exact: bool

    @property
    def log_probability(self) -> float:
        return sum(self.log_probabilities)


@torch.inference_mode()
def score_ids(reader: Reader, hidden_1D: Tensor, state: State, start: int, ids: list[int]) -> Score:
    """ids: the answer's, at least one. hidden_1D, state: after what stands before it. start: where its tokens begin.

    Raises: LongLLaVAError when logits are not finite.
    """
    model = reader.model
    ids_1L = torch.tensor([ids], device=hidden_1D.device)
    scores: list[float] = []
    exact = True
    hiddens_LD = hidden_1D
    for begin in range(0, len(ids), reader.chunk):
        read_1L = ids_1L[:, begin : min(begin + reader.chunk, len(ids) - 1)]  # nothing follows the last one
        if read_1L.shape[1]:
            later_1LD, state = model(model.embed(read_1L), Context(start=start + begin), state)
            hiddens_LD = torch.cat([hiddens_LD, later_1LD[0]])
        for hidden_PD in hiddens_LD.split(POSITIONS):
            ids_P = ids_1L[0, len(scores) : len(scores) + len(hidden_PD)]
            logits_PV = reader.logits(hidden_PD)
            likeliest = check_finite(drawn(logits_PV, Sampling(), None).tolist())
            scores += torch.log_softmax(logits_PV.float(), -1).gather(-1, ids_P[:, None])[:, 0].tolist()
            exact = exact and likeliest == ids_P.tolist()
        hiddens_LD = hiddens_LD[:0]
    return Score(tuple(scores), exact)
