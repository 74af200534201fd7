"""Sample a pipeline's images and score them; or reconstruct images and score the RQ-VAE.

    accelerate launch examples/evaluate.py \\
        --pipeline runs/imagenet-821m --num_images 50000 --batch_size 100 \\
        --reference statistics/imagenet-256.npz --output_dir runs/imagenet-821m/evaluation

Plain `python examples/evaluate.py ...` is the same on one process. (Several processes on CPUs take
`ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/evaluate.py ...`: `accelerate launch --cpu` starts one,
whatever its --num_processes.)

Image i is drawn from its class or caption by a generator of its own, seeded with (--seed, i), in a batch that is the
same for any number of processes. What is known of a batch is written aside and renamed: a run that was killed is taken
up by the same command, and makes no image of a finished batch again. `results.json` says everything that the figures
depend on.
"""

import argparse
import dataclasses
import hashlib
import inspect
import json
import os
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from compute_statistics import add_network_arguments, check_files, load_images, load_network
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from tqdm import tqdm

from rq_draft_revise import DraftAndRevisePipeline, RQTransformerPipeline, RQVAEModel
from rq_draft_revise.captions_and_labels import input_ids_sha256
from rq_draft_revise.data import is_empty, load_split, local_state
from rq_draft_revise.decoded_images import UNREADABLE
from rq_draft_revise.devices import float64_device
from rq_draft_revise.features import CLIPEmbeddings, get_protocol, reference_features
from rq_draft_revise.images import decode_codes, encode_pixels
from rq_draft_revise.metrics import (
    ReferenceStatistics,
    check_features,
    check_num_samples,
    clip_score,
    frechet_distance,
    inception_score,
    moments,
    precision_and_recall,
    psnr,
    ssim,
)
from rq_draft_revise.provenance import (
    check_same_run,
    config_sha256,
    file_sha256,
    git_revision,
    hardware,
    image_digest,
    image_seed,
    json_sha256,
    library_versions,
    public,
    read_batch,
    save_batch,
    weights_sha256,
    write_json,
)
from rq_draft_revise.publishing import pipeline_class_of
from rq_draft_revise.waiting import main_process_first, wait_for_everyone
from rq_draft_revise.whole_files import whole_file


