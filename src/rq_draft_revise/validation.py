"""Looking at the second stage: the loss on held-out images, and images drawn from fixed random numbers."""

from typing import TYPE_CHECKING, NamedTuple

import torch

from .code_cache import codes_at
from .contextual_rq_transformer import ContextualRQTransformerModel
from .devices import sum_dtype
from .masks import random_mask


if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline


class ValidationSet(NamedTuple):
    """Images as codes, the same in every process.

    Args:
        codes (`torch.Tensor` of shape `(n, h, w, D)`).
        condition (`torch.Tensor` of shape `(n,)` or `(n, L)`, *optional*).
    """

    codes: torch.Tensor
    condition: torch.Tensor | None


@torch.no_grad()
def validation_loss(
    model: torch.nn.Module,
    condition_name: str | None,
    validation_set: ValidationSet,
    batch_size: int,
    accelerator: "Accelerator",
    bins: int = 4,
) -> dict[str, float | list[float]]:
    """Losses over given images, of the Contextual RQ-Transformer with masks that are the same at every call.

    Every process calls it and runs `model` equally often, which a sharded model needs.

    Args:
        model: The transformer, in eval mode.
        condition_name (`str`, *optional*): `"class_labels"` or `"input_ids"`.
        batch_size (`int`): Images of a process at once.
        bins (`int`, defaults to 4): See below.

    Returns:
        dict with `image_loss` (nats a masked code); with text `text_loss`; and `image_loss_by_ratio`: `bins` numbers,
        the image loss over images with a mask ratio in (0, 1/bins], ..., (1 - 1/bins, 1], None for a bin without one.
        The last bin is what a draft starts from, the first is what a revision sees.
    """
    height, width = validation_set.codes.shape[1:3]
    shape = len(validation_set.codes), height * width
    is_contextual = isinstance(model, ContextualRQTransformerModel)  # the baseline's loss is over all codes
    masks = random_mask(*shape, torch.Generator().manual_seed(0)) if is_contextual else torch.ones(*shape).bool()
    num_masked = masks.sum(1)
    bin_of_image = (num_masked * bins - 1) // (height * width)  # ceil(ratio * bins) - 1
    chunks = [(bin_of_image == b).nonzero()[:, 0] for b in range(bins)]
    sums = torch.zeros(bins, 4, dtype=sum_dtype(accelerator.device), device=accelerator.device)
    for b, rows in enumerate(chunks):
        for batch in rows.split(batch_size * accelerator.num_processes):
            own = batch[accelerator.process_index :: accelerator.num_processes]
            weight = len(own)
            own = own if weight else batch[:1]  # nothing left for this process: it runs along, and does not count
            if len(own) == 0:
                continue
            labels = codes_at(validation_set.codes, own).to(accelerator.device)
            inputs = {"labels": labels, **_condition(condition_name, validation_set, own, accelerator)}
            if is_contextual:
                mask = masks[own].view(-1, height, width, 1).to(accelerator.device)
                inputs["codes"] = labels.masked_fill(mask, model.mask_token_id)
            out = model(**inputs)
            masked = num_masked[own].sum().item() if weight else 0
            text_loss = 0.0 if out.text_loss is None else out.text_loss.item()
            sums[b] += sums.new_tensor([out.image_loss.item() * masked, text_loss * weight, masked, weight])
    by_bin = accelerator.reduce(sums).tolist()
    image, text, masked, count = (sum(column) for column in zip(*by_bin))
    losses = {"image_loss": image / masked}
    if condition_name == "input_ids":
        losses["text_loss"] = text / count
    if is_contextual:
        losses["image_loss_by_ratio"] = [row[0] / row[2] if row[2] else None for row in by_bin]
    return losses


def _condition(name: str | None, validation_set: ValidationSet, rows: torch.Tensor, accelerator) -> dict:
    return {} if name is None else {name: validation_set.condition[rows].to(accelerator.device).long()}


@torch.no_grad()
def sample_images(
    pipeline: "DiffusionPipeline", condition: dict[str, list], num_images: int, accelerator: "Accelerator"
) -> torch.Tensor:
    """Images `(num_images, 3, H, W)` in [0, 1], each from a generator of its own seeded by its number.

    Every process draws its share, all equally often; the result is complete in each.

    Args:
        condition (`dict`): `{"prompt": [...]}` or `{"class_labels": [...]}`, `num_images` of them; or empty.
    """
    share = -(-num_images // accelerator.num_processes)
    numbers = [min(i, num_images - 1) for i in range(share * accelerator.num_processes)]
    own = numbers[accelerator.process_index * share :][:share]
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        **({name: [values[i] for i in own] for name, values in condition.items()} or {"num_images_per_prompt": share}),
        generator=[torch.Generator().manual_seed(i) for i in own],
        output_type="pt",
    ).images  # (share, 3, H, W)
    images = accelerator.gather(images.float().contiguous().to(accelerator.device))[:num_images]
    return images.cpu()
