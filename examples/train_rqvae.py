"""Train an RQ-VAE: images to maps of D codes a position, and back.

    accelerate launch examples/train_rqvae.py \\
        --vae_config pipelines/emoji-scenes/vae --dataset_name data/emoji-scenes --resolution 64 \\
        --cache_images_in_memory --train_batch_size 32 --max_train_steps 30000 --output_dir runs/emoji-vae

Plain `python examples/train_rqvae.py ...` is the same run on one process. (Several processes on CPUs take
`ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/train_rqvae.py ...`: accelerate launch --cpu starts one.)
The loss is

    reconstruction (MSE, L1 or both, means over elements) + commitment_weight * commitment,

while the codebook follows the encoder's latents by an exponential moving average, once an optimizer step. Into
`output_dir` the script writes `train_log.jsonl` (the curves of a model card), `checkpoint-<step>/` folders to resume
from, grids of reconstructions, and at the end the averaged weights in diffusers' format.
"""

import argparse
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from PIL import Image

from rq_draft_revise import RQVAEModel
from rq_draft_revise.budget import Budget, learning_rate_at
from rq_draft_revise.checkpoints import TrainingLog, load_checkpoint, save_checkpoint
from rq_draft_revise.data import decode_all, decoded_batches, load_split, to_pixel_values, training_order


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    group = parser.add_argument_group("model: exactly one of the first three")
    group.add_argument("--vae_config", help="config.json, or a folder with one: train from scratch.")
    group.add_argument("--vae", help="Folder or Hub id of an RQ-VAE to fine-tune.")
    group.add_argument("--pretrained_model_name_or_path", help="Pipeline whose `vae` subfolder is fine-tuned.")
    group.add_argument("--reconstruction_loss", choices=["mse", "l1", "both"], default="mse")

    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="Hub id, or a local folder that `datasets.load_dataset` reads.")
    group.add_argument("--train_data_dir", help="Folder of images.")
    group.add_argument("--data_files", nargs="+", help="Files of the training split (parquet, csv, json, tar).")
    group.add_argument("--train_split", default="train")
    group.add_argument("--validation_split", default="test", help="'none' trains without validation.")
    group.add_argument("--image_column", default="image")
    group.add_argument("--resolution", type=int, help="Default: the model's sample_size.")
    group.add_argument("--random_flip", action="store_true", help="Mirror half of the images, chosen anew each epoch.")
    group.add_argument("--cache_images_in_memory", action="store_true",
                       help="Decode every image once, into one uint8 tensor per process.")  # fmt: skip
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="Unused with cached images.")

    group = parser.add_argument_group("optimization")
    group.add_argument("--train_batch_size", type=int, default=32, help="Images per process and micro-batch.")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1)
    group.add_argument("--num_train_epochs", type=int, default=10)
    group.add_argument("--max_train_steps", type=int, help="Optimizer steps; overrides --num_train_epochs.")
    group.add_argument("--max_train_seconds", type=float, help="Stop cleanly, at learning rate 0, after this long.")
    group.add_argument("--learning_rate", type=float, default=4e-5)
    group.add_argument("--lr_scheduler", choices=["cosine", "constant"], default="cosine")
    group.add_argument("--lr_warmup_steps", type=int, default=0)
    group.add_argument("--adam_beta1", type=float, default=0.5)
    group.add_argument("--adam_beta2", type=float, default=0.9)
    group.add_argument("--max_grad_norm", type=float, default=0.0, help="0 does not clip, as in the paper's parent.")
    group.add_argument("--ema_decay", type=float, default=0.999, help="Of the exported weights; 0 turns it off.")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: as accelerate configured.")
    group.add_argument("--seed", type=int, default=0)

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="rqvae-model")
    group.add_argument("--logging_steps", type=int, default=50)
    group.add_argument("--validation_steps", type=int, default=1000)
    group.add_argument("--validation_batch_size", type=int, help="Default: --train_batch_size.")
    group.add_argument("--max_validation_images", type=int, help="Default: the whole split.")
    group.add_argument("--checkpointing_steps", type=int, default=1000)
    group.add_argument("--checkpoints_total_limit", type=int)
    group.add_argument("--resume_from_checkpoint", help="A checkpoint folder, or 'latest' for the newest, if any.")
    group.add_argument("--report_to", help="tensorboard, wandb, ... besides the JSON lines.")

    args = parser.parse_args(argv)
    if sum(source is not None for source in (args.vae_config, args.vae, args.pretrained_model_name_or_path)) != 1:
        raise ValueError("Give exactly one of --vae_config, --vae and --pretrained_model_name_or_path.")
    if args.dataset_name is None and args.train_data_dir is None and args.data_files is None:
        raise ValueError("Give the images by --dataset_name, --train_data_dir or --data_files.")
    for name in ("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps",
                 "logging_steps", "validation_steps", "max_validation_images", "checkpointing_steps",
                 "checkpoints_total_limit", "validation_batch_size"):  # fmt: skip
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if args.max_train_seconds is not None and not args.max_train_seconds > 0:
        raise ValueError(f"--max_train_seconds must be positive, got {args.max_train_seconds}.")
    if not 0 <= args.ema_decay < 1:
        raise ValueError(f"--ema_decay must lie in [0, 1), got {args.ema_decay}.")
    return args


