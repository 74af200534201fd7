"""Train a Contextual RQ-Transformer on images with class labels: classes to maps of codes, over a frozen RQ-VAE.

    accelerate launch examples/train_imagenet.py --vae runs/imagenet-vae --output_dir runs/imagenet-821m

    accelerate launch examples/train_imagenet.py --pretrained_model_name_or_path pipelines/cifar10-32 \\
        --transformer_config pipelines/cifar10-32/transformer --vae runs/cifar10-vae --data_files train.parquet \\
        --validation_data_files test.parquet --cache_codes --train_batch_size 64 --output_dir runs/cifar10

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

from rq_draft_revise.captions_and_labels import class_labels_of, label_names, matched_classes
from rq_draft_revise.conditions import integer_labels
from rq_draft_revise.data import SkippedRows
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
    is_trained,
    load_models,
    load_pipeline,
    pipeline_config,
    train,
)
from rq_draft_revise.training_run import make_accelerator, open_output


PIPELINES = {"contextual": "pipelines/imagenet-256-821m", "autoregressive": "pipelines/rq-imagenet-256-1.4b"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=FlagHelp)

    add_model_flags(
        parser,
        components="vae, transformer and scheduler",
        pipelines=PIPELINES,
        other_sizes="the paper's other sizes (Table 1) lie beside them",
    )

    group = add_data_flags(parser, image_column="image", source="ILSVRC/imagenet-1k")
    group.add_argument("--label_column", default="label", help="Column of the class labels, integers from 0.")
    add_validation_flags(group)
    group.add_argument(
        "--cache_codes",
        action="store_true",
        help="Encode the training split once, into memory and <output_dir>/codes.safetensors.",
    )
    add_view_flags(group, random_flip=True, random_crop=True)

    add_training_flags(parser, output_dir="contextual-rq-transformer-imagenet")

    args = parser.parse_args(argv)
    if args.pretrained_model_name_or_path is None:
        args.pretrained_model_name_or_path = default_pipeline(PIPELINES[args.model])
    if args.dataset_name is None and args.train_data_dir is None and args.data_files is None:
        args.dataset_name = "ILSVRC/imagenet-1k"
    check_flags(args)
    return args


def class_names(args, dataset, num_classes):
    """The names of the classes by number, for prompts in words: the data set's, or those of the flags' pipeline."""
    known = integer_labels(pipeline_config(args).get("id2label"))
    # The names of the data set go first, also where they are fewer: they are those of the labels that are learned.
    names = label_names(dataset, args.label_column)
    if names is None:
        return known
    # But for ImageNet's folders, n01440764 and so on: the order of all of them is that of the usual names.
    if known and len(names) == num_classes and all(re.fullmatch(r"n\d{8}", name) for name in names):
        return known
    return dict(enumerate(names))


def main(args):
    accelerator = make_accelerator(args)

    # 1. Models, before any data are fetched
    vae, transformer = load_models(args, accelerator)
    config = transformer.config
    if config.text_vocab_size is not None:
        raise ValueError("The transformer must have classes or no condition, got one of text: use train_cc3m.py.")
    check_condition_dropout(args, transformer)
    check_resolution(args, vae, transformer)
    repo_id = open_output(args, accelerator)

    # 2. Data
    label_column = args.label_column if config.num_classes is not None else None
    train_dataset, validation_datasets = load_splits(args, accelerator, label_column, "label_column")
    id2label = class_names(args, train_dataset, config.num_classes)
    known, class_ids = integer_labels(pipeline_config(args).get("id2label")), None
    if is_trained(args) and id2label != known:
        class_ids = matched_classes(train_dataset, args.label_column, known, accelerator.print)
        id2label = known if class_ids is not None else id2label
    encode_labels = partial(class_labels_of, num_classes=config.num_classes, class_ids=class_ids)
    pipeline = load_pipeline(args, vae, transformer, id2label=id2label)
    data = (vae, config, label_column, encode_labels)
    skipped = SkippedRows(f"split {args.train_split!r}")
    batches_from, num_images = training_batches(args, accelerator, train_dataset, *data, skipped)
    validation_sets = validation_sets_of(args, accelerator, train_dataset, validation_datasets, *data)

    # 3. Training
    sample_condition = {}
    if config.num_classes is not None:
        count = args.num_validation_images
        sample_condition = {"class_labels": [i * config.num_classes // count for i in range(count)]}
    is_finished = train(
        args,
        accelerator,
        "train_imagenet",
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
