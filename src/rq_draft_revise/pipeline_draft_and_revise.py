"""From a prompt or a class to an image: draft every position once, then revise the whole.

Or from an image to its revision, where the draft is left out.
"""

from collections.abc import Callable

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from transformers import PreTrainedTokenizerBase

from .arguments import (
    check_kind,
    check_phases,
    check_run,
    count_matched,
    tensor_inputs_of,
)
from .conditions import (
    check_condition,
    count_conditions,
    count_images,
)
from .contextual_rq_transformer import ContextualRQTransformerModel
from .images import Images, encode_pixels, single_images
from .pipeline_mixins import DraftAndReviseMixin
from .rqvae import RQVAEModel
from .sampling import check_step_numbers
from .scheduling_draft_and_revise import DraftAndReviseScheduler


class DraftAndRevisePipeline(DraftAndReviseMixin, DiffusionPipeline):
    r"""Text- or class-conditional, or unconditional, image generation by Draft-and-Revise, and revision of images.

    Args:
        vae ([`RQVAEModel`]): Decodes codes to images, and encodes images that are to be revised.
        transformer ([`ContextualRQTransformerModel`]): Predicts stacks of codes.
        scheduler ([`DraftAndReviseScheduler`]): Partitions, phases, and the defaults of this pipeline's call.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Of a text-conditional transformer.
        id2label (`dict[int, str]`, *optional*): Names of the classes of a class-conditional transformer; alternatives
            separated by commas.

    Raises:
        `ValueError`: the RQ-VAE and the transformer have different codebooks, or code maps of different depth.
    """

    def __init__(
        self,
        vae: RQVAEModel,
        transformer: ContextualRQTransformerModel,
        scheduler: DraftAndReviseScheduler,
        tokenizer: PreTrainedTokenizerBase | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        components = dict(scheduler=scheduler, tokenizer=tokenizer)
        self._set_components(ContextualRQTransformerModel, vae, transformer, id2label, **components)

    def check_inputs(
        self,
        prompt=None,
        class_labels=None,
        negative_prompt=None,
        num_images_per_prompt=1,
        num_inference_steps=None,
        num_revise_steps=None,
        num_revisions=None,
        guidance_scale=None,
        temperature=None,
        draft_guidance_scale=None,
        draft_temperature=None,
        selection=None,
        top_k=None,
        top_p=None,
        generator=None,
        latents=None,
        image=None,
        output_type="pil",
        callback_on_step_end_tensor_inputs=("latents",),
        callback_on_step_end=None,
    ) -> None:
        """Refuse what [`__call__`] cannot do, each with a `ValueError` that names the argument and what is allowed."""
        config = self.transformer.config
        check_condition(
            config,
            self.tokenizer,
            self.config.id2label,
            prompt=prompt,
            class_labels=class_labels,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
        )

        # the sampler, which may have been exchanged since the pipeline was made
        check_kind("scheduler", self.scheduler, DraftAndReviseScheduler)
        check_step_numbers(num_inference_steps, num_revise_steps, num_revisions)
        check_phases(
            conditional=self.transformer.prefix_length > 0,
            guidance_scale=guidance_scale,
            temperature=temperature,
            draft_guidance_scale=draft_guidance_scale,
            draft_temperature=draft_temperature,
            selection=selection,
            top_k=top_k,
            top_p=top_p,
        )

        # what to start from
        if image is not None and latents is not None:
            raise ValueError("`image` or `latents` may be given to start from, and not both, got both.")

        # the rest
        batch_size = self.count_images(prompt, class_labels, num_images_per_prompt, latents, image)
        check_run(
            config,
            batch_size,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            allowed_tensor_inputs=self._callback_tensor_inputs,
        )
        self._check_steps(num_inference_steps, num_revise_steps, latents, image)

    def count_images(self, prompt=None, class_labels=None, num_images_per_prompt=1, latents=None, image=None) -> int:
        """Images of a call. One `image` serves all prompts or classes, and one of those all images."""
        if image is None:
            return count_images(prompt, class_labels, num_images_per_prompt, self.config.id2label, latents)
        counts = {"image": len(single_images(image, "image"))}
        conditions = count_conditions(prompt, class_labels, self.config.id2label)
        if conditions is not None:
            counts["prompt" if prompt is not None else "class_labels"] = conditions
        return count_matched(**counts) * num_images_per_prompt

    def _check_steps(self, num_inference_steps, num_revise_steps, latents, image) -> None:
        """Refuse more steps than positions before anything is set up; the scheduler would do so only afterwards."""
        to_draft = self._positions_to_draft(latents) if image is None else 0
        if num_inference_steps is not None and not min(1, to_draft) <= num_inference_steps <= to_draft:
            reason = f"there are {to_draft} positions to draft" if image is None else "an `image` is only revised"
            raise ValueError(
                f"`num_inference_steps` must lie in [{min(1, to_draft)}, {to_draft}], as {reason}, "
                f"got {num_inference_steps}."
            )
        num_positions = self.transformer.num_positions
        if num_revise_steps is not None and num_revise_steps > num_positions:
            raise ValueError(
                f"`num_revise_steps` must lie in [1, {num_positions}], as there are {num_positions} positions to "
                f"revise, got {num_revise_steps}."
            )

    def _positions_to_draft(self, latents: torch.Tensor | None) -> int:
        """Masked positions of the image that has the most."""
        if latents is None:
            return self.transformer.num_positions
        return int((latents[..., 0] == self.transformer.mask_token_id).flatten(1).sum(dim=1).max())

    def prepare_latents(
        self, batch_size: int, latents: torch.Tensor | None = None, pixels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The code map to start from, `(batch_size, height, width, code_depth)`: all masked unless it is known.

        Args:
            batch_size (`int`): Code maps.
            latents (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64, *optional*): They
                themselves.
            pixels (`torch.Tensor` of shape `(batch_size, 3, H, W)`, *optional*): Images in `[0, 1]` to encode, or
                fewer, each followed by as many rows as it serves.
        """
        config, device = self.transformer.config, self._execution_device
        if latents is not None:
            return latents.to(device)
        if pixels is not None:
            codes = encode_pixels(self.vae, pixels)
            return codes.repeat_interleave(batch_size // codes.shape[0], dim=0).to(device)
        shape = (batch_size, config.height, config.width, config.code_depth)
        return torch.full(shape, self.transformer.mask_token_id, device=device)

    def prepare_steps(self, latents: torch.Tensor, num_inference_steps, num_revise_steps, num_revisions, selection):
        """Set the scheduler's timesteps. Saved defaults shrink to the positions at hand; explicit numbers must fit."""
        config, num_positions = self.scheduler.config, self.transformer.num_positions
        to_draft = self._positions_to_draft(latents)
        if num_inference_steps is None:
            num_inference_steps = min(config.num_inference_steps, to_draft)
            num_inference_steps = max(num_inference_steps, min(1, to_draft))
        if num_revise_steps is None:
            num_revise_steps = min(config.num_revise_steps, num_positions)
        self.scheduler.set_timesteps(num_inference_steps, num_revise_steps, num_revisions, selection=selection)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        num_revise_steps: int | None = None,
        num_revisions: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        draft_guidance_scale: float | None = None,
        draft_temperature: float | None = None,
        negative_prompt: str | list[str] | None = None,
        selection: str | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        image: Images | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DraftAndRevisePipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  (diffusers' signature)
    ) -> ImagePipelineOutput | tuple:
        r"""Generate images. `None` takes the scheduler's saved default, here and below.

        Args:
            prompt (`str` or `list[str]`, *optional*): For a text-conditional model.
            class_labels (`int`, `str`, a list of them, or an int tensor, *optional*): Ids or names, for a
                class-conditional model.
            num_images_per_prompt (`int`, defaults to 1): Images of each prompt or class.
            num_inference_steps (`int`, *optional*): Steps of the draft, T_draft, in `[1, positions to draft]`; 0 where
                an `image` or `latents` leave nothing to draft.
            num_revise_steps (`int`, *optional*): Steps of one revision, T_revise, in `[1, positions]`.
            num_revisions (`int`, *optional*): Revisions, M; 0 returns the draft. With an `image` this is the strength:
                the first revision leads farthest from it, the next ones on from there.
            guidance_scale (`float`, *optional*): Classifier-free guidance of the revise phase, at least 0; 1 means
                none and costs no second forward, 0 goes by the null condition alone.
            temperature (`float`, *optional*): Temperature of the revise phase, positive.
            draft_guidance_scale (`float`, *optional*), draft_temperature (`float`, *optional*): The same for the
                draft.
            negative_prompt (`str` or `list[str]`, *optional*): Guides away from this instead of from the null text.
                An empty one is the null text.
            selection (`str`, *optional*): `"random"`, `"top-c"` or `"top-c-50%"`: see [`DraftAndReviseScheduler`].
            top_k (`int`, *optional*), top_p (`float` in (0, 1], *optional*): Sample among the most probable codes.
            generator (`torch.Generator` or a list of one an image, *optional*): With a list, an image depends on its
                own generator alone, whatever its batch (exactly in float32 on the CPU, but for ties; half precision
                rounds differently in different batches).
            latents (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64, *optional*): Codes to
                start from. Only masked stacks are drafted; without any the call only revises.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of them, *optional*): What to start from
                instead: it is encoded, and only revised. Resized to the model's size. Arrays `(H, W, 3)` and tensors
                `(3, H, W)`, or batches of them, are in `[0, 1]` or uint8. One image serves all prompts or classes,
                and one of those all images.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"`, or `"latent"` for the codes.
            return_dict (`bool`, defaults to `True`): An `ImagePipelineOutput` with `images`, or a tuple of them.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, callback_kwargs)`
                after each step; may return a dictionary with new `latents`, masked where these are.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): What `callback_kwargs` holds;
                diffusers' callback classes say so themselves.

        Raises:
            `ValueError`: an argument out of its range, or one that this model has no use for.
        """
        callback_on_step_end_tensor_inputs = tensor_inputs_of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            prompt=prompt,
            class_labels=class_labels,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            num_revise_steps=num_revise_steps,
            num_revisions=num_revisions,
            guidance_scale=guidance_scale,
            temperature=temperature,
            draft_guidance_scale=draft_guidance_scale,
            draft_temperature=draft_temperature,
            selection=selection,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            latents=latents,
            image=image,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            callback_on_step_end=callback_on_step_end,
        )

        # 1. What to start from, and what to do
        batch_size = self.count_images(prompt, class_labels, num_images_per_prompt, latents, image)
        pixels = None if image is None else self.prepare_image(image)  # (1 or images, 3, H, W)
        latents = self.prepare_latents(batch_size, latents, pixels)  # (B, h, w, D)
        self.prepare_steps(latents, num_inference_steps, num_revise_steps, num_revisions, selection)
        self.scheduler.set_partitions(latents, self.transformer.mask_token_id, generator)

        # 2. Draft, then revise
        num_conditions = count_conditions(prompt, class_labels, self.config.id2label) or 1
        latents = self.draft_and_revise(
            latents,
            condition=dict(
                prompt=prompt,
                class_labels=class_labels,
                num_images_per_prompt=batch_size // num_conditions,
                negative_prompt=negative_prompt,
            ),
            guidance_scale=guidance_scale,
            temperature=temperature,
            draft_guidance_scale=draft_guidance_scale,
            draft_temperature=draft_temperature,
            top_k=top_k,
            top_p=top_p,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

        # 3. Decode
        images = self.decode_latents(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
