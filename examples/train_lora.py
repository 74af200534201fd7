"""Adapt a pipeline to a handful of images by LoRA: low-rank additions to its transformer's attention, a small file.

    accelerate launch examples/train_lora.py --pretrained_model_name_or_path pipelines/emoji-scenes \\
        --train_data_dir my-images --rank 8 --max_train_steps 300 --output_dir runs/my-lora

`my-images` holds images and a `metadata.jsonl` of lines such as {"file_name": "1.png", "text": "a cat in my garden"};
where all images show one thing, `--instance_prompt "a cat in my garden"` stands for all captions. The loss is that of
the second stage: codes at random masks, given the others and the caption. Into `output_dir` the script writes
`train_log.jsonl`, `checkpoint-<step>/` folders of the adapter to resume from, and at the end
`pytorch_lora_weights.safetensors` and a model card; then

    pipe = DraftAndRevisePipeline.from_pretrained("pipelines/emoji-scenes")
    pipe.load_lora_weights("runs/my-lora")
"""

import argparse
import re
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

from rq_draft_revise import DraftAndRevisePipeline, RQTransformerPipeline
from rq_draft_revise.batches import stored_batches
from rq_draft_revise.captions_and_labels import class_labels_of, describe_captions, input_ids_of, matched_classes
from rq_draft_revise.code_cache import codes_in_memory, encoded_rows
from rq_draft_revise.data import SkippedRows, digest_of_rows, is_empty, load_split, without_empty
from rq_draft_revise.flags import (
    FlagHelp,
    add_codes_flags,
    add_optimization_flags,
    add_output_flags,
    check_flags,
)
from rq_draft_revise.model_card import model_card
from rq_draft_revise.provenance import config_sha256, weights_sha256
from rq_draft_revise.publishing import upload
from rq_draft_revise.splits import BatchSource
from rq_draft_revise.training import train
from rq_draft_revise.training_run import check_not_sharded, make_accelerator, open_output
from rq_draft_revise.waiting import main_process_first


ADAPTER = "adapter.safetensors"  # in a checkpoint


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

    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="Hub id, or a local folder that `datasets.load_dataset` reads.")
    group.add_argument("--train_data_dir", help="Folder of images with a metadata.csv or .jsonl of captions.")
    group.add_argument("--train_split", default="train", help="Also a part of a split: 'train[:90%%]'.")
    group.add_argument("--image_column", default="image", help="Column of the images.")
    group.add_argument("--caption_column", default="text", help="Column of the captions.")
    group.add_argument("--label_column", default="label", help="Of a class-conditional pipeline.")
    group.add_argument("--instance_prompt", help="Caption of all images, in place of a column of captions.")
    group.add_argument("--random_flip", action="store_true", help="Mirror half of the images, chosen anew each epoch.")

    group = add_optimization_flags(
        parser,
        train_batch_size=(4, ""),
        max_train_steps=(None, "Default: 500, where --num_train_epochs is not given."),
        learning_rate=(1e-3, ""),
        lr_scheduler=("constant", ""),
        adam_beta1=(0.9, ""),
        adam_beta2=(0.95, ""),
        max_grad_norm=(1.0, ""),
        ema_decay=(0.0, ""),
    )
    add_codes_flags(group, condition_dropout=0.1)

    group = add_output_flags(parser, "lora-weights", "adapter", "--validation_prompt is drawn into samples-<step>.png")
    group.add_argument("--validation_prompt", help="A text, or the name of a class. Default: none is drawn.")
    group.add_argument("--num_validation_images", type=int, default=4, help="Images of --validation_prompt.")
    parser.set_defaults(logging_steps=10)
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
    if args.max_train_steps is None and args.num_train_epochs is None:
        args.max_train_steps = 500
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
    rows, codes = sum(batches_of_rows, []), torch.cat(batches_of_codes)
    if codes.shape[2:4] != (config.height, config.width):
        raise ValueError(
            f"The transformer must have the RQ-VAE's {codes.shape[2]}x{codes.shape[3]} positions, got "
            f"{config.height}x{config.width}."
        )
    return rows, codes


def adapt(args, transformer) -> None:
    """Freeze the transformer and add an adapter, which alone trains: in float32, also on top of half precision."""
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.rank if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        init_lora_weights="gaussian",
        target_modules=lora_layers(args, transformer),
    )
    transformer.requires_grad_(False)
    transformer.add_adapter(config)


