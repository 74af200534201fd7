"""Stage 1: runs of examples/train_rqvae.py that must come to the same weights, and what they must not do to them."""

import io
import json
import math
import os
import shutil
import signal
import tarfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import train_rqvae
from accelerate import Accelerator
from claimed_device import claimed_device
from components import forget_accelerator, run_in_two_processes, tiny_vae
from PIL import Image
from safetensors.torch import load_file, save_file
from test_losses import random_vgg16
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from rq_draft_revise import RQVAEModel, training_run
from rq_draft_revise.checkpoints import checkpoints_in
from rq_draft_revise.data import load_split
from rq_draft_revise.decoded_images import decode_all, to_pixel_values
from rq_draft_revise.flags import tracked


NUM_IMAGES = 22  # no multiple of any batch below: epochs end in the middle of one
PIXELS = dict(perceptual_weight=0, adversarial_weight=0)
GAN = dict(perceptual_weight=0, discriminator_channels=4, discriminator_warmup_steps=0)


pytestmark = pytest.mark.usefixtures("one_process_on_the_cpu", "no_trace")


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> Path:
    """`data`, 22 + 8 images of 16×16 pixels in random colours; `wide`, as many of 28×16, two files and two tars of
    each, numbered in the column `score`; `vae`, a tiny RQ-VAE; `vqgan`, one of D = 1."""
    folder = tmp_path_factory.mktemp("problem")
    for name in ("data", "wide"):
        (folder / name).mkdir()
    random = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image()})
    for split, count in (("train", NUM_IMAGES), ("test", 8)):
        colors = random.integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
        images = [Image.fromarray(c.repeat(8, axis=0).repeat(8, axis=1)) for c in colors]
        dataset = datasets.Dataset.from_dict({"image": images}, features=features)
        dataset.to_parquet(folder / "data" / f"{split}-00000.parquet")
    features = datasets.Features({"image": datasets.Image(), "score": datasets.Value("int64")})
    for split, count in (("train", NUM_IMAGES), ("test", 8)):
        colors = random.integers(0, 256, (count, 2, 7, 3), dtype=np.uint8)
        images = [Image.fromarray(c.repeat(8, axis=0).repeat(4, axis=1)) for c in colors]
        dataset = datasets.Dataset.from_dict({"image": images, "score": range(count)}, features=features)
        for shard in range(2):
            rows = dataset.shard(2, shard, contiguous=True)
            rows.to_parquet(folder / "wide" / f"{split}-{shard:05d}.parquet")
            with tarfile.open(folder / f"wide-{split}-{shard:05d}.tar", "w") as tar:
                for row in rows:
                    buffer = io.BytesIO()
                    row["image"].save(buffer, "PNG")
                    entry = tarfile.TarInfo(f"{row['score']:05d}.png")
                    entry.size = len(buffer.getvalue())
                    tar.addfile(entry, io.BytesIO(buffer.getvalue()))
    tiny_vae().save_pretrained(folder / "vae")
    tiny_vae(code_depth=1).save_pretrained(folder / "vqgan")
    return folder


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory) -> Path:
    pytest.importorskip("lpips")
    path = tmp_path_factory.mktemp("vgg16") / "vgg16.safetensors"
    save_file(random_vgg16(), path)
    return path


def flags_of(problem: Path, **flags) -> list[str]:
    """A command line on `problem` and its `data`; flags of value True stand alone, of value None are left out."""
    common = {"vae": problem / "vae", "dataset_name": problem / flags.pop("data", "data"), "mixed_precision": "no",
              "logging_steps": 1, "resolution": 16, "lr_warmup_steps": 0}  # fmt: skip
    argv = []
    for name, value in {**common, **flags}.items():
        if value is not None:
            argv += [f"--{name}"] if value is True else [f"--{name}", *(str(value).split())]
    return argv


def train(problem: Path, output_dir: Path, **flags) -> list[dict]:
    """Run the script to its end and return its log."""
    train_rqvae.main(train_rqvae.parse_args(flags_of(problem, output_dir=output_dir, **flags)))
    forget_accelerator()
    return read_log(output_dir)


def read_log(output_dir: Path) -> list[dict]:
    """The entries of a log, without what the clock has a part in."""
    lines = (output_dir / "train_log.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("seconds", "images_per"))} for line in lines
    ]


