"""Adapt a pipeline to a handful of images by LoRA: low-rank additions to its transformer's attention, a small file.

    accelerate launch examples/train_lora.py --pretrained_model_name_or_path pipelines/emoji-scenes \\
        --train_data_dir my-images --rank 8 --max_train_steps 300 --output_dir runs/my-lora

`my-images` holds images and a `metadata.jsonl` of lines such as {"file_name": "1.png", "text": "a cat in my garden"};
where all images show one thing, `--instance_prompt "a cat in my garden"` stands for all captions. The loss is that of
the second stage: codes at random masks, given the others and the caption. Into `output_dir` the script writes
`pytorch_lora_weights.safetensors`, a model card and `train_log.jsonl`; then

    pipe = DraftAndRevisePipeline.from_pretrained("pipelines/emoji-scenes")
    pipe.load_lora_weights("runs/my-lora")
"""

import argparse
import json
import math
import re
import time
from pathlib import Path

import torch
from accelerate.utils import set_seed
from huggingface_hub import ModelCardData
from peft import LoraConfig, get_peft_model_state_dict

from rq_draft_revise import DraftAndRevisePipeline, RQTransformerPipeline
from rq_draft_revise.batches import Batch
from rq_draft_revise.budget import learning_rate_at
from rq_draft_revise.code_cache import encoded_rows
from rq_draft_revise.data import (
    SkippedRows,
    class_labels_of,
    describe_captions,
    input_ids_of,
    is_empty,
    load_split,
    matched_classes,
    training_order,
    without_empty,
)
from rq_draft_revise.divergence import NonFiniteGuard
from rq_draft_revise.flags import FlagHelp, check_flags
from rq_draft_revise.masks import draws_of_step
from rq_draft_revise.model_card import model_card
from rq_draft_revise.publishing import create_repository, upload
from rq_draft_revise.training import losses_of, make_accelerator
from rq_draft_revise.waiting import main_process_first


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=FlagHelp)

    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", required=True, help="Folder or Hub id of the pipeline.")
    group.add_argument("--revision", help="Of the pipeline on the Hub.")
    group.add_argument("--variant", help="Of the pipeline's weights, such as fp16.")
    group.add_argument("--rank", type=int, default=4, help="Of the additions.")
    group.add_argument("--lora_alpha", type=int, help="The additions are scaled by alpha / rank. Default: the rank.")
    group.add_argument("--lora_dropout", type=float, default=0.0, help="Of what goes into the additions.")
    group.add_argument("--lora_layers", default="to_q,to_k,to_v,to_out.0",
                       help="The layers that are added to: ends of their names, separated by commas.")  # fmt: skip
    group.add_argument(
        "--gradient_checkpointing", action="store_true", help="Compute the blocks again in the backward pass."
    )

    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="Hub id, or a local folder that `datasets.load_dataset` reads.")
    group.add_argument("--train_data_dir", help="Folder of images with a metadata.csv or .jsonl of captions.")
    group.add_argument("--train_split", default="train", help="Also a part of a split: 'train[:90%%]'.")
    group.add_argument("--image_column", default="image", help="Column of the images.")
    group.add_argument("--caption_column", default="text", help="Column of the captions.")
    group.add_argument("--label_column", default="label", help="Of a class-conditional pipeline.")
    group.add_argument("--instance_prompt", help="Caption of all images, in place of a column of captions.")
    group.add_argument("--random_flip", action="store_true", help="Mirror half of the images, chosen anew each epoch.")

    group = parser.add_argument_group("optimization")
    group.add_argument("--train_batch_size", type=int, default=4, help="Images per process and micro-batch.")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="Micro-batches of a batch.")
    group.add_argument("--max_train_steps", type=int, default=500, help="Optimizer steps.")
    group.add_argument("--learning_rate", type=float, default=1e-3, help="After the warm-up.")
    group.add_argument("--lr_scheduler", choices=["cosine", "constant"], default="constant", help="cosine ends at 0.")
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="Linear.")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="Of AdamW.")
    group.add_argument("--adam_beta2", type=float, default=0.95, help="Of AdamW.")
    group.add_argument("--adam_weight_decay", type=float, default=1e-4, help="Of AdamW.")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="0 does not clip.")
    group.add_argument("--condition_dropout", type=float, default=0.1, help="Share of captions dropped, for guidance.")
    group.add_argument("--max_nonfinite_steps", type=int, default=10,
                       help="Steps whose loss or gradient is not finite are left out; so many in a row end the "
                       "run.")  # fmt: skip
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: as accelerate configured.")
    group.add_argument("--seed", type=int, default=0, help="Of all random numbers.")

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="lora-weights", help="Folder of the adapter, its card and the log.")
    group.add_argument("--logging_steps", type=int, default=10, help="Steps between two lines of the log.")
    group.add_argument("--validation_prompt",
                       help="A text, or the name of a class, drawn with the adapter at the end into "
                       "validation-*.png.")  # fmt: skip
    group.add_argument("--num_validation_images", type=int, default=4, help="Images of --validation_prompt.")
    group.add_argument(
        "--push_to_hub", action="store_true", help="Upload the adapter, its card and the log to the Hub."
    )
    group.add_argument("--hub_model_id", help="Default: the name of --output_dir, in your namespace.")
    group.add_argument("--hub_token", help="Default: the one you are logged in with.")
    group.add_argument("--hub_private_repo", action="store_true", help="Make a new repository private.")

    # make_accelerator's: the log of a run so short is its file; and check_flags'
    parser.set_defaults(report_to=None, data_files=None, filter_column=None, filter_min=None, filter_max=None)
    args = parser.parse_args(argv)
    if args.dataset_name is None and args.train_data_dir is None:
        raise ValueError("Give the images by --dataset_name or --train_data_dir, got neither.")
    if args.dataset_name is not None and args.train_data_dir is not None:
        raise ValueError(
            f"Give the images by only one of --dataset_name and --train_data_dir, got {args.dataset_name!r} and "
            f"{args.train_data_dir!r}."
        )
    for name in ("instance_prompt", "validation_prompt"):
        if getattr(args, name) is not None and is_empty(getattr(args, name)):
            raise ValueError(f"--{name} must be a text, got {getattr(args, name)!r}.")
    check_flags(args)
    for name in ("rank", "lora_alpha", "num_validation_images"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if not 0 <= args.lora_dropout < 1:
        raise ValueError(f"--lora_dropout must lie in [0, 1), got {args.lora_dropout}.")
    return args


def load_pipeline(args) -> DraftAndRevisePipeline:
    """The pipeline to adapt.

    Raises:
        `ValueError`: it is one of the autoregressive baseline.
    """
    path, revision = args.pretrained_model_name_or_path, args.revision
    kind = DraftAndRevisePipeline.load_config(path, revision=revision).get("_class_name")
    if kind == RQTransformerPipeline.__name__:
        raise ValueError(
            "--pretrained_model_name_or_path must be a pipeline of a Contextual RQ-Transformer, got one of the "
            f"autoregressive baseline, a {kind}, in {path}."
        )
    return DraftAndRevisePipeline.from_pretrained(path, revision=revision, variant=args.variant)


def lora_layers(args, transformer) -> list[str]:
    """The ends of names in --lora_layers.

    Raises:
        `ValueError`: one of them matches no layer that can be added to.
    """
    modules = dict(transformer.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))]
    names = [name.strip() for name in args.lora_layers.split(",")]
    for name in names:
        matched = {layer for layer in modules if f".{layer}".endswith(f".{name}")}
        if not matched or not matched <= set(layers):
            ends = sorted({re.search(r"[^.]+(\.\d+)?$", layer)[0] for layer in layers})
            raise ValueError(f"--lora_layers must be among {', '.join(ends)}, or longer ends of names, got {name!r}.")
    return names


