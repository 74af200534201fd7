"""What the pipelines share: their components and condition, the way between codes and images, and the loop of
Draft-and-Revise."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from .arguments import check_kind, check_predictions, next_latents
from .conditions import condition_ids, integer_labels, names_to_ids, recorded_tokenizer
from .images import Images, check_same_codebook, decode_codes, prepare_pixels
from .lora import TransformerLoraMixin
from .publishing import HubPipelineMixin
from .rqvae import RQVAEModel


class CodePipelineMixin(HubPipelineMixin, TransformerLoraMixin):
    """Of all three pipelines: an RQ-VAE, a transformer over its codes, and for a text a tokenizer. Before
    `DiffusionPipeline`."""

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["tokenizer"]
    _callback_tensor_inputs = ["latents"]

    def _set_components(self, transformer_class: type, vae, transformer, id2label, **components) -> None:
        """Register components that fit together, and the names of classes."""
        check_kind("vae", vae, RQVAEModel)
        check_kind("transformer", transformer, transformer_class)
        if vae is not None and transformer is not None:
            check_same_codebook(vae, transformer)
        self.register_modules(vae=vae, transformer=transformer, **components)
        self.register_to_config(id2label=integer_labels(id2label))
        factor = vae.spatial_scale_factor if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)
        # in [0, 1], as images come in: so uint8 comes back bit for bit
        self.pixel_processor = VaeImageProcessor(vae_scale_factor=factor, do_normalize=False, do_convert_rgb=True)

    def register_to_config(self, **kwargs) -> None:
        """As in diffusers, which calls it for every component set."""
        super().register_to_config(**recorded_tokenizer(kwargs))

    @property
    def guidance_scale(self) -> float:
        """Guidance, of Draft-and-Revise that of the revise phase; a callback may change it between steps."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the run at hand, draft and revisions together."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to leave out the remaining steps."""
        return self._interrupt

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Class ids of names, such as `pipe.get_label_ids(["volcano"])`.

        Raises:
            `ValueError`: the pipeline has no `id2label`, a name is not in it, or `label` is no name.
        """
        return names_to_ids(label, self.config.id2label)

    def condition_ids(self, **given) -> dict[str, torch.Tensor]:
        """The transformer's keyword argument for the condition: see [`conditions.condition_ids`]."""
        device = self._execution_device
        return condition_ids(self.transformer, self.tokenizer, self.config.id2label, device=device, **given)

    def decode_latents(
        self, latents: torch.Tensor, output_type: str = "pil"
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Codes to images; undrafted positions decode as the zero vector, so a draft may be watched while it forms.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64): Codes.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` `(batch_size, H, W, 3)` or `"pt"`
                `(batch_size, 3, H, W)`, both in `[0, 1]`, or `"latent"` for the codes themselves.
        """
        return decode_codes(self.vae, self.image_processor, latents, output_type=output_type)


class DraftAndReviseMixin(CodePipelineMixin):
    """Of the pipelines of a Contextual RQ-Transformer."""

    @property
    def draft_guidance_scale(self) -> float:
        """Guidance of the draft; a callback may change it, too."""
        return self._draft_guidance_scale

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        config, factor = self.transformer.config, self.vae.spatial_scale_factor
        return config.height * factor, config.width * factor

    def prepare_image(self, image: Images) -> torch.Tensor:
        """Images as pixels of the model's size: `(batch_size, 3, H, W)` in `[0, 1]`."""
        return prepare_pixels(image, self.pixel_processor, self.image_size, self._execution_device)

    def encode_condition(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = False,
    ) -> torch.Tensor | None:
        """Keys and values of the condition, computed once and good for every step.

        Args:
            prompt, class_labels, num_images_per_prompt, negative_prompt: As in the call.
            do_classifier_free_guidance (`bool`, defaults to `False`): Append the null conditions, or the negative
                prompts.

        Returns:
            `torch.Tensor` of shape `(num_spatial_layers, 2, rows, prefix_length, heads, head_dim)` with one row an
            image, or two with guidance (all conditions first); `None` for an unconditional model.
        """
        condition = self.condition_ids(
            prompt=prompt,
            class_labels=class_labels,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=do_classifier_free_guidance,
        )
        if not condition:
            return None
        prefix = self.transformer(**condition).prefix_key_values
        # always a copy: a CUDA graph of the transformer's call writes its results to the same memory each time
        return prefix.repeat_interleave(num_images_per_prompt, dim=2)

    def draft_and_revise(
        self,
        latents: torch.Tensor,
        condition: dict,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        draft_guidance_scale: float | None = None,
        draft_temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> torch.Tensor:
        """Take all steps of the scheduler, which has its timesteps and partitions: the draft, then the revisions.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64): The code map that the
                partitions were made for.
            condition (`dict`): Arguments of [`encode_condition`].
            guidance_scale, temperature, draft_guidance_scale, draft_temperature, top_k, top_p, callback_on_step_end,
                callback_on_step_end_tensor_inputs: As in the call.

        Returns:
            The code map after the last step, `(batch_size, height, width, code_depth)`.
        """
        given = dict(
            guidance_scale=guidance_scale,
            temperature=temperature,
            draft_guidance_scale=draft_guidance_scale,
            draft_temperature=draft_temperature,
            top_k=top_k,
            top_p=top_p,
        )
        sampler = {name: self.scheduler.config[name] if value is None else value for name, value in given.items()}
        self._guidance_scale, self._draft_guidance_scale = sampler["guidance_scale"], sampler["draft_guidance_scale"]
        timesteps, self._interrupt = self.scheduler.timesteps, False
        self._num_timesteps = len(timesteps)

        # the condition, once for all steps
        batch_size, device = latents.shape[0], latents.device
        conditional = self.transformer.prefix_length > 0
        guided = conditional and (self.guidance_scale != 1 or self.draft_guidance_scale != 1)
        prefix = self.encode_condition(**condition, do_classifier_free_guidance=guided)
        # numbers as tensors, which a compiled step takes without recompiling; each sent to the device once
        scalar = cache(lambda value: torch.tensor(float(value), device=device))

        output = None
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                draft = self.scheduler.is_draft(timestep)
                scale = self.draft_guidance_scale if draft else self.guidance_scale
                guided = conditional and scale != 1
                if guided and prefix.shape[2] == batch_size:  # a callback has just turned guidance on
                    prefix = self.encode_condition(**condition, do_classifier_free_guidance=True)

                step = self.scheduler.get_step_input(latents, timestep)
                output = self.transformer(
                    step.codes,
                    step.positions,
                    step.uniforms,
                    prefix_key_values=prefix if guided or not conditional else prefix[:, :, :batch_size],
                    guidance_scale=scalar(scale) if guided else None,
                    temperature=scalar(sampler["draft_temperature" if draft else "temperature"]),
                    top_k=sampler["top_k"],
                    top_p=sampler["top_p"],
                )
                latents = self.scheduler.step((output.stacks, output.log_probs), timestep, latents).prev_sample

                if callback_on_step_end is not None:
                    callback_kwargs = {name: latents for name in callback_on_step_end_tensor_inputs}  # the only input
                    callback_outputs = callback_on_step_end(self, i, timestep, callback_kwargs) or {}
                    latents = next_latents(callback_outputs, latents, self.transformer.config)
                progress_bar.update()
        check_predictions(output, self.transformer.dtype)
        return latents
