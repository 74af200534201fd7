"""The trainers of the second stage: what is masked and averaged, and runs that must come to the same weights."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import datasets
import encode_dataset
import numpy as np
import pytest
import torch
import train_cc3m
import train_imagenet
import train_rqvae
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from claimed_device import claimed_device
from components import (
    NUM_CLASSES,
    ROOT,
    WORDS,
    forget_accelerator,
    run_in_two_processes,
    tiny_pipeline,
    tiny_rq_pipeline,
    tiny_transformer,
    tiny_vae,
)
from PIL import Image
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from rq_draft_revise import (
    ContextualRQTransformerModel,
    DraftAndRevisePipeline,
    DraftAndReviseScheduler,
    RQTransformerPipeline,
    RQVAEModel,
    publishing,
    training,
    training_run,
)
from rq_draft_revise.batches import Batch, streamed_batches
from rq_draft_revise.budget import Budget, learning_rate_at
from rq_draft_revise.checkpoints import checkpoints_in
from rq_draft_revise.code_cache import codes_in_memory, encode
from rq_draft_revise.data import SkippedRows, load_split
from rq_draft_revise.decoded_images import to_pixel_values
from rq_draft_revise.masks import Draws, draws_of_step, random_mask
from rq_draft_revise.splits import first_rows, load_splits, seen_rows, training_batches, validation_sets_of
from rq_draft_revise.training_log import TrainingLog
from rq_draft_revise.validation import ValidationSet, validation_loss


SCRIPTS = {"train_cc3m": train_cc3m, "train_imagenet": train_imagenet, "encode_dataset": encode_dataset}
TRAINERS = ("train_cc3m", "train_imagenet")
NUM_IMAGES = 22  # no multiple of any batch below: epochs end in the middle of one
CAPTIONS = ["a cat at dusk", "an owl in the snow", "the volcano", "rocket at night in the snow"]
NAMES = ["dusk", "snow", "volcano", "rocket", "night"]


pytestmark = pytest.mark.usefixtures("one_process_on_the_cpu", "no_trace")


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> Path:
    """`data`, 22 + 8 images of 8×8 pixels in random colours with captions and labels; pipelines of tiny components."""
    folder = tmp_path_factory.mktemp("problem")
    (folder / "data").mkdir()
    random = np.random.default_rng(0)
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)}
    )
    for split, count in (("train", NUM_IMAGES), ("test", 8)):
        colors = random.integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
        rows = {
            "image": [Image.fromarray(c.repeat(4, axis=0).repeat(4, axis=1)) for c in colors],
            "text": [CAPTIONS[i % 4] for i in range(count)],
            "label": [i % NUM_CLASSES for i in range(count)],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{split}-00000.parquet")
    for dropout, name in ((0.0, ""), (0.1, "-dropout")):
        tiny_pipeline("text", dropout=dropout).save_pretrained(folder / f"train_cc3m{name}")
        tiny_pipeline("class", dropout=dropout).save_pretrained(folder / f"train_imagenet{name}")
        tiny_rq_pipeline("class", dropout=dropout).save_pretrained(folder / f"train_imagenet-autoregressive{name}")
    return folder


def flags_of(script: str, problem: Path, **flags) -> list[str]:
    """A command line of `script` on `problem`; flags of value True stand alone, of value None are left out."""
    if script == "encode_dataset":
        common = {"vae": problem / "train_cc3m" / "vae", "dataset_name": problem / "data"}
    else:
        kind = "-autoregressive" if flags.get("model") == "autoregressive" else ""
        pipeline = problem / f"{script}{kind}{flags.pop('pipeline', '')}"
        common = {
            "pretrained_model_name_or_path": pipeline, "dataset_name": problem / "data", "mixed_precision": "no",
            "logging_steps": 1, "num_validation_images": 0,
        }  # fmt: skip
    argv = []
    for name, value in {**common, **flags}.items():
        if value is not None:
            values = map(str, value) if isinstance(value, tuple) else str(value).split()
            argv += [f"--{name}"] if value is True else [f"--{name}", *values]
    return argv


def run(script: str, problem: Path, output_dir: Path, **flags) -> None:
    """Run a script to its end."""
    module = SCRIPTS[script]
    module.main(module.parse_args(flags_of(script, problem, output_dir=output_dir, **flags)))
    forget_accelerator()


def train(script: str, problem: Path, output_dir: Path, **flags) -> list[dict]:
    """Run a trainer to its end and return its log."""
    run(script, problem, output_dir, **flags)
    return read_log(output_dir)


def read_log(output_dir: Path) -> list[dict]:
    """The entries of a log, without what the clock has a part in."""
    lines = (output_dir / "train_log.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("seconds", "images_per"))} for line in lines
    ]


def weights_in(output_dir: Path) -> dict[str, torch.Tensor]:
    """The transformer of the exported pipeline."""
    return load_file(output_dir / "transformer" / "diffusion_pytorch_model.safetensors")


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


def assert_equal_logs(actual: list[dict], expected: list[dict]) -> None:
    """Up to the rounding of float32."""
    assert [entry.keys() for entry in actual] == [entry.keys() for entry in expected]
    for entry, other in zip(actual, expected):
        for name in [name for name in entry if "loss" in name or name == "grad_norm"]:
            assert entry[name] == pytest.approx(other[name], rel=1e-4), (name, entry["kind"], entry["step"])


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


def test_a_warm_up_that_may_take_a_share_of_the_budget_is_over_then():
    rates = [learning_rate_at(s, s / 20, 1.0, "constant", 10**6, warmup_share=0.1) for s in range(4)]
    assert rates == pytest.approx([1e-6, 0.5, 1, 1])
    steps = [learning_rate_at(s, s / 10**6, 1.0, "constant", 4, warmup_share=0.1) for s in range(5)]
    assert steps == [0.25, 0.5, 0.75, 1, 1]  # whichever is further on
    assert learning_rate_at(0, 0.0, 1.0, "constant", 0, warmup_share=0.1) == 1


def test_a_budget_is_used_up_by_steps_or_by_seconds_whichever_comes_first():
    accelerator = Accelerator()
    assert Budget(accelerator, 10).fraction_used(4) == 0.4
    assert Budget(accelerator, 10, max_train_seconds=1e6).fraction_used(4) == 0.4
    assert Budget(accelerator, 10, seconds_before=4000).time_left(4) == "1:40:00"
    assert Budget(accelerator, 10).time_left(0) == "?"
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
    log.write({"kind": "validation", "split": "test", "step": 7, "loss": 0.75}, "step 7")
    log.close()
    assert recorder.entries == [
        (7, {"train/loss": 0.5, "train/usage/0": 0.25, "train/usage/1": 1.0}),
        (7, {"validation/test/loss": 0.75}),
    ]


@pytest.mark.parametrize("script", TRAINERS)
def test_a_budget_in_seconds_ends_cleanly_at_learning_rate_zero(script, problem, tmp_path):
    log = train(
        script, problem, tmp_path, train_batch_size=4, max_train_seconds=0.5, max_train_steps=10**6,
        learning_rate=1e-4, checkpointing_steps=10**6, validation_split="none",
    )  # fmt: skip
    rates = [entry["learning_rate"] for entry in log]
    assert rates[0] > 0.5e-4 and rates[-1] < 0.3 * rates[0] and rates == sorted(rates, reverse=True)
    assert weights_in(tmp_path)


@pytest.mark.parametrize("script", TRAINERS)
def test_the_defaults_are_the_recipe_of_the_paper(script):
    args = SCRIPTS[script].parse_args([])
    assert (args.random_flip, args.random_crop, args.tau) == (*[script == "train_imagenet"] * 2, 0)
    assert (args.adam_beta1, args.adam_beta2, args.adam_weight_decay) == (0.9, 0.95, 1e-4)
    assert (args.learning_rate, args.lr_scheduler, args.num_train_epochs) == (1e-4, "cosine", 300)
    assert (args.max_grad_norm, args.ema_decay, args.stratified_masks) == (1.0, 0.9999, True)
    assert 8 * args.train_batch_size * args.gradient_accumulation_steps == 2048
    # Models without a null condition (those published of the baseline) do without dropping it.
    training.check_condition_dropout(args, tiny_transformer("class"))
    assert args.condition_dropout == 0.1


def test_without_any_flag_the_paper_is_reproduced_or_what_is_missing_is_said(monkeypatch):
    monkeypatch.chdir(ROOT)
    args = train_imagenet.parse_args([])
    assert args.pretrained_model_name_or_path == "pipelines/imagenet-256-821m"
    assert (args.dataset_name, args.image_column, args.label_column) == ("ILSVRC/imagenet-1k", "image", "label")
    with pytest.raises(ValueError, match="--vae must name a trained RQ-VAE.*train_rqvae.py"):
        train_imagenet.main(args)
    args = train_cc3m.parse_args([])
    assert (args.dataset_name, args.image_column, args.caption_column) == ("pixparse/cc3m-wds", "jpg", "txt")
    assert args.pretrained_model_name_or_path == "pipelines/cc3m-256-654m"
    with pytest.raises(ValueError, match="--vae"):
        train_cc3m.main(args)
    for script in TRAINERS:
        args = SCRIPTS[script].parse_args(["--model", "autoregressive"])
        assert (ROOT / args.pretrained_model_name_or_path / "transformer" / "config.json").is_file()


@pytest.mark.parametrize("script", [*SCRIPTS.values(), train_rqvae], ids=lambda script: script.__name__)
def test_every_flag_is_explained_with_its_default(script, monkeypatch):
    parsers = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, argv: parsers.append(self) or sys.exit())
    with pytest.raises(SystemExit):
        script.parse_args([])
    (parser,) = parsers
    formatter = parser._get_formatter()
    for action in parser._actions[1:]:
        explained = formatter._expand_help(action)
        assert len(explained.split()) >= 2, f"{action.option_strings} is not explained"
        if action.default is not None:
            assert f"(default: {action.default})" in explained
    assert parser.format_help()


# --------------------------------------------------------------------------------------------------------- resuming


RESUMED = {
    "text, cached": ("train_cc3m", dict(cache_codes=True, random_flip=True, ema_decay=0.9)),
    "text, decoding": (
        "train_cc3m",
        {"gradient_accumulation_steps": 2, "no-stratified_masks": True, "random_crop": True, "tau": 0.5},
    ),
    "text, streaming": ("train_cc3m", dict(streaming=True, shuffle_buffer_size=7, random_flip=True)),
    "class, cached draws": ("train_imagenet", dict(cache_codes=True, tau=0.5, num_draws=2, ema_decay=0)),
    "class, autoregressive": ("train_imagenet", dict(model="autoregressive", num_validation_images=2)),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_in_mid_epoch_is_the_uninterrupted_one_to_the_bit(name, problem, tmp_path):
    script, flags = RESUMED[name]
    flags = dict(
        pipeline="-dropout", train_batch_size=5, max_train_steps=8, checkpointing_steps=3, validation_steps=4,
        learning_rate=1e-3, lr_warmup_steps=2, **flags,
    )  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    expected = train(script, problem, whole, **flags)
    assert [path.name for path in checkpoints_in(whole)] == ["checkpoint-3", "checkpoint-6"]
    progress = json.loads((whole / "checkpoint-3" / "progress.json").read_text())
    assert progress["images"] % NUM_IMAGES != 0, "not in mid-epoch"
    progress = json.loads((whole / "checkpoint-6" / "progress.json").read_text())
    assert progress["epoch"] == progress["images"] // NUM_IMAGES > 0

    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    lines = (whole / "train_log.jsonl").read_text().splitlines(keepends=True)
    (resumed / "train_log.jsonl").write_text("".join(lines[:6]) + lines[6][:10])
    assert train(script, problem, resumed, resume_from_checkpoint="latest", **flags) == expected

    weights = weights_in(whole)
    for key, tensor in weights_in(resumed).items():
        assert torch.equal(tensor, weights[key]), key
    files = ["model.safetensors", "optimizer.bin"]
    if flags.get("ema_decay") != 0:
        files.append("custom_checkpoint_0.pkl")  # the averaged weights
    for file in files:
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


ON_A_DEVICE = {
    "text": ("train_cc3m", {"cache_codes": True}),
    "classes, decoding": ("train_imagenet", {"gradient_accumulation_steps": 2, "random_flip": True}),
    "autoregressive": ("train_imagenet", {"model": "autoregressive", "cache_codes": True}),
}


@pytest.mark.parametrize("name", ON_A_DEVICE)
def test_a_run_on_a_device_is_that_on_the_cpu_resumed_there_too(name, problem, tmp_path):
    script, flags = ON_A_DEVICE[name]
    flags |= dict(train_batch_size=4, max_train_steps=4, checkpointing_steps=2, validation_steps=4, ema_decay=0.9,
                  learning_rate=1e-3, num_validation_images=2)  # fmt: skip
    expected = train(script, problem, tmp_path / "cpu", **flags)
    with claimed_device() as seen:
        whole = train(script, problem, tmp_path / "device", **flags)
        shutil.copytree(tmp_path / "device" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
        resumed = train(script, problem, tmp_path / "resumed", resume_from_checkpoint="latest", **flags)
    assert seen.kernels, "nothing ran there"
    assert_equal_logs(whole, expected)
    assert_equal_logs(resumed, expected[2:])


@pytest.mark.parametrize("script", TRAINERS)
def test_a_line_of_the_log_is_that_of_the_uninterrupted_run_where_the_checkpoint_is_between_two(
    script, problem, tmp_path
):
    flags = dict(train_batch_size=5, max_train_steps=8, checkpointing_steps=3, validation_steps=8, logging_steps=4,
                 learning_rate=1e-3)  # fmt: skip
    expected = train(script, problem, tmp_path / "whole", **flags)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    (tmp_path / "resumed" / "train_log.jsonl").write_text("")
    assert train(script, problem, tmp_path / "resumed", resume_from_checkpoint="latest", **flags) == expected
    assert [entry["step"] for entry in expected] == [4, 8, 8, 8]


def test_a_finished_run_that_is_resumed_has_its_last_validation_once(problem, tmp_path):
    flags = dict(train_batch_size=5, max_train_steps=4, checkpointing_steps=2, validation_steps=3)
    expected = train("train_imagenet", problem, tmp_path, **flags)
    assert [e["split"] for e in expected if e["step"] == 4 and e["kind"] == "validation"] == ["test", "seen"]
    assert train("train_imagenet", problem, tmp_path, resume_from_checkpoint="latest", **flags) == expected
    # One that was killed between the two has both afterwards.
    path = tmp_path / "train_log.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert train("train_imagenet", problem, tmp_path, resume_from_checkpoint="latest", **flags) == expected


def test_a_run_does_not_go_on_with_other_data_but_with_a_copy(problem, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(problem / "data", data)
    flags = dict(dataset_name=data, train_batch_size=5, checkpointing_steps=3, validation_split="none")
    output_dir = tmp_path / "run"
    train("train_cc3m", problem, output_dir, max_train_steps=3, **flags)
    flags |= dict(max_train_steps=3, resume_from_checkpoint=output_dir / "checkpoint-3")
    rows = datasets.Dataset.from_parquet(str(data / "train-00000.parquet"))
    changes = {
        "num_images was 22 and is 21": rows.select(range(NUM_IMAGES - 1)),
        "data_digest was": rows.select(range(NUM_IMAGES - 1, -1, -1)),
    }
    for message, changed in changes.items():
        changed.to_parquet(data / "train-00000.parquet")
        with pytest.raises(ValueError, match=message):
            train("train_cc3m", problem, output_dir, **flags)
    shutil.copy(problem / "data" / "train-00000.parquet", data / "train-00000.parquet")  # at another time
    assert train("train_cc3m", problem, output_dir, **flags)


def test_data_that_make_the_run_longer_are_refused_where_epochs_are_its_length(problem, tmp_path):
    shutil.copytree(problem / "data", tmp_path / "data")
    flags = dict(dataset_name=tmp_path / "data", train_batch_size=5, num_train_epochs=1, validation_split="none",
                 checkpointing_steps=2)  # fmt: skip
    train("train_imagenet", problem, tmp_path / "run", **flags)
    path = str(tmp_path / "data" / "train-00000.parquet")
    rows = datasets.Dataset.from_parquet(path)
    datasets.concatenate_datasets([rows, rows]).to_parquet(path)
    with pytest.raises(ValueError, match="max_train_steps was 5 and is 9"):
        train("train_imagenet", problem, tmp_path / "run", resume_from_checkpoint="latest", **flags)


def test_a_run_that_ends_within_its_warm_up_says_so(problem, tmp_path, capsys):
    flags = dict(train_batch_size=4, max_train_steps=2, validation_split="none")
    train("train_imagenet", problem, tmp_path / "2", lr_warmup_steps=2, **flags)
    assert "within its warm-up" not in capsys.readouterr().out
    train("train_imagenet", problem, tmp_path / "3", lr_warmup_steps=3, **flags)
    assert "Warning: the run ended within its warm-up" in capsys.readouterr().out


def test_looking_at_the_weights_changes_nothing(problem, tmp_path):
    """Validation exchanges the weights for the averaged ones and draws images from numbers of its own."""
    flags = dict(train_batch_size=5, max_train_steps=4, learning_rate=1e-2, pipeline="-dropout", ema_decay=0.9)
    looks = {"often": dict(validation_steps=1, num_validation_images=2, checkpointing_steps=2),
             "never": dict(validation_split="none", checkpointing_steps=10**6)}  # fmt: skip
    for name, own in looks.items():
        train("train_imagenet", problem, tmp_path / name, **flags, **own)
    often, never = (weights_in(tmp_path / name) for name in looks)
    assert all(torch.equal(often[key], tensor) for key, tensor in never.items())


def test_a_signal_ends_the_run_with_a_checkpoint_from_which_it_goes_on(problem, tmp_path, monkeypatch, capsys):
    flags = dict(train_batch_size=5, max_train_steps=5, validation_split="none", pipeline="-dropout")
    train("train_imagenet", problem, tmp_path / "whole", **flags)

    class SignalledAtStepTwo(training_run.NonFiniteGuard):
        num_asked = 0

        def accepts(self, *arguments):
            self.num_asked += 1
            if self.num_asked == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().accepts(*arguments)

    handler, pushed = signal.getsignal(signal.SIGTERM), []
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "NonFiniteGuard", SignalledAtStepTwo)
        patch.setattr(train_imagenet, "upload", lambda *arguments: pushed.append(arguments))
        train("train_imagenet", problem, tmp_path / "stopped", **flags)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert [path.name for path in checkpoints_in(tmp_path / "stopped")] == ["checkpoint-2"]
    assert not (tmp_path / "stopped" / "transformer").exists()
    assert "wrote checkpoint-2" in capsys.readouterr().out and not pushed
    log = train("train_imagenet", problem, tmp_path / "stopped", resume_from_checkpoint="latest", **flags)
    assert log == read_log(tmp_path / "whole")
    expected = weights_in(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights_in(tmp_path / "stopped").items())


def test_where_nothing_is_validated_the_weights_are_not_exchanged_for_the_averages(problem, tmp_path, monkeypatch):
    stored, store = [], training_run.AveragedWeights.store
    monkeypatch.setattr(training_run.AveragedWeights, "store", lambda *args: stored.append(store(*args)))
    flags = dict(train_batch_size=5, max_train_steps=3, validation_steps=2)
    for name, expected, looks in (("nothing", 0, dict(validation_split="none")),
                                  ("images", 2, dict(validation_split="none", num_validation_images=2)),
                                  ("losses", 2, dict(validation_split="test"))):  # fmt: skip
        stored.clear()
        train("train_imagenet", problem, tmp_path / name, **flags, **looks)
        assert len(stored) == expected, name


def test_a_signal_in_the_last_validation_leaves_a_checkpoint_too(problem, tmp_path, monkeypatch):
    flags = dict(train_batch_size=5, max_train_steps=3, validation_split="test", checkpointing_steps=10)
    train("train_imagenet", problem, tmp_path / "whole", **flags)
    validation_loss = training.validation_loss

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return validation_loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "validation_loss", signalled)
        train("train_imagenet", problem, tmp_path / "stopped", **flags)
    assert [path.name for path in checkpoints_in(tmp_path / "stopped")] == ["checkpoint-3"]
    assert not (tmp_path / "stopped" / "transformer").exists()
    train("train_imagenet", problem, tmp_path / "stopped", resume_from_checkpoint="latest", **flags)
    expected = weights_in(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights_in(tmp_path / "stopped").items())


@pytest.mark.parametrize("bad_steps, ends", [((3,), False), ((2, 3, 4), True)])
def test_a_non_finite_step_is_left_out_and_too_many_end_the_run(bad_steps, ends, problem, tmp_path, monkeypatch):
    """Masks and order move on all the same: the run with the step left out is known in advance."""
    original, calls = ContextualRQTransformerModel.forward, []

    def forward(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        calls.append(None)
        if len(calls) in bad_steps:
            out.image_loss = out.image_loss * float("nan")
        return out

    monkeypatch.setattr(ContextualRQTransformerModel, "forward", forward)
    flags = dict(train_batch_size=4, max_train_steps=5, validation_split="none", max_nonfinite_steps=3, ema_decay=0.5,
                 checkpointing_steps=1)  # fmt: skip
    if ends:
        with pytest.raises(RuntimeError, match="3 optimizer steps in a row"):
            train("train_imagenet", problem, tmp_path, **flags)
        return
    log = train("train_imagenet", problem, tmp_path, **flags)
    assert [entry["skipped_steps"] for entry in log] == [0, 0, 1, 1, 1]
    assert [entry["images"] for entry in log] == [4, 8, 12, 16, 20]
    assert ["loss" in entry for entry in log] == [True, True, False, True, True]
    states = [load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3, 4)]
    averages = [torch.load(tmp_path / f"checkpoint-{step}" / "custom_checkpoint_0.pkl") for step in (2, 3)]
    key = next(key for key in states[0] if key.endswith("to_q.weight"))
    assert torch.equal(states[0][key], states[1][key]) and not torch.equal(states[1][key], states[2][key])
    assert averages[0]["optimization_step"] == averages[1]["optimization_step"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in weights_in(tmp_path).values())


# ------------------------------------------------------------------------------------- what a step does, by hand


def test_the_loss_is_that_of_the_masked_codes_and_of_the_texts_that_were_not_dropped():
    """Image by image, each with its weight in the batch."""
    model = tiny_transformer("text")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(model.config.codebook_size, (4, 4, 4, model.config.code_depth), generator=generator)
    ids = torch.randint(model.config.text_vocab_size, (4, model.prefix_length), generator=generator)
    draws = Draws(random_mask(4, 16, generator), torch.tensor([False, True, False, False]))
    with torch.no_grad():
        losses = training.losses_of(model, model, Batch(codes, ids), "input_ids", draws, draws, num_parts=1)
        image, text = 0.0, 0.0
        for i in range(4):
            condition = ids[i : i + 1] if i != 1 else torch.full_like(ids[:1], model.null_condition_id)
            mask = draws.masks[i].view(1, 4, 4, 1)
            masked = codes[i : i + 1].masked_fill(mask, model.mask_token_id)
            out = model(masked, labels=codes[i : i + 1], input_ids=condition)
            image += out.image_loss.item() * draws.masks[i].sum().item() / draws.masks.sum().item()
            text += 0.0 if i == 1 else out.text_loss.item() / 3
    expected = {"loss": 0.9 * image + 0.1 * text, "image_loss": image, "text_loss": text}
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-5)


RECIPES = {
    "flags": dict(adam_beta1=0.8, adam_beta2=0.7, adam_epsilon=1e-5, adam_weight_decay=0.3, max_grad_norm=0.05,
                  lr_scheduler="constant", lr_warmup_steps=3, ema_decay=0.4),
    "others": dict(max_grad_norm=0, ema_decay=0.99),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_the_optimizer_steps_as_the_flags_say_and_the_average_of_its_weights_is_exported(name, problem, tmp_path):
    flags = dict(train_batch_size=4, max_train_steps=6, learning_rate=1e-2, validation_split="none", **RECIPES[name])
    groups, norms, weights = [], [], []

    def before(optimizer, *_):
        (group,) = optimizer.param_groups
        groups.append({key: value for key, value in group.items() if key != "params"})
        norms.append(torch.cat([p.grad.flatten() for p in group["params"] if p.grad is not None]).norm().item())

    def after(optimizer, *_):
        weights.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        log = train("train_imagenet", problem, tmp_path, **flags)
    finally:
        for hook in hooks:
            hook.remove()
    args = train_imagenet.parse_args(flags_of("train_imagenet", problem, **flags))
    rates = [learning_rate_at(i, i / 6, 1e-2, args.lr_scheduler, args.lr_warmup_steps) for i in range(6)]
    assert [group["lr"] for group in groups] == [entry["learning_rate"] for entry in log] == rates
    for group in groups:
        assert group["betas"] == (args.adam_beta1, args.adam_beta2)
        assert (group["eps"], group["weight_decay"]) == (args.adam_epsilon, args.adam_weight_decay)
    bound = args.max_grad_norm or float("inf")
    assert norms == pytest.approx([min(entry["grad_norm"], bound) for entry in log], rel=1e-3)
    assert max(norms) > 0.05 or name == "flags"

    averages = [p.detach().clone() for p in DraftAndRevisePipeline.from_pretrained(problem / "train_imagenet")
                .transformer.parameters()]  # fmt: skip
    for i, live in enumerate(weights):
        decay = min(args.ema_decay, 1 - (1 + i) ** (-2 / 3))
        averages = [decay * average + (1 - decay) * weight for average, weight in zip(averages, live)]
    exported = DraftAndRevisePipeline.from_pretrained(tmp_path).transformer
    for (key, tensor), expected in zip(exported.named_parameters(), averages, strict=True):
        torch.testing.assert_close(tensor.detach(), expected, rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize("condition", ["text", "class"])
def test_the_validation_loss_is_over_codes_and_its_bins_over_the_images_of_a_ratio(condition):
    """Image by image; whatever the batch."""
    model, accelerator = tiny_transformer(condition), Accelerator()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(model.config.codebook_size, (40, 4, 4, model.config.code_depth), generator=generator)
    shape, name = ((40, model.prefix_length), "input_ids") if condition == "text" else ((40,), "class_labels")
    conditions = torch.randint(NUM_CLASSES, shape, generator=generator)
    masks = random_mask(40, 16, torch.Generator().manual_seed(0))
    counts, image, text = masks.sum(1), [], []
    with torch.no_grad():
        for i in range(40):
            row = slice(i, i + 1)
            masked = codes[row].masked_fill(masks[i].view(1, 4, 4, 1), model.mask_token_id)
            out = model(masked, labels=codes[row], **{name: conditions[row]})
            image.append(out.image_loss.item())
            text.append(0.0 if out.text_loss is None else out.text_loss.item())
    image, expected = torch.tensor(image, dtype=torch.float64), {}
    expected["image_loss"] = ((image * counts).sum() / counts.sum()).item()
    if condition == "text":
        expected["text_loss"] = np.mean(text)
    assert {4, 8, 12, 16} <= set(counts.tolist()), "no image at the upper end of a bin"
    bins = [(counts > low) & (counts <= low + 4) for low in (0, 4, 8, 12)]
    by_ratio = [((image * counts)[b].sum() / counts[b].sum()).item() for b in bins]
    validation_set = ValidationSet(codes.to(torch.uint16), conditions)
    for batch_size in (7, 40):
        losses = validation_loss(model, name, validation_set, batch_size, accelerator)
        assert losses.pop("image_loss_by_ratio") == pytest.approx(by_ratio, rel=1e-5)
        assert losses == pytest.approx(expected, rel=1e-5)


def test_masks_and_dropped_conditions_are_those_of_the_seed_and_the_step(problem, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "draws_of_step", lambda *a, **k: seen.append(draws_of_step(*a, **k)) or seen[-1])
    flags = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "max_train_steps": 2, "seed": 3,
             "no-stratified_masks": True, "condition_dropout": 0.4, "validation_split": "none"}  # fmt: skip
    train("train_imagenet", problem, tmp_path, **flags)
    for step, draws in enumerate(seen):
        expected = draws_of_step(8, 16, 0.4, 3, step, stratified=False)
        assert torch.equal(draws.masks, expected.masks) and torch.equal(draws.dropped, expected.dropped)
    args = train_imagenet.parse_args(flags_of("train_imagenet", problem, output_dir=tmp_path, **flags))
    training_run.make_accelerator(args)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))


def test_a_resumed_run_goes_on_counting_seconds_and_steps_left_out(problem, tmp_path, monkeypatch):
    class LeavesOutTheSecond(training_run.NonFiniteGuard):
        num_asked = 0

        def accepts(self, loss, grad_norm):
            self.num_asked += 1
            return super().accepts(loss * float("nan") if self.num_asked == 2 else loss, grad_norm)

    flags = dict(train_batch_size=4, max_train_steps=4, checkpointing_steps=2, validation_split="none")
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "NonFiniteGuard", LeavesOutTheSecond)
        patch.setattr(training_run, "Budget", lambda *arguments: Budget(*arguments[:3], 1000.0))
        expected = train("train_imagenet", problem, tmp_path, **flags)
    resumed = train("train_imagenet", problem, tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-2", **flags)
    assert [entry["skipped_steps"] for entry in resumed] == [0, 1, 1, 1] and resumed == expected
    entries = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert entries[-1]["seconds"] >= 1000


# ------------------------------------------------------------------------------------------- which codes are read


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """Twelve images of 14×8 pixels of noise, with labels."""
    folder = tmp_path_factory.mktemp("wide")
    pixels = np.random.default_rng(1).integers(0, 256, (12, 8, 14, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = {"image": [Image.fromarray(p) for p in pixels], "label": [i % NUM_CLASSES for i in range(12)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return folder


@pytest.mark.parametrize("source", [None, "cache_codes", "streaming"])
def test_each_flag_of_views_and_the_seed_have_a_part_in_the_codes_that_are_read(source, wide, problem, tmp_path):
    """Cached in one folder: what was encoded with other flags is not taken for the same."""
    switches = {source: True} if source else {}
    pipe = DraftAndRevisePipeline.from_pretrained(problem / "train_imagenet")
    tmp_path.joinpath("run").mkdir()

    def read(**flags) -> torch.Tensor:
        plain = {f"no-{name}": True for name in ("random_flip", "random_crop") if name not in flags}
        args = train_imagenet.parse_args(
            flags_of("train_imagenet", problem, dataset_name=wide, output_dir=tmp_path / "run", train_batch_size=12,
                     validation_split="none", resolution=8, **plain, **switches, **flags)
        )  # fmt: skip
        accelerator = Accelerator()
        dataset, _ = load_splits(args, accelerator, "label", "label_column")
        data = (pipe.vae, pipe.transformer.config, "label", torch.tensor, SkippedRows())
        source, _ = training_batches(args, accelerator, dataset, *data)
        return torch.cat([batch.codes for batch in islice(source(0, (0, 0)), 2)])

    expected = read()
    assert torch.equal(read(), expected)
    for flags in (dict(random_flip=True), dict(random_crop=True), dict(tau=2.0), dict(seed=1)):
        assert not torch.equal(read(**flags), expected), flags
    if source == "cache_codes":
        codes = read(tau=2.0, num_draws=2, random_flip=True)
        views = load_file(tmp_path / "run" / "codes.safetensors")["codes"].int()
        assert views.shape[:2] == (12, 4)
        assert all(not torch.equal(views[:, i], views[:, j]) for i in range(4) for j in range(i))
        found = (codes[:, None, None] == views[None]).flatten(3).all(-1)  # (read, row, view)
        assert found.any(2).any(1).all() and found.any(1).any(0).all(), "other codes, or a view that is never read"


@pytest.mark.parametrize("source", [None, "cache_codes", "streaming"])
def test_each_image_has_its_own_condition_where_others_are_left_out(source, problem, tmp_path):
    """Of eight rows, whose captions are their numbers, one image is damaged and one caption empty; in both splits."""
    vae = RQVAEModel.from_pretrained(problem / "train_cc3m" / "vae")
    pixels = torch.randint(256, (8, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    rows = {"image": [], "text": [str(i) if i != 4 else "" for i in range(8)]}
    for image in pixels:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
        rows["image"].append({"bytes": (tmp_path / "image.png").read_bytes(), "path": None})
    rows["image"][2]["bytes"] = b"no image"
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    args = train_cc3m.parse_args(
        flags_of("train_cc3m", problem, dataset_name=tmp_path / "data", output_dir=tmp_path, train_batch_size=6,
                 resolution=8, **({source: True} if source else {}))
    )  # fmt: skip
    accelerator, expected = Accelerator(), encode(vae, to_pixel_values(pixels)).tolist()
    splits = load_splits(args, accelerator, "text", "caption_column")
    config = tiny_transformer("text").config
    data = (vae, config, "text", lambda captions: torch.tensor([int(caption) for caption in captions]))
    (batches, _) = training_batches(args, accelerator, splits[0], *data, SkippedRows())
    pairs = [(b.codes.tolist(), b.condition.tolist()) for b in islice(batches(0, (0, 0)), 4)]
    if source is None:
        sets = validation_sets_of(args, accelerator, *splits, *data)
        pairs += [(codes.tolist(), conditions.tolist()) for codes, conditions in sets.values()]
        assert sets.keys() == {"test", "seen"} and all(pair[1] == [0, 1, 3, 5, 6, 7] for pair in pairs[-2:])
    assert {i for _, conditions in pairs for i in conditions} == {0, 1, 3, 5, 6, 7}
    for codes, conditions in pairs:
        assert codes == [expected[i] for i in conditions]


def test_a_number_in_0_1_falls_on_each_view_of_codes_in_memory_equally_often():
    codes = torch.arange(3 * 4).view(3, 4, 1, 1, 1).to(torch.uint16)
    u = torch.tensor([0.0, 0.24, 0.25, 0.5, 0.74, 0.999], dtype=torch.float64)
    rows = torch.tensor([0, 1, 2, 0, 1, 2])
    assert codes_in_memory(codes)(rows, u).flatten().tolist() == [0, 4, 9, 2, 6, 11]


def test_a_streamed_image_has_another_view_or_other_codes_each_time():
    one_process = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    common = dict(image_column="image", resolution=8, start=(0, 0), batch_size=1, seed=0, accelerator=one_process)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    images = datasets.Dataset.from_dict({"image": [image]}, features=datasets.Features({"image": datasets.Image()}))
    views = datasets.Dataset.from_dict({"codes": [[[[[view]]] for view in range(3)]]})
    for rows, tau, least in ((images, 2.0, 10), (images, 0.0, 1), (views, 0.0, 3)):
        first, again = (
            torch.cat([b.codes for b in islice(
                streamed_batches(rows.to_iterable_dataset(), None, None, tiny_vae(), tau=tau, **common), 20
            )]) for _ in range(2)
        )  # fmt: skip
        assert torch.equal(first, again)
        different = len(first.unique(dim=0))
        assert different >= least if tau else different == least


@pytest.mark.parametrize(
    "splits, flags, expected",
    [
        (("test", "validation"), {}, ["validation"]),
        (("test",), {}, ["test"]),
        ((), {}, []),
        (("test", "validation"), {"validation_split": "test validation"}, ["test", "validation"]),
        (("test", "validation"), {"validation_split": "none"}, []),
    ],
)
def test_validation_is_by_the_split_of_that_name_else_by_test_or_what_is_asked_for(splits, flags, expected, tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    for split in ("train", *splits):
        path = str(tmp_path / "data" / f"{split}-00000.parquet")
        Path(path).parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))]}, features=features).to_parquet(path)
    flags = [
        f"--dataset_name={tmp_path / 'data'}",
        "--vae=x",
        *(f for k, v in flags.items() for f in (f"--{k}", *v.split())),
    ]
    _, found = load_splits(train_rqvae.parse_args(flags), Accelerator())
    assert list(found) == expected


def test_seen_images_are_spread_over_the_training_split_and_held_out_ones_are_its_first():
    rows = datasets.Dataset.from_dict({"number": range(101)})
    assert seen_rows(rows, 5, "image")["number"][:] == [0, 25, 50, 75, 100]
    assert first_rows(rows, 5, "image")["number"][:] == list(range(5))
    for few in (seen_rows, first_rows):
        assert few(rows, 200, "image")["number"][:] == list(range(101))


# --------------------------------------------------------------------------------- micro-batches and processes


ACCUMULATED = {
    # Masks of different sizes and dropped conditions make the parts of a batch unequal.
    "text": ("train_cc3m", {"condition_dropout": 0.4, "no-stratified_masks": True, "random_flip": True}),
    "class": ("train_imagenet", {"condition_dropout": 0.4, "no-stratified_masks": True}),
    "autoregressive": ("train_imagenet", {"model": "autoregressive"}),
    "recomputing": ("train_cc3m", {"condition_dropout": 0.4}),
}


@pytest.mark.parametrize("name", ACCUMULATED)
def test_accumulated_micro_batches_equal_the_large_batch(name, problem, tmp_path, monkeypatch):
    script, own = ACCUMULATED[name]
    logs, recomputing, enable = {}, [], ContextualRQTransformerModel.enable_gradient_checkpointing
    monkeypatch.setattr(
        ContextualRQTransformerModel, "enable_gradient_checkpointing", lambda self: recomputing.append(enable(self))
    )
    for micro_batches in (1, 3):
        recompute = {"gradient_checkpointing": True} if name == "recomputing" and micro_batches == 3 else {}
        logs[micro_batches] = train(
            script, problem, tmp_path / f"{micro_batches}", train_batch_size=12 // micro_batches,
            gradient_accumulation_steps=micro_batches, max_train_steps=2, checkpointing_steps=1, learning_rate=1e-4,
            max_grad_norm=0.5, **own, **recompute,
        )  # fmt: skip
    assert len(recomputing) == (name == "recomputing")
    assert_equal_gradients(*(first_gradient(tmp_path / folder, 0.9) for folder in ("3", "1")))
    for one, three in zip(logs[1], logs[3]):
        assert one.keys() == three.keys()
        for entry in one.keys() - {"kind", "split"}:
            assert three[entry] == pytest.approx(one[entry], rel=1e-3, abs=1e-5), entry


PROCESSES = """
import datasets, json, sys
import train_cc3m, train_imagenet, encode_dataset
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from components import forget_accelerator, one_process_group

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1
scripts = {"train_cc3m": train_cc3m, "train_imagenet": train_imagenet, "encode_dataset": encode_dataset}

