"""Steps that are not finite are left out by all processes or by none, and too many of them end the run."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train_imagenet
import train_rqvae
from accelerate import Accelerator, tracking
from accelerate.state import AcceleratorState
from kill_test import differing_tensors, flags_of, make_problem

from rq_draft_revise import training_run
from rq_draft_revise.divergence import NonFiniteGuard


FINITE, NAN, INFINITE = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))


def run_of_one(scaler=None):
    return SimpleNamespace(num_processes=1, device=torch.device("cpu"), scaler=scaler)


def run_of_two(others: torch.Tensor):
    """The second process always reports `others`: two numbers, whether its loss and its gradient are not finite."""
    accelerator = run_of_one()
    accelerator.num_processes = 2
    accelerator.reduce = lambda tensor, reduction: {"sum": tensor + others[: len(tensor)].to(tensor.dtype)}[reduction]
    return accelerator


@pytest.mark.parametrize("bad", [NAN, INFINITE, -INFINITE])
def test_a_step_is_taken_if_and_only_if_loss_and_gradient_are_finite(bad):
    guard = NonFiniteGuard(run_of_one(), max_in_row=100)
    for loss in (FINITE, bad):
        assert guard.accepts(loss, None) == (loss is FINITE)
        for grad_norm in (FINITE, bad):
            assert guard.accepts(loss, grad_norm) == (loss is FINITE and grad_norm is FINITE)
    assert guard.num_skipped == 1 + 3


def test_what_one_process_sees_holds_for_all():
    assert NonFiniteGuard(run_of_two(torch.tensor([0, 0])), 5).accepts(FINITE, FINITE)
    assert not NonFiniteGuard(run_of_two(torch.tensor([1, 0])), 5).accepts(FINITE, None)
    assert not NonFiniteGuard(run_of_two(torch.tensor([0, 1])), 5).accepts(FINITE, FINITE)
    assert not NonFiniteGuard(run_of_two(torch.tensor([0, 0])), 5).accepts(NAN, FINITE)


def test_only_steps_in_a_row_end_the_run_with_advice():
    guard = NonFiniteGuard(run_of_one(), max_in_row=3)
    for _ in range(10):
        assert not guard.accepts(NAN, FINITE) and not guard.accepts(FINITE, NAN)
        assert guard.accepts(FINITE, FINITE)
    assert not guard.accepts(NAN, FINITE) and not guard.accepts(NAN, FINITE)
    with pytest.raises(
        RuntimeError, match="loss and the gradient's norm.*3 .*--learning_rate.*--mixed_precision.*data"
    ):
        guard.accepts(NAN, NAN)
    assert guard.num_skipped == 23


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="`max_in_row`.*got 0"):
        NonFiniteGuard(run_of_one(), 0)


def scaled_step(guard, scaler, weight, optimizer, gradient: float) -> bool:
    """A step of float16 training whose gradient is `gradient`, as far as float16 can hold it times the scale."""
    scaler.scale(torch.ones(()))  # sets the scaler up
    weight.grad = (torch.tensor([gradient]) * scaler.get_scale()).half().float()
    scaler.unscale_(optimizer)
    accepted = guard.accepts(FINITE, weight.grad.norm())
    if accepted:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
    return accepted


def test_float16_may_search_its_scale_but_not_for_ever():
    """The scale falls from 65,536 by halves until the gradient fits into float16, whose largest number is 65,504."""
    scaler = torch.amp.GradScaler("cpu")
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard = NonFiniteGuard(run_of_one(scaler), max_in_row=2)
    accepted = [scaled_step(guard, scaler, weight, optimizer, 1000.0) for _ in range(20)]
    assert accepted == [False] * 10 + [True] * 10  # 65,536 / 2^10 * 1000 = 64,000
    assert weight.item() == -10_000 and guard.num_skipped == 10

    with pytest.raises(RuntimeError, match="2 optimizer steps"):  # a gradient that no scale makes finite
        for _ in range(20):
            assert not scaled_step(guard, scaler, weight, optimizer, float("inf"))
    assert scaler.get_scale() <= 1 and guard.num_skipped < 10 + 10
    assert weight.item() == -10_000


# ----------------------------------------------------------------------------- float16, with the trainers' own step


class HalfPrecision(Accelerator):
    """As accelerate is on a GPU with fp16: autocast and a loss scaler. On the CPU it has neither of itself."""

    def __init__(self, **arguments):
        super().__init__(**{**arguments, "mixed_precision": "fp16"})
        self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=self.init_scale)

    init_scale = 65_536.0


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> Path:
    return make_problem(tmp_path_factory.mktemp("divergence") / "problem")


def train(script: str, problem: Path, output_dir: Path, **flags) -> list[dict]:
    """Six steps and the log of them, without the clock."""
    module = {"train_rqvae": train_rqvae, "train_imagenet": train_imagenet}[script]
    argv = flags_of(script, problem, output_dir, max_train_steps=6, checkpointing_steps=3)
    argv += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    module.main(module.parse_args(argv))
    AcceleratorState._reset_state(reset_partial_state=True)
    return read_log(output_dir)


def read_log(output_dir: Path) -> list[dict]:
    lines = (output_dir / "train_log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if not k.startswith(("seconds", "images_per"))} for x in lines]


@pytest.mark.slow
@pytest.mark.usefixtures("one_process_on_the_cpu", "no_trace")
@pytest.mark.parametrize("script", ["train_rqvae", "train_imagenet"])
def test_float16_trains_as_float32_does_and_resumes_with_its_scale(script, problem, tmp_path, monkeypatch):
    """Both networks of the GAN, dropout, micro-batches. Losses within 2 %: float16 has 11 bits, six steps amplify."""
    expected = train(script, problem, tmp_path / "float32")
    monkeypatch.setattr(training_run, "Accelerator", HalfPrecision)
    monkeypatch.setattr(HalfPrecision, "init_scale", 256.0)
    actual = train(script, problem, tmp_path / "float16", mixed_precision="fp16")
    assert [entry.get("skipped_steps", 0) for entry in actual] == [0] * len(expected)
    losses = [[entry["loss"] for entry in log if entry["kind"] == "train"] for log in (expected, actual)]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)

    shutil.copytree(tmp_path / "float16" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    monkeypatch.setattr(HalfPrecision, "init_scale", 65_536.0)  # the checkpoint's counts
    resumed = train(script, problem, tmp_path / "resumed", mixed_precision="fp16")
    assert resumed == [entry for entry in actual if entry["step"] > 3]
    assert differing_tensors(*(tmp_path / run / "checkpoint-6" for run in ("float16", "resumed"))) == []


@pytest.mark.slow
@pytest.mark.usefixtures("one_process_on_the_cpu", "no_trace")
@pytest.mark.parametrize("script", ["train_rqvae", "train_imagenet"])
def test_float16_that_finds_its_scale_leaves_those_steps_out_and_no_others(script, problem, tmp_path, monkeypatch):
    """From 2^40 every gradient overflows; each step left out halves the scale, of both networks together."""
    monkeypatch.setattr(training_run, "Accelerator", HalfPrecision)
    monkeypatch.setattr(HalfPrecision, "init_scale", 2.0**40)
    scalers = []
    monkeypatch.setattr(NonFiniteGuard, "accepts", recorded(NonFiniteGuard.accepts, scalers))
    with pytest.raises(RuntimeError, match="Nothing is exported: of 6 steps 0 were finite"):
        train(script, problem, tmp_path, mixed_precision="fp16", max_nonfinite_steps=1)
    log = [entry for entry in read_log(tmp_path) if entry["kind"] == "train"]
    assert [entry["skipped_steps"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert scalers == [2.0 ** (39 - step) for step in range(6)]


@pytest.mark.usefixtures("one_process_on_the_cpu", "no_trace")
@pytest.mark.parametrize("script", ["train_rqvae", "train_imagenet"])
def test_what_accelerate_would_pass_over_is_refused(script, problem, tmp_path, monkeypatch):
    """Float16 on a CPU, which would be float32, and a tracker that is not there."""
    with pytest.raises(ValueError, match="--mixed_precision must be 'no' or 'bf16' on a CPU"):
        train(script, problem, tmp_path, mixed_precision="fp16")
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="--report_to.*installed, got 'wandb'"):
        train(script, problem, tmp_path, report_to="wandb")


def recorded(accepts, scales: list[float]):
    def accepts_and_records(guard, *arguments):
        accepted = accepts(guard, *arguments)
        scales.append(guard._accelerator.scaler.get_scale())
        return accepted

    return accepts_and_records