GENERATION_METRICS = ("fid", "inception_score", "precision_recall", "clip_score")
RECONSTRUCTION_METRICS = ("rfid", "psnr", "ssim", "lpips")
NEIGHBOR = 3  # k of precision and recall
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
SAMPLER_ARGUMENTS = ("num_inference_steps", "num_revise_steps", "num_revisions", "guidance_scale", "temperature",
                     "draft_guidance_scale", "draft_temperature", "selection", "top_k", "top_p")  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    group = parser.add_argument_group("what to evaluate")
    group.add_argument("--pipeline", required=True, help="Folder or Hub id of a pipeline of this package.")
    group.add_argument("--reconstruct", action="store_true",
                       help="Reconstruct images of a data set by the pipeline's RQ-VAE, instead.")  # fmt: skip
    group.add_argument("--num_images", type=int,
                       help="A multiple of the classes, or of the captions unless it is fewer. Default: one a caption "
                       "or image of the data set; 50,000 otherwise.")  # fmt: skip
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--batch_size", type=int, default=100, help="Images sampled together by one process.")
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
                       help="float32 gives the same codes with any batch size, on the CPU.")  # fmt: skip

    group = parser.add_argument_group("captions, or images to reconstruct")
    group.add_argument("--captions", help="Text file in UTF-8, one caption a line; none may be blank.")
    group.add_argument("--dataset_name", help="Hub id, or a local folder that `datasets.load_dataset` reads.")
    group.add_argument("--train_data_dir", help="Folder of images to reconstruct.")
    group.add_argument("--data_files", nargs="+", help="Files of the split (parquet, csv, json, tar).")
    group.add_argument("--split", default="test")
    group.add_argument("--image_column", default="image")
    group.add_argument("--caption_column", default="text")

    group = parser.add_argument_group("sampler: by default as saved with the pipeline")
    group.add_argument("--num_inference_steps", type=int)
    group.add_argument("--num_revise_steps", type=int)
    group.add_argument("--num_revisions", type=int)
    group.add_argument("--guidance_scale", type=float)
    group.add_argument("--temperature", type=float)
    group.add_argument("--draft_guidance_scale", type=float)
    group.add_argument("--draft_temperature", type=float)
    group.add_argument("--selection", help="random, top-c or top-c-50%%.")
    group.add_argument("--top_k", type=int, nargs="+", help="One number, or for an RQ-Transformer one a depth.")
    group.add_argument("--top_p", type=float, nargs="+", help="One number, or for an RQ-Transformer one a depth.")

    group = parser.add_argument_group("scores")
    group.add_argument("--metrics", nargs="*", choices=[*GENERATION_METRICS, *RECONSTRUCTION_METRICS],
                       help="Default: fid inception_score precision_recall, or rfid psnr ssim.")  # fmt: skip
    add_network_arguments(group)
    group.add_argument(
        "--reference", help="npz by examples/compute_statistics.py, or of ADM's or the parent's format."
    )
    group.add_argument("--trust_reference", action="store_true",
                       help="Take what the reference file does not say of itself for fitting.")  # fmt: skip
    group.add_argument("--allow_few_samples", action="store_true", help="Score fewer than 10,000 images.")
    group.add_argument("--clip", default="openai/clip-vit-base-patch32", help="Hub id or folder, for clip_score.")
    group.add_argument("--lpips_weights", help="VGG16's weights, for lpips. Default: torchvision downloads them.")
    group.add_argument("--scoring_batch_size", type=int, default=100, help="Images in the networks at a time.")

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", required=True)
    group.add_argument("--save_images", action="store_true", help="Keep the images: <output_dir>/images/000123.png.")

    args = parser.parse_args(argv)
    if args.metrics is None:
        args.metrics = ["rfid", "psnr", "ssim"] if args.reconstruct else ["fid", "inception_score", "precision_recall"]
    allowed = RECONSTRUCTION_METRICS if args.reconstruct else GENERATION_METRICS
    for metric in args.metrics:
        if metric not in allowed:
            kind = "reconstructions" if args.reconstruct else "sampled images"
            raise ValueError(f"--metrics must be among {allowed} for {kind}, got {metric}.")
    for name in ("num_images", "batch_size", "scoring_batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must lie in [0, 2**63), got {args.seed}.")
    if args.captions is not None and (args.dataset_name is not None or args.data_files is not None):
        raise ValueError("Give the captions by --captions or by a data set, not both.")
    if not args.reference and {"fid", "precision_recall"} & set(args.metrics):
        raise ValueError("--reference must be given for fid and precision_recall: see examples/compute_statistics.py.")
    if not args.metrics and not args.save_images:
        raise ValueError("--metrics must name one, or --save_images be given: there is nothing to do.")
    for name in ("top_k", "top_p"):
        value = getattr(args, name)
        setattr(args, name, value[0] if value is not None and len(value) == 1 else value)
    return args


# -------------------------------------------------------------------------------------- what is drawn, image by image


