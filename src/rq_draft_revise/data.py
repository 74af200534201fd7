"""Training data: splits, their images as pixels, captions and labels as ids, and the endless order of training.

Loading needs `datasets`, of the `train` extra, imported where it is used: `import rq_draft_revise` does without.
"""

import hashlib
import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .conditions import names_to_ids, unknown_token_id
from .images import to_rgb, to_square
from .interruption import ignore_stop_signals


if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


# The last part of a file's name -> the builder of `datasets` that reads it.
BUILDERS = {
    "arrow": "arrow",
    "csv": "csv",
    "json": "json",
    "jsonl": "json",
    "parquet": "parquet",
    "tar": "webdataset",
}

# What each source of images must be, to be filled with what it is and why that will not do.
SOURCES = {
    "dataset_name": "a local folder, or a data set of the Hub that can be reached and read (a gated one after "
    "`hf auth login`), got {}. Local images are given by `train_data_dir` or `data_files`.",
    "train_data_dir": "a folder of images, got {}.",
    "data_files": "files that there are, got {}.",
}

# What `examples/encode_dataset.py` writes. A data set with codes needs no images.
CODES_COLUMN = "codes"
VAE_COLUMN = "vae"  # digest of the RQ-VAE whose codes they are

# What decoding a damaged or missing image raises. PIL's UnidentifiedImageError is an OSError.
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, zlib.error,
              Image.DecompressionBombError)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- loading


def load_split(
    split: str,
    image_column: str | None = "image",
    caption_column: str | None = None,
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    data_files: Sequence[str] | None = None,
    train_split: str = "train",
    label_column: str | None = None,
    dataset_config_name: str | None = None,
    streaming: bool = False,
    filter_column: str | None = None,
    filter_min: float | None = None,
    filter_max: float | None = None,
    split_argument: str = "split",
) -> "datasets.Dataset | datasets.IterableDataset":
    """One split of a data set of images, from the first source that is given.

    Local files are read as they are now. `datasets` keeps a copy of what it has read, and for a folder with a README
    that lists its splits it looks that copy up by the patterns in the README alone: after the files have been rebuilt
    it returns the old rows. Here the copy of local files lies in a cache folder named by their paths, sizes and times
    (under `datasets.config.HF_DATASETS_CACHE`; copies of former states stay until they are deleted).

    Args:
        split (`str`): Name of the split, also in the slicing notation of `datasets`: `"train[:90%]"`.
        image_column (`str`, *optional*, defaults to `"image"`): Column of the images. Paths or bytes in it are read as
            images. Not needed in a data set with a column `codes`, which has been encoded already.
        caption_column (`str`, *optional*): Column of the captions, if there have to be any.
        dataset_name (`str`, *optional*): Hub id, or a local folder that `datasets.load_dataset` reads; `data_files`
            then chooses among its files.
        train_data_dir (`str`, *optional*): Folder of images, with captions in a `metadata.csv` or `.jsonl`, or with a
            subfolder a class.
        data_files (`list[str]`, *optional*): Files, all of one kind, which together are the split `train_split`;
            patterns and addresses too.
        train_split (`str`, defaults to `"train"`): What the split in `data_files` is called.
        label_column (`str`, *optional*): Column of the class labels, if there have to be any.
        dataset_config_name (`str`, *optional*): Configuration of a data set that has several.
        streaming (`bool`, defaults to `False`): Read while training instead of preparing all first.
        filter_column (`str`, *optional*): Column of numbers by which rows are chosen; `"json.width"` is the field
            `width` of the column `json`. A row without a number is dropped.
        filter_min (`float`, *optional*), filter_max (`float`, *optional*): Keep rows whose number is at least, at most
            this.
        split_argument (`str`, defaults to `"split"`): What the caller calls `split`, for the error about it.

    Returns:
        The `datasets.Dataset`, or `datasets.IterableDataset` if streaming; its rows hold a PIL image in
        `image_column`.

    Raises:
        `ValueError`: no source, one that cannot be reached, files of an unknown kind, an unknown column, an unknown or
            empty split, a filter that leaves nothing.
    """
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    if dataset_name is not None:
        source, given = "dataset_name", dataset_name
        location = {"path": dataset_name, "name": dataset_config_name, "data_files": data_files}
    elif train_data_dir is not None:
        source, given = "train_data_dir", train_data_dir
        location = {"path": "imagefolder", "data_dir": train_data_dir}
    elif data_files:
        source, given = "data_files", [str(file) for file in data_files]
        kinds = {file.rsplit(".", 1)[-1] for file in given}
        if len(kinds) > 1 or not kinds <= set(BUILDERS):
            raise ValueError(f"`data_files` must all end in the same one of {sorted(BUILDERS)}, got {sorted(kinds)}.")
        # "train[:90%]" is of "train"
        location = {"path": BUILDERS[kinds.pop()], "data_files": {train_split.split("[")[0]: given}}
    else:
        raise ValueError("Give the images by `dataset_name`, `train_data_dir` or `data_files`, got none of them.")
    state = local_state(given if source == "data_files" else [given])
    try:
        dataset = load_dataset(**location, cache_dir=cache_folder(state), split=split, streaming=streaming)
    except (ConnectionError, FileNotFoundError) as error:  # no network, no such data set or file, a gated one
        missing = source == "train_data_dir" and not os.path.exists(given)
        why = "there is no such folder" if missing else error
        raise ValueError(f"`{source}` must be " + SOURCES[source].format(f"{given!r}: {why}")) from error
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"`{split_argument}` must have rows, got {split!r} of {given!r} with none.") from error
        if not str(error).startswith(("Unknown split", "Bad split")):  # of a stream
            raise
        known = split_names(dataset_name, train_data_dir, data_files, train_split, dataset_config_name)
        raise ValueError(f"`{split_argument}` must be of {known}, got {split!r} of {given!r}.") from error
    if state is not None and not streaming:
        # The fingerprint, by which others cache what they compute from the rows, leaves the cache folder out.
        dataset._fingerprint = hashlib.sha256(f"{state} {dataset._fingerprint}".encode()).hexdigest()[:16]

    columns = dataset.column_names or list(next(iter(dataset)))
    is_encoded = CODES_COLUMN in columns
    for name, column in (
        ("image_column", None if is_encoded else image_column),
        ("caption_column", caption_column),
        ("label_column", label_column),
        ("filter_column", None if filter_column is None else filter_column.split(".")[0]),
    ):
        if column is not None and column not in columns:
            raise ValueError(f"`{name}` must be one of {columns}, got {column!r}.")
    has_images = image_column is not None and not is_encoded
    if has_images:
        dataset = undecoded(dataset, image_column)  # or a filter would decode every image of a stream
    if filter_column is not None:
        dataset = _filtered(dataset, filter_column, filter_min, filter_max)
    return dataset.cast_column(image_column, ImageFeature()) if has_images else dataset


