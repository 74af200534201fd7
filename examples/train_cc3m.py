"""Train a Contextual RQ-Transformer on images with captions: text to maps of codes, over a frozen RQ-VAE.

    accelerate launch examples/train_cc3m.py \\
        --pretrained_model_name_or_path pipelines/cc3m-256-654m --dataset_name pixparse/cc3m-wds \\
        --image_column jpg --caption_column txt --train_batch_size 64 --output_dir runs/cc3m-654m

    python examples/train_cc3m.py --pretrained_model_name_or_path pipelines/emoji-scenes --vae runs/emoji-vae \\
        --dataset_name data/emoji-scenes --cache_codes --random_flip --train_batch_size 32 --output_dir runs/emoji

Of an image's code stacks a share cos(pi r / 2), r uniform, is masked; the loss is the negative log-likelihood of the
masked codes given the others and the caption (0.9), plus that of the caption's own next tokens (0.1). Into
`output_dir` the script writes `train_log.jsonl` (the curves of a model card), `checkpoint-<step>/` folders to resume
from, and at the end a whole pipeline with the averaged weights.
"""

import argparse
import hashlib
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

from rq_draft_revise import (
    ContextualRQTransformerModel,
    DraftAndRevisePipeline,
    DraftAndReviseScheduler,
    RQVAEModel,
)
from rq_draft_revise.budget import Budget, learning_rate_at
from rq_draft_revise.checkpoints import TrainingLog, load_checkpoint, save_checkpoint
from rq_draft_revise.data import decoded_batches, load_split, to_pixel_values, training_order


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", default="pipelines/cc3m-256-654m",
                       help="Pipeline folder with vae, transformer, scheduler and tokenizer. The transformer starts "
                            "from its weights, or fresh from its config.json if there are none.")  # fmt: skip
    group.add_argument("--vae", help="Folder or Hub id of the RQ-VAE, in place of the pipeline's.")
    group.add_argument("--transformer_config", help="A config.json or a folder with one: train that from scratch.")
    group.add_argument("--tokenizer", help="Folder or Hub id of the tokenizer, in place of the pipeline's.")
    group.add_argument("--attention_backend",
                       help="As `set_attention_backend` takes it. On the CPU '_native_math' trains a third faster "
                            "than the default: stacks of D codes are too short for the blocked kernel.")  # fmt: skip

    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="Hub id, or a local folder that `datasets.load_dataset` reads.")
    group.add_argument("--train_data_dir", help="Folder of images with a metadata.csv or .jsonl of captions.")
    group.add_argument("--data_files", nargs="+", help="Files of the training split (parquet, csv, json, tar).")
    group.add_argument("--train_split", default="train")
    group.add_argument("--validation_split", nargs="+", default=["test"],
                       help="One or several, each with a loss of its own; 'none' trains without.")  # fmt: skip
    group.add_argument("--image_column", default="image")
    group.add_argument("--caption_column", default="text")
    group.add_argument("--resolution", type=int, help="Default: the RQ-VAE's sample_size.")
    group.add_argument("--random_flip", action="store_true", help="Mirror half of the images, chosen anew each epoch.")
    group.add_argument("--cache_codes", action="store_true",
                       help="Encode the training split once, mirrored too under --random_flip, into memory and "
                            "<output_dir>/codes.safetensors.")  # fmt: skip
    group.add_argument("--encoding_batch_size", type=int, default=64)
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="Unused with cached codes.")

    group = parser.add_argument_group("optimization")
    group.add_argument("--train_batch_size", type=int, default=32, help="Images per process and micro-batch.")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1)
    group.add_argument("--num_train_epochs", type=int, default=300)
    group.add_argument("--max_train_steps", type=int, help="Optimizer steps; overrides --num_train_epochs.")
    group.add_argument("--max_train_seconds", type=float, help="Stop cleanly, at learning rate 0, after this long.")
    group.add_argument("--learning_rate", type=float, default=1e-4)
    group.add_argument("--lr_scheduler", choices=["cosine", "constant"], default="cosine")
    group.add_argument("--lr_warmup_steps", type=int, default=0)
    group.add_argument("--adam_beta1", type=float, default=0.9)
    group.add_argument("--adam_beta2", type=float, default=0.95)
    group.add_argument("--adam_weight_decay", type=float, default=1e-4)
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="0 does not clip.")
    group.add_argument("--condition_dropout", type=float, default=0.1, help="Share of captions dropped, for guidance.")
    group.add_argument("--stratified_masks", action=argparse.BooleanOptionalAction, default=True,
                       help="Spread the mask ratios of a batch evenly over their distribution.")  # fmt: skip
    group.add_argument("--ema_decay", type=float, default=0.9999, help="Of the exported weights; 0 turns it off.")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: as accelerate configured.")
    group.add_argument("--seed", type=int, default=0)

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="contextual-rq-transformer-model")
    group.add_argument("--logging_steps", type=int, default=50)
    group.add_argument("--validation_steps", type=int, default=1000)
    group.add_argument("--max_validation_images", type=int, default=5000)
    group.add_argument("--checkpointing_steps", type=int, default=1000)
    group.add_argument("--checkpoints_total_limit", type=int)
    group.add_argument("--resume_from_checkpoint", help="A checkpoint folder, or 'latest' for the newest, if any.")
    group.add_argument("--report_to", help="tensorboard, wandb, ... besides the JSON lines.")

    args = parser.parse_args(argv)
    if args.dataset_name is None and args.train_data_dir is None and args.data_files is None:
        raise ValueError("Give the images by --dataset_name, --train_data_dir or --data_files.")
    for name in ("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps",
                 "logging_steps", "validation_steps", "max_validation_images", "checkpointing_steps",
                 "checkpoints_total_limit", "encoding_batch_size"):  # fmt: skip
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if args.max_train_seconds is not None and not args.max_train_seconds > 0:
        raise ValueError(f"--max_train_seconds must be positive, got {args.max_train_seconds}.")
    if not 0 <= args.ema_decay < 1:
        raise ValueError(f"--ema_decay must lie in [0, 1), got {args.ema_decay}.")
    if not 0 <= args.condition_dropout < 1:
        raise ValueError(f"--condition_dropout must lie in [0, 1), got {args.condition_dropout}.")
    args.validation_split = [split for split in args.validation_split if split != "none"]
    return args


