"""Metrics against closed forms, plain references and torch-fidelity; the networks and files they are fed from."""

import functools
import math
import multiprocessing
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch_fidelity import feature_extractor_inceptionv3 as fidelity_inception
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torchvision import transforms
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from rq_draft_revise.features import (
    PROTOCOLS,
    CLIPEmbeddings,
    FeatureNetwork,
    ImageClassifierModel,
    NetworkOutput,
    load_feature_network,
    reference_features,
)
from rq_draft_revise.images import to_rgb
from rq_draft_revise.metrics import (
    ReferenceStatistics,
    RunningMoments,
    clip_score,
    frechet_distance,
    frechet_inception_distance,
    inception_score,
    moments,
    precision_and_recall,
    psnr,
    ssim,
)


EXAMPLES = str(Path(__file__).resolve().parents[1] / "examples")
SEEDS = st.integers(0, 2**32 - 1)


def random_features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_images(count: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def mean_colors(images: torch.Tensor) -> NetworkOutput:
    """A network for tests: 12 features, mean colours of quarters, which are its logits too."""
    features = F.adaptive_avg_pool2d(images.float() / 64, 2).flatten(1)
    return NetworkOutput(features, features)


# --------------------------------------------------------------------------------------------------------------- FID


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, dim=st.integers(1, 12))
def test_frechet_distance_of_gaussians_whose_covariances_commute(seed, dim):
    """|μ₁ - μ₂|² + Σ (√λ₁ - √λ₂)², for any rotation of both."""
    random = np.random.default_rng(seed)
    rotation = np.linalg.qr(random.normal(size=(dim, dim)))[0]
    means, eigenvalues = random.normal(size=(2, dim)), random.uniform(0, 4, size=(2, dim))
    covariances = [rotation @ np.diag(values) @ rotation.T for values in eigenvalues]
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((np.sqrt(eigenvalues[0]) - np.sqrt(eigenvalues[1])) ** 2)
    distance = frechet_distance(*map(torch.from_numpy, (means[0], covariances[0], means[1], covariances[1])))
    assert distance == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_frechet_distance_of_gaussians_whose_covariances_do_not_commute():
    """In two dimensions tr √A = √(tr A + 2 √det A), here of A = Σ₁Σ₂."""
    first, second = torch.tensor([[2.0, 0.5], [0.5, 1.0]]), torch.tensor([[1.0, -0.7], [-0.7, 3.0]])
    product = first @ second
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    distance = frechet_distance(torch.tensor([1.0, 2.0]), first, torch.tensor([0.0, 4.0]), second)
    assert distance == pytest.approx(5 + 3 + 4 - 2 * root, rel=1e-6)


@pytest.mark.parametrize("num_samples", [400, 20])  # fewer samples than features: singular covariances
def test_fid_is_torch_fidelitys(num_samples):
    real, generated = random_features(500, 64), 0.8 * random_features(num_samples, 64, seed=1) + 0.3
    statistics = [fid_features_to_statistics(features) for features in (real, generated)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    distance = frechet_inception_distance(real, generated, allow_few_samples=True)
    assert distance == pytest.approx(expected, rel=1e-4)
    assert frechet_inception_distance(generated, real, allow_few_samples=True) == pytest.approx(distance, rel=1e-8)
    assert frechet_inception_distance(real, real, allow_few_samples=True) == pytest.approx(0, abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, cuts=st.lists(st.integers(1, 39), max_size=4, unique=True))
def test_moments_do_not_depend_on_how_the_features_are_split(seed, cuts):
    features = 100 + random_features(40, 5, seed=seed)  # far from 0, where sums of squares lose their digits
    parts = torch.tensor_split(features, sorted(cuts))
    by_batch, of_processes = RunningMoments(), RunningMoments()
    for part in parts:
        by_batch.update(part)
        process = RunningMoments()
        process.update(part)
        of_processes.merge(process)
    of_processes.merge(RunningMoments())  # a process that had nothing to do
    for running in (by_batch, of_processes):
        mean, covariance = running.compute()
        np.testing.assert_allclose(mean, features.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(features.double(), rowvar=False), rtol=1e-9, atol=1e-12)


def test_moments_of_batches_of_another_width_are_refused():
    """One column would be broadcast to all."""
    running, other = RunningMoments(), RunningMoments()
    running.update(random_features(5, 4))
    other.update(random_features(5, 1))
    for add in (lambda: running.update(random_features(5, 1)), lambda: running.merge(other)):
        with pytest.raises(ValueError, match="`features` must have 4 columns, as those before, got 1"):
            add()
    assert running.num_samples == 5


def test_fewer_than_ten_thousand_samples_are_an_error_unless_allowed():
    many, few = random_features(10_000, 2), random_features(9_999, 2, seed=1)
    for real, generated, name in ((few, many, "real"), (many, few, "generated")):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 10,000.*got 9,999"):
            frechet_inception_distance(real, generated)
        assert frechet_inception_distance(real, generated, allow_few_samples=True) >= 0
    assert frechet_inception_distance(many, many) < 1e-9


@pytest.mark.parametrize("bad", [torch.tensor([[1.0, math.nan], [0.0, 1.0]]), torch.zeros(3), torch.zeros(0, 4)])
def test_features_that_are_none_are_refused_by_every_metric(bad):
    good = random_features(8, 2)
    for metric in (
        lambda: frechet_inception_distance(good, bad, allow_few_samples=True),
        lambda: precision_and_recall(good, bad),
        lambda: inception_score(bad, num_splits=1),
        lambda: clip_score(good, bad),
    ):
        with pytest.raises(ValueError, match="must (be finite|have shape)"):
            metric()


# ----------------------------------------------------------------------------------------------------- Inception Score


@pytest.mark.parametrize("num_samples", [1000, 1003])
def test_inception_score_is_torch_fidelitys(num_samples):
    logits = 3 * random_features(num_samples, 17)
    expected = isc_features_to_metric(logits)
    mean, std = inception_score(logits)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-4)
    assert std == pytest.approx(expected["inception_score_std"], rel=1e-4)


