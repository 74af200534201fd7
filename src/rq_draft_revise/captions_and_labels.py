"""Captions and labels of a data set, as the transformer's tokens and class ids."""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from .conditions import names_to_ids, unknown_token_id


if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


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
