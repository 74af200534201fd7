"""The paper's tables in miniature: what its claims come to on a small pipeline, cell by cell with standard errors.

    python examples/reproduce_tables.py --pipeline pipelines/cifar10-32 \\
        --contextual_vq pipelines/table-2-cifar10-vq --autoregressive pipelines/table-2-cifar10-ar \\
        --data_files data/cifar10/test.parquet --split test \\
        --features runs/cifar10-classifier --reference statistics/cifar10-train.npz \\
        --output_dir runs/tables-cifar10 --results pipelines/cifar10-32/tables.json

- Table 2: Contextual RQ beside Contextual VQ (16x16x1) and the autoregressive baseline.
- Table 3 of the supplement: three selection strategies, T_draft 8 and 64, draft and revised.
- Figure 1: Frechet distance by T_draft; precision and recall by the number of revisions M.
- Guidance: in no phase, while revising alone, in both.

Every figure is of features of a classifier that was trained on the real images alone (`--features`, as
`examples/evaluate.py` takes it): FD is a Frechet distance of these, it is no FID and compares the rows of one table.
Cells share runs: one run of many revisions holds the draft and every shorter one. A run that was killed is taken up by
the same command, which samples nothing twice.

The sampler is the paper's, whatever the pipeline's own defaults are: T_draft 64, T_revise 2, M 2, temperature 1 in the
draft and 0.8 in the revisions, guidance 1.8 (ImageNet 821M's) while revising alone, no top-k and no top-p.
"""

import argparse
import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compute_statistics import add_network_arguments, check_files, load_images, load_network
from diffusers import DiffusionPipeline

from rq_draft_revise import DraftAndRevisePipeline, RQTransformerPipeline
from rq_draft_revise.captions_and_labels import input_ids_sha256
from rq_draft_revise.data import load_split
from rq_draft_revise.devices import float64_device, seconds_now
from rq_draft_revise.features import get_protocol, reference_features
from rq_draft_revise.images import encode_pixels
from rq_draft_revise.metrics import ReferenceStatistics, frechet_distance, moments, precision_and_recall
from rq_draft_revise.provenance import (
    check_same_run,
    config_sha256,
    git_revision,
    hardware,
    image_seed,
    library_versions,
    public,
    read_batch,
    save_batch,
    weights_sha256,
    write_json,
)
from rq_draft_revise.publishing import pipeline_class_of
from rq_draft_revise.stages import sample_stages


PAPER = dict(num_inference_steps=64, num_revise_steps=2, num_revisions=2, guidance_scale=1.8, temperature=0.8,
             draft_guidance_scale=1.0, draft_temperature=1.0, selection="random")  # fmt: skip