# ---------------------------------------------------------------------------------------------------------- data


def training_batches(args, dataset, images, start, accelerator):
    """Yield pixel values `(B, 3, H, W)` on the device, for ever, from decoded `images` or, if None, from `dataset`."""

    def order():
        return training_order(
            len(dataset), start, args.train_batch_size, accelerator.process_index, accelerator.num_processes, args.seed
        )

    device = accelerator.device
    if images is not None:
        decoded = (images[indices].to(device, non_blocking=True) for indices, _ in order())
    else:
        batches_of_indices = (indices.tolist() for indices, _ in order())
        decoded = decoded_batches(
            dataset, batches_of_indices, args.image_column, args.resolution, device, args.dataloader_num_workers
        )
    for batch, (_, flips) in zip(decoded, order()):
        yield to_pixel_values(batch, flips.to(device) if args.random_flip else None)


# -------------------------------------------------------------------------------------------------------- losses


def reconstruction_loss(sample, pixel_values, kind):
    """Returns the loss to descend and the MSE to report, both in units of the [-1, 1] range."""
    mse = F.mse_loss(sample, pixel_values)
    if kind == "mse":
        return mse, mse
    l1 = F.l1_loss(sample, pixel_values)
    return (l1 if kind == "l1" else mse + l1), mse


# ---------------------------------------------------------------------------------------------------- validation


@torch.no_grad()
def reconstruction_metrics(rqvae, images, batch_size, accelerator):
    """MSE, PSNR and code usage of reconstructing uint8 `images`, which the processes share out among them.

    MSE is in units of the [-1, 1] range, like the loss, but of the clamped reconstruction; PSNR is the mean over
    images. Usage and perplexity are over the codes of all images together, one number a depth.
    """
    depth, codebook_size = rqvae.config.code_depth, rqvae.config.codebook_size
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    counts = torch.zeros(depth, codebook_size, dtype=torch.float64, device=accelerator.device)
    own = images[accelerator.process_index :: accelerator.num_processes]
    for batch in own.split(batch_size):
        pixel_values = to_pixel_values(batch.to(accelerator.device))
        with accelerator.autocast():
            out = rqvae(pixel_values)
        mse = (out.sample.float().clamp(-1, 1) - pixel_values).square().mean((1, 2, 3)).double()
        psnr = 10 * torch.log10(4 / mse.clamp(min=1e-10))  # the range has length 2, its square is 4
        sums += torch.stack([mse.sum(), psnr.sum(), torch.tensor(len(batch), device=mse.device)])
        for d in range(depth):
            counts[d] += out.codes[..., d].flatten().bincount(minlength=codebook_size)
    sums, counts = accelerator.reduce(sums), accelerator.reduce(counts)
    frequencies = counts / counts.sum(1, keepdim=True)
    return {
        "mse": (sums[0] / sums[2]).item(),
        "psnr": (sums[1] / sums[2]).item(),
        "usage": (counts > 0).double().mean(1).tolist(),
        "perplexity": torch.special.entr(frequencies).sum(1).exp().tolist(),
    }


@torch.no_grad()
def save_grid(rqvae, images, path, accelerator, columns=8):
    """Write a PNG of `images`, each row of originals above the row of their reconstructions."""
    with accelerator.autocast():
        sample = rqvae(to_pixel_values(images.to(accelerator.device))).sample.float()
    sample = ((sample.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    rows = []
    for originals, reconstructions in zip(images.split(columns), sample.split(columns)):
        for row in (originals, reconstructions):
            row = torch.cat(list(row), dim=2)
            rows.append(F.pad(row, (0, columns * images.shape[-1] - row.shape[-1])))
    Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).numpy()).save(path)


# ----------------------------------------------------------------------------------------------------------- main


