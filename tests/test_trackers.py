"""`--report_to`: the numbers of the log and the grids arrive in the tracker, of both stages."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import train_imagenet
import train_rqvae
from accelerate import tracking
from kill_test import make_problem
from PIL import Image


pytestmark = pytest.mark.usefixtures("one_process_on_the_cpu", "no_trace")

GRIDS = {"train_rqvae": "reconstructions", "train_imagenet": "samples"}
PROJECTS = {"train_rqvae": "rqvae", "train_imagenet": "train_imagenet"}


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> Path:
    return make_problem(tmp_path_factory.mktemp("trackers") / "problem")


def train(script: str, problem: Path, output_dir: Path, tracker: str) -> None:
    """Two steps, a validation with its grid after each."""
    flags = dict(dataset_name=problem / "data", output_dir=output_dir, mixed_precision="no", train_batch_size=4,
                 max_train_steps=2, logging_steps=1, validation_steps=1, report_to=tracker)  # fmt: skip
    if script == "train_rqvae":
        flags |= dict(vae=problem / "class" / "vae", resolution=8, perceptual_weight=0, adversarial_weight=0)
    else:
        flags |= dict(pretrained_model_name_or_path=problem / "class", num_validation_images=2)
    module = {"train_rqvae": train_rqvae, "train_imagenet": train_imagenet}[script]
    module.main(module.parse_args([text for name, value in flags.items() for text in (f"--{name}", str(value))]))


def expected_scalars(output_dir: Path) -> dict[tuple[str, int], float]:
    """Of the log, by tag and step: training and validation of one step have names of their own."""
    scalars = {}
    for line in (output_dir / "train_log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        tag = "/".join(entry[name] for name in ("kind", "split") if name in entry)
        for name, value in entry.items():
            if name in ("kind", "split", "step"):
                continue
            for suffix, number in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if number is not None:
                    key = f"{tag}/{name}" if suffix is None else f"{tag}/{name}/{suffix}"
                    scalars[key, entry["step"]] = number
    assert {"train", "validation"} == {tag.split("/")[0] for tag, _ in scalars} and len(scalars) > 20
    return scalars


def grid_of(output_dir: Path, script: str, step: int) -> np.ndarray:
    """As written into the folder, `(H, W, 3)` uint8."""
    with Image.open(output_dir / f"{GRIDS[script]}-{step:07d}.png") as picture:
        return np.asarray(picture)


@pytest.mark.parametrize("script", GRIDS)
def test_tensorboard_has_the_numbers_and_the_grids(script, problem, tmp_path):
    """Read back from its files. Its scalars are float32."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard"
    )
    train(script, problem, tmp_path, "tensorboard")
    (folder,) = {path.parent for path in (tmp_path / PROJECTS[script]).glob("events*")}
    events = accumulator.EventAccumulator(str(folder)).Reload()
    found = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    assert found == {key: pytest.approx(value, rel=1e-6) for key, value in expected_scalars(tmp_path).items()}
    images = events.Images(GRIDS[script])
    assert [image.step for image in images] == [1, 2]
    for image in images:
        height, width, _ = grid_of(tmp_path, script, image.step).shape
        assert (image.height, image.width) == (height, width)


class Picture:
    """`wandb.Image` and `trackio.Image`, as far as they are called here."""

    def __init__(self, value):
        self.value = np.asarray(value)


def stand_in(calls: list, settings: dict) -> SimpleNamespace:
    """A module with what accelerate's trackers of wandb and trackio call of it; both are too large for the tests.

    With the packages themselves (0.31 offline, 0.43) both stages ran too: the scalars and PNGs were in their files.
    """
    run = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished")
    )
    return SimpleNamespace(
        Image=Picture,
        init=lambda project: settings.update(project=project) or run,
        config=SimpleNamespace(update=lambda values, allow_val_change: settings.update(values)),
    )


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
@pytest.mark.parametrize("script", GRIDS)
def test_wandb_and_trackio_get_the_numbers_the_grids_and_the_flags(script, tracker, problem, tmp_path, monkeypatch):
    calls, settings = [], {}
    monkeypatch.setitem(sys.modules, tracker, stand_in(calls, settings))
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType(tracker)])
    train(script, problem, tmp_path, tracker)
    assert calls.pop() == "finished" and settings["project"] == PROJECTS[script]
    assert settings["train_batch_size"] == 4 and "hub_token" not in settings
    assert [step for step, _ in calls] == sorted(step for step, _ in calls)  # wandb drops what comes too late
    found = {(tag, step): value for step, values in calls for tag, value in values.items()}
    grids = {step: found.pop((GRIDS[script], step)) for step in (1, 2)}
    assert found == expected_scalars(tmp_path)
    for step, grid in grids.items():
        (picture,) = grid if isinstance(grid, list) else [grid]
        assert np.array_equal(picture.value, grid_of(tmp_path, script, step))
