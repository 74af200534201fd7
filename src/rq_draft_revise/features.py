"""Feature networks of the metrics, and the protocols by which images reach them.

A feature network takes uint8 images `(B, 3, H, W)` to features `(B, F)`. Inception is torch-fidelity's and CLIP
transformers'; both are imported where they are used, and `import rq_draft_revise` does without.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import Tensor

from .images import to_rgb, to_square
from .metrics import ReferenceStatistics
from .provenance import file_sha256, weights_sha256


# ------------------------------------------------------------------------------------------------------- protocols


@dataclass(frozen=True)
class Protocol:
    """How images become what a feature network sees, and how its Inception Score is split.

    The same images give different figures under different protocols: compare only within one.

    Attributes:
        name (`str`): A key of `PROTOCOLS`.
        crop (`Callable`): PIL image and resolution to a square PIL image: of real images only.
        round_to_nearest (`bool`): How floats in [0, 1] become uint8; otherwise rounded down.
        half_pixel_resize (`bool`): Inception's resizing to 299×299 has pixel centers at halves. Otherwise at integers,
            as TensorFlow 1 has them, whose graph the published weights come from.
        inception_score (`dict`): Keyword arguments of [`~metrics.inception_score`].
    """

    name: str
    crop: Callable[[Image.Image, int], Image.Image]
    round_to_nearest: bool
    half_pixel_resize: bool
    inception_score: dict[str, Any]

    def prepare(self, image: Image.Image, resolution: int) -> Tensor:
        """A real image as uint8 `(3, resolution, resolution)`, as a feature network takes it: see [`to_rgb`]."""
        image = self.crop(to_rgb(image), resolution)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def to_uint8(self, images: Tensor) -> Tensor:
        """Sampled images, floats in [0, 1] of any shape, as uint8.

        Raises:
            `ValueError`: NaN, of which uint8 would make a black or a white pixel.
        """
        if images.isnan().any():
            raise ValueError("`images` must be numbers in [0, 1], got NaN.")
        scaled = 255 * images.float().clamp(0, 1)
        return (scaled.round() if self.round_to_nearest else scaled).to(torch.uint8)


def _adm_crop(image: Image.Image, resolution: int) -> Image.Image:
    """ADM's: halved by box filters as long as it stays large enough, then bicubic."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # pip install torch-fidelity: uint8 images, all of them in the Inception Score's ten shuffled parts.
        Protocol("torch-fidelity", to_square, True, False, {"num_splits": 10, "shuffle_seed": 2020}),
        # guided-diffusion's evaluations: parts of 5,000 in the order of sampling, which there is a random one. Sorted
        # by class they would have to be shuffled.
        Protocol("adm", _adm_crop, False, False, {"split_size": 5000, "shuffle_seed": 2020}),
        # rq-vae-transformer, by which the paper's figures are made. It hands Inception unrounded floats; here they are
        # rounded to uint8 first, as any saved image is.
        Protocol("rq-vae", to_square, True, True, {"num_splits": 10, "shuffle_seed": 2020}),
    )
}


def get_protocol(name: str) -> Protocol:
    """The protocol of this name, or a `ValueError` that lists them."""
    if name not in PROTOCOLS:
        raise ValueError(f"`protocol` must be one of {sorted(PROTOCOLS)}, got {name!r}.")
    return PROTOCOLS[name]


# ------------------------------------------------------------------------------------------------- feature networks


