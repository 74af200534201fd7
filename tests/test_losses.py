"""What the RQ-VAE descends besides the commitment: pixels, LPIPS, and the opinion of a discriminator."""

import math
import urllib.error
from pathlib import Path

import pytest
import torch
import train_rqvae
from accelerate import Accelerator
from components import random_pixels, tiny_vae
from safetensors.torch import save_file

from rq_draft_revise.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    adversarial_loss,
    discriminator_hinge_loss,
)
from rq_draft_revise.losses import PerceptualLoss, reconstruction_loss


def random_vgg16(seed: int = 0) -> dict[str, torch.Tensor]:
    """What torchvision's vgg16 has in its state dict, with random convolutions that keep the signal's size."""
    generator = torch.Generator().manual_seed(seed)
    state, channels = {}, 3
    layers = ((0, 64), (2, 64), (5, 128), (7, 128), (10, 256), (12, 256), (14, 256), (17, 512), (19, 512), (21, 512),
              (24, 512), (26, 512), (28, 512))  # fmt: skip
    for layer, width in layers:
        deviation = math.sqrt(2 / (9 * channels))
        state[f"features.{layer}.weight"] = deviation * torch.randn(width, channels, 3, 3, generator=generator)
        state[f"features.{layer}.bias"] = 0.1 * torch.randn(width, generator=generator)
        channels = width
    return state


# ---- pixels


def test_the_reconstruction_loss_is_what_its_name_says():
    sample, pixel_values = random_pixels(seed=1), random_pixels(seed=2)
    difference = (sample - pixel_values).double()
    mse, l1 = float(difference.square().mean()), float(difference.abs().mean())
    for kind, expected in (("mse", mse), ("l1", l1), ("both", mse + l1)):
        loss, reported = reconstruction_loss(sample, pixel_values, kind)
        assert float(loss) == pytest.approx(expected, rel=1e-5) and float(reported) == pytest.approx(mse, rel=1e-5)
    with pytest.raises(ValueError, match="`kind`.*'l2'"):
        reconstruction_loss(sample, pixel_values, "l2")


# ---- LPIPS


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory):
    pytest.importorskip("lpips")
    path = tmp_path_factory.mktemp("vgg16") / "vgg16.safetensors"
    save_file(random_vgg16(), path)
    return path


@pytest.fixture(scope="module")
def perceptual_loss(vgg16):
    return PerceptualLoss(vgg16)


def test_lpips_is_the_distance_of_its_paper(perceptual_loss):
    """Equation 1 of Zhang et al., from torchvision's own network and the package's file of linear weights."""
    import lpips
    from torchvision.models.vgg import cfgs, make_layers

    network = make_layers(cfgs["D"])
    network.load_state_dict({key[len("features.") :]: tensor for key, tensor in random_vgg16().items()})
    linear = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth", "cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def features(pixels):
        hidden = (pixels - shift[:, None, None]) / scale[:, None, None]
        for layer, module in enumerate(network):
            hidden = module(hidden)
            if layer in (3, 8, 15, 22, 29):
                yield hidden / hidden.norm(dim=1, keepdim=True)

    sample, pixel_values = random_pixels(3, 32, seed=1), random_pixels(3, 32, seed=2)
    expected = 0
    with torch.no_grad():
        for layer, (a, b) in enumerate(zip(features(sample), features(pixel_values))):
            weights = linear[f"lin{layer}.model.1.weight"]
            expected += (weights * (a - b).square()).sum(dim=1).mean(dim=(1, 2))
        assert float(perceptual_loss(sample, pixel_values)) == pytest.approx(float(expected.mean()), rel=1e-4)
        assert float(perceptual_loss(sample, sample)) == 0


def test_lpips_is_frozen_stays_in_eval_mode_and_passes_gradients_to_the_sample_alone(perceptual_loss):
    assert not perceptual_loss.training and not any(p.requires_grad for p in perceptual_loss.parameters())
    assert all(p.device.type == "cpu" for p in perceptual_loss.parameters()), "a weight that was never loaded"
    sample, pixel_values = random_pixels(1, 16, seed=1).requires_grad_(), random_pixels(1, 16, seed=2)
    perceptual_loss(sample, pixel_values).backward()
    assert sample.grad.abs().max() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = perceptual_loss(sample, pixel_values)
    assert loss.dtype == torch.float32 and torch.equal(loss, perceptual_loss(sample, pixel_values))


def test_weights_come_from_torchvisions_file_with_its_classifier_too(vgg16, perceptual_loss, tmp_path):
    torch.save({**random_vgg16(), "classifier.0.bias": torch.zeros(4)}, tmp_path / "vgg16.pth")
    other = PerceptualLoss(tmp_path / "vgg16.pth")
    for key, tensor in perceptual_loss.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor), key


