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

import torch
import torch.nn.functional as F
from PIL import Image

from rq_draft_revise import RQVAEModel
from rq_draft_revise.batches import drawn_images, streamed_images
from rq_draft_revise.budget import learning_rate_at, warmup_at
from rq_draft_revise.data import CODES_COLUMN, SkippedRows, digest_of_rows
from rq_draft_revise.decoded_images import decode_all, to_pixel_values
from rq_draft_revise.devices import sum_dtype
from rq_draft_revise.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    adversarial_loss,
    discriminator_hinge_loss,
)
from rq_draft_revise.flags import (
    FlagHelp,
    add_data_flags,
    add_flip_and_crop_flags,
    add_optimization_flags,
    add_output_flags,
    add_validation_flags,
    check_flags,
)
from rq_draft_revise.losses import PerceptualLoss, reconstruction_loss
from rq_draft_revise.publishing import upload
from rq_draft_revise.reading_order import training_order
from rq_draft_revise.splits import load_splits, num_streamed, seen_rows
from rq_draft_revise.training import check_resolution, load_vae
from rq_draft_revise.training_run import (
    TrainingRun,
    averaged_weights,
    check_not_sharded,
    exported_weights,
    make_accelerator,
    open_output,
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=FlagHelp)

    group = parser.add_argument_group("model: exactly one of the first three")
    group.add_argument("--vae_config", help="config.json, or a folder with one: train from scratch.")
    group.add_argument("--vae", help="Folder or Hub id of an RQ-VAE to fine-tune.")
    group.add_argument("--pretrained_model_name_or_path", help="Pipeline whose `vae` subfolder is fine-tuned.")

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

    add_optimization_flags(
        parser,
        train_batch_size=(32, "Paper: 128 in all, such as 32 in 4 processes."),
        num_train_epochs=(10, "Paper: 10, and 50 for the better of its models."),
        learning_rate=(4e-5, "Paper: 4e-5."),
        lr_scheduler=("constant", "Paper: constant."),
        lr_warmup_steps=(None, "Default: half an epoch as in the paper, but at most a tenth of the run, in steps or "
                         "in --max_train_seconds; of a stream, always that."),
        adam_beta1=(0.5, "Paper: 0.5."),
        adam_beta2=(0.9, "Paper: 0.9."),
        max_grad_norm=(0.0, "Of the RQ-VAE, and of the discriminator. Paper: 0."),
        ema_decay=(0.999, "Not published. (The codebook's decay is in the model's config: 0.99.)"),
    )  # fmt: skip
    group = add_output_flags(parser, "rqvae-model", "model", "metrics and a grid of reconstructions")
    group.add_argument("--validation_batch_size", type=int, help="Default: --train_batch_size.")

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


def backward_rqvae(args, accelerator, rqvae, out, pixel_values, perceptual_loss=None, discriminator=None):
    """Add the gradient of the RQ-VAE's loss on a micro-batch. Returns what the log says of it.

    The losses are differentiated down to the pixels, once each; from there one backward pass takes their weighted sum
    through the decoder: the adaptive weight costs no second pass through VGG16.

    Args:
        out: Of the RQ-VAE in training, for `pixel_values` `(B, 3, H, W)` in [-1, 1].
        perceptual_loss, discriminator (*optional*): Without one its loss is left out.
    """
    sample = out.sample.detach().requires_grad_()
    loss, mse = reconstruction_loss(sample, pixel_values, args.reconstruction_loss)
    values = {"mse": mse, "reconstruction_loss": loss}
    if perceptual_loss is not None:
        values["perceptual_loss"] = perceptual_loss(sample, pixel_values)
        loss = loss + args.perceptual_weight * values["perceptual_loss"]
    (pixel_gradient,) = torch.autograd.grad(loss, sample)
    if discriminator is not None:
        scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0
        values["adversarial_loss"] = adversarial_loss(discriminator(sample))
        (adversarial_gradient,) = torch.autograd.grad(scale * values["adversarial_loss"], sample)
        adversarial_gradient = adversarial_gradient / scale
        norms = last_layer_gradients(rqvae, out.sample, pixel_gradient, adversarial_gradient, scale, accelerator)
        weight = args.adversarial_weight * adaptive_weight(*norms, maximum=args.max_adaptive_weight)
        values["adversarial_weight"] = weight
        pixel_gradient = pixel_gradient + weight * adversarial_gradient
    commitment = rqvae.config.commitment_weight * out.commitment_loss
    accelerator.backward((out.sample * pixel_gradient).sum() + commitment)
    # Without the adversarial loss, which measures no distance, only who is ahead at the moment.
    return values | {"loss": loss + commitment, "commitment_loss": out.commitment_loss}