# accelerate shards on accelerators only; this makes it do so on two CPUs.
initialize, sharded = AcceleratorState.__init__, False

def initialize_sharded(self, *args, **kwargs):
    is_first = not AcceleratorState._shared_state
    initialize(self, *args, **kwargs)
    if sharded and is_first:
        PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["SpatialTransformerBlock", "DepthTransformerBlock"],
            state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False,
        )

AcceleratorState.__init__ = initialize_sharded
with one_process_group():
    for name, sharded, flags in json.loads(open(f"{sys.argv[1]}/runs.json").read()):
        scripts[name].main(scripts[name].parse_args(flags))
        forget_accelerator()
"""


EQUAL = dict(
    train_batch_size=3, gradient_accumulation_steps=2, max_train_steps=3, checkpointing_steps=1, learning_rate=1e-4,
    random_flip=True, condition_dropout=0.4, validation_steps=2, num_validation_images=3,
)  # fmt: skip
ENCODED = dict(label_column="label", rows_per_file=5, splits="train test", random_flip=True, random_crop=True)


@pytest.fixture(scope="module")
def two_processes(problem, tmp_path_factory) -> Path:
    """A folder with what runs of two processes wrote."""
    folder = tmp_path_factory.mktemp("two-processes")
    common = dict(
        pipeline="-dropout", train_batch_size=3, max_train_steps=4, checkpointing_steps=2, learning_rate=1e-3
    )
    # A line of the log over all four steps: the checkpoint in its middle holds the sums of both processes.
    cached = dict(gradient_accumulation_steps=2, random_flip=True, cache_codes=True, logging_steps=4, **common)
    streamed = dict(streaming=True, shuffle_buffer_size=5, **common)
    runs = [("train_cc3m", dict(output_dir=folder / "equal", **EQUAL))]
    for name, flags in (("cached", cached), ("streamed", streamed)):
        whole = folder / name
        runs.append(("train_cc3m", dict(output_dir=whole, **flags)))
        flags = {**flags, "resume_from_checkpoint": whole / "checkpoint-2"}
        runs.append(("train_cc3m", dict(output_dir=folder / f"{name}-resumed", **flags)))
    runs.append(("encode_dataset", dict(output_dir=folder / "encoded", **ENCODED)))
    lines = [(name, False, flags_of(name, problem, **flags)) for name, flags in runs]
    resume = {"resume_from_checkpoint": folder / "sharded" / "checkpoint-1"}
    for name, own in (("sharded", {}), ("sharded-resumed", resume)):
        flags = flags_of("train_cc3m", problem, output_dir=folder / name, **EQUAL, **own)
        lines.append(("train_cc3m", True, flags))
    (folder / "runs.json").write_text(json.dumps(lines))
    run_in_two_processes(PROCESSES, folder)
    return folder


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
    for grid in ("samples-0000002.png", "samples-0000003.png"):
        assert Image.open(two_processes / "equal" / grid).size == Image.open(tmp_path / grid).size == (16, 16)


@pytest.mark.slow
def test_sharded_weights_train_resume_and_export_as_whole_ones(two_processes):
    """FSDP2. The validation at step 2 is of the averaged weights, step 3 must be of the others again."""
    expected, actual = (read_log(two_processes / name) for name in ("equal", "sharded"))
    assert len(actual) == len(expected)
    texts = {"kind", "split"}
    if torch.__version__.startswith("2.8."):  # FSDP2's gradients on the CPU are sums there, not means
        texts.add("grad_norm")
    for one, two in zip(expected, actual):
        for name in one.keys() - texts:
            assert two[name] == pytest.approx(one[name], rel=1e-5), name
    whole, sharded, resumed = (weights_in(two_processes / name) for name in ("equal", "sharded", "sharded-resumed"))
    assert whole.keys() == sharded.keys()
    for key, tensor in whole.items():
        assert torch.equal(sharded[key], resumed[key]), key
        if not key.endswith("to_k.bias"):  # its gradient is zero, so that rounding decides on a whole step of Adam
            torch.testing.assert_close(sharded[key], tensor, rtol=0, atol=1e-5)
    assert len(list((two_processes / "sharded" / "checkpoint-2" / "pytorch_model_fsdp_0").glob("__*.distcp"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cached", "streamed"])
def test_two_processes_resume_to_the_bit(two_processes, name):
    """Each has its own random stream, of the dropout, and its own place in a streamed data set; all are restored."""
    whole, resumed = two_processes / name, two_processes / f"{name}-resumed"
    expected = weights_in(whole)
    for key, tensor in weights_in(resumed).items():
        assert torch.equal(tensor, expected[key]), key
    assert read_log(resumed) == [e for e in read_log(whole) if e["step"] > 2]
    streams = [
        torch.load(whole / "checkpoint-2" / f"random_states_{rank}.pkl", weights_only=False) for rank in range(2)
    ]
    assert not torch.equal(*(stream["torch_manual_seed"] for stream in streams))
    places = json.loads((whole / "checkpoint-2" / "progress.json").read_text())["places"]
    assert places == (None if name == "cached" else [[0, 6], [0, 6]])


@pytest.mark.slow
def test_two_processes_encode_what_one_does(two_processes, problem, tmp_path):
    run("encode_dataset", problem, tmp_path, **ENCODED)
    for split, count in (("train", NUM_IMAGES), ("test", 8)):
        one, two = (load_split(split, dataset_name=str(folder)) for folder in (tmp_path, two_processes / "encoded"))
        assert len(one) == len(two) == count
        assert one[:] == two[:]


# ------------------------------------------------------------------------------------------------------- the results


@pytest.fixture(scope="module")
def overfitted(problem, tmp_path_factory) -> dict[str, Path]:
    """Each trainer on the first eight images until it knows them."""
    folders = {}
    for script in TRAINERS:
        folders[script] = tmp_path_factory.mktemp(script)
        with torch.random.fork_rng(devices=[]):
            train(
                script, problem, folders[script], vae=problem / "train_cc3m" / "vae",
                transformer_config=problem / script / "transformer", cache_codes=True, learning_rate=1e-2,
                train_split="train[:8]", train_batch_size=8, max_train_steps=100, lr_warmup_steps=5, ema_decay=0.9,
                checkpointing_steps=10**6, validation_steps=10**6, num_validation_images=5, filter_column="label",
                filter_min=0,
            )  # fmt: skip
    return folders


@pytest.mark.parametrize("script", TRAINERS)
def test_every_line_of_the_log_is_json_that_says_which_step_and_what_was_measured(overfitted, script):
    entries = [json.loads(line) for line in (overfitted[script] / "train_log.jsonl").read_text().splitlines()]
    of_kind = {kind: [entry for entry in entries if entry["kind"] == kind] for kind in ("train", "validation")}
    assert [entry["step"] for entry in of_kind["train"]] == list(range(1, 101))
    assert [entry["images"] for entry in of_kind["train"]] == list(range(8, 8 * 101, 8))
    assert [entry["seconds"] for entry in entries] == sorted(entry["seconds"] for entry in entries)
    seconds = of_kind["train"][-1]["seconds"] - of_kind["train"][0]["seconds"]
    assert 0.3 * seconds < sum(8 / entry["images_per_second"] for entry in of_kind["train"][1:]) < 1.1 * seconds
    own = {
        "train": {"images_per_second", "learning_rate", "skipped_steps", "loss", "image_loss", "grad_norm"},
        "validation": {"split", "image_loss", "image_loss_by_ratio"},
    }
    for kind, names in own.items():
        expected = {"kind", "step", "images", "seconds", *names} | ({"text_loss"} if script == "train_cc3m" else set())
        assert all(entry.keys() == expected for entry in of_kind[kind])
    assert [entry["split"] for entry in of_kind["validation"]] == ["test", "seen"]


@pytest.mark.parametrize(
    "script, quantity, factor",
    [("train_cc3m", "image_loss", 0.5), ("train_cc3m", "text_loss", 0.2), ("train_imagenet", "image_loss", 0.5)],
)
def test_the_loss_falls_on_eight_images(overfitted, script, quantity, factor):
    values = [entry[quantity] for entry in read_log(overfitted[script]) if entry["kind"] == "train"]
    assert np.mean(values[-10:]) < factor * np.mean(values[:3])


@pytest.mark.parametrize("script", TRAINERS)
def test_held_out_images_are_not_what_was_learned(overfitted, script):
    validation = {e["split"]: e for e in read_log(overfitted[script]) if e["kind"] == "validation"}
    assert validation["seen"]["image_loss"] < 0.8 * validation["test"]["image_loss"]


@pytest.mark.parametrize("script", TRAINERS)
def test_the_exported_pipeline_loads_and_draws_what_the_grid_shows(overfitted, problem, script):
    folder = overfitted[script]
    pipe = DraftAndRevisePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    vae = RQVAEModel.from_pretrained(problem / "train_cc3m" / "vae")
    assert torch.equal(pipe.transformer.codebook, vae.quantizer.codebook)
    assert not pipe.transformer.training
    assert pipe.scheduler.config.num_inference_steps == 4  # of the pipeline that it began from
    conditions = {"class_labels": list(range(5))}
    if script == "train_cc3m":
        conditions = {"prompt": CAPTIONS}  # the five that were asked for are four different ones
    count = len(next(iter(conditions.values())))
    images = pipe(
        **conditions, generator=[torch.Generator().manual_seed(i) for i in range(count)], output_type="np"
    ).images
    assert images.shape == (count, 8, 8, 3) and np.isfinite(images).all() and images.std() > 0.05
    grid = np.asarray(Image.open(folder / "samples-0000100.png"))
    columns = grid.shape[1] // 8
    drawn = np.stack([grid[8 * (i // columns) :, 8 * (i % columns) :][:8, :8] for i in range(count)])
    assert np.abs(drawn / 255 - images).max() < 2 / 255


def test_the_names_of_classes_come_from_the_data_set(overfitted):
    pipe = DraftAndRevisePipeline.from_pretrained(overfitted["train_imagenet"])
    assert pipe.config.id2label == dict(enumerate(NAMES))


def test_the_card_says_what_was_trained_on_what(overfitted):
    card = (overfitted["train_cc3m"] / "README.md").read_text()
    for fact in ("train[:8]", "100 steps of 8 images", "`label`", "text-to-image"):
        assert fact in card, fact


def test_the_exported_weights_are_the_averaged_ones(problem, tmp_path):
    flags = dict(train_batch_size=4, max_train_steps=3, checkpointing_steps=3, learning_rate=1e-2,
                 validation_split="none")  # fmt: skip
    train("train_imagenet", problem, tmp_path, ema_decay=0.9, **flags)
    live = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    averaged = torch.load(tmp_path / "checkpoint-3" / "custom_checkpoint_0.pkl")["shadow_params"]
    model = tiny_transformer("class")
    exported = weights_in(tmp_path)
    for (name, _), expected in zip(model.named_parameters(), averaged, strict=True):
        assert torch.equal(exported[name], expected), name
    assert not all(torch.equal(exported[name], live[name]) for name in exported)


def test_codes_of_depth_one_and_models_without_classes_train_too(problem, tmp_path):
    vae = tiny_vae(code_depth=1)
    pipe = DraftAndRevisePipeline(vae, tiny_transformer(None, vae=vae), DraftAndReviseScheduler(num_inference_steps=2))
    pipe.save_pretrained(tmp_path / "pipeline")
    log = train(
        "train_imagenet", problem, tmp_path / "output", pretrained_model_name_or_path=tmp_path / "pipeline",
        train_batch_size=8, max_train_steps=30, learning_rate=1e-2, lr_scheduler="constant", num_validation_images=2,
    )  # fmt: skip
    losses = [entry["image_loss"] for entry in log if entry["kind"] == "train"]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:3])
    assert DraftAndRevisePipeline.from_pretrained(tmp_path / "output").transformer.config.num_classes is None


def test_the_baseline_learns_and_exports_its_own_pipeline(problem, tmp_path):
    log = train(
        "train_imagenet", problem, tmp_path, model="autoregressive", train_batch_size=8, max_train_steps=40,
        learning_rate=1e-2, cache_codes=True, train_split="train[:8]", num_validation_images=2,
    )  # fmt: skip
    losses = [entry["image_loss"] for entry in log if entry["kind"] == "train"]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])
    pipe = RQTransformerPipeline.from_pretrained(tmp_path)
    assert pipe.transformer.config.null_condition
    assert pipe(class_labels=[0], output_type="np").images.shape == (1, 8, 8, 3)


def test_pushing_makes_the_repository_first_and_leaves_checkpoints_out(problem, tmp_path, monkeypatch):
    calls = []

    class Repository:
        repo_id = "someone/tiny"

    def create_repo(name, token, private, **kwargs):
        assert (token, private) == ("secret", True)
        calls.append(("create", name, (tmp_path / "tiny" / "train_log.jsonl").exists()))
        return Repository

    def upload_folder(repo_id, folder_path, ignore_patterns, token, **kwargs):
        from huggingface_hub.utils import filter_repo_objects

        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        assert token == "secret" and not [
            name for name in files if b"secret" in (tmp_path / "tiny" / name).read_bytes()
        ]
        calls.append(("upload", repo_id, sorted(filter_repo_objects(files, ignore_patterns=ignore_patterns))))

    monkeypatch.setattr(publishing, "create_repo", create_repo)
    monkeypatch.setattr(publishing, "upload_folder", upload_folder)
    tracked = ("events.out.tfevents.1", "1.5/events.out.tfevents.2", "1.5/hparams.yml")  # accelerate's of tensorboard
    for name in (".config.json.partial", *(f"train_imagenet/{file}" for file in tracked)):
        path = tmp_path / "tiny" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    train(
        "train_imagenet", problem, tmp_path / "tiny", train_batch_size=4, max_train_steps=1, checkpointing_steps=1,
        push_to_hub=True, hub_token="secret", hub_private_repo=True, cache_codes=True, validation_split="none",
    )  # fmt: skip
    assert 'from_pretrained("someone/tiny")' in (tmp_path / "tiny" / "README.md").read_text()
    (created, uploaded) = calls
    assert created == ("create", "tiny", False)
    assert uploaded[:2] == ("upload", "someone/tiny")
    assert {"README.md", "model_index.json", "train_log.jsonl"} < set(uploaded[2])
    left_out = ("checkpoint", "codes", ".config", "train_imagenet/")
    assert not [file for file in uploaded[2] if file.startswith(left_out)]


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("script", TRAINERS)
@pytest.mark.parametrize(
    "flag, value",
    [
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
        ("encoding_batch_size", 0),
        ("num_draws", 0),
        ("max_nonfinite_steps", 0),
        ("ema_decay", 1.0),
        ("condition_dropout", 1.0),
        ("learning_rate", -1.0),
        ("tau", -0.5),
        ("seed", -1),
        ("max_grad_norm", -1.0),
        ("adam_weight_decay", -0.1),
        ("lr_warmup_steps", -1),
    ],
)
def test_a_flag_out_of_range_is_refused_by_name(script, flag, value, problem):
    with pytest.raises(ValueError, match=f"--{flag}.*got {value}"):
        SCRIPTS[script].parse_args(flags_of(script, problem, **{flag: value}))


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"train_data_dir": "images"}, "--train_data_dir"),
        ({"filter_column": "score"}, "--filter_min"),
        ({"filter_min": 0.5}, "--filter_column"),
        ({"num_draws": 2, "cache_codes": True}, "--num_draws must be 1 without --random_crop and --tau"),
        ({"num_draws": 2, "random_crop": True}, "--num_draws must be 1 without --cache_codes.*got 2"),
        (
            {"data_files": "a.parquet", "validation_data_files": "b.parquet", "validation_split": "none"},
            r"--validation_split must be left out with --validation_data_files.*got \['none'\]",
        ),
    ],
)
def test_flags_that_exclude_each_other_are_refused(flags, named, problem):
    with pytest.raises(ValueError, match=named):
        train_cc3m.parse_args(flags_of("train_cc3m", problem, **flags))


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("train_cc3m", {"image_column": "picture"}, "image_column.*got 'picture'"),
        ("train_cc3m", {"caption_column": "title"}, "caption_column.*got 'title'"),
        ("train_cc3m", {"caption_column": "label"}, "--caption_column must hold texts"),
        ("train_imagenet", {"label_column": "kind"}, "label_column.*got 'kind'"),
        ("train_imagenet", {"label_column": "text"}, "--label_column.*got 'a cat"),
        ("train_cc3m", {"resolution": 16}, "resolution.*got 16"),
        ("train_cc3m", {"validation_prompts": ("a", "")}, r"--validation_prompts must be texts, got \['a', ''\]"),
        ("train_cc3m", {"resolution": 0}, "--resolution must be 8.*got 0"),
        ("train_cc3m", {"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint.*got.*nowhere"),
        ("train_cc3m", {"attention_backend": "fastest"}, "fastest"),
        ("train_imagenet", {"model": "autoregressive", "pipeline": "/../../train_imagenet"}, "--model autoregressive"),
        ("train_imagenet", {"streaming": True, "cache_codes": True}, "--cache_codes.*encode_dataset.py"),
        (
            "train_imagenet",
            {"streaming": True, "max_train_steps": None, "filter_column": "label", "filter_min": 0},
            "--max_train_steps",
        ),
    ],
)
def test_a_flag_that_does_not_fit_the_data_or_the_model_is_refused_by_name(script, flags, message, problem, tmp_path):
    if "pipeline" in flags:
        flags = {**flags, "pipeline": None, "pretrained_model_name_or_path": problem / "train_imagenet"}
    with pytest.raises(ValueError, match=message):
        train(script, problem, tmp_path, **{"max_train_steps": 1, **flags})
    assert not list(tmp_path.glob("*.safetensors"))


def test_another_run_is_not_written_over_unless_that_is_asked_for(problem, tmp_path):
    flags = dict(train_batch_size=4, max_train_steps=2, checkpointing_steps=1, validation_split="none")
    expected = train("train_imagenet", problem, tmp_path, **flags)
    with pytest.raises(ValueError, match="--output_dir must not hold another run.*--overwrite_output_dir"):
        train("train_imagenet", problem, tmp_path, **flags)
    forget_accelerator()
    assert read_log(tmp_path) == expected and len(checkpoints_in(tmp_path)) == 2
    flags |= dict(max_train_steps=1, overwrite_output_dir=True)

    def refuse(name, **kwargs):
        raise PermissionError(name)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(publishing, "create_repo", refuse)
        train("train_imagenet", problem, tmp_path, push_to_hub=True, **flags)
    forget_accelerator()
    assert len(checkpoints_in(tmp_path)) == 2
    assert len(train("train_imagenet", problem, tmp_path, **flags)) == 1
    assert [folder.name for folder in checkpoints_in(tmp_path)] == ["checkpoint-1"]


def test_the_classes_of_a_trained_pipeline_are_found_by_name(problem, tmp_path, capsys):
    """Folders are numbered by the alphabet, whatever the pipeline has learned."""
    trained = DraftAndRevisePipeline.from_pretrained(problem / "train_imagenet")
    names = ["night", "dusk", "rocket", "snow, white stuff", "volcano"]
    trained.register_to_config(id2label=dict(enumerate(names)))
    trained.save_pretrained(tmp_path / "pipeline")
    flags = dict(pretrained_model_name_or_path=tmp_path / "pipeline", train_batch_size=4, max_train_steps=1,
                 validation_split="none", cache_codes=True)  # fmt: skip
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        conditions = train_imagenet.class_labels_of
        patch.setattr(train_imagenet, "class_labels_of", lambda *a, **k: seen.append(conditions(*a, **k)) or seen[-1])
        train("train_imagenet", problem, tmp_path / "run", **flags)
    assert "'dusk' is class 1, 'snow' is class 3" in capsys.readouterr().out
    ids = {label: i for label, i in enumerate([1, 3, 4, 2, 0])}  # of NAMES
    assert torch.cat(seen).tolist() == [ids[i % NUM_CLASSES] for i in range(NUM_IMAGES)]
    exported = DraftAndRevisePipeline.from_pretrained(tmp_path / "run")
    assert exported.config.id2label == trained.config.id2label

    train(
        "train_imagenet", problem, tmp_path / "renamed", train_batch_size=4, max_train_steps=1, validation_split="none"
    )
    assert "other classes than the trained pipeline: 0 ('class 0, alias 0') is to be 'dusk'" in capsys.readouterr().out


def test_folders_of_imagenet_are_called_as_the_pipeline_calls_them(tmp_path):
    """Which are numbered like the usual names, if all of them are there."""
    known = {i: f"class {i}" for i in range(3)}
    (tmp_path / "model_index.json").write_text(json.dumps({"id2label": known}))
    args = SimpleNamespace(pretrained_model_name_or_path=str(tmp_path), model="contextual", label_column="label")
    for names, expected in (
        (["n01440764", "n01443537", "n01484850"], known),
        (["n01440764", "n01443537"], {0: "n01440764", 1: "n01443537"}),
        (["n01440764", "n01443537", "shark"], {0: "n01440764", 1: "n01443537", 2: "shark"}),
    ):
        features = datasets.Features({"label": datasets.ClassLabel(names=names)})
        rows = datasets.Dataset.from_dict({"label": [0]}, features=features)
        assert train_imagenet.class_names(args, rows, num_classes=3) == expected
    assert train_imagenet.class_names(args, datasets.Dataset.from_dict({"label": [0]}), num_classes=3) == known


def test_the_captions_of_the_grid_are_the_first_different_ones():
    rows = datasets.Dataset.from_dict({"text": ["", "a", None, "b", "a", "c"]})
    other = datasets.Dataset.from_dict({"text": ["d"]})
    for count, expected in ((2, ["a", "b"]), (9, ["a", "b", "c"])):
        args = SimpleNamespace(caption_column="text", num_validation_images=count)
        assert train_cc3m.sample_prompts({"test": rows, "other": other}, other, args) == expected
        assert train_cc3m.sample_prompts({}, rows, args) == expected


def test_the_baseline_keeps_the_sampler_settings_of_its_pipeline(tmp_path):
    defaults = dict(guidance_scale=2.5, temperature=0.7, top_k=5, top_p=0.9)
    pipe = tiny_rq_pipeline("class", defaults=defaults)
    pipe.save_pretrained(tmp_path)
    args = SimpleNamespace(pretrained_model_name_or_path=str(tmp_path), model="autoregressive")
    assert defaults.items() <= training.load_pipeline(args, pipe.vae, pipe.transformer).config.items()


def test_captions_that_the_model_cannot_read_are_counted(problem, tmp_path, capsys):
    captions = ["a cat at dusk"] * NUM_IMAGES
    captions[3] = "a zebra at night"
    captions[5] = "the cat the cat the cat the cat"
    (tmp_path / "data").mkdir()
    rows = datasets.Dataset.from_parquet(str(problem / "data" / "train-00000.parquet"))
    rows.remove_columns("text").add_column("text", captions).to_parquet(tmp_path / "data" / "train.parquet")
    train("train_cc3m", problem, tmp_path / "run", dataset_name=tmp_path / "data", train_batch_size=4,
          max_train_steps=1, validation_split="none")  # fmt: skip
    printed = capsys.readouterr().out
    assert f"1 of {NUM_IMAGES} captions of which the model reads the first 6 tokens, such as 'the cat" in printed
    assert f"1 of {NUM_IMAGES} captions with words that the tokenizer does not know" in printed
    assert "such as 'a zebra at night'" in printed


def test_a_tokenizer_is_not_exchanged_under_trained_weights(problem, tmp_path):
    other = tiny_pipeline("text").tokenizer
    other.add_tokens(["zebra"])
    other.save_pretrained(tmp_path / "tokenizer")
    flags = dict(tokenizer=tmp_path / "tokenizer", train_batch_size=4, max_train_steps=1, validation_split="none")
    with pytest.raises(ValueError, match="--tokenizer must have the vocabulary.*--transformer_config"):
        train("train_cc3m", problem, tmp_path / "run", **flags)


def test_outside_of_the_repository_a_pipeline_must_be_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for script in SCRIPTS.values():
        if script is not encode_dataset:
            with pytest.raises(ValueError, match="--pretrained_model_name_or_path must be given where its default"):
                script.parse_args([])


@pytest.mark.parametrize("streaming", [None, True])
@pytest.mark.parametrize("script", TRAINERS)
def test_flags_of_views_are_refused_for_codes_and_their_defaults_are_not(script, streaming, problem, tmp_path):
    column = {"train_cc3m": {"caption_column": "text"}, "train_imagenet": {"label_column": "label"}}[script]
    vae = {"vae": problem / script / "vae"}
    run("encode_dataset", problem, tmp_path / "codes", splits="train", **vae, **column)
    flags = dict(dataset_name=tmp_path / "codes", train_batch_size=4, max_train_steps=1, validation_split="none",
                 streaming=streaming, **vae)  # fmt: skip
    train(script, problem, tmp_path / "run", **flags)
    for name, value in (("tau", 0.5), ("tau", 0.0), ("random_flip", True), ("no-random_crop", True), ("num_draws", 1)):
        with pytest.raises(ValueError, match=f"--{name.removeprefix('no-')} must not be given.*'codes'"):
            train(script, problem, tmp_path / "refused", **flags, **{name: value})
    with pytest.raises(ValueError, match="--cache_codes must not be given.*'codes'"):
        train(script, problem, tmp_path / "refused", **flags, cache_codes=True)


def test_no_validation_images_are_no_grid_whatever_the_prompts(problem, tmp_path):
    flags = dict(train_batch_size=4, max_train_steps=1, validation_prompts="cat owl", validation_split="none")
    for count, grids in ((0, 0), (1, 1)):
        train("train_cc3m", problem, tmp_path / f"{count}", num_validation_images=count, **flags)
        assert len(list((tmp_path / f"{count}").glob("samples-*.png"))) == grids


def test_the_classes_of_the_grid_are_spread_over_all(problem, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        training,
        "sample_images",
        lambda pipe, condition, count, _: seen.append(condition) or torch.zeros(count, 3, 8, 8),
    )
    for count in (2, 7):
        train("train_imagenet", problem, tmp_path / f"{count}", num_validation_images=count, train_batch_size=4,
              max_train_steps=1, validation_split="none")  # fmt: skip
    assert seen == [{"class_labels": [0, 2]}, {"class_labels": [0, 0, 1, 2, 2, 3, 4]}]


@pytest.mark.parametrize("flag, missing", [("vae", "vae/*.safetensors"), ("tokenizer", "tokenizer/*.json")])
def test_a_pipeline_that_lacks_a_component_asks_for_its_flag(flag, missing, problem, tmp_path):
    shutil.copytree(problem / "train_cc3m", tmp_path / "pipeline")
    for path in (tmp_path / "pipeline").glob(missing):
        path.unlink()
    with pytest.raises(ValueError, match=f"--{flag}"):
        train("train_cc3m", problem, tmp_path / "output", pretrained_model_name_or_path=tmp_path / "pipeline")


def test_a_tokenizer_of_more_words_than_the_transformer_knows_is_refused(problem, tmp_path):
    config = json.loads((problem / "train_cc3m" / "transformer" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_vocab_size": len(WORDS) - 1}))
    with pytest.raises(ValueError, match=f"--tokenizer.*{len(WORDS) - 1}.*got {len(WORDS)}"):
        train("train_cc3m", problem, tmp_path / "output", transformer_config=tmp_path)
    assert not (tmp_path / "output").exists()


def test_more_classes_than_the_transformer_has_are_refused(problem, tmp_path):
    config = json.loads((problem / "train_imagenet" / "transformer" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_classes": 3}))
    with pytest.raises(ValueError, match=r"--label_column.*\[0, 2\].*got 3"):
        train("train_imagenet", problem, tmp_path / "output", transformer_config=tmp_path)


def test_cached_codes_of_another_rqvae_or_other_images_are_not_reused(problem, tmp_path, capsys):
    flags = dict(train_batch_size=8, max_train_steps=1, cache_codes=True, validation_split="none",
                 overwrite_output_dir=True)  # fmt: skip
    path = tmp_path / "codes.safetensors"
    train("train_cc3m", problem, tmp_path, **flags)
    codes = load_file(path)["codes"]
    assert codes.shape == (NUM_IMAGES, 1, 4, 4, 3)
    capsys.readouterr()
    shutil.copytree(problem / "train_cc3m" / "vae", tmp_path / "copy")  # the same one from another folder is the same
    train("train_cc3m", problem, tmp_path, vae=tmp_path / "copy", **flags)
    assert "reading the training codes" in capsys.readouterr().out

    vae = RQVAEModel.from_pretrained(problem / "train_cc3m" / "vae")
    vae.quant_conv.bias.data += 1
    vae.save_pretrained(tmp_path / "another")
    train("train_cc3m", problem, tmp_path, vae=tmp_path / "another", **flags)
    assert "reading the training codes" not in capsys.readouterr().out
    assert not torch.equal(load_file(path)["codes"].int(), codes.int())

    # The same number of images under the same names, rebuilt.
    shutil.copytree(problem / "data", tmp_path / "data")
    flags["dataset_name"] = tmp_path / "data"
    train("train_cc3m", problem, tmp_path, **flags)
    rows = datasets.Dataset.from_parquet(str(tmp_path / "data" / "train-00000.parquet"))
    rows.select(range(NUM_IMAGES - 1, -1, -1)).to_parquet(tmp_path / "data" / "train-00000.parquet")
    capsys.readouterr()
    train("train_cc3m", problem, tmp_path, **flags)
    assert "reading the training codes" not in capsys.readouterr().out
    assert torch.equal(load_file(path)["codes"].int(), codes.flip(0).int())


@pytest.mark.slow
def test_the_package_needs_nothing_of_the_train_extra_to_be_imported():
    program = """
import sys
import rq_draft_revise
names = ("budget", "captions_and_labels", "checkpoints", "data", "decoded_images", "reading_order")
print(sorted({"datasets", *(f"rq_draft_revise.{name}" for name in names)} & set(sys.modules)))
sys.modules["datasets"] = sys.modules["accelerate"] = None
for name in names:
    __import__(f"rq_draft_revise.{name}")
"""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
