"""From an image and a mask to the image with the masked region drawn anew: draft the region, then revise it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import logging
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
)
from .contextual_rq_transformer import ContextualRQTransformerModel
from .images import Images, encode_pixels, single_images
from .pipeline_mixins import DraftAndReviseMixin
from .rqvae import RQVAEModel
from .sampling import check_step_numbers
from .scheduling_draft_and_revise import DraftAndReviseScheduler


logger = logging.get_logger(__name__)


class DraftAndReviseInpaintPipeline(DraftAndReviseMixin, DiffusionPipeline):
    r"""Inpainting, editing and infilling by Draft-and-Revise (supplement D.3, D.4).

    The positions under the mask are drafted and then revised, among codes of the image that never change. The
    components are those of [`DraftAndRevisePipeline`], which `DraftAndReviseInpaintPipeline.from_pipe(pipe)` shares,
    and takes along the names of classes. It casts what is shared, to float32 unless a `dtype` is given.

    Args:
        vae ([`RQVAEModel`]): Encodes images to codes and decodes codes to images.
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
        # not resized by interpolation, in which a thin line vanishes
        self.mask_processor = VaeImageProcessor(
            do_resize=False, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    def check_inputs(
        self,
        image=None,
        mask_image=None,
        mask=None,
        composite=True,
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
        output_type="pil",
        callback_on_step_end_tensor_inputs=("latents",),
        callback_on_step_end=None,
    ) -> None:
        """Refuse what [`__call__`] cannot do, each with a `ValueError` that names the argument and what is allowed.

        Pixels are looked at by [`prepare_image`] and [`prepare_mask`], step numbers against them by [`prepare_steps`].
        """
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

        # image and mask
        if (mask_image is None) == (mask is None):
            got = "neither" if mask is None else "both"
            raise ValueError(f"`mask_image` or `mask` must be given, and not both, got {got}.")
        if not isinstance(composite, bool):
            raise ValueError(f"`composite` must be True or False, got {composite!r}.")
        batch_size = self.count_images(image, mask_image, mask, prompt, class_labels) * num_images_per_prompt

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

        # the rest
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

    def count_images(self, image, mask_image=None, mask=None, prompt=None, class_labels=None) -> int:
        """Triples of image, mask and condition; where there is one of a kind, it serves all."""
        counts = {"image": len(single_images(image, "image"))}
        if mask_image is not None:
            counts["mask_image"] = len(single_images(mask_image, "mask_image"))
        if mask is not None:
            counts["mask"] = len(self.check_mask(mask))
        conditions = count_conditions(prompt, class_labels, self.config.id2label)
        if conditions is not None:
            counts["prompt" if prompt is not None else "class_labels"] = conditions
        return count_matched(**counts)

    def check_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Refuse, with a `ValueError`, what is no mask of positions."""
        shape = (self.transformer.config.height, self.transformer.config.width)
        if (
            not isinstance(mask, torch.Tensor)
            or mask.dtype != torch.bool
            or mask.ndim != 3
            or mask.shape[1:] != shape
            or mask.shape[0] == 0
        ):
            got = f"{mask.dtype} of {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else repr(mask)
            raise ValueError(f"`mask` must be a bool torch.Tensor of shape {('batch_size', *shape)}, got {got}.")
        return mask

    def prepare_mask(self, mask_image: Images | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Pixels to fill, `(batch_size, 1, H, W)` bool, of a mask of pixels or of positions.

        A pixel of the model's size is masked if any pixel that it covers in `mask_image` is.
        """
        if mask is not None:
            factor = self.vae.spatial_scale_factor
            pixels = mask.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2).unsqueeze(1)
            return pixels.to(self._execution_device)
        masks = [self.mask_processor.preprocess(one) for one in single_images(mask_image, "mask_image")]
        masks = [F.adaptive_max_pool2d(one, self.image_size) > 0 for one in masks]  # (1, 1, H, W) each
        return torch.cat(masks).to(self._execution_device)

    def prepare_latents(
        self, pixels: torch.Tensor, region: torch.Tensor, latents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The code map to start from, `(batch_size, height, width, code_depth)`: the images' codes, `region` masked.

        Args:
            pixels (`torch.Tensor` of shape `(batch_size, 3, H, W)`): Images in `[0, 1]`, or fewer, each followed by
                as many rows as it serves.
            region (`torch.Tensor` of shape `(batch_size, height, width)`, bool): Positions to fill.
            latents (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64, *optional*): The
                images' codes, if they are known.

        Raises:
            `ValueError`: `latents` are masked outside `region`.
        """
        mask_token_id = self.transformer.mask_token_id
        if latents is None:
            latents = encode_pixels(self.vae, pixels)
            latents = latents.repeat_interleave(region.shape[0] // latents.shape[0], dim=0)
        latents = latents.to(self._execution_device)
        unknown = (latents[..., 0] == mask_token_id) & ~region
        if unknown.any():
            raise ValueError(
                f"`latents` must be known outside the mask, but {int(unknown.sum())} position(s) there hold the mask "
                f"{mask_token_id}."
            )
        return latents.masked_fill(region.unsqueeze(-1), mask_token_id)

    def prepare_steps(self, region: torch.Tensor, num_inference_steps, num_revise_steps, num_revisions, selection):
        """Set the scheduler's timesteps. Saved defaults shrink to the region; explicit numbers must fit into it.

        With nothing to fill there are no steps, whatever the numbers.
        """
        config, sizes = self.scheduler.config, region.flatten(1).sum(dim=1)  # (B,)
        most = int(sizes.max())
        if (sizes == 0).any():
            rows = (sizes == 0).nonzero().flatten().tolist()
            logger.warning(f"The mask is empty for image(s) {rows} of {len(sizes)}: nothing to fill there.")
        if most == 0:
            self.scheduler.set_timesteps(0, 1, 0, selection=selection)
            return
        for name, value in (("num_inference_steps", num_inference_steps), ("num_revise_steps", num_revise_steps)):
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"`{name}` must lie in [1, {most}], as the mask has {most} positions, got {value}.")
        if num_inference_steps is None:
            num_inference_steps = max(1, min(config.num_inference_steps, most))
        if num_revise_steps is None:
            num_revise_steps = min(config.num_revise_steps, most)
        self.scheduler.set_timesteps(num_inference_steps, num_revise_steps, num_revisions, selection=selection)

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        mask_image: Images | None = None,
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
        mask: torch.Tensor | None = None,
        composite: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DraftAndReviseInpaintPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  (diffusers' signature)
    ) -> ImagePipelineOutput | tuple:
        r"""Fill what is masked. `None` takes the scheduler's saved default, here and below.

        A position is masked if any of its pixels is. All-white masks draw what [`DraftAndRevisePipeline`] draws with
        the same generator; with an all-black one there is nothing to do, which is logged. The image is encoded whole:
        codes next to the mask have seen some pixels under it.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of them): What to keep, resized to the
                model's size. Arrays `(H, W, 3)` and tensors `(3, H, W)`, or batches of them, are in `[0, 1]` or
                uint8. One image, mask or condition serves as many of the others as there are.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of them, *optional*): White, from
                0.5, is to be filled. Arrays and tensors are `(H, W)`, with or without the one channel, or batches;
                bool will do too, and uint8 of 0 and 1 as of 0 to 255. Of any size: a pixel of the model's size is
                masked if any that it covers is.
            prompt (`str` or `list[str]`, *optional*): For a text-conditional model.
            class_labels (`int`, `str`, a list of them, or an int tensor, *optional*): Ids or names, for a
                class-conditional model. Another class than the image's edits it.
            num_images_per_prompt (`int`, defaults to 1): Images of each prompt or class.
            num_inference_steps (`int`, *optional*): Steps of the draft, T_draft, in `[1, masked positions]`.
            num_revise_steps (`int`, *optional*): Steps of one revision, T_revise, in `[1, masked positions]`.
            num_revisions (`int`, *optional*): Revisions of the masked positions, M; 0 returns the draft.
            guidance_scale (`float`, *optional*): Classifier-free guidance of the revise phase, at least 0; 1 means
                none and costs no second forward, 0 goes by the null condition alone.
            temperature (`float`, *optional*): Temperature of the revise phase, positive.
            draft_guidance_scale (`float`, *optional*), draft_temperature (`float`, *optional*): The same for the
                draft.
            negative_prompt (`str` or `list[str]`, *optional*): Guides away from this instead of from the null text.
                An empty one is the null text.
            selection (`str`, *optional*): `"random"`, `"top-c"` or `"top-c-50%"`: see [`DraftAndReviseScheduler`].
            top_k (`int`, *optional*), top_p (`float` in (0, 1], *optional*): Sample among the most probable codes.
            mask (`torch.Tensor` of shape `(batch_size, height, width)`, bool, *optional*): The positions to fill,
                instead of `mask_image`.
            composite (`bool`, defaults to `True`): Put back the known pixels of `image`, which decoding its codes
                would not return exactly. `False` gives the decoder's image, without an edge around the mask.
            generator (`torch.Generator` or a list of one an image, *optional*): With a list, an image depends on its
                own generator alone, whatever its batch (exactly in float32 on the CPU, but for ties; half precision
                rounds differently in different batches).
            latents (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64, *optional*): The codes
                of `image`, instead of encoding it; what they hold under the mask does not matter.
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
            image=image,
            mask_image=mask_image,
            mask=mask,
            composite=composite,
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
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            callback_on_step_end=callback_on_step_end,
        )

        # 1. The image, and which of its positions to fill
        batch_size = self.count_images(image, mask_image, mask, prompt, class_labels) * num_images_per_prompt
        pixels = self.prepare_image(image)  # (1 or images, 3, H, W)
        to_fill = self.prepare_mask(mask_image, mask)  # (1 or images, 1, H, W)
        to_fill = to_fill.repeat_interleave(batch_size // to_fill.shape[0], dim=0)  # (B, 1, H, W)
        region = F.max_pool2d(to_fill.float(), self.vae.spatial_scale_factor)[:, 0] > 0  # (B, h, w)

        # 2. Its codes, and what to do
        latents = self.prepare_latents(pixels, region, latents)  # (B, h, w, D)
        self.prepare_steps(region, num_inference_steps, num_revise_steps, num_revisions, selection)
        self.scheduler.set_partitions(latents, self.transformer.mask_token_id, generator, region=region)

        # 3. Draft, then revise, both inside the region
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

        # 4. Decode, and put the known pixels back
        if output_type == "latent":
            images = latents
        else:
            images = self.decode_latents(latents, output_type="pt")  # (B, 3, H, W)
            if composite:
                pixels = pixels.repeat_interleave(batch_size // pixels.shape[0], dim=0)
                images = torch.where(to_fill, images, pixels.to(images))
            images = self.image_processor.postprocess(images, output_type, do_denormalize=[False] * batch_size)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
