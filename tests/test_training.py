"""The training scripts: what is read in which order, what is masked, and runs that must come to the same weights."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import train_cc3m
import train_rqvae
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from components import WORDS, tiny_pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from rq_draft_revise import DraftAndRevisePipeline, RQVAEModel
from rq_draft_revise.budget import Budget, learning_rate_at
from rq_draft_revise.checkpoints import TrainingLog, checkpoints_in, load_checkpoint, save_checkpoint
from rq_draft_revise.data import (
    decode_all,
    decode_image,
    decoded_batches,
    load_split,
    to_pixel_values,
    training_order,
)


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"train_rqvae": train_rqvae, "train_cc3m": train_cc3m}
NUM_IMAGES = 22  # no multiple of any batch below: epochs end in the middle of one


@pytest.fixture(scope="module", autouse=True)
def one_process_on_the_cpu(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        cache = str(tmp_path_factory.mktemp("cache"))
        patch.setenv("HF_DATASETS_CACHE", cache)  # for processes that the tests start
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield


@pytest.fixture(autouse=True)
def no_trace():
    """accelerate's state is one a process, and the scripts seed the global random state."""
    with torch.random.fork_rng(devices=[]):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> Path:
    """`data`, 22 + 8 images of 8×8 pixels in random colours with captions; `pipeline`, `pipeline-dropout`."""
    folder = tmp_path_factory.mktemp("problem")
    (folder / "data").mkdir()
    random = np.random.default_rng(0)
    captions = ["a cat at dusk", "an owl in the snow", "the volcano", "rocket at night in the snow"]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for split, count in (("train", NUM_IMAGES), ("test", 8)):
        colors = random.integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
        images = [Image.fromarray(c.repeat(4, axis=0).repeat(4, axis=1)) for c in colors]
        rows = {"image": images, "text": [captions[i % 4] for i in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{split}-00000.parquet")
    tiny_pipeline("text").save_pretrained(folder / "pipeline")
    tiny_pipeline("text", dropout=0.1).save_pretrained(folder / "pipeline-dropout")
    return folder


def flags_of(script: str, problem: Path, **flags) -> list[str]:
    """A command line of `script` on `problem`; flags of value True stand alone, of value None are left out."""
    pipeline = str(problem / flags.pop("pipeline", "pipeline"))
    own = {"vae": f"{pipeline}/vae"} if script == "train_rqvae" else {"pretrained_model_name_or_path": pipeline}
    common = {"dataset_name": problem / "data", "mixed_precision": "no", "logging_steps": 1}
    argv = []
    for name, value in {**own, **common, **flags}.items():
        if value is not None:
            argv += [f"--{name}"] if value is True else [f"--{name}", *(str(value).split())]
    return argv


def train(script: str, problem: Path, output_dir: Path, **flags) -> list[dict]:
    """Run a script to its end and return its log."""
    module = SCRIPTS[script]
    module.main(module.parse_args(flags_of(script, problem, output_dir=output_dir, **flags)))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return read_log(output_dir)


def read_log(output_dir: Path) -> list[dict]:
    """The entries of a log, without what the clock has a part in."""
    lines = (output_dir / "train_log.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("seconds", "images_per"))} for line in lines
    ]


def weights_in(output_dir: Path) -> dict[str, torch.Tensor]:
    """What a script exports: the RQ-VAE, or the transformer of the pipeline."""
    name = "diffusion_pytorch_model.safetensors"
    return load_file(output_dir / "transformer" / name if (output_dir / "transformer").is_dir() else output_dir / name)


def tensors_in(state, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors in nested dictionaries and lists, by their path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {name: tensor for key, value in items for name, tensor in tensors_in(value, f"{prefix}/{key}").items()}


def first_gradient(output_dir: Path, beta1: float) -> dict[str, torch.Tensor]:
    """The gradient of the first step, by parameter: Adam's first moment is then (1 - beta1) times it.

    The weights themselves would be a poor witness. Adam divides by the gradient's size, so where the true gradient is
    zero (the bias of a key, or one before a normalization) the rounding decides the sign of a whole step.
    """
    state = torch.load(output_dir / "checkpoint-1" / "optimizer.bin", weights_only=True)["state"]
    return {index: moments["exp_avg"] / (1 - beta1) for index, moments in state.items()}


def assert_equal_gradients(actual: dict, expected: dict, tolerance: float = 1e-5) -> None:
    """Up to float32 sums in another order: 1e-5 of the largest entry of all."""
    assert actual.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values()).item()
    assert scale > 1e-3, "a gradient that vanishes proves nothing"
    for index, gradient in expected.items():
        torch.testing.assert_close(actual[index], gradient, rtol=0, atol=tolerance * scale)


# --------------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("num_images", [1, 2, 7, 64])
def test_every_epoch_reads_every_image_once_in_an_order_of_its_own(num_images):
    indices, _ = next(training_order(num_images, 0, 5 * num_images, 0, 1, seed=3))
    epochs = indices.view(5, num_images)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(num_images).expand(5, -1))
    if num_images == 64:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 5
        other, _ = next(training_order(num_images, 0, 5 * num_images, 0, 1, seed=4))
        assert not torch.equal(indices, other)


@settings(max_examples=60, deadline=None)
@given(
    num_images=st.integers(1, 20),
    start=st.integers(0, 50),
    batch_size=st.integers(1, 7),
    num_processes=st.integers(1, 4),
    seed=st.integers(0, 2),
)
def test_the_order_is_the_same_however_it_is_split_and_wherever_it_resumes(
    num_images, start, batch_size, num_processes, seed
):
    end = start + 3 * num_processes * batch_size
    whole = next(training_order(num_images, 0, end, 0, 1, seed))
    shares = [training_order(num_images, start, batch_size, p, num_processes, seed) for p in range(num_processes)]
    micro_batches = [next(share) for _ in range(3) for share in shares]  # a micro-batch of each process, then the next
    for expected, parts in zip(whole, zip(*micro_batches)):
        assert torch.equal(torch.cat(parts), expected[start:end])


def test_every_epoch_mirrors_another_half_of_the_images():
    indices, flips = next(training_order(2000, 0, 4000, 0, 1, seed=0))
    by_image = torch.stack([flips[:2000][indices[:2000].argsort()], flips[2000:][indices[2000:].argsort()]])
    assert abs(flips.float().mean() - 0.5) < 4 * 0.5 / math.sqrt(4000)
    assert abs((by_image[0] == by_image[1]).float().mean() - 0.5) < 4 * 0.5 / math.sqrt(2000)


@pytest.mark.parametrize(
    "name, value",
    [("num_images", 0), ("start", -1), ("batch_size", 0), ("process_index", 2), ("process_index", -1), ("seed", -1)],
)
def test_an_impossible_order_is_refused_by_name(name, value):
    arguments = dict(num_images=5, start=0, batch_size=2, process_index=0, num_processes=2, seed=0)
    with pytest.raises(ValueError, match=f"`{name}`.*got {value}"):
        next(training_order(**{**arguments, name: value}))


# ---------------------------------------------------------------------------------------------------------- the data


def test_pixels_span_minus_one_to_one_and_only_flipped_images_are_mirrored():
    images = torch.randint(0, 256, (3, 3, 4, 5), dtype=torch.uint8)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 0, 255
    plain = to_pixel_values(images)
    assert plain.dtype == torch.float32 and plain.min() == -1 and plain.max() == 1
    some = to_pixel_values(images, torch.tensor([False, True, False]))
    assert torch.equal(some[1], plain[1].flip(-1))
    assert torch.equal(some[[0, 2]], plain[[0, 2]])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("size", [(8, 8), (16, 16), (24, 8), (9, 31), (5, 4)])
def test_an_image_of_any_mode_and_shape_becomes_a_square_of_colours(mode, size):
    decoded = decode_image(Image.new("RGB", size, (102, 102, 102)).convert(mode), 8)
    assert decoded.shape == (3, 8, 8) and decoded.dtype == torch.uint8
    assert (decoded == 102).all()  # a grey that the web palette has


def test_what_is_cropped_is_the_center():
    image = Image.new("RGB", (24, 8), "red")
    image.paste("blue", (8, 0, 16, 8))
    blue = torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    assert torch.equal(decode_image(image, 8), blue)
    assert torch.equal(decode_image(image.transpose(Image.Transpose.TRANSPOSE), 8), blue)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_decoding_as_needed_gives_what_decoding_ahead_gives_and_draws_nothing(problem, num_workers):
    dataset = load_split("train", dataset_name=str(problem / "data"))
    images = decode_all(dataset, "image", 8)
    batches = [[3, 1, 4], [1, 5], [9]]
    state = torch.get_rng_state()
    decoded = list(decoded_batches(dataset, iter(batches), "image", 8, torch.device("cpu"), num_workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(decoded) == len(batches)
    for batch, indices in zip(decoded, batches):
        assert torch.equal(batch, images[indices])


def test_every_source_gives_the_same_images_and_captions(problem, tmp_path):
    dataset = load_split("train", caption_column="text", dataset_name=str(problem / "data"))
    expected = decode_all(dataset, "image", 8)
    assert len(dataset) == NUM_IMAGES and expected.float().std() > 50

    rows = []
    for i, row in enumerate(dataset):
        row["image"].save(tmp_path / f"{i:02d}.png")
        rows.append({"file_name": f"{i:02d}.png", "text": row["text"]})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "files").mkdir()
    paths = [{"image": str(tmp_path / row["file_name"]), "text": row["text"]} for row in rows]
    (tmp_path / "files" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in paths))
    sources = [
        {"train_data_dir": str(tmp_path)},
        {"data_files": [str(problem / "data" / "train-00000.parquet")], "train_split": "learn"},
        {"data_files": [str(tmp_path / "files" / "rows.jsonl")], "train_split": "learn"},
    ]
    for source in sources:
        other = load_split(source.get("train_split", "train"), caption_column="text", **source)
        assert torch.equal(decode_all(other, "image", 8), expected), source
        assert other["text"][:] == dataset["text"][:]
    assert len(load_split("train[:10]", dataset_name=str(problem / "data"))) == 10


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("image_column", {"image_column": "picture"}),
        ("caption_column", {"caption_column": "title"}),
        ("data_files", {"dataset_name": None, "data_files": ["images.zip"]}),
        ("data_files", {"dataset_name": None, "data_files": ["a.csv", "b.json"]}),
        ("dataset_name", {"dataset_name": None}),
        ("valid", {"split": "valid"}),
        ("train[:0]", {"split": "train[:0]"}),
    ],
)
def test_data_that_cannot_be_had_are_refused_by_name(name, arguments, problem):
    with pytest.raises(ValueError, match=re.escape(name)):
        load_split(**{"split": "train", "dataset_name": str(problem / "data"), **arguments})


