"""Train a small classifier on a data set of labelled images, for the features that its generated images are scored by.

    accelerate launch examples/train_classifier.py \\
        --data_files data/cifar10/train.parquet --test_files data/cifar10/test.parquet --resolution 32 \\
        --random_flip --max_train_seconds 1800 --output_dir runs/cifar10-classifier

`examples/compute_statistics.py --features runs/cifar10-classifier` and `examples/evaluate.py` take the folder. The
Fréchet distance, precision and recall on such features compare the rows of one table; they are no FID. Train on real
images alone, and keep one classifier for all that is to be compared.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed

from rq_draft_revise.budget import Budget, learning_rate_at
from rq_draft_revise.captions_and_labels import label_names
from rq_draft_revise.data import load_split, split_names
from rq_draft_revise.decoded_images import decoded_rows, to_pixel_values
from rq_draft_revise.divergence import NonFiniteGuard
from rq_draft_revise.features import ImageClassifierModel
from rq_draft_revise.reading_order import training_order
from rq_draft_revise.waiting import main_process_first


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="Hub id, or a local folder that `datasets.load_dataset` reads.")
    group.add_argument("--train_data_dir", help="Folder of images, one folder a class.")
    group.add_argument("--data_files", nargs="+", help="Files of the training split (parquet, csv, json, tar).")
    group.add_argument("--test_files", nargs="+", help="Files of the test split, beside --data_files.")
    group.add_argument("--train_split", default="train")
    group.add_argument("--test_split", help="'none' trains without a test. Default: test or validation, if there is "
                       "one.")  # fmt: skip
    group.add_argument("--image_column", default="image")
    group.add_argument("--label_column", default="label")
    group.add_argument("--resolution", type=int, required=True)
    group.add_argument("--random_flip", action="store_true", help="Mirror half of the images.")
    group.add_argument("--max_shift", type=int, help="Shift images by up to so many pixels. Default: resolution / 8.")

    group = parser.add_argument_group("model")
    group.add_argument("--block_channels", type=int, nargs="+", default=[32, 64, 128], help="The last: the features.")
    group.add_argument("--layers_per_block", type=int, default=2)

    group = parser.add_argument_group("optimization")
    group.add_argument("--train_batch_size", type=int, default=128, help="Images per process.")
    group.add_argument("--num_train_epochs", type=int, default=20)
    group.add_argument("--max_train_steps", type=int, help="Overrides --num_train_epochs.")
    group.add_argument("--max_train_seconds", type=float, help="Stop cleanly, at learning rate 0, after this long.")
    group.add_argument("--learning_rate", type=float, default=2e-3)
    group.add_argument("--lr_warmup_steps", type=int, default=100)
    group.add_argument("--weight_decay", type=float, default=0.05)
    group.add_argument("--label_smoothing", type=float, default=0.1)
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: as accelerate configured.")
    group.add_argument("--seed", type=int, default=0)

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", required=True)
    group.add_argument("--logging_steps", type=int, default=100)

    args = parser.parse_args(argv)
    for name in ("resolution", "layers_per_block", "train_batch_size", "num_train_epochs", "max_train_steps",
                 "logging_steps"):  # fmt: skip
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if args.max_train_seconds is not None and not args.max_train_seconds > 0:
        raise ValueError(f"--max_train_seconds must be positive, got {args.max_train_seconds}.")
    if not 0 <= args.label_smoothing < 1:
        raise ValueError(f"--label_smoothing must lie in [0, 1), got {args.label_smoothing}.")
    if not all(channels >= 8 and channels % 8 == 0 for channels in args.block_channels):
        raise ValueError(f"--block_channels must be multiples of 8, got {args.block_channels}.")
    if args.max_shift is None:
        args.max_shift = args.resolution // 8
    if not 0 <= args.max_shift < args.resolution:
        raise ValueError(f"--max_shift must lie in [0, {args.resolution}), got {args.max_shift}.")
    return args


# ------------------------------------------------------------------------------------------------------------ data


def test_split_of(args) -> str | None:
    """The split to test on, if any: --test_split, or one that is there."""
    if args.test_split == "none" or (args.data_files is not None and not args.test_files):
        return None
    if args.test_split is not None or args.test_files:
        return args.test_split or "test"
    known = split_names(args.dataset_name, args.train_data_dir)
    return next((name for name in ("test", "validation") if name in known), None)


def load_labelled(args, split_argument: str, split: str, data_files) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """All images of a split, uint8 `(N, 3, H, W)`, their labels `(N,)` int64, and the names of the classes."""
    source = {name: getattr(args, name) for name in ("image_column", "dataset_name", "train_data_dir")}
    source |= {"data_files": data_files, "split_argument": split_argument}
    dataset = load_split(split, train_split=split.split("[")[0], **source)
    if args.label_column not in dataset.column_names:
        raise ValueError(f"--label_column must be one of {dataset.column_names}, got {args.label_column!r}.")
    labels = dataset[args.label_column][:]
    names = label_names(dataset, args.label_column)
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise ValueError(f"--label_column must hold class ids, integers from 0 on, got {args.label_column!r}.")
    names = names or [str(label) for label in range(max(labels) + 1)]
    batches = torch.arange(len(dataset)).split(500)
    decoded = decoded_rows(dataset, [batch.tolist() for batch in batches], args.image_column, args.resolution, "cpu")
    images, rows = (torch.cat(parts) for parts in zip(*decoded))  # another row may stand in, with its own label
    return images, torch.tensor(labels)[rows], names


def shift(images: torch.Tensor, max_shift: int, generator: torch.Generator) -> torch.Tensor:
    """Each of `(B, 3, H, W)` images moved by its own whole number of pixels in either direction, edges repeated."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (max_shift,) * 4, mode="replicate")
    tops, lefts = torch.randint(0, 2 * max_shift + 1, (2, batch), generator=generator).to(images.device)
    rows = (tops[:, None] + torch.arange(height, device=images.device))[:, None, :, None]  # (B, 1, H, 1)
    columns = (lefts[:, None] + torch.arange(width, device=images.device))[:, None, None, :]  # (B, 1, 1, W)
    which = torch.arange(batch, device=images.device)[:, None, None, None]
    return padded[which, torch.arange(3, device=images.device)[:, None, None], rows, columns]