def read_captions(args) -> list[str]:
    """Of a file or a data set. One that is blank or no text is refused: left out, it would move all after it."""
    if args.captions is not None:
        try:
            text = Path(args.captions).read_text(encoding="utf-8-sig")  # a byte order mark is no part of a caption
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--captions must be a text file in UTF-8, got {args.captions}: {error}.") from error
        # Not `splitlines`, which also ends a line at U+0085 or U+2028.
        captions = [line.strip() for line in text.removesuffix("\n").split("\n")] if text else []
        flag, place, first = "--captions", f"line {{}} of {args.captions}", 1
    elif args.dataset_name is None and args.data_files is None:
        raise ValueError("This pipeline draws captions: give them by --captions, --dataset_name or --data_files.")
    else:
        source = {"dataset_name": args.dataset_name, "data_files": args.data_files, "train_split": args.split}
        rows = load_split(args.split, image_column=None, caption_column=args.caption_column, **source)
        captions = list(rows[args.caption_column])
        flag, place, first = "--caption_column", f"row {{}} of {args.dataset_name or args.data_files}", 0
    if not captions:
        raise ValueError(f"There is no caption in {args.captions or args.dataset_name or args.data_files}.")
    for number, caption in enumerate(captions, start=first):
        if not isinstance(caption, str) or is_empty(caption):
            raise ValueError(f"{flag} must hold texts that are not blank, got {caption!r} in {place.format(number)}.")
    return captions