# --------------------------------------------------------------------------------------------------------- the masks


def distance_from_cosine(num_masked: torch.Tensor, num_positions: int) -> float:
    """The largest distance between distribution functions: of the counts, and of ceil(cos(pi r / 2) N).

    The latter is P(count <= k) = 2/pi arcsin(k / N).
    """
    k = torch.arange(1, num_positions + 1)
    empirical = (num_masked[:, None] <= k).double().mean(0)
    return (empirical - 2 / math.pi * torch.arcsin(k.double() / num_positions)).abs().max().item()


@pytest.mark.parametrize("num_positions", [16, 64, 256])
def test_a_stratified_batch_has_its_share_of_every_mask_ratio(num_positions):
    for seed in range(5):
        masks = train_cc3m.random_mask(500, num_positions, torch.Generator().manual_seed(seed))
        # Of one r a stratum each is at most one on the wrong side: no statistics, and no room for a floor or a round.
        assert distance_from_cosine(masks.sum(1), num_positions) <= 1 / 500 + 1e-9


def test_of_all_positions_two_out_of_pi_are_masked():
    masks = train_cc3m.random_mask(1000, 1024, torch.Generator().manual_seed(0))
    # The ceiling adds half a position of 1024 on the average; a stratum is a thousandth wide.
    assert masks.double().mean().item() == pytest.approx(2 / math.pi + 0.5 / 1024, abs=1e-3)


