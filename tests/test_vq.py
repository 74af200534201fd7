"""Code depth 1: the RQ-VAE is VQGAN, a stack is one code, and both stages and both samplers work as with more."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from components import seeded

from rq_draft_revise import (
    ContextualRQTransformerModel,
    DraftAndRevisePipeline,
    DraftAndReviseScheduler,
    RQTransformerModel,
    RQTransformerPipeline,
    RQVAEModel,
)


VQ = Path(__file__).resolve().parents[1] / "pipelines" / "imagenet-256-vq-350m"
CODEBOOK_SIZE = 32
POSITIONS = 16  # 4×4
NUM_IMAGES = 24  # of each class


def striped_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels `(48, 3, 8, 8)` in `[-1, 1]` and classes: red upright stripes, and blue level ones, with shift and glow.

    The mean over all shifts is a plain colour, so a model that has learned colours alone is not near to any image.
    """
    generator = torch.Generator().manual_seed(0)
    ramp = torch.arange(8) // 2 % 2 * 2.0 - 1  # two pixels wide
    images, classes = [], []
    for label in (0, 1):
        for i in range(NUM_IMAGES):
            stripes = ramp.roll(2 * (i % 2)).expand(8, 8)
            stripes = stripes if label == 0 else stripes.T
            colour = torch.tensor([0.7, -0.5, -0.7] if label == 0 else [-0.7, -0.5, 0.7])
            glow = 0.2 * torch.rand(1, generator=generator) - 0.1
            images.append((colour[:, None, None] + 0.3 * stripes + glow).clamp(-1, 1))
            classes.append(label)
    return torch.stack(images), torch.tensor(classes)


@pytest.fixture(scope="module")
def vae_and_codes():
    """A VQ-VAE trained on the images by gradient, its codebook by moving average; the images, their codes, classes."""
    pixel_values, classes = striped_images()
    config = RQVAEModel.load_config(VQ / "vae")
    config |= dict(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        codebook_size=CODEBOOK_SIZE,
        sample_size=8,
    )
    with seeded(0):
        vae = RQVAEModel.from_config(config).train()
        optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
        for _ in range(100):
            rows = torch.randperm(len(pixel_values))[:16]
            output = vae(pixel_values[rows])
            loss = F.mse_loss(output.sample, pixel_values[rows])
            optimizer.zero_grad()
            (loss + vae.config.commitment_weight * output.commitment_loss).backward()
            optimizer.step()
            vae.update_codebook(output.latents)
    vae.eval()
    with torch.no_grad():
        codes = vae.encode(pixel_values).codes
    return vae, pixel_values, codes, classes


def tiny(cls, vae, **config):
    """A transformer on the codes of `vae`, at its own initialization."""
    arguments = dict(
        height=4,
        width=4,
        code_depth=1,
        codebook_size=CODEBOOK_SIZE,
        codebook_dim=16,
        num_spatial_layers=2,
        num_depth_layers=1,
        num_attention_heads=4,
        attention_head_dim=16,
        dropout=0.0,
        num_classes=2,
    )
    with seeded(0):
        transformer = cls(**{**arguments, **config})
    transformer.set_codebook(vae.quantizer.codebook)
    return transformer