def local_state(paths: Sequence[str]) -> str | None:
    """A digest of the names, sizes and times of local files, or of all files in local folders; None if none is local.

    Times are in nanoseconds: a file rewritten with the same size is another file.
    """
    files = set()
    for path in map(str, paths):
        for found in [path] if os.path.exists(path) else glob(path, recursive=True):
            if os.path.isdir(found):
                files.update(os.path.join(folder, name) for folder, _, names in os.walk(found) for name in names)
            else:
                files.add(found)
    stats = [(os.path.abspath(file), os.stat(file)) for file in sorted(files)]
    lines = [f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] if lines else None


def digest_of_rows(
    dataset: "datasets.Dataset", image_column: str, conditions: Iterable | None = None, num_rows: int = 256
) -> str:
    """SHA-256 of what a run trains on, to tell when its data have changed: the number of rows, all `conditions`
    (captions or labels), and the images, or codes, of `num_rows` rows spread evenly over the data set.

    Of the bytes alone: names, times and the version of `datasets` make no difference, so that a copy is the same.
    """
    digest = hashlib.sha256(f"{len(dataset)}".encode())
    for condition in () if conditions is None else conditions:
        digest.update(f"\0{condition}".encode())
    is_encoded = CODES_COLUMN in dataset.column_names
    column = CODES_COLUMN if is_encoded else image_column
    rows = dataset.select_columns([column])
    rows = rows if is_encoded else undecoded(rows, column)
    for i in np.linspace(0, len(dataset) - 1, min(len(dataset), num_rows)).round().astype(int).tolist():
        value = rows[i][column]
        digest.update(np.asarray(value, dtype=np.int64).tobytes() if is_encoded else _bytes_of(value))
    return digest.hexdigest()


def _bytes_of(value: dict | None) -> bytes:
    """Of an undecoded image; none of one that is missing."""
    value = value or {}
    if value.get("bytes") is not None or value.get("path") is None:
        return value.get("bytes") or b""
    try:
        with open(value["path"], "rb") as file:
            return file.read()
    except OSError:
        return b""


def cache_folder(state: str | None) -> str | None:
    """Where `datasets` is to keep its copy of local files in this state; None is its usual place."""
    import datasets

    return None if state is None else os.path.join(datasets.config.HF_DATASETS_CACHE, "local", state)


def split_names(
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    data_files: Sequence[str] | None = None,
    train_split: str = "train",
    dataset_config_name: str | None = None,
) -> list[str]:
    """Names of the splits that a source has; see [`load_split`]."""
    from datasets import get_dataset_split_names

    if dataset_name is not None:
        return get_dataset_split_names(dataset_name, dataset_config_name, data_files=data_files)
    if train_data_dir is not None:
        return get_dataset_split_names("imagefolder", data_dir=train_data_dir)
    return [train_split.split("[")[0]]