def test_independent_masks_have_the_distribution_of_the_paper():
    counts = train_cc3m.random_mask(20_000, 64, torch.Generator().manual_seed(0), stratified=False).sum(1)
    assert distance_from_cosine(counts, 64) < 1.63 / math.sqrt(20_000)  # Kolmogorov's bound, 1 % level
    assert counts.min() >= 1 and counts.max() == 64


def test_each_image_of_a_stratified_batch_has_the_same_distribution():
    generator = torch.Generator().manual_seed(0)
    shares = torch.stack([train_cc3m.random_mask(8, 256, generator).double().mean(1) for _ in range(2000)])
    deviation = math.sqrt(1 / 2 - 4 / math.pi**2)  # of cos(pi r / 2)
    assert (shares.mean(0) - 2 / math.pi - 0.5 / 256).abs().max() < 4 * deviation / math.sqrt(2000)


@pytest.mark.parametrize("stratified", [True, False])
def test_which_positions_are_masked_is_uniform(stratified):
    count, num_positions = 20_000, 16
    masks = train_cc3m.random_mask(count, num_positions, torch.Generator().manual_seed(0), stratified).double()
    together = masks.T @ masks / count  # how often two positions are masked at once; on the diagonal, how often each
    for frequencies in (together.diagonal(), together[~torch.eye(num_positions, dtype=torch.bool)]):
        p = frequencies.mean()
        assert (frequencies - p).abs().max() < 5 * math.sqrt(p * (1 - p) / count)