class NetworkOutput(NamedTuple):
    """What a feature network makes of `(B, 3, H, W)` images.

    Attributes:
        features (`torch.Tensor` of shape `(B, F)`): For the Fréchet distance, precision and recall.
        logits (`torch.Tensor` of shape `(B, num_classes)`, *optional*): For the Inception Score.
        spatial (`torch.Tensor` of shape `(B, S)`, *optional*): For ADM's sFID.
    """

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class FeatureNetwork:
    """Any network, callable with uint8 images, as the metrics take it.

    Args:
        network (`Callable`): From uint8 `(B, 3, H, W)` to features `(B, F)` or a [`NetworkOutput`]. A module is moved
            to `device` and put into evaluation mode.
        name (`str`): By which statistics are told apart from those of other networks.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where the images are sent.
        sha256 (`str`, *optional*): Digest of the network, of a file it comes from for instance. By default that of a
            module's weights, or of the whole TorchScript module: two without weights are different programs.

    Attributes:
        sha256 (`str`, *optional*): The digest; `None` for a module without weights and for other callables, which
            only their name tells apart.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Any],
        name: str,
        device: torch.device | str = "cpu",
        sha256: str | None = None,
    ):
        if not callable(network):
            raise ValueError(f"`network` must be callable with uint8 images (B, 3, H, W), got {network!r}.")
        self.name, self.device = name, torch.device(device)
        if isinstance(network, nn.Module):
            network = network.eval()
            if sha256 is None and isinstance(network, torch.jit.ScriptModule):
                sha256 = hashlib.sha256(network.cpu().save_to_buffer()).hexdigest()
            elif sha256 is None and network.state_dict():
                sha256 = weights_sha256(network)
            network = network.to(device)
        self.sha256 = sha256
        self.network = network

    @torch.no_grad()
    def __call__(self, images: Tensor) -> NetworkOutput:
        """Features of uint8 images `(B, 3, H, W)`, in float32 and on the CPU.

        Raises:
            `ValueError`: other images, or an output that is not finite numbers `(B, F)`.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"`images` must be uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}.")
        # An image read from a file has its channels last in memory, for which convolutions round otherwise; and TF32,
        # cuDNN's default, would keep three digits.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            output = self.network(images.to(self.device).contiguous())
        output = output if isinstance(output, NetworkOutput) else NetworkOutput(output)
        for name, value in zip(output._fields, output):
            if value is None and name != "features":
                continue
            if not isinstance(value, Tensor):
                got = type(value).__name__
            elif value.ndim != 2 or len(value) != len(images):
                got = tuple(value.shape)
            elif not (finite := torch.isfinite(value).all(dim=1)).all():
                got = f"NaN or infinity for {(~finite).sum()} of {len(images)} images"
            else:
                continue
            raise ValueError(
                f"The feature network {self.name!r} must return finite {name} of shape ({len(images)}, F), got {got}."
            )
        return NetworkOutput(*(None if value is None else value.float().cpu() for value in output))


class InceptionFeatures(nn.Module):
    r"""torch-fidelity's Inception v3, the network of the FID: 2048 features and 1008 logits.

    Args:
        weights (`str` or `Path`, *optional*): The file `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity
            (pytorch-fid's `pt_inception-2015-12-05-6726825d.pth` names the same digest). By default it is taken from
            torch's cache, or downloaded into it.
        half_pixel_resize (`bool`, defaults to `False`): See [`Protocol`]. It brings the parent's logits along, which
            keep their bias; torch-fidelity and ADM leave it out.
        return_spatial (`bool`, defaults to `False`): Also sFID's features, `(B, 2023)`.

    Raises:
        `ImportError`: torch-fidelity is not installed.
        `OSError`: nothing was given, and the download failed.
        `ValueError`: no such file, or not exactly these weights in it.
    """

    def __init__(
        self, weights: str | Path | None = None, half_pixel_resize: bool = False, return_spatial: bool = False
    ):
        super().__init__()
        self.inception = _load_inception(weights)
        self.half_pixel_resize, self.return_spatial = half_pixel_resize, return_spatial

    def forward(self, images: Tensor) -> NetworkOutput:
        """From uint8 `(B, 3, H, W)` of any size: they are resized to 299×299 here."""
        spatial = []
        if self.return_spatial:
            # TensorFlow's "mixed_6/conv", of which the first 7 channels, in its order: (B, 17, 17, 7) flattened.
            handle = self.inception.Mixed_6d.branch1x1.register_forward_hook(
                lambda module, inputs, output: spatial.append(output[:, :7].permute(0, 2, 3, 1).flatten(1))
            )
        try:
            features, logits = self._half_pixel(images) if self.half_pixel_resize else self.inception(images)
        finally:
            if self.return_spatial:
                handle.remove()
        return NetworkOutput(features, logits, *spatial)

    def _half_pixel(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The parent's: the same layers after another resizing and scaling, without rounding in between."""
        net = self.inception
        hidden = F.interpolate(images.float(), size=(299, 299), mode="bilinear", align_corners=False) / 127.5 - 1
        for layer in (
            *(net.Conv2d_1a_3x3, net.Conv2d_2a_3x3, net.Conv2d_2b_3x3, net.MaxPool_1),
            *(net.Conv2d_3b_1x1, net.Conv2d_4a_3x3, net.MaxPool_2),
            *(net.Mixed_5b, net.Mixed_5c, net.Mixed_5d),
            *(net.Mixed_6a, net.Mixed_6b, net.Mixed_6c, net.Mixed_6d, net.Mixed_6e),
            *(net.Mixed_7a, net.Mixed_7b, net.Mixed_7c, net.AvgPool),
        ):
            hidden = layer(hidden)
        features = hidden.flatten(1)  # (B, 2048)
        return features, net.fc(features)  # the parent's Inception Score keeps the bias


def _load_inception(weights: str | Path | None) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError("The Inception features need torch-fidelity: `pip install torch-fidelity`.") from error
    if weights is None:
        # Where torch-fidelity itself looks and downloads to.
        weights = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
        if not weights.is_file():
            try:
                weights.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(URL_INCEPTION_V3, str(weights), hash_prefix="6726825d", progress=False)
            except (OSError, RuntimeError) as error:  # no network; a download that is not what was announced
                raise OSError(
                    f"The Inception features need their weights, and {URL_INCEPTION_V3} could not be downloaded "
                    f"({error}). Fetch that file where there is a network and give its path by `weights`, "
                    "--inception_weights."
                ) from error
    if not Path(weights).is_file():
        raise ValueError(f"`weights` must be Inception's weights file, and there is none at {weights}.")
    try:
        # torch-fidelity unpickles anything. Once the file is read here, it is known to hold no more than tensors.
        torch.load(weights, map_location="cpu", weights_only=True)
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
        )
    # A text file, half a file, a pickle of something else, other keys: each fails in a way of its own.
    except (OSError, RuntimeError, EOFError, AttributeError, TypeError, ValueError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"`weights` must be the state dict of torch-fidelity's Inception, and {weights} is not: {reason}"
        ) from error


