"""Compute the statistics of real images that FID, precision and recall compare generated ones with.

    accelerate launch examples/compute_statistics.py \\
        --dataset_name imagenet-1k --split train --resolution 256 \\
        --protocol torch-fidelity --features inception --output statistics/imagenet-256.npz

Into the npz go mean and covariance of the features of all images, the features of some of them for precision and
recall, and a record of what they are: `examples/evaluate.py` refuses images of another resolution, protocol or
network.
Plain `python examples/compute_statistics.py ...` is the same on one process.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from rq_draft_revise.data import load_split
from rq_draft_revise.features import PROTOCOLS, FeatureNetwork, NetworkOutput, get_protocol, load_feature_network
from rq_draft_revise.metrics import ReferenceStatistics, RunningMoments
from rq_draft_revise.waiting import main_process_first, wait_for_everyone


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="Hub id, or a local folder that `datasets.load_dataset` reads.")
    group.add_argument("--train_data_dir", help="Folder of images.")
    group.add_argument("--data_files", nargs="+", help="Files of the split (parquet, csv, json, tar).")
    group.add_argument("--split", default="train")
    group.add_argument("--image_column", default="image")
    group.add_argument("--max_images", type=int, help="Only the first so many.")
    group.add_argument("--resolution", type=int, required=True, help="Of the generated images to compare with.")

    group = parser.add_argument_group("features")
    add_network_arguments(group)
    group.add_argument("--batch_size", type=int, default=100)
    group.add_argument("--dataloader_num_workers", type=int, default=0)

    group = parser.add_argument_group("output")
    group.add_argument("--output", required=True, help="The npz file to write.")
    group.add_argument("--num_features", type=int, default=10_000,
                       help="Images, drawn by a fixed seed, whose features precision and recall get.")  # fmt: skip
    group.add_argument("--format", choices=["parent", "adm"], default="parent",
                       help="`adm` also keeps those images and sFID's moments, for ADM's evaluator.")  # fmt: skip

    args = parser.parse_args(argv)
    for name, least in (("resolution", 1), ("batch_size", 1), ("max_images", 2), ("num_features", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    if not args.output.endswith(".npz"):
        raise ValueError(f"--output must end in .npz, got {args.output}.")
    return args


# -------------------------------------------------------------------------------------------------------- networks


def add_network_arguments(group):
    group.add_argument("--features", default="inception",
                       help="inception; the folder of a classifier by examples/train_classifier.py; a TorchScript "
                       "file (.pt, .ts); or emoji:<file>, of examples/emoji_scenes.py evaluate.")  # fmt: skip
    group.add_argument("--inception_weights", help="weights-inception-2015-12-05-6726825d.pth of torch-fidelity. "
                       "Default: from torch's cache, or downloaded.")  # fmt: skip
    group.add_argument("--protocol", choices=sorted(PROTOCOLS), default="torch-fidelity",
                       help="How images are resized and rounded.")  # fmt: skip


def check_files(args) -> None:
    """Refuse, with a `ValueError` before any work, --features or --reference where there is nothing."""
    for flag in ("features", "reference"):
        value = getattr(args, flag, None)
        if value not in (None, "inception") and not Path(value.removeprefix("emoji:")).exists():
            raise ValueError(f"--{flag} must name a file or folder that is there, got {value!r}: there is none.")


class SceneFeatures(torch.nn.Module):
    """The emoji classifier's features, mean over the image, with its logits for the object."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, images):
        images = images.float() / 255  # (B, 3, H, W)
        features = self.classifier.features(2 * images - 1).mean(dim=(2, 3))  # (B, C)
        return NetworkOutput(features, self.classifier(images)[0])


def load_network(args, device, return_spatial: bool = False) -> FeatureNetwork:
    """The network that --features names."""
    if not args.features.startswith("emoji:"):
        return load_feature_network(args.features, args.protocol, args.inception_weights, device, return_spatial)
    # Imported here: only this classifier needs what `emoji_scenes` needs.
    import json

    from emoji_evaluation import SceneClassifier
    from safetensors import SafetensorError, safe_open

    path = args.features.removeprefix("emoji:")
    if args.inception_weights is not None or return_spatial:
        raise ValueError(f"--inception_weights and --format adm are for --features inception, got {args.features}.")
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["record"])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no dictionary
        classifier = SceneClassifier(len(record["objects"]), len(record["backdrops"]))
        classifier.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"--features must name a classifier of emoji scenes, and {path} is not one: {error}"
        ) from error
    return FeatureNetwork(SceneFeatures(classifier), "emoji-classifier", device)


