"""What training the second stage costs: images a second, where the time goes, memory, share of the hardware used.

    python benchmarks/training.py --batch_size 32                                   # the bundled pipeline, on the CPU
    python benchmarks/training.py --device cuda --mixed_precision bf16 --batch_size 64 \\
        --pipelines pipelines/imagenet-256-371m pipelines/imagenet-256-821m pipelines/imagenet-256-1.4b
    python benchmarks/training.py --pipelines pipelines/table-2-emoji-vq pipelines/table-2-emoji-ar
    python benchmarks/training.py --estimate                                        # GPU-hours of the paper's runs

*Time* is of whole optimizer steps as the training scripts take them: codes of random images, stratified masks,
clipped gradients, fused AdamW, averaged weights. Data and encoding are what cached codes save. *Operations* are
counted by torch's `FlopCounterMode` on the meta device and set beside the analytic count of `benchmarks/flops.py`,
which has depth blocks and head at masked positions only. *MFU* is the analytic count over the time, as a share of the
rate of a square matrix product, measured here, at the same precision. *Masked over all positions* is the time of a
forward and a backward pass beside that of passes which send every position through depth blocks and head; the same
ratio of operations is the best there is. Our bound: no more than 1.2 times that best. The autoregressive baseline
learns all positions at once and has no such figures.

On the CPU the times are process time, so that other programs on the machine do not count; memory is the peak of the
whole process.
"""

import argparse
import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import flops
import limits
import numpy as np
import torch
from diffusers.training_utils import EMAModel
from operations import count_flops
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from rq_draft_revise import ContextualRQTransformerModel, RQVAEModel
from rq_draft_revise.decoded_images import decode_image, to_pixel_values
from rq_draft_revise.devices import seconds_now
from rq_draft_revise.discriminator import PatchDiscriminator
from rq_draft_revise.masks import random_mask
from rq_draft_revise.training import MODELS


ROOT = Path(__file__).resolve().parents[1]
MASKED_SHARE = 2 / np.pi  # mean of cos(pi r / 2)

# Dense bfloat16 products, TFLOP/s, of the vendors' data sheets.
PEAK_TFLOPS = {"A100": 312, "H100": 989}
# Stated, not measured: what of the peak a training of this size is taken to reach.
ASSUMED_MFU = 0.4
IMAGENET, CC3M = 1_281_167, 2_300_000  # of CC-3M's 3.3 million links about 70 % are alive
EPOCHS = 300


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipelines", nargs="+", default=[str(ROOT / "pipelines/emoji-scenes")])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="Timed steps; the median counts.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--attention_backend", help="As `set_attention_backend` takes it.")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--estimate", action="store_true", help="Only print the table of GPU-hours.")
    parser.add_argument("--output", help="JSON file for the figures.")
    return parser.parse_args(argv)


class Stopwatch:
    """Seconds of named parts, each after the device has done its work."""

    def __init__(self, device: torch.device):
        self.parts = defaultdict(list)
        self._device = device

    @contextlib.contextmanager
    def part(self, name: str):
        start = seconds_now(self._device)
        yield
        self.parts[name].append(seconds_now(self._device) - start)

    def medians(self) -> dict[str, float]:
        return {name: float(np.median(values)) for name, values in self.parts.items()}


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.mixed_precision == "bf16")