def weights_in(output_dir: Path, name: str = "diffusion_pytorch_model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(output_dir / name)


def tensors_in(state, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors in nested dictionaries and lists, by their path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {name: tensor for key, value in items for name, tensor in tensors_in(value, f"{prefix}/{key}").items()}


def first_gradient(output_dir: Path, file: str = "optimizer.bin") -> dict[str, torch.Tensor]:
    """The gradient of the first step, by parameter: Adam's first moment is then (1 - beta1) times it.

    The weights themselves would be a poor witness. Adam divides by the gradient's size, so where the true gradient is
    zero (the bias of a key, or one before a normalization) the rounding decides the sign of a whole step.
    """
    state = torch.load(output_dir / "checkpoint-1" / file, weights_only=True)["state"]
    return {index: moments["exp_avg"] / (1 - 0.5) for index, moments in state.items()}


def distance(actual: dict, expected: dict) -> float:
    """The largest difference of two gradients, in units of the largest entry."""
    assert actual.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values()).item()
    assert scale > 1e-3, "a gradient that vanishes proves nothing"
    return max((actual[i] - gradient).abs().max().item() for i, gradient in expected.items()) / scale


# ------------------------------------------------------------------------------------------------------------ resuming


RESUMED = {
    "pixels, cached": {"cache_images_in_memory": True, "ema_decay": 0.9, **PIXELS},
    "pixels, decoding": {"gradient_accumulation_steps": 2, "reconstruction_loss": "both", **PIXELS},
    "crops": {"data": "wide", "random_crop": True, **PIXELS},
    "stream": {
        "data": "wide",
        "streaming": True,
        "shuffle_buffer_size": 7,
        "random_crop": True,
        "gradient_accumulation_steps": 2,
        **PIXELS,
    },
    "stream, decoding ahead": {"streaming": True, "dataloader_num_workers": 2, "shuffle_buffer_size": 7, **PIXELS},
    "discriminator": {"ema_decay": 0.9, **GAN, "discriminator_warmup_steps": 2},
    "discriminator that warms up": {**GAN, "discriminator_start_step": 1, "discriminator_warmup_steps": 4},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_in_mid_epoch_is_the_uninterrupted_one_to_the_bit(name, problem, tmp_path):
    flags = dict(
        train_batch_size=5, max_train_steps=8, checkpointing_steps=3, validation_steps=4, random_flip=True,
        learning_rate=1e-3, **{**RESUMED[name], "lr_warmup_steps": 2},
    )  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    expected = train(problem, whole, **flags)
    assert [path.name for path in checkpoints_in(whole)] == ["checkpoint-3", "checkpoint-6"]
    progress = json.loads((whole / "checkpoint-3" / "progress.json").read_text())
    assert progress["images"] % NUM_IMAGES != 0, "not in mid-epoch"
    assert (progress["places"] is not None) == ("stream" in name)

    # What is left of a run that was killed while it wrote its second checkpoint, at step 6.
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    lines = (whole / "train_log.jsonl").read_text().splitlines(keepends=True)
    (resumed / "train_log.jsonl").write_text("".join(lines[:6]) + lines[6][:10])
    assert train(problem, resumed, resume_from_checkpoint="latest", **flags) == expected

    weights = weights_in(whole)
    for key, tensor in weights_in(resumed).items():
        assert torch.equal(tensor, weights[key]), key
    files = ["model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl"]  # the last is the averaged weights
    if "discriminator" in name:
        files += ["model_1.safetensors", "optimizer_1.bin"]
    for file in files:
        load = load_file if file.endswith("safetensors") else lambda path: torch.load(path, weights_only=True)
        first, second = (tensors_in(load(folder / "checkpoint-6" / file)) for folder in (whole, resumed))
        assert first.keys() == second.keys() and len(first) > 5
        for key, tensor in first.items():
            assert torch.equal(second[key], tensor), f"{file}: {key}"


@pytest.mark.parametrize("losses", [PIXELS, GAN, "perceptual"], ids=["pixels", "discriminator", "perceptual"])
def test_a_run_on_a_device_is_that_on_the_cpu_resumed_there_too(losses, problem, tmp_path, request):
    if losses == "perceptual":
        losses = GAN | dict(perceptual_weight=1.0, lpips_weights=request.getfixturevalue("vgg16"), resolution=32)
    flags = dict(train_batch_size=4, max_train_steps=3, checkpointing_steps=2, validation_steps=3, ema_decay=0.9,
                 learning_rate=1e-3, random_flip=True, **losses)  # fmt: skip
    expected = train(problem, tmp_path / "cpu", **flags)
    with claimed_device() as seen:
        whole = train(problem, tmp_path / "device", **flags)
        shutil.copytree(tmp_path / "device" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
        resumed = train(problem, tmp_path / "resumed", resume_from_checkpoint="latest", **flags)
    assert seen.kernels, "nothing ran there"
    assert resumed == whole[2:]
    # rounding grows: a code flips sooner or later
    for entry, other in zip(whole, expected, strict=True):
        for name in [name for name in entry if name in ("mse", "psnr", "grad_norm", "restarts") or "loss" in name]:
            assert entry[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), (name, entry["step"])


def test_a_line_of_the_log_is_that_of_the_uninterrupted_run_where_the_checkpoint_is_between_two(problem, tmp_path):
    """Also of what only some of its steps measured: the adversarial loss begins in the line's second step."""
    flags = dict(train_batch_size=5, max_train_steps=8, checkpointing_steps=3, validation_steps=8, logging_steps=4,
                 learning_rate=1e-3, **{**GAN, "discriminator_warmup_steps": 1})  # fmt: skip
    expected = train(problem, tmp_path / "whole", **flags)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    (tmp_path / "resumed" / "train_log.jsonl").write_text("")
    assert train(problem, tmp_path / "resumed", resume_from_checkpoint="latest", **flags) == expected
    assert [entry["step"] for entry in expected] == [4, 8, 8]


def test_a_finished_run_that_is_resumed_has_its_last_validation_once(problem, tmp_path):
    flags = dict(train_batch_size=5, max_train_steps=4, checkpointing_steps=2, validation_steps=3, **PIXELS)
    expected = train(problem, tmp_path, **flags)
    assert [e["kind"] for e in expected if e["step"] == 4] == ["train", "validation"]
    assert train(problem, tmp_path, resume_from_checkpoint="latest", **flags) == expected


def test_a_run_does_not_go_on_with_other_images(problem, tmp_path):
    shutil.copytree(problem / "data", tmp_path / "data")
    flags = dict(dataset_name=tmp_path / "data", train_batch_size=5, max_train_steps=2, checkpointing_steps=1,
                 validation_split="none", **PIXELS)  # fmt: skip
    train(problem, tmp_path / "run", **flags)
    path = str(tmp_path / "data" / "train-00000.parquet")
    rows = datasets.Dataset.from_parquet(path)
    rows.select(range(NUM_IMAGES - 1, -1, -1)).to_parquet(path)
    with pytest.raises(ValueError, match="data_digest was"):
        train(problem, tmp_path / "run", resume_from_checkpoint="latest", **flags)


# ------------------------------------------------------------------------------- warming up within a budget in seconds


@pytest.fixture
def twenty_steps(monkeypatch):
    """Each step takes a twentieth of `--max_train_seconds`, where that is given."""

    class Timed(training_run.Budget):
        def fraction_used(self, step):
            return super().fraction_used(step) if self.max_train_seconds is None else step / 20

    monkeypatch.setattr(training_run, "Budget", Timed)


SECONDS = dict(train_batch_size=2, max_train_seconds=1000, max_train_steps=10**6, lr_warmup_steps=None,
               learning_rate=1e-3, validation_split="none", **{**GAN, "discriminator_warmup_steps": None})  # fmt: skip


@pytest.mark.parametrize("start, adversarial", [(0, 2), (5, 7)])
def test_by_default_a_tenth_of_the_seconds_ends_the_warm_up_and_begins_the_adversarial_loss(
    start, adversarial, problem, tmp_path, twenty_steps, capsys
):
    """Half an epoch is 6 steps here."""
    log = train(problem, tmp_path / "whole", discriminator_start_step=start, checkpointing_steps=3, **SECONDS)
    rates = [entry["learning_rate"] for entry in log]
    assert len(log) == 20 and rates[:3] == pytest.approx([1e-3 / 6, 0.5e-3, 1e-3]) and set(rates[2:]) == {1e-3}
    assert ["discriminator_loss" in entry for entry in log] == [step >= start for step in range(20)]
    assert ["adversarial_weight" in entry for entry in log] == [step >= adversarial for step in range(20)]
    assert "Warning" not in capsys.readouterr().out
    for step in (3, 6, 9):
        resume = tmp_path / "whole" / f"checkpoint-{step}"
        resumed = train(problem, tmp_path / f"from-{step}", discriminator_start_step=start,
                        resume_from_checkpoint=resume, checkpointing_steps=100, **SECONDS)  # fmt: skip
        assert resumed == log[step:]


def test_what_is_given_in_steps_is_taken_in_steps_and_said_to_be_too_long(problem, tmp_path, twenty_steps, capsys):
    flags = {**SECONDS, "lr_warmup_steps": 40, "discriminator_warmup_steps": 20}
    log = train(problem, tmp_path, **flags)
    assert [entry["learning_rate"] for entry in log] == pytest.approx([1e-3 * (i + 1) / 40 for i in range(20)])
    assert not any("adversarial_weight" in entry for entry in log)
    printed = capsys.readouterr().out
    assert "Warning: the run ended within its warm-up, of 40 steps" in printed
    assert "Warning: the adversarial loss never began" in printed


# -------------------------------------------------------------------------------------------- micro-batches, processes


def test_accumulated_micro_batches_equal_the_large_batch(problem, tmp_path):
    logs = {}
    for micro_batches in (1, 3):
        logs[micro_batches] = train(
            problem, tmp_path / f"{micro_batches}", train_batch_size=12 // micro_batches,
            gradient_accumulation_steps=micro_batches, max_train_steps=2, checkpointing_steps=1, learning_rate=1e-4,
            random_flip=True, max_grad_norm=0.5, **PIXELS,
        )  # fmt: skip
    assert distance(first_gradient(tmp_path / "3"), first_gradient(tmp_path / "1")) < 1e-5
    # The codebook, with the restarts that the first update of one is: the moving averages are sums over the batch.
    books = [weights_in(tmp_path / name / "checkpoint-1", "model.safetensors") for name in ("3", "1")]
    for key in ("quantizer.codebook", "quantizer.ema_counts", "quantizer.ema_sums"):
        torch.testing.assert_close(books[0][key], books[1][key], rtol=1e-5, atol=1e-5)
    for one, three in zip(logs[1], logs[3]):
        assert one.keys() == three.keys()
        for name in one.keys() - {"kind", "split"}:
            assert three[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("adaptive", [False, True])
def test_with_a_discriminator_they_equal_it_up_to_the_adaptive_weight(adaptive, problem, tmp_path):
    """Each micro-batch has an adaptive weight of its own, a quotient of norms, which is not that of the whole batch:
    0.2 of it apart here, and the gradient 0.3 of its largest entry, at micro-batches of 4 very different images and a
    discriminator that knows nothing. Where the weight is equal, by its bound, so is the gradient."""
    logs = {}
    for micro_batches in (1, 3):
        logs[micro_batches] = train(
            problem, tmp_path / f"{micro_batches}", train_batch_size=12 // micro_batches,
            gradient_accumulation_steps=micro_batches, max_train_steps=1, checkpointing_steps=1,
            max_adaptive_weight=None if adaptive else 0.02, **GAN,
        )  # fmt: skip
    assert distance(*(first_gradient(tmp_path / name, "optimizer_1.bin") for name in ("3", "1"))) < 1e-5
    one, three = (log[0]["adversarial_weight"] for log in logs.values())
    assert one != three if adaptive else one == three == pytest.approx(0.75 * 0.02)
    assert three == pytest.approx(one, rel=0.2)
    assert distance(first_gradient(tmp_path / "3"), first_gradient(tmp_path / "1")) < (0.3 if adaptive else 1e-5)


PROCESSES = """
import datasets, json, os, sys
import train_rqvae
from components import forget_accelerator, one_process_group
from rq_draft_revise import RQVAEModel

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1
folder, rank, history = sys.argv[1], os.environ["RANK"], {}

def recorded(self, *args, update_codebook=RQVAEModel.update_codebook, **kwargs):
    output = update_codebook(self, *args, **kwargs)
    history[name]["states"].append({key: tensor.clone() for key, tensor in self.state_dict().items()})
    history[name]["restarts"] += int(output.num_restarted)
    return output

def seen(batch, flips=None, to_pixel_values=train_rqvae.to_pixel_values):
    history[name]["images"].append(batch.clone())
    return to_pixel_values(batch, flips)

RQVAEModel.update_codebook, train_rqvae.to_pixel_values = recorded, seen
with one_process_group():
    for name, flags in json.loads(open(f"{folder}/runs.json").read()).items():
        history[name] = {"states": [], "images": [], "restarts": 0}
        train_rqvae.main(train_rqvae.parse_args(flags))
        forget_accelerator()
    torch.save(history, f"{folder}/history-{rank}.pt")
"""

# A whole codebook of restarts at the first step, and some at each of the others: what one batch does not use has half
# its count left, and the bound is above half.
EQUAL = dict(train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=6, checkpointing_steps=1,
             learning_rate=1e-4, validation_split="none", discriminator_start_step=1)  # fmt: skip
RUNS = {
    "pixels": dict(**EQUAL, **PIXELS),
    "discriminator": {**EQUAL, **GAN, "gradient_accumulation_steps": 1, "train_batch_size": 4},
}
STREAM = dict(data="wide", streaming=True, shuffle_buffer_size=5, **EQUAL, **PIXELS)


@pytest.fixture(scope="module")
def two_processes(problem, tmp_path_factory) -> Path:
    """A folder with what runs of two processes wrote."""
    folder = tmp_path_factory.mktemp("two-processes")
    tiny_vae(restart_threshold=0.6, ema_decay=0.5).save_pretrained(folder / "vae")
    runs = {
        name: dict(vae=folder / "vae", output_dir=folder / name, **flags)
        for name, flags in {**RUNS, "stream": STREAM}.items()
    }
    for name in ("discriminator", "stream"):
        runs[f"{name}-resumed"] = {
            **runs[name],
            "output_dir": folder / f"{name}-resumed",
            "resume_from_checkpoint": folder / name / "checkpoint-3",
        }
    (folder / "runs.json").write_text(json.dumps({name: flags_of(problem, **flags) for name, flags in runs.items()}))
    run_in_two_processes(PROCESSES, folder)
    return folder


def histories_of(two_processes: Path, name: str) -> list[dict]:
    return [torch.load(two_processes / f"history-{rank}.pt", weights_only=True)[name] for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RUNS, "stream"])
def test_two_processes_hold_bit_identical_models_after_every_step(name, two_processes):
    first, second = (history["states"] for history in histories_of(two_processes, name))
    assert len(first) == len(second) == 6
    for step in range(6):
        for key, tensor in first[step].items():
            assert torch.equal(tensor, second[step][key]), f"{key} differs after step {step + 1}"
        if step > 0:
            assert not torch.equal(first[step]["quantizer.codebook"], first[step - 1]["quantizer.codebook"])
    assert histories_of(two_processes, name)[0]["restarts"] > 2 * 50, "restarts of the first step alone prove little"


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one_of_the_same_batch(name, two_processes, problem, tmp_path):
    """With the discriminator too: the processes share one adaptive weight. The order of sums in float32 is all that
    differs, 1e-5 of the first gradient; a few steps later 1e-3 of the losses, as Adam divides small gradients too."""
    one_batch = {**RUNS[name], "train_batch_size": 2 * RUNS[name]["train_batch_size"]}
    expected = train(problem, tmp_path, vae=two_processes / "vae", **one_batch)
    actual = read_log(two_processes / name)
    assert distance(first_gradient(two_processes / name), first_gradient(tmp_path)) < 1e-5
    assert len(actual) == len(expected) == 6
    for one, two in zip(expected, actual):
        assert one.keys() == two.keys()
        for key in one.keys() - {"kind", "split"}:
            assert two[key] == pytest.approx(one[key], rel=2e-3, abs=1e-4), (one["step"], key)


@pytest.mark.slow
def test_two_processes_read_no_image_twice_in_an_epoch(two_processes, problem):
    images = decode_all(load_split("train", dataset_name=str(problem / "data")), "image", 16)
    for name in RUNS:
        batches = zip(*(history["images"] for history in histories_of(two_processes, name)))
        read = torch.cat([batch for together in batches for batch in together])[: 2 * NUM_IMAGES]
        for epoch in read.split(NUM_IMAGES):
            found = (epoch[:, None] == images[None]).flatten(2).all(-1).float().argmax(1)
            assert sorted(found.tolist()) == list(range(NUM_IMAGES))


@pytest.mark.slow
def test_two_processes_stream_a_file_each_and_read_every_image_once_an_epoch(two_processes, problem):
    images = decode_all(load_split("train", dataset_name=str(problem / "wide")), "image", 16)
    shares = [rows_of(torch.cat(history["images"]), images) for history in histories_of(two_processes, "stream")]
    for epoch in (slice(0, 11), slice(11, 22)):
        files = sorted(sorted(share[epoch]) for share in shares)
        assert list(map(len, files)) == [11, 11] and sorted(sum(files, [])) == list(range(22))
        if not datasets.__version__.startswith("5.0"):  # which fills its shuffle buffer from all files
            assert files == [list(range(11)), list(range(11, 22))]
    assert shares[0][:11] != shares[0][11:22]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["discriminator", "stream"])
def test_two_processes_resume_to_the_bit(name, two_processes):
    expected = weights_in(two_processes / name)
    for key, tensor in weights_in(two_processes / f"{name}-resumed").items():
        assert torch.equal(tensor, expected[key]), key
    assert read_log(two_processes / f"{name}-resumed") == [e for e in read_log(two_processes / name) if e["step"] > 3]


# ------------------------------------------------------------------------------------------------------------ the data


def rows_of(read: torch.Tensor, images: torch.Tensor) -> list[int]:
    """Which of `images` each image that was read is."""
    equal = (read[:, None] == images[None]).flatten(2).all(-1)
    assert (equal.sum(1) == 1).all(), "an image that is none of them"
    return equal.float().argmax(1).tolist()


def images_read(problem: Path, output_dir: Path, **flags) -> torch.Tensor:
    """What a run without validation hands to the RQ-VAE: uint8 `(steps * batch, 3, 16, 16)` in its order."""
    read = []

    def seen(batch, flips=None, to_pixel_values=train_rqvae.to_pixel_values):
        read.append(batch if flips is None else torch.where(flips[:, None, None, None], batch.flip(-1), batch))
        return to_pixel_values(batch, flips)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rqvae, "to_pixel_values", seen)
        train(problem, output_dir, validation_split="none", **flags, **PIXELS)
    return torch.cat(read)


def test_images_in_memory_train_as_those_that_are_decoded(problem, tmp_path):
    flags = dict(train_batch_size=5, max_train_steps=6, random_flip=True, learning_rate=1e-3, **PIXELS)
    logs = [train(problem, tmp_path / str(c), cache_images_in_memory=c, **flags) for c in (True, None)]
    assert logs[0] == logs[1]
    first, second = (weights_in(tmp_path / str(c)) for c in (True, None))
    assert all(torch.equal(second[key], tensor) for key, tensor in first.items())


@pytest.mark.parametrize("streaming", [None, True])
def test_webdataset_tars_train_to_the_bits_of_the_files_of_their_rows(streaming, problem, tmp_path):
    flags = dict(dataset_name=None, streaming=streaming, shuffle_buffer_size=7, random_flip=True, random_crop=True,
                 train_batch_size=5, max_train_steps=6, learning_rate=1e-3, **PIXELS)  # fmt: skip
    sources = {"image": "wide/{}-*.parquet", "png": "wide-{}-*.tar"}
    for column, pattern in sources.items():
        files = {
            "data_files": problem / pattern.format("train"),
            "validation_data_files": problem / pattern.format("test"),
        }
        train(problem, tmp_path / column, image_column=column, **files, **flags)
    expected, actual = (read_log(tmp_path / column) for column in sources)
    assert actual == expected and expected[-1]["split"] == "validation"
    expected, actual = (weights_in(tmp_path / column) for column in sources)
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


def test_an_epoch_in_one_batch_is_the_same_step_streamed_or_not(problem, tmp_path):
    """The order within the batch is all that differs: float32 sums, and which vector a restart takes."""
    flags = dict(data="wide", train_batch_size=NUM_IMAGES, max_train_steps=1, checkpointing_steps=1,
                 shuffle_buffer_size=7, **PIXELS)  # fmt: skip
    logs = [train(problem, tmp_path / str(s), streaming=s, validation_split="none", **flags) for s in (None, True)]
    for name in ("loss", "mse", "commitment_loss", "grad_norm", "usage"):
        assert logs[0][0][name] == pytest.approx(logs[1][0][name], rel=1e-5), name
    assert distance(first_gradient(tmp_path / "True"), first_gradient(tmp_path / "None")) < 1e-5


@pytest.mark.parametrize("streaming", [None, True])
def test_a_filter_leaves_only_wanted_images_and_their_number_is_printed(streaming, problem, tmp_path, capsys):
    flags = dict(data="wide", streaming=streaming, filter_column="score", filter_min=10, filter_max=17)
    read = images_read(problem, tmp_path, train_batch_size=8, max_train_steps=2, **flags)
    images = decode_all(load_split("train", dataset_name=str(problem / "wide")), "image", 16)
    rows = rows_of(read, images)
    assert sorted(rows[:8]) == sorted(rows[8:]) == list(range(10, 18)) and rows[:8] != rows[8:]
    assert f"images: {'unknown number of' if streaming else '8'} training" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["decoding", "cached", "streamed"])