def value_of(row: dict[str, Any], column: str) -> Any:
    """A row's value in `column`, or in a field of a column: `"json.width"`. None where it has none."""
    name, *fields = column.split(".")
    value = row[name]
    for field in fields:
        value = value.get(field) if isinstance(value, dict) else None
    return value


def _filtered(dataset, column: str, least: float | None, most: float | None):
    if least is None and most is None:
        raise ValueError(f"`filter_column` {column!r} needs `filter_min`, `filter_max` or both, got neither.")

    def is_wanted(value) -> bool:
        if not isinstance(value, (int, float)):
            return False
        return (least is None or value >= least) and (most is None or value <= most)  # False for NaN

    if not hasattr(dataset, "select"):
        return dataset.filter(lambda row: is_wanted(value_of(row, column)))
    rows = dataset.select_columns([column.split(".")[0]])
    wanted = [i for i, row in enumerate(rows) if is_wanted(value_of(row, column))]
    if not wanted:
        raise ValueError(f"`filter_column` {column!r} within [{least}, {most}] leaves none of {len(dataset):,} rows.")
    return dataset.select(wanted)


# ---------------------------------------------------------------------------------------------------------- skipping


class SkippedRows:
    """The rows that are left out, counted and named, by reason. Each is printed once, the first few of a reason.

    Args:
        name (`str`): Of the data set, to name a row by.
        shown (`int`, defaults to 10): Rows of a reason that are printed.
    """

    def __init__(self, name: str = "the data set", shown: int = 10):
        self.name, self.shown = name, shown
        self.rows: dict[str, dict[str, None]] = {}
        self._in_epoch: dict[str, tuple[int, int]] = {}  # by reason: an epoch, and how many rows of it

    def add(self, reason: str, row: str, epoch: int | None = None) -> None:
        """Leave out `row`; a second time changes nothing.

        Pass `epoch` where a row's name changes between epochs: the largest count of any one epoch is then reported.
        """
        rows = self.rows.setdefault(reason, {})
        key = row
        if epoch is not None:
            last, count = self._in_epoch.get(reason, (epoch, 0))
            count = count + 1 if epoch == last else 1
            self._in_epoch[reason] = epoch, count
            key = f"number {count} of an epoch"
        if key in rows:
            return
        rows[key] = None
        if len(rows) <= self.shown:
            more = " (further ones are only counted)" if len(rows) == self.shown else ""
            print(f"Skipped: {reason}, {row} of {self.name}{more}", flush=True)

    def __len__(self) -> int:
        return sum(map(len, self.rows.values()))

    def __str__(self) -> str:
        return ", ".join(f"{len(rows):,} with {reason}" for reason, rows in self.rows.items()) or "none"


def is_empty(value: Any) -> bool:
    """Whether a caption or label is missing: None, or a text of white space."""
    return value is None or (isinstance(value, str) and not value.strip())


def without_empty(dataset: "datasets.Dataset", column: str, skipped: SkippedRows) -> "datasets.Dataset":
    """The rows that have a value in `column`; the others are counted.

    Raises:
        `ValueError`: no row has one.
    """
    values = dataset[column][:]
    kept = [i for i, value in enumerate(values) if not is_empty(value)]
    if len(kept) == len(values):
        return dataset
    for i in sorted(set(range(len(values))).difference(kept)):
        skipped.add(f"an empty {column!r}", f"row {i}")
    if not kept:
        raise ValueError(f"Column {column!r} must have values, but all {len(values):,} rows are empty.")
    return dataset.select(kept)


# -------------------------------------------------------------------------------------------------------- conditions


def class_labels_of(labels: list[int], num_classes: int, class_ids: list[int] | None = None) -> torch.Tensor:
    """Class labels to `(n,)` int64.

    Args:
        num_classes (`int`): Of the transformer.
        class_ids (`list[int]`, *optional*): Which of them each label of the data stands for, of [`matched_classes`].

    Raises:
        `ValueError`: a label that is no integer in [0, num_classes), such as the null class.
    """
    allowed = num_classes if class_ids is None else len(class_ids)
    wrong = [label for label in labels if not isinstance(label, int) or not 0 <= label < allowed]
    if wrong:
        raise ValueError(
            f"--label_column must hold integers in [0, {allowed - 1}], the classes of the transformer, got "
            f"{wrong[0]!r}."
        )
    return torch.tensor(labels if class_ids is None else [class_ids[label] for label in labels], dtype=torch.int64)


def label_names(dataset: "datasets.Dataset | datasets.IterableDataset", label_column: str) -> list[str] | None:
    """The names of the labels by number, if the column has them."""
    return getattr((dataset.features or {}).get(label_column), "names", None)


