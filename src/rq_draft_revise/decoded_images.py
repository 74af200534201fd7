"""Images of a data set as pixels: all at once, by row as they are needed, or of a stream."""

import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .data import SkippedRows, undecoded
from .images import to_rgb, to_square
from .interruption import ignore_stop_signals
from .reading_order import UsableRows


if TYPE_CHECKING:
    import datasets


# What decoding a damaged or missing image raises. PIL's UnidentifiedImageError is an OSError.
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, zlib.error,
              Image.DecompressionBombError)  # fmt: skip


def decode_image(image: Image.Image, resolution: int, crop: tuple[float, float] | None = None) -> torch.Tensor:
    """PIL image to uint8 `(3, resolution, resolution)`: [`to_rgb`] and [`to_square`].

    Everything stays uint8 until it is on the training device: a quarter of the memory and of the transfer.
    """
    return torch.from_numpy(np.array(to_square(to_rgb(image), resolution, crop))).permute(2, 0, 1)


class DecodedImages(torch.utils.data.Dataset):
    """The images of a data set by row, decoded; the next readable one stands in for one that cannot be read.

    So a batch is full, and the same whoever reads it. A key is `(row, flip, left, top)` as from [`training_draws`],
    with `crop` from 0 to 1, or a row alone: then the center and not mirrored.

    Args:
        dataset (`datasets.Dataset`): From [`load_split`].
        image_column (`str`): Column of the images.
        resolution (`int`): Side of the square that they become.
        first_row (`int`, defaults to 0): Number of the first row where one is named.
    """

    def __init__(self, dataset: "datasets.Dataset", image_column: str, resolution: int, first_row: int = 0):
        self.rows = undecoded(dataset.select_columns([image_column]), image_column)
        self.image_column, self.resolution, self.first_row = image_column, resolution, first_row

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key) -> tuple[torch.Tensor, int, list[str]]:
        """uint8 `(3, resolution, resolution)`, the row that it is from, and the names of unreadable rows."""
        row, flip, *crop = key if isinstance(key, tuple) else (key, False)
        unreadable = []
        for i in (*range(row, len(self)), *range(row)):
            value = self.rows[i][self.image_column]
            try:
                image = decode_value(value, self.resolution, tuple(crop) or None)
            except UNREADABLE as error:
                unreadable.append(row_name(self.first_row + i, value, error))
                continue
            return (image.flip(-1) if flip else image), i, unreadable
        raise ValueError(f"`image_column` {self.image_column!r} has no readable image: {unreadable[0]}.")


def decode_value(value: dict | None, resolution: int, crop: tuple[float, float] | None = None) -> torch.Tensor:
    """What an undecoded column holds to uint8 `(3, resolution, resolution)`; raises one of [`UNREADABLE`]."""
    from datasets import Image as ImageFeature

    if value is None:
        raise ValueError("there is none")
    return decode_image(ImageFeature().decode_example(value), resolution, crop)


def row_name(row: int, value: dict | None, error: Exception) -> str:
    """How a row that cannot be read is named."""
    path = value.get("path") if isinstance(value, dict) else None
    return f"row {row} ({f'{path}: ' if path else ''}{type(error).__name__})"


def decode_all(
    dataset: "datasets.Dataset",
    image_column: str,
    resolution: int,
    skipped: SkippedRows | None = None,
    stand_in: bool = True,
) -> torch.Tensor:
    """Every image of a data set in one uint8 tensor `(num_images, 3, resolution, resolution)` in memory.

    An image that cannot be read is printed and counted in `skipped`. The next readable one stands in for it, so that
    images stay at the numbers of their rows; with `stand_in=False` it is left out.

    Raises:
        `ValueError`: none can be read.
    """
    images = torch.empty(len(dataset), 3, resolution, resolution, dtype=torch.uint8)
    decoded = DecodedImages(dataset, image_column, resolution)
    skipped = SkippedRows() if skipped is None else skipped
    kept = []
    for i in range(len(dataset)):
        images[i], row, unreadable = decoded[i]
        if stand_in or row == i:
            kept.append(i)
        for name in unreadable:
            skipped.add("an unreadable image", name)
    return images if len(kept) == len(images) else images[kept]


