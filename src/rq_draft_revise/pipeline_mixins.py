"""What the pipelines share: their components, their condition, and the way between codes and images."""

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from .arguments import check_kind
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
