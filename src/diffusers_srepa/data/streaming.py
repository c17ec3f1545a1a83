"""A dataset of training crops that is read as a stream, without downloading it first.

Every process reads a part of its own, the same in every epoch: whole shards where they divide evenly among the
processes, else every P-th row. The order of the shards depends on (seed, epoch); the rows of a shard arrive in their
order, are collected in blocks of fixed size, and each block is permuted by a key of its own. So the place in the
stream is a number of rows, and a resumed run finds it by counting, exactly as long as the number of processes stays
the same.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from datasets import Image
from datasets import IterableDataset as RowStream
from torch.utils.data import IterableDataset, get_worker_info

from diffusers_srepa.data.columns import class_names, is_string, read_label
from diffusers_srepa.data.fingerprint import on_background, stream_fingerprint
from diffusers_srepa.data.image_dataset import MAX_REPLACEMENTS, OnBadImage, pass_over
from diffusers_srepa.data.images import WHITE, Color, read_crop
from diffusers_srepa.data.order import BatchLayout, check_steps, is_flipped, keyed_permutation
from diffusers_srepa.data.read_errors import RESUME
from diffusers_srepa.errors import ConfigurationError, DataError, one_line


logger = logging.getLogger(__name__)

#: Rows of a block, held in memory undecoded: about 110 MB of ImageNet.
BLOCK_ROWS = 1_000
#: Below this number of shards, reading shards in another order mixes little.
_FEW_SHARDS = 8


@dataclass
class _Block:
    """Consecutive raw rows of an epoch, the first of them being its row `start`."""

    epoch: int
    start: int
    rows: list[dict[str, Any]]
    # The item for every row, once it is known that none of them can be used.
    substitute: dict[str, Any] | None = None


class StreamingImages(IterableDataset):
    """Training crops of a stream; `load_image_dataset(..., streaming=True)` builds it.

    Items are those of `ImageDataset` without moments; `index` counts the rows that this process read in the epoch.
    Call `set_position` first, then read it through `DataLoader(stream, batch_size=micro_batch_size,
    collate_fn=collate)` with 0 or 1 workers. An unreadable row, or one without a label, is replaced by the next
    readable row of its block, or of what follows a block that has none.

    Attributes:
        num_classes (`int`, *optional*): number of classes where the stream declares it; 1 without labels.
        id2label (`dict[int, str]`, *optional*): names of the classes.
        image_column (`str`), label_column (`str`, *optional*): the columns in use.

    Raises:
        ConfigurationError: labels are strings, which have no numbers before the whole stream is read.
    """

    def __init__(
        self,
        source: RowStream,
        *,
        image_column: str,
        label_column: str | None,
        resolution: int,
        seed: int,
        horizontal_flip: bool = False,
        on_bad_image: OnBadImage = "skip",
        background: Color = WHITE,
        block_rows: int = BLOCK_ROWS,
        name: str = "stream",
    ) -> None:
        label_feature = None if label_column is None else (source.features or {})[label_column]
        if is_string(label_feature):
            raise ConfigurationError(
                f"the labels in the column {label_column!r} are strings, which a stream cannot number: unset "
                "`streaming` or choose another column (option `label_column`)."
            )
        if source.num_shards < _FEW_SHARDS:
            logger.warning(
                f"the stream has {source.num_shards} shard(s), so rows are mixed within blocks of {block_rows} and "
                "little beyond: if its rows are sorted by class, unset `streaming`."
            )
        self.name = name
        self.image_column = image_column
        self.label_column = label_column
        self.id2label = class_names(label_feature)
        self.num_classes = 1 if label_column is None else len(self.id2label) if self.id2label else None
        self.resolution = resolution
        self.seed = seed
        self.horizontal_flip = horizontal_flip
        self.on_bad_image = on_bad_image
        self.block_rows = block_rows
        self.background = background
        columns = [image_column] if label_column is None else [image_column, label_column]
        self._rows = source.select_columns(columns).cast_column(image_column, Image(decode=False))
        self._tokens = getattr(source, "_token_per_repo_id", None) or {}
        self._rows_per_epoch: int | None = None
        self.set_position(start_step=0, global_batch_size=1, micro_batch_size=1)

    def set_position(
        self,
        *,
        start_step: int,
        global_batch_size: int,
        micro_batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        num_steps: int | None = None,
    ) -> None:
        """Say which part of the stream this process reads, from which step on, and how samples fall into batches.

        Args:
            start_step (`int`): optimiser steps already made.
            global_batch_size (`int`), micro_batch_size (`int`), process_index (`int`), num_processes (`int`): see
                `BatchLayout`.
            num_steps (`int`, *optional*): number of steps to yield from there on; by default the stream never ends.

        Raises:
            ConfigurationError: the global batch cannot be divided, or a number is out of range.
        """
        layout = BatchLayout(global_batch_size, micro_batch_size, process_index, num_processes)
        check_steps(start_step, num_steps)
        if num_processes != getattr(getattr(self, "layout", None), "num_processes", num_processes):
            self._rows_per_epoch = None
        self.layout, self.start_step, self.num_steps = layout, start_step, num_steps

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the stream as far as it is known without reading it; computed on first use."""
        try:
            found = stream_fingerprint(self._rows, self.name, self.image_column, self.label_column)
            return on_background(found, self.background)
        except Exception as error:
            raise self._unreadable(error) from error

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ConfigurationError(
                f"a stream is one sequence and cannot be read by {worker.num_workers} workers: set `num_workers` "
                "to 0 or 1, or unset `streaming`."
            )
        layout = self.layout
        first = self.start_step * layout.samples_per_step
        last = None if self.num_steps is None else first + self.num_steps * layout.samples_per_step
        places = range(first, last) if last is not None else itertools.count(first)
        for place, (block, chosen) in zip(places, self._choices(first), strict=False):
            step, in_step = divmod(place, layout.samples_per_step)
            # Independent of the micro-batches, which are cut from one sequence here: they may change between runs.
            position = layout.process_index * layout.samples_per_step + in_step
            item = self._first_readable(block, chosen)
            if self.horizontal_flip and is_flipped(self.seed, step, position):
                item["pixel_values"] = item["pixel_values"].flip(-1)
            yield item | {"step": step, "position": position}

    def _choices(self, count: int) -> Iterator[tuple[_Block, int]]:
        """Blocks, and the row of the block to use, from the `count`-th sample on."""
        epoch, remaining = divmod(count, self._rows_per_epoch) if self._rows_per_epoch else (0, count)
        while True:
            first_block, within = divmod(remaining, self.block_rows)
            rows = self._epoch(epoch)
            total = sum(1 for _ in itertools.islice(rows, first_block * self.block_rows))
            for number in itertools.count(first_block):
                block = _Block(epoch, total, list(itertools.islice(rows, self.block_rows)))
                key = (self.seed, "block", epoch, self.layout.process_index, number)
                for chosen in keyed_permutation(len(block.rows), *key)[within:].tolist():
                    yield block, chosen
                total, within = total + len(block.rows), 0
                if len(block.rows) < self.block_rows:
                    break
            if total == 0:
                raise DataError(
                    f"the stream has no rows for process {self.layout.process_index} of {self.layout.num_processes}: "
                    "choose another dataset or split (options `name_or_path`, `split`), or use fewer processes."
                )
            # Beyond the first epoch, the length of an epoch is learnt by counting one.
            self._rows_per_epoch = total
            epoch, remaining = (
                (epoch + remaining // total, remaining % total) if remaining >= total else (epoch + 1, 0)
            )

    def _epoch(self, epoch: int) -> Iterator[dict[str, Any]]:
        """The raw rows of this process in an epoch."""
        stream, layout = self._rows, self.layout
        by_shards = stream.num_shards % layout.num_processes == 0
        shards = range(layout.process_index, stream.num_shards, layout.num_processes) if by_shards else None
        shards = shards or range(stream.num_shards)
        order = keyed_permutation(len(shards), self.seed, "shards", epoch).tolist()
        rows = itertools.chain.from_iterable(stream.shard(stream.num_shards, shards[number]) for number in order)
        try:
            yield from rows if by_shards else itertools.islice(rows, layout.process_index, None, layout.num_processes)
        except Exception as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        # The readers of the library raise whatever their file formats and transports raise.
        return DataError(
            f"the stream {self.name} cannot be read any further ({one_line(error)}): see to the network and to its "
            f"files (option `name_or_path`), and {RESUME}."
        )

    def _first_readable(self, block: _Block, chosen: int) -> dict[str, Any]:
        length = len(block.rows)
        for replaced in range(length if block.substitute is None else 0):
            place = (chosen + replaced) % length
            item = self._try(block.rows[place], block.start + place)
            if item is not None:
                return item | {"replaced": replaced}
        if block.substitute is None:
            block.substitute = self._first_readable_after(block)
        # A copy, because its pixels may be flipped.
        return dict(block.substitute)

    def _first_readable_after(self, block: _Block) -> dict[str, Any]:
        """What takes the place of every row of a block without a readable one: the next rows of this process."""
        length = len(block.rows)
        later = itertools.islice(enumerate(self._epoch(block.epoch)), block.start + length, None)
        following = itertools.chain(later, enumerate(self._epoch(block.epoch + 1)))
        tried = length
        for number, row in itertools.islice(following, max(0, MAX_REPLACEMENTS - length)):
            item = self._try(row, number)
            if item is not None:
                return item | {"replaced": tried}
            tried += 1
        raise DataError(
            f"none of the {tried} rows of the stream from row {block.start} on can be used, so it is given up: see "
            "the warnings above (option `name_or_path`)."
        )

    def _try(self, row: dict[str, Any], number: int) -> dict[str, Any] | None:
        """The item of a row, or None if it cannot be used."""
        column = self.label_column
        try:
            label = 0 if column is None else read_label(row[column], self.num_classes, column)
            pixels = read_crop(row[self.image_column], self.resolution, self._tokens, self.background)
        except DataError as error:
            pass_over(DataError(f"row {number} of the stream is unusable, {error}"), self.on_bad_image)
            return None
        return {"pixel_values": pixels, "class_labels": torch.tensor(label, dtype=torch.int64), "index": number}