def _collate(rows: list[tuple]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    images, indices, unreadable = zip(*rows)
    return torch.stack(images), torch.tensor(indices), [name for names in unreadable for name in names]


def decoded_rows(
    dataset: "datasets.Dataset",
    batches_of_keys: Iterable[Sequence],
    image_column: str,
    resolution: int,
    device: torch.device,
    num_workers: int = 0,
    skipped: SkippedRows | None = None,
    first_row: int = 0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Decode images as they are needed, and say which rows they are from.

    Args:
        batches_of_keys: The keys of [`DecodedImages`] that make up each batch; may be endless. In training by several
            processes, the share of this one.
        device (`torch.device`): Where the images go, without waiting for the copy.
        num_workers (`int`, defaults to 0): Processes that decode ahead; 0 decodes in this one.
        skipped ([`SkippedRows`], *optional*): Counts the rows that cannot be read.
        first_row (`int`, defaults to 0): Number of the data set's first row where one is named.

    Yields:
        uint8 `(B, 3, resolution, resolution)` on `device` and int64 `(B,)` rows, those asked for except where another
        row stands in.
    """
    skipped = SkippedRows() if skipped is None else skipped
    loader = torch.utils.data.DataLoader(
        DecodedImages(dataset, image_column, resolution, first_row),
        batch_sampler=batches_of_keys,
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=torch.device(device).type == "cuda",
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator(),  # or it draws from the global one, and a resumed run from another state
    )
    for images, indices, unreadable in loader:
        for name in unreadable:
            skipped.add("an unreadable image", name)
        yield images.to(device, non_blocking=True), indices


def decoded_stream(
    rows: Iterable[tuple[dict, tuple[int, int]]],
    decode: Callable[[dict[str, Any], tuple[int, int]], torch.Tensor],
    num_threads: int,
    reason: str,
    skipped: SkippedRows,
) -> Iterator[tuple[dict, Any, tuple[int, int]]]:
    """Decode streamed rows, ahead in `num_threads` threads (0: none). Rows that `decode` cannot read are left out.

    Yields:
        The row, what `decode(row, place)` made of it, and its place; in the order of `rows`.

    Raises:
        `ValueError`: no row of a whole epoch can be read.
    """

    usable = UsableRows(skipped)

    def attempt(row, place):
        try:
            return decode(row, place), None
        except UNREADABLE as error:
            return None, error

    def result_of(row, place, outcome):
        decoded, error = outcome
        if error is None:
            usable.keep(place)
        else:
            usable.leave_out(row, place, reason)
        return decoded

    def submitted(pool):
        """The rows with their futures, of which up to 8 a thread are ahead."""
        ahead = deque()
        for row, place in rows:
            ahead.append((row, place, pool.submit(attempt, row, place)))
            if len(ahead) > 8 * num_threads:
                yield ahead.popleft()
        yield from ahead

    if num_threads == 0:
        for row, place in rows:
            if (decoded := result_of(row, place, attempt(row, place))) is not None:
                yield row, decoded, place
        return
    with ThreadPoolExecutor(num_threads) as pool:  # PIL and libjpeg decode outside of Python's lock
        for row, place, future in submitted(pool):
            if (decoded := result_of(row, place, future.result())) is not None:
                yield row, decoded, place


def to_pixel_values(images: torch.Tensor, flips: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 `(B, 3, H, W)` to float32 in [-1, 1], mirrored where `flips`, bool `(B,)`, is True."""
    pixel_values = images.float() / 127.5 - 1
    if flips is not None:
        pixel_values = torch.where(flips[:, None, None, None], pixel_values.flip(-1), pixel_values)
    return pixel_values
