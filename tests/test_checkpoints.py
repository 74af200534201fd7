"""Checkpoints: whatever happens while one is written or to one that is there, the last good one is not lost."""

import contextlib
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers.training_utils import EMAModel
from kill_test import free_port, prepare_processes

from rq_draft_revise import checkpoints, training_log
from rq_draft_revise.checkpoints import (
    checkpoints_in,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from rq_draft_revise.training_log import LogWindow


ARGUMENTS = {"learning_rate": 1e-3, "data_files": ["a.parquet"], "output_dir": Path("runs/one"), "max_train_steps": 9}


@pytest.fixture(autouse=True)
def one_process_on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with torch.random.fork_rng(devices=[]):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Run:
    """A training of one layer on noise, with everything that a checkpoint has to hold."""

    def __init__(self, width: int = 8, **accelerator):
        torch.manual_seed(0)
        self.accelerator = Accelerator(**accelerator)
        model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Dropout(0.5))
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        self.ema = EMAModel(model.parameters(), decay=0.9)
        self.accelerator.register_for_checkpointing(self.ema)
        self.step, self.width = 0, width

    def train(self, steps: int) -> "Run":
        for _ in range(steps):
            loss = self.model(torch.randn(4, self.width)).square().mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.step(self.model.parameters())
            self.step += 1
        return self

    def save(self, folder: Path, **options) -> "Run":
        save_checkpoint(self.accelerator, folder, {"step": self.step, "images": 4 * self.step}, ARGUMENTS, **options)
        return self

    def load(self, folder: Path, resume_from_checkpoint="latest", arguments=ARGUMENTS) -> dict | None:
        progress = load_checkpoint(self.accelerator, folder, resume_from_checkpoint, arguments)
        self.step = progress["step"] if progress else 0
        return progress

    def state(self) -> list[torch.Tensor]:
        moments = [value for state in self.optimizer.state_dict()["state"].values() for value in state.values()]
        weights = [*self.model.parameters(), *self.ema.shadow_params]
        return [tensor.detach().clone() for tensor in (*weights, *moments, torch.get_rng_state())]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -------------------------------------------------------------------------------------------------- what it holds


def test_a_run_goes_on_from_a_checkpoint_as_if_nothing_had_been(tmp_path):
    run = Run().train(2).save(tmp_path)
    saved = run.state()
    expected = run.train(3).state()
    assert not equal(saved, expected)
    assert run.load(tmp_path) == {"step": 2, "images": 8}
    assert equal(run.state(), saved)
    assert equal(run.train(3).state(), expected)


def test_a_checkpoint_says_what_made_it_but_no_secret(tmp_path):
    run = Run()
    save_checkpoint(run.accelerator, tmp_path, {"step": 0}, {**ARGUMENTS, "hub_token": "secret"})
    record = json.loads((tmp_path / "checkpoint-0" / "progress.json").read_text())
    assert record["arguments"] == {**ARGUMENTS, "output_dir": "runs/one"}
    assert record["launch"] == {"num_processes": 1, "distributed_type": "NO", "mixed_precision": "no"}
    assert record["versions"]["torch"] == torch.__version__
    assert record["git_revision"] is None or len(record["git_revision"].removesuffix("-dirty")) == 40


def test_another_version_of_a_library_is_said_and_goes_on(tmp_path, monkeypatch, capsys):
    run = Run().save(tmp_path)
    run.load(tmp_path)
    assert "Note" not in capsys.readouterr().out
    monkeypatch.setattr(checkpoints, "library_versions", lambda: {"torch": "99.0"})
    run.load(tmp_path)
    assert f"torch was {torch.__version__}" in capsys.readouterr().out


def test_without_a_checkpoint_latest_is_none(tmp_path):
    assert Run().load(tmp_path / "nowhere") is None


# -------------------------------------------------------------------------------------------------------- damage


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncated, emptied, altered, Path.unlink])
def test_damage_to_any_file_is_refused_by_its_name_and_changes_nothing(damage, tmp_path):
    run = Run().train(1).save(tmp_path).train(1).save(tmp_path)
    whole = tmp_path / "whole"
    (tmp_path / "checkpoint-2").rename(whole)
    files = [path.name for path in whole.iterdir()]
    assert len(files) == 6
    for name in files:
        newest = tmp_path / "checkpoint-2"
        shutil.copytree(whole, newest, dirs_exist_ok=True)
        if name == "manifest.json" and damage is altered:
            continue  # that may be JSON still
        damage(newest / name)
        before = run.state()
        # "latest" does not pass over what is damaged, but names what is not.
        for chosen in ("latest", newest):
            with pytest.raises(ValueError, match=name) as error:
                run.load(tmp_path, chosen)
            assert "checkpoint-2" in str(error.value)
            assert ("checkpoint-1" in str(error.value)) == (chosen == "latest")
        assert equal(run.state(), before)
        shutil.rmtree(newest)
    assert run.load(tmp_path)["step"] == 1


