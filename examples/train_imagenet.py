"""Train a Contextual RQ-Transformer on images with class labels: classes to maps of codes, over a frozen RQ-VAE.

    accelerate launch examples/train_imagenet.py --vae runs/imagenet-vae --output_dir runs/imagenet-821m

    accelerate launch examples/train_imagenet.py --pretrained_model_name_or_path pipelines/cifar10-32 \\
        --vae runs/cifar10-vae --data_files train.parquet --validation_data_files test.parquet --cache_codes \\
        --train_batch_size 64 --output_dir runs/cifar10

    accelerate launch examples/train_imagenet.py --model autoregressive --vae runs/imagenet-vae   # the baseline

Of an image's code stacks a share cos(pi r / 2), r uniform, is masked; the loss is the negative log-likelihood of the
masked codes given the others and the class. Defaults are the paper's recipe for ImageNet 821M; where --help says
"RQ-VAE authors", the paper is silent and the value is that of the authors' earlier configuration files. A transformer
without classes (`num_classes` null) trains too, without labels.

Into `output_dir` the script writes `train_log.jsonl` (the curves of a model card), `samples-<step>.png`,
`checkpoint-<step>/` folders to resume from, and at the end a whole pipeline with the averaged weights.
"""

import argparse
import re
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed

from rq_draft_revise import DraftAndRevisePipeline, DraftAndReviseScheduler, RQTransformerPipeline
from rq_draft_revise.data import SkippedRows
from rq_draft_revise.flags import FlagHelp, add_data_flags, add_training_flags, add_view_flags, check_flags, tracked
from rq_draft_revise.publishing import create_repository, upload
from rq_draft_revise.splits import load_splits, training_batches, validation_sets_of
from rq_draft_revise.training import (
    MODELS,
    check_condition_dropout,
    check_resolution,
    has_file,
    load_transformer,
    load_vae,
    sampler_settings,
    train,
)


PIPELINES = {"contextual": "pipelines/imagenet-256-821m", "autoregressive": "pipelines/rq-imagenet-256-1.4b"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FlagHelp)

    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        choices=MODELS,
        default="contextual",
        help="The paper's model, or its autoregressive baseline, RQ-Transformer.",
    )
    group.add_argument(
        "--pretrained_model_name_or_path",
        help="Pipeline with vae, transformer and scheduler, a folder or Hub id. The transformer starts "
        "from its weights, or fresh from its config.json if there are none. Default: "
        f"{PIPELINES['contextual']}, or {PIPELINES['autoregressive']} for the baseline; the "
        "paper's other sizes (Table 1) lie beside them.",
    )
    group.add_argument("--vae", help="Folder or Hub id of the RQ-VAE. Default: the pipeline's, if it has weights.")
    group.add_argument("--transformer_config", help="A config.json or a folder with one: train that from scratch.")

    group = add_data_flags(parser, image_column="image", source="ILSVRC/imagenet-1k")
    group.add_argument("--label_column", default="label", help="Column of the class labels, integers from 0.")
    group.add_argument(
        "--validation_data_files",
        nargs="+",
        help="Files of the validation split, for a training split by --data_files.",
    )
    group.add_argument(
        "--validation_split",
        nargs="+",
        help="One or several, each with a loss of its own; 'none' trains without. Default: validation "
        "or test, if there is one.",
    )
    group.add_argument(
        "--cache_codes",
        action="store_true",
        help="Encode the training split once, into memory and <output_dir>/codes.safetensors.",
    )
    add_view_flags(group, random_flip=True, random_crop=True)

    add_training_flags(parser, output_dir="contextual-rq-transformer-imagenet")

    args = parser.parse_args(argv)
    if args.pretrained_model_name_or_path is None:
        args.pretrained_model_name_or_path = PIPELINES[args.model]
    if args.dataset_name is None and args.train_data_dir is None and args.data_files is None:
        args.dataset_name = "ILSVRC/imagenet-1k"
    check_flags(args)
    return args


