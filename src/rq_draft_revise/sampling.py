"""The numbers that an image is sampled by, as models, scheduler and pipelines check them."""

from numbers import Integral, Real

import torch


SELECTIONS = ("random", "top-c", "top-c-50%")


def check_sampling(
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    draft_guidance_scale: float = 1.0,
    draft_temperature: float = 1.0,
    selection: str = "random",
    top_k: int | None = None,
    top_p: float | None = None,
) -> None:
    """Refuse, with a `ValueError`, numbers that nothing can be sampled with."""
    for name, value in (("guidance_scale", guidance_scale), ("draft_guidance_scale", draft_guidance_scale)):
        if not _is_finite(value) or value < 0:
            raise ValueError(f"`{name}` must be a finite number of at least 0 (1 is no guidance), got {value!r}.")
    for name, value in (("temperature", temperature), ("draft_temperature", draft_temperature)):
        # the models divide by it in float32, whose smallest numbers some devices take for 0
        if not _is_finite(value) or value < torch.finfo(torch.float32).tiny:
            raise ValueError(
                f"`{name}` must be a positive finite number, got {value!r}. For the most probable codes take "
                "`top_k=1`."
            )
    if not isinstance(selection, str) or selection not in SELECTIONS:
        raise ValueError(f"`selection` must be one of {SELECTIONS}, got {selection!r}.")
    if top_k is not None and (not is_integer(top_k) or top_k < 1):
        raise ValueError(f"`top_k` must be an integer of at least 1, got {top_k!r}.")
    if top_p is not None and (not _is_finite(top_p) or not 0 < top_p <= 1):
        raise ValueError(f"`top_p` must lie in (0, 1], got {top_p!r}.")


def check_step_numbers(num_inference_steps=None, num_revise_steps=None, num_revisions=None) -> None:
    """Refuse, with a `ValueError`, numbers that no run has, whatever its size. `None` stands for a default."""
    for name, value, smallest in (
        ("num_inference_steps", num_inference_steps, 0),
        ("num_revise_steps", num_revise_steps, 1),
        ("num_revisions", num_revisions, 0),
    ):
        if value is not None and (not is_integer(value) or value < smallest):
            raise ValueError(f"`{name}` must be an integer of at least {smallest}, got {value!r}.")


def check_generator(generator: torch.Generator | list[torch.Generator] | None, batch_size: int) -> None:
    """Refuse, with a `ValueError`, what is neither a generator, nor one an image, nor `None`."""
    if isinstance(generator, (list, tuple)) and len(generator) != batch_size:
        raise ValueError(f"`generator` must be one or a list of {batch_size}, one an image, got {len(generator)}.")
    for one in generator if isinstance(generator, (list, tuple)) else [generator] * (generator is not None):
        if not isinstance(one, torch.Generator):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {one!r}.")


def stack_on_host(tensors) -> torch.Tensor:
    """`torch.stack`, on the CPU, of what may have been drawn elsewhere: in one copy, if in one place."""
    if len({tensor.device for tensor in tensors}) > 1:
        tensors = [tensor.cpu() for tensor in tensors]
    return torch.stack(list(tensors)).cpu()


def is_integer(value) -> bool:
    """Whether a value is a whole number, Python's or numpy's; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value) -> bool:
    """Whether a value is a number that float32 can hold."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= torch.finfo(torch.float32).max