class ImageClassifierModel(ModelMixin, ConfigMixin):
    r"""A small residual network for small images, whose penultimate features stand in for Inception's.

    For data sets that Inception knows nothing of, and machines that have no copy of it. Figures on its features are
    good for comparing rows of one table, never with published FIDs. Trained by `examples/train_classifier.py`.

    Args:
        num_classes (`int`): Classes.
        sample_size (`int`): Height and width of the images it was trained on; others are refused.
        block_channels (`tuple[int, ...]`): Channels of each stage; each but the first halves the size.
        layers_per_block (`int`): Residual layers a stage.
        norm_num_groups (`int`): Groups of the group norms.
        labels (`list[str]`, *optional*): Names of the classes.
    """

    @register_to_config
    def __init__(
        self,
        num_classes: int = 10,
        sample_size: int = 32,
        block_channels: tuple[int, ...] = (32, 64, 128),
        layers_per_block: int = 2,
        norm_num_groups: int = 8,
        labels: list[str] | None = None,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(3, block_channels[0], kernel_size=3, padding=1)
        layers, channels = [], block_channels[0]
        for stage, width in enumerate(block_channels):
            for layer in range(layers_per_block):
                stride = 2 if stage > 0 and layer == 0 else 1
                layers.append(ResidualLayer(channels, width, stride, norm_num_groups))
                channels = width
        self.layers = nn.Sequential(*layers)
        self.norm_out = nn.GroupNorm(norm_num_groups, channels)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, pixel_values: Tensor) -> NetworkOutput:
        """Features and logits of pixel values `(B, 3, sample_size, sample_size)` in [-1, 1]."""
        hidden = self.layers(self.conv_in(pixel_values))  # (B, C, h, w)
        features = F.relu(self.norm_out(hidden)).mean(dim=(2, 3))  # (B, C)
        return NetworkOutput(features, self.head(features))

    def features_of(self, images: Tensor) -> NetworkOutput:
        """The same of uint8 images."""
        size = self.config.sample_size
        if tuple(images.shape[2:]) != (size, size):
            raise ValueError(f"This classifier takes images of {size}×{size} pixels, got {tuple(images.shape[2:])}.")
        return self(images.to(self.dtype) / 127.5 - 1)


class ResidualLayer(nn.Module):
    """Pre-activation residual block (He et al. 2016): twice GroupNorm, ReLU and a 3×3 convolution, plus a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, num_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1)
        self.norm2 = nn.GroupNorm(num_groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride)

    def forward(self, hidden: Tensor) -> Tensor:
        residual = hidden if self.shortcut is None else self.shortcut(hidden)  # (B, C', h', w')
        hidden = self.conv1(F.relu(self.norm1(hidden)))
        return residual + self.conv2(F.relu(self.norm2(hidden)))


class _UInt8Classifier(nn.Module):
    """`ImageClassifierModel.features_of` as a module, so that its weights move and are digested with it."""

    def __init__(self, classifier: ImageClassifierModel):
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> NetworkOutput:
        return self.classifier.features_of(images)


def load_classifier(folder: str | Path) -> ImageClassifierModel:
    """An [`ImageClassifierModel`] that `save_pretrained` wrote, whole or not at all.

    Raises:
        `ValueError`: no such folder, or weights that are missing or too many.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"`folder` must hold a classifier's config.json and weights, and {folder} has no config.json."
        )
    try:
        # diffusers only warns of weights that are missing, and leaves them at random.
        classifier, info = ImageClassifierModel.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, low_cpu_mem_usage=False
        )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} does not hold a whole classifier: {' '.join(str(error).split())[:300]}") from error
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    if wrong:
        raise ValueError(f"{folder} does not hold a whole classifier: missing or unknown weights {wrong[:5]}.")
    return classifier


