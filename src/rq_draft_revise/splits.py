"""The data of a run from its flags: training and validation splits, for the second stage as codes and conditions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from .batches import Batch, image_batches, stored_batches, streamed_batches
from .code_cache import cached_codes, codes_in_dataset, codes_in_memory, digest_of, encoded_rows
from .data import (
    CODES_COLUMN,
    VAE_COLUMN,
    SkippedRows,
    digest_of_rows,
    load_split,
    split_names,
    undecoded,
    without_empty,
)
from .rqvae import RQVAEModel
from .validation import ValidationSet
from .waiting import main_process_first


if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator


# A function from the values of a column, captions or labels, to `(n, L)` tokens or `(n,)` class ids.
EncodeConditions = Callable[[list], torch.Tensor]


def load_splits(
    args, accelerator: "Accelerator", condition_column: str | None = None, condition_name: str | None = None
) -> tuple["datasets.Dataset | datasets.IterableDataset", dict[str, "datasets.Dataset"]]:
    """The training split, and by name the validation splits, each of at most `--max_validation_images` rows.

    Args:
        args: The flags of [`add_data_flags`] and [`add_validation_flags`].
        condition_column (`str`, *optional*): Column of captions or labels.
        condition_name (`str`, *optional*): Its flag: `"caption_column"` or `"label_column"`.

    Raises:
        `ValueError`: see [`load_split`].
    """
    files = {name: getattr(args, name) for name in ("dataset_name", "train_data_dir", "data_files", "train_split",
                                                     "dataset_config_name")}  # fmt: skip
    load = partial(
        load_split, image_column=args.image_column, filter_column=args.filter_column, filter_min=args.filter_min,
        filter_max=args.filter_max, streaming=args.streaming,
        **({} if condition_name is None else {condition_name: condition_column}),
    )  # fmt: skip
    with main_process_first(accelerator):  # one process prepares the files that all then map
        train_dataset = load(args.train_split, split_argument="train_split", **files)
        if args.validation_data_files is not None:
            names, files = ["validation"], {"data_files": args.validation_data_files, "train_split": "validation"}
        elif args.validation_split is None:
            known = split_names(**files)
            names = [name for name in ("validation", "test") if name in known][:1]
            if not names:
                accelerator.print(f"No validation: of {known} no split is called validation or test.")
        else:
            names = [name for name in args.validation_split if name != "none"]
        validation_datasets = {name: load(name, split_argument="validation_split", **files) for name in names}
    for name, dataset in validation_datasets.items():
        validation_datasets[name] = first_rows(dataset, args.max_validation_images, args.image_column)
    return train_dataset, validation_datasets


def first_rows(dataset, num_rows: int, image_column: str) -> "datasets.Dataset":
    """The first rows of a split, streamed or not, to be read by number."""
    import datasets

    if isinstance(dataset, datasets.Dataset):
        return dataset.select(range(min(len(dataset), num_rows)))
    if CODES_COLUMN not in (dataset.column_names or ()):
        dataset = undecoded(dataset, image_column)
    return datasets.Dataset.from_list(list(dataset.take(num_rows)), features=dataset.features)


def seen_rows(dataset, num_rows: int, image_column: str) -> "datasets.Dataset":
    """Rows of the training split to set beside held-out ones: evenly spread over it, of a stream the first."""
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        return first_rows(dataset, num_rows, image_column)
    num_rows = min(len(dataset), num_rows)
    return dataset.select(np.linspace(0, len(dataset) - 1, num_rows).round().astype(int))


def check_codes_column(dataset, vae: RQVAEModel, config) -> None:
    """Refuse, with a `ValueError`, a data set of codes of another RQ-VAE or another shape."""
    row = next(iter(dataset.select_columns([name for name in (CODES_COLUMN, VAE_COLUMN) if name in dataset.features])))
    shape = np.asarray(row[CODES_COLUMN]).shape
    expected = (config.height, config.width, config.code_depth)
    if len(shape) != 4 or shape[1:] != expected:
        raise ValueError(
            f"Column {CODES_COLUMN!r} must hold (views, {', '.join(map(str, expected))}) codes, got {shape}."
        )
    if row.get(VAE_COLUMN) != digest_of(vae):
        raise ValueError(f"Column {CODES_COLUMN!r} must hold codes of this --vae, got those of another RQ-VAE.")


def check_no_views(args) -> None:
    """Refuse, with a `ValueError`, flags on the command line that are about encoding, where it has been done."""
    if args.cache_codes:
        raise ValueError(f"--cache_codes must not be given for a data set of codes (column {CODES_COLUMN!r}).")
    given = sorted({"tau", "num_draws", "random_crop", "random_flip"} & set(getattr(args, "_given", ())))
    if given:
        values = ", ".join(f"--{name} = {getattr(args, name)}" for name in given)
        raise ValueError(
            f"{' and '.join(f'--{name}' for name in given)} must not be given for a data set of codes (column "
            f"{CODES_COLUMN!r}), got {values}: its views were drawn by examples/encode_dataset.py."
        )


@dataclass
class BatchSource:
    """Where the batches of a run come from. Called, it gives them.

    Args:
        batches_from: Given how many images all processes have read, and this process's place in a stream, its endless
            batches from there on.
        digest (`str`, *optional*): Of the data, see [`digest_of_rows`]; None of a stream.
    """

    batches_from: Callable[[int, tuple[int, int]], Iterator[Batch]]
    digest: str | None = None

    def __call__(self, images_seen: int, place: tuple[int, int]) -> Iterator[Batch]:
        return self.batches_from(images_seen, place)


def training_batches(
    args,
    accelerator: "Accelerator",
    dataset: "datasets.Dataset | datasets.IterableDataset",
    vae: RQVAEModel,
    config,
    condition_column: str | None,
    encode_conditions: EncodeConditions | None,
    skipped: SkippedRows,
) -> tuple[BatchSource, int | None]:
    """Where batches come from: a stream, a data set of codes, codes cached in memory, or images as they are needed.

    Args:
        config: The transformer's.

    Returns:
        The source, and the number of training images, if known.

    Raises:
        `ValueError`: codes of another RQ-VAE or shape, flags of views for codes, a stream that is to be cached.
    """
    import datasets

    is_encoded = CODES_COLUMN in dataset.features if dataset.features is not None else False
    if is_encoded:
        check_codes_column(dataset, vae, config)
        check_no_views(args)
    common = dict(batch_size=args.train_batch_size, seed=args.seed, accelerator=accelerator)
    views = dict(random_flip=args.random_flip, random_crop=args.random_crop, tau=args.tau)
    images = dict(image_column=args.image_column, resolution=args.resolution, num_workers=args.dataloader_num_workers)

    if not isinstance(dataset, datasets.Dataset):
        if args.cache_codes:
            raise ValueError("--cache_codes needs a data set that is not streamed; examples/encode_dataset.py encodes "
                             "a stream into a data set of codes.")  # fmt: skip

        def batches_from(images_seen: int, place: tuple[int, int]) -> Iterator[Batch]:
            return streamed_batches(
                dataset, condition_column, encode_conditions, vae, start=place, buffer_size=args.shuffle_buffer_size,
                skipped=skipped, **images, **views, **common,
            )  # fmt: skip

        return BatchSource(batches_from), num_streamed(dataset, args)

    conditions = values = None
    if condition_column is not None:
        dataset = without_empty(dataset, condition_column, skipped)
        values = dataset[condition_column][:]
        conditions = encode_conditions(values)
    digest = digest_of_rows(dataset, args.image_column, values)

    if not is_encoded and not args.cache_codes:

        def batches_from(images_seen: int, place: tuple[int, int]) -> Iterator[Batch]:
            return image_batches(
                dataset, conditions, vae, start=images_seen, skipped=skipped, **images, **views, **common
            )

        return BatchSource(batches_from, digest), len(dataset)

    if is_encoded:
        read_codes, num_images = codes_in_dataset(dataset), len(dataset)
    else:
        rows, codes = cached_codes(
            dataset, vae, f"{args.output_dir}/codes.safetensors", accelerator, skipped,
            batch_size=args.encoding_batch_size, num_draws=args.num_draws, seed=args.seed, **images, **views,
        )  # fmt: skip
        read_codes, num_images = codes_in_memory(codes), len(rows)
        conditions = None if conditions is None else conditions[rows]

    def batches_from(images_seen: int, place: tuple[int, int]) -> Iterator[Batch]:
        return stored_batches(read_codes, conditions, num_images, images_seen, **common)

    return BatchSource(batches_from, digest), num_images


def num_streamed(dataset: "datasets.IterableDataset", args) -> int | None:
    """Rows of a stream, if its data set says so and no filter makes them fewer."""
    splits = dataset.info.splits or {}
    if args.filter_column is not None or args.train_split not in splits:
        return None
    return splits[args.train_split].num_examples or None


def validation_sets_of(
    args,
    accelerator: "Accelerator",
    train_dataset: "datasets.Dataset | datasets.IterableDataset",
    validation_datasets: dict[str, "datasets.Dataset"],
    vae: RQVAEModel,
    config,
    condition_column: str | None,
    encode_conditions: EncodeConditions | None,
) -> dict[str, ValidationSet]:
    """Codes and conditions of the validation splits, and as "seen" of as many training images, for the gap between."""
    from accelerate.utils import gather_object

    if not validation_datasets:
        return {}
    count = max(map(len, validation_datasets.values()))
    seen = seen_rows(train_dataset, count, args.image_column)

    validation_sets = {}
    for name, dataset in {**validation_datasets, "seen": seen}.items():
        skipped = SkippedRows(f"validation split {name!r}")
        if condition_column is not None:
            dataset = without_empty(dataset, condition_column, skipped)
        conditions = None if condition_column is None else encode_conditions(dataset[condition_column][:])
        if CODES_COLUMN in dataset.features:
            check_codes_column(dataset, vae, config)
            rows = torch.arange(len(dataset))
            codes = codes_in_dataset(dataset)(rows, torch.zeros(len(rows), dtype=torch.float64))
        else:
            own = range(accelerator.process_index, len(dataset), accelerator.num_processes)
            encoded = encoded_rows(
                dataset, vae, args.image_column, args.resolution, own, accelerator.device, args.encoding_batch_size,
                num_workers=args.dataloader_num_workers, skipped=skipped,
            )  # fmt: skip
            own = [(row, codes[i, 0].numpy()) for rows, codes in encoded for i, row in enumerate(rows)]
            parts = sorted(gather_object(own), key=lambda part: part[0])
            if not parts:
                raise ValueError(f"No image of the split {name!r} can be read.")
            rows = torch.tensor([row for row, _ in parts])
            codes = torch.from_numpy(np.stack([codes for _, codes in parts]))
        validation_sets[name] = ValidationSet(codes, None if conditions is None else conditions[rows])
    return validation_sets
