"""One run of Draft-and-Revise looked at in stages: the draft, and the image after each revision."""

from typing import TYPE_CHECKING, Any

import torch

from .devices import seconds_now


if TYPE_CHECKING:
    from .pipeline_draft_and_revise import DraftAndRevisePipeline


def sample_stages(
    pipe: "DraftAndRevisePipeline", generators: list[torch.Generator], condition: dict[str, list], **sampler: Any
) -> tuple[list[torch.Tensor], list[float]]:
    """The codes after the draft and after each revision, all of the same run.

    A draft does not depend on the revisions after it, nor a revision on those after it: so one long run holds what
    shorter ones would give.

    Args:
        pipe ([`DraftAndRevisePipeline`]): Its progress bar is left as it is.
        generators (`list[torch.Generator]`): One an image, B in all.
        condition (`dict[str, list]`): `prompt` or `class_labels`, one an image; empty for an unconditional model.
        sampler: Arguments of the pipeline's call; what is not given or None is the scheduler's default.

    Returns:
        `num_revisions + 1` code maps `(B, h, w, D)`, and the seconds that each took from the beginning, by
        [`seconds_now`].

    Raises:
        `RuntimeError`: the pipeline took other steps than its scheduler was set to.
    """
    sampler = {name: value for name, value in sampler.items() if value is not None}
    counts = ("num_inference_steps", "num_revise_steps", "num_revisions")
    draft, revise, revisions = (sampler.get(name, pipe.scheduler.config[name]) for name in counts)
    sampler |= dict(zip(counts, (draft, revise, revisions)))
    last_steps = [draft + revision * revise - 1 for revision in range(revisions + 1)]
    stages: dict[int, torch.Tensor] = {}
    seconds: list[float] = []

    def keep_codes(pipe, step: int, timestep, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        if step in last_steps:
            stages[step] = callback_kwargs["latents"].clone()  # (B, h, w, D)
            seconds.append(seconds_now(pipe.device) - start)
        return callback_kwargs

    images = {} if condition else {"num_images_per_prompt": len(generators)}
    start = seconds_now(pipe.device)
    codes = pipe(
        **condition, **images, generator=generators, output_type="latent", callback_on_step_end=keep_codes, **sampler
    ).images
    # A pipeline that counted its steps otherwise would have its stages mixed up here without a word.
    if sorted(stages) != last_steps or not torch.equal(stages[last_steps[-1]], codes):
        raise RuntimeError(
            f"Steps {last_steps} should end the draft and each revision, and the codes of the last be the output, but "
            f"the pipeline's callback came by {sorted(stages)} of them."
        )
    return [stages[step] for step in last_steps], seconds