def load_feature_network(
    source: str,
    protocol: str = "torch-fidelity",
    inception_weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    return_spatial: bool = False,
) -> FeatureNetwork:
    """The feature network that a flag names.

    Args:
        source (`str`): `"inception"`; the folder of an [`ImageClassifierModel`]; or a TorchScript file (`.pt`, `.ts`)
            of a module from uint8 images to features, whose digest is that of the file. Load TorchScript from people
            you trust: it is a program.
        protocol (`str`, defaults to `"torch-fidelity"`): Whose resizing Inception has.
        inception_weights (`str` or `Path`, *optional*): See [`InceptionFeatures`].
        device (`torch.device` or `str`, defaults to `"cpu"`): Where it runs.
        return_spatial (`bool`, defaults to `False`): Inception also returns sFID's features.

    Raises:
        `ValueError`: anything else; weights that are missing, foreign or not whole.
    """
    half_pixel_resize = get_protocol(protocol).half_pixel_resize
    if source == "inception":
        network = InceptionFeatures(inception_weights, half_pixel_resize, return_spatial)
        return FeatureNetwork(network, "inception", device)
    if return_spatial:
        raise ValueError(f"`return_spatial` is for sFID, whose network is 'inception', got {source!r}.")
    if inception_weights is not None:
        raise ValueError(f"`inception_weights` are for the network 'inception', got {source!r}.")
    path = Path(source)
    if path.is_dir():
        return FeatureNetwork(_UInt8Classifier(load_classifier(path)), "classifier", device)
    if path.suffix in (".pt", ".ts") and path.is_file():
        try:
            network = torch.jit.load(path, map_location="cpu")
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"`source` must be a TorchScript module, and {source} is not: {reason}") from error
        return FeatureNetwork(network, "torchscript", device, file_sha256(path))
    raise ValueError(
        "`source` must be 'inception', the folder of a classifier, or a TorchScript file ending in .pt or .ts, got "
        f"{source!r}."
    )


def reference_features(reference: ReferenceStatistics, network: FeatureNetwork, batch_size: int = 100) -> Tensor:
    """Features `(n, F)` of real images for precision and recall: those in the file, or of the images in it (ADM's).

    Raises:
        `ValueError`: it holds neither.
    """
    reference.check_num_features(allow_few_samples=True)
    if reference.features is not None:
        return reference.features
    images = torch.from_numpy(reference.images).permute(0, 3, 1, 2)
    return torch.cat([network(batch).features for batch in images.split(batch_size)])


# ------------------------------------------------------------------------------------------------------------ CLIP


class CLIPEmbeddings(nn.Module):
    """CLIP's embeddings of images and texts, for the CLIP score.

    Args:
        source (`str`, defaults to `"openai/clip-vit-base-patch32"`): Hub id or folder of a CLIP model with its image
            processor and tokenizer. The paper's is ViT-B/32.

    Raises:
        `OSError`: it is not there, and not to be downloaded.
    """

    def __init__(self, source: str | Path = "openai/clip-vit-base-patch32"):
        super().__init__()
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        try:
            # Missing weights would only be warned of, and left at random.
            self.model, info = CLIPModel.from_pretrained(source, output_loading_info=True)
            self.image_processor = CLIPImageProcessor.from_pretrained(source)
            self.tokenizer = AutoTokenizer.from_pretrained(source)
        except OSError as error:
            raise OSError(
                f"The CLIP score needs {source}, which is neither here nor to be downloaded: give the folder of a "
                f"CLIP model with its image processor and tokenizer (--clip). {' '.join(str(error).split())[:300]}"
            ) from error
        if info["missing_keys"] or info.get("mismatched_keys"):
            raise ValueError(f"{source} is not a whole CLIP model: it lacks {sorted(info['missing_keys'])[:5]}.")
        self.eval().requires_grad_(False)

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Token ids and mask `(B, L)`, L at most the model's context.

        A text that is too long loses its last words and keeps its end token: at that token the model reads off the
        embedding of the text.
        """
        length = self.model.config.text_config.max_position_embeddings
        return self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")

    @torch.no_grad()
    def forward(self, images: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings of uint8 images `(B, 3, H, W)` and of as many texts, `(B, F)` each, on the CPU."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) != len(texts):
            raise ValueError(
                f"`images` must be uint8 (B, 3, H, W), one for each of the {len(texts)} texts, got {images.dtype} "
                f"{tuple(images.shape)}."
            )
        pictures = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]
        pixel_values = self.image_processor(pictures, return_tensors="pt").pixel_values
        tokens = self.tokenize(texts)
        device = self.model.device
        output = self.model(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
            pixel_values=pixel_values.to(device),
        )
        return output.image_embeds.float().cpu(), output.text_embeds.float().cpu()
