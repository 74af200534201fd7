"""Encode a data set of images once: into one of codes, which the trainers of the second stage read like images.

    accelerate launch examples/encode_dataset.py --vae runs/imagenet-vae --dataset_name ILSVRC/imagenet-1k \\
        --splits train validation --label_column label --random_flip --output_dir data/imagenet-codes
    accelerate launch examples/train_imagenet.py --vae runs/imagenet-vae --dataset_name data/imagenet-codes

    accelerate launch examples/encode_dataset.py --vae runs/cc3m-vae --dataset_name pixparse/cc3m-wds --streaming \\
        --splits train validation --image_column jpg --caption_column txt --output_dir data/cc3m-codes

The result is a data set in parquet files, `<output_dir>/data/<split>-<number>-of-<count>.parquet`, with the columns
`codes` (views, height, width, depth), the caption or label, and `vae`, a digest of the RQ-VAE, so that codes are not
read with another. Views are what training chooses from, anew each epoch: `--num_draws` of them, with another crop
(`--random_crop`) and other codes (`--tau`) each, and with `--random_flip` as many of the mirrored image.

Processes share out the files. Start it again after an interruption: finished files are kept, and other settings than
before are refused. Until all are there they lie in a hidden folder, so that nothing trains on half of them. A stream
is encoded by its own files (a webdataset tar becomes one parquet file), so each process reads only its share of them;
other data sets are cut into `--rows_per_file` rows.
"""

import argparse
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator

from rq_draft_revise.code_cache import digest_of, encoded_rows
from rq_draft_revise.data import CODES_COLUMN, VAE_COLUMN, SkippedRows, is_empty, load_split, local_state, undecoded
from rq_draft_revise.flags import FlagHelp, add_data_flags, add_view_flags, check_flags
from rq_draft_revise.training import check_resolution, load_vae
from rq_draft_revise.waiting import main_process_first, wait_for_everyone
from rq_draft_revise.whole_files import whole_file


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=FlagHelp)
    parser.add_argument("--vae", help="Folder or Hub id of the RQ-VAE. Default: the pipeline's.")
    parser.add_argument("--pretrained_model_name_or_path", default="pipelines/imagenet-256-821m",
                        help="Pipeline whose RQ-VAE encodes.")  # fmt: skip
    group = add_data_flags(parser, image_column="image", source="none, it has to be given", takes_codes=False)
    group.add_argument("--splits", nargs="+", default=["train"],
                       help="Which to encode. With --data_files the one that they are, of any name.")  # fmt: skip
    group.add_argument("--caption_column", help="Column of captions, to be kept. Rows without one are left out.")
    group.add_argument("--label_column", help="Column of class labels, to be kept. Rows without one are left out.")
    add_view_flags(group, random_flip=False, random_crop=False)
    group.add_argument("--rows_per_file", type=int, default=10_000, help="Of the result, unless streaming.")
    group.add_argument("--seed", type=int, default=0, help="Of crops and drawn codes.")
    group.add_argument("--output_dir", required=True, help="Folder of the new data set.")
    args = parser.parse_args(argv)
    if args.dataset_name is None and args.train_data_dir is None and args.data_files is None:
        raise ValueError("Give the images by --dataset_name, --train_data_dir or --data_files.")
    if args.data_files is not None and args.dataset_name is None and len(args.splits) > 1:
        raise ValueError(f"--splits must be one for --data_files, got {args.splits}.")
    split_of = {}
    for split in args.splits:
        name = name_of(split)
        if name in split_of:
            raise ValueError(
                f"--splits must have different names, by which their files go, got {split_of[name]!r} and {split!r}, "
                f"both of {name!r}: encode them into two folders."
            )
        split_of[name] = split
    check_flags(args)
    return args


def name_of(split):
    """What the files of a split are called: "train" of `"train[:90%]"`."""
    return split.split("[")[0]


def settings_of(args, vae):
    """All that the codes depend on, to be compared when the script is started again."""
    names = ("dataset_name", "dataset_config_name", "train_data_dir", "data_files", "splits", "streaming",
             "image_column", "caption_column", "label_column", "resolution", "filter_column", "filter_min",
             "filter_max", "random_flip", "random_crop", "tau", "num_draws", "seed", "rows_per_file")  # fmt: skip
    settings = {name: getattr(args, name) for name in names}
    if args.tau > 0:
        settings["encoding_batch_size"] = args.encoding_batch_size  # its images share a generator
    sources = [args.dataset_name or args.train_data_dir or args.data_files]
    files = local_state(sources[0] if isinstance(sources[0], list) else sources)
    return settings | {"local_files": files, "vae": digest_of(vae)}


def check_same_settings(path, settings):
    """Refuse, with a ValueError, to mix what was encoded with other settings into one data set."""
    if not path.is_file():
        return
    before = json.loads(path.read_text())
    changes = [f"{k} was {before.get(k)!r} and is {v!r}" for k, v in settings.items() if before.get(k) != v]
    if changes:
        raise ValueError(
            f"--output_dir {path.parent} holds codes of other settings: {'; '.join(changes)}. Encode into "
            "another folder."
        )