SELECTIONS = ("top-c", "top-c-50%", "random")
DRAFT_STEPS = (2, 4, 8, 16, 32, 64)  # of Figure 1
MOST_REVISIONS = 6  # of Figure 1
PART_NAMES = ("table-2", "table-3", "figure-1", "guidance")
NUM_HALVES = 400  # by 40 a standard error is known to 11 % only: verdicts near the threshold hung on the seed
SUBSET_SEED = 0  # of the real images that precision and recall are against
# What runs of earlier versions did not write down.
NEWLY_RECORDED = ("top_k", "top_p", "config_sha256", "scheduler_config", "input_ids_sha256")
# What a batch says of its making.
CIRCUMSTANCES = ("device", "clock", "hardware", "versions", "git_revision")
# Not where things lie on this machine: data and networks are known by their digests.
RECORDED = ("pipeline", "contextual_rq", "contextual_vq", "autoregressive", "vq_draft_steps", "split", "parts",
            "num_images", "batch_size", "seed", "device", "dtype")  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    group = parser.add_argument_group("pipelines")
    group.add_argument("--pipeline", required=True, help="The Contextual RQ pipeline that all is measured on.")
    group.add_argument("--contextual_rq", help="For Table 2: one of the budget of the two below, if that is less.")
    group.add_argument("--contextual_vq", help="For Table 2: one code a position, four times the positions.")
    group.add_argument("--autoregressive", help="For Table 2: an RQTransformerPipeline.")
    group.add_argument("--vq_draft_steps", type=int, default=256, help="T_draft of the Contextual VQ pipeline.")

    group = parser.add_argument_group("real images of the split, and their captions or classes")
    group.add_argument("--dataset_name", help="Hub id, or a local folder that `datasets.load_dataset` reads.")
    group.add_argument("--data_files", nargs="+", help="Files of the split (parquet, csv, json, tar).")
    group.add_argument("--split", default="test")
    group.add_argument("--image_column", default="image")
    group.add_argument("--label_column", default="label", help="The class that the classifier should see.")
    group.add_argument("--caption_column", default="text", help="Of a text-conditional pipeline.")

    group = parser.add_argument_group("scores")
    add_network_arguments(group)
    group.add_argument("--reference", required=True, help="npz by examples/compute_statistics.py of training images.")

    group = parser.add_argument_group("runs")
    group.add_argument("--parts", nargs="+", choices=PART_NAMES, default=list(PART_NAMES))
    group.add_argument("--num_images", type=int, default=500, help="A cell; the rows of the split, evenly spaced.")
    group.add_argument(
        "--batch_size", type=int, default=50, help="Images at once; the codes are the same, on the CPU in float32."
    )
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                       help="Of the transformers; the RQ-VAEs are in float32.")  # fmt: skip
    group.add_argument("--sample_only", action="store_true", help="Score later, by the same command without this.")

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", required=True, help="Features of all images, a folder a run.")
    group.add_argument("--results", required=True, help="JSON file of all cells; the tables beside it, as .md.")

    args = parser.parse_args(argv)
    for name in ("num_images", "batch_size", "vq_draft_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if args.num_images < 8:
        raise ValueError(
            f"--num_images must be at least 8, for precision and recall of halves, got {args.num_images}."
        )
    if (args.dataset_name is None) == (args.data_files is None):
        raise ValueError("Give the real images by one of --dataset_name and --data_files.")
    if not args.results.endswith(".json"):
        raise ValueError(f"--results must end in .json, got {args.results}.")
    args.train_data_dir, args.resolution = None, None  # of `load_images`; the second is the pipeline's
    return args


# ------------------------------------------------------------------------------------------------------------ runs


@dataclass(frozen=True)
class Run:
    """Images of one pipeline with one sampler; an autoregressive one has a single stage."""

    pipeline: str
    sampler: dict[str, Any]


def plan(args) -> dict[str, Run]:
    """The runs that the wanted parts share, by name."""

    def contextual(pipeline=args.pipeline, **changes) -> Run:
        return Run(pipeline, PAPER | changes)

    runs = {"random-64": contextual(num_revisions=MOST_REVISIONS)}
    if "figure-1" in args.parts:
        runs |= {f"random-{steps}": contextual(num_inference_steps=steps) for steps in DRAFT_STEPS[:-1]}
    if "table-3" in args.parts:
        for selection in SELECTIONS:
            for steps in (8, 64):
                if f"{selection}-{steps}" not in runs:
                    runs[f"{selection}-{steps}"] = contextual(selection=selection, num_inference_steps=steps)
    if "guidance" in args.parts:
        runs["no-guidance"] = contextual(guidance_scale=1.0)
        runs["guidance-in-both"] = contextual(draft_guidance_scale=PAPER["guidance_scale"])
    if "table-2" in args.parts:
        if args.contextual_rq:
            runs["contextual-rq"] = contextual(args.contextual_rq)
        if args.autoregressive:
            plain = dict(guidance_scale=1.0, temperature=1.0)
            runs["autoregressive"] = Run(args.autoregressive, plain)
            runs["autoregressive-guided"] = Run(
                args.autoregressive, plain | dict(guidance_scale=PAPER["guidance_scale"])
            )
        if args.contextual_vq:  # the slowest comes last
            runs["contextual-vq"] = contextual(args.contextual_vq, num_inference_steps=args.vq_draft_steps)
    return runs


def load_pipeline(folder: str, device: str, dtype: str = "float32") -> DiffusionPipeline:
    """A pipeline of this package, whichever `model_index.json` says, its transformer in `dtype`."""
    kind, dtypes = pipeline_class_of(folder), {"transformer": getattr(torch, dtype), "default": torch.float32}
    if kind not in (DraftAndRevisePipeline, RQTransformerPipeline):
        raise ValueError(f"{folder} must be a pipeline that needs no image, got a {kind.__name__}.")
    pipe = kind.from_pretrained(folder, dtype=dtypes).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def all_codes(pipe) -> dict[str, Any]:
    """The limits that limit nothing. Left out, the pipeline's own, which its config may have, would count."""
    return {"top_k": pipe.transformer.config.codebook_size, "top_p": 1.0}


def sample(pipe, run: Run, condition: dict[str, list], generators) -> tuple[list[torch.Tensor], list[float]]:
    """Code maps after each stage, and the seconds that each took from the beginning."""
    sampler = run.sampler | all_codes(pipe)
    if isinstance(pipe, DraftAndRevisePipeline):
        return sample_stages(pipe, generators, condition, **sampler)
    start = seconds_now(pipe.device)
    codes = pipe(**condition, generator=generators, output_type="latent", **sampler).images
    return [codes], [seconds_now(pipe.device) - start]


def record_of(pipe, run: Run, conditions: dict[str, list], network, args) -> dict[str, Any]:
    """All that the images of a run, and what is kept of them, depend on."""
    models = {name: getattr(pipe, name) for name in ("vae", "transformer")}
    record = {
        "weights_sha256": {name: weights_sha256(model) for name, model in models.items()},
        "config_sha256": {name: config_sha256(model) for name, model in models.items()},
        "sampler": run.sampler,
        **all_codes(pipe),
        "conditions": conditions,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "network": [network.name, network.sha256, args.protocol],
    }
    if hasattr(pipe, "scheduler"):
        record["scheduler_config"] = public(pipe.scheduler.config)
    if "prompt" in conditions:  # what the transformer sees of the tokenizer
        config = pipe.transformer.config
        tokens = (pipe.tokenizer, config.max_text_length, config.text_vocab_size)
        record["input_ids_sha256"] = input_ids_sha256(conditions["prompt"], *tokens)
    return record


def batch_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What a batch's file holds, and what it says of its making: None each where an earlier version wrote it."""
    tensors, record = read_batch(path, ["features", "logits", "seconds"], may_lack_record=True)
    return tensors, {name: record.get(name) for name in CIRCUMSTANCES}


def carry_out(run: Run, folder: Path, conditions: dict[str, list], network, args) -> dict[str, Any]:
    """Sample what of a run is not there yet.

    Returns:
        `{"features": (stages, N, F), "logits": (stages, N, C), "seconds": (stages,), "made": [...]}`: the seconds an
        image, as the median of the batches, of which the first finds an accelerator cold; and what the batches say of
        their making.

    Raises:
        `ValueError`: the folder holds batches of another run, of an unknown one, or of another kind of device.
        `RuntimeError`: a batch's file is damaged.
    """
    pipe, protocol = load_pipeline(run.pipeline, args.device, args.dtype), get_protocol(args.protocol)
    record = record_of(pipe, run, conditions, network, args)
    check_same_run(folder, record, may_lack=NEWLY_RECORDED, made=["*.safetensors"])
    starts = range(0, args.num_images, args.batch_size)
    paths = [folder / f"{number:04d}.safetensors" for number in range(len(starts))]
    batches = {path: batch_of(path) for path in paths if path.is_file()}
    # What is finished may be scored anywhere; but one run is made by one kind of device, whose rounding is its own.
    device = torch.device(args.device)
    others = {made["device"] for _, made in batches.values()} - {device.type, None}
    if others and len(batches) < len(paths):
        raise ValueError(
            f"--device must be {' or '.join(sorted(others))}, on which the batches in {folder} were made, until the "
            f"last of them is, got {args.device}."
        )
    made = {
        "device": device.type,
        "clock": "of the process" if device.type == "cpu" else "of the wall",
        "hardware": hardware(device),
        "versions": library_versions(),
        "git_revision": git_revision(),
    }
    for path, start in zip(paths, starts):
        if path not in batches:
            rows = range(start, min(start + args.batch_size, args.num_images))
            generators = [torch.Generator().manual_seed(image_seed(args.seed, row)) for row in rows]
            condition = {name: [values[row] for row in rows] for name, values in conditions.items()}
            stages, spent = sample(pipe, run, condition, generators)
            looked = [network(protocol.to_uint8(pipe.decode_latents(codes, "pt")).cpu()) for codes in stages]
            tensors = {
                name: torch.stack([getattr(output, name) for output in looked]) for name in ("features", "logits")
            }
            save_batch(path, tensors | {"seconds": torch.tensor(spent)}, made)
            print(
                f"{folder.name}: {rows.stop} of {args.num_images} images, {spent[-1] / len(rows):.3f} s each",
                flush=True,
            )
            batches[path] = batch_of(path)
    del pipe
    gc.collect()  # the next pipeline need not lie beside it
    parts = [batches[path][0] for path in paths]
    result = {name: torch.cat([part[name] for part in parts], dim=1) for name in ("features", "logits")}
    seconds = torch.stack([part["seconds"] / part["features"].shape[1] for part in parts])  # (batches, stages)
    return result | {"seconds": seconds.median(dim=0).values, "made": [batches[path][1] for path in paths]}


# ------------------------------------------------------------------------------------------------------------ cells


@dataclass(frozen=True)
class Real:
    """What sampled images are compared with."""

    mean: torch.Tensor  # (F,), of the reference
    covariance: torch.Tensor  # (F, F)
    features: torch.Tensor  # (N, F), as many as there are images in a cell, in float64
    labels: torch.Tensor  # (N,), the class that image i should show


def real_features(reference: ReferenceStatistics, network, count: int) -> torch.Tensor:
    """Features `(count, F)` of real images, a random choice that is always the same.

    Not the first: they lie in the order of the data set, which may be sorted by class.
    """
    features = reference_features(reference, network)
    if len(features) < count:
        raise ValueError(f"--reference must hold features of {count} images, got {len(features)}.")
    generator = torch.Generator().manual_seed(SUBSET_SEED)
    return features[torch.randperm(len(features), generator=generator)[:count]]


def score(features: torch.Tensor, logits: torch.Tensor, real: Real, rows: torch.Tensor) -> dict[str, float]:
    """The figures of some rows of a cell, with as many real features for precision and recall."""
    return {
        "fd": frechet_distance(real.mean, real.covariance, *moments(features[rows])),
        **precision_and_recall(real.features[rows], features[rows]),
        "accuracy": (logits[rows].argmax(dim=1) == real.labels[rows]).double().mean().item(),
    }


def cell(features: torch.Tensor, logits: torch.Tensor, real: Real) -> dict[str, Any]:
    """The figures of a cell, their standard errors, `*_se`, and what they are of, `halves`.

    The standard error is the standard deviation over random halves of the images (and of the real features), drawn
    without replacement: a mean over half of N has, around that of all N, the variance that the mean of all has around
    the truth. (Drawn with replacement, twins would be nearest neighbours.) All cells have the same halves,
    so that a difference of two has an error of its own. Of a Frechet distance near zero it is nearly twice too
    large: that is quadratic in what the moments are off by, and half as many images are off by more.
    """
    count, features = len(features), features.to(real.features)
    figures = score(features, logits, real, torch.arange(count))
    generator = torch.Generator().manual_seed(0)
    halves = [
        score(features, logits, real, torch.randperm(count, generator=generator)[: count // 2])
        for _ in range(NUM_HALVES)
    ]
    halves = {name: torch.tensor([half[name] for half in halves]) for name in figures}
    return figures | {f"{name}_se": values.std().item() for name, values in halves.items()} | {"halves": halves}


# ----------------------------------------------------------------------------------------------------------- claims


def claim(text: str, more: dict, less: dict, figure: str) -> dict[str, Any]:
    """Whether a figure of one cell exceeds that of another by more than two standard errors of the difference.

    Image i of both cells has the same seed and condition: the error is that of the paired difference.
    """
    difference = more[figure] - less[figure]
    error = (more["halves"][figure] - less["halves"][figure]).std().item()
    verdict = "not decided"
    if abs(difference) > 2 * error:
        verdict = "confirmed" if difference > 0 else "contradicted"
    return {
        "claim": text,
        "figure": figure,
        "difference": difference,
        "standard_error": error,
        "standard_errors": difference / error if error else None,  # the threshold is 2
        "verdict": verdict,
    }


def claims_of(cells: dict[str, dict], args) -> list[dict[str, Any]]:
    """The paper's claims that the cells at hand can speak to."""
    found, main = [], f"random-64, M {PAPER['num_revisions']}"
    if "table-3" in args.parts:
        for selection in SELECTIONS:
            for steps in (8, 64):
                draft, revised = (cells[f"{selection}-{steps}, M {m}"] for m in (0, PAPER["num_revisions"]))
                found.append(claim(f"Revising improves the draft: {selection}, T_draft {steps}", draft, revised, "fd"))
        text = "At T_draft 64, once revised, random drafts beat {}"
        for selection in SELECTIONS[:2]:
            other = cells[f"{selection}-64, M {PAPER['num_revisions']}"]
            found.append(claim(text.format(selection), other, cells[main], "fd"))
    if "figure-1" in args.parts:
        first, last = cells["random-64, M 0"], cells[f"random-64, M {MOST_REVISIONS}"]
        found.append(claim(f"More revisions raise precision (M 0 to {MOST_REVISIONS})", last, first, "precision"))
        found.append(claim(f"More revisions lower recall (M 0 to {MOST_REVISIONS})", first, last, "recall"))
        few = cells[f"random-{DRAFT_STEPS[0]}, M 0"]
        found.append(claim(f"More draft steps improve the draft (T_draft {DRAFT_STEPS[0]} to 64)", few, first, "fd"))
    if "guidance" in args.parts:
        both, none = (cells[f"{name}, M {PAPER['num_revisions']}"] for name in ("guidance-in-both", "no-guidance"))
        found.append(claim("Guidance in both phases costs recall", cells[main], both, "recall"))
        found.append(claim("Guidance while revising alone is better than none", none, cells[main], "fd"))
        found.append(claim("Guidance while revising alone is better than in both phases", both, cells[main], "fd"))
    if "table-2" in args.parts:
        ours = cells[f"contextual-rq, M {PAPER['num_revisions']}" if args.contextual_rq else main]
        if args.contextual_vq:
            vq = cells[f"contextual-vq, M {PAPER['num_revisions']}"]
            found.append(claim("Contextual RQ is better than Contextual VQ", vq, ours, "fd"))
        if args.autoregressive:
            for name in ("autoregressive", "autoregressive-guided"):
                found.append(claim(f"Contextual RQ is better than {name}", cells[f"{name}, M 0"], ours, "fd"))
    return found


# ----------------------------------------------------------------------------------------------------------- tables


def row_of(label: str, figures: dict[str, float]) -> str:
    def shown(name: str, digits: int, scale: int = 1) -> str:
        return f"{scale * figures[name]:.{digits}f} ± {scale * figures[f'{name}_se']:.{digits}f}"

    seconds = f"{figures['seconds']:.3f}" if "seconds" in figures else ""
    columns = (shown("fd", 2), shown("precision", 2), shown("recall", 2), shown("accuracy", 1, 100), seconds)
    return f"| {label} | {' | '.join(columns)} |"


def table(title: str, rows: list[tuple[str, dict]]) -> list[str]:
    head = ["| | FD | precision | recall | right class, % | s an image |", "|---|---|---|---|---|---|"]
    return [f"**{title}**", "", *head, *(row_of(*row) for row in rows), ""]


def tables_of(cells: dict[str, dict], args) -> list[str]:
    """The tables of the wanted parts, as lines of Markdown."""
    lines, revised = [], PAPER["num_revisions"]
    if "table-2" in args.parts:
        named = {
            "real test images": "real images of the split",
            "reconstructions": "the same, reconstructed (8×8×4)",
            "reconstructions-vq": "the same, reconstructed (16×16×1)",
            f"random-64, M {revised}": "Contextual RQ",
            f"contextual-rq, M {revised}": "Contextual RQ, budget of those below",
            f"contextual-vq, M {revised}": f"Contextual VQ, 16×16×1, T_draft {args.vq_draft_steps}",
            "autoregressive, M 0": "autoregressive RQ-Transformer",
            "autoregressive-guided, M 0": "autoregressive RQ-Transformer, guidance 1.8",
        }
        lines += table("Table 2", [(label, cells[name]) for name, label in named.items() if name in cells])
    if "table-3" in args.parts:
        rows = [
            (f"{selection}, T_draft {steps}, {'revised' if m else 'draft'}", cells[f"{selection}-{steps}, M {m}"])
            for steps in (8, 64)
            for selection in SELECTIONS
            for m in (0, revised)
        ]
        lines += table("Table 3", rows)
    if "figure-1" in args.parts:
        rows = [
            (f"T_draft {steps}, {'revised' if m else 'draft'}", cells[f"random-{steps}, M {m}"])
            for steps in DRAFT_STEPS
            for m in (0, revised)
        ]
        lines += table("Figure 1, steps of the draft", rows)
        rows = [(f"M {m}", cells[f"random-64, M {m}"]) for m in range(MOST_REVISIONS + 1)]
        lines += table("Figure 1, revisions", rows)
    if "guidance" in args.parts:
        named = {"no-guidance": "none", "random-64": "while revising", "guidance-in-both": "in both phases"}
        lines += table("Guidance", [(label, cells[f"{name}, M {revised}"]) for name, label in named.items()])
    return lines


def claims_table(claims: list[dict[str, Any]]) -> list[str]:
    lines = ["| claim | figure | difference | in standard errors | verdict |", "|---|---|---|---|---|"]
    for one in claims:
        difference = f"{one['difference']:+.2f} ± {one['standard_error']:.2f}"
        ratio = "" if one["standard_errors"] is None else f"{one['standard_errors']:+.2f}"
        lines.append(f"| {one['claim']} | {one['figure']} | {difference} | {ratio} | {one['verdict']} |")
    return lines


# ------------------------------------------------------------------------------------------------------------- main


def distinct(batches: list[dict[str, Any]]) -> dict[str, list]:
    """Of what batches say of their making, all different values; None is what an earlier version did not write."""
    found = {name: {json.dumps(made[name]): made[name] for made in batches} for name in CIRCUMSTANCES}
    return {name: [values[key] for key in sorted(values)] for name, values in found.items()}


def looked_at(images: torch.Tensor, network, args) -> dict[str, torch.Tensor]:
    """Features and logits of images `(N, 3, H, W)` uint8."""
    outputs = [network(batch) for batch in images.split(args.batch_size)]
    return {name: torch.cat([getattr(output, name) for output in outputs]) for name in ("features", "logits")}


@torch.no_grad()
def reconstruct(folder: str, images: torch.Tensor, network, args) -> dict[str, torch.Tensor]:
    """Features and logits of images `(N, 3, H, W)` uint8 that a pipeline's RQ-VAE has encoded and decoded."""
    pipe, protocol, decoded = load_pipeline(folder, args.device), get_protocol(args.protocol), []
    for batch in images.split(args.batch_size):
        codes = encode_pixels(pipe.vae, batch.to(args.device) / 255)
        decoded.append(protocol.to_uint8(pipe.decode_latents(codes, "pt")).cpu())
    return looked_at(torch.cat(decoded), network, args)


def main(args):
    # 1. What is drawn, and what it is compared with
    check_files(args)
    pipe = load_pipeline(args.pipeline, "cpu")
    config, args.resolution = pipe.transformer.config, pipe.vae.config.sample_size
    if config.num_classes is None and config.text_vocab_size is None:
        raise ValueError(f"--pipeline must have classes or captions, and {args.pipeline} has none.")
    network = load_network(args, args.device)
    reference = ReferenceStatistics.load(args.reference)
    reference.check_comparable(args.resolution, args.protocol, network.name, network.sha256)
    source = {name: getattr(args, name) for name in ("dataset_name", "data_files")}
    split = load_split(args.split, train_split=args.split, image_column=args.image_column, **source)
    if len(split) < args.num_images:
        raise ValueError(
            f"--num_images must be at most {len(split)}, the rows of {args.split!r}, got {args.num_images}."
        )
    rows = [i * len(split) // args.num_images for i in range(args.num_images)]
    labels = [split[args.label_column][row] for row in rows]
    conditions = {"class_labels": labels}
    if config.text_vocab_size is not None:
        conditions = {"prompt": [split[args.caption_column][row] for row in rows]}
    features = real_features(reference, network, args.num_images)
    features = features.to(float64_device(torch.device(args.device)), torch.float64)
    real = Real(reference.mean, reference.covariance, features, torch.tensor(labels))

    # 2. The cells: real images, and every stage of every run
    cells, made = {}, []
    if not args.sample_only:
        originals = load_images(args)
        originals = torch.stack([originals[row] for row in rows])
        cells["real test images"] = cell(**looked_at(originals, network, args), real=real)
        for name, folder in (("reconstructions", args.pipeline), ("reconstructions-vq", args.contextual_vq)):
            if "table-2" in args.parts and folder is not None:
                cells[name] = cell(**reconstruct(folder, originals, network, args), real=real)
    for name, run in plan(args).items():
        result = carry_out(run, Path(args.output_dir) / name, conditions, network, args)
        if args.sample_only:
            continue
        made += result["made"]
        for stage, (features, logits) in enumerate(zip(result["features"], result["logits"])):
            seconds = result["seconds"][stage].item()
            cells[f"{name}, M {stage}"] = cell(features, logits, real) | {"seconds": seconds}
    if args.sample_only:
        return

    # 3. Tables and claims
    claims = claims_of(cells, args)
    lines = tables_of(cells, args) + claims_table(claims)
    results = {
        "cells": {name: {key: value for key, value in one.items() if key != "halves"} for name, one in cells.items()},
        "claims": claims,
        "num_images": args.num_images,
        "network": {"name": network.name, "sha256": network.sha256, "protocol": args.protocol},
        "reference": reference.describe(),
        "paper_sampler": PAPER,
        "num_halves": NUM_HALVES,
        "seconds": "an image, without its decoding",
        "arguments": {name: getattr(args, name) for name in RECORDED},
        "sampled": distinct(made),
        "scored": {
            "hardware": hardware(torch.device(args.device)),
            "versions": library_versions(),
            "git_revision": git_revision(),
        },
    }
    path = Path(args.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main(parse_args())
