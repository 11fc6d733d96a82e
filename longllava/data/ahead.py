"""Pictures looked at ahead of their turn, in threads.

Every process of a run plans all rows of a step, so that all agree on them, and looks at each of their pictures: 2 ms
for a JPEG of 1,000 x 800. With rows of 40,960 tokens, 280 pictures each, one thread would keep many GPUs waiting.
Decoding frees the interpreter. What is found is told when the sample's turn comes, in order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from longllava.data.images import check_picture
from longllava.inputs.media import n_cores

SAMPLES = 64  # looked at ahead of the one that is planned
PICTURES = 4096  # at most, whatever these samples hold
MOST_THREADS = 8


class Looks:
    """What threads found, or are finding, by reference. One thread asks."""

    def __init__(self) -> None:
        self.pending: dict[str, Future[None]] = {}
        self.pool: ThreadPoolExecutor | None = None

    def expect(self, references: Iterable[str]) -> None:
        if (n := n_threads()) < 2:
            return
        if self.pool is None:
            self.pool = ThreadPoolExecutor(n, "longllava-look")
        for reference in references:
            if len(self.pending) < PICTURES and reference not in self.pending:
                self.pending[reference] = self.pool.submit(check_picture, reference)

    def look(self, reference: str) -> None:
        """Raises: InputError where a picture cannot be trained on."""
        future = self.pending.pop(reference, None)
        if future is None:
            check_picture(reference)
        else:
            future.result()

    def forget(self, references: Iterable[str]) -> None:
        """Those of a sample that is done with: where one is broken the others are never asked for."""
        for reference in references:
            if (future := self.pending.pop(reference, None)) is not None:
                future.cancel()


def n_threads() -> int:
    """This process's share of the machine's cores."""
    return min(MOST_THREADS, n_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


LOOKS = Looks()
if hasattr(os, "register_at_fork"):  # a forked process has none of the threads, and would wait for them for ever
    os.register_at_fork(after_in_child=lambda: Looks.__init__(LOOKS))