def check_prompts(args, pipe) -> None:
    """Refuse, before the training, a prompt that the pipeline cannot read.

    Raises:
        `ValueError`: `instance_prompt` for a pipeline without text, or a `validation_prompt` that is none of its
        classes.
    """
    config, path = pipe.transformer.config, args.pretrained_model_name_or_path
    if config.text_vocab_size is not None:
        return
    if args.instance_prompt is not None:
        raise ValueError(
            f"--instance_prompt must be left out for a pipeline without text, as {path} is one, got "
            f"{args.instance_prompt!r}."
        )
    if args.validation_prompt is None:
        return
    if config.num_classes is None:
        raise ValueError(
            f"--validation_prompt must be left out for a pipeline without a condition, as {path} is one, got "
            f"{args.validation_prompt!r}."
        )
    try:
        pipe.get_label_ids(args.validation_prompt)
    except ValueError as error:
        raise ValueError(
            f"--validation_prompt must be the name of a class of {path}, got {args.validation_prompt!r}: {error}"
        ) from error


def load_condition(args, dataset, pipe, print=print) -> tuple[str | None, torch.Tensor | None]:
    """The transformer's argument for the condition, with its rows `(num_images, ...)`; None where it has none.

    Captions that the model cannot read as they are, are counted; classes are found by their names.

    Raises:
        `ValueError`: a caption that is no text, or a label that is no class of the transformer.
    """
    config = pipe.transformer.config
    if config.text_vocab_size is not None:
        captions = [args.instance_prompt] * len(dataset) if args.instance_prompt else dataset[args.caption_column][:]
        ids = input_ids_of(captions, pipe.tokenizer, config.max_text_length, config.text_vocab_size)
        describe_captions(captions, pipe.tokenizer, config.max_text_length, print)
        return "input_ids", ids.long()
    if config.num_classes is not None:
        class_ids = matched_classes(dataset, args.label_column, pipe.config.id2label, print)
        return "class_labels", class_labels_of(dataset[args.label_column][:], config.num_classes, class_ids)
    return None, None