def backward_discriminator(accelerator, discriminator, out, pixel_values):
    """Add the gradient of the discriminator's loss on a micro-batch. Returns what the log says of it."""
    # One pass for both: DDP wants one forward for a backward, and GroupNorm keeps images apart.
    real, fake = discriminator(torch.cat([pixel_values, out.sample.detach()])).chunk(2)
    loss = discriminator_hinge_loss(real, fake)
    accelerator.backward(loss)
    return {"discriminator_loss": loss, "discriminator_real": real.mean(), "discriminator_fake": fake.mean()}


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


def summarize(means):
    """What the log says of the steps since its last line, for a machine and for a person."""
    means["psnr"] = 10 * math.log10(4 / max(means["mse"], 1e-10))  # the range has length 2, its square is 4
    parts = [f"loss {means['loss']:.5f} mse {means['mse']:.5f} commitment {means['commitment_loss']:.5f}"]
    if "perceptual_loss" in means:
        parts.append(f"lpips {means['perceptual_loss']:.4f}")
    if "adversarial_weight" in means:
        parts.append(f"adversarial {means['adversarial_loss']:+.3f} x {means['adversarial_weight']:.2e}")
    if "discriminator_loss" in means:
        parts.append(f"discriminator {means['discriminator_loss']:.3f}")
    parts.append(f"usage {' '.join(f'{u:.3f}' for u in means['usage'])} restarts {sum(means['restarts']):.1f}")
    return means, " ".join(parts)


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


def load_rqvae(args):
    """What trains: fresh from a configuration, or to be fine-tuned."""
    if args.vae_config is not None:
        rqvae = RQVAEModel.from_config(RQVAEModel.load_config(args.vae_config))
    else:
        rqvae = load_vae(args.pretrained_model_name_or_path, args.vae)
    check_resolution(args, rqvae)
    rqvae.register_to_config(sample_size=args.resolution)
    return rqvae


def check_size(args, least, loss):
    """Refuse, with a ValueError, images that are too small for the loss of the flag `--{loss}_weight`."""
    if args.resolution < least:
        raise ValueError(
            f"--resolution must be at least {least} for the {loss} loss, got {args.resolution}; --{loss}_weight 0 "
            "trains without."
        )


class Schedule:
    """When the learning rate has warmed up, and from when on the RQ-VAE sees the discriminator's gradient.

    By default both warm up for half an epoch, but at most a tenth of the run: a budget in seconds may be over long
    before the steps are, so they keep to a tenth of it, too.

    Attributes:
        lr_warmup: Steps and, where that is to count too, the share of the budget, for [`learning_rate_at`].
        adversarial_start_step (`int`): Of the first adversarial loss, unless the share of the budget is used before.
    """

    def __init__(self, args, run):
        default = run.max_train_steps // 10
        if not args.streaming:  # whose length may be known in one start and not in the next, which resumes
            default = min(default, math.ceil(0.5 * run.num_images / run.total_batch_size))
        share = None if args.max_train_seconds is None else 0.1
        self.lr_warmup = (default, share) if args.lr_warmup_steps is None else (args.lr_warmup_steps, None)
        warmup_steps, self._share = args.discriminator_warmup_steps, None
        if warmup_steps is None:
            warmup_steps, self._share = default, share
        self.adversarial_start_step = args.discriminator_start_step + warmup_steps

    def describe(self, args):
        """The warm-up and the losses, for a person."""
        steps, share = self.lr_warmup
        losses = f"{args.reconstruction_loss}, LPIPS x {args.perceptual_weight}"
        losses += f", adversarial x {args.adversarial_weight}"
        if args.adversarial_weight > 0:
            losses += f" from step {self.adversarial_start_step:,}"
            losses += " or after a tenth of the seconds" if self._share else ""
            losses += f" (the discriminator learns from step {args.discriminator_start_step:,})"
        return (
            f"learning rate {args.learning_rate:.2e} after {steps:,} steps "
            + ("or a tenth of the seconds " if share else "")
            + f"of warm-up\nlosses: {losses}"
        )

    def is_adversarial(self, run, fraction):
        """Whether the RQ-VAE sees the discriminator, which learns by now. Notes in the run's marks since when."""
        marks = run.marks
        if marks["discriminator_started"] is None:
            marks["discriminator_started"] = fraction
        is_over = self._share is not None and fraction >= marks["discriminator_started"] + self._share
        if marks["adversarial_started"] is None and (run.step >= self.adversarial_start_step or is_over):
            marks["adversarial_started"] = run.step
        return marks["adversarial_started"] is not None


