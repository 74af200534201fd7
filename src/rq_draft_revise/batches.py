"""The batches of training, for ever: images for the first stage, codes and conditions for the second."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .code_cache import ReadCodes, encode
from .data import CODES_COLUMN, SkippedRows, is_empty, undecoded
from .decoded_images import decode_value, decoded_rows, decoded_stream, to_pixel_values
from .reading_order import UsableRows, streamed_rows, training_draws
from .rqvae import RQVAEModel


if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator


class Batch(NamedTuple):
    """One micro-batch of one process, on its device.

    Args:
        codes (`torch.Tensor` of shape `(B, h, w, D)`, int64).
        condition (`torch.Tensor` of shape `(B,)` or `(B, L)`, int64): Class labels or tokens; None without.
        place (`tuple[int, int]`): Of a stream: epoch, and rows of it that this process has read; else None.
    """

    codes: torch.Tensor
    condition: torch.Tensor | None
    place: tuple[int, int] | None = None


def stored_batches(
    read_codes: ReadCodes,
    conditions: torch.Tensor | None,
    num_images: int,
    start: int,
    batch_size: int,
    seed: int,
    accelerator: "Accelerator",
) -> Iterator[Batch]:
    """Batches of codes that are stored, in the order of [`training_draws`].

    Args:
        read_codes: From [`codes_in_memory`] or [`codes_in_dataset`].
        conditions (`torch.Tensor` of shape `(num_images,)` or `(num_images, L)`, *optional*).
        start (`int`): Images that all processes together have read so far.
    """
    processes = accelerator.process_index, accelerator.num_processes
    draws = training_draws(num_images, start, batch_size, *processes, seed)
    for rows, codes in one_ahead((rows, read_codes(rows, us[:, 0])) for rows, us in draws):
        condition = None if conditions is None else conditions[rows].to(accelerator.device).long()
        yield Batch(codes.to(accelerator.device), condition)


def one_ahead(endless: Iterator[Any]) -> Iterator[Any]:
    """The same items. A thread makes the next one, say by reading from the disk, while one is used."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, endless)
        while True:
            item = coming.result()
            coming = thread.submit(next, endless)
            yield item


def image_batches(
    dataset: "datasets.Dataset",
    conditions: torch.Tensor | None,
    vae: RQVAEModel,
    tau: float = 0.0,
    **images,
) -> Iterator[Batch]:
    """Batches that are decoded and encoded as they are needed, in the order of [`training_draws`].

    Where an image cannot be read, the next one that can stands in, with its own condition.

    Args:
        images: Of [`drawn_images`].
    """
    for pixels, rows, us in drawn_images(dataset, **images):
        codes = encode(vae, to_pixel_values(pixels), tau, seed=int(us[0, 0] * 2**53))
        condition = None if conditions is None else conditions[rows].to(pixels.device).long()
        yield Batch(codes, condition)


