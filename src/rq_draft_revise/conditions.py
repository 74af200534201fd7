"""What an image is drawn from: prompts and classes as a caller gives them, checked and turned into ids."""

import torch
from diffusers.utils import logging
from transformers import PreTrainedTokenizerBase

from .sampling import is_integer


logger = logging.get_logger(__name__)


def integer_labels(id2label: dict | None) -> dict[int, str] | None:
    """`id2label` with the integer keys that JSON does not have."""
    return None if id2label is None else {int(label): name for label, name in id2label.items()}


def recorded_tokenizer(components: dict) -> dict:
    """What `model_index.json` is to say of the components. transformers 5 renamed `PreTrainedTokenizerFast` to
    `TokenizersBackend`; the old name is recorded, which both versions load.
    """
    if components.get("tokenizer") == ("transformers", "TokenizersBackend"):
        return components | {"tokenizer": ("transformers", "PreTrainedTokenizerFast")}
    return components


def names_to_ids(label: str | list[str], id2label: dict[int, str] | None, argument: str = "label") -> list[int]:
    """Class ids of names.

    Args:
        label (`str` or `list[str]`): Names, in any case.
        id2label (`dict[int, str]`, *optional*): Names of each class, alternatives separated by commas.
        argument (`str`): The argument's name in the error message.

    Raises:
        `ValueError`: there is no `id2label`, a name is not in it or may mean several classes, or `label` is no name.
    """
    labels = [label] if isinstance(label, str) else label
    if not isinstance(labels, (list, tuple)) or not all(isinstance(name, str) for name in labels):
        raise ValueError(f"`{argument}` must be a name or a list of names, got {label!r}.")
    if id2label is None:
        raise ValueError(
            f"`{argument}` by name needs a pipeline with `id2label`, and this one has none: give class ids, got "
            f"{label!r}."
        )
    ids = _ids_by_name(id2label)
    unknown = [name for name in labels if name.strip().lower() not in ids]
    if unknown:
        examples = ", ".join(sorted(ids)[:5]) + (", ..." if len(ids) > 5 else "")
        raise ValueError(f"`{argument}` must be names in `pipe.config.id2label` ({examples}), got {unknown}.")
    found = [ids[name.strip().lower()] for name in labels]
    for name, candidates in zip(labels, found, strict=True):
        if len(candidates) > 1:
            classes = " or ".join(f"{i} ({id2label[i]!r})" for i in candidates)
            raise ValueError(
                f"`{argument}` must say which class it means: {name!r} may be {classes}. Give a name that only one of "
                "them has, or the id."
            )
    return [candidates[0] for candidates in found]


def _ids_by_name(id2label: dict[int, str]) -> dict[str, list[int]]:
    """Every name in lower case, with the classes it may mean: those whose whole entry it is, else its synonyms.

    In ImageNet "harp" is a class, and the harmonica is called one too: the first is meant.
    """
    synonyms, entries = {}, {}
    for i, names in id2label.items():
        entries.setdefault(names.strip().lower(), []).append(i)
        for name in {name.strip().lower() for name in names.split(",")}:
            synonyms.setdefault(name, []).append(i)
    return synonyms | entries


def class_ids(
    class_labels: int | str | list[int | str] | torch.Tensor, id2label: dict[int, str] | None = None
) -> list[int]:
    """Ids of labels given as an id, a name, a tensor, or a list of ids and names.

    Raises:
        `ValueError`: anything else, or a name that [`names_to_ids`] refuses.
    """
    if isinstance(class_labels, torch.Tensor):
        if class_labels.is_floating_point() or class_labels.ndim > 1:
            raise ValueError(
                f"`class_labels` must be integers of shape (batch_size,), got {class_labels.dtype} "
                f"of shape {tuple(class_labels.shape)}."
            )
        class_labels = class_labels.tolist()
    labels = list(class_labels) if isinstance(class_labels, (list, tuple)) else [class_labels]
    if not labels:
        raise ValueError(f"`class_labels` must not be empty, got {class_labels!r}.")
    ids = []
    for label in labels:
        if isinstance(label, str):
            ids += names_to_ids(label, id2label, argument="class_labels")
        elif is_integer(label):
            ids.append(int(label))
        else:
            raise ValueError(f"`class_labels` must be ids or names of classes, got {label!r}.")
    return ids


def unknown_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands for words out of the vocabulary, if it has no other meaning (in CLIP's it is the end)."""
    token = tokenizer.unk_token_id
    return None if token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) else token


def tokenize(
    prompt: str | list[str], tokenizer: PreTrainedTokenizerBase, max_text_length: int, text_vocab_size: int
) -> torch.Tensor:
    """Token ids `(number of prompts, max_text_length)`, padded and truncated to that length.

    A prompt that is cut, or has words that the tokenizer does not know, is logged as a warning.

    Raises:
        `ValueError`: a token of `text_vocab_size` or more, which the transformer does not know.
    """
    prompt = [prompt] if isinstance(prompt, str) else prompt
    ids = tokenizer(
        prompt, padding="max_length", max_length=max_text_length, truncation=True, return_tensors="pt"
    ).input_ids
    largest = int(ids.max())
    if largest >= text_vocab_size:
        raise ValueError(
            f"`prompt` has token {largest}, but the transformer knows only {text_vocab_size}: is `tokenizer` the one "
            f"it was trained with? Got {prompt!r}."
        )
    for text, full in zip(prompt, tokenizer(prompt).input_ids, strict=True):
        if len(full) > max_text_length:
            logger.warning(
                f"`prompt` has {len(full)} tokens, of which the model reads the first {max_text_length}: {text!r}."
            )
        if (unknown := unknown_token_id(tokenizer)) in full:
            logger.warning(f"`prompt` has words that the tokenizer does not know, {full.count(unknown)} in {text!r}.")
    return ids


