"""From a prompt or a class to an image by the autoregressive baseline: one stack after the other."""

from collections.abc import Callable
from functools import cache

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from transformers import PreTrainedTokenizerBase

from .arguments import check_predictions, check_run, next_latents, tensor_inputs_of, warn_of_no_condition
from .conditions import (
    check_condition,
    count_images,
)
from .pipeline_mixins import CodePipelineMixin
from .rq_transformer import RQTransformerModel
from .rqvae import RQVAEModel
from .sampling import stack_on_host


class RQTransformerPipeline(CodePipelineMixin, DiffusionPipeline):
    r"""Text- or class-conditional, or unconditional, image generation by an RQ-Transformer (or VQ-GAN's).

    There is nothing to schedule: a step samples the stack of one position, in row-major order.

    Args:
        vae ([`RQVAEModel`]): Decodes codes to images.
        transformer ([`RQTransformerModel`]): Predicts stacks of codes.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Of a text-conditional transformer.
        id2label (`dict[int, str]`, *optional*): Names of the classes of a class-conditional transformer; alternatives
            separated by commas.
        guidance_scale (`float`, defaults to 1.0): Classifier-free guidance; 1 means none. This and the following are
            the defaults of the call, saved with the pipeline.
        temperature (`float`, defaults to 1.0): Divides the logits.
        top_k (`int` or a list of one a depth, *optional*), top_p (`float` or a list of one a depth, *optional*):
            Sample among the most probable codes of each depth.

    Raises:
        `ValueError`: the RQ-VAE and the transformer have different codebooks, or code maps of different depth; a
            default that nothing can be sampled with.
    """

    def __init__(
        self,
        vae: RQVAEModel,
        transformer: RQTransformerModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        id2label: dict | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | list[int] | None = None,
        top_p: float | list[float] | None = None,
    ):
        super().__init__()
        self._set_components(RQTransformerModel, vae, transformer, id2label, tokenizer=tokenizer)
        if transformer is not None:
            self.transformer.check_sampling(guidance_scale, temperature, top_k, top_p)
        self.register_to_config(
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )

    def check_inputs(
        self,
        prompt=None,
        class_labels=None,
        negative_prompt=None,
        num_images_per_prompt=1,
        guidance_scale=None,
        temperature=None,
        top_k=None,
        top_p=None,
        generator=None,
        latents=None,
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

        # the sampler
        given = dict(guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p)
        given = {name: self.config[name] if value is None else value for name, value in given.items()}
        self.transformer.check_sampling(**given)
        warn_of_no_condition(guidance_scale=guidance_scale)
        guided = given["guidance_scale"] != 1
        if guided and self.transformer.null_condition_id is None and negative_prompt is None:
            instead = " and no `negative_prompt`" if config.text_vocab_size is not None else ""
            raise ValueError(
                f"`guidance_scale` must be 1: this model has no null condition{instead} to guide away from, got "
                f"{given['guidance_scale']!r}."
            )

        # the rest
        batch_size = count_images(prompt, class_labels, num_images_per_prompt, self.config.id2label, latents)
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

    def encode_condition(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = False,
        latents: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """What the transformer is given in every step: the condition, and a new cache which has read it.

        Args:
            prompt, class_labels, num_images_per_prompt, negative_prompt: As in [`__call__`].
            do_classifier_free_guidance (`bool`, defaults to `False`): Append the null conditions, or the negative
                prompts.
            latents (`torch.Tensor`, *optional*): The code map to start from, without a condition.

        Returns:
            `past_key_values`, and with a condition `class_labels` or `input_ids`; one row an image, or two with
            guidance (all conditions first).
        """
        condition = self.condition_ids(
            prompt=prompt,
            class_labels=class_labels,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=do_classifier_free_guidance,
        )
        # always a copy of the cache: a CUDA graph of the transformer's call writes its results to the same memory
        if not condition:
            return {"past_key_values": self.transformer(latents).past_key_values.clone()}
        # read once a prompt, not once an image
        past_key_values = self.transformer(**condition).past_key_values
        condition = {name: ids.repeat_interleave(num_images_per_prompt, dim=0) for name, ids in condition.items()}
        return condition | {"past_key_values": past_key_values.repeat_interleave(num_images_per_prompt, dim=2)}

    def prepare_latents(self, batch_size: int, latents: torch.Tensor | None = None) -> torch.Tensor:
        """The code map to start from, `(batch_size, height, width, code_depth)`: all masked unless given."""
        config, device = self.transformer.config, self._execution_device
        if latents is not None:
            return latents.to(device)
        shape = (batch_size, config.height, config.width, config.code_depth)
        return torch.full(shape, self.transformer.mask_token_id, device=device)

    def prepare_uniforms(
        self, batch_size: int, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """All that is random in a run: `(batch_size, positions, code_depth)` in `[0, 1)`, drawn image by image."""
        shape = (self.transformer.num_positions, self.transformer.config.code_depth)
        images = []
        for row in range(batch_size):
            source = generator[row] if isinstance(generator, (list, tuple)) else generator
            device = source.device if source is not None else "cpu"
            images.append(torch.rand(*shape, generator=source, device=device, dtype=torch.float32))
        return stack_on_host(images).to(self._execution_device)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        negative_prompt: str | list[str] | None = None,
        top_k: int | list[int] | None = None,
        top_p: float | list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["RQTransformerPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  (diffusers' signature)
    ) -> ImagePipelineOutput | tuple:
        r"""Generate images. `None` takes the pipeline's saved default, here and below.

        Args:
            prompt (`str` or `list[str]`, *optional*): For a text-conditional model.
            class_labels (`int`, `str`, a list of them, or an int tensor, *optional*): Ids or names, for a
                class-conditional model.
            num_images_per_prompt (`int`, defaults to 1): Images of each prompt or class.
            guidance_scale (`float`, *optional*): Classifier-free guidance, at least 0; 1 means none and costs no
                second row, 0 goes by the null condition alone. Other numbers need a model with a null condition, or a
                `negative_prompt`.
            temperature (`float`, *optional*): Positive.
            negative_prompt (`str` or `list[str]`, *optional*): Guides away from this instead of from the null text.
                An empty one is the null text, and is refused where the model has none.
            top_k (`int` or a list of one a depth, *optional*), top_p (`float` in (0, 1] or a list of one a depth,
                *optional*): Sample among the most probable codes of each depth. `codebook_size` and 1 are no limits.
            generator (`torch.Generator` or a list of one an image, *optional*): With a list, an image depends on its
                own generator alone, whatever its batch (exactly in float32 on the CPU, but for ties; half precision
                rounds differently in different batches).
            latents (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64, *optional*): Codes to
                start from. Only masked stacks are sampled; they see what stands before them, and nothing after.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"`, or `"latent"` for the codes.
            return_dict (`bool`, defaults to `True`): An `ImagePipelineOutput` with `images`, or a tuple of them.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, callback_kwargs)`
                after each position; may return a dictionary with new `latents`, masked where these are, of which the
                stacks up to the present position but this one have been read already.
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
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            callback_on_step_end=callback_on_step_end,
        )
        temperature = self.config.temperature if temperature is None else temperature
        top_k = self.config.top_k if top_k is None else top_k
        top_p = self.config.top_p if top_p is None else top_p
        self._guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        self._num_timesteps = self.transformer.num_positions
        self._interrupt = False

        # 1. What to start from, and all that is random
        batch_size = count_images(prompt, class_labels, num_images_per_prompt, self.config.id2label, latents)
        latents = self.prepare_latents(batch_size, latents)  # (B, h, w, D)
        uniforms = self.prepare_uniforms(batch_size, generator)  # (B, N, D)

        # 2. The condition, read once
        guided = self.guidance_scale != 1
        condition = self.encode_condition(
            prompt, class_labels, num_images_per_prompt, negative_prompt, guided, latents=latents
        )

        # 3. One position after the other
        positions = torch.arange(self._num_timesteps, device=latents.device)
        # numbers as tensors, which a compiled step takes without recompiling; each sent to the device once
        scalar = cache(lambda value: torch.tensor(float(value), device=positions.device))

        output = None
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for n in range(self._num_timesteps):
                if self.interrupt:
                    continue
                if not guided and self.guidance_scale != 1:
                    raise ValueError(
                        "`guidance_scale` may change only in a run that is guided from the first step on, as the null "
                        f"condition has not been read otherwise, got {self.guidance_scale!r} before step {n}."
                    )
                output = self.transformer(
                    latents,
                    positions[n : n + 1],
                    uniforms[:, n],
                    guidance_scale=scalar(self.guidance_scale) if guided else None,
                    temperature=scalar(temperature),
                    top_k=top_k,
                    top_p=top_p,
                    **condition,
                )
                row, column = divmod(n, latents.shape[2])
                known = latents[:, row, column]  # (B, D)
                latents = latents.clone()  # a callback may have kept the last one
                latents[:, row, column] = torch.where(known == self.transformer.mask_token_id, output.stacks, known)

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    callback_outputs = callback_on_step_end(self, n, n, callback_kwargs) or {}
                    latents = next_latents(callback_outputs, latents, self.transformer.config)
                progress_bar.update()
        check_predictions(output, self.transformer.dtype)

        # 4. Decode
        images = self.decode_latents(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
