"""Train an RQ-VAE: images to maps of D codes a position, and back. A model of D = 1 is a VQGAN.

    accelerate launch examples/train_rqvae.py \\
        --vae_config pipelines/imagenet-256-1.4b/vae --train_data_dir imagenet/train --output_dir runs/imagenet-vae

Plain `python examples/train_rqvae.py ...` is the same run on one process. (Several processes on CPUs take
`ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/train_rqvae.py ...`: accelerate launch --cpu starts one.)
The defaults are the recipe of the paper and its parent, for four processes. The RQ-VAE descends

    reconstruction (MSE, L1 or both) + perceptual_weight * LPIPS + commitment_weight * commitment
        + adversarial_weight * adaptive weight * adversarial,

means over elements, while a patch discriminator learns by the hinge loss to tell reconstructions from images, and the
codebook follows the encoder's latents by an exponential moving average, once an optimizer step. A weight of 0 leaves a
loss out with all that it needs. A recipe for a CPU, without both:

    accelerate launch examples/train_rqvae.py \\
        --vae_config pipelines/emoji-scenes/vae --dataset_name data/emoji-scenes --resolution 64 \\
        --cache_images_in_memory --perceptual_weight 0 --adversarial_weight 0 --reconstruction_loss both \\
        --learning_rate 8e-4 --lr_scheduler cosine --max_train_steps 30000 --output_dir runs/emoji-vae

Images are read like those of the second stage: prepared first, or streamed while training, as from webdataset tars:

    accelerate launch examples/train_rqvae.py \\
        --vae_config pipelines/cc3m-256-654m/vae --dataset_name pixparse/cc3m-wds --image_column jpg --streaming \\
        --random_flip --random_crop --max_train_steps 180000 --output_dir runs/cc3m-vae

Into `output_dir` the script writes `train_log.jsonl` (the curves of a model card), `checkpoint-<step>/` folders to
resume from, grids of reconstructions, and at the end the averaged weights in diffusers' format. At SIGTERM or Ctrl-C a
checkpoint is written and the run ends.
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from PIL import Image
from tqdm.auto import tqdm

from rq_draft_revise import RQVAEModel
from rq_draft_revise.batches import drawn_images, streamed_images
from rq_draft_revise.budget import Budget, learning_rate_at, warmup_at
from rq_draft_revise.checkpoints import save_checkpoint
from rq_draft_revise.data import (
    CODES_COLUMN,
    SkippedRows,
    decode_all,
    digest_of_rows,
    to_pixel_values,
    training_order,
)
from rq_draft_revise.devices import sum_dtype
from rq_draft_revise.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    adversarial_loss,
    discriminator_hinge_loss,
)
from rq_draft_revise.divergence import NonFiniteGuard
from rq_draft_revise.flags import (
    FlagHelp,
    add_data_flags,
    add_flip_and_crop_flags,
    add_validation_flags,
    check_flags,
    tracked,
)
from rq_draft_revise.interruption import StopSignal
from rq_draft_revise.losses import PerceptualLoss, reconstruction_loss
from rq_draft_revise.publishing import upload
from rq_draft_revise.splits import load_splits, num_streamed, seen_rows
from rq_draft_revise.training import (
    AveragedWeights,
    check_resolution,
    gathered,
    load_progress,
    load_vae,
    make_accelerator,
    open_output,
    run_length,
)
from rq_draft_revise.training_log import LogWindow, TrainingLog


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=FlagHelp)

    group = parser.add_argument_group("model: exactly one of the first three")
    group.add_argument("--vae_config", help="config.json, or a folder with one: train from scratch.")
    group.add_argument("--vae", help="Folder or Hub id of an RQ-VAE to fine-tune.")
    group.add_argument("--pretrained_model_name_or_path", help="Pipeline whose `vae` subfolder is fine-tuned.")
    group.add_argument("--gradient_checkpointing", action="store_true",
                       help="Compute activations again in the backward pass: less memory, more time.")  # fmt: skip
    group.add_argument("--compile", action="store_true", help="torch.compile the encoder's and the decoder's blocks.")

    group = parser.add_argument_group("losses")
    group.add_argument("--reconstruction_loss", choices=["mse", "l1", "both"], default="mse", help="Paper: mse.")
    group.add_argument("--perceptual_weight", type=float, default=1.0,
                       help="Weight of LPIPS. Paper: 1; 0 trains without, and needs neither the package nor its "
                       "weights.")  # fmt: skip
    group.add_argument("--lpips_weights", help="State dict of torchvision's vgg16, for machines without a network. "
                       "Default: torchvision downloads it.")  # fmt: skip
    group.add_argument("--adversarial_weight", type=float, default=0.75,
                       help="Of the adversarial loss, times the adaptive weight. Paper: 0.75; 0 trains without a "
                       "discriminator.")  # fmt: skip
    group.add_argument("--max_adaptive_weight", type=float, default=1e4,
                       help="The adaptive weight is cut here. Paper: 10,000.")  # fmt: skip
    group.add_argument("--discriminator_channels", type=int, default=64,
                       help="Of its first convolution; the next two double them. Paper: 64.")  # fmt: skip
    group.add_argument("--discriminator_start_step", type=int, default=0,
                       help="Optimizer steps before it begins to learn. Paper: 0.")  # fmt: skip
    group.add_argument("--discriminator_warmup_steps", type=int,
                       help="Optimizer steps that it then learns alone, before the RQ-VAE sees its gradient. Default: "
                       "that of --lr_warmup_steps, at most a tenth of the run. The paper's parent has "
                       "none.")  # fmt: skip
    group.add_argument("--discriminator_learning_rate", type=float, help="Default and paper: --learning_rate.")

    group = add_data_flags(parser, image_column="image", source="none, it has to be given", takes_codes=False)
    add_validation_flags(group)
    # Off, since a recipe for drawings or faces wants neither; on ImageNet both belong to the paper's.
    add_flip_and_crop_flags(group, random_flip=False, random_crop=False)
    group.add_argument("--cache_images_in_memory", action="store_true",
                       help="Decode every image once, into one uint8 tensor per process.")  # fmt: skip

    group = parser.add_argument_group("optimization")
    group.add_argument("--train_batch_size", type=int, default=32,
                       help="Images per process and micro-batch. Paper: 128 in all, such as 32 in 4 "
                       "processes.")  # fmt: skip
    group.add_argument("--gradient_accumulation_steps", type=int, default=1,
                       help="Micro-batches an optimizer step.")  # fmt: skip
    group.add_argument("--num_train_epochs", type=int, default=10,
                       help="Paper: 10, and 50 for the better of its models.")  # fmt: skip
    group.add_argument("--max_train_steps", type=int, help="Optimizer steps; overrides --num_train_epochs.")
    group.add_argument("--max_train_seconds", type=float, help="Stop cleanly after this long, the learning rate's "
                       "cosine at 0.")  # fmt: skip
    group.add_argument("--learning_rate", type=float, default=4e-5, help="Of Adam, after the warm-up. Paper: 4e-5.")
    group.add_argument("--lr_scheduler", choices=["cosine", "constant"], default="constant",
                       help="After the warm-up. Paper: constant.")  # fmt: skip
    group.add_argument("--lr_warmup_steps", type=int,
                       help="Linear. Default: half an epoch as in the paper, but at most a tenth of the run, in steps "
                       "or in --max_train_seconds; of a stream, always that.")  # fmt: skip
    group.add_argument("--adam_beta1", type=float, default=0.5, help="Of Adam. Paper: 0.5.")
    group.add_argument("--adam_beta2", type=float, default=0.9, help="Of Adam. Paper: 0.9.")
    group.add_argument("--max_grad_norm", type=float, default=0.0,
                       help="Of the RQ-VAE and of the discriminator; 0 does not clip. Paper: 0.")  # fmt: skip
    group.add_argument("--max_nonfinite_steps", type=int, default=10,
                       help="A step with a NaN or infinite loss or gradient is left out; so many in a row end the "
                       "run.")  # fmt: skip
    group.add_argument("--ema_decay", type=float, default=0.999,
                       help="Of the exported weights; 0 turns averaging off. Not published. (The codebook's decay is "
                       "in the model's config: 0.99.)")  # fmt: skip
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: as accelerate configured.")
    group.add_argument("--seed", type=int, default=0, help="Of all random numbers.")

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="rqvae-model", help="Folder of the log, checkpoints and the model.")
    group.add_argument("--logging_steps", type=int, default=50, help="Steps between two lines of the log.")
    group.add_argument("--validation_steps", type=int, default=1000,
                       help="Steps between two validations: metrics and a grid of reconstructions.")  # fmt: skip
    group.add_argument("--validation_batch_size", type=int, help="Default: --train_batch_size.")
    group.add_argument("--max_validation_images", type=int, default=5000,
                       help="Images of each validation split. Every process holds them in memory, and as many of "
                       "the training split.")  # fmt: skip
    group.add_argument("--checkpointing_steps", type=int, default=1000, help="Steps between two checkpoints.")
    group.add_argument("--checkpoints_total_limit", type=int, help="Keep so many, the newest. Default: all.")
    group.add_argument("--resume_from_checkpoint", help="A checkpoint folder, or 'latest' for the newest, if any.")
    group.add_argument("--overwrite_output_dir", action="store_true",
                       help="Begin anew where a run is; its checkpoints are deleted.")  # fmt: skip
    group.add_argument("--report_to", help="tensorboard, wandb, trackio or another tracker of accelerate's, or 'all', "
                       "besides the JSON lines.")  # fmt: skip
    group.add_argument("--push_to_hub", action="store_true", help="Upload the model, its log and a grid at the end.")
    group.add_argument("--hub_model_id", help="Repository to push to. Default: the name of --output_dir.")
    group.add_argument("--hub_token", help="Default: of `hf auth login`.")
    group.add_argument("--hub_private_repo", action="store_true", help="Make a new repository private.")

    args = parser.parse_args(argv)
    if sum(source is not None for source in (args.vae_config, args.vae, args.pretrained_model_name_or_path)) != 1:
        raise ValueError("Give exactly one of --vae_config, --vae and --pretrained_model_name_or_path.")
    if args.dataset_name is None and args.train_data_dir is None and args.data_files is None:
        raise ValueError("Give the images by --dataset_name, --train_data_dir or --data_files.")
    check_flags(args)
    for name in ("perceptual_weight", "adversarial_weight", "max_adaptive_weight", "max_grad_norm",
                 "discriminator_start_step", "discriminator_warmup_steps"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"--{name} must be finite and not negative, got {value}.")
    for name in ("streaming", "random_crop"):
        if args.cache_images_in_memory and getattr(args, name):
            raise ValueError(
                f"--cache_images_in_memory must come without --{name}: it keeps one square of each image of a data "
                "set that is prepared first."
            )
    return args


# ---------------------------------------------------------------------------------------------------------- data


def pixel_batches(args, accelerator, dataset, images, images_seen, place, skipped):
    """Yield pixel values `(B, 3, H, W)` on the device, for ever, and of a stream the place after them, else None.

    They come from decoded `images` or, if None, from `dataset`, after the `images_seen` that all processes together
    have read, or in a stream after `place`.
    """
    if images is not None:
        for rows, flips in training_order(
            len(images), images_seen, args.train_batch_size, accelerator.process_index, accelerator.num_processes,
            args.seed,
        ):  # fmt: skip
            batch = images[rows].to(accelerator.device, non_blocking=True)
            yield to_pixel_values(batch, flips.to(accelerator.device) if args.random_flip else None), None
        return
    arguments = dict(
        image_column=args.image_column, resolution=args.resolution, batch_size=args.train_batch_size, seed=args.seed,
        accelerator=accelerator, random_flip=args.random_flip, random_crop=args.random_crop,
        num_workers=args.dataloader_num_workers, skipped=skipped,
    )  # fmt: skip
    if args.streaming:
        streamed = streamed_images(dataset, start=place, buffer_size=args.shuffle_buffer_size, **arguments)
        for batch, _, place_after in streamed:
            yield to_pixel_values(batch), place_after
    else:
        for batch, _, _ in drawn_images(dataset, start=images_seen, **arguments):
            yield to_pixel_values(batch), None


# --------------------------------------------------------------------------------------------------------- steps


def last_layer_gradients(rqvae, sample, pixel_gradient, adversarial_gradient, scale, accelerator):
    """The gradients of two losses with respect to the weight of the decoder's last layer, from those to `sample`.

    Means over all processes: each then has the same adaptive weight, that of their images together. `scale` is
    float16's loss scale, without which this backward pass would underflow.
    """
    weight = rqvae.decoder.conv_out.weight
    gradients = [
        torch.autograd.grad(sample, weight, scale * gradient, retain_graph=True)[0] / scale
        for gradient in (pixel_gradient, adversarial_gradient)
    ]
    return accelerator.reduce(torch.stack(gradients), "mean").unbind()


def step_together(optimizers, scaler):
    """Step prepared optimizers whose gradients are clipped already, and with them unscaled."""
    if scaler is None:
        for optimizer in optimizers:
            optimizer.step()
        return
    # accelerate's own step of float16 ends with an update of the scaler, which forgets that the gradients of the next
    # optimizer are unscaled too: they would be divided by the scale twice.
    for optimizer in optimizers:
        scaler.step(optimizer.optimizer)
    scaler.update()


# ----------------------------------------------------------------------------------------------------------- log


def window_means(window):
    """What the log says of the steps since its last line: means over steps and processes. Waits for the device."""
    means = window.means()
    if means:
        means["psnr"] = 10 * math.log10(4 / max(means["mse"], 1e-10))  # the range has length 2, its square is 4
    return means


def described(means):
    """The same for a person."""
    parts = [f"loss {means['loss']:.5f} mse {means['mse']:.5f} commitment {means['commitment_loss']:.5f}"]
    if "perceptual_loss" in means:
        parts.append(f"lpips {means['perceptual_loss']:.4f}")
    if "adversarial_weight" in means:
        parts.append(f"adversarial {means['adversarial_loss']:+.3f} x {means['adversarial_weight']:.2e}")
    if "discriminator_loss" in means:
        parts.append(f"discriminator {means['discriminator_loss']:.3f}")
    parts.append(f"usage {' '.join(f'{u:.3f}' for u in means['usage'])} restarts {sum(means['restarts']):.1f}")
    return " " + " ".join(parts)


# ---------------------------------------------------------------------------------------------------- validation


@torch.no_grad()
def reconstruction_metrics(rqvae, images, batch_size, accelerator):
    """MSE, PSNR and code usage of reconstructing uint8 `images`, which the processes share out among them.

    MSE is in units of the [-1, 1] range, like the loss, but of the clamped reconstruction; PSNR is the mean over
    images. Usage and perplexity are over the codes of all images together, one number a depth.
    """
    depth, codebook_size = rqvae.config.code_depth, rqvae.config.codebook_size
    dtype = sum_dtype(accelerator.device)
    sums = torch.zeros(3, dtype=dtype, device=accelerator.device)
    counts = torch.zeros(depth, codebook_size, dtype=dtype, device=accelerator.device)
    own = images[accelerator.process_index :: accelerator.num_processes]
    for batch in own.split(batch_size):
        pixel_values = to_pixel_values(batch.to(accelerator.device))
        with accelerator.autocast():
            out = rqvae(pixel_values)
        mse = (out.sample.float().clamp(-1, 1) - pixel_values).square().mean((1, 2, 3)).to(dtype)
        psnr = 10 * torch.log10(4 / mse.clamp(min=1e-10))  # the range has length 2, its square is 4
        sums += torch.stack([mse.sum(), psnr.sum(), torch.tensor(len(batch), device=mse.device)])
        for d in range(depth):
            counts[d] += out.codes[..., d].flatten().bincount(minlength=codebook_size)
    sums, counts = accelerator.reduce(sums), accelerator.reduce(counts)
    frequencies = counts / counts.sum(1, keepdim=True)
    return {
        "mse": (sums[0] / sums[2]).item(),
        "psnr": (sums[1] / sums[2]).item(),
        "usage": (counts > 0).to(dtype).mean(1).tolist(),
        "perplexity": torch.special.entr(frequencies).sum(1).exp().tolist(),
    }


@torch.no_grad()
def save_reconstructions(rqvae, images, path, accelerator, columns=8):
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
    accelerator = make_accelerator(args)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        # A hundred million parameters fit everywhere; the adaptive weight needs the decoder's last layer whole.
        raise ValueError(f"An RQ-VAE trains by data parallelism (DDP), got {accelerator.distributed_type.value}.")

    # 1. Model
    if args.vae_config is not None:
        rqvae = RQVAEModel.from_config(RQVAEModel.load_config(args.vae_config))
    else:
        rqvae = load_vae(args.pretrained_model_name_or_path, args.vae)
    check_resolution(args, rqvae)
    rqvae.register_to_config(sample_size=args.resolution)
    if args.gradient_checkpointing:
        rqvae.enable_gradient_checkpointing()
    optimizer = torch.optim.Adam(rqvae.parameters(), lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2))
    # `model` is what trains (wrapped for several processes, autocast); `rqvae` stays the module inside it.
    model, optimizer = accelerator.prepare(rqvae.train(), optimizer)

    if args.compile:
        # Block by block: the decoder's last layer, whose gradient the adaptive weight asks for, stays out of it.
        for part in (rqvae.encoder, rqvae.decoder.mid_block, *rqvae.decoder.up_blocks):
            part.compile()

    perceptual_loss, discriminator = None, None
    if args.perceptual_weight > 0:
        if args.resolution < PerceptualLoss.minimum_size:
            raise ValueError(
                f"--resolution must be at least {PerceptualLoss.minimum_size} for the perceptual loss, got "
                f"{args.resolution}; --perceptual_weight 0 trains without."
            )
        with accelerator.local_main_process_first():  # one process downloads what the others then find
            perceptual_loss = PerceptualLoss(args.lpips_weights).to(accelerator.device)
    trained = [model]
    if args.adversarial_weight > 0:
        discriminator = PatchDiscriminator(rqvae.config.out_channels, args.discriminator_channels)
        if args.resolution < discriminator.minimum_size:
            raise ValueError(
                f"--resolution must be at least {discriminator.minimum_size} for the discriminator, got "
                f"{args.resolution}; --adversarial_weight 0 trains without."
            )
        if args.discriminator_learning_rate is None:
            args.discriminator_learning_rate = args.learning_rate
        discriminator_optimizer = torch.optim.Adam(
            discriminator.parameters(),
            lr=args.discriminator_learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
        )
        discriminator_model, discriminator_optimizer = accelerator.prepare(discriminator, discriminator_optimizer)
        trained.append(discriminator_model)

    # The average covers the parameters. The codebook is exported live: it already is an average of the latents (decay
    # 0.99, some hundred steps), and averaging it over again would mix the vector of a restarted code with the dead one
    # that it replaced. The two agree as far as the learning rate has gone to 0 in the end.
    ema = None
    if args.ema_decay > 0:
        ema = AveragedWeights(rqvae.parameters(), args.ema_decay)
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)
    repo_id = open_output(args, accelerator)
    output_dir = Path(args.output_dir)

    # 2. Data
    train_dataset, validation_datasets = load_splits(args, accelerator)
    if CODES_COLUMN in (train_dataset.column_names or ()):
        raise ValueError(f"The data set must hold images, got column {CODES_COLUMN!r}: it has been encoded already.")
    decoding = dict(image_column=args.image_column, resolution=args.resolution)
    # What every process decodes, one names; what they share out, each.
    shown = 10 if accelerator.is_main_process else 0
    skipped = SkippedRows(f"split {args.train_split!r}", shown if args.cache_images_in_memory else 10)
    train_images = None
    if args.cache_images_in_memory:
        train_images = decode_all(train_dataset, skipped=skipped, **decoding)
    validation_images, seen_images = {}, None
    for name, dataset in validation_datasets.items():
        unreadable = SkippedRows(f"validation split {name!r}", shown)
        validation_images[name] = decode_all(dataset, skipped=unreadable, stand_in=False, **decoding)
    if validation_images:
        # As many training images, for the gap between seen and held-back images.
        seen = seen_rows(train_dataset, max(map(len, validation_images.values())), args.image_column)
        seen_images = decode_all(seen, skipped=SkippedRows("the images compared", 0), stand_in=False, **decoding)

    # 3. Length of the run
    num_images = num_streamed(train_dataset, args) if args.streaming else len(train_dataset)
    total_batch_size, max_train_steps = run_length(args, accelerator, num_images)
    default_warmup_steps = max_train_steps // 10
    if not args.streaming:  # whose length may be known in one start and not in the next, which resumes
        default_warmup_steps = min(default_warmup_steps, math.ceil(0.5 * num_images / total_batch_size))
    lr_warmup_steps = default_warmup_steps if args.lr_warmup_steps is None else args.lr_warmup_steps
    discriminator_warmup_steps = (
        default_warmup_steps if args.discriminator_warmup_steps is None else args.discriminator_warmup_steps
    )
    adversarial_start_step = args.discriminator_start_step + discriminator_warmup_steps
    # A budget in seconds may be over long before the steps are: the defaults keep to a tenth of it, too.
    lr_warmup_share = discriminator_warmup_share = None
    if args.max_train_seconds is not None:
        lr_warmup_share = 0.1 if args.lr_warmup_steps is None else None
        discriminator_warmup_share = 0.1 if args.discriminator_warmup_steps is None else None
    digest = None if args.streaming else digest_of_rows(train_dataset, args.image_column)
    data = {"num_images": num_images, "max_train_steps": max_train_steps, "data_digest": digest}
    progress, place = load_progress(args, accelerator, data)
    step, images_seen = progress["step"], progress["images"]
    # The share of the budget used when the discriminator began to learn, and the step of the first adversarial loss.
    discriminator_started = progress.get("discriminator_started")
    adversarial_started = progress.get("adversarial_started")
    log = TrainingLog(accelerator, output_dir, step)
    if args.report_to is not None:
        accelerator.init_trackers("rqvae", config=tracked(args))

    losses = f"{args.reconstruction_loss}, LPIPS x {args.perceptual_weight}, adversarial x {args.adversarial_weight}"
    if discriminator is not None:
        losses += (
            f" from step {adversarial_start_step:,}"
            + (" or after a tenth of the seconds" if discriminator_warmup_share else "")
            + " (discriminator of "
            f"{sum(p.numel() for p in discriminator.parameters()):,} parameters, from step "
            f"{args.discriminator_start_step:,})"
        )
    accelerator.print(
        f"parameters: {sum(p.numel() for p in rqvae.parameters()):,} + codebook of "
        f"{rqvae.config.codebook_size:,} x {rqvae.config.latent_channels} at {rqvae.config.code_depth} depths\n"
        f"images: {'unknown number of' if num_images is None else f'{num_images:,}'} training"
        + "".join(f", {len(images):,} {name}" for name, images in validation_images.items())
        + f", at {args.resolution}x{args.resolution}; skipped rows: {skipped}\n"
        f"total batch: {total_batch_size:,} = {args.train_batch_size} x {accelerator.num_processes} processes x "
        f"{args.gradient_accumulation_steps} micro-batches\n"
        f"steps: {max_train_steps:,}"
        + (f" ({max_train_steps * total_batch_size / num_images:.1f} epochs)" if num_images else "")
        + (f" or {args.max_train_seconds:,.0f} seconds" if args.max_train_seconds else "")
        + f", from step {step:,}; learning rate {args.learning_rate:.2e} after {lr_warmup_steps:,} steps "
        + ("or a tenth of the seconds " if lr_warmup_share else "")
        + f"of warm-up\nlosses: {losses}"
    )

    def validate():
        rqvae.eval()
        if ema is not None:
            ema.store(rqvae.parameters())
            ema.copy_to(rqvae.parameters())
        batch_size = args.validation_batch_size or args.train_batch_size
        # The same weights in the same mode on training images. Apart from overfitting, this shows a codebook that
        # serves the batch at hand and nothing else: then the training loss falls while both numbers here are bad.
        train = reconstruction_metrics(rqvae, seen_images, batch_size, accelerator)
        held_back = {
            name: reconstruction_metrics(rqvae, images, batch_size, accelerator)
            for name, images in validation_images.items()
        }
        if accelerator.is_main_process:
            path = output_dir / f"reconstructions-{step:07d}.png"
            save_reconstructions(rqvae, next(iter(validation_images.values()))[:16], path, accelerator)
            log.write_image("reconstructions", path, step)
        if ema is not None:
            ema.restore(rqvae.parameters())
        rqvae.train()
        for name, metrics in held_back.items():
            entry = {"kind": "validation", "step": step, "images": images_seen, "seconds": round(budget.elapsed(), 2)}
            entry |= {"split": name, **metrics, "train_mse": train["mse"], "train_psnr": train["psnr"]}
            entry["mse_gap"] = metrics["mse"] - train["mse"]
            entry["relative_mse_gap"] = entry["mse_gap"] / train["mse"]
            usage = " ".join(f"{u:.3f}" for u in metrics["usage"])
            log.write(
                entry,
                f"  validation at step {step} on {name}: mse {metrics['mse']:.5f} psnr {metrics['psnr']:.2f} dB "
                f"gap {entry['mse_gap']:+.5f} ({entry['relative_mse_gap']:+.1%}) usage {usage}",
            )

    def checkpoint():
        epoch = images_seen // num_images if num_images else place[0]
        places = None if place is None else gathered(place, accelerator)
        progress = {"step": step, "images": images_seen, "epoch": epoch, "seconds": budget.elapsed(),
                    "skipped_steps": guard.num_skipped, "places": places, "window": window.state(),
                    "discriminator_started": discriminator_started,
                    "adversarial_started": adversarial_started}  # fmt: skip
        save_checkpoint(accelerator, output_dir, progress, vars(args), args.checkpoints_total_limit, data)

    # 4. Training
    budget = Budget(accelerator, max_train_steps, args.max_train_seconds, progress["seconds"])
    guard = NonFiniteGuard(accelerator, args.max_nonfinite_steps)
    guard.num_skipped = progress["skipped_steps"]
    batches = pixel_batches(args, accelerator, train_dataset, train_images, images_seen, place, skipped)
    generator = torch.Generator()
    window, stopped, is_warm = LogWindow(accelerator, progress["window"]), False, True
    bar = tqdm(
        total=max_train_steps * total_batch_size,
        initial=images_seen,
        unit=" images",
        unit_scale=True,
        disable=None if accelerator.is_main_process else True,  # None: only where a person looks on
    )
    stop = StopSignal(accelerator)
    with stop, bar:
        while (fraction := budget.fraction_used(step)) < 1:
            warmup = learning_rate_at(step, fraction, 1.0, args.lr_scheduler, lr_warmup_steps, lr_warmup_share)
            is_warm = warmup_at(step, fraction, lr_warmup_steps, lr_warmup_share) == 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate = args.learning_rate * warmup
            discriminator_learns = discriminator is not None and step >= args.discriminator_start_step
            if discriminator_learns:
                for group in discriminator_optimizer.param_groups:
                    group["lr"] = args.discriminator_learning_rate * warmup
                if discriminator_started is None:
                    discriminator_started = fraction
                if adversarial_started is None and (
                    step >= adversarial_start_step
                    or (discriminator_warmup_share and fraction >= discriminator_started + discriminator_warmup_share)
                ):
                    adversarial_started = step

            # The gradients of both networks, over all micro-batches. Both see the other one as it was before the step.
            latents, means = [], defaultdict(float)
            for _ in range(args.gradient_accumulation_steps):
                pixel_values, place = next(batches)
                with accelerator.accumulate(*trained):
                    out = model(pixel_values)
                    # The losses are differentiated down to the pixels, once each; from there one backward pass takes
                    # their weighted sum through the decoder: the adaptive weight costs no second pass through VGG16.
                    sample = out.sample.detach().requires_grad_()
                    reconstruction, mse = reconstruction_loss(sample, pixel_values, args.reconstruction_loss)
                    values = {"mse": mse, "reconstruction_loss": reconstruction}
                    loss = reconstruction
                    if perceptual_loss is not None:
                        values["perceptual_loss"] = perceptual_loss(sample, pixel_values)
                        loss = loss + args.perceptual_weight * values["perceptual_loss"]
                    (pixel_gradient,) = torch.autograd.grad(loss, sample)
                    if adversarial_started is not None:
                        scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0
                        values["adversarial_loss"] = adversarial_loss(discriminator(sample))
                        (adversarial_gradient,) = torch.autograd.grad(scale * values["adversarial_loss"], sample)
                        adversarial_gradient = adversarial_gradient / scale
                        weight = args.adversarial_weight * adaptive_weight(
                            *last_layer_gradients(
                                rqvae, out.sample, pixel_gradient, adversarial_gradient, scale, accelerator
                            ),
                            maximum=args.max_adaptive_weight,
                        )
                        values["adversarial_weight"] = weight
                        pixel_gradient = pixel_gradient + weight * adversarial_gradient
                    commitment = rqvae.config.commitment_weight * out.commitment_loss
                    accelerator.backward((out.sample * pixel_gradient).sum() + commitment)
                    # Without the adversarial loss, which measures no distance, only who is ahead at the moment.
                    values |= {"loss": loss + commitment, "commitment_loss": out.commitment_loss}

                    if discriminator_learns:
                        # One pass for both: DDP wants one forward for a backward, and GroupNorm keeps images apart.
                        real, fake = discriminator_model(torch.cat([pixel_values, sample.detach()])).chunk(2)
                        values["discriminator_loss"] = discriminator_hinge_loss(real, fake)
                        values |= {"discriminator_real": real.mean(), "discriminator_fake": fake.mean()}
                        accelerator.backward(values["discriminator_loss"])
                latents.append(out.latents.detach())
                for name, value in values.items():
                    means[name] += value.detach() / args.gradient_accumulation_steps

            # The step, of both networks or of neither.
            max_grad_norm = args.max_grad_norm if args.max_grad_norm > 0 else math.inf
            means["grad_norm"] = accelerator.clip_grad_norm_(rqvae.parameters(), max_grad_norm)
            total_loss, total_norm = means["loss"], means["grad_norm"]
            optimizers = [optimizer]
            if discriminator_learns:
                # Not accelerator's, which has unscaled the gradients of both by now, and refuses to do it again.
                norm = torch.nn.utils.clip_grad_norm_(discriminator.parameters(), max_grad_norm)
                means["discriminator_grad_norm"] = norm
                total_loss, total_norm = total_loss + means["discriminator_loss"], torch.hypot(total_norm, norm)
                optimizers.append(discriminator_optimizer)
            if guard.accepts(total_loss, total_norm):
                step_together(optimizers, accelerator.scaler)
                # One update from the latents of the whole batch, so that micro-batches make no difference. Restarts
                # draw from (seed, step) and not from the global state, which data loaders draw from too.
                generator.manual_seed(args.seed * 1_000_003 + step)
                stats = rqvae.update_codebook(latents, generator=generator)
                if ema is not None:
                    ema.step(rqvae.parameters())
                means |= {"usage": stats.usage, "perplexity": stats.perplexity, "restarts": stats.restarts}
                window.add(means)
            for each in optimizers:
                each.zero_grad()

            step += 1
            images_seen += total_batch_size
            window.images += total_batch_size
            bar.update(total_batch_size)

            if step % args.logging_steps == 0:
                rate, means = window.images / window.seconds(), window_means(window)
                entry = {"kind": "train", "step": step, "images": images_seen, "seconds": round(budget.elapsed(), 2),
                         "images_per_second": round(rate, 2), "learning_rate": learning_rate,
                         "skipped_steps": guard.num_skipped}  # fmt: skip
                left = budget.time_left(step)
                line = (
                    f"step {step}/{max_train_steps} images {images_seen:,} {rate:.1f}/s, {left} left, lr "
                    f"{learning_rate:.2e}"
                )
                if means:
                    entry |= means
                    line += described(means)
                if guard.num_skipped > 0:
                    line += f" skipped {guard.num_skipped}"
                bar.clear()
                log.write(entry, line)
                window.clear()

            with window.paused():  # images/s is the speed of training alone
                if validation_images and step % args.validation_steps == 0:
                    bar.clear()
                    validate()
                stopped = stop.requested()
                if stopped or step % args.checkpointing_steps == 0:
                    checkpoint()
            if stopped:
                accelerator.print(f"Asked to stop: wrote checkpoint-{step}; --resume_from_checkpoint latest goes on.")
                break
    batches.close()

    if stopped:
        log.close()
        accelerator.end_training()
        return

    if not is_warm:
        accelerator.print(
            f"Warning: the run ended within its warm-up, of {lr_warmup_steps:,} steps: it had {step:,}. "
            "--lr_warmup_steps is what it warms up in."
        )
    if discriminator is not None and adversarial_started is None and step > progress["step"]:
        accelerator.print(
            f"Warning: the adversarial loss never began: from step {adversarial_start_step:,} it would have, and the "
            f"run had {step:,}. --discriminator_start_step and --discriminator_warmup_steps are what it waits for."
        )

    # 5. Export
    if validation_images and step % args.validation_steps != 0:
        validate()
    if ema is not None:
        ema.copy_to(rqvae.parameters())
    if accelerator.is_main_process:
        rqvae.save_pretrained(output_dir)
    log.close()
    if accelerator.is_main_process:
        upload(args, repo_id)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    seconds = budget.elapsed()
    accelerator.print(
        f"Saved to {output_dir} after {step:,} steps, {images_seen:,} images, {seconds:,.0f} seconds; "
        f"skipped rows: {skipped}; skipped steps: {guard.num_skipped:,}."
    )


if __name__ == "__main__":
    main(parse_args())
