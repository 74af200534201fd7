"""Splits of data sets, from folders, files and the Hub, and what is left out of them.

Loading needs `datasets`, of the `train` extra, imported where it is used: `import rq_draft_revise` does without.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from glob import glob
from typing import TYPE_CHECKING, Any

import numpy as np


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


def undecoded(dataset, image_column: str):
    """The same data set with its images as bytes or paths, so that one that is damaged stops nobody."""
    from datasets import Image as ImageFeature

    return dataset.cast_column(image_column, ImageFeature(decode=False))


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