def conditions_of_all_images(args, transformer) -> tuple[str | None, list]:
    """The argument of the pipeline's call that conditions it, and its value for each image of the run.

    Classes take turns, 0, 1, 2, ..., 0, 1, 2, ..., and captions too, so that all come exactly as often.
    """
    if transformer.config.num_classes is not None:
        name, choices = "class_labels", list(range(transformer.config.num_classes))
    elif transformer.config.text_vocab_size is not None:
        name, choices = "prompt", read_captions(args)
        choices = choices[: args.num_images]
    else:
        name, choices = None, [None]
    if name != "prompt" and args.captions is not None:
        raise ValueError("--captions are for a text-conditional pipeline, and this one is not.")
    num_images = args.num_images or (len(choices) if name == "prompt" else 50_000)
    if num_images % len(choices):
        kind = "classes" if name == "class_labels" else "captions"
        raise ValueError(
            f"--num_images must be a multiple of the {len(choices):,} {kind}, so that all come equally often, got "
            f"{num_images:,}."
        )
    return name, choices * (num_images // len(choices))


class Sampling:
    """Images of a pipeline."""

    def __init__(self, args, device):
        kind = pipeline_class_of(args.pipeline)
        if kind not in (DraftAndRevisePipeline, RQTransformerPipeline):
            raise ValueError(
                f"--pipeline must be one that needs no image, a {DraftAndRevisePipeline.__name__} or "
                f"{RQTransformerPipeline.__name__}, got a {kind.__name__} in {args.pipeline}."
            )
        self.pipe = kind.from_pretrained(args.pipeline, dtype=getattr(torch, args.dtype)).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        transformer = self.pipe.transformer
        self.condition, self.conditions = conditions_of_all_images(args, transformer)
        self.num_images = len(self.conditions)
        factor = self.pipe.vae.spatial_scale_factor
        height, width = transformer.config.height * factor, transformer.config.width * factor
        if height != width:
            raise ValueError(f"Only pipelines of square images can be scored, got {height}x{width}.")
        self.resolution, self.seed, self.protocol = height, args.seed, get_protocol(args.protocol)

        self.given = {name: getattr(args, name) for name in SAMPLER_ARGUMENTS if getattr(args, name) is not None}
        accepted = inspect.signature(kind.__call__).parameters
        for name, value in self.given.items():
            if name not in accepted:
                raise ValueError(f"--{name} is no argument of {kind.__name__}, got {value}.")
        # The pipeline checks the values themselves; better now than after the networks are loaded.
        example = {} if self.condition is None else {self.condition: self.conditions[:1]}
        self.pipe.check_inputs(**example, **self.given)
        defaults = self.pipe.scheduler.config if hasattr(self.pipe, "scheduler") else self.pipe.config
        self.sampler = {
            name: self.given.get(name, defaults.get(name)) for name in SAMPLER_ARGUMENTS if name in accepted
        }

    def record(self) -> dict[str, Any]:
        """All that the images depend on."""
        counts = {}
        for condition in self.conditions:
            counts[condition] = counts.get(condition, 0) + 1
        images_each = sorted(set(counts.values()))
        scheduler = getattr(self.pipe, "scheduler", None)
        models = {name: getattr(self.pipe, name) for name in ("vae", "transformer")}
        seen_of_captions, config = {}, self.pipe.transformer.config
        if self.condition == "prompt":
            tokens = (self.pipe.tokenizer, config.max_text_length, config.text_vocab_size)
            seen_of_captions = {"input_ids_sha256": input_ids_sha256(self.conditions, *tokens)}
        return {
            "pipeline_class": type(self.pipe).__name__,
            "weights_sha256": {name: weights_sha256(model) for name, model in models.items()},
            "config_sha256": {name: config_sha256(model) for name, model in models.items()},
            "sampler": self.sampler,
            "scheduler_config": None if scheduler is None else public(scheduler.config),
            "condition": self.condition,
            "num_conditions": len(counts),
            "images_per_condition": images_each[0] if len(images_each) == 1 else images_each,
            "conditions_sha256": json_sha256(self.conditions),
            **seen_of_captions,
            "seed": self.seed,
            "seed_of_image_i": "high, low = SeedSequence([seed, i]).generate_state(2); (high >> 1) << 32 | low",
        }

    def make(self, indices: range) -> torch.Tensor:
        """The images of these indices, uint8 `(B, 3, H, W)`."""
        generators = [torch.Generator().manual_seed(image_seed(self.seed, index)) for index in indices]
        if self.condition is None:
            what = {"num_images_per_prompt": len(indices)}
        else:
            what = {self.condition: [self.conditions[index] for index in indices]}
        images = self.pipe(**what, generator=generators, output_type="pt", **self.given).images  # [0, 1]
        return self.protocol.to_uint8(images).cpu()


class Reconstruction:
    """Images of a data set, encoded and decoded by an RQ-VAE."""

    def __init__(self, args, device):
        subfolder = None if (Path(args.pipeline) / "config.json").is_file() else "vae"
        self.vae = RQVAEModel.from_pretrained(args.pipeline, subfolder=subfolder, dtype=getattr(torch, args.dtype))
        self.vae.to(device).eval()
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae.spatial_scale_factor)
        args.resolution = self.resolution = self.vae.config.sample_size
        self.originals = load_images(args)
        self.source = {name: getattr(args, name) for name in
                       ("dataset_name", "train_data_dir", "data_files", "split", "image_column")}  # fmt: skip
        folder = args.dataset_name or args.train_data_dir
        # Of the Hub's files, what `datasets` knows their revision by.
        self.fingerprint = (
            local_state(args.data_files if folder is None else [folder]) or self.originals.dataset._fingerprint
        )
        self.num_images = args.num_images or len(self.originals)
        if self.num_images > len(self.originals):
            raise ValueError(f"--num_images must be at most {len(self.originals):,}, the images of the data set, got "
                             f"{self.num_images:,}.")  # fmt: skip
        self.protocol = get_protocol(args.protocol)
        self._read = (None, None)  # the last batch: it is reconstructed, then compared

    def record(self) -> dict[str, Any]:
        """All that the reconstructions depend on; of the data set where it is, and of its pixels a digest later."""
        return {
            "originals": self.source,
            "originals_fingerprint": self.fingerprint,
            "pipeline_class": type(self.vae).__name__,
            "weights_sha256": {"vae": weights_sha256(self.vae)},
            "config_sha256": {"vae": config_sha256(self.vae)},
            "codes": {name: self.vae.config[name] for name in ("code_depth", "codebook_size")},
        }

    def read(self, indices: range) -> torch.Tensor:
        """The originals, uint8 `(B, 3, H, W)`."""
        if self._read[0] != indices:
            self._read = (indices, torch.stack([self.originals[index] for index in indices]))
        return self._read[1]

    def make(self, indices: range) -> torch.Tensor:
        """Their reconstructions, uint8 `(B, 3, H, W)`."""
        codes = encode_pixels(self.vae, self.read(indices).to(self.vae.device) / 255)
        images = decode_codes(self.vae, self.image_processor, codes, output_type="pt")  # [0, 1]
        return self.protocol.to_uint8(images).cpu()