# ---------------------------------------------------------------------------------------------------------- masks


def random_mask(batch_size, num_positions, generator, stratified=True):
    """Draw what is to be predicted: for each image r ~ U[0, 1), ceil(cos(pi r / 2) * N) positions, chosen uniformly.

    Args:
        stratified: Take r_i = (i + u) / batch_size in random order, with one u ~ U[0, 1), instead of independent r.
            Each r_i alone is still uniform, but every batch has its share of easy and of hard masks: the loss loses
            the noise that the choice of ratios brings, at no cost.

    Returns:
        Mask `(batch_size, num_positions)` bool, True = to predict, at least one in each row.
    """
    if stratified:
        u = torch.rand(1, generator=generator, dtype=torch.float64)
        r = (torch.randperm(batch_size, generator=generator) + u) / batch_size
    else:
        r = torch.rand(batch_size, generator=generator, dtype=torch.float64)
    num_masked = (num_positions * torch.cos(r * math.pi / 2)).ceil().clamp(1, num_positions)
    order = torch.rand(batch_size, num_positions, generator=generator).argsort(dim=1)
    return order < num_masked[:, None]  # a row of `order` is a uniform permutation: n of its entries are below n


# ----------------------------------------------------------------------------------------------------------- data


def tokenize(tokenizer, captions, max_length):
    """Captions to `(num_captions, max_length)` int32, padded to full length: the model reads the padding as text."""
    ids = [
        tokenizer(captions[i : i + 10_000], padding="max_length", truncation=True, max_length=max_length).input_ids
        for i in range(0, len(captions), 10_000)
    ]
    return torch.from_numpy(np.concatenate([np.array(part, dtype=np.int32) for part in ids]))


def training_batches(args, dataset, input_ids, cached_codes, vae, start, accelerator):
    """Yield codes `(B, h, w, D)` and input_ids `(B, L)`, int64 on the device, for ever."""

    def order():
        return training_order(
            len(dataset), start, args.train_batch_size, accelerator.process_index, accelerator.num_processes, args.seed
        )

    device = accelerator.device
    if cached_codes is not None:
        # Index first, widen after: the cache stays at two bytes a code.
        all_codes = (
            cached_codes[i, flips.long() if args.random_flip else 0].to(device).long() for i, flips in order()
        )
    else:
        batches_of_indices = (indices.tolist() for indices, _ in order())
        all_images = decoded_batches(
            dataset, batches_of_indices, args.image_column, args.resolution, device, args.dataloader_num_workers
        )
        all_codes = (
            encode(vae, to_pixel_values(images, flips.to(device) if args.random_flip else None))
            for images, (_, flips) in zip(all_images, order())
        )
    for codes, (indices, _) in zip(all_codes, order()):
        yield codes, input_ids[indices].to(device).long()