def encode_images(args, dataset, pipe, device, skipped=None) -> tuple[list[int], torch.Tensor]:
    """All images as codes: a handful, so once and for all. Those that cannot be read are left out.

    Returns:
        The rows that could be read, and their codes `(rows, views, h, w, D)`, of which view 1 is mirrored.

    Raises:
        `ValueError`: none can be read, or the transformer has another number of positions.
    """
    config = pipe.transformer.config
    encoded = encoded_rows(
        dataset, pipe.vae, args.image_column, pipe.vae.config.sample_size, range(len(dataset)), device, batch_size=16,
        random_flip=args.random_flip, skipped=skipped,
    )  # fmt: skip
    batches_of_rows, batches_of_codes = zip(*encoded)
    rows, codes = sum(batches_of_rows, []), torch.cat(batches_of_codes).long().to(device)
    if codes.shape[2:4] != (config.height, config.width):
        raise ValueError(
            f"The transformer must have the RQ-VAE's {codes.shape[2]}x{codes.shape[3]} positions, got "
            f"{config.height}x{config.width}."
        )
    return rows, codes


def main(args):
    accelerator = make_accelerator(args)  # seeds all processes the same, so that they start from the same adapter

    # 1. The pipeline, frozen, and the adapter, which alone trains: in float32, also on top of half precision
    pipe = load_pipeline(args)
    check_prompts(args, pipe)
    target_modules = lora_layers(args, pipe.transformer)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    repo_id = create_repository(args) if accelerator.is_main_process else None
    pipe.to(accelerator.device)
    vae, transformer = pipe.vae, pipe.transformer
    vae.requires_grad_(False)
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(
            r=args.rank,
            lora_alpha=args.rank if args.lora_alpha is None else args.lora_alpha,
            lora_dropout=args.lora_dropout,
            init_lora_weights="gaussian",
            target_modules=target_modules,
        )
    )
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    trainable = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
    )
    model, optimizer = accelerator.prepare(transformer.train(), optimizer)
    set_seed(args.seed, device_specific=True)

    # 2. The images, as codes
    config, columns = transformer.config, {}
    if config.text_vocab_size is not None and args.instance_prompt is None:
        columns["caption_column"] = args.caption_column
    if config.num_classes is not None:
        columns["label_column"] = args.label_column
    with main_process_first(accelerator):
        dataset = load_split(
            args.train_split,
            image_column=args.image_column,
            dataset_name=args.dataset_name,
            train_data_dir=args.train_data_dir,
            split_argument="train_split",
            **columns,
        )
    skipped = SkippedRows(f"split {args.train_split!r}")
    for column in columns.values():
        dataset = without_empty(dataset, column, skipped)
    condition_name, conditions = load_condition(args, dataset, pipe, accelerator.print)
    rows_of_images, codes_of_images = encode_images(args, dataset, pipe, accelerator.device, skipped)
    conditions = None if conditions is None else conditions[rows_of_images]
    num_images = len(rows_of_images)
    total_batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    accelerator.print(
        f"adapter: {sum(p.numel() for p in trainable):,} parameters of rank {args.rank}\n"
        f"images: {num_images:,}; skipped rows: {skipped}; total batch {total_batch_size:,}; "
        f"{args.max_train_steps:,} steps"
    )

    # 3. Training
    order = training_order(
        num_images, 0, args.train_batch_size, accelerator.process_index, accelerator.num_processes, args.seed
    )
    num_parts = accelerator.num_processes * args.gradient_accumulation_steps
    guard = NonFiniteGuard(accelerator, args.max_nonfinite_steps)
    max_grad_norm = args.max_grad_norm if args.max_grad_norm > 0 else math.inf
    started, mean = time.monotonic(), math.nan
    loss_sum, window, steps_taken = torch.zeros((), device=accelerator.device), 0, 0
    log = (output_dir / "train_log.jsonl").open("w", buffering=1) if accelerator.is_main_process else None
    for step in range(args.max_train_steps):
        learning_rate = learning_rate_at(
            step, step / args.max_train_steps, args.learning_rate, args.lr_scheduler, args.lr_warmup_steps
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        draws = draws_of_step(total_batch_size, transformer.num_positions, args.condition_dropout, args.seed, step)
        step_loss = torch.zeros_like(loss_sum)
        for micro_batch in range(args.gradient_accumulation_steps):
            first = (micro_batch * accelerator.num_processes + accelerator.process_index) * args.train_batch_size
            own = draws.part(first, args.train_batch_size)
            indices, flips = next(order)
            codes = codes_of_images[indices, flips.long() if args.random_flip else 0]  # (B, h, w, D)
            condition = None if conditions is None else conditions[indices].to(accelerator.device)  # (B, L) or (B,)
            with accelerator.accumulate(model):
                batch = Batch(codes, condition)
                loss = losses_of(model, transformer, batch, condition_name, own, draws, num_parts)["loss"]
                accelerator.backward(loss)
            step_loss += loss.detach() / args.gradient_accumulation_steps
        if guard.accepts(step_loss, accelerator.clip_grad_norm_(trainable, max_grad_norm)):
            optimizer.step()
            loss_sum += step_loss
            window, steps_taken = window + 1, steps_taken + 1
        optimizer.zero_grad()
        if (step + 1) % args.logging_steps == 0 or step + 1 == args.max_train_steps:
            means = {"loss": accelerator.reduce(loss_sum / window, "mean").item()} if window else {}
            mean = means.get("loss", mean)
            seconds = round(time.monotonic() - started, 2)
            if log is not None:
                entry = {"step": step + 1, **means, "learning_rate": learning_rate,
                         "skipped_steps": guard.num_skipped, "seconds": seconds}  # fmt: skip
                log.write(json.dumps(entry) + "\n")
                loss = f"loss {mean:.4f}" if means else "no finite step"
                print(f"step {step + 1}/{args.max_train_steps} {loss} lr {learning_rate:.2e}", flush=True)
            loss_sum, window = torch.zeros_like(loss_sum), 0

    # 4. The adapter, its card, and a look at it
    layers = get_peft_model_state_dict(transformer)
    # A loss that is not finite at the end is that of the adapter, which no further step has changed.
    is_usable = steps_taken > 0 and accelerator.reduce(step_loss, "mean").isfinite().item()
    if not is_usable or not all(layer.isfinite().all() for layer in layers.values()):
        raise RuntimeError(
            f"The adapter is not saved: after {steps_taken:,} finite steps of {args.max_train_steps:,} its loss or "
            "weights are NaN or infinite, or no step was finite. Usual causes: a learning rate too high "
            "(--learning_rate), or float16 in a run too short to find its scale (--mixed_precision)."
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        log.close()
        transformer.eval()
        DraftAndRevisePipeline.save_lora_weights(
            output_dir,
            transformer_lora_layers=layers,
            transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
        )
        pictures = save_validation_images(args, pipe, output_dir) if args.validation_prompt else []
        write_adapter_card(args, pipe, repo_id or output_dir.as_posix(), num_images, mean, pictures)
        upload(args, repo_id)
        print(f"Saved to {output_dir} after {args.max_train_steps:,} steps.")
    accelerator.end_training()


def save_validation_images(args, pipe, output_dir) -> list[str]:
    """Draw --validation_prompt, or its class, with the adapter. Returns the names of the files."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num_validation_images)]
    given = {"prompt": args.validation_prompt}
    if pipe.transformer.config.num_classes is not None:
        given = {"class_labels": args.validation_prompt}
    images = pipe(**given, num_images_per_prompt=len(generators), generator=generators).images
    names = [f"validation-{i}.png" for i in range(len(images))]
    for name, image in zip(names, images):
        image.save(output_dir / name)
    return names


def write_adapter_card(args, pipe, repo_id, num_images, loss, pictures) -> None:
    source = args.dataset_name or Path(args.train_data_dir).name
    about = f", all with the caption *{args.instance_prompt}*" if args.instance_prompt else ""
    training = (
        f"`examples/train_lora.py`: rank {args.rank}, {args.max_train_steps:,} steps, {args.train_batch_size} images "
        f"a process and micro-batch, learning rate {args.learning_rate:g}; loss at the end {loss:.3f}."
    )
    if pictures:
        training += f"\n\n*{args.validation_prompt}*\n\n" + " ".join(f"![]({name})" for name in pictures)
    card = model_card(
        pipe,
        repo_id,
        ModelCardData(datasets=args.dataset_name if args.push_to_hub else None),
        data=f"{num_images:,} images of `{source}`{about}.",
        training=training,
        base_model=args.pretrained_model_name_or_path,
        prompt=args.instance_prompt or args.validation_prompt,
    )
    card.save(Path(args.output_dir) / "README.md")


if __name__ == "__main__":
    main(parse_args())
