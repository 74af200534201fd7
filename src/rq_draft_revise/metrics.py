"""Metrics of generated images and of reconstructions, as pure functions on features, logits, embeddings or pixels.

The networks that the features come from are in `features.py`; modules for `evaluate.load` over these functions are in
`evaluate_modules/`.
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .whole_files import whole_file


# The Fréchet distance is biased upwards, the more the fewer the samples are.
MIN_SAMPLES = 10_000


def check_num_samples(num_samples: int, allow_few_samples: bool = False, name: str = "samples") -> None:
    """Raise a `ValueError` for fewer than `MIN_SAMPLES` samples, unless `allow_few_samples`."""
    if num_samples < MIN_SAMPLES and not allow_few_samples:
        raise ValueError(
            f"`{name}` must be at least {MIN_SAMPLES:,} for a figure to compare with others (50,000 is usual), got "
            f"{num_samples:,}. `allow_few_samples=True` computes it all the same."
        )


def check_features(features: Tensor, name: str = "features") -> Tensor:
    """`features` in float64, or a `ValueError`: they must be finite numbers of shape `(num_samples, dim)`."""
    features = torch.as_tensor(features)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"`{name}` must have shape (num_samples, dim), got {tuple(features.shape)}.")
    features = features.double()
    if not torch.isfinite(features).all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
    return features


# ------------------------------------------------------------------------------------------------ Fréchet distance


class RunningMoments:
    """Mean and covariance of features that come in batches: a data set's features need not fit into memory.

    Batches, and the moments of several processes, are combined by Chan et al.'s update, in float64.
    """

    def __init__(self):
        self.num_samples, self.mean, self.scatter = 0, None, None  # scatter: Σ (x - mean)(x - mean)ᵀ

    def update(self, features: Tensor) -> None:
        """Add `(B, F)` features.

        Raises:
            `ValueError`: another F than before, or numbers that are not finite.
        """
        features = check_features(features).cpu()
        mean = features.mean(dim=0)
        centered = features - mean
        self._add(len(features), mean, centered.mT @ centered)

    def merge(self, other: "RunningMoments") -> None:
        """Add all that `other` has seen."""
        if other.num_samples:
            self._add(other.num_samples, other.mean, other.scatter)

    def _add(self, num_samples: int, mean: Tensor, scatter: Tensor) -> None:
        if self.num_samples == 0:
            self.num_samples, self.mean, self.scatter = num_samples, mean, scatter
            return
        if mean.shape != self.mean.shape:  # one feature would be broadcast to many
            raise ValueError(f"`features` must have {len(self.mean)} columns, as those before, got {len(mean)}.")
        total = self.num_samples + num_samples
        offset = mean - self.mean
        weight = self.num_samples * num_samples / total
        self.scatter = self.scatter + scatter + weight * torch.outer(offset, offset)
        self.mean = self.mean + offset * (num_samples / total)
        self.num_samples = total

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean `(F,)` and covariance `(F, F)`, with N - 1 in the denominator, in float64.

        Raises:
            `ValueError`: fewer than two samples.
        """
        if self.num_samples < 2:
            raise ValueError(f"`features` must be of at least 2 samples for a covariance, got {self.num_samples}.")
        return self.mean, self.scatter / (self.num_samples - 1)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(F,)` and covariance `(F, F)` of features `(N, F)`, in float64."""
    running = RunningMoments()
    running.update(features)
    return running.compute()


def frechet_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    r"""Squared Fréchet distance of two Gaussians, |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½).

    The trace of the root is the sum of the roots of the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric and has those
    of Σ₁Σ₂. A general matrix root of Σ₁Σ₂ has, with fewer samples than features, an imaginary part to explain away.

    Args:
        mean_1, mean_2 (`torch.Tensor` of shape `(F,)`), covariance_1, covariance_2 (`(F, F)`): Computed in float64.

    Raises:
        `ValueError`: shapes that do not fit, or numbers that are not finite.
    """
    mean_1, covariance_1, mean_2, covariance_2 = (
        torch.as_tensor(value).double().cpu() for value in (mean_1, covariance_1, mean_2, covariance_2)
    )
    dim = mean_1.shape[-1] if mean_1.ndim == 1 else None
    shapes = {"mean_1": mean_1, "mean_2": mean_2, "covariance_1": covariance_1, "covariance_2": covariance_2}
    for name, value in shapes.items():
        expected = (dim,) if name.startswith("mean") else (dim, dim)
        if tuple(value.shape) != expected:
            raise ValueError(f"`{name}` must have shape {expected}, as `mean_1` has it, got {tuple(value.shape)}.")
        if not torch.isfinite(value).all():
            raise ValueError(f"`{name}` must be finite, got NaN or infinity.")

    eigenvalues, eigenvectors = torch.linalg.eigh(covariance_1)
    root = (eigenvectors * eigenvalues.clamp(min=0).sqrt()) @ eigenvectors.mT
    product = root @ covariance_2 @ root
    # A covariance has no negative eigenvalues; what is below 0 here is rounding.
    trace_of_root = torch.linalg.eigvalsh((product + product.mT) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * trace_of_root
    return max(distance.item(), 0.0)


def frechet_inception_distance(real: Tensor, generated: Tensor, allow_few_samples: bool = False) -> float:
    """FID of two sets of features `(N, F)`; the word Inception holds if they are Inception's.

    Raises:
        `ValueError`: fewer than 10,000 samples in either set, unless `allow_few_samples`.
    """
    check_num_samples(len(real), allow_few_samples, "real")
    check_num_samples(len(generated), allow_few_samples, "generated")
    return frechet_distance(*moments(real), *moments(generated))


# ------------------------------------------------------------------------------------------------- Inception Score


def inception_score(
    logits: Tensor, num_splits: int = 10, split_size: int | None = None, shuffle_seed: int | None = 2020
) -> tuple[float, float]:
    """exp E_x KL(p(y|x) ‖ p(y)) in each of several splits of the samples (Salimans et al. 2016).

    Args:
        logits (`torch.Tensor` of shape `(N, num_classes)`): Of a classifier; Inception's without its bias.
        num_splits (`int`, defaults to 10): Parts, as equal as can be.
        split_size (`int`, *optional*): Samples of a part instead of their number; the last may be smaller. ADM's
            evaluation has 5,000.
        shuffle_seed (`int`, *optional*, defaults to 2020): Shuffles the samples first, by NumPy's legacy generator as
            torch-fidelity does. Samples sorted by class must be shuffled: a part of few classes has a small score.

    Returns:
        Mean and standard deviation (with N in the denominator) over the splits.
    """
    logits = check_features(logits, "logits").cpu()
    num_samples = len(logits)
    if split_size is not None:
        if split_size < 1:
            raise ValueError(f"`split_size` must be at least 1, got {split_size}.")
        bounds = [*range(0, num_samples, split_size), num_samples]
    else:
        if not 1 <= num_splits <= num_samples:
            raise ValueError(f"`num_splits` must lie in [1, {num_samples}], the number of samples, got {num_splits}.")
        bounds = [i * num_samples // num_splits for i in range(num_splits + 1)]
    if shuffle_seed is not None:
        logits = logits[torch.from_numpy(np.random.RandomState(shuffle_seed).permutation(num_samples))]

    log_probs = logits.log_softmax(dim=1)
    scores = []
    for start, end in zip(bounds[:-1], bounds[1:]):
        part = log_probs[start:end]  # (n, C)
        log_marginal = part.logsumexp(dim=0) - np.log(end - start)
        scores.append((part.exp() * (part - log_marginal)).sum(dim=1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


# -------------------------------------------------------------------------------------------- precision and recall


def precision_and_recall(real: Tensor, generated: Tensor, k: int = 3, chunk_elements: int = 2**26) -> dict[str, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 2 and 3).

    A set's manifold is the union of balls around its features, each as large as the distance to the k-th nearest other
    feature of the set. Precision is the share of generated features in the manifold of the real ones: quality. Recall
    is the share of real features in the manifold of the generated ones: diversity.

    Args:
        real (`torch.Tensor` of shape `(N, F)`), generated (`(M, F)`): Features. Both figures depend on N and M:
            compare only equal numbers.
        k (`int`, defaults to 3): Which neighbour.
        chunk_elements (`int`): Distances held at a time, in float64. Any number gives the same result.

    Returns:
        `{"precision": ..., "recall": ...}`

    Raises:
        `ValueError`: features of different dimension, or no more than k samples.
    """
    real, generated = check_features(real, "real"), check_features(generated, "generated")
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"`real` and `generated` must be of the same dimension, got {real.shape[1]} and {generated.shape[1]}."
        )
    for name, features in (("real", real), ("generated", generated)):
        if not 1 <= k < len(features):
            raise ValueError(
                f"`k` must lie in [1, {len(features) - 1}], as `{name}` has {len(features)} samples, got {k}."
            )
    # Squared distances by the matrix product lose the digits that squared norms have too many of.
    center = real.mean(dim=0)
    real, generated = real - center, generated - center
    return {
        "precision": _share_inside(generated, real, k, chunk_elements),
        "recall": _share_inside(real, generated, k, chunk_elements),
    }


def _share_inside(points: Tensor, centers: Tensor, k: int, chunk_elements: int) -> float:
    """Of `points` `(N, F)`, the share inside any of the balls to the k-th nearest neighbour of `centers` `(M, F)`."""
    rows = max(1, chunk_elements // len(centers))
    radii = []  # squared, like all distances here
    for start in range(0, len(centers), rows):
        distances = _squared_distances(centers[start : start + rows], centers)  # (rows, M)
        own = torch.arange(len(distances), device=distances.device)
        distances[own, start + own] = -1  # rounding must not make a twin nearer than the point itself
        radii.append(distances.topk(k + 1, largest=False).values[:, -1])
    radii = torch.cat(radii)  # (M,)
    inside = sum(
        (_squared_distances(points[start : start + rows], centers) <= radii).any(dim=1).sum()
        for start in range(0, len(points), rows)
    )
    return inside.item() / len(points)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    norms_a, norms_b = a.square().sum(dim=1, keepdim=True), b.square().sum(dim=1)
    return torch.addmm(norms_a + norms_b, a, b.mT, alpha=-2).clamp(min=0)


# ------------------------------------------------------------------------------------------------- reconstructions


def _pixels(images: Tensor, name: str) -> Tensor:
    """uint8 or floats in [0, 1], `(B, C, H, W)`, as float64 in [0, 1]."""
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"`{name}` must have shape (batch, channels, height, width), got {tuple(images.shape)}.")
    if images.dtype == torch.uint8:
        return images.double() / 255
    if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"`{name}` must be uint8 or floats in [0, 1], got {images.dtype}.")
    return images.double()


def _pair(reconstructions: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
    if reconstructions.shape != originals.shape:
        raise ValueError(
            "`reconstructions` and `originals` must have the same shape, got "
            f"{tuple(reconstructions.shape)} and {tuple(originals.shape)}."
        )
    return _pixels(reconstructions, "reconstructions"), _pixels(originals, "originals")


def psnr(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, -10 log₁₀ MSE over values in [0, 1].

    Args:
        reconstructions, originals (`torch.Tensor` of shape `(B, C, H, W)`): uint8, or floats in [0, 1].

    Returns:
        `(B,)` float64; infinite where two images are equal.
    """
    reconstructions, originals = _pair(reconstructions, originals)
    return -10 * (reconstructions - originals).square().mean(dim=(1, 2, 3)).log10()


def ssim(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004).

    Gaussian windows of 11×11 and σ = 1.5 that lie wholly inside the image, K₁ = 0.01, K₂ = 0.03, each channel by
    itself, then the mean.

    Args:
        reconstructions, originals (`torch.Tensor` of shape `(B, C, H, W)`): uint8, or floats in [0, 1]; H and W at
            least 11.

    Returns:
        `(B,)` float64.
    """
    x, y = _pair(reconstructions, originals)
    if min(x.shape[2:]) < 11:
        raise ValueError(f"`reconstructions` must be at least 11×11, the size of a window, got {tuple(x.shape[2:])}.")
    weights = torch.exp(-((torch.arange(11, dtype=x.dtype, device=x.device) - 5) ** 2) / (2 * 1.5**2))
    weights = weights / weights.sum()
    batch, channels, height, width = x.shape

    def window_means(values: Tensor) -> Tensor:
        values = values.reshape(batch * channels, 1, height, width)
        return F.conv2d(F.conv2d(values, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mean_x, mean_y = window_means(x), window_means(y)
    variance_x = window_means(x * x) - mean_x * mean_x
    variance_y = window_means(y * y) - mean_y * mean_y
    covariance = window_means(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return similarity.reshape(batch, -1).mean(dim=1)


# ------------------------------------------------------------------------------------------------------ CLIP score


def clip_score(image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
    """Cosine similarity of each image and its own text; the paper's figure is the mean, 0.26.

    Hessel et al.'s CLIPScore is 2.5 times the positive part of it.

    Args:
        image_embeddings, text_embeddings (`torch.Tensor` of shape `(B, F)`): Row i of both belongs together.

    Returns:
        `(B,)` float64.
    """
    images, texts = check_features(image_embeddings, "image_embeddings"), check_features(text_embeddings, "texts")
    if images.shape != texts.shape:
        raise ValueError(
            "`image_embeddings` and `text_embeddings` must have the same shape, got "
            f"{tuple(images.shape)} and {tuple(texts.shape)}."
        )
    return F.cosine_similarity(images, texts)


# ------------------------------------------------------------------------------------------------- reference files


@dataclass
class ReferenceStatistics:
    """What generated images are compared with: moments of a data set's features, and how they were made.

    Attributes:
        mean (`torch.Tensor` of shape `(F,)`), covariance (`(F, F)`): In float64.
        num_samples (`int`, *optional*), resolution (`int`, *optional*), protocol (`str`, *optional*), network (`str`,
            *optional*): Images, their size in pixels, and the names of the protocol and of the feature network; `None`
            where a file of others does not say.
        network_sha256 (`str`, *optional*): Digest of the network's weights, or of its TorchScript file.
        features (`torch.Tensor` of shape `(n, F)`, *optional*): Features of some images, for precision and recall.
        images (`np.ndarray` of shape `(n, H, W, 3)`, uint8, *optional*): The images themselves (ADM's format).
        mean_spatial, covariance_spatial (*optional*): Moments of the spatial features of sFID (ADM's format).
    """

    mean: Tensor
    covariance: Tensor
    num_samples: int | None = None
    resolution: int | None = None
    protocol: str | None = None
    network: str | None = None
    network_sha256: str | None = None
    features: Tensor | None = None
    images: np.ndarray | None = None
    mean_spatial: Tensor | None = None
    covariance_spatial: Tensor | None = None

    RECORD = ("num_samples", "resolution", "protocol", "network", "network_sha256")
    ARRAYS = {"mu": "mean", "sigma": "covariance", "features": "features", "arr_0": "images",
              "mu_s": "mean_spatial", "sigma_s": "covariance_spatial"}  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write an npz of the parent's format, `mu` and `sigma`, and of ADM's where there are `images`.

        `record`, a JSON string that both ignore, says the rest. There is never half a file.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"`path` must end in .npz, got {path}.")
        arrays = {name: getattr(self, attribute) for name, attribute in self.ARRAYS.items()}
        arrays = {name: np.asarray(array) for name, array in arrays.items() if array is not None}
        record = json.dumps({name: getattr(self, name) for name in self.RECORD})
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as aside, aside.open("wb") as file:
            np.savez(file, record=np.array(record), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "ReferenceStatistics":
        """Read what [`save`] wrote, or a file of the parent's (`mu`, `sigma`) or of ADM's (also `arr_0`, `mu_s`, ...).

        Nothing in it is unpickled.

        Raises:
            `ValueError`: no such file, or no statistics in it.
        """
        if not Path(path).is_file():
            raise ValueError(f"`reference` must be an npz file of statistics, and there is none at {path}.")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in (*cls.ARRAYS, "record") if name in file.files}
                if "acts" in file.files:  # so the parent calls the features that it saves beside its own samples
                    arrays["features"] = file["acts"]
            record = json.loads(arrays.pop("record").item()) if "record" in arrays else {}
            mean, covariance = arrays["mu"], arrays["sigma"]
        except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"`reference` must be an npz with `mu` and `sigma`, and {path} is not one: {error!r}."
            ) from error
        if mean.ndim != 1 or covariance.shape != (*mean.shape, *mean.shape):
            raise ValueError(
                f"`reference` must hold `mu` (F,) and `sigma` (F, F); in {path} they are {mean.shape} and "
                f"{covariance.shape}."
            )
        loaded = {
            cls.ARRAYS[name]: array if name == "arr_0" else torch.from_numpy(array) for name, array in arrays.items()
        }
        if "mu_s" in arrays and not record:
            # Only ADM writes these: its own resizing, and Inception's features.
            record = {"protocol": "adm", "network": "inception"}
            if "arr_0" in arrays:
                record["resolution"] = arrays["arr_0"].shape[1]
        return cls(**loaded, **{name: record.get(name) for name in cls.RECORD})

    @property
    def num_features(self) -> int:
        """Real images that precision and recall can be computed from: of `features`, or else of `images`."""
        samples = self.features if self.features is not None else self.images
        return 0 if samples is None else len(samples)

    def check_num_features(self, allow_few_samples: bool = False) -> None:
        """Refuse precision and recall on too few real images.

        Raises:
            `ValueError`: neither features nor images, or fewer than `MIN_SAMPLES` unless `allow_few_samples`.
        """
        if self.num_features == 0:
            raise ValueError(
                "Precision and recall need `reference` to hold features or images of its own, and there are only "
                "moments in it: examples/compute_statistics.py writes both."
            )
        check_num_samples(self.num_features, allow_few_samples, "reference.features")

    def check_comparable(
        self,
        resolution: int | tuple[int, int] | None,
        protocol: str,
        network: str,
        network_sha256: str | None = None,
        trust: bool = False,
    ) -> None:
        """Refuse to compare images of another resolution, protocol or network with these statistics.

        Args:
            resolution (`int` or `tuple[int, int]`, *optional*): Of the images to be compared, or their height and
                width; `None` where they are still to come.
            protocol, network, network_sha256: Of the images to be compared.
            trust (`bool`): Take what the file does not say for equal. What it does say must agree all the same.

        Raises:
            `ValueError`: they differ, or are not known and not trusted.
        """
        if isinstance(resolution, tuple):
            height, width = resolution
            resolution = height if height == width else f"{height}×{width}"
        given = {"resolution": resolution, "protocol": protocol, "network": network}
        for name, value in given.items():
            own = getattr(self, name)
            if own is None and not trust:
                raise ValueError(
                    f"The reference statistics do not say their {name}, so nothing shows that they fit "
                    f"{'the images' if value is None else repr(value)}: make them by examples/compute_statistics.py, "
                    "or vouch for them (`trust=True`, --trust_reference)."
                )
            if None not in (own, value) and own != value:
                raise ValueError(f"The reference statistics are of {name} {own!r}, and these images of {value!r}.")
        if None not in (self.network_sha256, network_sha256) and self.network_sha256 != network_sha256:
            raise ValueError(
                f"The reference statistics are of {network!r} with other weights or another program: sha256 "
                f"{self.network_sha256[:12]}, and these images of {network_sha256[:12]}."
            )

    def describe(self) -> dict[str, Any]:
        """The record, for a results file."""
        return {name: getattr(self, name) for name in self.RECORD}
