"""How often the images of a pipeline show what their prompts name: the measure of `examples/emoji_scenes.py evaluate`.

A small classifier, trained on real scenes alone, looks for the object and the backdrop in images after the draft and
after each revision, and in the RQ-VAE's reconstructions of real ones.
"""

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import PIL
import torch
import torch.nn.functional as F
from emoji_scenes import SPLITS, captions
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import rq_draft_revise
from rq_draft_revise.data import load_split
from rq_draft_revise.provenance import write_json
from rq_draft_revise.stages import sample_stages


# ---------------------------------------------------------------------------------------------------------------------
# The classifier
# ---------------------------------------------------------------------------------------------------------------------


class SceneClassifier(nn.Module):
    """A small CNN with two heads: which object, and which backdrop.

    The object head looks at every 31x31 window by itself and pools what it found, log Σ exp over the windows. Pooled
    before the head, the windows that show the backdrop would vote against the objects never seen before it.

    Shape:
        images: `(B, 3, H, W)` in [0, 1]; logits: `(B, num_objects)` and `(B, num_backdrops)`.
    """

    def __init__(self, num_objects: int, num_backdrops: int, width: int = 32):
        super().__init__()

        def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            )

        self.features = nn.Sequential(
            layer(3, width, stride=2),
            layer(width, 2 * width, stride=2),
            layer(2 * width, 4 * width, stride=2),
            layer(4 * width, 4 * width, stride=1),
        )
        self.object_head = nn.Linear(4 * width, num_objects)
        self.backdrop_head = nn.Linear(4 * width, num_backdrops)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(2 * images - 1)  # (B, C, H/8, W/8)
        object_logits = self.object_head(features.flatten(2).mT).logsumexp(dim=1)  # (B, HW/64, C) to (B, num_objects)
        backdrop_logits = self.backdrop_head(features.mean(dim=(2, 3)))  # (B, num_backdrops)
        return object_logits, backdrop_logits


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift `(B, 3, H, W)` images in [0, 1] a little, mirror half of them, blur half, and change the colours of half.

    Without the blur the classifier would judge the RQ-VAE's soft edges, not what the image shows. Without the colours,
    which a random linear map mixes, it learns an object only together with the backdrops that it has seen around it.
    """
    batch, _, height, width = images.shape
    reach = max(1, height // 16)
    down, right = torch.randint(0, 2 * reach + 1, (2,), generator=generator).tolist()
    images = F.pad(images, (reach,) * 4, mode="replicate")[:, :, down : down + height, right : right + width]

    mirrored, blurred, recolored = torch.rand(3, batch, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored, images.flip(3), images)
    soft = F.interpolate(F.avg_pool2d(images, 2), size=(height, width), mode="bilinear", align_corners=False)
    images = torch.where(blurred, soft, images)

    mixing = torch.eye(3) + 0.35 * torch.randn(batch, 3, 3, generator=generator)
    offset = 0.5 + 0.2 * torch.randn(batch, 3, 1, generator=generator)
    mixed = (mixing @ (images - 0.5).flatten(2) + offset).view_as(images)
    images = torch.where(recolored, mixed, images)
    return (images + 0.02 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def load_scenes(split: datasets.Dataset) -> tuple[Tensor, Tensor, Tensor]:
    """All of one split: images `(N, 3, H, W)` uint8, object labels `(N,)` and backdrop labels `(N,)` int64."""
    images = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in split["image"]]))
    return images.permute(0, 3, 1, 2).contiguous(), torch.tensor(split["object"]), torch.tensor(split["backdrop"])


def train_classifier(
    images: Tensor,
    objects: Tensor,
    backdrops: Tensor,
    num_objects: int,
    num_backdrops: int,
    num_epochs: int = 3,
    batch_size: int = 128,
    seed: int = 0,
    device: str = "cpu",
) -> SceneClassifier:
    """Train on real scenes: AdamW, one cycle of the learning rate, the sum of the two cross entropies.

    The object's cross entropy is taken over the objects that occur before the scene's backdrop, and the backdrop's
    over the backdrops that occur with its object. Over all of them, "it is dusk" would come to mean "so it is no
    volcano". An ordinary classifier (all classes, mean pooling, no change of colours) got every test scene right and
    the object wrong in 26 % of the real scenes of held-out pairs; this one gets it wrong in 4 to 6 %, nearly all of
    them of two or three thin or pale objects (a bicycle at night, a flamingo in the snow).

    Shape:
        images: `(N, 3, H, W)` uint8; objects, backdrops: `(N,)` int64.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = SceneClassifier(num_objects, num_backdrops).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=4e-3, weight_decay=1e-2)
    num_steps = num_epochs * math.ceil(len(images) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=num_steps, pct_start=0.2)

    occurs = torch.zeros(num_objects, num_backdrops, dtype=torch.bool)
    occurs[objects, backdrops] = True
    object_penalty = torch.where(occurs, 0.0, -torch.inf).T.to(device)  # (num_backdrops, num_objects)
    backdrop_penalty = torch.where(occurs, 0.0, -torch.inf).to(device)  # (num_objects, num_backdrops)

    for epoch in range(num_epochs):
        total, start = 0.0, time.perf_counter()
        for index in torch.randperm(len(images), generator=generator).split(batch_size):
            batch = augment(images[index].float() / 255, generator).to(device)
            batch_objects, batch_backdrops = objects[index].to(device), backdrops[index].to(device)
            object_logits, backdrop_logits = classifier(batch)
            loss = F.cross_entropy(object_logits + object_penalty[batch_backdrops], batch_objects)
            loss = loss + F.cross_entropy(backdrop_logits + backdrop_penalty[batch_objects], batch_backdrops)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(index)
        seconds = time.perf_counter() - start
        loss = total / len(images)
        print(f"classifier: epoch {epoch + 1} of {num_epochs}, loss {loss:.4f}, {seconds:.0f} s", flush=True)
    return classifier.eval()