def load_pipeline(args, vae, transformer, dataset):
    """The pipeline to be trained; its scheduler or sampler settings from the flags' pipeline, if that has them."""
    source = args.pretrained_model_name_or_path
    kind = DraftAndRevisePipeline if args.model == "contextual" else RQTransformerPipeline
    config = kind.load_config(source) if has_file(source, ".", "model_index.json") else {}
    # The names of the data set go first where they fit: they are those of the labels that are being learned.
    names = getattr((dataset.features or {}).get(args.label_column), "names", None)
    fits = names is not None and len(names) == transformer.config.num_classes
    # But for ImageNet's folders, n01440764 and so on: their order is that of the usual names.
    wnids = fits and all(re.fullmatch(r"n\d{8}", name) for name in names) and config.get("id2label")
    id2label = dict(enumerate(names)) if fits and not wnids else config.get("id2label")
    if args.model == "autoregressive":
        return RQTransformerPipeline(vae, transformer, id2label=id2label, **sampler_settings(config))
    scheduler = DraftAndReviseScheduler()
    if has_file(source, "scheduler", "*.json"):
        scheduler = DraftAndReviseScheduler.from_pretrained(source, subfolder="scheduler")
    return DraftAndRevisePipeline(vae, transformer, scheduler, id2label=id2label)


def class_labels_of(labels, num_classes):
    """Labels, a list of integers, to `(n,)` int64."""
    wrong = [label for label in labels if not isinstance(label, int) or not 0 <= label < num_classes]
    if wrong:
        raise ValueError(
            f"--label_column must hold integers in [0, {num_classes - 1}], the classes of the transformer, got "
            f"{wrong[0]!r}."
        )
    return torch.tensor(labels, dtype=torch.int64)


def main(args):
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir),
        # The only buffer is the codebook, which never changes here: no need to send it before every forward.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    set_seed(args.seed)  # the same in every process, so that all start from the same weights
    repo_id = None
    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        repo_id = create_repository(args)

    # 1. Models, before any data are fetched
    vae = load_vae(args.pretrained_model_name_or_path, args.vae)
    transformer = load_transformer(args.model, args.pretrained_model_name_or_path, args.transformer_config)
    config = transformer.config
    if config.text_vocab_size is not None:
        raise ValueError("The transformer must have classes or no condition, got one of text: use train_cc3m.py.")
    vae.requires_grad_(False).eval().to(accelerator.device)
    transformer.set_codebook(vae.quantizer.codebook)
    check_condition_dropout(args, transformer)
    args.resolution = args.resolution or vae.config.sample_size
    check_resolution(args.resolution, vae, transformer)

    # 2. Data
    label_column = args.label_column if config.num_classes is not None else None
    encode_labels = partial(class_labels_of, num_classes=config.num_classes)
    train_dataset, validation_datasets = load_splits(args, accelerator, label_column, "label_column")
    pipeline = load_pipeline(args, vae, transformer, train_dataset)
    data = (vae, config, label_column, encode_labels)
    skipped = SkippedRows(f"split {args.train_split!r}")
    batches_from, num_images = training_batches(args, accelerator, train_dataset, *data, skipped)
    validation_sets = validation_sets_of(args, accelerator, train_dataset, validation_datasets, *data)

    # 3. Training
    sample_condition = {}
    if config.num_classes is not None:
        count = args.num_validation_images
        sample_condition = {"class_labels": [i * config.num_classes // count for i in range(count)]}
    if args.report_to is not None:
        accelerator.init_trackers("train_imagenet", config=tracked(args))
    is_finished = train(
        args,
        accelerator,
        pipeline,
        None if label_column is None else "class_labels",
        batches_from,
        num_images,
        validation_sets,
        sample_condition,
        skipped,
    )
    if is_finished and accelerator.is_main_process:
        upload(args, repo_id)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
