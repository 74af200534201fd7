"""Train a Contextual RQ-Transformer on images with captions: text to maps of codes, over a frozen RQ-VAE.

    accelerate launch examples/train_cc3m.py --vae runs/cc3m-vae --tokenizer runs/cc3m-tokenizer \\
        --streaming --max_train_steps 400000 --output_dir runs/cc3m-654m

    accelerate launch examples/train_cc3m.py --pretrained_model_name_or_path pipelines/emoji-scenes \\
        --transformer_config pipelines/emoji-scenes/transformer --vae runs/emoji-vae \\
        --dataset_name data/emoji-scenes --cache_codes --random_flip --train_batch_size 32 --output_dir runs/emoji

    accelerate launch examples/train_cc3m.py --model autoregressive ...   # the baseline

Of an image's code stacks a share cos(pi r / 2), r uniform, is masked; the loss is the negative log-likelihood of the
masked codes given the others and the caption (0.9), plus that of the caption's own next tokens (0.1). Defaults are the
paper's recipe for CC-3M 654M; where --help says "RQ-VAE authors", the paper is silent and the value is that of the
authors' earlier configuration files. examples/train_tokenizer.py trains a tokenizer.

Into `output_dir` the script writes `train_log.jsonl` (the curves of a model card), `samples-<step>.png`,
`checkpoint-<step>/` folders to resume from, and at the end a whole pipeline with the averaged weights.
"""

import argparse
from functools import partial

from transformers import AutoTokenizer

from rq_draft_revise.captions_and_labels import describe_captions, input_ids_of
from rq_draft_revise.data import SkippedRows, is_empty
from rq_draft_revise.flags import (
    FlagHelp,
    add_data_flags,
    add_model_flags,
    add_training_flags,
    add_validation_flags,
    add_view_flags,
    check_flags,
)
from rq_draft_revise.publishing import upload
from rq_draft_revise.splits import load_splits, training_batches, validation_sets_of
from rq_draft_revise.training import (
    check_condition_dropout,
    check_resolution,
    default_pipeline,
    export_pipeline,
    has_file,
    is_trained,
    load_models,
    load_pipeline,
    train,
)
from rq_draft_revise.training_run import make_accelerator, open_output


PIPELINES = {"contextual": "pipelines/cc3m-256-654m", "autoregressive": "pipelines/rq-cc3m-256-654m"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=FlagHelp)

    group = add_model_flags(
        parser,
        components="vae, transformer, scheduler and tokenizer",
        pipelines=PIPELINES,
        other_sizes="the paper's other size (Table 1) lies beside it",
    )
    group.add_argument("--tokenizer", help="Folder or Hub id of the tokenizer. Default: the pipeline's.")

    group = add_data_flags(parser, image_column="image", source="pixparse/cc3m-wds, with its columns jpg and txt")
    group.add_argument("--caption_column", default="text", help="Column of the captions.")
    add_validation_flags(group)
    group.add_argument(
        "--validation_prompts",
        nargs="+",
        help="Captions of the sample grid. Default: the first of the validation split.",
    )
    group.add_argument(
        "--cache_codes",
        action="store_true",
        help="Encode the training split once, into memory and <output_dir>/codes.safetensors.",
    )
    add_view_flags(group, random_flip=False, random_crop=False)

    add_training_flags(parser, output_dir="contextual-rq-transformer-model")

    args = parser.parse_args(argv)
    if args.pretrained_model_name_or_path is None:
        args.pretrained_model_name_or_path = default_pipeline(PIPELINES[args.model])
    if args.dataset_name is None and args.train_data_dir is None and args.data_files is None:
        args.dataset_name, args.image_column, args.caption_column = "pixparse/cc3m-wds", "jpg", "txt"
    check_flags(args)
    if args.validation_prompts is not None and any(is_empty(prompt) for prompt in args.validation_prompts):
        raise ValueError(f"--validation_prompts must be texts, got {args.validation_prompts}.")
    if args.validation_prompts is not None and args.num_validation_images:
        args.num_validation_images = len(args.validation_prompts)
    return args