def main(args):
    accelerator = make_accelerator(args)
    # A hundred million parameters fit everywhere; the adaptive weight needs the decoder's last layer whole.
    check_not_sharded(accelerator, "An RQ-VAE")

    # 1. Models
    rqvae = load_rqvae(args)
    if args.gradient_checkpointing:
        rqvae.enable_gradient_checkpointing()
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = torch.optim.Adam(rqvae.parameters(), lr=args.learning_rate, betas=betas)
    # `model` is what trains (wrapped for several processes, autocast); `rqvae` stays the module inside it.
    model, optimizer = accelerator.prepare(rqvae.train(), optimizer)
    if args.compile:
        # Block by block: the decoder's last layer, whose gradient the adaptive weight asks for, stays out of it.
        for part in (rqvae.encoder, rqvae.decoder.mid_block, *rqvae.decoder.up_blocks):
            part.compile()
    trained, perceptual_loss, discriminator = [model], None, None
    if args.perceptual_weight > 0:
        check_size(args, PerceptualLoss.minimum_size, "perceptual")
        with accelerator.local_main_process_first():  # one process downloads what the others then find
            perceptual_loss = PerceptualLoss(args.lpips_weights).to(accelerator.device)
    if args.adversarial_weight > 0:
        discriminator = PatchDiscriminator(rqvae.config.out_channels, args.discriminator_channels)
        check_size(args, discriminator.minimum_size, "adversarial")
        if args.discriminator_learning_rate is None:
            args.discriminator_learning_rate = args.learning_rate
        discriminator_optimizer = torch.optim.Adam(
            discriminator.parameters(), lr=args.discriminator_learning_rate, betas=betas
        )
        discriminator_model, discriminator_optimizer = accelerator.prepare(discriminator, discriminator_optimizer)
        trained.append(discriminator_model)
    # The average covers the parameters. The codebook is exported live: it already is an average of the latents (decay
    # 0.99, some hundred steps), and averaging it over again would mix the vector of a restarted code with the dead one
    # that it replaced. The two agree as far as the learning rate has gone to 0 in the end.
    ema = averaged_weights(args, accelerator, rqvae.parameters())
    repo_id = open_output(args, accelerator)

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

    # 3. The run, which a checkpoint may have brought on its way. Marks: the share of the budget used when the
    # discriminator began to learn, and the step of the first adversarial loss.
    num_images = num_streamed(train_dataset, args) if args.streaming else len(train_dataset)
    digest = None if args.streaming else digest_of_rows(train_dataset, args.image_column)
    run = TrainingRun(
        args, accelerator, "rqvae", num_images, digest, discriminator_started=None, adversarial_started=None
    )
    schedule = Schedule(args, run)
    accelerator.print(
        f"parameters: {sum(p.numel() for p in rqvae.parameters()):,} + codebook of "
        f"{rqvae.config.codebook_size:,} x {rqvae.config.latent_channels} at {rqvae.config.code_depth} depths\n"
        f"{run.describe_images(validation_images)}, at {args.resolution}x{args.resolution}; skipped rows: {skipped}\n"
        f"{run.describe()}; {schedule.describe(args)}"
    )

    def validate():
        """Metrics of the weights that would be exported, and a grid of reconstructions."""
        rqvae.eval()
        batch_size = args.validation_batch_size or args.train_batch_size
        with exported_weights(ema, rqvae.parameters()):
            # The same weights in the same mode on training images. Apart from overfitting, this shows a codebook that
            # serves the batch at hand and nothing else: then the training loss falls while both numbers here are bad.
            train = reconstruction_metrics(rqvae, seen_images, batch_size, accelerator)
            held_back = {
                name: reconstruction_metrics(rqvae, images, batch_size, accelerator)
                for name, images in validation_images.items()
            }
            if accelerator.is_main_process:
                path = run.output_dir / f"reconstructions-{run.step:07d}.png"
                save_reconstructions(rqvae, next(iter(validation_images.values()))[:16], path, accelerator)
                run.log.write_image("reconstructions", path, run.step)
        rqvae.train()
        for name, metrics in held_back.items():
            entry = {**run.entry("validation"), "split": name, **metrics}
            entry |= {"train_mse": train["mse"], "train_psnr": train["psnr"], "mse_gap": metrics["mse"] - train["mse"]}
            entry["relative_mse_gap"] = entry["mse_gap"] / train["mse"]
            usage = " ".join(f"{u:.3f}" for u in metrics["usage"])
            run.log.write(
                entry,
                f"  validation at step {run.step} on {name}: mse {metrics['mse']:.5f} psnr {metrics['psnr']:.2f} dB "
                f"gap {entry['mse_gap']:+.5f} ({entry['relative_mse_gap']:+.1%}) usage {usage}",
            )

    # 4. Training
    start = run.images_seen, run.place or (0, 0)
    batches = pixel_batches(args, accelerator, train_dataset, train_images, *start, skipped)
    generator, is_warm = torch.Generator(), True
    for fraction in run.steps(rqvae.parameters(), validate if validation_images else None, summarize):
        warmup = learning_rate_at(run.step, fraction, 1.0, args.lr_scheduler, *schedule.lr_warmup)
        is_warm = warmup_at(run.step, fraction, *schedule.lr_warmup) == 1
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate = args.learning_rate * warmup
        discriminator_learns = discriminator is not None and run.step >= args.discriminator_start_step
        is_adversarial = discriminator_learns and schedule.is_adversarial(run, fraction)
        if discriminator_learns:
            for group in discriminator_optimizer.param_groups:
                group["lr"] = args.discriminator_learning_rate * warmup

        # The gradients of both networks, over all micro-batches. Both see the other one as it was before the step.
        latents, means = [], defaultdict(float)
        for _ in range(args.gradient_accumulation_steps):
            pixel_values, run.place = next(batches)
            with accelerator.accumulate(*trained):
                out = model(pixel_values)
                values = backward_rqvae(
                    args, accelerator, rqvae, out, pixel_values, perceptual_loss,
                    discriminator if is_adversarial else None,
                )  # fmt: skip
                if discriminator_learns:
                    values |= backward_discriminator(accelerator, discriminator_model, out, pixel_values)
            latents.append(out.latents.detach())
            for name, value in values.items():
                means[name] += value.detach() / args.gradient_accumulation_steps

        # The step, of both networks or of neither.
        max_grad_norm = args.max_grad_norm or math.inf
        means["grad_norm"] = accelerator.clip_grad_norm_(rqvae.parameters(), max_grad_norm)
        total_loss, total_norm = means["loss"], means["grad_norm"]
        optimizers = [optimizer]
        if discriminator_learns:
            # Not accelerator's, which has unscaled the gradients of both by now, and refuses to do it again.
            norm = torch.nn.utils.clip_grad_norm_(discriminator.parameters(), max_grad_norm)
            means["discriminator_grad_norm"] = norm
            total_loss, total_norm = total_loss + means["discriminator_loss"], torch.hypot(total_norm, norm)
            optimizers.append(discriminator_optimizer)
        if run.accepts(total_loss, total_norm):
            step_together(optimizers, accelerator.scaler)
            # One update from the latents of the whole batch, so that micro-batches make no difference. Restarts draw
            # from (seed, step) and not from the global state, which data loaders draw from too.
            generator.manual_seed(args.seed * 1_000_003 + run.step)
            stats = rqvae.update_codebook(latents, generator=generator)
            if ema is not None:
                ema.step(rqvae.parameters())
            run.measured(means | {"usage": stats.usage, "perplexity": stats.perplexity, "restarts": stats.restarts})
        for each in optimizers:
            each.zero_grad()
    batches.close()

    # 5. Export
    if run.is_finished:
        if not is_warm:
            accelerator.print(
                f"Warning: the run ended within its warm-up, of {schedule.lr_warmup[0]:,} steps: it had {run.step:,}. "
                "--lr_warmup_steps is what it warms up in."
            )
        if discriminator is not None and run.marks["adversarial_started"] is None:
            accelerator.print(
                f"Warning: the adversarial loss never began: from step {schedule.adversarial_start_step:,} it would "
                f"have, and the run had {run.step:,}. --discriminator_start_step and --discriminator_warmup_steps are "
                "what it waits for."
            )
        if ema is not None:
            ema.copy_to(rqvae.parameters())
        if accelerator.is_main_process:
            rqvae.save_pretrained(run.output_dir)
    run.close(skipped)
    if run.is_finished and accelerator.is_main_process:
        upload(args, repo_id)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
