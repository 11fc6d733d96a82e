"""Data sets that `datasets` reads: of the hub, or a local folder of any kind that it knows.

Downloaded ones are arrow files, read as such. Streamed ones come shard by shard, in an order that the seed draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longllava.data.records import Columns
from longllava.data.stores.tables import TableStore
from longllava.errors import DataError


@dataclass(frozen=True)
class HubName:
    """path: "owner/name", or a folder. subset: its configuration. split: of it. revision: of the hub's repository."""

    path: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.path, self.subset, self.split)))


def hub_store(name: HubName, columns: Columns, files: bool) -> TableStore:
    """Downloaded once, by `datasets`. Raises: DataError."""
    found = loaded(name, streaming=False)
    paths = [Path(file["filename"]) for file in found.cache_files]
    if not paths:
        raise DataError(f"{name}: `datasets` keeps it in memory; set streaming: true")
    return TableStore(paths, columns, files)


def loaded(name: HubName, *, streaming: bool) -> Any:
    try:
        import datasets
    except Exception as error:  # it may be there, and lack something itself, or be built for another numpy
        raise DataError(f"format datasets needs the package ({error}); pip install 'longllava[train]'") from None
    try:
        return datasets.load_dataset(
            name.path, name.subset, split=name.split, streaming=streaming, revision=name.revision
        )
    except Exception as error:  # it raises whatever its readers and the network do
        raise DataError(f"{name}: cannot be loaded: {' '.join(str(error).split())}") from None


class Stream:
    """Records of a streamed data set in order; `cursor` says where the next one is, and is JSON.

    order: numbers of its shards as they are to be read.
    """

    def __init__(self, name: HubName, columns: Columns, order: list[int] | None = None):
        self.name = name
        found = loaded(name, streaming=True)
        self.n_shards = found.num_shards
        present = found.column_names
        if present is not None:
            found = found.select_columns([column for column in dict.fromkeys(columns.needed()) if column in present])
        # Pictures stay bytes; Audio and Video would want torchcodec. Without known features nothing is decoded.
        self.dataset = found if found.features is None else found.decode(False)
        self.order = order or list(range(self.n_shards))

    def read(self, cursor: dict[str, Any] | None = None) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(record, cursor of the one after it). Raises: DataError when the source breaks off."""
        first = cursor["shard"] if cursor else 0
        for place in range(first, len(self.order)):
            shard = self.dataset.shard(num_shards=self.n_shards, index=self.order[place])
            if cursor and place == first and cursor["state"] is not None:
                shard.load_state_dict(cursor["state"])
            try:
                for record in shard:
                    yield record, {"shard": place, "state": shard.state_dict()}
            except Exception as error:  # the network, a torn file
                raise DataError(
                    f"{self.name}: the stream broke off in shard {self.order[place]}: {' '.join(str(error).split())};"
                    " start again, and the run goes on"
                ) from None
