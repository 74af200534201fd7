"""Arguments that the calls of all pipelines have, and what is refused of them."""

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging

from .codes import check_codes
from .sampling import check_generator, check_sampling


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_kind(argument: str, component, kind: type) -> None:
    """Refuse, with a `ValueError`, a component that is no `kind`, `None` excepted.

    Compared by class name: a pipeline exported for the Hub carries copies of the classes.
    """
    original = getattr(component, "_orig_mod", component)  # of torch.compile
    if original is not None and kind.__name__ not in [base.__name__ for base in type(original).__mro__]:
        raise ValueError(
            f"`{argument}` must be a {kind.__name__} in this pipeline, got a {type(original).__name__}. A saved "
            "pipeline is loaded by the class that its model_index.json names."
        )


def tensor_inputs_of(callback_on_step_end, tensor_inputs: list[str]) -> list[str]:
    """What a callback is given: diffusers' callback classes say so themselves, whatever the call says."""
    if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
        return callback_on_step_end.tensor_inputs
    return tensor_inputs


def warn_of_no_condition(**scales: float | None) -> None:
    """Log a guidance scale of 0, which in diffusers' other pipelines means no guidance."""
    for name, value in scales.items():
        if value == 0:
            logger.warning(
                f"`{name}` 0 draws from the null condition or the `negative_prompt` alone and passes over the "
                "condition: 1 means no guidance."
            )


def check_run(
    config,
    batch_size: int,
    generator=None,
    latents=None,
    output_type="pil",
    callback_on_step_end=None,
    callback_on_step_end_tensor_inputs=("latents",),
    allowed_tensor_inputs=("latents",),
) -> None:
    """Refuse, with a `ValueError`, what a run of `batch_size` images of a transformer of this `config` cannot take.

    The arguments are those of the pipelines' calls; `allowed_tensor_inputs` are the names a callback may ask for.
    """
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise ValueError(f'`output_type` must be "pil", "np", "pt" or "latent", got {output_type!r}.')
    if latents is not None:
        check_codes(latents, config.code_depth, config.codebook_size, name="latents")
        expected = (batch_size, config.height, config.width, config.code_depth)
        if tuple(latents.shape) != expected:
            raise ValueError(f"`latents` must have shape {expected}, got {tuple(latents.shape)}.")
    check_generator(generator, batch_size)
    if callback_on_step_end is not None and not callable(callback_on_step_end):
        raise ValueError(f"`callback_on_step_end` must be callable or None, got {callback_on_step_end!r}.")
    names = callback_on_step_end_tensor_inputs
    if not isinstance(names, (list, tuple)) or not all(name in allowed_tensor_inputs for name in names):
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` must be a list of names among {allowed_tensor_inputs}, "
            f"got {names!r}."
        )


def next_latents(callback_outputs: dict, latents: torch.Tensor, config) -> torch.Tensor:
    """The codes to go on with after a callback: those that it returned, or the present ones.

    Args:
        callback_outputs (`dict`): What `callback_on_step_end` returned.
        latents (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64): The present codes. Given
            back as the same tensor, they are not looked at.
        config: That of the transformer.

    Raises:
        `ValueError`: names `callback_on_step_end`; others are no code map of this shape on this device, or are not
            masked where the present ones are. A step samples its own block alone: a position that is masked again
            would stay so. Reading the values waits for the device.
    """
    given = callback_outputs.pop("latents", latents)
    if given is latents:
        return latents
    if isinstance(given, torch.Tensor) and (given.shape != latents.shape or given.device != latents.device):
        raise ValueError(
            f"`callback_on_step_end` must return `latents` that have shape {tuple(latents.shape)} on "
            f"{latents.device}, got {tuple(given.shape)} on {given.device}."
        )
    try:
        check_codes(given, config.code_depth, config.codebook_size, name="latents")
    except ValueError as error:
        raise ValueError(f"`callback_on_step_end` must return `latents` that are a code map: {error}") from error
    masked, masked_before = (codes[..., 0] == config.codebook_size for codes in (given, latents))
    changed = masked != masked_before
    if changed.any():
        more, fewer = int((masked & changed).sum()), int((masked_before & changed).sum())
        raise ValueError(
            "`callback_on_step_end` must return `latents` that are masked where those it was given are, got "
            f"{more} position(s) masked that were not, and {fewer} not masked that were."
        )
    return given


def check_predictions(output, dtype: torch.dtype) -> None:
    """Refuse to show what was sampled from predictions that are no numbers: it is code 0, again and again.

    What overflows in one step does so in those after it, which see it; so only the last is looked at. This waits for
    the device.

    Args:
        output: The transformer's last, with `log_probs`; None if no step was taken.
        dtype (`torch.dtype`): The transformer's.

    Raises:
        `RuntimeError`: a probability is NaN or infinite.
    """
    if output is not None and not output.log_probs.isfinite().all():
        raise RuntimeError(
            f"The transformer predicts numbers that are not finite, in {dtype}. float16 ends at 65504: load it in "
            "bfloat16 or float32. Or its weights are damaged."
        )


def check_phases(conditional: bool, **given) -> None:
    """Refuse, with a `ValueError`, numbers that neither a draft nor a revision can be sampled with.

    Args:
        conditional (`bool`): Whether the transformer has a condition that guidance could go by.
        given: Guidance scales and temperatures of both phases, `selection`, `top_k`, `top_p`; `None` is a saved
            default.
    """
    check_sampling(**{name: value for name, value in given.items() if value is not None})
    warn_of_no_condition(**{name: given[name] for name in ("guidance_scale", "draft_guidance_scale")})
    for name in ("guidance_scale", "draft_guidance_scale"):
        if not conditional and given[name] not in (None, 1):
            raise ValueError(f"`{name}` must be 1 or None: this model is unconditional, got {given[name]!r}.")


def count_matched(**counts: int) -> int:
    """The largest of `counts`, such as images, masks and prompts: where there is one of a kind, it serves them all.

    Raises:
        `ValueError`: several of a kind, but not as many as of the others.
    """
    most = max(counts.values())
    for name, count in counts.items():
        if count not in (1, most):
            raise ValueError(f"`{name}` must be one or {most}, one for each of the others, got {count}.")
    return most