def test_unreadable_images_are_skipped_counted_and_named(how, problem, tmp_path, capsys):
    whole = load_split("train", dataset_name=str(problem / "data"))
    images = decode_all(whole, "image", 16)[:6]
    rows = []
    for i in range(6):
        buffer = io.BytesIO()
        whole[i]["image"].save(buffer, "PNG")
        rows.append({"bytes": b"no image" if i in (1, 4) else buffer.getvalue(), "path": f"{i}.png"})
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(tmp_path / "rows.parquet")
    switch = {"cached": "cache_images_in_memory", "streamed": "streaming"}.get(how)
    flags = {"dataset_name": None, "data_files": tmp_path / "rows.parquet", **({switch: True} if switch else {})}
    read = images_read(problem, tmp_path / "run", train_batch_size=4, max_train_steps=3, **flags)
    assert set(rows_of(read, images)) == {0, 2, 3, 5}
    printed = capsys.readouterr().out
    assert "Skipped: an unreadable image" in printed and "of split 'train'" in printed
    assert "skipped rows: 2 with an unreadable image; skipped steps: 0." in printed
    if how != "streamed":
        assert "1.png" in printed and "4.png" in printed

    train(problem, tmp_path / "validated", validation_data_files=tmp_path / "rows.parquet", train_batch_size=4,
          max_train_steps=1, **PIXELS)  # fmt: skip
    assert "22 training, 4 validation" in capsys.readouterr().out  # a second copy of a neighbour measures nothing