def parts_of(dataset, args):
    """How many files a split becomes, and a function from a file's number to its rows, the first one's number, and the
    seed of their crops and codes.

    The rows of a stream are counted from the beginning of each of its files, so each file has a seed of its own.
    """
    if not isinstance(dataset, datasets.Dataset):

        def streamed_part(k):
            seed = int(np.random.default_rng([args.seed, k]).integers(2**62))
            return dataset.shard(dataset.num_shards, k), 0, seed

        return dataset.num_shards, streamed_part
    num_files = -(-len(dataset) // args.rows_per_file)

    def part(k):
        first = k * args.rows_per_file
        return dataset.select(range(first, min(first + args.rows_per_file, len(dataset)))), first, args.seed

    return num_files, part


def chunks_of(part, first_row, image_column, size=1000):
    """A part as data sets to be read by number, with each one's first row."""
    if isinstance(part, datasets.Dataset):
        yield part, first_row
        return
    part = undecoded(part, image_column)
    for rows in part.batch(size):
        yield datasets.Dataset.from_dict(rows, features=part.features), first_row
        first_row += len(next(iter(rows.values())))


def encode_part(args, part, first_row, seed, vae, device, digest, skipped):
    """The rows of one file: a `datasets.Dataset` of codes."""
    kept = [column for column in (args.caption_column, args.label_column) if column is not None]
    height = width = args.resolution // vae.spatial_scale_factor
    num_views = args.num_draws * (1 + args.random_flip)
    shape = (num_views, height, width, vae.config.code_depth)
    dtype = "uint16" if vae.config.codebook_size <= 2**16 else "int32"
    features = {CODES_COLUMN: datasets.Array4D(shape, dtype), VAE_COLUMN: datasets.Value("string")}
    columns = {column: [] for column in kept}
    codes = []
    for chunk, first in chunks_of(part, first_row, args.image_column):
        values = {column: chunk[column][:] for column in kept}
        rows = []
        for row in range(len(chunk)):
            empty = [column for column in kept if is_empty(values[column][row])]
            if empty:
                skipped.add(f"an empty {empty[0]!r}", f"row {first + row}")
            else:
                rows.append(row)
        for encoded, batch in encoded_rows(
            chunk, vae, args.image_column, args.resolution, rows, device, args.encoding_batch_size, args.num_draws,
            args.random_flip, args.random_crop, args.tau, seed, first, args.dataloader_num_workers, skipped,
        ):  # fmt: skip
            codes.append(batch.numpy())
            for column in kept:
                columns[column] += [values[column][row] for row in encoded]
    features |= {column: part.features[column] for column in kept}
    codes = np.concatenate(codes) if codes else np.empty((0, *shape), dtype)
    return datasets.Dataset.from_dict(
        {CODES_COLUMN: codes, VAE_COLUMN: [digest] * len(codes), **columns}, features=datasets.Features(features)
    )


def card_of(args, settings, counts):
    """README.md: where `datasets` finds the splits, and what was done."""
    splits = "".join(f"  - split: {split}\n    path: data/{split}-*.parquet\n" for split in counts)
    rows = "".join(f"| {split} | {count:,} |\n" for split, count in counts.items())
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n# Codes\n\nImages as the codes of an "
        f"RQ-VAE, written by `examples/encode_dataset.py` of rq_draft_revise.\n\n| split | rows |\n|---|---|\n{rows}\n"
        f"```json\n{json.dumps(settings, indent=2)}\n```\n"
    )


def main(args):
    accelerator = Accelerator()
    datasets.disable_progress_bars()
    device = accelerator.device
    output_dir = Path(args.output_dir)
    vae = load_vae(args.pretrained_model_name_or_path, args.vae).requires_grad_(False).eval().to(device)
    check_resolution(args, vae)
    settings = settings_of(args, vae)
    check_same_settings(output_dir / ".encoding.json", settings)
    is_finished = (output_dir / "data").is_dir()
    wait_for_everyone(accelerator)  # nobody writes before all have looked
    if is_finished:
        accelerator.print(f"{output_dir} is finished, with these settings.")
        return
    unfinished = output_dir / ".unfinished"
    if accelerator.is_main_process:
        unfinished.mkdir(parents=True, exist_ok=True)
        (output_dir / ".encoding.json").write_text(json.dumps(settings, indent=2) + "\n")
    accelerator.wait_for_everyone()

    counts = {}
    for split in args.splits:
        with main_process_first(accelerator):  # one process prepares the files that all then map
            dataset = load_split(
                split, args.image_column, args.caption_column, args.dataset_name, args.train_data_dir, args.data_files,
                split, args.label_column, args.dataset_config_name, args.streaming, args.filter_column,
                args.filter_min, args.filter_max, split_argument="splits",
            )  # fmt: skip
        num_files, part = parts_of(dataset, args)
        name = name_of(split)
        paths = [unfinished / f"{name}-{k:05d}-of-{num_files:05d}.parquet" for k in range(num_files)]
        for k in range(accelerator.process_index, num_files, accelerator.num_processes):
            if paths[k].is_file():
                print(f"{paths[k].name}: encoded before", flush=True)
                continue
            skipped = SkippedRows(f"what becomes {paths[k].name}")
            encoded = encode_part(args, *part(k), vae, device, settings["vae"], skipped)
            with whole_file(paths[k]) as aside:
                encoded.to_parquet(aside)
            print(f"{paths[k].name}: {len(encoded):,} rows, skipped: {skipped}", flush=True)
        wait_for_everyone(accelerator)
        if accelerator.is_main_process:
            counts[name] = sum(pq.read_metadata(path).num_rows for path in paths)
    if accelerator.is_main_process:
        (output_dir / "README.md").write_text(card_of(args, settings, counts))
        unfinished.rename(output_dir / "data")
        print(f"Saved to {output_dir}: {', '.join(f'{n:,} rows of {split}' for split, n in counts.items())}.")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    with torch.no_grad():
        main(parse_args())