def conditions(config, batch_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    if config.num_classes is not None:
        return {"class_labels": torch.randint(config.num_classes, (batch_size,), device=device)}
    if config.text_vocab_size is not None:
        return {
            "input_ids": torch.randint(config.text_vocab_size, (batch_size, config.max_text_length), device=device)
        }
    return {}


def transformer_of(folder: Path):
    """A fresh transformer of the kind and the configuration that the pipeline names."""
    name = json.loads((folder / "model_index.json").read_text())["transformer"][1]
    (kind,) = (kind for kind in MODELS.values() if kind.__name__ == name)
    return kind.from_config(kind.load_config(folder / "transformer"))


def time_training(args, folder: Path, rate: float) -> dict:
    """Figures of one pipeline; only its configs are read, the weights are random."""
    device, batch_size = torch.device(args.device), args.batch_size
    torch.manual_seed(0)
    limits.reset_peak_memory(device)
    vae = RQVAEModel.from_config(RQVAEModel.load_config(folder / "vae")).to(device).eval().requires_grad_(False)
    transformer = transformer_of(folder)
    is_contextual = isinstance(transformer, ContextualRQTransformerModel)
    transformer.set_codebook(torch.randn_like(transformer.codebook))
    transformer.to(device).train()
    if args.attention_backend is not None:
        transformer.set_attention_backend(args.attention_backend)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    config, resolution = transformer.config, vae.config.sample_size
    parameters = list(transformer.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    ema = EMAModel(parameters, decay=0.9999, foreach=True)
    condition = conditions(config, batch_size, device)
    every = torch.arange(transformer.num_positions, device=device).expand(batch_size, -1)
    generator = torch.Generator().manual_seed(0)
    encoded = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (resolution // 8, resolution // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((resolution, resolution)).save(encoded, "JPEG", quality=90)

    def step(watch: Stopwatch, positions: torch.Tensor | None = None) -> int:
        """One optimizer step, with `positions` given of every one; returns the number of masked stacks."""
        with watch.part("data"):
            images = torch.stack([decode_image(Image.open(encoded), resolution) for _ in range(batch_size)])
            pixel_values = to_pixel_values(images.to(device))
        with watch.part("encode"), torch.no_grad():
            codes = vae.encode(pixel_values).codes
        mask = random_mask(batch_size, transformer.num_positions, generator)
        inputs = dict(labels=codes, **condition)
        if is_contextual:
            hidden = mask.to(device).view(batch_size, config.height, config.width, 1)
            inputs |= dict(codes=codes.masked_fill(hidden, transformer.mask_token_id), positions=positions)
        with watch.part("forward"), autocast(args):
            out = transformer(**inputs)
        with watch.part("backward"):
            out.loss.backward()
        with watch.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            ema.step(parameters)
            optimizer.zero_grad()
        return int(mask.sum())

    # The two versions in turn, so that a machine that slows down slows down both.
    masked, whole = Stopwatch(device), Stopwatch(device)
    num_masked = []
    for _ in range(2):
        step(masked)
    memory = limits.peak_memory(device)  # before the other version has had its turn
    for _ in range(2 * is_contextual):
        step(whole, every)
    for _ in range(args.steps):
        num_masked.append(step(masked))
        if is_contextual:
            step(whole, every)
    for watch in (masked, whole):
        watch.parts = {name: values[2:] for name, values in watch.parts.items()}
    parts = masked.medians()
    passes = ("forward", "backward")
    train_seconds = sum(parts[name] for name in (*passes, "optimizer"))
    if is_contextual:
        operations = flops.teacher_forcing(config, batch_size, np.mean(num_masked), trained=True)
        most = flops.teacher_forcing(config, batch_size, batch_size * transformer.num_positions, trained=True)
        time_ratio = sum(parts[name] for name in passes) / sum(whole.medians()[name] for name in passes)
        beside_all = {
            "time_masked_over_all": time_ratio,
            "flop_masked_over_all": operations / most,
            "time_over_best": time_ratio / (operations / most),
        }
    else:
        operations, beside_all = flops.autoregressive_teacher_forcing(config, batch_size, trained=True), {}
    (counted,) = (row for row in count_flops(folder / "transformer", 2) if row["step"] == "training step")
    return {
        "pipeline": folder.name,
        "parameters": sum(p.numel() for p in parameters),
        "images_per_second_cached_codes": batch_size / train_seconds,
        "images_per_second": batch_size / sum(parts.values()),
        "time_shares": {name: seconds / sum(parts.values()) for name, seconds in parts.items()},
        "peak_memory_gb": memory / 1e9,
        "gflop_per_image": operations / batch_size / 1e9,
        "counted_over_analytic": counted["counted_over_analytic"],
        "mfu": operations / train_seconds / rate,
        **beside_all,
    }


# ------------------------------------------------------------------------------------------------------- GPU-hours


def count(function: Callable) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def rqvae_flops(config: dict) -> dict[str, int]:
    """Operations an image: of encoding it, and of a training step with LPIPS and discriminator."""
    resolution = config["sample_size"]
    with torch.device("meta"):
        vae, discriminator = RQVAEModel.from_config(config), PatchDiscriminator()
        pixel_values = torch.zeros(1, 3, resolution, resolution)
        side = resolution // vae.spatial_scale_factor
        quantized = torch.zeros(1, vae.config.latent_channels, side, side)
    with torch.no_grad():
        encode = count(lambda: vae.quant_conv(vae.encoder(pixel_values)))
        decode = count(lambda: vae.decoder(vae.post_quant_conv(quantized)))
        judge = count(lambda: discriminator(pixel_values))
    # the distances of every residual to every code; no backward pass goes through them
    search = 2 * side**2 * vae.config.code_depth * vae.config.codebook_size * vae.config.latent_channels
    # A backward pass costs two forward passes, and one where only the input needs a gradient. The image goes through
    # VGG16 forward; the reconstruction forward and back to the pixels; so does the reconstruction through the
    # discriminator, which then learns from both.
    train = search + 3 * (encode + decode) + 3 * flops.vgg16(resolution) + (2 + 2 * 3) * judge
    return {"encode": search + encode, "train": train}


def estimate() -> list[dict]:
    """GPU-hours of the paper's runs: operations an image x images / (MFU x peak)."""
    rows = []

    def row(name: str, per_image: float, images: float) -> None:
        total = per_image * images
        hours = {gpu: total / (ASSUMED_MFU * peak * 1e12) / 3600 for gpu, peak in PEAK_TFLOPS.items()}
        rows.append(
            {"run": name, "gflop_per_image": per_image / 1e9, "images": images, "eflop": total / 1e18, **hours}
        )

    vae = rqvae_flops(RQVAEModel.load_config(ROOT / "pipelines/imagenet-256-821m/vae"))
    for epochs in (10, 50):
        row(f"stage 1, RQ-VAE 8x8x4, ImageNet, {epochs} epochs", vae["train"], epochs * IMAGENET)
    for name in ("imagenet-256-371m", "imagenet-256-821m", "imagenet-256-1.4b", "imagenet-256-vq-350m",
                 "rq-imagenet-256-1.4b", "cc3m-256-366m", "cc3m-256-654m"):  # fmt: skip
        with torch.device("meta"):
            model = transformer_of(ROOT / "pipelines" / name)
        if isinstance(model, ContextualRQTransformerModel):
            per_image = flops.teacher_forcing(model.config, 1, MASKED_SHARE * model.num_positions, trained=True)
        else:
            per_image = flops.autoregressive_teacher_forcing(model.config, 1, trained=True)
        row(f"stage 2, {name}, {EPOCHS} epochs", per_image, EPOCHS * (CC3M if "cc3m" in name else IMAGENET))
    row(f"encoding every image of {EPOCHS} epochs anew, ImageNet", vae["encode"], EPOCHS * IMAGENET)
    return rows


def main(argv=None):
    args = parse_args(argv)
    if args.estimate:
        report = estimate()
        print(f"{'run':<58}{'GFLOP an image':>15}{'million images':>16}{'EFLOP':>9}", end="")
        print("".join(f"{gpu + '-hours':>12}" for gpu in PEAK_TFLOPS))
        for row in report:
            print(f"{row['run']:<58}{row['gflop_per_image']:>15,.0f}{row['images'] / 1e6:>16,.1f}", end="")
            print(f"{row['eflop']:>9,.1f}" + "".join(f"{row[gpu]:>12,.0f}" for gpu in PEAK_TFLOPS))
        print(f"\nat {ASSUMED_MFU:.0%} of {', '.join(f'{v} TFLOP/s ({k})' for k, v in PEAK_TFLOPS.items())}")
    else:
        dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
        rate = limits.matrix_product_rate(torch.device(args.device), dtype)
        report = [time_training(args, Path(folder), rate) for folder in args.pipelines]
        print(f"matrix product: {rate / 1e12:.3f} TFLOP/s; {args.device}, {torch.get_num_threads()} threads, "
              f"precision {args.mixed_precision}, batch {args.batch_size}, torch {torch.__version__}")  # fmt: skip
        for figures in report:
            print()
            for name, value in figures.items():
                if isinstance(value, dict):
                    value = ", ".join(f"{part} {share:.1%}" for part, share in value.items())
                print(f"{name:<32}" + (f"{value:,.4g}" if isinstance(value, float) else f"{value}"))
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