def test_inception_score_in_parts_of_a_size_is_adms():
    probs = (3 * random_features(25, 6).double()).softmax(1).numpy()
    scores = []
    for start in range(0, 25, 10):  # the last part has 5
        part = probs[start : start + 10]
        scores.append(np.exp(np.mean(np.sum(part * (np.log(part) - np.log(part.mean(0))), axis=1))))
    mean, _ = inception_score(3 * random_features(25, 6), split_size=10, shuffle_seed=None)
    assert mean == pytest.approx(np.mean(scores), rel=1e-6)


def test_inception_score_lies_between_one_and_the_number_of_classes():
    certain = 1000 * F.one_hot(torch.arange(200) % 8, 8).float()
    assert inception_score(certain, num_splits=1)[0] == pytest.approx(8)
    assert inception_score(torch.zeros(200, 8))[0] == pytest.approx(1)
    sorted_by_class = torch.cat([certain[c::8] for c in range(8)])
    assert inception_score(sorted_by_class)[0] > 6
    assert inception_score(sorted_by_class, shuffle_seed=None)[0] < 3  # why it shuffles


# ------------------------------------------------------------------------------------------------ precision and recall


def plain_precision_and_recall(real, generated, k):
    def share_inside(points, centers):
        radii = [sorted(math.dist(c, other) for other in centers)[k] for c in centers]  # [0] is the point itself
        return np.mean([any(math.dist(p, c) <= r for c, r in zip(centers, radii)) for p in points])

    real, generated = real.double().tolist(), generated.double().tolist()
    return {"precision": share_inside(generated, real), "recall": share_inside(real, generated)}


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_a_plain_loop_and_of_torch_fidelity(k):
    real, generated = random_features(60, 3), 0.6 * random_features(45, 3, seed=1) + 0.5
    scores = precision_and_recall(real, generated, k)
    assert scores == pytest.approx(plain_precision_and_recall(real, generated, k))
    precision, recall = calculate_precision_recall_full(generated, real, k)
    assert scores == pytest.approx({"precision": precision, "recall": recall}, rel=1e-4)
    assert 0.05 < scores["recall"] < scores["precision"] < 1  # the figures differ, or a swap would not show
    for chunk_elements in (1, 1000):
        assert precision_and_recall(real, generated, k, chunk_elements) == scores


def test_precision_and_recall_swap_with_their_arguments():
    real, generated = random_features(80, 4), 0.5 * random_features(70, 4, seed=1)
    one, other = precision_and_recall(real, generated), precision_and_recall(generated, real)
    assert one["precision"] == other["recall"] != one["recall"] == other["precision"]


def test_mode_collapse_costs_recall_and_an_invented_mode_precision():
    modes = [10 * torch.eye(4)[i] + 0.1 * random_features(100, 4, seed=i) for i in range(4)]
    again = [10 * torch.eye(4)[i] + 0.1 * random_features(100, 4, seed=10 + i) for i in range(4)]
    real = torch.cat(modes[:3])
    collapsed = precision_and_recall(real, again[0])
    assert collapsed["precision"] > 0.8 and collapsed["recall"] < 1 / 3 + 1e-6
    inventing = precision_and_recall(real, torch.cat(again))
    assert inventing["recall"] > 0.8 and inventing["precision"] < 3 / 4 + 1e-6
    constant = precision_and_recall(real, real[:1].repeat(50, 1))  # balls of radius 0
    assert constant["precision"] == 1 and constant["recall"] <= 2 / len(real)


def test_features_far_from_zero_lose_no_neighbours():
    """Squared norms around 1e16 would leave of the squared distances, which are around 1, not a digit."""
    real, generated = random_features(60, 3).double(), 0.6 * random_features(45, 3, seed=1).double() + 0.5
    assert precision_and_recall(real + 1e8, generated + 1e8) == precision_and_recall(real, generated)


# ----------------------------------------------------------------------------------------------------- reconstructions


def test_psnr_of_a_constant_error():
    images = torch.full((2, 3, 12, 12), 100, dtype=torch.uint8)
    off = images.clone()
    off[1] += 10
    assert psnr(off, images).tolist() == [math.inf, pytest.approx(20 * math.log10(255 / 10))]
    assert psnr(off / 255, images / 255)[1] == pytest.approx(20 * math.log10(255 / 10), rel=1e-5)


def plain_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Of one channel, window by window."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            cov = (window * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = 0.01**2, 0.03**2
            values.append(
                (2 * mean_a * mean_b + c1) * (2 * cov + c2) / (mean_a**2 + mean_b**2 + c1) / (var_a + var_b + c2)
            )
    return float(np.mean(values))


def test_ssim_is_that_of_a_plain_loop():
    originals = random_images(2, 14)
    reconstructions = (0.7 * originals + 0.3 * random_images(2, 14, seed=1)).to(torch.uint8)
    expected = [
        np.mean([plain_ssim(x.numpy() / 255, y.numpy() / 255) for x, y in zip(a, b)])
        for a, b in zip(reconstructions, originals)
    ]
    assert ssim(reconstructions, originals).tolist() == pytest.approx(expected, rel=1e-6)
    assert ssim(originals, reconstructions).tolist() == pytest.approx(expected, rel=1e-6)
    assert ssim(originals, originals).tolist() == pytest.approx([1, 1])
    last = torch.channels_last  # as images come from files
    assert ssim(*(i.contiguous(memory_format=last) for i in (reconstructions, originals))).tolist() == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    "images", [torch.full((1, 3, 12, 12), 1.5), torch.zeros(1, 3, 12, 12).int(), torch.zeros(3, 12, 12)]
)
def test_pixels_out_of_range_are_refused(metric, images):
    with pytest.raises(ValueError, match="`reconstructions` must"):
        metric(images, images)