@pytest.mark.parametrize(
    "fault", ["missing", "unknown", "another shape", "not a state dict", "half a file", "no file"]
)
def test_weights_that_are_not_vgg16_are_refused(fault, vgg16, tmp_path):
    state, path = random_vgg16(), tmp_path / "weights.safetensors"
    if fault == "missing":
        del state["features.28.bias"]
    elif fault == "unknown":
        state["features.30.weight"] = torch.zeros(1)
    elif fault == "another shape":
        state["features.28.bias"] = torch.zeros(7)
    save_file(state, path)
    if fault == "not a state dict":
        path = tmp_path / "weights.pth"
        torch.save([1, 2], path)
    elif fault == "half a file":
        path.write_bytes(path.read_bytes()[:1000])
    elif fault == "no file":
        path = tmp_path / "nowhere.pth"
    named = {"missing": "features.28.bias", "unknown": "features.30.weight", "another shape": "features.28.bias"}
    with pytest.raises(ValueError, match=f"`lpips_weights`.*{named.get(fault, path.name)}"):
        PerceptualLoss(path)


def test_without_a_network_the_error_says_what_is_missing_and_what_to_do(vgg16, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    with pytest.raises(OSError, match="vgg16.*no network.*--lpips_weights.*--perceptual_weight 0"):
        PerceptualLoss()


# ---- the discriminator


def test_each_logit_judges_a_patch_of_34_pixels_of_its_own_image():
    discriminator = PatchDiscriminator(channels=8)
    pixels = random_pixels(2, 64).requires_grad_()
    logits = discriminator(pixels)
    assert logits.shape == (2, 1, 14, 14)
    # Before the first normalization, which looks at the whole image: what reaches a logit through the convolutions.
    convolutions = torch.nn.Sequential(*(m for m in discriminator.layers if not isinstance(m, torch.nn.GroupNorm)))
    convolutions(pixels)[0, 0, 7, 7].backward()
    seen = pixels.grad.abs().sum(dim=1) > 0
    assert seen[0].any(dim=0).sum() == seen[0].any(dim=1).sum() == 34 and not seen[1].any()


def test_an_image_is_judged_the_same_alone_and_in_any_batch():
    discriminator = PatchDiscriminator(channels=8).train()
    pixels = random_pixels(5, 16)
    together = discriminator(pixels)
    for i in range(5):
        torch.testing.assert_close(discriminator(pixels[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-6)
    assert not list(discriminator.buffers()), "running statistics would tie images together"


def test_the_discriminator_begins_undecided_and_passes_a_fifth_of_what_is_negative():
    discriminator = PatchDiscriminator(channels=8)
    assert not discriminator(torch.zeros(1, 3, 16, 16)).any()  # no bias says anything yet
    for module in discriminator.layers:
        if isinstance(module, torch.nn.LeakyReLU):
            torch.testing.assert_close(module(torch.tensor([-1.0, 1.0])), torch.tensor([-0.2, 1.0]))
        if isinstance(module, torch.nn.Conv2d):
            spread = module.weight.detach().double().square().mean().sqrt() / 0.02
            assert abs(spread - 1) < 5 / (2 * module.weight.numel()) ** 0.5


def test_the_smallest_image_gives_one_logit():
    for layers in (1, 2, 3):
        discriminator = PatchDiscriminator(channels=4, num_layers=layers)
        assert discriminator(random_pixels(1, discriminator.minimum_size)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="`channels`.*0"):
        PatchDiscriminator(channels=0)


def test_the_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert float(discriminator_hinge_loss(real, fake)) == pytest.approx(0.5 * (2.5 / 3 + 3 / 3))
    assert float(discriminator_hinge_loss(torch.zeros(4), torch.zeros(4))) == 1
    assert float(adversarial_loss(fake)) == pytest.approx(2 / 3)


def test_the_adaptive_weight_makes_both_gradients_equally_long():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 3, 8, 3, 3, generator=generator)
    for factor in (0.01, 1.0, 50.0):
        weight = adaptive_weight(first, factor * second)
        assert float((weight * factor * second).norm()) == pytest.approx(float(first.norm()), rel=1e-2)
    assert float(adaptive_weight(first, torch.zeros_like(second), maximum=7.0)) == 7
    assert float(adaptive_weight(torch.zeros_like(first), second)) == 0
    assert torch.isnan(adaptive_weight(first, second * math.nan))


def test_gradients_of_the_last_layer_are_those_of_the_losses_themselves():
    """The trainer takes them by way of the pixels, where each loss is differentiated once."""
    vae, discriminator = tiny_vae(), PatchDiscriminator(channels=8)
    pixel_values = random_pixels(3, 16)
    out = vae(pixel_values)
    weight = vae.decoder.conv_out.weight
    losses = reconstruction_loss(out.sample, pixel_values)[0], adversarial_loss(discriminator(out.sample))
    expected = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses]

    sample = out.sample.detach().requires_grad_()
    losses = reconstruction_loss(sample, pixel_values)[0], adversarial_loss(discriminator(sample))
    pixel_gradients = [torch.autograd.grad(loss, sample)[0] for loss in losses]
    actual = train_rqvae.last_layer_gradients(vae, out.sample, *pixel_gradients, 8.0, Accelerator(cpu=True))
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
        assert other.abs().max() > 1e-4