# ------------------------------------------------------------------------------------------- what is known of a batch


def image_path(output_dir: Path, index: int) -> Path:
    return output_dir / "images" / f"{index:06d}.png"


def save_images(output_dir: Path, indices: range, images: torch.Tensor) -> None:
    for index, image in zip(indices, images):
        with whole_file(image_path(output_dir, index)) as aside:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(aside, format="PNG", compress_level=1)


def has_image(path: Path) -> bool:
    """Whether there is a PNG that ends as one: a look at twelve bytes, before all images are read."""
    if not path.is_file() or path.stat().st_size < len(PNG_END):
        return False
    with path.open("rb") as file:
        file.seek(-len(PNG_END), os.SEEK_END)
        return file.read() == PNG_END


def load_saved_images(output_dir: Path, indices: range, resolution: int) -> torch.Tensor | None:
    """The images of a batch, uint8 `(B, 3, H, W)`, or None unless all are there and can be read.

    Raises:
        `ValueError`: one of another size or mode, which this script has not written.
    """
    paths, images = [image_path(output_dir, index) for index in indices], []
    if not all(map(has_image, paths)):
        return None
    for path in paths:
        try:
            with Image.open(path, formats=["PNG"]) as image:
                image.load()
        except UNREADABLE:
            return None
        if image.mode != "RGB" or image.size != (resolution, resolution):
            raise ValueError(
                f"{path} must be an RGB image of {resolution}×{resolution} pixels, as this run makes them, got "
                f"{image.mode} of {image.width}×{image.height}. Delete it, and it is made again."
            )
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return torch.stack(images)


@dataclasses.dataclass
class Networks:
    """What the metrics asked for look at images with; None where none of them does."""

    features: Any = None
    clip: CLIPEmbeddings | None = None
    lpips: Any = None

    @classmethod
    def load(cls, args, device) -> "Networks":
        networks = cls()
        if {"fid", "inception_score", "precision_recall", "rfid"} & set(args.metrics):
            networks.features = load_network(args, device)
        if "clip_score" in args.metrics:
            networks.clip = CLIPEmbeddings(args.clip).to(device)
        if "lpips" in args.metrics:
            from rq_draft_revise.losses import PerceptualLoss

            networks.lpips = PerceptualLoss(args.lpips_weights).to(device)
        return networks

    def record(self) -> dict[str, Any]:
        parts = {"clip": self.clip, "lpips": self.lpips}
        record = {f"{name}_sha256": weights_sha256(part) for name, part in parts.items() if part is not None}
        if self.features is not None:
            record |= {"network": self.features.name, "network_sha256": self.features.sha256}
        return record


@torch.no_grad()
def measure(
    networks: Networks, work, indices: range, images: torch.Tensor, batch_size: int
) -> dict[str, torch.Tensor]:
    """All numbers of a batch that the metrics are computed from, a row an image."""
    measured = {
        "index": torch.tensor(list(indices)),
        "digest": torch.tensor([image_digest(image) for image in images]),
    }

    def look(images: torch.Tensor, prefix: str = "") -> None:
        outputs = [networks.features(part) for part in images.split(batch_size)]
        measured[f"{prefix}features"] = torch.cat([output.features for output in outputs])
        if outputs[0].logits is not None:
            measured[f"{prefix}logits"] = torch.cat([output.logits for output in outputs])

    if networks.features is not None:
        look(images)
    if networks.clip is not None:
        captions = [work.conditions[index] for index in indices]
        scores = [
            clip_score(*networks.clip(images[start : start + batch_size], captions[start : start + batch_size]))
            for start in range(0, len(images), batch_size)
        ]
        measured["clip_score"] = torch.cat(scores)
    if isinstance(work, Reconstruction):
        originals = work.read(indices)
        measured["original_digest"] = torch.tensor([image_digest(image) for image in originals])
        device = float64_device(work.vae.device)
        pairs = list(zip(images.split(batch_size), originals.split(batch_size)))
        compared = [tuple(part.to(device) for part in pair) for pair in pairs]
        measured["psnr"] = torch.cat([psnr(*pair).cpu() for pair in compared])
        if min(images.shape[2:]) >= 11:
            measured["ssim"] = torch.cat([ssim(*pair).cpu() for pair in compared])
        if networks.features is not None:
            look(originals, "original_")
        if networks.lpips is not None:
            device = next(networks.lpips.buffers()).device
            distances = [
                networks.lpips.metric(*(part.to(device).float() / 127.5 - 1 for part in pair)).flatten().cpu()
                for pair in pairs
            ]
            measured["lpips"] = torch.cat(distances)
    return measured