def test_clip_score_is_the_cosine_of_each_pair():
    images, texts = random_features(5, 8), random_features(5, 8, seed=1)
    assert torch.allclose(clip_score(images, 3 * images), torch.ones(5).double())
    assert torch.allclose(clip_score(images, -images), -torch.ones(5).double())
    expected = [float(a @ b / a.norm() / b.norm()) for a, b in zip(images, texts)]
    assert clip_score(images, texts).tolist() == pytest.approx(expected, rel=1e-5)


# ----------------------------------------------------------------------------------------------------- reference files


KNOWN = dict(resolution=16, protocol="torch-fidelity", network="inception", network_sha256="a" * 64)


def statistics(**changes) -> ReferenceStatistics:
    features = random_features(20, 4)
    mean, covariance = moments(features)
    return ReferenceStatistics(mean, covariance, **{"num_samples": 20, "features": features, **KNOWN, **changes})


def test_statistics_survive_saving_and_are_of_the_parents_format(tmp_path):
    ours = statistics()
    ours.save(tmp_path / "new" / "statistics.npz")
    loaded = ReferenceStatistics.load(tmp_path / "new" / "statistics.npz")
    assert loaded.describe() == ours.describe() == {"num_samples": 20, **KNOWN}
    for name in ("mean", "covariance", "features"):
        assert torch.equal(getattr(loaded, name), getattr(ours, name))
    with np.load(tmp_path / "new" / "statistics.npz") as file:  # as rq-vae-transformer reads it
        np.testing.assert_array_equal(file["mu"], ours.mean)
        np.testing.assert_array_equal(file["sigma"], ours.covariance)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["statistics.npz"]


def test_precision_and_recall_are_refused_on_few_real_images_unless_allowed():
    pictures = np.zeros((9_999, 1, 1, 3), np.uint8)
    for few in (statistics(features=random_features(9_999, 4)), statistics(features=None, images=pictures)):
        with pytest.raises(ValueError, match="`reference.features` must be at least 10,000.*got 9,999"):
            few.check_num_features()
        few.check_num_features(allow_few_samples=True)
    statistics(features=random_features(10_000, 4)).check_num_features()
    with pytest.raises(ValueError, match="features or images"):
        statistics(features=None).check_num_features(allow_few_samples=True)


def test_statistics_are_of_square_images():
    known = {name: value for name, value in KNOWN.items() if name != "resolution"}
    for size in ((48, 16), (16, 48)):  # the reference has 16
        with pytest.raises(ValueError, match=f"of resolution 16, and these images of '{size[0]}×{size[1]}'"):
            statistics().check_comparable(size, **known, trust=True)
    statistics().check_comparable((16, 16), **known)
    statistics().check_comparable(None, **known)  # the images are still to come
    with pytest.raises(ValueError, match="do not say their resolution"):
        statistics(resolution=None).check_comparable(None, **known)


@pytest.mark.parametrize("name, value", [*dict(KNOWN, resolution=32, protocol="adm", network="other").items()])
def test_statistics_of_something_else_are_refused(name, value):
    given = {**KNOWN, name: "b" * 64 if name == "network_sha256" else value}
    with pytest.raises(ValueError, match="sha256" if name == "network_sha256" else f"of {name} .* of '?{value}"):
        statistics().check_comparable(**given, trust=True)
    statistics().check_comparable(**KNOWN)
    statistics().check_comparable(**{**KNOWN, "network_sha256": None})


def test_a_file_of_the_parents_says_nothing_and_has_to_be_vouched_for(tmp_path):
    mean, covariance = moments(random_features(20, 4))
    np.savez(tmp_path / "parent.npz", mu=mean.numpy(), sigma=covariance.numpy())
    parents = ReferenceStatistics.load(tmp_path / "parent.npz")
    with pytest.raises(ValueError, match="do not say their resolution.*--trust_reference"):
        parents.check_comparable(**KNOWN)
    parents.check_comparable(**KNOWN, trust=True)
    with pytest.raises(ValueError, match="features or images"):
        reference_features(parents, FeatureNetwork(mean_colors, "colors"))
    features = random_features(20, 4)
    np.savez(tmp_path / "acts.npz", acts=features.numpy(), mu=mean.numpy(), sigma=covariance.numpy())
    assert torch.equal(ReferenceStatistics.load(tmp_path / "acts.npz").features, features)


def test_a_file_of_adms_brings_its_protocol_and_its_images(tmp_path):
    images = random_images(6).permute(0, 2, 3, 1).numpy()
    mean, covariance = moments(random_features(20, 4))
    arrays = dict(mu=mean, sigma=covariance, mu_s=np.zeros(3), sigma_s=np.eye(3))
    np.savez(tmp_path / "adm.npz", arr_0=images, **arrays)
    adms = ReferenceStatistics.load(tmp_path / "adm.npz")
    adms.check_comparable(resolution=16, protocol="adm", network="inception", network_sha256="c" * 64)
    with pytest.raises(ValueError, match="protocol 'adm'"):
        adms.check_comparable(**KNOWN, trust=True)
    features = reference_features(adms, FeatureNetwork(mean_colors, "colors"), batch_size=4)
    assert torch.equal(features, mean_colors(random_images(6)).features)
    adms.save(tmp_path / "again.npz")
    with np.load(tmp_path / "again.npz") as file:
        assert {"arr_0", "mu", "sigma", "mu_s", "sigma_s"} <= set(file.files) and file["arr_0"].dtype == np.uint8


