"""A training that is killed, or asked to stop, goes on to the very bits of the one that was left alone."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import kill_test
import pytest
import torch
from kill_test import (
    Trainer,
    differences,
    differing_tensors,
    flags_of,
    is_exporting,
    is_saving,
    make_problem,
    steps_logged,
    steps_saved,
)
from safetensors.torch import save_file

from rq_draft_revise.interruption import STOP_SIGNALS, StopSignal


ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 8, 2


def has_begun(output_dir: Path) -> bool:
    return steps_logged(output_dir) >= 1 and steps_saved(output_dir) == 0


def saves_the_first(output_dir: Path) -> bool:
    return is_saving(output_dir) and steps_saved(output_dir) == 0


def is_between_checkpoints(output_dir: Path) -> bool:
    return steps_logged(output_dir) > steps_saved(output_dir) >= EVERY


def saves_a_later_one(output_dir: Path) -> bool:
    return is_saving(output_dir) and steps_saved(output_dir) >= EVERY


MOMENTS = {  # in the order in which a run comes to them
    "before there is a checkpoint": has_begun,
    "while the first is being written": saves_the_first,
    "between two": is_between_checkpoints,
    "while a later one is being written": saves_a_later_one,
    "while the result is being written": is_exporting,
}


@pytest.fixture(scope="module")
def context():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
            patch.setenv(name, os.environ.get(name, ""))
        patch.setattr(sys, "path", [*sys.path])
        yield kill_test.prepare_processes(["train_rqvae", "train_imagenet"])


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        yield make_problem(folder / "problem")


@pytest.fixture(scope="module")
def run_whole(context, problem, tmp_path_factory):
    """Of a script and a number of processes, the folder of the run that nobody disturbs."""
    folders = {}

    def run(script: str, num_processes: int) -> Path:
        if (script, num_processes) not in folders:
            folder = tmp_path_factory.mktemp("whole") / "run"
            Trainer(context, script, flags_of(script, problem, folder, STEPS, EVERY), num_processes).finish()
            folders[script, num_processes] = folder
        return folders[script, num_processes]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("script, num_processes", [("train_rqvae", 1), ("train_imagenet", 1), ("train_rqvae", 2)])
def test_killed_at_five_moments_a_run_comes_to_the_same_bits(
    script, num_processes, context, problem, run_whole, tmp_path
):
    """One after the other in one run: each start resumes what the kill before it left."""
    whole, output_dir = run_whole(script, num_processes), tmp_path / "run"
    flags = flags_of(script, problem, output_dir, STEPS, EVERY)
    for moment, reached in MOMENTS.items():
        saved = steps_saved(output_dir)
        assert Trainer(context, script, flags, num_processes).kill_when(reached), f"never {moment}"
        assert reached(output_dir), f"not killed {moment}"
        assert steps_saved(output_dir) >= saved
    Trainer(context, script, flags, num_processes).finish()
    assert differences(whole, output_dir, STEPS) == []
    # The comparison sees what two steps change: weights, averages, moments, random states.
    changed = differing_tensors(whole / f"checkpoint-{STEPS - EVERY}", whole / f"checkpoint-{STEPS}")
    files = {"model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl"}
    files |= {f"random_states_{i}.pkl" for i in range(num_processes) if script == "train_imagenet"}  # it has dropout
    assert files <= {name.split(":")[0] for name in changed}


@pytest.mark.slow
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_asked_to_stop_a_run_saves_ends_well_and_goes_on_to_the_same_bits(
    number, context, problem, run_whole, tmp_path
):
    """One of two processes gets the signal; both stop at the same step, which is no multiple of the interval."""
    output_dir = tmp_path / "run"
    flags = flags_of("train_rqvae", problem, output_dir, STEPS, EVERY)
    flags[flags.index("--checkpointing_steps") + 1] = "1000"
    trainer = Trainer(context, "train_rqvae", flags, num_processes=2)

    def signalled(folder: Path) -> bool:
        if steps_logged(folder) >= 3 and not signals:
            signals.append(number)
            os.kill(trainer.processes[1].pid, number)
        return False

    signals = []
    assert not trainer.kill_when(signalled)  # it came to an end by itself, with exit code 0 in both processes
    stopped = steps_saved(output_dir)
    assert 3 <= stopped < STEPS and not is_exporting(output_dir)
    assert steps_logged(output_dir) == stopped
    Trainer(context, "train_rqvae", flags_of("train_rqvae", problem, output_dir, STEPS, EVERY), 2).finish()
    assert differences(run_whole("train_rqvae", 2), output_dir, STEPS) == []


# --------------------------------------------------------------------------------------------------------- the report


def test_every_finished_run_is_compared(monkeypatch, tmp_path):
    """Of three runs the second is another: it must be found, although the third is as it should be."""
    ends = iter([True, False, True, True, False, True])  # killed, or at its end; after the last kill one more start
    weights = iter([1.0, 1.0, 2.0, 1.0])  # the undisturbed run's, then those of the three

    class Scripted:
        def __init__(self, context, script, argv, num_processes):
            self.output_dir = Path(argv[argv.index("--output_dir") + 1])

        def kill_when(self, reached) -> bool:
            killed = next(ends)
            self.output_dir.mkdir(exist_ok=True)
            if not killed:
                self.finish()
            return killed

        def finish(self) -> None:
            self.output_dir.mkdir(exist_ok=True)
            save_file({"weight": torch.tensor([next(weights)])}, self.output_dir / "model.safetensors")
            (self.output_dir / "train_log.jsonl").write_text('{"step": 8}\n')

    monkeypatch.setattr(kill_test, "Trainer", Scripted)
    args = kill_test.parse_args(["--kills", "4", "--max_train_steps", "8", "--checkpointing_steps", "2"])
    row = kill_test.kill_repeatedly(None, "train_rqvae", tmp_path / "problem", tmp_path, args)
    assert row["kills_of_compared_runs"] == [1, 2, 1] and row["kills"] == 4
    assert row["differences"] == ["run 2: /model.safetensors: /weight"]
    assert "3 finished run(s) compared, of 1, 2, 1 kills: 1 DIFFERENCES" in kill_test.said_of(row)
    assert not (tmp_path / "killed").exists()


def test_a_process_that_dies_before_it_opens_its_output_is_told_by_its_exit_code(monkeypatch, tmp_path):
    monkeypatch.setattr(kill_test, "_train", lambda *arguments: os._exit(3))
    argv = ["--output_dir", str(tmp_path / "run")]
    for end in (Trainer.finish, lambda trainer: trainer.kill_when(lambda folder: False)):
        with pytest.raises(RuntimeError, match=r"exit codes \[3\]:\nNo process came so far as to open .*run.txt"):
            end(Trainer(multiprocessing.get_context("fork"), "train_rqvae", argv))


# ------------------------------------------------------------------------------------------------------ one process


def test_a_signal_is_a_question_inside_and_what_it_was_outside():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    for number in STOP_SIGNALS:
        with StopSignal(SimpleNamespace(num_processes=1, print=print)) as stop:
            assert not stop.requested()
            signal.raise_signal(number)
            assert stop.requested() and stop.requested()
            if number == signal.SIGINT:
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(number)
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    with contextlib.suppress(ZeroDivisionError), StopSignal(SimpleNamespace(num_processes=1)):
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


WORKERS = """
import os, signal, time, torch
from types import SimpleNamespace
from rq_draft_revise.interruption import StopSignal, ignore_stop_signals

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, i):
        time.sleep(0.01)
        return i

with StopSignal(SimpleNamespace(num_processes=1)) as stop:
    loader = torch.utils.data.DataLoader(Slow(), num_workers=1, worker_init_fn=ignore_stop_signals)
    seen = []
    for i in loader:
        seen.append(int(i))
        if len(seen) == 5:
            os.killpg(0, signal.SIGTERM)
    assert stop.requested() and seen == list(range(40)), seen
"""


@pytest.mark.slow
def test_a_signal_to_the_whole_job_does_not_kill_its_data_loaders():
    """Clusters signal every process; a worker that dies raises an exception in the trainer, wherever that is."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", WORKERS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
    )
    assert result.returncode == 0, result.stderr
