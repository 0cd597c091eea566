"""A masks dataset as Ray Data reads it."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final

import pipeline.engine  # noqa: F401 (first: what it sets, Ray reads when it is imported)

# isort: split
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from pipeline import storage
from pipeline.errors import TrainingDataError
from pipeline.reading import stored_masks
from pipeline.shard import shard_uri

_TASKS: Final = 4096  # blocks of the driver take about 35 KB each


def to_ray(uri: str, *, columns: Sequence[str] | None = None) -> ray.data.Dataset:
    """The rows of a masks dataset on the connected Ray, in no particular order; a row group is a block.

    Args:
        uri: What the command that made it was given as --output; an address that all machines of a cluster reach.
        columns: That are read, by default all; of masks also some of their fields, as `masks.list.element.area`.

    Raises:
        OutputConflict, TrainingDataError, StorageError: as `pipeline.reading.stored_masks`. A shard that is
            damaged or cannot be read ends the dataset with an error when its turn comes.
    """
    stored = stored_masks(uri)
    if not stored.shards:
        raise TrainingDataError(f"{storage.redact(stored.output)} holds no image.")
    uris = [shard_uri(stored.output, "masks", shard) for shard in stored.shards]
    some = -(-len(uris) // _TASKS)
    tables: list[Any] = [pa.table({"uri": uris[i : i + some]}) for i in range(0, len(uris), some)]
    read: Any = partial(_row_groups, columns=None if columns is None else list(columns))
    return ray.data.from_arrow(tables).map_batches(read, batch_size=None, batch_format="pyarrow")


def _row_groups(shards: pa.Table, columns: list[str] | None) -> Iterator[pa.Table]:
    for uri in map(str, shards["uri"].to_pylist()):
        with storage.open_input(uri) as file:
            parquet = pq.ParquetFile(file)
            for group in range(parquet.num_row_groups):
                yield parquet.read_row_group(group, columns=columns)
