"""The masks of training: what the Contextual RQ-Transformer is to predict of each image."""

import math
from typing import NamedTuple

import torch


def random_mask(
    batch_size: int, num_positions: int, generator: torch.Generator, stratified: bool = True
) -> torch.Tensor:
    """Draw what is to be predicted: for each image r ~ U[0, 1), ceil(cos(pi r / 2) * N) positions, chosen uniformly.

    Args:
        batch_size (`int`): Images.
        num_positions (`int`): N, stacks of an image.
        generator (`torch.Generator`): On the CPU.
        stratified (`bool`, defaults to `True`): Take r_i = (i + u) / batch_size in random order, with one u ~ U[0, 1),
            instead of independent r. Each r_i alone is still uniform, but every batch has its share of easy and of
            hard masks: the loss loses the noise that the choice of ratios brings, at no cost.

    Returns:
        Mask `(batch_size, num_positions)` bool, True = to predict, at least one in each row.
    """
    if stratified:
        u = torch.rand(1, generator=generator, dtype=torch.float64)
        r = (torch.randperm(batch_size, generator=generator) + u) / batch_size
    else:
        r = torch.rand(batch_size, generator=generator, dtype=torch.float64)
    num_masked = (num_positions * torch.cos(r * math.pi / 2)).ceil().clamp(1, num_positions)
    order = torch.rand(batch_size, num_positions, generator=generator, dtype=torch.float32).argsort(dim=1)
    return order < num_masked[:, None]  # a row of `order` is a uniform permutation: n of its entries are below n


class Draws(NamedTuple):
    """What is random about the images of a batch: masks `(B, N)`, and whose condition is dropped, `(B,)`; bool."""

    masks: torch.Tensor
    dropped: torch.Tensor

    def part(self, first: int, number: int) -> "Draws":
        """Those of some images."""
        return Draws(self.masks[first : first + number], self.dropped[first : first + number])


def draws_of_step(
    batch_size: int,
    num_positions: int,
    condition_dropout: float,
    seed: int,
    step: int,
    stratified: bool = True,
    masked: bool = True,
) -> Draws:
    """The draws of an optimizer step, for the whole batch: every process makes them all and takes its part.

    So the batch is stratified as a whole, the number of masked codes is known without asking the others, and the
    draws do not depend on the split.

    Args:
        masked (`bool`, defaults to `True`): Otherwise everything is to be predicted, as by the autoregressive model.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    if masked:
        masks = random_mask(batch_size, num_positions, generator, stratified)
    else:
        masks = torch.ones(batch_size, num_positions, dtype=torch.bool)
    return Draws(masks, torch.rand(batch_size, generator=generator, dtype=torch.float32) < condition_dropout)