@pytest.mark.parametrize("manifest", ["", "null", "[]", "{}", '{"sequence": 1, "files": []}', '{"sequence": "x"}'])
def test_what_is_no_manifest_is_refused(manifest, tmp_path):
    run = Run().save(tmp_path)
    (tmp_path / "checkpoint-0" / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match="checkpoint-0/manifest.json"):
        run.load(tmp_path)


@pytest.mark.parametrize("folder", ["nowhere", "a-file", "empty", "checkpoint-3.partial"])
def test_a_folder_that_is_no_checkpoint_is_refused_by_name(folder, tmp_path):
    run = Run().save(tmp_path)
    (tmp_path / "a-file").write_text("")
    (tmp_path / "empty").mkdir()
    shutil.copytree(tmp_path / "checkpoint-0", tmp_path / "checkpoint-3.partial")
    with pytest.raises(ValueError, match=f"checkpoint.*{folder}|{folder}.*checkpoint"):
        run.load(tmp_path, tmp_path / folder)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    Run(width=4).save(tmp_path)
    with pytest.raises(ValueError, match="checkpoint-0 does not fit this run"):
        Run(width=8).load(tmp_path)


def test_nothing_is_unpickled_that_could_run_code(tmp_path):
    class Registered:
        def state_dict(self):
            return {"path": Path("a")}  # needs more than numbers, texts and containers of them

        def load_state_dict(self, state):
            raise AssertionError("it was unpickled")

    run = Run()
    run.accelerator.register_for_checkpointing(Registered())
    run.save(tmp_path)
    with pytest.raises(ValueError, match="checkpoint-0 does not fit.*UnpicklingError"):
        run.load(tmp_path)


def test_random_states_that_cannot_be_restored_are_not_passed_over(tmp_path, monkeypatch):
    """accelerate logs a line that nobody sees, and goes on with other random numbers."""
    run = Run().train(1).save(tmp_path)
    run.train(1)
    monkeypatch.setattr("accelerate.checkpointing.random.setstate", lambda state: 1 / 0)
    with pytest.raises(ValueError, match="random states could not be restored"):
        run.load(tmp_path)


# --------------------------------------------------------------------------------------------- while it is written


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.1, 2.0])
@pytest.mark.parametrize("total_limit", [None, 1])
def test_a_file_that_cannot_be_written_costs_no_checkpoint(share, total_limit, tmp_path):
    """A limit on the size of files, as a share of the weights': the kernel refuses to write beyond it."""
    run = Run(width=64).train(1).save(tmp_path)
    before, weights = contents(tmp_path), (tmp_path / "checkpoint-1" / "model.safetensors").stat().st_size
    run.train(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * weights), limits[1]))
    try:
        with pytest.raises(OSError, match="checkpoint-2 could not be written.*GB are free.*checkpoint-1 is untouched"):
            run.save(tmp_path, total_limit=total_limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before and names_in(tmp_path) == ["checkpoint-1"]
    run.save(tmp_path, total_limit=total_limit)
    assert Run(width=64).load(tmp_path)["step"] == 2


def disk_is_full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_where_the_last_rename_fails_the_checkpoint_of_that_name_is_still_there(tmp_path, monkeypatch):
    run = Run().train(1).save(tmp_path)
    before, rename = contents(tmp_path), Path.rename

    def refused(path, target):
        return disk_is_full() if path.name.endswith(".partial") else rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="checkpoint-1 could not be written"):
        patch.setattr("pathlib.Path.rename", refused)
        run.save(tmp_path)
    assert contents(tmp_path) == before and names_in(tmp_path) == ["checkpoint-1"]


class Killed(BaseException):
    """Leaves at once, as SIGKILL does: nothing of ours may catch it to tidy up."""


def kill_at_call(count: int, monkeypatch) -> list[int]:
    """Raise in place of the `count`-th operation on the disk that puts, renames or removes something."""
    calls = [0]

    def dying(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] >= count:  # and whatever is tried afterwards
                raise Killed
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr("pathlib.Path.rename", dying(Path.rename))
    monkeypatch.setattr("pathlib.Path.open", dying(Path.open))
    monkeypatch.setattr("os.fsync", dying(lambda descriptor: None))
    monkeypatch.setattr("os.unlink", dying(checkpoints.os.unlink))
    monkeypatch.setattr("os.rmdir", dying(checkpoints.os.rmdir))
    monkeypatch.setattr("torch.save", dying(torch.save))
    return calls


