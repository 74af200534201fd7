"""Between codes and images: what every pipeline does with its RQ-VAE, and with the images that it is given."""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from .rqvae import RQVAEModel


Images = Image.Image | np.ndarray | torch.Tensor | list[Image.Image] | list[np.ndarray] | list[torch.Tensor]


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


def single_images(images: Images, name: str) -> list[Image.Image | np.ndarray | torch.Tensor]:
    """A batch one by one as `VaeImageProcessor` takes them: PIL images, or float32 in `[0, 1]` of 3 dimensions.

    `name` is `"image"`, with 3 channels, or `"mask_image"`, with one or none, where uint8 may also be 0 and 1.
    """
    channels = 3 if name == "image" else 1
    kinds = (np.ndarray, torch.Tensor)
    if isinstance(images, kinds) and (images.ndim == 4 or (channels == 1 and images.ndim == 3)):
        alone = isinstance(images, np.ndarray) and images.ndim == 3 and images.shape[-1] == 1
        images = [images] if alone else list(images)
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    if not images:
        raise ValueError(f"`{name}` must not be empty, got {images!r}.")
    singles = []
    for image in images:
        if isinstance(image, Image.Image) and image.width and image.height:
            singles.append(image.convert("RGB" if channels == 3 else "L"))
            continue
        if not isinstance(image, kinds):
            raise ValueError(
                f"`{name}` must be a PIL image, an array, a tensor or a list of them, not empty, got {image!r}."
            )
        last = isinstance(image, np.ndarray)
        if channels == 1 and image.ndim == 2:
            image = image[..., None] if last else image[None]
        shape = tuple(image.shape)
        if len(shape) != 3 or shape[-1 if last else 0] != channels or 0 in shape:
            layout = f"(height, width, {channels})" if last else f"({channels}, height, width)"
            raise ValueError(f"`{name}` must hold {type(image).__name__}s of shape {layout}, got {shape}.")
        known = (
            image.dtype.kind == "f" or image.dtype in (np.uint8, np.bool_)
            if last
            else (image.is_floating_point() or image.dtype in (torch.uint8, torch.bool))
        )
        if not known:
            raise ValueError(f"`{name}` must hold numbers in [0, 1] or uint8, got {image.dtype}.")
        values = torch.tensor(image.astype(np.float32)) if last else image.float()
        # masks of 0 and 1, as diffusers has them, are often uint8
        if image.dtype in (np.uint8, torch.uint8) and not (channels == 1 and values.max() == 1):
            values = values / 255
        if not (values.min() >= 0 and values.max() <= 1):  # so written, NaN is refused too
            raise ValueError(
                f"`{name}` must hold numbers in [0, 1] or uint8, got [{float(values.min())}, {float(values.max())}]."
            )
        singles.append(values.numpy() if last else values)
    return singles


def prepare_pixels(
    image: Images, pixel_processor: VaeImageProcessor, image_size: tuple[int, int], device: torch.device | None = None
) -> torch.Tensor:
    """Images of any size as pixels of `image_size`, height and width: `(batch_size, 3, height, width)` in `[0, 1]`.

    What has another size is antialiased: PIL images by Lanczos, arrays and tensors by bicubic interpolation, which
    differ by 0.002 on average and by up to 0.07 at edges. `pixel_processor` does not normalize: in `[0, 1]` uint8
    comes back bit for bit.
    """
    height, width = image_size
    pixels = []
    for one in single_images(image, "image"):
        if isinstance(one, np.ndarray):
            one = torch.from_numpy(one).permute(2, 0, 1)
        if isinstance(one, torch.Tensor) and one.shape[1:] != (height, width):
            # the processor would take the nearest pixel, from which other codes follow than from a PIL image
            one = F.interpolate(one.unsqueeze(0), size=(height, width), mode="bicubic", antialias=True)
            one = one.squeeze(0).clamp(0, 1)  # the kernel has negative lobes
        pixels.append(pixel_processor.preprocess(one, height=height, width=width))
    return torch.cat(pixels).to(device)


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


def to_square(image: Image.Image, resolution: int, crop: tuple[float, float] | None = None) -> Image.Image:
    """The shorter side resized by the bilinear filter, then a square cropped: as torchvision's Resize and CenterCrop
    round, by which the parent trains and torch-fidelity reads.

    Args:
        crop (`tuple[float, float]`, *optional*): Where the square lies, from 0 (left, top) to 1 (right, bottom). By
            default in the center.
    """
    if image.size == (resolution, resolution):
        return image
    short = min(image.size)
    width, height = (int(resolution * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    if crop is None:
        left, top = round((width - resolution) / 2), round((height - resolution) / 2)
    else:
        left, top = (int(u * (side - resolution + 1)) for u, side in zip(crop, (width, height)))
        left, top = min(left, width - resolution), min(top, height - resolution)
    return image.crop((left, top, left + resolution, top + resolution))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image in 8-bit RGB.

    16-bit grayscale (modes `I` and `I;16`, levels in [0, 65535]) is scaled: PIL would clip it at 255, to white. Alpha
    is dropped, as torch-fidelity does: what a transparent pixel hides becomes visible.

    Raises:
        `ValueError`: no image, mode `F`, or integers outside of [0, 65535].
    """
    if not isinstance(image, Image.Image):
        got = "None: the image is missing" if image is None else type(image).__name__
        raise ValueError(f"`image` must be a PIL image, got {got}.")
    if image.mode == "F":
        raise ValueError("`image` must have integer levels, got mode 'F', whose floats have no fixed range.")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)  # (H, W)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(
                f"`image` of mode {image.mode!r} must have levels in [0, 65535], got {levels.min()} to {levels.max()}."
            )
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))  # 257 = 65535 / 255, to nearest
    return image.convert("RGB")
