"""How much of a source cannot be used, and when that is too much."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from longllava.data.records import Unusable, printable
from longllava.errors import DataError

MAX_BAD = 0.01  # a source of which more cannot be used is wrong as a whole
CHECK_AFTER = 1000


@dataclass(frozen=True)
class Rejected:
    """A record that was left out."""

    where: str  # file:line
    kind: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


class Tally:
    """Counts each record once, however often it is looked at. label: of the source, for the error.

    n: how many records there are, where that is known: once all were seen, few too are a share that can be judged.
    """

    def __init__(self, label: str, max_bad: float = MAX_BAD, n: int | None = None):
        self.label, self.max_bad, self.n = label, max_bad, n
        self.seen: set[int] = set()
        self.rejected: dict[int, Rejected] = {}

    def good(self, number: int) -> None:
        """Raises: DataError when this was the last one, and too many cannot be used."""
        self.seen.add(number)
        if len(self.seen) == self.n:
            self.refuse_if_bad()

    def bad(self, number: int, where: str, error: Unusable) -> None:
        """Raises: DataError when this is one too many, after CHECK_AFTER records or all."""
        if number in self.rejected:
            return
        self.seen.add(number)
        self.rejected[number] = Rejected(printable(where), error.kind, str(error))
        if len(self.seen) >= CHECK_AFTER or len(self.seen) == self.n:
            self.refuse_if_bad()

    def refuse_if_bad(self) -> None:
        """Raises: DataError with the commonest reasons."""
        n, total = len(self.rejected), len(self.seen)
        if n <= self.max_bad * total:
            return
        reasons = Counter(item.kind for item in self.rejected.values()).most_common(3)
        listed = ", ".join(f"{kind} ({count})" for kind, count in reasons)
        first = next(iter(self.rejected.values()))
        raise DataError(
            f"{self.label}: {n} of {total} records cannot be used, more than {self.max_bad:.1%}: {listed}; the first is"
            f" {first}; mend them, or allow more with max_bad"
        )