def check_networks(networks: Networks, work, args) -> None:
    """Try the networks on one image: what does not fit shows before the sampling, not after it."""
    blank = torch.zeros(1, 3, work.resolution, work.resolution, dtype=torch.uint8)
    if networks.features is not None:
        output = networks.features(blank)
        if "inception_score" in args.metrics and output.logits is None:
            raise ValueError(
                f"--metrics inception_score needs logits, which --features {args.features} does not have."
            )
    if networks.clip is not None and work.condition != "prompt":
        raise ValueError("--metrics clip_score needs captions, and this pipeline is not text-conditional.")
    if networks.lpips is not None and work.resolution < networks.lpips.minimum_size:
        raise ValueError(
            f"--metrics lpips needs images of {networks.lpips.minimum_size} pixels, got {work.resolution}."
        )
    if "ssim" in args.metrics and work.resolution < 11:
        raise ValueError(f"--metrics ssim needs images of at least 11 pixels, got {work.resolution}.")


# ---------------------------------------------------------------------------------------------------------- scores


def score(
    args, measured: dict[str, torch.Tensor], reference: ReferenceStatistics | None, networks: Networks, device
) -> tuple[dict[str, float], dict[str, Any]]:
    """The metrics of all images together, and what else they were computed from."""
    protocol = get_protocol(args.protocol)
    device = float64_device(device)  # precision and recall are 20 TFLOP for 50,000 images
    scores, settings = {}, {"allow_few_samples": args.allow_few_samples}
    for metric in args.metrics:
        if metric == "fid":
            generated = moments(measured["features"])
            scores["fid"] = frechet_distance(reference.mean, reference.covariance, *generated)
        elif metric == "inception_score":
            mean, std = inception_score(measured["logits"], **protocol.inception_score)
            scores |= {"inception_score": mean, "inception_score_std": std}
            settings["inception_score"] = protocol.inception_score
        elif metric == "precision_recall":
            real = reference_features(reference, networks.features)
            scores |= precision_and_recall(real.to(device), measured["features"].to(device), k=NEIGHBOR)
            settings["precision_recall"] = {"k": NEIGHBOR, "num_real": len(real)}
        elif metric == "rfid":
            originals = moments(measured["original_features"])
            scores["rfid"] = frechet_distance(*originals, *moments(measured["features"]))
        else:  # a mean over images
            scores[metric] = measured[metric].double().mean().item()
    return scores, settings