@pytest.mark.parametrize("total_limit", [None, 1])
@pytest.mark.parametrize("again", [False, True])
def test_killed_at_any_operation_of_a_save_the_last_checkpoint_is_there(again, total_limit, tmp_path, monkeypatch):
    """Also where a step is written a second time, over a checkpoint of the same name."""
    run = Run().train(1).save(tmp_path / "origin").train(1).save(tmp_path / "origin")
    old = run.state()
    run.train(0 if again else 1)
    run.ema.shadow_params[0] += 1  # so that the second writing of a step can be told from the first
    new = run.state()
    outcomes = []
    for count in range(1, 1000):
        folder = tmp_path / f"{count}"
        shutil.copytree(tmp_path / "origin", folder)
        with monkeypatch.context() as patch:
            calls = kill_at_call(count, patch)
            with contextlib.suppress(Killed):
                run.save(folder, total_limit=total_limit)
        finished = calls[0] < count
        run.load(folder)
        outcomes.append("new" if equal(run.state(), new) else "old" if equal(run.state(), old) else "neither")
        assert outcomes[-1] != "neither", f"killed at operation {count}: {names_in(folder)}"
        if finished:
            break
        run.save(folder, total_limit=1)  # the next one clears away what was left
        assert names_in(folder) == [f"checkpoint-{run.step}"]
        run.load(folder)
        run.load(folder := tmp_path / "origin", arguments=None)
        run.train(0 if again else 1)
        run.ema.shadow_params[0] += 1
    assert finished and "old" in outcomes
    assert outcomes == sorted(outcomes, reverse=True)  # all the old ones come before all the new ones
    assert "new" in outcomes[:-1], "the new one counts before all the tidying up is done"


# ---------------------------------------------------------------------------------------------- which one is the last