def check_condition(
    config,
    tokenizer: PreTrainedTokenizerBase | None = None,
    id2label: dict[int, str] | None = None,
    prompt=None,
    class_labels=None,
    negative_prompt=None,
    num_images_per_prompt=1,
) -> None:
    """Refuse, with a `ValueError`, what a transformer of this `config` cannot be conditioned on."""
    if not is_integer(num_images_per_prompt) or num_images_per_prompt < 1:
        raise ValueError(f"`num_images_per_prompt` must be a positive integer, got {num_images_per_prompt!r}.")
    for name, given, expected, kind in (
        ("prompt", prompt is not None, config.text_vocab_size is not None, "text-conditional"),
        ("class_labels", class_labels is not None, config.num_classes is not None, "class-conditional"),
    ):
        if given and not expected:
            raise ValueError(f"`{name}` must be None: this model is not {kind}.")
        if expected and not given:
            raise ValueError(f"`{name}` must be given: this model is {kind}.")
    if prompt is not None and tokenizer is None:
        raise ValueError("`prompt` needs a pipeline with a `tokenizer`, and this one has none.")
    for name, texts in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if texts is None:
            continue
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"`{name}` must be a string or a non-empty list of strings, got {texts!r}.")
        blank = not all(text.strip() for text in texts)
        if name == "prompt" and blank:
            raise ValueError(f"`prompt` must not be empty, got {texts!r}.")
        if name == "negative_prompt" and prompt is None:
            raise ValueError("`negative_prompt` needs a `prompt`.")
        if name == "negative_prompt" and blank and not config.get("null_condition", True):
            raise ValueError(
                "`negative_prompt` must not be empty: that means the null condition, and this model has none, got "
                f"{texts!r}."
            )
    if isinstance(negative_prompt, list):
        num_prompts = 1 if isinstance(prompt, str) else len(prompt)
        if len(negative_prompt) != num_prompts:
            raise ValueError(
                f"`negative_prompt` must be one string or {num_prompts}, one a prompt, got {len(negative_prompt)}."
            )
    if class_labels is not None:
        for label in class_ids(class_labels, id2label):
            if not 0 <= label < config.num_classes:
                raise ValueError(f"`class_labels` must lie in [0, {config.num_classes - 1}], got {label}.")


def count_conditions(prompt=None, class_labels=None, id2label: dict[int, str] | None = None) -> int | None:
    """Prompts or class labels of a call; `None` where there are neither."""
    if prompt is not None:
        return 1 if isinstance(prompt, str) else len(prompt)
    if class_labels is not None:
        return len(class_ids(class_labels, id2label))
    return None


def count_images(
    prompt=None, class_labels=None, num_images_per_prompt=1, id2label: dict[int, str] | None = None, latents=None
) -> int:
    """Images of a call; without a condition they may be counted by `latents`."""
    conditions = count_conditions(prompt, class_labels, id2label)
    if conditions is not None:
        return conditions * num_images_per_prompt
    if isinstance(latents, torch.Tensor) and latents.ndim == 4 and num_images_per_prompt == 1:
        return latents.shape[0]
    return num_images_per_prompt


def condition_ids(
    transformer,
    tokenizer: PreTrainedTokenizerBase | None = None,
    id2label: dict[int, str] | None = None,
    prompt: str | list[str] | None = None,
    class_labels: int | str | list[int | str] | torch.Tensor | None = None,
    negative_prompt: str | list[str] | None = None,
    do_classifier_free_guidance: bool = False,
    device: torch.device | None = None,
) -> dict[str, torch.Tensor]:
    """The keyword argument that conditions `transformer`.

    Returns:
        `class_labels` `(rows,)` or `input_ids` `(rows, max_text_length)`, one row a condition, or with guidance two:
        all conditions, then the null conditions or the negative prompts, of which a blank one is the null condition.
        Empty without a condition.
    """

    def tokens(text):
        return tokenize(text, tokenizer, transformer.config.max_text_length, transformer.config.text_vocab_size)

    if class_labels is not None:
        name, condition = "class_labels", torch.tensor(class_ids(class_labels, id2label), device=device)
    elif prompt is not None:
        name, condition = "input_ids", tokens(prompt).to(device)
    else:
        return {}
    if do_classifier_free_guidance:
        if negative_prompt is not None:
            texts = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
            null = tokens(texts)
            # "" is diffusers' unconditional prompt; its tokens, all padding, are a text that no training has seen
            blank = [row for row, text in enumerate(texts) if not text.strip()]
            if blank:
                null[blank] = transformer.null_condition_id
            null = null.to(device).expand_as(condition)
        else:
            null = torch.full_like(condition, transformer.null_condition_id)
        condition = torch.cat([condition, null])
    return {name: condition}