def load_reference(args, work, networks: Networks) -> ReferenceStatistics | None:
    """The reference, or a `ValueError` where these images cannot be compared with it."""

    def check_enough(num_samples: int, name: str) -> None:
        try:
            check_num_samples(num_samples, args.allow_few_samples, name)
        except ValueError as error:
            raise ValueError(f"{error} That is --allow_few_samples here.") from None

    if set(args.metrics) & {"fid", "inception_score", "precision_recall", "rfid"}:
        check_enough(work.num_images, "num_images")
    least = {"fid": 2, "rfid": 2, "precision_recall": 4, "inception_score": 10}  # what the formulas themselves need
    for metric in args.metrics:
        if work.num_images < least.get(metric, 1):
            raise ValueError(f"--num_images must be at least {least[metric]} for {metric}, got {work.num_images}.")
    if not {"fid", "precision_recall"} & set(args.metrics):
        return None
    reference = ReferenceStatistics.load(args.reference)
    network = networks.features
    reference.check_comparable(work.resolution, args.protocol, network.name, network.sha256, args.trust_reference)
    if "fid" in args.metrics and reference.num_samples is not None:
        check_enough(reference.num_samples, "reference")
    dim = network(torch.zeros(1, 3, work.resolution, work.resolution, dtype=torch.uint8)).features.shape[1]
    if len(reference.mean) != dim:
        raise ValueError(f"--reference has {len(reference.mean)} features, and --features {args.features} {dim}.")
    used = {"mu": reference.mean, "sigma": reference.covariance} if "fid" in args.metrics else {}
    for name, values in used.items():
        if not torch.isfinite(values).all():
            raise ValueError(f"--reference must be finite, got NaN or infinity in `{name}` of {args.reference}.")
    if "precision_recall" in args.metrics:
        if reference.num_features < least["precision_recall"]:
            raise ValueError(
                f"--reference must hold features, or images, of at least {least['precision_recall']} real images for "
                f"precision_recall, got {reference.num_features}."
            )
        real = reference.features
        check_enough(reference.num_features, "reference.images" if real is None else "reference.features")
        if real is not None and check_features(real, "reference.features").shape[1] != dim:
            raise ValueError(
                f"--reference must hold features of {dim} numbers, those of --features {args.features}, got shape "
                f"{tuple(real.shape)}."
            )
    return reference


# ------------------------------------------------------------------------------------------------------------- main