# ------------------------------------------------------------------------------------------------------------ data


class PreparedImages(torch.utils.data.Dataset):
    """Images of a data set as a protocol prepares them, uint8 `(3, resolution, resolution)`."""

    def __init__(self, dataset, image_column, protocol, resolution):
        self.dataset, self.image_column, self.resolution = dataset, image_column, resolution
        self.protocol_name = protocol  # and not the protocol, for workers that are not forked

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            image = self.dataset[index][self.image_column]
            return get_protocol(self.protocol_name).prepare(image, self.resolution)
        except (OSError, SyntaxError, ValueError) as error:  # an image left out would not be noticed in the figures
            raise ValueError(f"Image {index} of the data set cannot be read: {error}") from error


def load_images(args) -> PreparedImages:
    source = {name: getattr(args, name) for name in ("image_column", "dataset_name", "train_data_dir", "data_files")}
    # What --data_files hold is the split they are asked for by.
    dataset = load_split(args.split, train_split=args.split.split("[")[0], **source)
    return PreparedImages(
        dataset.select_columns([args.image_column]), args.image_column, args.protocol, args.resolution
    )


# ------------------------------------------------------------------------------------------------------------ main


def main(args):
    check_files(args)
    accelerator = Accelerator()
    with main_process_first(accelerator):  # one process prepares the files that all then map
        images = load_images(args)
    num_images = min(len(images), args.max_images or len(images))
    if num_images < 2:
        raise ValueError(f"The data set must have at least 2 images for a covariance, got {num_images}.")
    network = load_network(args, accelerator.device, return_spatial=args.format == "adm")

    # The images whose features are kept: a data set may be sorted by class.
    kept = np.random.default_rng(0).permutation(num_images)[: args.num_features]
    kept = set(kept.tolist())

    batches = [
        range(first, min(first + args.batch_size, num_images)) for first in range(0, num_images, args.batch_size)
    ]
    batches = batches[accelerator.process_index :: accelerator.num_processes]
    loader = torch.utils.data.DataLoader(images, batch_sampler=batches, num_workers=args.dataloader_num_workers)
    moments, spatial_moments = RunningMoments(), RunningMoments()
    kept_features, kept_images = {}, {}
    started = time.monotonic()
    for indices, batch in zip(batches, tqdm(loader, disable=not accelerator.is_main_process, unit="batch")):
        output = network(batch)
        moments.update(output.features)
        if output.spatial is not None:
            spatial_moments.update(output.spatial)
        for row, index in enumerate(indices):
            if index in kept:
                kept_features[index] = output.features[row].clone()
                if args.format == "adm":
                    kept_images[index] = batch[row].permute(1, 2, 0).numpy().copy()

    parts = [(moments, spatial_moments, kept_features, kept_images)]
    wait_for_everyone(accelerator)
    if accelerator.num_processes > 1:
        parts = gather_object(parts)
    if accelerator.is_main_process:
        moments, spatial_moments, kept_features, kept_images = parts[0]
        for other, other_spatial, features, pictures in parts[1:]:
            moments.merge(other)
            spatial_moments.merge(other_spatial)
            kept_features |= features
            kept_images |= pictures
        assert moments.num_samples == num_images and len(kept_features) == len(kept)
        mean, covariance = moments.compute()
        mean_spatial, covariance_spatial = spatial_moments.compute() if spatial_moments.num_samples else (None, None)
        ReferenceStatistics(
            mean,
            covariance,
            num_samples=num_images,
            resolution=args.resolution,
            protocol=args.protocol,
            network=network.name,
            network_sha256=network.sha256,
            features=torch.stack([kept_features[i] for i in sorted(kept)]) if kept else None,
            images=np.stack([kept_images[i] for i in sorted(kept)]) if kept_images else None,
            mean_spatial=mean_spatial,
            covariance_spatial=covariance_spatial,
        ).save(args.output)
        seconds = time.monotonic() - started
        print(f"{args.output}: {num_images:,} images at {args.resolution}x{args.resolution}, {seconds:,.0f} s")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