def checkpoint_adapter_alone(accelerator, transformer, base: str) -> None:
    """Have accelerate's checkpoints hold the adapter in place of the whole model, and `base`, a digest of that."""
    trained = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}

    def save(models, weights, folder):
        weights.clear()
        if accelerator.is_main_process:
            tensors = {name: parameter.detach() for name, parameter in trained.items()}
            save_file(tensors, Path(folder) / ADAPTER, {"base": base})

    @torch.no_grad()
    def load(models, folder):
        models.clear()
        with safe_open(Path(folder) / ADAPTER, "pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            saved_base = (file.metadata() or {}).get("base", base)
        if {name: tensor.shape for name, tensor in saved.items()} != {n: p.shape for n, p in trained.items()}:
            raise ValueError(f"{ADAPTER} is of other layers or another rank")
        if saved_base != base:
            raise ValueError("the weights of --pretrained_model_name_or_path have changed")
        for name, parameter in trained.items():
            parameter.copy_(saved[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def main(args):
    accelerator = make_accelerator(args)  # seeds all processes the same, so that they start from the same adapter
    check_not_sharded(accelerator, "An adapter")

    # 1. The pipeline and the adapter
    pipe = load_pipeline(args)
    check_prompts(args, pipe)
    base = " ".join(config_sha256(model) + weights_sha256(model) for model in (pipe.vae, pipe.transformer))
    adapt(args, pipe.transformer)
    repo_id = open_output(args, accelerator)
    pipe.vae.requires_grad_(False)
    pipe.to(accelerator.device)
    checkpoint_adapter_alone(accelerator, pipe.transformer, base)

    # 2. The images, as codes
    config, columns = pipe.transformer.config, {}
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
    rows, codes = encode_images(args, dataset, pipe, accelerator.device, skipped)
    conditions = None if conditions is None else conditions[rows]
    values = [dataset[column][:] for column in columns.values()]
    digest = digest_of_rows(dataset, args.image_column, *values)

    def batches_from(images_seen, place):
        return stored_batches(
            codes_in_memory(codes), conditions, len(rows), images_seen, args.train_batch_size, args.seed, accelerator
        )

    # 3. Training
    sample_condition = {}
    if args.validation_prompt is None:
        args.num_validation_images = 0
    else:
        argument = "prompt" if config.num_classes is None else "class_labels"
        sample_condition = {argument: [args.validation_prompt] * args.num_validation_images}
    is_finished = train(
        args,
        accelerator,
        "train_lora",
        pipe,
        condition_name,
        BatchSource(batches_from, digest),
        len(rows),
        validation_sets={},
        sample_condition=sample_condition,
        skipped=skipped,
        export=partial(export_adapter, num_images=len(rows)),
    )
    if is_finished and accelerator.is_main_process:
        upload(args, repo_id)
    accelerator.end_training()


def export_adapter(run, pipe, model, training, num_images) -> None:
    """Write the adapter and its card: see [`rq_draft_revise.training.export_pipeline`]."""
    if not run.accelerator.is_main_process:
        return
    args, transformer = run.args, pipe.transformer
    DraftAndRevisePipeline.save_lora_weights(
        args.output_dir,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    source = args.dataset_name or Path(args.train_data_dir).name
    about = f", all with the caption *{args.instance_prompt}*" if args.instance_prompt else ""
    training = f"`examples/train_lora.py`: rank {args.rank}, {training}"
    grid = run.output_dir / f"samples-{run.step:07d}.png"  # a run before, of more steps, may have left others
    if args.validation_prompt and grid.is_file():
        training += f"\n\n*{args.validation_prompt}*\n\n![]({grid.name})"
    card = model_card(
        pipe,
        args.hub_model_id or Path(args.output_dir).as_posix(),
        ModelCardData(datasets=args.dataset_name if args.push_to_hub else None),
        data=f"{num_images:,} images of `{source}`{about}.",
        training=training,
        base_model=args.pretrained_model_name_or_path,
        prompt=args.instance_prompt or args.validation_prompt,
    )
    card.save(Path(args.output_dir) / "README.md")


if __name__ == "__main__":
    main(parse_args())