def drawn_images(
    dataset: "datasets.Dataset",
    image_column: str,
    resolution: int,
    start: int,
    batch_size: int,
    seed: int,
    accelerator: "Accelerator",
    random_flip: bool = False,
    random_crop: bool = False,
    num_workers: int = 0,
    skipped: SkippedRows | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Images that are decoded as they are needed, in the order of [`training_draws`].

    Where an image cannot be read, the next one that can stands in.

    Args:
        start (`int`): Images that all processes together have read so far.
        num_workers (`int`, defaults to 0): Processes that decode ahead.

    Yields:
        uint8 `(B, 3, resolution, resolution)` on the device, their rows `(B,)` int64 and their draws `(B, 3)`.
    """

    def draws():
        processes = accelerator.process_index, accelerator.num_processes
        return training_draws(len(dataset), start, batch_size, *processes, seed)

    keys = ([key_of(row, u, random_flip, random_crop) for row, u in zip(rows.tolist(), us)] for rows, us in draws())
    decoded = decoded_rows(dataset, keys, image_column, resolution, accelerator.device, num_workers, skipped)
    for (images, rows), (_, us) in zip(decoded, draws()):
        yield images, rows, us


def key_of(row: int, u, random_flip: bool, random_crop: bool) -> tuple:
    """A key of [`DecodedImages`] from a row and its three numbers of [`training_draws`]."""
    flip = bool(u[0] < 0.5) if random_flip else False
    return (row, flip, float(u[1]), float(u[2])) if random_crop else (row, flip)


def streamed_batches(
    dataset: "datasets.IterableDataset",
    condition_column: str | None,
    encode_conditions: Callable[[list], torch.Tensor] | None,
    vae: RQVAEModel,
    seed: int,
    accelerator: "Accelerator",
    tau: float = 0.0,
    **images,
) -> Iterator[Batch]:
    """Batches of a streamed data set, of images or of codes, in the order of [`streamed_rows`].

    Rows without a condition and images that cannot be read are left out.

    Args:
        encode_conditions: From the values of `condition_column` to a tensor `(B,)` or `(B, L)`.
        images: Of [`streamed_images`].
    """
    is_encoded = CODES_COLUMN in (dataset.column_names or ())
    streamed = streamed_images(
        dataset, seed=seed, accelerator=accelerator, condition_column=condition_column, **images
    )
    for codes, values, place in streamed:
        if not is_encoded:
            number = int(np.random.default_rng([seed, accelerator.process_index, *place, 1]).integers(2**62))
            codes = encode(vae, to_pixel_values(codes), tau, seed=number)
        condition = None
        if condition_column is not None:
            condition = encode_conditions(values).to(accelerator.device).long()
        yield Batch(codes, condition, place)


def streamed_images(
    dataset: "datasets.IterableDataset",
    image_column: str,
    resolution: int,
    start: tuple[int, int],
    batch_size: int,
    seed: int,
    accelerator: "Accelerator",
    random_flip: bool = False,
    random_crop: bool = False,
    num_workers: int = 0,
    buffer_size: int = 1000,
    skipped: SkippedRows | None = None,
    condition_column: str | None = None,
) -> Iterator[tuple[torch.Tensor, list, tuple[int, int]]]:
    """Images of a streamed data set, or its codes if it has been encoded, in the order of [`streamed_rows`].

    Images that cannot be read are left out, and rows without a value in `condition_column`.

    Args:
        start (`tuple[int, int]`): The place of the last batch before.
        num_workers (`int`, defaults to 0): Threads that decode ahead.

    Yields:
        uint8 `(B, 3, resolution, resolution)`, or codes `(B, h, w, D)` int64, on the device; the values of
        `condition_column`, None without one; the place in the stream after them.

    Raises:
        `ValueError`: no row of a whole epoch has a condition, or an image that can be read.
    """
    skipped = SkippedRows() if skipped is None else skipped
    is_encoded = CODES_COLUMN in (dataset.column_names or ())
    if not is_encoded:
        dataset = undecoded(dataset, image_column)

    def decode(row: dict[str, Any], place: tuple[int, int]) -> torch.Tensor:
        u = np.random.default_rng([seed, accelerator.process_index, *place]).random(3)
        if is_encoded:
            views = np.asarray(row[CODES_COLUMN], dtype=np.int64)  # (views, h, w, D)
            return torch.from_numpy(views[int(u[0] * len(views))])
        _, flip, *crop = key_of(0, u, random_flip, random_crop)
        image = decode_value(row[image_column], resolution, tuple(crop) or None)
        return image.flip(-1) if flip else image

    def rows_with_condition():
        processes = accelerator.process_index, accelerator.num_processes
        usable = UsableRows(skipped)
        for row, place in streamed_rows(dataset, seed, buffer_size, *processes, start):
            if condition_column is not None and is_empty(row[condition_column]):
                usable.leave_out(row, place, f"an empty {condition_column!r}")
            else:
                usable.keep(place)
                yield row, place

    tensors, values = [], []
    for row, tensor, place in decoded_stream(
        rows_with_condition(), decode, num_workers, "an unreadable image", skipped
    ):
        tensors.append(tensor)
        values.append(None if condition_column is None else row[condition_column])
        if len(tensors) == batch_size:
            yield torch.stack(tensors).to(accelerator.device), values, place
            tensors, values = [], []
