"""The losses of the RQ-VAE's training that look at a reconstruction beside its original: pixels and LPIPS.

LPIPS needs `lpips` and `torchvision`, of the `train` extra, imported where they are used.
"""

import bisect
import warnings
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file


def reconstruction_loss(
    sample: torch.Tensor, pixel_values: torch.Tensor, kind: str = "mse"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixel loss to descend and the MSE to report, means over all elements, in units of the [-1, 1] range.

    Args:
        sample (`torch.Tensor`), pixel_values (`torch.Tensor`): Reconstruction and original, of the same shape.
        kind (`str`, defaults to `"mse"`): `"mse"`, `"l1"`, or `"both"`: their sum.

    Raises:
        `ValueError`: another `kind`.
    """
    if kind not in ("mse", "l1", "both"):
        raise ValueError(f"`kind` must be 'mse', 'l1' or 'both', got {kind!r}.")
    mse = F.mse_loss(sample, pixel_values)
    if kind == "mse":
        return mse, mse
    l1 = F.l1_loss(sample, pixel_values)
    return (l1 if kind == "l1" else mse + l1), mse


class PerceptualLoss(nn.Module):
    r"""LPIPS (Zhang et al., CVPR 2018) of the `lpips` package, version 0.1, on VGG16: a distance between images.

    Σ_l mean_{h,w} w_l · (φ̂_l(sample) - φ̂_l(pixel_values))², where φ̂_l are the features of five layers, each vector
    divided by its length, and w_l the package's own weights. All of it is frozen and computes in float32 whatever the
    autocast: the features of two similar images differ by little.

    Args:
        weights (`str` or `Path`, *optional*): VGG16's weights for ImageNet, a state dict of torchvision's `vgg16`
            (`.pth` or `.safetensors`; the classifier in it is not used). By default torchvision downloads them, 528 MB
            into torch's cache, once.

    Raises:
        `ImportError`: `lpips` or torchvision is not installed.
        `OSError`: nothing was given, and the download failed.
        `ValueError`: no such file, or it is not a whole VGG16.
    """

    minimum_size = 16  # height and width in pixels: VGG16 halves them four times

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise ImportError(
                "The perceptual loss needs the packages lpips and torchvision (`pip install lpips torchvision`); a "
                "perceptual weight of 0 trains without it."
            ) from error
        # On the meta device nothing is allocated or drawn, and what the strict loading below left out could not run.
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package's old way of asking torchvision for a network
            self.metric = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
        linear = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth", "cpu", weights_only=True)
        # The package registers its linear layers under two names each, "lin0" and "lins.0".
        linear |= {f"lins.{key[3:]}": tensor for key, tensor in linear.items()}
        scaling = {f"scaling_layer.{name}": tensor for name, tensor in lpips.ScalingLayer().named_buffers()}
        self.metric.load_state_dict({**_load_vgg16(weights), **linear, **scaling}, strict=True, assign=True)
        self.eval().requires_grad_(False)

    def forward(self, sample: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Mean distance over the batch, a scalar: of `(B, 3, H, W)` in [-1, 1], H and W at least 16."""
        with torch.autocast(sample.device.type, enabled=False):
            return self.metric(sample.float(), pixel_values.float()).mean()


def _load_vgg16(path: str | Path | None) -> dict[str, torch.Tensor]:
    """VGG16's convolutions under the names that the `lpips` package gives them, all of them or an error."""
    from torchvision.models.vgg import VGG16_Weights, cfgs, make_layers

    if path is None:
        source = VGG16_Weights.IMAGENET1K_V1
        try:
            state = source.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:  # no network; a download that is not what was announced
            raise OSError(
                f"The perceptual loss needs VGG16's ImageNet weights, and {source.url} could not be downloaded "
                f"({error}). Fetch that file where there is a network and give its path by --lpips_weights, or train "
                "without the perceptual loss by --perceptual_weight 0."
            ) from error
    else:
        state = _load_state_dict(Path(path))

    with torch.device("meta"):
        expected = {f"features.{key}": tensor for key, tensor in make_layers(cfgs["D"]).state_dict().items()}
    state = {key: tensor for key, tensor in state.items() if not key.startswith("classifier.")}
    wrong = sorted(expected.keys() ^ state.keys())
    wrong += [key for key in expected.keys() & state.keys() if state[key].shape != expected[key].shape]
    if wrong:
        raise ValueError(
            "`lpips_weights` must be a state dict of torchvision's vgg16 with `features.0.weight` to "
            f"`features.28.bias`; in {path} these are missing, unknown or of another shape: {', '.join(wrong[:5])}"
            + (f" and {len(wrong) - 5} more." if len(wrong) > 5 else ".")
        )
    renamed = {}
    for key, tensor in state.items():
        layer = key.split(".")[1]
        # The package cuts the features before each pooling: slice 1 is layers 0 to 3, and so on.
        renamed[f"net.slice{bisect.bisect_right((4, 9, 16, 23), int(layer)) + 1}.{key[len('features.') :]}"] = tensor
    return renamed


def _load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ValueError(f"`lpips_weights` must be a file, the state dict of torchvision's vgg16, got {str(path)!r}.")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        return {str(key): tensor.float() for key, tensor in state.items()}
    # A text file, half a file, a pickle of something else: each fails in a way of its own.
    except (OSError, RuntimeError, EOFError, AttributeError, ValueError, UnpicklingError, SafetensorError) as error:
        raise ValueError(f"`lpips_weights` must be a state dict; {path} is not readable as one: {error}") from error