def main(args):
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir),
        # The only buffers are the codebook and its statistics, which update_codebook keeps equal by itself. Sending
        # them from process 0 before every forward would cost 16 MB a step and hide a divergence.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    # The same seed in every process: the model, and with it the codebook, starts out the same everywhere. The order of
    # the images does not depend on this state at all.
    set_seed(args.seed)
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)

    # 1. Model
    if args.vae_config is not None:
        rqvae = RQVAEModel.from_config(RQVAEModel.load_config(args.vae_config))
    elif args.vae is not None:
        rqvae = RQVAEModel.from_pretrained(args.vae)
    else:
        rqvae = RQVAEModel.from_pretrained(args.pretrained_model_name_or_path, subfolder="vae")
    if args.resolution is None:
        args.resolution = rqvae.config.sample_size
    if args.resolution < 1 or args.resolution % rqvae.spatial_scale_factor:
        raise ValueError(f"--resolution must be a multiple of {rqvae.spatial_scale_factor}, got {args.resolution}.")
    optimizer = torch.optim.Adam(rqvae.parameters(), lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2))
    # `model` is what trains (wrapped for several processes, autocast); `rqvae` stays the module inside it.
    model, optimizer = accelerator.prepare(rqvae.train(), optimizer)

    # The average covers the parameters. The codebook is exported live: it already is an average of the latents (decay
    # 0.99, some hundred steps), and averaging it over again would mix the vector of a restarted code with the dead one
    # that it replaced. The two agree in the end because the learning rate goes to 0.
    ema = None
    if args.ema_decay > 0:
        # With the warm-up the decay is min(ema_decay, 1 - (1 + step)^(-2/3)), or a short run would export little but
        # its initialisation.
        ema = EMAModel(rqvae.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=2 / 3)
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)

    # 2. Data
    source = ("image_column", "dataset_name", "train_data_dir", "data_files", "train_split")
    source = {name: getattr(args, name) for name in source}
    with accelerator.main_process_first():  # one process prepares the files that all then map
        train_dataset = load_split(args.train_split, **source)
        validation_dataset = None if args.validation_split == "none" else load_split(args.validation_split, **source)
    train_images = None
    if args.cache_images_in_memory:
        train_images = decode_all(train_dataset, args.image_column, args.resolution)
    validation_images = None
    if validation_dataset is not None:
        count = min(len(validation_dataset), args.max_validation_images or len(validation_dataset))
        validation_images = decode_all(validation_dataset.select(range(count)), args.image_column, args.resolution)
        # As many training images, spread evenly over the set, for the gap between seen and held-back images.
        spread = np.linspace(0, len(train_dataset) - 1, min(count, len(train_dataset))).round().astype(int)
        compared_images = decode_all(train_dataset.select(spread), args.image_column, args.resolution)

    # 3. Length of the run
    total_batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    max_train_steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(train_dataset) / total_batch_size)
    progress = {"step": 0, "images": 0, "epoch": 0, "seconds": 0.0}
    if args.resume_from_checkpoint is not None:
        progress = load_checkpoint(accelerator, output_dir, args.resume_from_checkpoint) or progress
    step, images_seen = progress["step"], progress["images"]
    log = TrainingLog(accelerator, output_dir, step)
    if args.report_to is not None:
        accelerator.init_trackers("rqvae", config={k: v for k, v in vars(args).items() if not isinstance(v, list)})

    accelerator.print(
        f"parameters: {sum(p.numel() for p in rqvae.parameters()):,} + codebook of "
        f"{rqvae.config.codebook_size:,} x {rqvae.config.latent_channels} at {rqvae.config.code_depth} depths\n"
        f"images: {len(train_dataset):,} training, {0 if validation_images is None else len(validation_images):,} "
        f"validation, at {args.resolution}x{args.resolution}\n"
        f"total batch: {total_batch_size:,} = {args.train_batch_size} x {accelerator.num_processes} processes x "
        f"{args.gradient_accumulation_steps} micro-batches\n"
        f"steps: {max_train_steps:,} ({max_train_steps * total_batch_size / len(train_dataset):.1f} epochs)"
        + (f" or {args.max_train_seconds:,.0f} seconds" if args.max_train_seconds else "")
        + f", from step {step:,}",
    )

    def validate():
        rqvae.eval()
        if ema is not None:
            ema.store(rqvae.parameters())
            ema.copy_to(rqvae.parameters())
        batch_size = args.validation_batch_size or args.train_batch_size
        held_back = reconstruction_metrics(rqvae, validation_images, batch_size, accelerator)
        # The same weights in the same mode on training images. Apart from overfitting, this shows a codebook that
        # serves the batch at hand and nothing else: then the training loss falls while both numbers here are bad.
        train = reconstruction_metrics(rqvae, compared_images, batch_size, accelerator)
        if accelerator.is_main_process:
            save_grid(rqvae, validation_images[:16], output_dir / f"reconstructions-{step:07d}.png", accelerator)
        if ema is not None:
            ema.restore(rqvae.parameters())
        rqvae.train()
        entry = {"kind": "validation", "step": step, "images": images_seen, "seconds": round(budget.elapsed(), 2)}
        entry |= held_back | {"train_mse": train["mse"], "train_psnr": train["psnr"]}
        entry["mse_gap"] = held_back["mse"] - train["mse"]
        usage = " ".join(f"{u:.3f}" for u in held_back["usage"])
        log.write(
            entry,
            f"  validation at step {step}: mse {held_back['mse']:.5f} psnr {held_back['psnr']:.2f} dB "
            f"gap {entry['mse_gap']:+.5f} usage {usage}",
        )

    # 4. Training
    budget = Budget(accelerator, max_train_steps, args.max_train_seconds, progress["seconds"])
    batches = training_batches(args, train_dataset, train_images, images_seen, accelerator)
    generator = torch.Generator()
    sums, window_steps, window_started = defaultdict(float), 0, time.monotonic()
    while (fraction := budget.fraction_used(step)) < 1:
        learning_rate = learning_rate_at(step, fraction, args.learning_rate, args.lr_scheduler, args.lr_warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        latents = []
        for _ in range(args.gradient_accumulation_steps):
            pixel_values = next(batches)
            with accelerator.accumulate(model):
                out = model(pixel_values)
                reconstruction, mse = reconstruction_loss(out.sample, pixel_values, args.reconstruction_loss)
                loss = reconstruction + rqvae.config.commitment_weight * out.commitment_loss
                accelerator.backward(loss)
                if accelerator.sync_gradients and args.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(rqvae.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            latents.append(out.latents.detach())
            share = 1 / args.gradient_accumulation_steps
            for name, value in (("loss", loss), ("mse", mse), ("reconstruction_loss", reconstruction),
                                ("commitment_loss", out.commitment_loss)):  # fmt: skip
                sums[name] += value.detach() * share
        # One update from the latents of the whole batch, so that micro-batches make no difference. Restarts draw from
        # (seed, step) and not from the global state, which data loaders draw from too.
        generator.manual_seed(args.seed * 1_000_003 + step)
        stats = rqvae.update_codebook(latents, generator=generator)
        if ema is not None:
            ema.step(rqvae.parameters())
        sums["usage"] += stats.usage
        sums["perplexity"] += stats.perplexity
        sums["restarts"] += stats.num_restarted

        step += 1
        images_seen += total_batch_size
        window_steps += 1

        if step % args.logging_steps == 0:
            # The only place where the host waits for the device.
            means = {}
            for name, value in sums.items():
                value = value.float() / window_steps
                # update_codebook already returns the same numbers in every process
                value = accelerator.reduce(value, "mean") if name.endswith(("loss", "mse")) else value
                means[name] = value.tolist()
            rate = window_steps * total_batch_size / (time.monotonic() - window_started)
            entry = {"kind": "train", "step": step, "images": images_seen, "seconds": round(budget.elapsed(), 2),
                     "images_per_second": round(rate, 2), "learning_rate": learning_rate, **means}  # fmt: skip
            log.write(
                entry,
                f"step {step}/{max_train_steps} images {images_seen:,} {rate:.1f}/s lr {learning_rate:.2e} "
                f"loss {means['loss']:.5f} mse {means['mse']:.5f} commitment {means['commitment_loss']:.5f} "
                f"usage {' '.join(f'{u:.3f}' for u in means['usage'])} restarts {means['restarts']:.1f}",
            )
            sums, window_steps, window_started = defaultdict(float), 0, time.monotonic()

        pause_started = time.monotonic()
        if validation_images is not None and step % args.validation_steps == 0:
            validate()
        if step % args.checkpointing_steps == 0:
            epoch = images_seen // len(train_dataset)
            progress = {"step": step, "images": images_seen, "epoch": epoch, "seconds": budget.elapsed()}
            save_checkpoint(accelerator, output_dir, progress, vars(args), args.checkpoints_total_limit)
        window_started += time.monotonic() - pause_started  # images/s is the speed of training alone

    # 5. Export
    if validation_images is not None and step % args.validation_steps != 0:
        validate()
    if ema is not None:
        ema.copy_to(rqvae.parameters())
    if accelerator.is_main_process:
        rqvae.save_pretrained(output_dir)
    log.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    seconds = budget.elapsed()
    accelerator.print(f"Saved to {output_dir} after {step:,} steps, {images_seen:,} images, {seconds:,.0f} seconds.")


if __name__ == "__main__":
    main(parse_args())