def test_at_least_one_position_is_masked_and_at_most_all():
    for num_positions in (1, 2, 64):
        for stratified in (True, False):
            counts = train_cc3m.random_mask(3000, num_positions, torch.Generator().manual_seed(1), stratified).sum(1)
            assert counts.min() == 1 and counts.max() == num_positions


# ---------------------------------------------------------------------------------- the length of a run, and its log


def test_the_learning_rate_warms_up_linearly_and_ends_at_zero():
    rates = [learning_rate_at(step, 0.0, 0.2, "constant", warmup_steps=4) for step in range(6)]
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
    cosine = [learning_rate_at(100, fraction / 10, 0.2, "cosine", warmup_steps=4) for fraction in range(11)]
    assert cosine[0] == 0.2 and cosine[5] == pytest.approx(0.1) and cosine[10] == 0
    assert cosine == sorted(cosine, reverse=True)
    assert learning_rate_at(100, 1.2, 0.2) == 0
    assert learning_rate_at(0, 0.0, 0.2) == 0.2
    with pytest.raises(ValueError, match="`schedule`.*'linear'"):
        learning_rate_at(0, 0.0, 0.2, "linear")


def test_a_budget_is_used_up_by_steps_or_by_seconds_whichever_comes_first():
    accelerator = Accelerator()
    assert Budget(accelerator, 10).fraction_used(4) == 0.4
    assert Budget(accelerator, 10, max_train_seconds=1e6).fraction_used(4) == 0.4
    resumed = Budget(accelerator, 10, max_train_seconds=200, seconds_before=100)
    assert 100 <= resumed.elapsed() < 150
    assert 0.5 <= resumed.fraction_used(4) < 0.75
    for name, arguments in (("max_train_steps", (0,)), ("max_train_seconds", (10, 0.0))):
        with pytest.raises(ValueError, match=f"`{name}`"):
            Budget(accelerator, *arguments)


def test_a_resumed_log_has_every_step_once(tmp_path):
    accelerator = Accelerator()
    log = TrainingLog(accelerator, tmp_path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "run": 1, "usage": [0.5, 0.25]}, f"step {step}")
    log.close()
    with (tmp_path / "train_log.jsonl").open("a") as file:
        file.write('{"step": 4, "ru')  # killed
    log = TrainingLog(accelerator, tmp_path, 2)
    log.write({"step": 3, "run": 2}, "step 3")
    log.close()
    assert [(entry["step"], entry["run"]) for entry in read_log(tmp_path)] == [(1, 1), (2, 1), (3, 2)]
    TrainingLog(accelerator, tmp_path, 0).close()  # a new run is a new log
    assert read_log(tmp_path) == []


def test_trackers_get_every_number_of_an_entry_a_list_place_by_place(tmp_path):
    class Recorder(GeneralTracker):
        name, requires_logging_directory, tracker, entries = "recorder", False, None, []

        def __init__(self):
            super().__init__()

        def log(self, values, step=None):
            self.entries.append((step, values))

    accelerator = Accelerator(log_with=[recorder := Recorder()])
    accelerator.init_trackers("run")
    log = TrainingLog(accelerator, tmp_path, 0)
    log.write({"kind": "train", "step": 7, "loss": 0.5, "usage": [0.25, 1.0]}, "step 7")
    log.close()
    assert recorder.entries == [(7, {"step": 7, "loss": 0.5, "usage/0": 0.25, "usage/1": 1.0})]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_budget_in_seconds_ends_cleanly_at_learning_rate_zero(script, problem, tmp_path):
    log = train(
        script, problem, tmp_path, train_batch_size=4, max_train_seconds=0.5, max_train_steps=10**6,
        learning_rate=1e-4, checkpointing_steps=10**6, validation_split="none",
    )  # fmt: skip
    rates = [entry["learning_rate"] for entry in log]
    assert rates[0] > 0.5e-4 and rates[-1] < 0.3 * rates[0] and rates == sorted(rates, reverse=True)
    assert weights_in(tmp_path)


# --------------------------------------------------------------------------------------------------- the checkpoints


def test_a_checkpoint_being_written_is_not_a_checkpoint(tmp_path, monkeypatch):
    accelerator = Accelerator()
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    save_checkpoint(accelerator, tmp_path, {"step": 9}, {})

    def killed_halfway(folder):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(accelerator, "save_state", killed_halfway)
        save_checkpoint(accelerator, tmp_path, {"step": 10}, {})
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-9", "checkpoint-10.partial"}
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-9"]
    saved = model.weight.detach().clone()
    model.weight.data.zero_()
    assert load_checkpoint(accelerator, tmp_path, "latest")["step"] == 9
    assert torch.equal(model.weight, saved)
    with pytest.raises(ValueError, match="`resume_from_checkpoint`.*partial"):
        load_checkpoint(accelerator, tmp_path, str(tmp_path / "checkpoint-10.partial"))

    save_checkpoint(accelerator, tmp_path, {"step": 10}, {}, total_limit=1)  # takes the place of what was left
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert load_checkpoint(accelerator, tmp_path / "elsewhere", "latest") is None


