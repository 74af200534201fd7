"""The endless order in which training reads a data set, by number or as a stream."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from .data import SkippedRows


if TYPE_CHECKING:
    import datasets


def training_order(
    num_images: int, start: int, batch_size: int, process_index: int, num_processes: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The micro-batches of one process, for ever: [`training_draws`], of which only the coin for mirroring.

    Yields:
        indices `(batch_size,)` int64 in `[0, num_images)`, and whether to mirror each image, `(batch_size,)` bool, a
        fair coin thrown anew each epoch.
    """
    for indices, draws in training_draws(num_images, start, batch_size, process_index, num_processes, seed):
        yield indices, draws[:, 0] < 0.5


def training_draws(
    num_images: int, start: int, batch_size: int, process_index: int, num_processes: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The micro-batches of one process and what is random about each image, for ever.

    Training reads one endless sequence of images, whose epoch e is a permutation drawn from (seed, e). The k-th image
    is thus a function of (seed, k) alone: a run that resumes at `start` needs no state, and a batch has the same
    images however it is split into processes and micro-batches. The last images of an epoch share a batch with the
    first of the next: none is dropped.

    Args:
        num_images (`int`): Images in the data set.
        start (`int`): Images that all processes together have read so far.
        batch_size (`int`): Images per process and micro-batch. Process p takes the p-th `batch_size` images of every
            `num_processes * batch_size`.
        process_index (`int`), num_processes (`int`): This process and how many there are.
        seed (`int`): Not negative.

    Yields:
        indices `(batch_size,)` int64 in `[0, num_images)`, and `(batch_size, 3)` float64 uniform in [0, 1), new
        ones each epoch: which view of the image, and where to crop it from left to right and from top to bottom.

    Raises:
        `ValueError`: at the first `next`, for sizes below 1, a negative `start` or `seed`, or no such process.
    """
    for name, value, least in (
        ("num_images", num_images, 1),
        ("start", start, 0),
        ("batch_size", batch_size, 1),
        ("num_processes", num_processes, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    if not 0 <= process_index < num_processes:
        raise ValueError(f"`process_index` must lie in [0, {num_processes}), got {process_index}.")
    epochs = {}
    for first in range(start + process_index * batch_size, 2**62, num_processes * batch_size):
        positions = np.arange(first, first + batch_size)
        needed = range(first // num_images, positions[-1] // num_images + 1)  # one epoch, seldom two
        epochs = {e: epochs[e] if e in epochs else _draw_epoch(num_images, e, seed) for e in needed}
        parts = [(epochs[e], positions[positions // num_images == e] % num_images) for e in needed]
        indices = np.concatenate([permutation[places] for (permutation, _), places in parts])
        draws = np.concatenate([draws[places] for (_, draws), places in parts])
        yield torch.from_numpy(indices), torch.from_numpy(draws)


def _draw_epoch(num_images: int, epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng([seed, epoch])
    permutation, views = random.permutation(num_images), random.random(num_images)
    return permutation, np.column_stack([views, random.random((num_images, 2))])


def streamed_rows(
    dataset: "datasets.IterableDataset",
    seed: int,
    buffer_size: int,
    process_index: int,
    num_processes: int,
    start: tuple[int, int] = (0, 0),
) -> Iterator[tuple[dict, tuple[int, int]]]:
    """The rows of one process of a data set that cannot be read by number, for ever.

    Each epoch is shuffled anew from (seed, epoch): the files as a whole, and rows within a buffer. Where the number of
    files is a multiple of `num_processes` each process reads its own files (not with `datasets` 5.0), otherwise each
    reads all and takes every `num_processes`-th row.

    A run that resumes **reads again** what it had read of the epoch, without decoding: that is the only way to have
    the buffer as it was. It costs the reading of up to one epoch, which for local files is small beside training on
    them, and for remote ones means downloading them again.

    Args:
        dataset (`datasets.IterableDataset`): With undecoded images ([`undecoded`]).
        buffer_size (`int`): Rows in the shuffle buffer.
        start (`tuple[int, int]`, defaults to the beginning): Epoch, and rows of it that this process has read.

    Yields:
        The row, and the place after it, from which a run resumes behind it.

    Raises:
        `ValueError`: this process's share has no rows.
    """
    from datasets.distributed import split_dataset_by_node

    share = split_dataset_by_node(
        dataset.shuffle(seed=seed, buffer_size=buffer_size), rank=process_index, world_size=num_processes
    )
    epoch, num_skipped = start
    while True:
        share.set_epoch(epoch)
        count = 0
        for row in share:
            count += 1
            if count > num_skipped:
                yield row, (epoch, count)
        if count == 0:
            raise ValueError(f"The streamed data set has no rows for process {process_index} of {num_processes}.")
        epoch, num_skipped = epoch + 1, 0


def streamed_name(row: dict, place: tuple[int, int]) -> str:
    """How a row of a stream is named: by its key in a webdataset, else by its place."""
    return f"key {row['__key__']}" if "__key__" in row else f"row {place[1]} of epoch {place[0]}"


class UsableRows:
    """Counts the rows that a stream leaves out, and ends one that leaves out all of an epoch: it would never end."""

    def __init__(self, skipped: SkippedRows):
        self.skipped, self.last_epoch = skipped, None  # of a row that was kept

    def keep(self, place: tuple[int, int]) -> None:
        self.last_epoch = place[0]

    def leave_out(self, row: dict, place: tuple[int, int], reason: str) -> None:
        """Count it, or raise a `ValueError` where none was kept in the whole epoch before this one."""
        if self.last_epoch is None:
            self.last_epoch = place[0]
        # Without a key a row has another name in each epoch.
        self.skipped.add(reason, streamed_name(row, place), None if "__key__" in row else place[0])
        if place[0] > self.last_epoch + 1:
            raise ValueError(f"The streamed data set has none but {reason} in all of epoch {self.last_epoch + 1}.")