def damaged_files(folder: Path):
    statistics().save(folder / "whole.npz")
    whole = (folder / "whole.npz").read_bytes()
    (folder / "half.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "text.npz").write_text("mu, sigma\n")
    (folder / "empty.npz").write_bytes(b"")
    np.savez(folder / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    np.savez(folder / "objects.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    np.savez(folder / "shapes.npz", mu=np.zeros(3), sigma=np.eye(4))
    return ["half", "text", "empty", "images", "objects", "shapes", "missing"]


def test_a_damaged_or_foreign_file_is_one_clear_error(tmp_path):
    for name in damaged_files(tmp_path):
        with pytest.raises(ValueError, match=f"`reference` must.*{name}"):
            ReferenceStatistics.load(tmp_path / f"{name}.npz")


# ----------------------------------------------------------------------------------------------------------- protocols


@settings(deadline=None, max_examples=25)
@given(width=st.integers(5, 90), height=st.integers(5, 90), resolution=st.integers(4, 40), seed=SEEDS)
def test_each_protocol_resizes_as_its_source_does(width, height, resolution, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)

    resized = transforms.CenterCrop(resolution)(transforms.Resize(resolution)(image))
    for name in ("torch-fidelity", "rq-vae"):
        ours = PROTOCOLS[name].prepare(image, resolution).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(ours, np.array(resized))

    adm = image
    while min(*adm.size) >= 2 * resolution:
        adm = adm.resize(tuple(side // 2 for side in adm.size), resample=Image.BOX)
    scale = resolution / min(*adm.size)
    adm = np.array(adm.resize(tuple(round(side * scale) for side in adm.size), resample=Image.BICUBIC))
    top, left = (adm.shape[0] - resolution) // 2, (adm.shape[1] - resolution) // 2
    ours = PROTOCOLS["adm"].prepare(image, resolution).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(ours, adm[top : top + resolution, left : left + resolution])


@pytest.mark.parametrize("kind", ["png", "int32", "big-endian"])
def test_16_bit_grayscale_is_scaled_to_8_bits(kind, tmp_path):
    levels = np.arange(65536).reshape(256, 256)
    if kind == "png":
        Image.fromarray(levels.astype(np.uint16)).save(tmp_path / "gray.png")
        image = Image.open(tmp_path / "gray.png")
    else:
        image = Image.fromarray(levels.astype(np.int32 if kind == "int32" else ">u2"))
    expected = torch.from_numpy(np.rint(levels * (255 / 65535)).astype(np.uint8)).expand(3, 256, 256)
    assert image.mode.startswith("I")
    for protocol in PROTOCOLS.values():
        assert torch.equal(protocol.prepare(image, 256), expected)


def test_alpha_is_dropped_and_what_is_no_8_or_16_bit_image_is_refused():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    np.testing.assert_array_equal(to_rgb(Image.fromarray(pixels)), pixels[..., :3])
    floats, wide = np.full((8, 8), 0.5, np.float32), np.full((8, 8), 65536, np.int32)
    for image, message in (
        (None, "`image` must be a PIL image, got None: the image is missing"),
        (Image.fromarray(floats), "mode 'F'"),
        (Image.fromarray(wide), "levels in \\[0, 65535\\], got 65536 to 65536"),
        (Image.fromarray(-wide), "got -65536 to -65536"),
    ):
        with pytest.raises(ValueError, match=message):
            PROTOCOLS["adm"].prepare(image, 8)


def test_protocols_round_as_their_sources_do_and_keep_uint8_as_it_is():
    values = torch.tensor([-0.1, 0.0, 0.6 / 255, 99.4 / 255, 99.6 / 255, 1.0, 1.2])
    assert PROTOCOLS["torch-fidelity"].to_uint8(values).tolist() == [0, 0, 1, 99, 100, 255, 255]
    assert PROTOCOLS["adm"].to_uint8(values).tolist() == [0, 0, 0, 99, 99, 255, 255]
    with pytest.raises(ValueError, match="NaN"):
        PROTOCOLS["adm"].to_uint8(torch.tensor([0.5, math.nan]))
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(PROTOCOLS["torch-fidelity"].to_uint8(levels / 255), levels)


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory) -> Path:
    """A state dict of Inception in its published form, with random weights that keep the signal's size."""
    extractor = fidelity_inception.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity_inception.torch, "load", lambda *args, **kwargs: {})
        patch.setattr(extractor, "load_state_dict", lambda self, state: None)
        network = extractor("random", ["2048"], feature_extractor_weights_path="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
def test_inception_is_torch_fidelitys_and_the_parents(inception_weights, monkeypatch):
    images = random_images(1, 40)
    original = fidelity_inception.FeatureExtractorInceptionV3(
        "original", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_weights)
    )
    ours = load_feature_network("inception", inception_weights=inception_weights, return_spatial=True)
    output, expected = ours(images), original(images)
    assert torch.equal(output.features, expected[0]) and torch.equal(output.logits, expected[1])
    assert output.spatial.shape == (1, 17 * 17 * 7)

    # The parent resizes with pixel centers at halves, and from [0, 1] to [-1, 1].
    def resize(images, size, align_corners):
        pixel_values = 2 * F.interpolate(images / 255, size=size, mode="bilinear", align_corners=False) - 1
        return 128 * pixel_values + 128  # torch-fidelity's forward takes this back

    monkeypatch.setattr(fidelity_inception, "interpolate_bilinear_2d_like_tensorflow1x", resize)
    parents = load_feature_network("inception", "rq-vae", inception_weights)(images)
    torch.testing.assert_close(parents.features, original(images)[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(parents.features, output.features, rtol=1e-2)
    biased = original(images)[1] + original.fc.bias
    torch.testing.assert_close(parents.logits, biased, rtol=1e-3, atol=1e-3)


class Malicious:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_inception_weights_are_loaded_whole_or_not_at_all(inception_weights, tmp_path, capsys):
    state = torch.load(inception_weights, weights_only=True)
    state.pop("Mixed_7c.branch_pool.conv.weight")
    torch.save(state, tmp_path / "partial.pth")
    (tmp_path / "half.pth").write_bytes(inception_weights.read_bytes()[:100_000])
    (tmp_path / "text.pth").write_text("weights")
    (tmp_path / "malicious.pth").write_bytes(pickle.dumps({"fc.bias": Malicious()}))
    for name in ("partial", "half", "text", "malicious", "missing"):
        with pytest.raises(ValueError, match=f"`weights` must be .*{name}.pth"):
            load_feature_network("inception", inception_weights=tmp_path / f"{name}.pth")
    assert "unpickled" not in capsys.readouterr().out


def test_without_network_and_path_the_error_says_what_to_fetch(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(OSError, match="weights-inception-2015-12-05-6726825d.pth.*--inception_weights"):
        load_feature_network("inception")


def tiny_classifier(seed: int = 0) -> ImageClassifierModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ImageClassifierModel(num_classes=3, sample_size=16, block_channels=(8, 16), layers_per_block=1).eval()


def test_a_saved_classifier_is_the_same_network_and_another_is_not(tmp_path):
    classifier, images = tiny_classifier(), random_images(4)
    classifier.save_pretrained(tmp_path / "one")
    tiny_classifier(seed=1).save_pretrained(tmp_path / "other")
    loaded, other = load_feature_network(str(tmp_path / "one")), load_feature_network(str(tmp_path / "other"))
    output = loaded(images)
    with torch.no_grad():
        expected = classifier(images / 127.5 - 1)
    torch.testing.assert_close(output.features, expected.features)
    torch.testing.assert_close(output.logits, expected.logits)
    assert output.features.shape == (4, 16) and output.logits.shape == (4, 3)
    assert loaded.sha256 == load_feature_network(str(tmp_path / "one")).sha256 != other.sha256
    with pytest.raises(ValueError, match="16×16 pixels, got \\(20, 20\\)"):
        loaded(random_images(1, 20))


def test_a_classifier_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_classifier().save_pretrained(tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    state = load_file(weights)
    save_file({key: value for key, value in state.items() if key != "head.bias"}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="not hold a whole classifier.*head.bias"):
        load_feature_network(str(tmp_path))
    weights.write_bytes(b"half")
    with pytest.raises(ValueError, match="not hold a whole classifier"):
        load_feature_network(str(tmp_path))


def test_any_network_may_be_given_as_a_file_or_a_callable(tmp_path):
    class MeanColors(nn.Module):
        def forward(self, images):
            return images.float().mean(dim=(2, 3))

    images = random_images(5)
    torch.jit.script(MeanColors()).save(tmp_path / "colors.pt")
    scripted = load_feature_network(str(tmp_path / "colors.pt"))(images)
    plain = FeatureNetwork(lambda images: images.float().mean(dim=(2, 3)), "colors")(images)
    assert torch.equal(scripted.features, plain.features) and plain.logits is None
    (tmp_path / "text.pt").write_text("no program")
    for source in (str(tmp_path / "text.pt"), str(tmp_path / "missing.pt"), str(tmp_path), "vgg"):
        with pytest.raises(ValueError, match="`source` must|`folder` must"):
            load_feature_network(source)


class Powers(nn.Module):
    """A network without weights, or with a buffer: the digest of which says little."""

    def __init__(self, exponent: int, buffer: bool = False):
        super().__init__()
        self.exponent = exponent
        if buffer:
            self.register_buffer("scale", torch.ones(1))

    def forward(self, images):
        return (images.float() / 255).pow(self.exponent).mean(dim=(2, 3))


@pytest.mark.parametrize("buffer", [False, True])
def test_the_digest_of_a_torchscript_network_is_of_its_program(tmp_path, buffer):
    networks = {}
    for exponent in (1, 2):
        script = torch.jit.script(Powers(exponent, buffer))
        script.save(tmp_path / f"{exponent}.pt")
        (tmp_path / f"copy-{exponent}.ts").write_bytes((tmp_path / f"{exponent}.pt").read_bytes())
        networks[exponent] = load_feature_network(str(tmp_path / f"{exponent}.pt"))
        networks[exponent, "module"] = FeatureNetwork(script, "torchscript")
        assert networks[exponent].sha256 == load_feature_network(str(tmp_path / f"copy-{exponent}.ts")).sha256
        assert networks[exponent, "module"].sha256 == FeatureNetwork(script, "torchscript").sha256
    assert len({network.sha256 for network in networks.values()}) == 4
    own = dict(network=networks[1].name, network_sha256=networks[1].sha256)
    others = dict(network=networks[2].name, network_sha256=networks[2].sha256)
    statistics(**own).check_comparable(**{**KNOWN, **own})
    with pytest.raises(ValueError, match="other weights or another program"):
        statistics(**own).check_comparable(**{**KNOWN, **others}, trust=True)


def test_a_digest_may_be_given_and_is_none_where_there_are_no_weights():
    assert FeatureNetwork(Powers(1), "powers").sha256 is None is FeatureNetwork(mean_colors, "colors").sha256
    assert FeatureNetwork(Powers(1, buffer=True), "powers").sha256 is not None
    assert FeatureNetwork(Powers(1, buffer=True), "powers", sha256="a" * 64).sha256 == "a" * 64


def test_features_that_are_not_finite_are_called_so():
    def third_is_nan(images):
        return torch.eye(len(images)).where(torch.arange(len(images))[:, None] != 2, math.nan)

    with pytest.raises(ValueError, match="'wrong' must return finite features .* NaN or infinity for 1 of 4 images"):
        FeatureNetwork(third_is_nan, "wrong")(random_images(4))


@pytest.mark.parametrize(
    "network", [lambda images: images, lambda images: None, lambda images: torch.full((len(images), 2), math.inf)]
)
def test_a_network_whose_output_is_no_features_is_refused(network):
    with pytest.raises(ValueError, match="'wrong' must return finite features of shape \\(2, F\\)"):
        FeatureNetwork(network, "wrong")(random_images(2))
    with pytest.raises(ValueError, match="must be uint8"):
        FeatureNetwork(mean_colors, "colors")(random_images(2) / 255)


# ---------------------------------------------------------------------------------------------------------------- CLIP


CLIP_LENGTH = 6


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A CLIP of 8 dimensions and a context of 6 tokens, saved as the published one is."""
    words = ["<pad>", "<start>", "a", "cat", "owl", "at", "dusk", "the", "sea", "<end>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        "<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 9)]
    )
    common = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(
        common, vocab_size=10, max_position_embeddings=CLIP_LENGTH, bos_token_id=1, eos_token_id=9, pad_token_id=0
    )
    config = CLIPConfig(text_config=text, vision_config=dict(common, image_size=8, patch_size=4), projection_dim=8)
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<pad>"
    ).save_pretrained(folder)
    return folder


def test_a_long_caption_keeps_its_end_token(clip_folder):
    clip = CLIPEmbeddings(clip_folder)
    tokens = clip.tokenize(["a cat at the sea at dusk", "a cat"])
    assert tokens["input_ids"].tolist() == [[1, 2, 3, 5, 7, 9], [1, 2, 3, 9, 0, 0]]
    images = random_images(2, 12)
    pictures, long = clip(images, ["a cat at the sea at dusk", "a cat"])
    _, cut = clip(images, ["a cat at the", "a cat"])
    assert torch.equal(long, cut) and pictures.shape == long.shape == (2, 8)
    alone = clip(images[1:], ["a cat"])  # padding changes nothing
    torch.testing.assert_close(pictures[1:], alone[0])
    torch.testing.assert_close(long[1:], alone[1], rtol=1e-4, atol=1e-5)


def test_a_clip_model_that_lacks_weights_or_is_not_there_is_refused(clip_folder, tmp_path, monkeypatch):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "partial"
    shutil.copytree(clip_folder, folder)
    state = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if k != "text_projection.weight"},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match="not a whole CLIP.*text_projection.weight"):
        CLIPEmbeddings(folder)
    with pytest.raises(OSError, match="--clip"):
        CLIPEmbeddings(tmp_path)


# ------------------------------------------------------------------------------------------- modules for evaluate.load


@pytest.fixture(scope="module")
def evaluate_library(tmp_path_factory):
    """Hugging Face's `evaluate`, with a cache of its own; on the tests' path examples/evaluate.py would come first."""
    with pytest.MonkeyPatch.context() as patch:
        # nor may another test of this process have left a cache of modules behind, in which ours are not
        foreign = [path for path in sys.path if (Path(path) / "evaluate_modules").is_dir()]
        patch.setattr(sys, "path", [path for path in sys.path if path != EXAMPLES and path not in foreign])
        forget_loaded_metrics()
        import evaluate

        folder = tmp_path_factory.mktemp("evaluate")
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(folder / "modules"))
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(folder / "metrics"))
        yield
    forget_loaded_metrics()


def forget_loaded_metrics() -> None:
    """The package that `evaluate` imports metrics from is one a process, wherever its cache was at the time."""
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


def load_metric(name: str, **options):
    import evaluate

    from rq_draft_revise.evaluate_modules import module_path

    return evaluate.load(module_path(name), **options)


def color_reference(path: Path) -> str:
    features = mean_colors(random_images(40, seed=9)).features
    mean, covariance = moments(features)
    known = dict(resolution=16, protocol="torch-fidelity", network="mean_colors", num_samples=40, features=features)
    ReferenceStatistics(mean, covariance, **known).save(path)
    return str(path)


def test_modules_take_images_in_batches_and_return_what_the_functions_do(evaluate_library, tmp_path):
    images, reference = random_images(30), color_reference(tmp_path / "reference.npz")
    real, generated = mean_colors(random_images(40, seed=9)).features, mean_colors(images).features
    mean, std = inception_score(generated)
    expected = {
        "fid": {"fid": frechet_inception_distance(real, generated, allow_few_samples=True)},
        "inception_score": {"inception_score": mean, "inception_score_std": std},
        "precision_recall": precision_and_recall(real, generated),
    }
    for name, scores in expected.items():
        metric = load_metric(name, network=mean_colors)
        metric.add_batch(predictions=images[:10])
        metric.add_batch(predictions=[Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images[10:20]])
        metric.add_batch(predictions=images[20:29].permute(0, 2, 3, 1).numpy())
        metric.add(prediction=images[29])
        options = {} if name == "inception_score" else {"reference": reference}
        assert metric.compute(allow_few_samples=True, **options) == pytest.approx(scores, rel=1e-4)


def test_modules_refuse_what_cannot_be_compared(evaluate_library, tmp_path):
    images, reference = random_images(12), color_reference(tmp_path / "reference.npz")

    def fid(images=images, ids=None, **options):
        compute = {name: options.pop(name) for name in ("reference", "allow_few_samples") if name in options}
        metric = load_metric("fid", network=mean_colors, **options)
        return metric.compute(
            predictions=images, ids=ids, **{"reference": reference, "allow_few_samples": True, **compute}
        )

    assert fid(ids=range(12))["fid"] > 0
    with pytest.raises(ValueError, match="at least 10,000"):
        fid(allow_few_samples=False)
    with pytest.raises(ValueError, match="1 of 12 were added more than once"):
        fid(ids=[*range(11), 3])
    with pytest.raises(ValueError, match="protocol 'torch-fidelity'.*'adm'"):
        fid(protocol="adm")
    with pytest.raises(ValueError, match="resolution 16.* 20"):
        fid(images=random_images(12, 20))
    with pytest.raises(ValueError, match="`predictions` must be PIL images.*float32"):
        fid(images=images / 255)
    with pytest.raises(ValueError, match="`reference` must be given"):
        fid(reference=None)


def test_a_metric_without_images_says_so(evaluate_library):
    with pytest.raises(ValueError, match="`predictions` must be given, or added before"):
        load_metric("inception_score", network=mean_colors).compute(allow_few_samples=True)


def test_precision_and_recall_modules_refuse_few_real_images(evaluate_library, tmp_path):
    metric = load_metric("precision_recall", network=mean_colors)
    metric.add_batch(predictions=random_images(10_000, 2))
    reference = ReferenceStatistics.load(color_reference(tmp_path / "reference.npz"))
    reference.resolution = 2
    with pytest.raises(ValueError, match="`reference.features` must be at least 10,000.*got 40"):
        metric.compute(reference=reference)
    with pytest.raises(ValueError, match="`k` must lie in \\[1, 39\\].*got 40"):
        metric.compute(reference=reference, allow_few_samples=True, k=40)


@pytest.mark.parametrize("size", [(48, 16), (16, 48)])
def test_modules_look_at_height_and_width(evaluate_library, tmp_path, size):
    reference, generator = color_reference(tmp_path / "reference.npz"), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, *size), dtype=torch.uint8, generator=generator)
    metric = load_metric("fid", network=mean_colors)
    metric.add_batch(predictions=images)
    with pytest.raises(ValueError, match=f"resolution 16.*'{size[0]}×{size[1]}'"):
        metric.compute(reference=reference, allow_few_samples=True)
    for other in ((16, 16), size[::-1]):
        with pytest.raises(ValueError, match="one size \\(height, width\\)"):
            metric.add_batch(predictions=torch.zeros(2, 3, *other, dtype=torch.uint8))


def test_a_refused_compute_loses_no_image(evaluate_library, tmp_path):
    images, reference = random_images(30), color_reference(tmp_path / "reference.npz")
    real = mean_colors(random_images(40, seed=9)).features
    expected = frechet_inception_distance(real, mean_colors(images).features, allow_few_samples=True)
    options = dict(reference=reference, allow_few_samples=True)
    for in_memory in (False, True):
        metric = load_metric("fid", network=mean_colors, keep_in_memory=in_memory)
        metric.add_batch(predictions=images[:10])
        for refused in (
            dict(reference=reference),  # few samples
            dict(allow_few_samples=True),  # no reference
            dict(options, reference=str(tmp_path / "missing.npz")),
            dict(options, predictions=random_images(3, 20)),
            dict(reference=reference, predictions=images[20:]),  # taken back: the corrected call adds them again
        ):
            with pytest.raises(ValueError):
                metric.compute(**refused)
        with pytest.raises(TypeError):
            metric.compute(**options, k=3)
        metric.add_batch(predictions=images[10:20])
        assert metric.compute(predictions=images[20:], **options)["fid"] == pytest.approx(expected, rel=1e-4)
        # and a result ends with the images: those of the next may have another size
        larger = ReferenceStatistics.load(reference)
        larger.resolution = 20
        again = metric.compute(predictions=random_images(12, 20), reference=larger, allow_few_samples=True)
        generated = mean_colors(random_images(12, 20)).features
        assert again["fid"] == pytest.approx(
            frechet_inception_distance(real, generated, allow_few_samples=True), rel=1e-4
        )


def test_what_only_the_images_show_loses_none_either(evaluate_library):
    """The number of splits is compared with the number of images once they are gathered."""
    images = random_images(12)
    metric = load_metric("inception_score", network=mean_colors)
    metric.add_batch(predictions=images[:4])
    for _ in range(2):
        with pytest.raises(ValueError, match="`num_splits` must lie in \\[1, 4\\]"):
            metric.compute(allow_few_samples=True)
    mean, _ = inception_score(mean_colors(images).logits)
    scores = metric.compute(predictions=images[4:], allow_few_samples=True)
    assert scores["inception_score"] == pytest.approx(mean, rel=1e-4)


def test_statistics_of_a_network_without_a_name_are_refused(evaluate_library):
    from rq_draft_revise.evaluate_modules import named_network

    class Named(Powers):
        name = "powers-1"

    def digested(images):
        return images

    digested.sha256 = "a" * 64
    for network in (lambda images: images, functools.partial(mean_colors), Powers(1), nn.Sequential(Powers(2))):
        with pytest.raises(
            ValueError, match="`network` must have a name of its own.*FeatureNetwork\\(network, name\\)"
        ):
            load_metric("fid", network=network)
        assert load_metric("fid", network=FeatureNetwork(network, "mine")).network.name == "mine"
    assert named_network(mean_colors).name == "mean_colors"
    assert named_network(Named(1)).name == "powers-1"
    assert named_network(digested).sha256 == "a" * 64
    assert named_network(Powers(1, buffer=True)).sha256 is not None


def test_modules_scale_16_bits_and_name_the_image_that_is_none(evaluate_library):
    from rq_draft_revise.evaluate_modules import stack_images

    levels = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    deep, plain = Image.fromarray(levels), Image.fromarray((levels // 257).astype(np.uint8))
    assert torch.equal(stack_images([deep]), stack_images([plain]))
    with pytest.raises(ValueError, match="got for image 1 of the batch None: the image is missing"):
        stack_images([plain, None])
    with pytest.raises(ValueError, match="image 2 of the batch.*mode 'F'"):
        stack_images([plain, deep, plain.convert("F")])
    for images in (None, plain):
        with pytest.raises(ValueError, match="`predictions` must be a batch of images"):
            stack_images(images)


def run_processes(share, *arguments) -> dict:
    """What two processes `share(process, *arguments, answers)` put into `answers`."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    answers = context.Queue()
    processes = [context.Process(target=share, args=(process, *arguments, answers)) for process in (0, 1)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=100) for _ in processes)
    for process in processes:
        process.join()
    return found


def share_of_one_process(process: int, folder: Path, reference: str, answers) -> None:
    """Half of the images: those at even or at odd places."""
    sys.path[:] = [path for path in sys.path if path != EXAMPLES]
    metric = load_metric(
        "fid", network=mean_colors, process_id=process, num_process=2, experiment_id="two", cache_dir=str(folder)
    )
    images = random_images(30)[process::2]
    metric.add_batch(predictions=images[:7], ids=range(process, 14, 2))
    metric.add_batch(predictions=images[7:], ids=range(14 + process, 30, 2))
    answers.put((process, metric.compute(reference=reference, allow_few_samples=True)))


@pytest.mark.slow
def test_two_processes_add_their_images_to_one_metric(evaluate_library, tmp_path):
    reference = color_reference(tmp_path / "reference.npz")
    found = run_processes(share_of_one_process, tmp_path / "common", reference)
    alone = load_metric("fid", network=mean_colors).compute(
        predictions=random_images(30), reference=reference, allow_few_samples=True
    )
    assert found[1] is None and found[0] == pytest.approx(alone, rel=1e-6)


def uneven_share(process: int, folder: Path, reference: str, sizes: tuple[int, int], allow: bool, answers) -> None:
    """12 images of this process's size, or none at size 0."""
    sys.path[:] = [path for path in sys.path if path != EXAMPLES]
    metric = load_metric(
        "fid", network=mean_colors, process_id=process, num_process=2, experiment_id="uneven", cache_dir=str(folder)
    )
    good, found = dict(reference=reference, allow_few_samples=True), []
    bad = [dict(good, reference=None), dict(good, allow_few_samples=False)]  # refused before and after all is gathered
    if sizes[process]:
        metric.add_batch(predictions=random_images(12, sizes[process], seed=process))
    for options in [good] if allow else [*bad, good]:
        try:
            found.append(metric.compute(**options))
            break
        except ValueError as error:
            found.append(str(error))
    answers.put((process, found))


@pytest.mark.slow
@pytest.mark.parametrize("allow", [True, False])
@pytest.mark.parametrize("sizes", [(16, 0), (0, 16)])
def test_a_process_without_images_leaves_the_figure_to_the_others(evaluate_library, tmp_path, sizes, allow):
    """And where process 0 is refused what all have gathered, it alone tries again."""
    statistics = ReferenceStatistics.load(color_reference(tmp_path / "reference.npz"))
    statistics.num_samples = None  # or its own would be too few
    statistics.save(reference := tmp_path / "reference.npz")
    found = run_processes(uneven_share, tmp_path / "common", reference, sizes, allow)
    alone = load_metric("fid", network=mean_colors).compute(
        predictions=random_images(12, seed=sizes.index(16)), reference=reference, allow_few_samples=True
    )
    *refused, scores = found[0]
    assert found[1] == [None] and scores == pytest.approx(alone, rel=1e-6)
    messages = [] if allow else ["`reference` must be given", "`predictions` must be at least 10,000"]
    assert [message[: len(start)] for message, start in zip(refused, messages, strict=True)] == messages


@pytest.mark.slow
@pytest.mark.parametrize("sizes, message", [((16, 32), "got \\[\\(16, 16\\), \\(32, 32\\)\\]"), ((0, 0), "no images")])
def test_process_0_refuses_what_only_all_processes_show(evaluate_library, tmp_path, sizes, message):
    reference = color_reference(tmp_path / "reference.npz")
    found = run_processes(uneven_share, tmp_path / "common", reference, sizes, True)
    assert found[1] == [None] and re.search(message, found[0][0])


@pytest.fixture(scope="module")
def perceptual_loss(tmp_path_factory):
    """LPIPS on a VGG16 of random weights, loaded from a file as the published ones are."""
    from torchvision.models.vgg import cfgs, make_layers

    from rq_draft_revise.losses import PerceptualLoss

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = {f"features.{key}": value for key, value in make_layers(cfgs["D"]).state_dict().items()}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return PerceptualLoss(path)


def test_reconstructions_are_scored_beside_their_originals(evaluate_library, perceptual_loss):
    originals, noise = random_images(12, 16), random_images(12, 16, seed=1)
    better = (0.9 * originals + 0.1 * noise).to(torch.uint8)
    worse = (0.5 * originals + 0.5 * noise).to(torch.uint8)

    def scores(images):
        metric = load_metric("reconstruction", network=mean_colors, lpips=perceptual_loss)
        return metric.compute(predictions=images, references=originals, allow_few_samples=True)

    same, near, far = scores(originals), scores(better), scores(worse)
    assert same == {"rfid": pytest.approx(0, abs=1e-9), "psnr": math.inf, "ssim": pytest.approx(1), "lpips": 0}
    for name, sign in (("rfid", 1), ("lpips", 1), ("psnr", -1), ("ssim", -1)):
        assert sign * near[name] < sign * far[name]
    assert near["psnr"] == pytest.approx(psnr(better, originals).mean().item())
    rfid = frechet_inception_distance(*(mean_colors(i).features for i in (originals, better)), allow_few_samples=True)
    assert near["rfid"] == pytest.approx(rfid, rel=1e-4)


def test_clip_score_module_takes_captions(evaluate_library, clip_folder):
    images, captions = random_images(3, 12), ["a cat", "the sea at dusk", "an owl at the sea at dusk"]
    metric = load_metric("clip_score", clip=str(clip_folder))
    metric.add_batch(predictions=images[:2], references=captions[:2])
    metric.add(prediction=images[2], reference=captions[2])
    expected = clip_score(*CLIPEmbeddings(clip_folder)(images, captions)).mean().item()
    assert metric.compute()["clip_score"] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="`references` must be given"):
        metric.add_batch(predictions=images)