RESUMED = {
    "train_rqvae, cached": ("train_rqvae", {"cache_images_in_memory": True, "ema_decay": 0.9}),
    "train_rqvae, decoding": ("train_rqvae", {"gradient_accumulation_steps": 2, "reconstruction_loss": "both"}),
    "train_cc3m, cached": ("train_cc3m", {"cache_codes": True, "ema_decay": 0.9}),
    "train_cc3m, decoding": ("train_cc3m", {"gradient_accumulation_steps": 2, "no-stratified_masks": True}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_in_mid_epoch_is_the_uninterrupted_one_to_the_bit(name, problem, tmp_path):
    script, flags = RESUMED[name]
    flags = dict(
        pipeline="pipeline-dropout", train_batch_size=5, max_train_steps=8, checkpointing_steps=3, validation_steps=4,
        random_flip=True, learning_rate=1e-3, lr_warmup_steps=2, **flags,
    )  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    expected = train(script, problem, whole, **flags)
    assert [path.name for path in checkpoints_in(whole)] == ["checkpoint-3", "checkpoint-6"]
    images = json.loads((whole / "checkpoint-3" / "progress.json").read_text())["images"]
    assert images % NUM_IMAGES != 0, "not in mid-epoch"

    # What is left of a run that was killed while it wrote its second checkpoint, at step 6.
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copytree(whole / "checkpoint-6", resumed / "checkpoint-6.partial")
    (resumed / "checkpoint-6.partial" / "model.safetensors").write_bytes(b"half")
    lines = (whole / "train_log.jsonl").read_text().splitlines(keepends=True)
    (resumed / "train_log.jsonl").write_text("".join(lines[:6]) + lines[6][:10])
    assert train(script, problem, resumed, resume_from_checkpoint="latest", **flags) == expected

    weights = weights_in(whole)
    for key, tensor in weights_in(resumed).items():
        assert torch.equal(tensor, weights[key]), key
    for file in ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl"):  # the last is the averaged weights
        if file == "model.safetensors":
            states = [load_file(folder / "checkpoint-6" / file) for folder in (whole, resumed)]
        else:
            states = [torch.load(folder / "checkpoint-6" / file, weights_only=True) for folder in (whole, resumed)]
        first, second = map(tensors_in, states)
        assert first.keys() == second.keys() and len(first) > 10
        for key, tensor in first.items():
            assert torch.equal(second[key], tensor), f"{file}: {key}"
    live, earlier = (load_file(whole / f"checkpoint-{step}" / "model.safetensors") for step in (6, 3))
    key = next(key for key in weights if key.endswith("to_q.weight"))
    assert not torch.equal(live[key], earlier[key]) and not torch.equal(live[key], weights[key])


# --------------------------------------------------------------------------------- micro-batches and processes


@pytest.mark.parametrize("script", SCRIPTS)
def test_accumulated_micro_batches_equal_the_large_batch(script, problem, tmp_path):
    logs, beta1 = {}, {"train_rqvae": 0.5, "train_cc3m": 0.9}[script]
    # Masks of different sizes and dropped captions make the parts of a batch unequal.
    own = {"condition_dropout": 0.4, "no-stratified_masks": True} if script == "train_cc3m" else {}
    for micro_batches in (1, 3):
        logs[micro_batches] = train(
            script, problem, tmp_path / f"{micro_batches}", train_batch_size=12 // micro_batches,
            gradient_accumulation_steps=micro_batches, max_train_steps=2, checkpointing_steps=1, learning_rate=1e-4,
            random_flip=True, max_grad_norm=0.5, **own,
        )  # fmt: skip
    assert_equal_gradients(*(first_gradient(tmp_path / name, beta1) for name in ("3", "1")))
    if script == "train_rqvae":
        # The codebook, with the restarts that the first update of one is: the moving averages are sums over the batch.
        books = [load_file(tmp_path / name / "checkpoint-1" / "model.safetensors") for name in ("3", "1")]
        for key in ("quantizer.codebook", "quantizer.ema_counts", "quantizer.ema_sums"):
            torch.testing.assert_close(books[0][key], books[1][key], rtol=1e-5, atol=1e-5)
    for one, three in zip(logs[1], logs[3]):
        assert one.keys() == three.keys()
        for name in one.keys() - {"kind", "split"}:
            assert three[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


PROCESSES = """
import json, os, sys, torch
import train_cc3m, train_rqvae
from accelerate.state import AcceleratorState, GradientState
from rq_draft_revise import RQVAEModel

torch.set_num_threads(1)
# One process group for all runs: a second one would find the addresses of the first in torchrun's store.
leave, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, lambda group=None: None
folder, rank, books = sys.argv[1], os.environ["RANK"], []

def run(script, flags):
    script.main(script.parse_args(flags))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()

def recorded(self, *args, update_codebook=RQVAEModel.update_codebook, **kwargs):
    output = update_codebook(self, *args, **kwargs)
    books.append({name: tensor.clone() for name, tensor in self.state_dict().items()})
    return output

RQVAEModel.update_codebook = recorded
for name, flags in json.loads(open(f"{folder}/runs.json").read()):
    run({"train_rqvae": train_rqvae, "train_cc3m": train_cc3m}[name], flags)
torch.save(books, f"{folder}/books-{rank}.pt")
leave()
"""


@pytest.fixture(scope="module")
def two_processes(problem, tmp_path_factory) -> Path:
    """A folder with what runs of two processes wrote, all in one start of torchrun: importing takes longest."""
    folder = tmp_path_factory.mktemp("two-processes")
    whole = dict(
        pipeline="pipeline-dropout", train_batch_size=3, gradient_accumulation_steps=2, max_train_steps=4,
        checkpointing_steps=2, learning_rate=1e-3, random_flip=True, cache_codes=True,
    )  # fmt: skip
    runs = [
        ("train_cc3m", dict(output_dir=folder / "equal", **EQUAL)),
        ("train_rqvae", dict(output_dir=folder / "rqvae", train_batch_size=4, max_train_steps=4, learning_rate=1e-3)),
        ("train_cc3m", dict(output_dir=folder / "whole", **whole)),
        (
            "train_cc3m",
            dict(output_dir=folder / "resumed", resume_from_checkpoint=folder / "whole/checkpoint-2", **whole),
        ),
    ]
    (folder / "runs.json").write_text(json.dumps([(name, flags_of(name, problem, **flags)) for name, flags in runs]))
    (folder / "processes.py").write_text(PROCESSES)
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(folder / "processes.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return folder


EQUAL = dict(
    train_batch_size=3, gradient_accumulation_steps=2, max_train_steps=3, checkpointing_steps=1, learning_rate=1e-4,
    random_flip=True, condition_dropout=0.4, validation_steps=2,
)  # fmt: skip


@pytest.mark.slow
def test_two_processes_equal_one_of_the_same_batch(two_processes, problem, tmp_path):
    expected = train("train_cc3m", problem, tmp_path, **{**EQUAL, "train_batch_size": 6})
    actual = read_log(two_processes / "equal")
    assert_equal_gradients(first_gradient(two_processes / "equal", 0.9), first_gradient(tmp_path, 0.9))
    assert len(actual) == len(expected) == 3 + 2 * 2
    for one, two in zip(expected, actual):
        assert one.keys() == two.keys()
        for name in one.keys() - {"kind", "split"}:
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.slow
def test_two_processes_hold_bit_identical_models_after_every_step(two_processes):
    first, second = (torch.load(two_processes / f"books-{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first) == len(second) == 4
    for step in range(4):
        for key, tensor in first[step].items():
            assert torch.equal(tensor, second[step][key]), f"{key} differs after step {step + 1}"
        if step > 0:
            assert not torch.equal(first[step]["quantizer.codebook"], first[step - 1]["quantizer.codebook"])
    exported = weights_in(two_processes / "rqvae")
    assert torch.equal(exported["quantizer.codebook"], first[-1]["quantizer.codebook"])


@pytest.mark.slow
def test_two_processes_resume_to_the_bit(two_processes):
    """Each has its own random stream, of the dropout; both are restored."""
    expected = weights_in(two_processes / "whole")
    for key, tensor in weights_in(two_processes / "resumed").items():
        assert torch.equal(tensor, expected[key]), key
    assert read_log(two_processes / "resumed") == [e for e in read_log(two_processes / "whole") if e["step"] > 2]
    streams = [
        torch.load(two_processes / "whole" / "checkpoint-2" / f"random_states_{rank}.pkl", weights_only=False)
        for rank in range(2)
    ]
    assert not torch.equal(*(stream["torch_manual_seed"] for stream in streams))


# ------------------------------------------------------------------------------------------------------- the results


@pytest.fixture(scope="module")
def overfitted(problem, tmp_path_factory) -> dict[str, Path]:
    """Both stages, one after the other, on the first eight images until they know them."""
    folder = tmp_path_factory.mktemp("overfitted")
    vae, pipeline = folder / "vae", folder / "pipeline"
    common = dict(
        train_split="train[:8]", train_batch_size=8, max_train_steps=100, lr_warmup_steps=5, ema_decay=0.9,
        checkpointing_steps=10**6, validation_steps=10**6,
    )  # fmt: skip
    scratch = problem / "pipeline"
    with torch.random.fork_rng(devices=[]):
        train(
            "train_rqvae", problem, vae, vae=None, vae_config=scratch / "vae", cache_images_in_memory=True,
            learning_rate=5e-3, **common,
        )  # fmt: skip
        train(
            "train_cc3m", problem, pipeline, vae=vae, transformer_config=scratch / "transformer", cache_codes=True,
            learning_rate=1e-2, **common,
        )  # fmt: skip
    return {"train_rqvae": vae, "train_cc3m": pipeline}


EXPECTED_KEYS = {
    "train_rqvae": {
        "train": {"loss", "mse", "reconstruction_loss", "commitment_loss", "usage", "perplexity", "restarts"},
        "validation": {"mse", "psnr", "usage", "perplexity", "train_mse", "train_psnr", "mse_gap"},
    },
    "train_cc3m": {
        "train": {"loss", "image_loss", "text_loss", "grad_norm"},
        "validation": {"split", "image_loss", "text_loss", "image_loss_by_ratio"},
    },
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_line_of_the_log_is_json_that_says_which_step_and_what_was_measured(overfitted, script):
    entries = [json.loads(line) for line in (overfitted[script] / "train_log.jsonl").read_text().splitlines()]
    training = [entry for entry in entries if entry["kind"] == "train"]
    assert [entry["step"] for entry in training] == list(range(1, 101))
    assert [entry["images"] for entry in training] == list(range(8, 8 * 101, 8))
    assert [entry["seconds"] for entry in entries] == sorted(entry["seconds"] for entry in entries)
    for entry in entries:
        common = {"kind", "step", "images", "seconds"}
        common |= {"images_per_second", "learning_rate"} if entry["kind"] == "train" else set()
        assert entry.keys() == common | EXPECTED_KEYS[script][entry["kind"]]
    splits = [entry.get("split") for entry in entries if entry["kind"] == "validation"]
    assert splits == ([None] if script == "train_rqvae" else ["test", "seen"])


@pytest.mark.parametrize("script, quantity, factor", [
    ("train_rqvae", "mse", 0.1), ("train_cc3m", "image_loss", 0.5), ("train_cc3m", "text_loss", 0.2),
])  # fmt: skip
def test_the_loss_falls_on_eight_images(overfitted, script, quantity, factor):
    values = [entry[quantity] for entry in read_log(overfitted[script]) if entry["kind"] == "train"]
    assert np.mean(values[-10:]) < factor * np.mean(values[:3])


def test_held_back_images_are_not_what_was_learned(overfitted):
    validation = {e["split"]: e for e in read_log(overfitted["train_cc3m"]) if e["kind"] == "validation"}
    assert validation["seen"]["image_loss"] < 0.8 * validation["test"]["image_loss"]
    (entry,) = (e for e in read_log(overfitted["train_rqvae"]) if e["kind"] == "validation")
    assert entry["train_mse"] < entry["mse"] and entry["mse_gap"] == pytest.approx(entry["mse"] - entry["train_mse"])


def test_the_exported_rqvae_reconstructs_what_the_log_says(overfitted, problem):
    vae = RQVAEModel.from_pretrained(overfitted["train_rqvae"])
    dataset = load_split("test", dataset_name=str(problem / "data"))
    pixel_values = to_pixel_values(decode_all(dataset, "image", 8))
    with torch.no_grad():
        mse = (vae(pixel_values).sample.clamp(-1, 1) - pixel_values).square().mean().item()
    (entry,) = (e for e in read_log(overfitted["train_rqvae"]) if e["kind"] == "validation")
    assert mse == pytest.approx(entry["mse"], rel=1e-4)
    assert len(list(overfitted["train_rqvae"].glob("reconstructions-*.png"))) == 1


def test_the_exported_pipeline_loads_and_draws(overfitted):
    pipe = DraftAndRevisePipeline.from_pretrained(overfitted["train_cc3m"])
    pipe.set_progress_bar_config(disable=True)
    vae = RQVAEModel.from_pretrained(overfitted["train_rqvae"])
    assert torch.equal(pipe.transformer.codebook, vae.quantizer.codebook)
    assert not pipe.transformer.training
    images = pipe(
        ["a cat at dusk", "the volcano"], generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all()
    assert images.std() > 0.05


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "flag, value",
    [
        ("dataset_name", None),
        ("train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("num_train_epochs", 0),
        ("max_train_steps", 0),
        ("max_train_seconds", 0),
        ("max_train_seconds", "nan"),
        ("logging_steps", 0),
        ("validation_steps", 0),
        ("max_validation_images", 0),
        ("checkpointing_steps", -1),
        ("checkpoints_total_limit", 0),
        ("ema_decay", 1.0),
    ],
)
def test_a_flag_out_of_range_is_refused_by_name(script, flag, value, problem):
    with pytest.raises(ValueError, match=f"--{flag}" + ("" if value is None else f".*got {value}")):
        SCRIPTS[script].parse_args(flags_of(script, problem, **{flag: value}))


@pytest.mark.parametrize(
    "script, flag, value",
    [
        ("train_rqvae", "validation_batch_size", 0),
        ("train_rqvae", "vae", None),
        ("train_rqvae", "vae_config", "config.json"),
        ("train_cc3m", "encoding_batch_size", 0),
        ("train_cc3m", "condition_dropout", 1.0),
    ],
)
def test_a_flag_of_one_script_out_of_range_is_refused_by_name(script, flag, value, problem):
    with pytest.raises(ValueError, match=f"--{flag}"):
        SCRIPTS[script].parse_args(flags_of(script, problem, **{flag: value}))


@pytest.mark.parametrize(
    "script, flag, value",
    [
        ("train_rqvae", "image_column", "picture"),
        ("train_rqvae", "resolution", 7),
        ("train_rqvae", "resume_from_checkpoint", "nowhere"),
        ("train_cc3m", "image_column", "picture"),
        ("train_cc3m", "caption_column", "title"),
        ("train_cc3m", "resolution", 16),
        ("train_cc3m", "resume_from_checkpoint", "nowhere"),
        ("train_cc3m", "attention_backend", "fastest"),
    ],
)
def test_a_flag_that_does_not_fit_the_data_or_the_model_is_refused_by_name(script, flag, value, problem, tmp_path):
    with pytest.raises(ValueError, match=f"{flag}.*got.*{value}" if flag != "attention_backend" else value):
        train(script, problem, tmp_path, **{flag: value})
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("flag, missing", [("vae", "vae/*.safetensors"), ("tokenizer", "tokenizer/*.json")])
def test_a_pipeline_that_lacks_a_component_asks_for_its_flag(flag, missing, problem, tmp_path):
    shutil.copytree(problem / "pipeline", tmp_path / "pipeline")
    for path in (tmp_path / "pipeline").glob(missing):
        path.unlink()
    with pytest.raises(ValueError, match=f"--{flag}"):
        train("train_cc3m", problem, tmp_path / "output", pretrained_model_name_or_path=tmp_path / "pipeline")


def test_a_tokenizer_of_more_words_than_the_transformer_knows_is_refused(problem, tmp_path):
    config = json.loads((problem / "pipeline" / "transformer" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_vocab_size": len(WORDS) - 1}))
    with pytest.raises(ValueError, match=f"--tokenizer.*{len(WORDS) - 1}.*got {len(WORDS)}"):
        train("train_cc3m", problem, tmp_path / "output", transformer_config=tmp_path)


def test_cached_codes_of_another_rqvae_are_not_reused(problem, tmp_path, capsys):
    flags = dict(train_batch_size=8, max_train_steps=1, cache_codes=True, validation_split="none")
    path = tmp_path / "codes.safetensors"
    train("train_cc3m", problem, tmp_path, **flags)
    codes = load_file(path)["codes"]
    assert codes.shape == (NUM_IMAGES, 1, 4, 4, 3)
    capsys.readouterr()
    train("train_cc3m", problem, tmp_path, **flags)
    assert "reading the training codes" in capsys.readouterr().out

    vae = RQVAEModel.from_pretrained(problem / "pipeline" / "vae")
    vae.quant_conv.bias.data += 1
    vae.save_pretrained(tmp_path / "another")
    train("train_cc3m", problem, tmp_path, vae=tmp_path / "another", **flags)
    assert "reading the training codes" not in capsys.readouterr().out
    assert not torch.equal(load_file(path)["codes"].int(), codes.int())


@pytest.mark.slow
def test_the_package_needs_nothing_of_the_train_extra_to_be_imported():
    program = """
import sys
import rq_draft_revise
names = {"datasets", "rq_draft_revise.data", "rq_draft_revise.checkpoints", "rq_draft_revise.budget"}
print(sorted(names & set(sys.modules)))
sys.modules["datasets"] = sys.modules["accelerate"] = None
import rq_draft_revise.budget, rq_draft_revise.checkpoints, rq_draft_revise.data
"""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