@pytest.fixture(scope="module")
def transformer_and_losses(vae_and_codes):
    """A Contextual VQ-Transformer trained by the paper's masks (ratio cos(πr/2)), a tenth of the classes dropped."""
    vae, _, codes, classes = vae_and_codes
    transformer = tiny(ContextualRQTransformerModel, vae).train()
    losses = []
    with seeded(0):
        optimizer = torch.optim.AdamW(transformer.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
        for _ in range(250):
            rows = torch.randperm(len(codes))[:16]
            num_masked = (POSITIONS * torch.cos(torch.rand(16) * math.pi / 2)).ceil()
            order = torch.rand(16, POSITIONS).argsort(dim=1).argsort(dim=1)
            mask = (order < num_masked[:, None]).view(16, 4, 4, 1)
            labels = classes[rows].masked_fill(torch.rand(16) < 0.1, transformer.null_condition_id)
            loss = transformer(
                codes[rows].masked_fill(mask, transformer.mask_token_id), class_labels=labels, labels=codes[rows]
            ).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return transformer.eval(), losses


def distances(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of each image to the nearest of the others, `(len(images),)`."""
    return (images[:, None] - others[None]).square().mean(dim=(2, 3, 4)).amin(dim=1)


def test_the_codebook_is_used_and_decodes_to_the_images(vae_and_codes):
    vae, pixel_values, codes, _ = vae_and_codes
    assert codes.shape == (2 * NUM_IMAGES, 4, 4, 1) and len(codes.unique()) > 2
    with torch.no_grad():
        decoded = vae.decode(codes).sample
    assert F.mse_loss(decoded, pixel_values) < 0.1 * pixel_values.var()


def test_training_learns_the_codes(transformer_and_losses):
    _, losses = transformer_and_losses
    assert abs(losses[0] - math.log(CODEBOOK_SIZE)) < 0.5  # knows nothing yet
    assert sum(losses[-30:]) / 30 < 0.5 * math.log(CODEBOOK_SIZE)


def test_the_pipeline_draws_the_class_asked_for(vae_and_codes, transformer_and_losses, tmp_path):
    vae, pixel_values, _, classes = vae_and_codes
    scheduler = DraftAndReviseScheduler.from_config(
        DraftAndReviseScheduler.load_config(VQ / "scheduler"), num_inference_steps=POSITIONS
    )
    assert scheduler.config.num_inference_steps == POSITIONS and scheduler.config.guidance_scale == 2.4
    id2label = {0: "upright, red", 1: "level, blue"}
    DraftAndRevisePipeline(vae, transformer_and_losses[0], scheduler, id2label=id2label).save_pretrained(tmp_path)
    pipe = DraftAndRevisePipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)

    steps = []

    def count_drafted(pipe, step, timestep, kwargs):
        steps.append(int((kwargs["latents"] != pipe.transformer.mask_token_id).sum()))

    labels = ["red"] * 8 + ["level"] * 8
    generator = [torch.Generator().manual_seed(seed) for seed in range(16)]
    images = pipe(
        class_labels=labels, generator=generator, output_type="pt", callback_on_step_end=count_drafted
    ).images
    # T_draft = N: one position of each image a step, then M·T_revise steps that change no count
    assert steps[:POSITIONS] == [16 * n for n in range(1, POSITIONS + 1)]
    assert steps[POSITIONS:] == [16 * POSITIONS] * 4

    images = 2 * images - 1
    first, second = (distances(images, pixel_values[classes == label]) for label in (0, 1))
    own = torch.cat([first[:8], second[8:]])
    other = torch.cat([second[:8], first[8:]])
    # by chance 14 of 16 or more are nearer to an image of their class with probability 0.002
    assert (own < other).sum() >= 14
    assert own.median() < 0.05 * other.median()  # and they are such images, not mixtures


def test_a_stack_of_one_code_needs_no_projection_of_the_codes_before(vae_and_codes):
    """P' would have no input: a parameter without a gradient, which distributed training refuses."""
    vae, _, codes, classes = vae_and_codes
    transformer = tiny(ContextualRQTransformerModel, vae)
    names = [name for name, _ in transformer.named_parameters()]
    assert "input_projection.weight" in names and not any("depth_transformer.input_proj" in name for name in names)
    masked = codes.clone()
    masked[:, 0] = transformer.mask_token_id
    transformer(masked, class_labels=classes, labels=codes).loss.backward()
    assert [name for name, parameter in transformer.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("learned_code_embedding", [False, True])
def test_vq_gans_own_transformer_trains_and_samples(vae_and_codes, learned_code_embedding):
    """Autoregressive, no depth blocks; VQGAN's own has a learned table of codes in place of the codebook."""
    vae, _, codes, classes = vae_and_codes
    transformer = tiny(
        RQTransformerModel, vae, num_depth_layers=0, learned_code_embedding=learned_code_embedding
    ).train()
    assert not any("depth_transformer.blocks" in name for name, _ in transformer.named_parameters())
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-2)
    before = transformer(labels=codes, class_labels=classes).loss
    assert abs(before.item() - math.log(CODEBOOK_SIZE)) < 0.5
    before.backward()
    assert [name for name, parameter in transformer.named_parameters() if parameter.grad is None] == []
    optimizer.step()
    with torch.no_grad():
        assert transformer(labels=codes, class_labels=classes).loss < before - 0.1

    pipe = RQTransformerPipeline(vae, transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
    drawn = pipe(class_labels=[0, 1], generator=generator, output_type="latent").images
    assert drawn.shape == (2, 4, 4, 1) and drawn.min() >= 0 and drawn.max() < CODEBOOK_SIZE
    images = pipe.decode_latents(drawn, output_type="pt")
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()