@torch.no_grad()
def accuracy(classifier, images, labels, device, batch_size=500) -> float:
    classifier.eval()
    right = 0
    for index in torch.arange(len(images)).split(batch_size):
        logits = classifier(to_pixel_values(images[index].to(device))).logits
        right += (logits.argmax(dim=1).cpu() == labels[index]).sum().item()
    classifier.train()
    return right / len(images)


# ------------------------------------------------------------------------------------------------------------ main


def main(args):
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    device = accelerator.device
    with main_process_first(accelerator):  # one process prepares the files that all then map
        images, labels, names = load_labelled(args, "train_split", args.train_split, args.data_files)
        test, test_split = None, test_split_of(args)
        if test_split is not None:
            test = load_labelled(args, "test_split", test_split, args.test_files)[:2]

    classifier = ImageClassifierModel(
        num_classes=len(names),
        sample_size=args.resolution,
        block_channels=tuple(args.block_channels),
        layers_per_block=args.layers_per_block,
        labels=names,
    )
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(classifier, optimizer)

    total_batch_size = args.train_batch_size * accelerator.num_processes
    max_train_steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(images) / total_batch_size)
    order = training_order(
        len(images), 0, args.train_batch_size, accelerator.process_index, accelerator.num_processes, args.seed
    )
    generator = torch.Generator().manual_seed(args.seed * 1000 + accelerator.process_index)
    parameters = sum(parameter.numel() for parameter in classifier.parameters())
    accelerator.print(
        f"parameters: {parameters:,}; {len(images):,} images of {len(names)} classes, "
        f"{0 if test is None else len(test[0]):,} to test; {max_train_steps:,} steps of {total_batch_size}"
    )

    budget = Budget(accelerator, max_train_steps, args.max_train_seconds)
    guard = NonFiniteGuard(accelerator, max_in_row=10)
    step, total, started = 0, torch.zeros((), device=device), time.monotonic()
    while (fraction := budget.fraction_used(step)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, fraction, args.learning_rate, warmup_steps=args.lr_warmup_steps)
        indices, flips = next(order)
        batch = to_pixel_values(images[indices].to(device), flips.to(device) if args.random_flip else None)
        if args.max_shift:
            batch = shift(batch, args.max_shift, generator)
        with accelerator.autocast():
            logits = model(batch).logits
        loss = F.cross_entropy(logits.float(), labels[indices].to(device), label_smoothing=args.label_smoothing)
        accelerator.backward(loss)
        if guard.accepts(loss.detach(), accelerator.clip_grad_norm_(classifier.parameters(), math.inf)):
            optimizer.step()
            total += loss.detach()
        optimizer.zero_grad()
        step += 1
        if step % args.logging_steps == 0:
            rate = args.logging_steps * total_batch_size / (time.monotonic() - started)
            accelerator.print(
                f"step {step}/{max_train_steps} loss {total.item() / args.logging_steps:.4f} {rate:.0f}/s"
            )
            total, started = torch.zeros_like(total), time.monotonic()

    if accelerator.is_main_process:
        seconds = budget.elapsed()
        record = {
            "steps": step,
            "images": step * total_batch_size,
            "seconds": round(seconds, 1),
            "parameters": parameters,
        }
        record["train_accuracy"] = accuracy(classifier, images[:10_000], labels[:10_000], device)
        if test is not None:
            record["test_accuracy"] = accuracy(classifier, *test, device)
        classifier.save_pretrained(args.output_dir)
        record["arguments"] = vars(args)
        (Path(args.output_dir) / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        tested = f", {record['test_accuracy']:.1%} of the test images right" if test is not None else ""
        print(f"Saved to {args.output_dir} after {step:,} steps, {seconds:,.0f} seconds{tested}.")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