def test_a_random_crop_is_a_square_of_its_image_at_any_place_and_in_micro_batches_the_same(problem, tmp_path):
    flags = dict(data="wide", random_crop=True)
    read = images_read(problem, tmp_path / "1", train_batch_size=22, max_train_steps=2, **flags)
    dataset = load_split("train", dataset_name=str(problem / "wide"))
    wide = torch.stack([torch.from_numpy(np.array(row["image"])).permute(2, 0, 1) for row in dataset])
    windows = wide.unfold(-1, 16, 1).permute(0, 3, 1, 2, 4)  # (22, 13, 3, 16, 16)
    places = (read[:, None, None] == windows).flatten(3).all(-1).nonzero().tolist()  # image read, row, left
    assert [i for i, _, _ in places] == list(range(44))
    assert len({left for _, _, left in places}) > 6
    by_epoch = [{row: left for i, row, left in places if i // 22 == epoch} for epoch in (0, 1)]
    assert len(by_epoch[0]) == len(by_epoch[1]) == 22 and by_epoch[0] != by_epoch[1]
    flags |= dict(train_batch_size=11, gradient_accumulation_steps=2)
    assert torch.equal(images_read(problem, tmp_path / "2", max_train_steps=2, **flags), read)


def test_each_validation_split_has_metrics_of_its_own(problem, tmp_path):
    log = train(problem, tmp_path, train_batch_size=5, max_train_steps=1, validation_split="test train", **PIXELS)
    test, seen = (entry for entry in log if entry["kind"] == "validation")
    assert [test["split"], seen["split"]] == ["test", "train"]
    assert seen["mse"] == seen["train_mse"] == test["train_mse"] != test["mse"] and seen["mse_gap"] == 0


# --------------------------------------------------------------------------------------------------- the discriminator


def test_the_rqvae_learns_nothing_from_a_discriminator_that_warms_up(problem, tmp_path):
    flags = dict(
        train_batch_size=5, max_train_steps=4, learning_rate=1e-3, checkpointing_steps=3, validation_split="none"
    )
    plain = train(problem, tmp_path / "plain", **flags, **PIXELS)
    log = train(
        problem, tmp_path / "gan", **flags, **GAN | dict(discriminator_start_step=1, discriminator_warmup_steps=2)
    )
    assert ["discriminator_loss" in entry for entry in log] == [False, True, True, True]
    assert ["adversarial_weight" in entry for entry in log] == [False, False, False, True]
    assert [entry["loss"] for entry in log] == [entry["loss"] for entry in plain]
    before, after = ([weights_in(tmp_path / run / "checkpoint-3", "model.safetensors") for run in ("plain", "gan")],
                     [weights_in(tmp_path / run) for run in ("plain", "gan")])  # fmt: skip
    key = "decoder.conv_out.weight"
    assert torch.equal(before[0][key], before[1][key]) and not torch.equal(after[0][key], after[1][key])


def test_the_discriminator_learns_to_tell_and_the_adaptive_weight_is_clamped(problem, tmp_path):
    flags = dict(train_batch_size=11, max_train_steps=40, learning_rate=1e-4, discriminator_learning_rate=1e-3,
                 validation_split="none", **GAN | dict(discriminator_channels=8))  # fmt: skip
    log = train(problem, tmp_path / "free", **flags)
    assert log[0]["discriminator_loss"] == pytest.approx(1, abs=0.05)
    assert log[-1]["discriminator_loss"] < 0.8 and log[-1]["discriminator_real"] > log[-1]["discriminator_fake"] + 0.5
    smallest = min(entry["adversarial_weight"] for entry in log)
    log = train(problem, tmp_path / "clamped", max_adaptive_weight=smallest / 2, **flags)
    assert all(entry["adversarial_weight"] == pytest.approx(0.75 * smallest / 2) for entry in log)


def test_the_discriminator_is_told_which_images_are_real_and_its_loss_is_none_of_the_rqvaes():
    discriminator = train_rqvae.PatchDiscriminator(3, 4)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    out = SimpleNamespace(sample=(0.5 * images.flip(0)).requires_grad_())
    values = train_rqvae.backward_discriminator(Accelerator(), discriminator, out, images)
    assert values["discriminator_real"].item() == pytest.approx(discriminator(images).mean().item(), rel=1e-4)
    assert values["discriminator_fake"].item() == pytest.approx(discriminator(out.sample).mean().item(), rel=1e-4)
    assert out.sample.grad is None and all(p.grad.any() for p in discriminator.parameters())


# --------------------------------------------------------------------------------------------------- what a step does


@pytest.mark.parametrize("max_grad_norm, rate", [(0.01, 5e-3), (0, None)])
def test_both_optimizers_step_as_the_flags_say_and_the_average_of_the_weights_is_exported(
    max_grad_norm, rate, problem, tmp_path
):
    steps, weights = {}, []

    def before(optimizer, *_):
        (group,) = optimizer.param_groups
        norm = torch.cat([p.grad.flatten() for p in group["params"] if p.grad is not None]).norm().item()
        steps.setdefault(id(optimizer), []).append((group["lr"], group["betas"], norm))

    def after(optimizer, *_):
        if id(optimizer) == next(iter(steps)):  # that of the RQ-VAE, before the discriminator's begins
            weights.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    flags = {**GAN, "discriminator_start_step": 1, "lr_warmup_steps": 4}
    try:
        log = train(problem, tmp_path, train_batch_size=4, max_train_steps=6, learning_rate=1e-3, adam_beta1=0.6,
                    adam_beta2=0.8, ema_decay=0.4, max_grad_norm=max_grad_norm, discriminator_learning_rate=rate,
                    validation_split="none", **flags)  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    warmup = [0.25, 0.5, 0.75, 1, 1, 1]
    assert [entry["learning_rate"] for entry in log] == pytest.approx([1e-3 * share for share in warmup])
    kinds = (("grad_norm", 1e-3, 0), ("discriminator_grad_norm", rate or 1e-3, 1))
    for (name, peak, first), taken in zip(kinds, steps.values(), strict=True):
        rates, betas, norms = zip(*taken)
        assert rates == pytest.approx([peak * share for share in warmup[first:]]) and set(betas) == {(0.6, 0.8)}
        bound = max_grad_norm or math.inf
        assert norms == pytest.approx([min(entry[name], bound) for entry in log[first:]], rel=1e-3)
        assert max(entry[name] for entry in log[first:]) > 0.01

    averages = [p.detach().clone() for p in RQVAEModel.from_pretrained(problem / "vae").parameters()]
    for i, live in enumerate(weights):
        decay = min(0.4, 1 - (1 + i) ** (-2 / 3))
        averages = [decay * average + (1 - decay) * weight for average, weight in zip(averages, live)]
    for (key, tensor), expected in zip(RQVAEModel.from_pretrained(tmp_path).named_parameters(), averages, strict=True):
        torch.testing.assert_close(tensor.detach(), expected, rtol=0, atol=1e-6, msg=key)


def test_restarts_take_other_vectors_at_each_step_and_seed(problem, tmp_path, monkeypatch):
    numbers, update_codebook = [], RQVAEModel.update_codebook

    def recorded(self, latents, generator):
        numbers.append(torch.rand(1, generator=generator.clone_state()).item())
        return update_codebook(self, latents, generator=generator)

    monkeypatch.setattr(RQVAEModel, "update_codebook", recorded)
    for seed in (0, 1):
        train(problem, tmp_path / f"{seed}", seed=seed, train_batch_size=4, max_train_steps=3, validation_split="none",
              **PIXELS)  # fmt: skip
    assert len(numbers) == len(set(numbers)) == 6


@pytest.mark.parametrize("how", [None, "cache_images_in_memory", "streaming"])
def test_another_seed_is_another_order(how, problem, tmp_path):
    switches = {how: True} if how else {}
    first, again, other = (
        images_read(problem, tmp_path / f"{i}", train_batch_size=11, max_train_steps=2, seed=seed, **switches)
        for i, seed in enumerate((0, 0, 1))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


# ----------------------------------------------------------------------------------------------------- steps left out


@pytest.mark.parametrize(
    "losses, bad",
    [(PIXELS, "reconstruction_loss"), (GAN, "reconstruction_loss"), (GAN, "discriminator_hinge_loss")],
    ids=["pixels", "discriminator", "discriminator alone"],
)
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(losses, bad, problem, tmp_path, monkeypatch):
    states, steps, original = [], [], getattr(train_rqvae, bad)

    def poisoned(*args):
        steps.append(None)
        loss, *others = out if isinstance(out := original(*args), tuple) else (out,)
        loss = loss * math.nan if len(steps) == 3 else loss
        return (loss, *others) if others else loss

    monkeypatch.setattr(train_rqvae, bad, poisoned)
    log = train(problem, tmp_path, train_batch_size=5, max_train_steps=4, checkpointing_steps=1, learning_rate=1e-3,
                ema_decay=0.5, validation_split="none", **losses)  # fmt: skip
    assert [entry["skipped_steps"] for entry in log] == [0, 0, 1, 1]
    assert ["loss" in entry for entry in log] == [True, True, False, True]
    assert [entry["images"] for entry in log] == [5, 10, 15, 20]
    for file in ("model.safetensors", "model_1.safetensors"):
        paths = [tmp_path / f"checkpoint-{step}" / file for step in (2, 3, 4)]
        if not paths[0].exists():
            assert losses is PIXELS
            continue
        states = [load_file(path) for path in paths]
        assert all(torch.equal(states[1][key], tensor) for key, tensor in states[0].items())
        assert any(not torch.equal(states[2][key], tensor) for key, tensor in states[0].items())
    averages = [
        tensors_in(torch.load(tmp_path / f"checkpoint-{step}" / "custom_checkpoint_0.pkl", weights_only=True))
        for step in (2, 3)
    ]
    assert all(torch.equal(averages[1][key], tensor) for key, tensor in averages[0].items())
    assert all(tensor.isfinite().all() for tensor in weights_in(tmp_path).values())


def test_too_many_of_them_in_a_row_stop_the_run_with_a_message(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(
        train_rqvae, "reconstruction_loss", lambda sample, pixel_values, kind: (sample.sum() * math.inf, sample.sum())
    )
    with pytest.raises(RuntimeError, match="3 optimizer steps in a row"):
        train(problem, tmp_path, train_batch_size=5, max_train_steps=9, max_nonfinite_steps=3, **PIXELS)
    assert not list(tmp_path.glob("*.safetensors"))


def test_asked_to_stop_it_writes_a_checkpoint_and_goes_on_from_there(problem, tmp_path, monkeypatch):
    flags = dict(train_batch_size=5, max_train_steps=5, learning_rate=1e-3, validation_split="none", **PIXELS)
    expected = train(problem, tmp_path / "whole", **flags)
    calls = []

    def terminated(*args, reconstruction_loss=train_rqvae.reconstruction_loss):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return reconstruction_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_rqvae, "reconstruction_loss", terminated)
        train(problem, tmp_path / "stopped", **flags)
    assert [path.name for path in checkpoints_in(tmp_path / "stopped")] == ["checkpoint-2"]
    assert not list((tmp_path / "stopped").glob("*.safetensors"))
    assert train(problem, tmp_path / "stopped", resume_from_checkpoint="latest", **flags) == expected


# -------------------------------------------------------------------------------------------------------- the codebook


@pytest.fixture(scope="module")
def gradients(tmp_path_factory) -> Path:
    """Images enough that none is learned by heart: smooth ramps between two colours, in random directions."""
    folder = tmp_path_factory.mktemp("gradients")
    random = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image()})
    axis = np.linspace(-1, 1, 8)
    for split, count in (("train", 512), ("test", 64)):
        angles = random.uniform(0, 2 * np.pi, (count, 1, 1))
        ramps = (1 + (np.cos(angles) * axis[:, None] + np.sin(angles) * axis) / np.sqrt(2)) / 2
        ends = random.uniform(0, 255, (2, count, 1, 1, 3))
        pixels = ends[0] + (ends[1] - ends[0]) * ramps[..., None]
        images = [Image.fromarray(image) for image in pixels.round().astype(np.uint8)]
        datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def reconstructions(output_dir: Path) -> tuple[float, float, float]:
    """MSE of training and of evaluation, and the share of the codebook restarted a step; of the last 40 steps."""
    log = read_log(output_dir)
    training = [entry for entry in log if entry["kind"] == "train"][-40:]
    (validation,) = (entry for entry in log if entry["kind"] == "validation")
    restarts = np.mean([sum(entry["restarts"]) for entry in training]) / 512
    return np.mean([entry["mse"] for entry in training]), validation["mse"], restarts


@pytest.mark.slow
def test_at_batch_8_evaluation_reconstructs_as_well_as_training(gradients, problem, tmp_path):
    """128 vectors of 3 depths are 0.75 a code. The original restarts below a count of 1, and so most codes at each
    step; what that does to the evaluation is in test_rqvae.py."""
    flags = dict(dataset_name=gradients, resolution=8, train_batch_size=8, learning_rate=2e-3, lr_scheduler="cosine",
                 validation_steps=10**6, checkpointing_steps=10**6, ema_decay=0, vae=None, cache_images_in_memory=True,
                 **PIXELS)  # fmt: skip
    results = {}
    for name, threshold, steps in (("share", 0.01, 120), ("absolute", 1 / 0.75, 20)):
        tiny_vae(codebook_size=512, restart_threshold=threshold).save_config(tmp_path / f"{name}-config")
        train(problem, tmp_path / name, vae_config=tmp_path / f"{name}-config", max_train_steps=steps, **flags)
        results[name] = reconstructions(tmp_path / name)
    training, evaluation, restarts = results["share"]
    assert restarts < 0.02 and evaluation < 1.2 * training
    assert results["absolute"][2] > 0.3


# --------------------------------------------------------------------------------------------------------- the results


@pytest.fixture(scope="module")
def overfitted(problem, tmp_path_factory) -> Path:
    """A run on the first eight images until it knows them."""
    folder = tmp_path_factory.mktemp("overfitted")
    with torch.random.fork_rng(devices=[]):
        train(
            problem, folder, vae=None, vae_config=problem / "vae", train_split="train[:8]", train_batch_size=8,
            max_train_steps=100, lr_warmup_steps=5, ema_decay=0.9, checkpointing_steps=10**6, validation_steps=10**6,
            cache_images_in_memory=True, learning_rate=5e-3, lr_scheduler="cosine", **PIXELS,
        )  # fmt: skip
    return folder


def test_every_line_of_the_log_is_json_that_says_which_step_and_what_was_measured(overfitted):
    entries = [json.loads(line) for line in (overfitted / "train_log.jsonl").read_text().splitlines()]
    training = [entry for entry in entries if entry["kind"] == "train"]
    assert [entry["step"] for entry in training] == list(range(1, 101))
    assert [entry["images"] for entry in training] == list(range(8, 8 * 101, 8))
    assert [entry["seconds"] for entry in entries] == sorted(entry["seconds"] for entry in entries)
    common = {"kind", "step", "images", "seconds", "mse", "psnr", "usage", "perplexity"}
    expected = {
        "train": common | {"images_per_second", "learning_rate", "skipped_steps", "loss", "reconstruction_loss",
                           "commitment_loss", "grad_norm", "restarts"},
        "validation": common | {"split", "train_mse", "train_psnr", "mse_gap", "relative_mse_gap"},
    }  # fmt: skip
    for entry in entries:
        assert entry.keys() == expected[entry["kind"]]
        for name in {"usage", "perplexity", "restarts"} & entry.keys():
            assert len(entry[name]) == 3, "one a depth"
    assert sum(training[0]["restarts"]) > 0
    assert training[-1]["psnr"] == pytest.approx(10 * math.log10(4 / training[-1]["mse"]))


def test_the_loss_falls_on_eight_images_and_held_back_ones_are_not_what_was_learned(overfitted):
    log = read_log(overfitted)
    values = [entry["mse"] for entry in log if entry["kind"] == "train"]
    assert np.mean(values[-10:]) < 0.1 * np.mean(values[:3])
    (entry,) = (e for e in log if e["kind"] == "validation")
    assert entry["train_mse"] < entry["mse"] and entry["mse_gap"] == pytest.approx(entry["mse"] - entry["train_mse"])
    assert entry["relative_mse_gap"] == pytest.approx(entry["mse"] / entry["train_mse"] - 1)


def test_the_exported_rqvae_reconstructs_what_the_log_says(overfitted, problem):
    vae = RQVAEModel.from_pretrained(overfitted)
    pixel_values = to_pixel_values(decode_all(load_split("test", dataset_name=str(problem / "data")), "image", 16))
    with torch.no_grad():
        mse = (vae(pixel_values).sample.clamp(-1, 1) - pixel_values).square().mean().item()
    (entry,) = (e for e in read_log(overfitted) if e["kind"] == "validation")
    assert mse == pytest.approx(entry["mse"], rel=1e-4)
    (path,) = overfitted.glob("reconstructions-*.png")
    assert Image.open(path).size == (8 * 16, 2 * 16)


def test_the_metrics_are_means_over_images_and_over_the_codes_of_all_of_them(problem):
    vae = RQVAEModel.from_pretrained(problem / "vae")
    images = torch.randint(256, (7, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    images[0] = 0  # of another error than the rest
    metrics = train_rqvae.reconstruction_metrics(vae, images, 3, Accelerator())
    with torch.no_grad():
        out = vae(to_pixel_values(images))
    mse = (out.sample.clamp(-1, 1) - to_pixel_values(images)).square().mean((1, 2, 3)).tolist()
    assert metrics["mse"] == pytest.approx(np.mean(mse), rel=1e-5)
    assert metrics["psnr"] == pytest.approx(np.mean([10 * math.log10(4 / one) for one in mse]), rel=1e-5)
    for d in range(vae.config.code_depth):
        _, counts = out.codes[..., d].unique(return_counts=True)
        shares = counts / counts.sum()
        assert metrics["usage"][d] == pytest.approx(len(counts) / vae.config.codebook_size)
        assert metrics["perplexity"][d] == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-5)


def test_the_grid_has_each_reconstruction_below_its_original(problem, tmp_path):
    vae = RQVAEModel.from_pretrained(problem / "vae")
    images = torch.randint(256, (10, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    train_rqvae.save_reconstructions(vae, images, tmp_path / "grid.png", Accelerator())
    grid = torch.from_numpy(np.array(Image.open(tmp_path / "grid.png"))).permute(2, 0, 1)
    assert grid.shape == (3, 4 * 16, 8 * 16)
    with torch.no_grad():
        expected = ((vae(to_pixel_values(images)).sample.clamp(-1, 1) + 1) * 127.5).round()
    for i in range(10):
        top, left = 32 * (i // 8), 16 * (i % 8)
        original, reconstruction = grid[:, top : top + 32, left : left + 16].split(16, dim=1)
        assert torch.equal(original, images[i])
        assert (reconstruction - expected[i]).abs().max() <= 1
    assert not grid[:, 32:, 2 * 16 :].any()


def test_the_whole_recipe_trains_a_vqgan(problem, vgg16, tmp_path):
    """All losses at once, by their defaults, on a model of D = 1; LPIPS falls on four images."""
    log = train(problem, tmp_path, vae=problem / "vqgan", lpips_weights=vgg16, discriminator_channels=4,
                train_split="train[:4]", train_batch_size=4, max_train_steps=12, learning_rate=3e-3,
                gradient_checkpointing=True, validation_split="none")  # fmt: skip
    for name in ("loss", "perceptual_loss", "adversarial_loss", "adversarial_weight", "discriminator_loss"):
        assert np.isfinite([entry[name] for entry in log[2:]]).all()
    first = log[0]
    assert first["loss"] == pytest.approx(
        first["reconstruction_loss"] + first["perceptual_loss"] + 0.25 * first["commitment_loss"], rel=1e-5
    )
    assert log[-1]["perceptual_loss"] < 0.9 * log[0]["perceptual_loss"]
    (half,) = train(problem, tmp_path / "half", lpips_weights=vgg16, perceptual_weight=0.5, adversarial_weight=0,
                    train_batch_size=4, max_train_steps=1, validation_split="none")  # fmt: skip
    assert half["loss"] == pytest.approx(
        half["reconstruction_loss"] + 0.5 * half["perceptual_loss"] + 0.25 * half["commitment_loss"], rel=1e-5
    )
    vae = RQVAEModel.from_pretrained(tmp_path)
    assert vae.config.code_depth == 1 and len(log[0]["usage"]) == 1


def test_gradient_checkpointing_changes_nothing(problem, tmp_path, monkeypatch):
    calls, enable = [], RQVAEModel.enable_gradient_checkpointing
    monkeypatch.setattr(RQVAEModel, "enable_gradient_checkpointing", lambda self: calls.append(enable(self)))
    flags = dict(train_batch_size=5, max_train_steps=1, checkpointing_steps=1, validation_split="none", **GAN)
    for name, switch in (("with", True), ("without", None)):
        train(problem, tmp_path / name, gradient_checkpointing=switch, **flags)
    assert distance(*(first_gradient(tmp_path / name) for name in ("with", "without"))) < 1e-6
    assert len(calls) == 1


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "flag, value",
    [
        ("dataset_name", None),
        ("vae", None),
        ("vae_config", "config.json"),
        ("train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("num_train_epochs", 0),
        ("max_train_steps", 0),
        ("max_train_seconds", 0),
        ("max_train_seconds", "nan"),
        ("logging_steps", 0),
        ("validation_steps", 0),
        ("validation_batch_size", 0),
        ("max_validation_images", 0),
        ("checkpointing_steps", -1),
        ("checkpoints_total_limit", 0),
        ("ema_decay", 1.0),
        ("perceptual_weight", -1.0),
        ("perceptual_weight", "nan"),
        ("adversarial_weight", "inf"),
        ("discriminator_channels", 0),
        ("discriminator_warmup_steps", -1),
        ("max_nonfinite_steps", 0),
        ("shuffle_buffer_size", 0),
        ("dataloader_num_workers", -1),
        ("filter_min", 1.0),
        ("filter_column", "score"),
    ],
)
def test_a_flag_out_of_range_is_refused_by_name(flag, value, problem):
    with pytest.raises(ValueError, match=f"--{flag}"):
        train_rqvae.parse_args(flags_of(problem, **{flag: value}))


@pytest.mark.parametrize("flag", ["streaming", "random_crop"])
def test_images_in_memory_are_neither_streamed_nor_cropped_anew(flag, problem):
    with pytest.raises(ValueError, match=f"--cache_images_in_memory must come without --{flag}"):
        train_rqvae.parse_args(flags_of(problem, cache_images_in_memory=True, **{flag: True}))


def test_a_stream_of_unknown_length_asks_for_the_number_of_steps(problem, tmp_path):
    with pytest.raises(ValueError, match="--max_train_steps must be given"):
        train(problem, tmp_path, data="wide", streaming=True, filter_column="score", filter_min=3, **PIXELS)


def test_codes_are_refused_where_images_are_needed(problem, tmp_path):
    datasets.Dataset.from_dict({"codes": [[0]] * 3}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="must hold images.*'codes'"):
        train(problem, tmp_path / "run", dataset_name=tmp_path, validation_split="none", **PIXELS)


@pytest.mark.parametrize(
    "flag, value, others",
    [
        ("image_column", "picture", PIXELS),
        ("resolution", 7, PIXELS),
        ("resolution", 8, {"perceptual_weight": 0}),
        ("resolution", 14, {"adversarial_weight": 0, "lpips_weights": "nowhere"}),
        ("resume_from_checkpoint", "nowhere", PIXELS),
        pytest.param(
            *("lpips_weights", "nowhere", {}),
            marks=pytest.mark.skipif(find_spec("lpips") is None, reason="needs lpips"),
        ),
    ],
)
def test_a_flag_that_does_not_fit_is_refused_by_name(flag, value, others, problem, tmp_path):
    with pytest.raises(ValueError, match=f"{flag}.*got.*{value}"):
        train(problem, tmp_path, **{**others, flag: value})
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_changed_recipe_does_not_resume(problem, tmp_path):
    flags = dict(train_batch_size=5, max_train_steps=1, checkpointing_steps=1, validation_split="none", **GAN)
    train(problem, tmp_path, **flags)
    assert "hub_token" not in (tmp_path / "checkpoint-1" / "progress.json").read_text()
    with pytest.raises(ValueError, match="--adversarial_weight was 0.75 and is 0.5"):
        train(problem, tmp_path, resume_from_checkpoint="latest", adversarial_weight=0.5, **flags)


def test_every_flag_is_explained_and_the_defaults_are_the_recipe_of_the_paper(problem, capsys):
    with pytest.raises(SystemExit):
        train_rqvae.parse_args(["--help"])
    assert capsys.readouterr().out.count("\n  --") > 50
    args = train_rqvae.parse_args(["--vae", "model", "--dataset_name", "data"])
    recipe = dict(reconstruction_loss="mse", perceptual_weight=1.0, adversarial_weight=0.75, max_adaptive_weight=1e4,
                  discriminator_channels=64, train_batch_size=32, learning_rate=4e-5, lr_scheduler="constant",
                  adam_beta1=0.5, adam_beta2=0.9, max_grad_norm=0.0, num_train_epochs=10, random_flip=False,
                  random_crop=False, streaming=False)  # fmt: skip
    assert recipe.items() <= vars(args).items()
    args.hub_token = "secret"
    assert "hub_token" not in tracked(args) and tracked(args)["train_batch_size"] == 32
