"""Training data: the splits of a data set, their images as pixels, and the endless order in which training reads them.

Loading needs `datasets`, of the `train` extra, imported where it is used: `import rq_draft_revise` does without.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image


if TYPE_CHECKING:
    import datasets


# The last part of a file's name -> the builder of `datasets` that reads it.
BUILDERS = {
    "arrow": "arrow",
    "csv": "csv",
    "json": "json",
    "jsonl": "json",
    "parquet": "parquet",
    "tar": "webdataset",
}


def load_split(
    split: str,
    image_column: str = "image",
    caption_column: str | None = None,
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    data_files: Sequence[str] | None = None,
    train_split: str = "train",
) -> "datasets.Dataset":
    """One split of a data set of images, from the first source that is given.

    Args:
        split (`str`): Name of the split, also in the slicing notation of `datasets`: `"train[:90%]"`.
        image_column (`str`, defaults to `"image"`): Column of the images. Paths or bytes in it are read as images.
        caption_column (`str`, *optional*): Column of the captions, if there have to be any.
        dataset_name (`str`, *optional*): Hub id, or a local folder that `datasets.load_dataset` reads; `data_files`
            then chooses among its files.
        train_data_dir (`str`, *optional*): Folder of images, with captions in a `metadata.csv` or `.jsonl`.
        data_files (`list[str]`, *optional*): Files, all of one kind, which together are the split `train_split`.
        train_split (`str`, defaults to `"train"`): What the split in `data_files` is called.

    Returns:
        The `datasets.Dataset`; its rows hold a PIL image in `image_column`.

    Raises:
        `ValueError`: no source, files of an unknown kind, an unknown column, an unknown or empty split.
    """
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    if dataset_name is not None:
        dataset = load_dataset(dataset_name, data_files=data_files, split=split)
    elif train_data_dir is not None:
        dataset = load_dataset("imagefolder", data_dir=train_data_dir, split=split)
    elif data_files:
        kinds = {str(file).rsplit(".", 1)[-1] for file in data_files}
        if len(kinds) > 1 or not kinds <= set(BUILDERS):
            raise ValueError(f"`data_files` must all end in the same one of {sorted(BUILDERS)}, got {sorted(kinds)}.")
        dataset = load_dataset(BUILDERS[kinds.pop()], data_files={train_split: data_files}, split=split)
    else:
        raise ValueError("Give the images by `dataset_name`, `train_data_dir` or `data_files`, got none of them.")

    for name, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column is not None and column not in dataset.column_names:
            raise ValueError(f"`{name}` must be one of {dataset.column_names}, got {column!r}.")
    if not isinstance(dataset.features[image_column], ImageFeature):
        dataset = dataset.cast_column(image_column, ImageFeature())
    return dataset


def decode_image(image: Image.Image, resolution: int) -> torch.Tensor:
    """PIL image to RGB uint8 `(3, resolution, resolution)`: shorter side resized (Lanczos), then the center cropped.

    Everything stays uint8 until it is on the training device: a quarter of the memory and of the transfer.
    """
    image = image.convert("RGB")
    if image.size != (resolution, resolution):
        scale = resolution / min(image.size)
        width, height = (max(resolution, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        left, top = (width - resolution) // 2, (height - resolution) // 2
        image = image.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode_all(dataset: "datasets.Dataset", image_column: str, resolution: int) -> torch.Tensor:
    """Every image of a data set in one uint8 tensor `(num_images, 3, resolution, resolution)` in memory."""
    images = torch.empty(len(dataset), 3, resolution, resolution, dtype=torch.uint8)
    for i, row in enumerate(dataset.select_columns([image_column])):
        images[i] = decode_image(row[image_column], resolution)
    return images


def _decode_rows(rows: list[dict], image_column: str, resolution: int) -> torch.Tensor:
    return torch.stack([decode_image(row[image_column], resolution) for row in rows])


def decoded_batches(
    dataset: "datasets.Dataset",
    batches_of_indices: Iterable[Sequence[int]],
    image_column: str,
    resolution: int,
    device: torch.device,
    num_workers: int = 0,
) -> Iterator[torch.Tensor]:
    """Decode images as they are needed.

    Args:
        batches_of_indices: Which images make up each batch, for example from [`training_order`]; may be endless. In
            training by several processes, the share of this one.
        device (`torch.device`): Where the batches go, without waiting for the copy.
        num_workers (`int`, defaults to 0): Processes that decode ahead; 0 decodes in this one.

    Yields:
        uint8 `(B, 3, resolution, resolution)` on `device`, one for each batch of indices.
    """
    loader = torch.utils.data.DataLoader(
        dataset.select_columns([image_column]),
        batch_sampler=batches_of_indices,
        # No lambda: where workers are not forked, this is pickled.
        collate_fn=partial(_decode_rows, image_column=image_column, resolution=resolution),
        num_workers=num_workers,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # or it draws from the global one, and a resumed run from another state
    )
    for images in loader:
        yield images.to(device, non_blocking=True)


def to_pixel_values(images: torch.Tensor, flips: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 `(B, 3, H, W)` to float32 in [-1, 1], mirrored where `flips`, bool `(B,)`, is True."""
    pixel_values = images.float() / 127.5 - 1
    if flips is not None:
        pixel_values = torch.where(flips[:, None, None, None], pixel_values.flip(-1), pixel_values)
    return pixel_values


def training_order(
    num_images: int, start: int, batch_size: int, process_index: int, num_processes: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The micro-batches of one process, for ever.

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
        indices `(batch_size,)` int64 in `[0, num_images)`, and whether to mirror each image, `(batch_size,)` bool, a
        fair coin thrown anew each epoch.

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
        flips = np.concatenate([flips[places] for (_, flips), places in parts])
        yield torch.from_numpy(indices), torch.from_numpy(flips)


def _draw_epoch(num_images: int, epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng([seed, epoch])
    return random.permutation(num_images), random.random(num_images) < 0.5