def load_or_train_classifier(
    path: Path, train: datasets.Dataset, num_epochs: int = 3, device: str = "cpu"
) -> tuple[SceneClassifier, dict[str, Any]]:
    """The classifier kept at `path`, trained on `train` and written there where `path` is missing.

    The safetensors file also says what the classifier was trained on; a file that does not fit `train` is refused.

    Returns:
        The classifier in evaluation mode, and what it was trained on.
    """
    record = {
        "objects": train.features["object"].names,
        "backdrops": train.features["backdrop"].names,
        "resolution": train[0]["image"].height,
        "num_train_scenes": len(train),
        "num_epochs": num_epochs,
    }
    if path.exists():
        with safe_open(path, framework="pt", device=device) as file:
            kept = json.loads((file.metadata() or {}).get("record", "{}"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no dictionary
        for key, value in record.items():
            if kept.get(key) != value:
                raise ValueError(
                    f"The classifier kept at {path} was trained with {key} {kept.get(key)}, but this evaluation has "
                    f"{value}: delete the file, or give another --classifier."
                )
        classifier = SceneClassifier(len(record["objects"]), len(record["backdrops"])).to(device).eval()
        classifier.load_state_dict(state)
    else:
        counts = len(record["objects"]), len(record["backdrops"])
        classifier = train_classifier(*load_scenes(train), *counts, num_epochs=num_epochs, device=device)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")  # renamed, so that a kill leaves no half a classifier
        save_file(classifier.state_dict(), aside, metadata={"record": json.dumps(record)})
        os.replace(aside, path)
    return classifier, record


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def accuracy(correct: Tensor) -> dict[str, float]:
    """The share of True in `(N,)` bool, with the standard error of a binomial share, sqrt(p (1 - p) / N)."""
    share = correct.float().mean().item()
    return {"accuracy": share, "standard_error": math.sqrt(share * (1 - share) / len(correct)), "count": len(correct)}


@torch.no_grad()
def score(
    classifier: nn.Module, images: Tensor, objects: Tensor, backdrops: Tensor, batch_size: int = 500
) -> dict[str, dict[str, float]]:
    """How often `classifier` sees the object, the backdrop and both that the labels name.

    Shape:
        images: `(N, 3, H, W)`, uint8 or in [0, 1]; objects, backdrops: `(N,)` int64.

    Returns:
        `{"object": ..., "backdrop": ..., "both": ...}`, each as `accuracy` returns it.
    """
    device = next(classifier.parameters()).device
    right_objects, right_backdrops = [], []
    for index in torch.arange(len(images)).split(batch_size):
        batch = images[index].to(device)
        batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()
        object_logits, backdrop_logits = classifier(batch)
        right_objects.append(object_logits.argmax(dim=1).cpu() == objects[index])
        right_backdrops.append(backdrop_logits.argmax(dim=1).cpu() == backdrops[index])
    right_object, right_backdrop = torch.cat(right_objects), torch.cat(right_backdrops)
    return {
        "object": accuracy(right_object),
        "backdrop": accuracy(right_backdrop),
        "both": accuracy(right_object & right_backdrop),
    }


# ---------------------------------------------------------------------------------------------------------------------
# evaluate
# ---------------------------------------------------------------------------------------------------------------------

SAMPLER_ARGUMENTS = ("num_inference_steps", "num_revise_steps", "num_revisions", "guidance_scale", "temperature")


def image_generator(seed: int, group: str, index: int) -> torch.Generator:
    """Every image has its own generator, so the batch size does not change what is drawn for it."""
    state = np.random.SeedSequence([seed, ("seen", "held_out").index(group), index]).generate_state(2)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


@torch.no_grad()
def reconstruct(vae: Any, images: Tensor, batch_size: int) -> Tensor:
    """Encode and decode `(N, 3, H, W)` uint8 images by the RQ-VAE; returns them in [0, 1] on the CPU."""
    reconstructions = []
    for batch in images.split(batch_size):
        pixel_values = (batch.to(vae.device, vae.dtype) / 127.5) - 1  # [-1, 1]
        decoded = vae.decode(vae.encode(pixel_values).codes).sample
        reconstructions.append((decoded.float() / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(reconstructions)


def evaluate_pipeline(
    pipe: Any,
    scenes: datasets.DatasetDict,
    classifier: nn.Module,
    num_images: int,
    batch_size: int,
    seed: int,
    sampler: dict[str, Any],
) -> tuple[dict[str, dict[str, Any]], dict[str, float], dict[str, list[Tensor]]]:
    """Score real scenes, their reconstructions, and every stage of the pipeline's images.

    Returns:
        The scores as `{"seen" or "held_out": {stage: score}}`; the seconds spent on sampling each group; and, a group,
        the stages' images of the first image of each pair: `num_revisions + 1` tensors `(pairs, 3, H, W)` in [0, 1].
    """
    object_names, backdrop_names = (scenes["train"].features[column].names for column in ("object", "backdrop"))
    scores, seconds, first_images = {}, {}, {}
    for group, split in (("seen", "test"), ("held_out", "held_out")):
        images, objects, backdrops = load_scenes(scenes[split])
        scores[group] = {"real scenes": score(classifier, images, objects, backdrops)}
        reconstructions = reconstruct(pipe.vae, images, batch_size)
        scores[group]["RQ-VAE reconstructions"] = score(classifier, reconstructions, objects, backdrops)

        # The pairs as often as each other: pair 0, 1, 2, ..., 0, 1, 2, ...
        labels = torch.stack([objects, backdrops], dim=1).unique(dim=0)  # (pairs, 2)
        num_pairs = len(labels)
        labels = labels.repeat(math.ceil(num_images / num_pairs), 1)  # (N, 2), N >= num_images
        prompts = [captions(object_names[thing], backdrop_names[place])[0] for thing, place in labels.tolist()]
        generators = [image_generator(seed, group, index) for index in range(len(prompts))]

        batches, seconds[group] = [], 0.0
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            stages, spent = sample_stages(pipe, generators[batch], {"prompt": prompts[batch]}, **sampler)
            batches.append([pipe.decode_latents(codes, output_type="pt").float().cpu() for codes in stages])
            seconds[group] += spent[-1]
            print(f"{group}: {min(start + batch_size, len(prompts))} of {len(prompts)} images", flush=True)
        stages = [torch.cat(parts) for parts in zip(*batches)]  # each (N, 3, H, W)
        if stages[0].shape[1:] != images.shape[1:]:
            raise ValueError(
                f"The pipeline's images are {tuple(stages[0].shape[1:])}, the data set's {tuple(images.shape[1:])}: "
                "evaluate it on the data set it was trained on."
            )
        for revision, stage in enumerate(stages):
            name = f"after revision {revision}" if revision else "draft"
            scores[group][name] = score(classifier, stage, labels[:, 0], labels[:, 1])
        first_images[group] = [stage[:num_pairs] for stage in stages]
    return scores, seconds, first_images


def markdown_table(scores: dict[str, dict[str, Any]]) -> str:
    """The scores in per cent, a row a stage, with standard errors."""
    lines = [
        "| images | seen: object | backdrop | both | held out: object | backdrop | both |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage in scores["seen"]:
        parts = ("object", "backdrop", "both")
        cells = [scores[group][stage][part] for group in ("seen", "held_out") for part in parts]
        shown = (f"{100 * cell['accuracy']:.1f} ± {100 * cell['standard_error']:.1f}" for cell in cells)
        lines.append(f"| {stage} | {' | '.join(shown)} |")
    return "\n".join(lines)


def draw_grid(columns: list[tuple[str, list[Tensor]]], side: int = 128) -> Image.Image:
    """A contact sheet: a column a prompt, below it its images `(3, H, W)` in [0, 1] from draft to last revision."""
    margin, line = 4, 16
    num_rows = len(columns[0][1])
    sheet = Image.new("RGB", (len(columns) * (side + margin), num_rows * (side + margin) + 2 * line), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for column, (prompt, images) in enumerate(columns):
        words = prompt.split()
        first, second = " ".join(words[: -(len(words) // 2)]), " ".join(words[-(len(words) // 2) :])
        pen.multiline_text((column * (side + margin), 0), f"{first}\n{second}", fill="black", font=font)
        for row, image in enumerate(images):
            pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            # The pixels as they are: smoothing would hide what the model got wrong.
            tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (column * (side + margin), row * (side + margin) + 2 * line))
    return sheet


def spread_over(pairs: list[tuple[int, int]], count: int) -> list[int]:
    """`count` places in a sorted list of label pairs, about evenly spaced, with every backdrop equally often."""
    places: list[int] = []
    for k in range(min(count, len(pairs))):
        shown = [pairs[place][1] for place in places]
        rest = [place for place in range(k * len(pairs) // count, len(pairs)) if place not in places]
        places.append(min(rest, key=lambda place: shown.count(pairs[place][1])))  # the first of the least shown
    return places


def grid_columns(
    scenes: datasets.DatasetDict, first_images: dict[str, list[Tensor]]
) -> list[tuple[str, list[Tensor]]]:
    """Four held-out pairs, *volcano at dusk* first, then four seen ones, as `draw_grid` takes them."""
    object_names, backdrop_names = (scenes["train"].features[column].names for column in ("object", "backdrop"))
    columns = []
    for group, split in (("held_out", "held_out"), ("seen", "test")):
        labels = sorted(set(zip(scenes[split]["object"], scenes[split]["backdrop"])))  # the order of `first_images`
        for place in spread_over(labels, 4):
            thing, backdrop = labels[place]
            prompt = captions(object_names[thing], backdrop_names[backdrop])[0]
            columns.append((prompt, [stage[place] for stage in first_images[group]]))
    return columns


def evaluate(args: argparse.Namespace) -> None:
    """Print the table of accuracies and write all that belongs to it as JSON."""
    for path in filter(None, (args.output, args.grid)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)  # before the long work, not after it
    if args.grid and Path(args.grid).suffix.lower() not in PIL.Image.registered_extensions():
        raise ValueError(f"--grid must end as an image's file does, such as in .png, got {args.grid!r}.")
    # (`datasets.load_dataset` by itself would return what it once read from a folder of this name, rebuilt or not.)
    scenes = datasets.DatasetDict({split: load_split(split, dataset_name=args.dataset) for split in SPLITS})
    kept_at = Path(args.classifier or f"{args.dataset.rstrip('/')}-classifier.safetensors")
    classifier, record = load_or_train_classifier(kept_at, scenes["train"], args.classifier_epochs, args.device)

    pipe = rq_draft_revise.DraftAndRevisePipeline.from_pretrained(args.pipeline).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    sampler = {name: getattr(args, name) for name in SAMPLER_ARGUMENTS}
    for name, value in sampler.items():
        sampler[name] = pipe.scheduler.config[name] if value is None else value

    start = time.perf_counter()
    scores, seconds, first_images = evaluate_pipeline(
        pipe, scenes, classifier, args.num_images, args.batch_size, args.seed, sampler
    )
    print(f"\n{markdown_table(scores)}\n")
    counts = {group: scores[group]["draft"]["object"]["count"] for group in scores}
    print("Per cent ± binomial standard error.", end=" ")
    print(f"{counts['seen']} sampled images of seen pairs, {counts['held_out']} of held-out pairs.")
    versions = {
        package.__name__: package.__version__ for package in (rq_draft_revise, torch, diffusers, datasets, np, PIL)
    }
    results = {
        "pipeline": args.pipeline,
        "dataset": args.dataset,
        "sampler": sampler,
        "scheduler_config": {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")},
        "seed": args.seed,
        "batch_size": args.batch_size,
        "num_images": counts,
        "scores": scores,
        "classifier": record,
        "seconds": {"sampling": seconds, "total": time.perf_counter() - start},
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
        "num_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | versions,
    }
    write_json(Path(args.output), results)
    if args.grid:
        draw_grid(grid_columns(scenes, first_images)).save(args.grid)