@torch.no_grad()
def encode(vae, pixel_values):
    """Codes `(B, h, w, D)`, in float32 whatever the precision of the transformer: they are the targets of training."""
    with torch.autocast(pixel_values.device.type, enabled=False):
        return vae.encode(pixel_values).codes


# ---------------------------------------------------------------------------------------------------- cached codes


def fingerprint(args, dataset, vae, views):
    """What the codes of a data set depend on, as the metadata of their file."""
    digest = hashlib.sha256(json.dumps(dict(vae.config), sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"dataset": dataset._fingerprint, "vae": digest.hexdigest(), "image_column": args.image_column,
            "resolution": str(args.resolution), "views": str(views)}  # fmt: skip


def encode_split(args, dataset, vae, views, accelerator):
    """Encode this process's share `[process_index::num_processes]` of a split.

    Returns codes `(num_images, views, h, w, D)`, uint16 where the codebook allows; view 1 is the mirrored image.
    """
    share = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    batches = [list(share[i : i + args.encoding_batch_size]) for i in range(0, len(share), args.encoding_batch_size)]
    dtype = torch.uint16 if vae.config.codebook_size <= 2**16 else torch.int32
    decoded = decoded_batches(
        dataset, batches, args.image_column, args.resolution, accelerator.device, args.dataloader_num_workers
    )
    codes = []
    started = time.monotonic()
    for i, images in enumerate(decoded):
        pixel_values = to_pixel_values(images)
        encoded = [encode(vae, pixel_values.flip(-1) if view else pixel_values) for view in range(views)]
        codes.append(torch.stack(encoded, dim=1).to(dtype).cpu())
        if (i + 1) % 100 == 0:
            done = (i + 1) * args.encoding_batch_size
            rate = done / (time.monotonic() - started)
            accelerator.print(f"encoded {done:,} of {len(share):,} images, {rate:.1f}/s", flush=True)
    return torch.cat(codes)


def cached_training_codes(args, dataset, vae, accelerator):
    """Codes of the whole training split in memory, read from `<output_dir>/codes.safetensors` if that has them."""
    views = 2 if args.random_flip else 1
    metadata = fingerprint(args, dataset, vae, views)
    path = Path(args.output_dir) / "codes.safetensors"

    def is_current():
        if not path.is_file():
            return False
        with safe_open(path, "pt") as file:
            return file.metadata() == metadata

    reuse = is_current()
    accelerator.wait_for_everyone()  # nobody writes before all have looked
    if reuse:
        accelerator.print(f"reading the training codes from {path}")
    else:
        part = path.with_name(f"codes-{accelerator.process_index}.partial")
        save_file({"codes": encode_split(args, dataset, vae, views, accelerator)}, part)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            parts = [path.with_name(f"codes-{i}.partial") for i in range(accelerator.num_processes)]
            for i, part in enumerate(parts):
                with safe_open(part, "pt") as file:
                    share = file.get_tensor("codes")
                if i == 0:
                    codes = torch.empty(len(dataset), *share.shape[1:], dtype=share.dtype)
                codes[i :: len(parts)] = share
            save_file({"codes": codes}, path.with_name("codes.partial"), metadata=metadata)
            path.with_name("codes.partial").rename(path)
            for part in parts:
                part.unlink()
        accelerator.wait_for_everyone()
    with safe_open(path, "pt") as file:
        return file.get_tensor("codes")


# ------------------------------------------------------------------------------------------------------ validation


@torch.no_grad()
def held_back_loss(transformer, codes, input_ids, num_images, batch_size, accelerator, bins=4):
    """Losses over given images, with masks that are the same at every call.

    Args:
        codes, input_ids: `(n, h, w, D)` and `(n, L)`, this process's share `[process_index::num_processes]` of the
            `num_images` images.

    Returns:
        dict with `image_loss` (nats a masked code), `text_loss`, and `image_loss_by_ratio`: `bins` numbers, the image
        loss over images with a mask ratio in (0, 1/bins], ..., (1 - 1/bins, 1]. The last bin is what a draft starts
        from, the first is what a revision sees.
    """
    height, width = codes.shape[1:3]
    masks = random_mask(num_images, height * width, torch.Generator().manual_seed(0))
    masks = masks[accelerator.process_index :: accelerator.num_processes]
    num_masked = masks.sum(1)
    bin_of_image = (num_masked * bins - 1) // (height * width)  # ceil(ratio * bins) - 1
    sums = torch.zeros(bins, 4, dtype=torch.float64, device=accelerator.device)
    for b in range(bins):
        for rows in (bin_of_image == b).nonzero()[:, 0].split(batch_size):
            if len(rows) == 0:
                continue
            labels = codes[rows].to(accelerator.device).long()
            mask = masks[rows].view(-1, height, width, 1).to(accelerator.device)
            with accelerator.autocast():
                out = transformer(
                    labels.masked_fill(mask, transformer.mask_token_id),
                    labels=labels,
                    input_ids=input_ids[rows].to(accelerator.device).long(),
                )
            masked, count = num_masked[rows].sum().item(), len(rows)
            values = torch.stack([out.image_loss.double() * masked, out.text_loss.double() * count])
            sums[b] += torch.cat([values, values.new_tensor([masked, count])])
    by_bin = accelerator.reduce(sums).tolist()
    image, text, masked, count = (sum(column) for column in zip(*by_bin))
    return {
        "image_loss": image / masked,
        "text_loss": text / count,
        "image_loss_by_ratio": [row[0] / row[2] if row[2] else float("nan") for row in by_bin],
    }


# ------------------------------------------------------------------------------------------------------------ main


def load_components(args):
    """The RQ-VAE, transformer, scheduler and tokenizer, from the pipeline or from where flags say otherwise."""
    pipeline = args.pretrained_model_name_or_path

    def is_there(subfolder, pattern):
        """Whether a component has such a file; a Hub id is taken to be a complete pipeline."""
        return not Path(pipeline).is_dir() or any((Path(pipeline) / subfolder).glob(pattern))

    if args.vae is not None:
        vae = RQVAEModel.from_pretrained(args.vae)
    elif is_there("vae", "*.safetensors"):
        vae = RQVAEModel.from_pretrained(pipeline, subfolder="vae")
    else:
        raise ValueError(f"--vae must name a trained RQ-VAE, because {pipeline}/vae has no weights.")

    if args.transformer_config is not None:
        config = ContextualRQTransformerModel.load_config(args.transformer_config)
        transformer = ContextualRQTransformerModel.from_config(config)
    elif is_there("transformer", "*.safetensors*"):
        transformer = ContextualRQTransformerModel.from_pretrained(pipeline, subfolder="transformer")
    else:
        config = ContextualRQTransformerModel.load_config(pipeline, subfolder="transformer")
        transformer = ContextualRQTransformerModel.from_config(config)
    if transformer.config.text_vocab_size is None:
        raise ValueError("The transformer must be one of text (text_vocab_size in its config), got None.")

    if args.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    elif is_there("tokenizer", "*.json"):
        tokenizer = AutoTokenizer.from_pretrained(pipeline, subfolder="tokenizer")
    else:
        raise ValueError(f"--tokenizer must name a tokenizer, because {pipeline}/tokenizer does not have one.")
    if len(tokenizer) > transformer.config.text_vocab_size:
        raise ValueError(
            f"--tokenizer must have at most {transformer.config.text_vocab_size} tokens, the transformer's "
            f"text_vocab_size, got {len(tokenizer)}."
        )

    if is_there("scheduler", "*.json"):
        scheduler = DraftAndReviseScheduler.from_pretrained(pipeline, subfolder="scheduler")
    else:
        scheduler = DraftAndReviseScheduler()
    return vae, transformer, scheduler, tokenizer


def main(args):
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir),
        # The only buffer is the codebook, which never changes here: no need to send it before every forward.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)

    # 1. Models
    set_seed(args.seed)  # the same in every process, so that all start from the same weights
    vae, transformer, scheduler, tokenizer = load_components(args)
    vae.requires_grad_(False).eval().to(accelerator.device)
    transformer.set_codebook(vae.quantizer.codebook)
    if args.attention_backend is not None:
        transformer.set_attention_backend(args.attention_backend)
    if args.resolution is None:
        args.resolution = vae.config.sample_size
    config = transformer.config
    num_positions = config.height * config.width
    covered = (config.height * vae.spatial_scale_factor, config.width * vae.spatial_scale_factor)
    if covered != (args.resolution, args.resolution):
        raise ValueError(f"--resolution must be {covered[0]} for {config.height}x{config.width} codes of this RQ-VAE, "
                         f"got {args.resolution}.")  # fmt: skip
    optimizer = torch.optim.AdamW(
        transformer.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        fused=True,
    )
    # `model` is what trains (wrapped for several processes, autocast); `transformer` stays the module inside it.
    model, optimizer = accelerator.prepare(transformer.train(), optimizer)
    ema = None
    if args.ema_decay > 0:
        # With the warm-up the decay is min(ema_decay, 1 - (1 + step)^(-2/3)): 0.9999 is only reached after a million
        # steps, and a short run exports more than its initialisation.
        ema = EMAModel(transformer.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=2 / 3, foreach=True)
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)
    # From here on each process has a stream of its own, for the residual dropout. Masks, dropped captions and the
    # order of the images come from generators seeded by (seed, step) or (seed, epoch), whatever the processes.
    set_seed(args.seed, device_specific=True)

    # 2. Data
    source = ("image_column", "caption_column", "dataset_name", "train_data_dir", "data_files", "train_split")
    source = {name: getattr(args, name) for name in source}
    with accelerator.main_process_first():  # one process prepares the files that all then map
        train_dataset = load_split(args.train_split, **source)
        validation_datasets = {split: load_split(split, **source) for split in args.validation_split}

    def token_ids(dataset):
        return tokenize(tokenizer, dataset[args.caption_column][:], config.max_text_length)

    input_ids = token_ids(train_dataset)
    cached_codes = cached_training_codes(args, train_dataset, vae, accelerator) if args.cache_codes else None
    if validation_datasets:
        # The same number of training images as well, for the gap between seen and held-back images.
        count = min(len(train_dataset), args.max_validation_images, max(map(len, validation_datasets.values())))
        spread = np.linspace(0, len(train_dataset) - 1, count).round().astype(int)
        validation_datasets["seen"] = train_dataset.select(spread)
    validation_sets = {}
    for name, dataset in validation_datasets.items():
        dataset = dataset.select(range(min(len(dataset), args.max_validation_images)))
        codes = encode_split(args, dataset, vae, 1, accelerator)[:, 0]
        own_ids = token_ids(dataset)[accelerator.process_index :: accelerator.num_processes]
        validation_sets[name] = (codes, own_ids, len(dataset))

    # 3. Length of the run
    total_batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    max_train_steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(train_dataset) / total_batch_size)
    progress = {"step": 0, "images": 0, "epoch": 0, "seconds": 0.0}
    if args.resume_from_checkpoint is not None:
        progress = load_checkpoint(accelerator, output_dir, args.resume_from_checkpoint) or progress
    step, images_seen = progress["step"], progress["images"]
    log = TrainingLog(accelerator, output_dir, step)
    if args.report_to is not None:
        accelerator.init_trackers("cc3m", config={k: v for k, v in vars(args).items() if not isinstance(v, list)})

    accelerator.print(
        f"parameters: {sum(p.numel() for p in transformer.parameters()):,}\n"
        f"images: {len(train_dataset):,} training, "
        + ", ".join(f"{size:,} {name}" for name, (_, _, size) in validation_sets.items())
        + f"; codes {config.height}x{config.width}x{config.code_depth} of {config.codebook_size:,}\n"
        f"total batch: {total_batch_size:,} = {args.train_batch_size} x {accelerator.num_processes} processes x "
        f"{args.gradient_accumulation_steps} micro-batches\n"
        f"steps: {max_train_steps:,} ({max_train_steps * total_batch_size / len(train_dataset):.1f} epochs)"
        + (f" or {args.max_train_seconds:,.0f} seconds" if args.max_train_seconds else "")
        + f", from step {step:,}",
    )

    def validate():
        transformer.eval()
        if ema is not None:
            ema.store(transformer.parameters())
            ema.copy_to(transformer.parameters())
        for name, validation_set in validation_sets.items():
            losses = held_back_loss(transformer, *validation_set, args.train_batch_size, accelerator)
            entry = {"kind": "validation", "split": name, "step": step, "images": images_seen,
                     "seconds": round(budget.elapsed(), 2), **losses}  # fmt: skip
            by_ratio = " ".join(f"{loss:.3f}" for loss in losses["image_loss_by_ratio"])
            log.write(
                entry,
                f"  validation at step {step} on {name}: image {losses['image_loss']:.4f} "
                f"(by mask ratio {by_ratio}) text {losses['text_loss']:.4f}",
            )
        if ema is not None:
            ema.restore(transformer.parameters())
        transformer.train()

    # 4. Training
    budget = Budget(accelerator, max_train_steps, args.max_train_seconds, progress["seconds"])
    # A batch comes in so many parts. Their gradients are averaged: accelerate divides each loss by the number of
    # micro-batches, and DistributedDataParallel the gradients by the number of processes.
    num_parts = accelerator.num_processes * args.gradient_accumulation_steps
    batches = training_batches(args, train_dataset, input_ids, cached_codes, vae, images_seen, accelerator)
    generator = torch.Generator()
    sums, window_steps, window_started = defaultdict(float), 0, time.monotonic()
    while (fraction := budget.fraction_used(step)) < 1:
        learning_rate = learning_rate_at(step, fraction, args.learning_rate, args.lr_scheduler, args.lr_warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        # Every process draws the masks of the whole batch and takes its rows. So the batch is stratified as a whole,
        # the number of masked codes is known without asking the others, and the draws do not depend on the split.
        generator.manual_seed(args.seed * 1_000_003 + step)
        masks = random_mask(total_batch_size, num_positions, generator, args.stratified_masks)
        dropped = torch.rand(total_batch_size, generator=generator) < args.condition_dropout
        num_masked, num_texts = masks.sum().item(), max(1, (~dropped).sum().item())

        for micro_batch in range(args.gradient_accumulation_steps):
            first = (micro_batch * accelerator.num_processes + accelerator.process_index) * args.train_batch_size
            rows = slice(first, first + args.train_batch_size)
            codes, caption_ids = next(batches)  # (B, h, w, D), (B, L)
            mask = masks[rows].to(accelerator.device).view(-1, config.height, config.width, 1)
            caption_ids = caption_ids.masked_fill(dropped[rows, None].to(accelerator.device), config.text_vocab_size)
            # Averaging the means of the parts as they are would favour the codes in parts that have few. (The counts
            # are on the host: no waiting for the device.)
            image_share = masks[rows].sum().item() / num_masked * num_parts
            text_share = (~dropped[rows]).sum().item() / num_texts * num_parts
            with accelerator.accumulate(model):
                out = model(codes.masked_fill(mask, transformer.mask_token_id), labels=codes, input_ids=caption_ids)
                image_loss, text_loss = out.image_loss * image_share, out.text_loss * text_share
                loss = (1 - config.text_loss_weight) * image_loss + config.text_loss_weight * text_loss
                accelerator.backward(loss)
                if accelerator.sync_gradients and args.max_grad_norm > 0:
                    sums["grad_norm"] += accelerator.clip_grad_norm_(transformer.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            for name, value in (("loss", loss), ("image_loss", image_loss), ("text_loss", text_loss)):
                sums[name] += value.detach() / args.gradient_accumulation_steps
        if ema is not None:
            ema.step(transformer.parameters())

        step += 1
        images_seen += total_batch_size
        window_steps += 1

        if step % args.logging_steps == 0:
            # The only place where the host waits for the device.
            means = {name: accelerator.reduce(value / window_steps, "mean").item() for name, value in sums.items()}
            rate = window_steps * total_batch_size / (time.monotonic() - window_started)
            entry = {"kind": "train", "step": step, "images": images_seen, "seconds": round(budget.elapsed(), 2),
                     "images_per_second": round(rate, 2), "learning_rate": learning_rate, **means}  # fmt: skip
            log.write(
                entry,
                f"step {step}/{max_train_steps} images {images_seen:,} {rate:.1f}/s lr {learning_rate:.2e} "
                + " ".join(f"{name} {value:.4f}" for name, value in means.items()),
            )
            sums, window_steps, window_started = defaultdict(float), 0, time.monotonic()

        pause_started = time.monotonic()
        if validation_sets and step % args.validation_steps == 0:
            validate()
        if step % args.checkpointing_steps == 0:
            epoch = images_seen // len(train_dataset)
            progress = {"step": step, "images": images_seen, "epoch": epoch, "seconds": budget.elapsed()}
            save_checkpoint(accelerator, output_dir, progress, vars(args), args.checkpoints_total_limit)
        window_started += time.monotonic() - pause_started  # images/s is the speed of training alone

    # 5. Export
    if validation_sets and step % args.validation_steps != 0:
        validate()
    if ema is not None:
        ema.copy_to(transformer.parameters())
    if accelerator.is_main_process:
        pipe = DraftAndRevisePipeline(
            vae=vae, transformer=transformer.eval(), scheduler=scheduler, tokenizer=tokenizer
        )
        pipe.save_pretrained(output_dir)
    log.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    seconds = budget.elapsed()
    accelerator.print(f"Saved to {output_dir} after {step:,} steps, {images_seen:,} images, {seconds:,.0f} seconds.")


if __name__ == "__main__":
    main(parse_args())