def matched_classes(
    dataset: "datasets.Dataset | datasets.IterableDataset",
    label_column: str,
    id2label: dict[int, str] | None,
    print: Callable[[str], None] = print,
) -> list[int] | None:
    """Which class of a trained pipeline each label of the data stands for, by their names.

    Args:
        id2label (`dict[int, str]`, *optional*): The pipeline's names.
        print (`Callable`): Told where the numbers differ, and where the names do.

    Returns:
        A class for each label; None to take the labels as they are, if one of both has no names or a name of the data
        is none of the pipeline's.
    """
    names = label_names(dataset, label_column)
    if names is None or id2label is None:
        return None
    try:
        class_ids = names_to_ids(list(names), id2label)
    except ValueError:
        renamed = [f"{label} ({id2label.get(label)!r}) is to be {name!r}" for label, name in enumerate(names)]
        print(f"Warning: the data have other classes than the trained pipeline: {shortened(renamed)}.")
        return None
    moved = [f"{name!r} is class {i}" for label, (name, i) in enumerate(zip(names, class_ids)) if label != i]
    if moved:
        print(f"Classes are the trained pipeline's, by their names: {shortened(moved)}.")
    return class_ids


def shortened(items: list[str], shown: int = 5) -> str:
    """The first of several, and how many more there are."""
    more = len(items) - shown
    return ", ".join(items[:shown]) + (f" and {more:,} more" if more > 0 else "")


def input_ids_of(
    captions: list[str], tokenizer: "PreTrainedTokenizerBase", max_text_length: int, text_vocab_size: int
) -> torch.Tensor:
    """Captions to `(n, max_text_length)` int32, padded to full length: the model reads the padding as text.

    Raises:
        `ValueError`: a caption that is no text, or a token of `text_vocab_size` or more.
    """
    wrong = [caption for caption in captions if not isinstance(caption, str)]
    if wrong:
        raise ValueError(f"--caption_column must hold texts, got {wrong[0]!r}.")
    settings = dict(padding="max_length", truncation=True, max_length=max_text_length)
    chunks = [captions[i : i + 10_000] for i in range(0, len(captions), 10_000)]
    ids = np.concatenate([np.array(tokenizer(chunk, **settings).input_ids, np.int32) for chunk in chunks])
    if ids.max() >= text_vocab_size:
        raise ValueError(
            f"`tokenizer` must have tokens in [0, {text_vocab_size - 1}], those of the transformer, got {ids.max()}."
        )
    return torch.from_numpy(ids)


def describe_captions(
    captions: list[str],
    tokenizer: "PreTrainedTokenizerBase",
    max_text_length: int,
    print: Callable[[str], None] = print,
) -> None:
    """Print how many captions the model does not read as they are: cut ones, and those with words that the tokenizer
    does not know."""
    captions = [caption for caption in captions if isinstance(caption, str)]
    unknown, tokens = unknown_token_id(tokenizer), tokenizer(captions).input_ids if captions else []
    cut = [caption for caption, ids in zip(captions, tokens) if len(ids) > max_text_length]
    poor = [caption for caption, ids in zip(captions, tokens) if unknown in ids]
    for some, what in (
        (cut, f"of which the model reads the first {max_text_length} tokens"),
        (poor, "with words that the tokenizer does not know, and reads as one and the same"),
    ):
        if some:
            print(f"{len(some):,} of {len(captions):,} captions {what}, such as {some[0]!r}")


def input_ids_sha256(
    captions: list[str], tokenizer: "PreTrainedTokenizerBase", max_text_length: int, text_vocab_size: int
) -> str:
    """Digest of what a transformer sees of captions, each counted once: a tokenizer's files say that in many ways."""
    ids = input_ids_of(list(dict.fromkeys(captions)), tokenizer, max_text_length, text_vocab_size)
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------------- decoding


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


def undecoded(dataset, image_column: str):
    """The same data set with its images as bytes or paths, so that one that is damaged stops nobody."""
    from datasets import Image as ImageFeature

    return dataset.cast_column(image_column, ImageFeature(decode=False))


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


def to_pixel_values(images: torch.Tensor, flips: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 `(B, 3, H, W)` to float32 in [-1, 1], mirrored where `flips`, bool `(B,)`, is True."""
    pixel_values = images.float() / 127.5 - 1
    if flips is not None:
        pixel_values = torch.where(flips[:, None, None, None], pixel_values.flip(-1), pixel_values)
    return pixel_values


# ------------------------------------------------------------------------------------------------------------- order


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


# --------------------------------------------------------------------------------------------------------- streaming


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
    files is a multiple of `num_processes` each process reads its own files, otherwise each reads all and takes every
    `num_processes`-th row.

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
