"""The patch discriminator that sharpens the RQ-VAE's reconstructions in training, and its losses."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class PatchDiscriminator(nn.Module):
    r"""PatchGAN (Isola et al., CVPR 2017): a map of logits, each of which judges one patch of the image.

    4×4 convolutions, the first `num_layers` with stride 2. The parent normalizes by batch; here each image is
    normalized alone (GroupNorm): neither micro-batches, nor processes, nor which images share a pass change anything.

    Args:
        in_channels (`int`, defaults to 3): Channels of the image.
        channels (`int`, defaults to 64): Channels of the first convolution; they double with each of the next.
        num_layers (`int`, defaults to 2): Convolutions of stride 2. With the 2 of the paper a logit sees 34×34 pixels.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, num_layers: int = 2):
        super().__init__()
        for name, value in dict(in_channels=in_channels, channels=channels, num_layers=num_layers).items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.num_layers = num_layers
        layers = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, num_layers + 1):
            before, width = width, channels * min(2**layer, 8)
            stride = 2 if layer < num_layers else 1
            layers += [
                # A bias would be taken away again by the normalization.
                nn.Conv2d(before, width, 4, stride, padding=1, bias=False),
                nn.GroupNorm(math.gcd(32, width), width),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def minimum_size(self) -> int:
        """The smallest height or width of an image that still gives a logit: the last two convolutions take 1 each."""
        return 3 * 2**self.num_layers

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, in_channels, H, W)` in about [-1, 1] -> logits `(B, 1, H / 2^num_layers - 2, W / 2^num_layers - 2)`;
        the higher, the more real."""
        return self.layers(pixel_values)


def discriminator_hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """½ E[max(0, 1 - real)] + ½ E[max(0, 1 + fake)] of logits of any shape: 1 where all logits are 0."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adversarial_loss(fake: torch.Tensor) -> torch.Tensor:
    """-E[fake]: what the RQ-VAE descends to look real. The counterpart of the hinge loss, unbounded itself."""
    return -fake.mean()


def adaptive_weight(
    reconstruction_gradient: torch.Tensor, adversarial_gradient: torch.Tensor, maximum: float = 1e4
) -> torch.Tensor:
    r"""How much the adversarial loss has to weigh to pull as hard as the reconstruction loss.

    ‖∇_W L_rec‖ / (‖∇_W L_adv‖ + 1e-4), clamped to `[0, maximum]`, where W is the weight of the decoder's last layer
    (Esser et al., "Taming Transformers", CVPR 2021, eq. 7). NaN propagates.

    Args:
        reconstruction_gradient (`torch.Tensor`), adversarial_gradient (`torch.Tensor`): ∇_W of both losses.
        maximum (`float`, defaults to 1e4): Where the adversarial gradient vanishes, the quotient is unbounded.
    """
    weight = reconstruction_gradient.norm() / (adversarial_gradient.norm() + 1e-4)
    return weight.clamp(0, maximum)