def load_tokenizer(args, config):
    """The tokenizer of the captions.

    Raises:
        `ValueError`: there is none, it has too many tokens, or the transformer was trained with another.
    """
    pipeline, own = args.pretrained_model_name_or_path, None
    if (args.tokenizer is None or is_trained(args)) and has_file(pipeline, "tokenizer", "*.json"):
        own = AutoTokenizer.from_pretrained(pipeline, subfolder="tokenizer")
    tokenizer = own if args.tokenizer is None else AutoTokenizer.from_pretrained(args.tokenizer)
    if tokenizer is None:
        raise ValueError(
            f"--tokenizer must name a tokenizer, because {pipeline}/tokenizer does not have one: "
            "examples/train_tokenizer.py trains it."
        )
    if own is not None and tokenizer.get_vocab() != own.get_vocab():
        raise ValueError(
            f"--tokenizer must have the vocabulary that the transformer of {pipeline} was trained with, got "
            f"{args.tokenizer}. `--transformer_config {pipeline}/transformer` starts one like it from scratch."
        )
    if len(tokenizer) > config.text_vocab_size:
        raise ValueError(
            f"--tokenizer must have at most {config.text_vocab_size} tokens, the transformer's text_vocab_size, got "
            f"{len(tokenizer)}."
        )
    return tokenizer


def sample_prompts(validation_datasets, train_dataset, args):
    """The captions of the sample grid: the first different ones of the first validation split, or of training."""
    prompts = {}
    for row in next(iter(validation_datasets.values()), train_dataset).select_columns([args.caption_column]):
        if len(prompts) == args.num_validation_images:
            break
        if not is_empty(row[args.caption_column]):
            prompts[row[args.caption_column]] = None
    return list(prompts)


def main(args):
    accelerator = make_accelerator(args)

    # 1. Models, before any data are fetched
    vae, transformer = load_models(args, accelerator)
    config = transformer.config
    if config.text_vocab_size is None:
        raise ValueError("The transformer must be one of text (text_vocab_size in its config): use train_imagenet.py.")
    tokenizer = load_tokenizer(args, config)
    check_condition_dropout(args, transformer)
    check_resolution(args, vae, transformer)
    pipeline = load_pipeline(args, vae, transformer, tokenizer=tokenizer)
    repo_id = open_output(args, accelerator)

    # 2. Data
    encode_captions = partial(
        input_ids_of,
        tokenizer=tokenizer,
        max_text_length=config.max_text_length,
        text_vocab_size=config.text_vocab_size,
    )
    train_dataset, validation_datasets = load_splits(args, accelerator, args.caption_column, "caption_column")
    if accelerator.is_main_process and not args.streaming:
        # of millions, the first
        describe_captions(train_dataset[args.caption_column][:10_000], tokenizer, config.max_text_length)
    data = (vae, config, args.caption_column, encode_captions)
    skipped = SkippedRows(f"split {args.train_split!r}")
    batches_from, num_images = training_batches(args, accelerator, train_dataset, *data, skipped)
    validation_sets = validation_sets_of(args, accelerator, train_dataset, validation_datasets, *data)

    # 3. Training
    prompts = []
    if args.num_validation_images:
        prompts = args.validation_prompts or sample_prompts(validation_datasets, train_dataset, args)
    args.num_validation_images = len(prompts)
    is_finished = train(
        args,
        accelerator,
        "train_cc3m",
        pipeline,
        "input_ids",
        batches_from,
        num_images,
        validation_sets,
        {"prompt": prompts},
        skipped,
        export=partial(export_pipeline, prompt=next(iter(prompts), None)),
    )
    if is_finished and accelerator.is_main_process:
        upload(args, repo_id)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