def main(args):
    check_files(args)
    accelerator = Accelerator()
    device = accelerator.device
    output_dir = Path(args.output_dir)
    started = time.monotonic()

    # 1. What is drawn, and what looks at it
    with main_process_first(accelerator):
        work = (Reconstruction if args.reconstruct else Sampling)(args, device)
    networks = Networks.load(args, device)
    check_networks(networks, work, args)
    reference = load_reference(args, work, networks)
    looked = {"protocol": args.protocol, **networks.record()}
    digest = hashlib.sha256(json.dumps([looked, args.scoring_batch_size]).encode()).hexdigest()[:12]
    batches_dir = output_dir / f"batches-{digest}"

    # 2. The batches that are still to be done, shared out among the processes. They are the same for any number of
    # processes: not even half precision, whose rounding depends on the batch, makes another image.
    batches = [range(i, min(i + args.batch_size, work.num_images)) for i in range(0, work.num_images, args.batch_size)]
    pending = [None]
    if accelerator.is_main_process:
        drawn = {
            "num_images": work.num_images,
            "resolution": work.resolution,
            "batch_size": args.batch_size,
            "dtype": args.dtype,
            "round_to_nearest": work.protocol.round_to_nearest,
            **work.record(),
        }
        output_dir.mkdir(parents=True, exist_ok=True)
        # Earlier versions did not record the configurations, which hardly change without the weights.
        check_same_run(output_dir, drawn, may_lack=["config_sha256"], made=["images/*", "batches-*/*"])
        batches_dir.mkdir(exist_ok=True)
        if args.save_images:
            (output_dir / "images").mkdir(exist_ok=True)

        def is_done(k: int) -> bool:
            """Measured; and with --save_images saved, or it is made and measured again."""
            images = (image_path(output_dir, index) for index in batches[k])
            return batch_path(batches_dir, k).is_file() and (not args.save_images or all(map(has_image, images)))

        pending = [[k for k in range(len(batches)) if not is_done(k)]]
    if accelerator.num_processes > 1:
        broadcast_object_list(pending)
    own = pending[0][accelerator.process_index :: accelerator.num_processes]

    # 3. Sample and look
    num_made = 0
    for k in tqdm(own, disable=not accelerator.is_main_process, unit="batch"):
        indices, seconds = batches[k], None
        images = load_saved_images(output_dir, indices, work.resolution)
        if images is None:
            begun = time.monotonic()
            images = work.make(indices)  # waits for the device: the images come back to the host
            seconds = time.monotonic() - begun
            num_made += len(indices)
            if args.save_images:
                save_images(output_dir, indices, images)
        measured = measure(networks, work, indices, images, args.scoring_batch_size)
        path = batch_path(batches_dir, k)
        record = {"seconds": seconds, "num_processes": accelerator.num_processes, "hardware": hardware(device)}
        if seconds is None:
            record = record_of_sampling(output_dir, k, measured["digest"]) or record
        save_batch(path, measured, record)
    wait_for_everyone(accelerator)
    num_made = int(accelerator.reduce(torch.tensor(num_made, device=device)))

    # 4. Score
    if accelerator.is_main_process:
        measured, records = read_batches(batches_dir, len(batches))
        if not torch.equal(measured["index"], torch.arange(work.num_images)):
            raise RuntimeError(f"{batches_dir} does not hold each of the {work.num_images} images once.")
        scores, settings = score(args, measured, reference, networks, device)
        timed = [(r["seconds"], len(batches[k])) for k, r in enumerate(records) if r["seconds"] is not None]
        sampling_seconds, timed_images = (sum(column) for column in zip(*timed)) if timed else (None, 0)
        results = {
            "metrics": {name: value if np.isfinite(value) else str(value) for name, value in scores.items()},
            "pipeline": args.pipeline,
            "drawn": drawn | {
                **{f"{name}s_sha256": hashlib.sha256(measured[column].numpy().tobytes()).hexdigest()
                   for name, column in (("image", "digest"), ("original", "original_digest")) if column in measured},
                "num_distinct_images": len(measured["digest"].unique()),
            },
            "scored": looked | settings | {
                "reference": None if reference is None else {
                    "path": args.reference, "sha256": file_sha256(args.reference), **reference.describe(),
                },
            },
            "seconds": {
                # Over all processes, and over all runs of a resumed one; null where nothing is known of it.
                "sampling": None if sampling_seconds is None else round(sampling_seconds, 3),
                "sampling_per_image": None if sampling_seconds is None else round(sampling_seconds / timed_images, 6),
                "timed_images": timed_images,
                "images_made_in_this_run": num_made,
                "this_run": round(time.monotonic() - started, 3),
            },
            "num_processes": sorted({r["num_processes"] for r in records}),
            "hardware": [json.loads(machine) for machine in sorted({json.dumps(r["hardware"]) for r in records})],
            "versions": library_versions(),
            "git_revision": git_revision(),
            "arguments": vars(args),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }  # fmt: skip
        write_json(output_dir / "results.json", results)
        print(json.dumps(results["metrics"], indent=2))
        print(f"{output_dir / 'results.json'}: {work.num_images:,} images")
    # Nobody waits here for the scores, which may take longer than a process group's patience.
    accelerator.end_training()


def batch_path(batches_dir: Path, k: int) -> Path:
    return batches_dir / f"{k:06d}.safetensors"


def record_of_sampling(output_dir: Path, k: int, digest: torch.Tensor) -> dict[str, Any] | None:
    """The record of the batch whose images, of digests `(B,)`, were sampled, and not only scored by other networks."""
    for path in sorted(output_dir.glob(f"batches-*/{k:06d}.safetensors")):
        try:
            tensors, record = read_batch(path, ["digest"])
        except RuntimeError:  # told to the run that needs it
            continue
        if record.get("seconds") is not None and torch.equal(tensors["digest"], digest):
            return record
    return None


def read_batches(batches_dir: Path, num_batches: int) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """All that was measured, in the order of the images, and each batch's own record."""
    parts, records = zip(*(read_batch(batch_path(batches_dir, k)) for k in range(num_batches)))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, list(records)


if __name__ == "__main__":
    main(parse_args())