def test_what_was_written_last_is_the_latest_and_is_never_what_is_deleted(tmp_path):
    """A run that went back to an older checkpoint has newer ones of larger steps lying about."""
    run = Run()
    for _ in range(3):
        run.train(1).save(tmp_path)
    run.load(tmp_path, tmp_path / "checkpoint-1")
    run.save(tmp_path / "copy", total_limit=1)
    run.train(1).save(tmp_path, total_limit=2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-3", "checkpoint-2"]
    state = run.state()
    assert run.load(tmp_path)["step"] == 2 and equal(run.state(), state)


def test_old_checkpoints_go_and_a_damaged_one_does_not_count_for_a_good_one(tmp_path):
    run = Run()
    for _ in range(3):
        run.train(1).save(tmp_path, total_limit=2)
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    emptied(tmp_path / "checkpoint-3" / "manifest.json")
    run.train(1).save(tmp_path, total_limit=1)
    assert names_in(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    verify_checkpoint(tmp_path / "checkpoint-4")


# ------------------------------------------------------------------------------------------- the same run goes on


def test_a_change_of_what_decides_the_weights_is_refused_by_name_with_both_values(tmp_path):
    run = Run().train(1).save(tmp_path)
    before = run.train(1).state()
    changed = {**ARGUMENTS, "learning_rate": 0.5, "data_files": ("b.parquet",), "output_dir": "elsewhere"}
    with pytest.raises(ValueError) as error:
        run.load(tmp_path, arguments=changed)
    message = str(error.value)
    assert "--learning_rate was 0.001 and is 0.5" in message
    assert "--data_files was ['a.parquet'] and is ['b.parquet']" in message
    assert "--output_dir was" not in message and "--max_train_steps was" not in message
    assert equal(run.state(), before)
    assert run.load(tmp_path, arguments=None)["step"] == 1


def test_every_change_but_the_listed_ones_is_refused(tmp_path):
    arguments = {name: 1 for name in (*checkpoints.CHANGEABLE, "seed", "max_train_steps")}
    run = Run()
    save_checkpoint(run.accelerator, tmp_path, {"step": 0}, arguments)
    for name in arguments:
        changed = {**arguments, name: 2}
        if name in checkpoints.CHANGEABLE:
            assert run.load(tmp_path, arguments=changed)["step"] == 0
        else:
            with pytest.raises(ValueError, match=f"--{name} was 1 and is 2"):
                run.load(tmp_path, arguments=changed)
    # A flag that only one of them knows came or went with a version of the script.
    assert run.load(tmp_path, arguments={**arguments, "new_flag": 1})["step"] == 0


def test_other_data_are_refused_and_what_one_of_both_does_not_know_is_let_pass(tmp_path):
    run, data = Run(), {"num_images": 22, "max_train_steps": 9, "data_digest": "ab"}
    save_checkpoint(run.accelerator, tmp_path / "new", {"step": 0}, ARGUMENTS, data=data)
    save_checkpoint(run.accelerator, tmp_path / "old", {"step": 0}, ARGUMENTS)
    path = tmp_path / "old" / "checkpoint-0" / "progress.json"
    assert json.loads(path.read_text()).pop("data") == {}

    def load(folder, **changed):
        return load_checkpoint(run.accelerator, tmp_path / folder, "latest", ARGUMENTS, {**data, **changed})

    assert load("new") == load("new", num_images=None, data_digest=None) == {"step": 0}
    assert load("old") == {"step": 0}  # as written before there was an entry
    for name, value in (("num_images", 30), ("max_train_steps", 12), ("data_digest", "cd")):
        with pytest.raises(ValueError, match=f"[^-]{name} was {data[name]!r} and is {value!r}"):
            load("new", **{name: value})


def test_a_window_of_the_log_goes_on_where_it_was(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(training_log.time, "monotonic", lambda: clock[0])
    accelerator = Accelerator()
    values = [torch.rand(2, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    whole = LogWindow(accelerator)
    for i, value in enumerate(values):
        clock[0] += 2
        whole.images += 4
        whole.add({"loss": value[0], "usage": value, **({"late": value[1]} if i > 3 else {})})
        with whole.paused():
            clock[0] += 50
            if i == 2:
                state = json.loads(json.dumps(whole.state()))
    expected, images, seconds = whole.means(), whole.images, whole.seconds()
    clock[0] = 0.0  # of another machine
    resumed = LogWindow(accelerator, state)
    for i, value in enumerate(values[3:], 3):
        clock[0] += 2
        resumed.images += 4
        resumed.add({"loss": value[0], "usage": value, **({"late": value[1]} if i > 3 else {})})
    assert resumed.means() == expected and resumed.images == images == 20
    assert resumed.seconds() == seconds == 10
    assert expected["late"] == values[4][1].item() and len(expected["usage"]) == 2
    whole.clear()
    assert whole.means() == {} and whole.images == 0


def test_another_precision_is_refused(tmp_path):
    Run(mixed_precision="no").save(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="mixed_precision was 'no' and is 'bf16'"):
        Run(mixed_precision="bf16").load(tmp_path)


# ---------------------------------------------------------------------------------------------------- two processes


def two_processes(rank: int, port: int, folder: str) -> None:
    """What every process of two must see alike; what they see is written to `folder/<rank>.json`."""
    os.environ |= {"ACCELERATE_USE_CPU": "true", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    run, output_dir, seen = Run(), Path(folder) / "run", []
    torch.manual_seed(rank)
    run.train(1).save(output_dir)
    state = run.state()
    run.train(1)
    for failing, place in ((1, "save_state"), (0, "save_state"), (0, "_seal")):
        with pytest.MonkeyPatch.context() as patch:
            if rank == failing:
                patch.setattr(run.accelerator if place == "save_state" else checkpoints, place, disk_is_full)
            with pytest.raises(OSError) as error:
                run.save(output_dir, total_limit=1)
        seen.append([str(error.value).split("free on that disk")[1], names_in(output_dir)])
    run.load(output_dir)
    seen.append([equal(run.state(), state), names_in(output_dir)])
    run.train(1)
    run.accelerator.wait_for_everyone()
    if rank == 0:
        altered(output_dir / "checkpoint-1" / "random_states_1.pkl")
    with pytest.raises(ValueError) as error:  # compared by one process, known to both
        run.load(output_dir)
    seen.append(str(error.value))
    if rank == 0:
        altered(output_dir / "checkpoint-1" / "random_states_1.pkl")  # back
    run.accelerator.wait_for_everyone()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seen))


@pytest.mark.slow
def test_what_fails_in_one_process_fails_in_both_and_nobody_waits(tmp_path, monkeypatch):
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    context = prepare_processes(["test_checkpoints"])
    port = free_port()
    processes = [context.Process(target=two_processes, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    *failures, (restored, _), damage = first
    for (message, names), failing in zip(failures, (1, 0, 0)):
        assert f"process {failing}: OSError: [Errno 28] No space left" in message
        assert names == ["checkpoint-1"]
    assert restored is True and "random_states_1.pkl have changed" in damage
    with pytest.raises(ValueError, match="num_processes was 2 and is 1"):
        Run().load(tmp_path / "run")
