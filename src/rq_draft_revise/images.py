"""Between codes and images: what every pipeline does with its RQ-VAE."""

import contextlib

import numpy as np
import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from .rqvae import RQVAEModel


def decode_codes(
    vae: RQVAEModel, image_processor: VaeImageProcessor, codes: torch.Tensor, output_type: str = "pil"
) -> list[Image.Image] | np.ndarray | torch.Tensor:
    """Codes to images; undrafted positions decode as the zero vector.

    Args:
        vae ([`RQVAEModel`]): Whose codes they are.
        image_processor (`VaeImageProcessor`): Takes pixels from `[-1, 1]` to the output type.
        codes (`torch.Tensor` of shape `(batch_size, height, width, code_depth)`, int64): Codes.
        output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` `(batch_size, H, W, 3)` or `"pt"`
            `(batch_size, 3, H, W)`, both in `[0, 1]`, or `"latent"` for the codes themselves.
    """
    if output_type == "latent":
        return codes
    with torch.no_grad(), float32_weights(vae):
        image = vae.decode(codes).sample  # (B, 3, H, W)
    return image_processor.postprocess(image.float(), output_type=output_type)


def encode_pixels(vae: RQVAEModel, pixels: torch.Tensor) -> torch.Tensor:
    """Codes `(batch_size, height, width, code_depth)` of pixels `(batch_size, 3, H, W)` in `[0, 1]`."""
    with torch.no_grad(), float32_weights(vae):
        return vae.encode((2 * pixels - 1).to(vae.dtype)).codes


def check_same_codebook(vae: RQVAEModel, transformer) -> None:
    """Raise a `ValueError` unless an RQ-VAE and a transformer read codes in the same codebook.

    A rounding to half precision is no difference.
    """
    ours, theirs = vae.quantizer.codebook, transformer.codebook
    if vae.config.code_depth != transformer.config.code_depth:
        raise ValueError(
            f"`vae` and `transformer` must have the same code_depth, got {vae.config.code_depth} and "
            f"{transformer.config.code_depth}."
        )
    if ours.shape != theirs.shape:
        raise ValueError(
            f"`vae` and `transformer` must have the same codebook, got shapes {tuple(ours.shape)} and "
            f"{tuple(theirs.shape)}."
        )
    if ours.is_meta or theirs.is_meta:
        return
    # A cast to half precision and back leaves its rounding behind, 2⁻⁸ in bfloat16, and may hit one of the two only:
    # the RQ-VAE's is loaded in float32 whatever the dtype. Codebooks of two trainings differ by as much as their
    # vectors.
    if not torch.allclose(ours.cpu().float(), theirs.cpu().float(), rtol=2**-7, atol=2**-24):
        raise ValueError(
            "`vae` and `transformer` must have the same codebook, got different values. A transformer takes over its "
            "RQ-VAE's by `transformer.set_codebook(vae.quantizer.codebook)`, but must be trained on its codes."
        )


@contextlib.contextmanager
def float32_weights(vae: RQVAEModel):
    """Within, a float16 RQ-VAE with `force_upcast` has float32 weights; afterwards its own again, bit for bit.

    float16 ends at 65504, which a decoder's activations can pass. `vae.to(float32)` and back would not do: the second
    cast takes along what is kept in float32, the codebook. Hooks that themselves cast or move weights one by one
    (layerwise casting, group offloading) hold on to the tensors they know, so there the decoder stays in float16.
    """
    dtypes = {parameter.dtype for parameter in vae.parameters()}
    if dtypes != {torch.float16} or not vae.config.force_upcast or _is_group_offload_enabled(vae):
        yield
        return
    weights = [(module, name, weight) for module in vae.modules() for name, weight in module._parameters.items()]
    weights = [(module, name, weight) for module, name, weight in weights if weight is not None]
    try:
        for module, name, weight in weights:
            module._parameters[name] = torch.nn.Parameter(weight.float(), requires_grad=False)
        yield
    finally:
        for module, name, weight in weights:
            module._parameters[name] = weight
