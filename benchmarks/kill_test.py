"""Kill a training again and again, resume it each time, and compare it with the run that nobody interrupted.

    python benchmarks/kill_test.py --kills 20
    python benchmarks/kill_test.py --kills 20 --scripts train_imagenet --num_processes 2

The scripts are the real ones, on a tiny model and 22 images, and SIGKILL is the real one: nothing in a trainer knows
of this test. Every other kill waits until a checkpoint is being written, which the folder tells; the others come at
random times. A run that comes to its end with kills left is followed by another. What must be equal to the last bit,
in each that is finished: the exported weights; of the last checkpoint weights, averaged weights, optimizer and random
states; and the log, but for what the clock has a part in.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [str(ROOT / name) for name in ("src", "examples", "tests")]
SCRIPTS = ("train_rqvae", "train_imagenet", "train_cc3m", "train_lora")
NUM_IMAGES = 22  # no multiple of the batch: epochs end in the middle of one
POLL = 0.001  # seconds between two looks at a folder


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="Of each script.")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--max_train_steps", type=int, default=60)
    parser.add_argument("--checkpointing_steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="Of the times of the kills.")
    parser.add_argument("--output", help="JSON file for the result.")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------- the problem


def make_problem(folder: Path) -> Path:
    """`data`: images of 8×8 pixels with labels and captions; `class` and `text`: pipelines with dropout."""
    import datasets
    import numpy as np
    from components import NUM_CLASSES, tiny_pipeline
    from PIL import Image

    (folder / "data").mkdir(parents=True)
    generator = np.random.default_rng(0)
    captions = ["a cat at dusk", "an owl in the snow", "the volcano", "rocket at night in the snow"]
    columns = {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=[f"class {i}" for i in range(NUM_CLASSES)]),
    }
    for split, count in (("train", NUM_IMAGES), ("test", 4)):
        colors = generator.integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
        rows = {
            "image": [Image.fromarray(c.repeat(4, axis=0).repeat(4, axis=1)) for c in colors],
            "text": [captions[i % len(captions)] for i in range(count)],
            "label": [i % NUM_CLASSES for i in range(count)],
        }
        dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(columns))
        dataset.to_parquet(folder / "data" / f"{split}-00000.parquet")
    for condition in ("class", "text"):
        tiny_pipeline(condition, dropout=0.1).save_pretrained(folder / condition)
    return folder


def flags_of(
    script: str, problem: Path, output_dir: Path, max_train_steps: int, checkpointing_steps: int
) -> list[str]:
    """A command line that has everything a checkpoint must hold: dropout, averaged weights, both networks of a GAN."""
    flags = {
        "dataset_name": problem / "data",
        "output_dir": output_dir,
        "mixed_precision": "no",
        "train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_train_steps": max_train_steps,
        "checkpointing_steps": checkpointing_steps,
        "checkpoints_total_limit": 2,
        "validation_split": "test",
        "validation_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 2,
        "ema_decay": 0.9,
        "resume_from_checkpoint": "latest",
    }
    if script == "train_rqvae":
        flags |= {
            "vae": problem / "class" / "vae",
            "resolution": 16,  # the least that the discriminator takes is 12
            "lr_scheduler": "cosine",
            "perceptual_weight": 0,
            "adversarial_weight": 0.75,
            "discriminator_channels": 8,
            "discriminator_warmup_steps": 2,
        }
    elif script == "train_lora":
        del flags["validation_split"]  # it has none
        flags |= {
            "pretrained_model_name_or_path": problem / "text",
            "validation_prompt": "a cat at dusk",
            "lora_dropout": 0.1,
        }
    else:
        flags |= {
            "pretrained_model_name_or_path": problem / ("class" if script == "train_imagenet" else "text"),
            "num_validation_images": 2,
        }
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


# --------------------------------------------------------------------------------------------------------- processes


def prepare_processes(scripts: list[str]) -> multiprocessing.context.BaseContext:
    """Processes fork from a server that has imported the scripts and done nothing else: importing takes longest."""
    os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")])
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:0] = [folder for folder in FOLDERS if folder not in sys.path]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(scripts)
    return context


def _train(script: str, argv: list[str], rank: int, num_processes: int, port: int, output: str) -> None:
    """In a process of its own: what `python examples/<script>.py`, or torchrun with several, does."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if num_processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    module = importlib.import_module(script)
    module.main(module.parse_args(argv))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Trainer:
    """One start of a script in one or several processes, whose output goes to `<output_dir>.txt`."""

    def __init__(self, context, script: str, argv: list[str], num_processes: int = 1):
        self.output_dir = Path(argv[argv.index("--output_dir") + 1])
        self.output = self.output_dir.with_name(self.output_dir.name + ".txt")
        port = free_port()
        self.processes = [
            context.Process(target=_train, args=(script, argv, rank, num_processes, port, str(self.output)))
            for rank in range(num_processes)
        ]
        for process in self.processes:
            process.start()

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.exitcode is None:  # the number of one that ended may be another program's by now
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def kill_when(self, reached: Callable[[Path], bool], timeout: float = 300.0) -> bool:
        """Watch the folder and kill the trainer once `reached(output_dir)`.

        It is stopped for a second look first, so that what was seen is still so when it dies. A moment that is shorter
        than the watching is passed over.

        Returns whether it was killed; False where it came to its end first.

        Raises:
            `RuntimeError`: it failed by itself, or took longer than `timeout` seconds.
        """
        started = time.monotonic()
        while any(process.is_alive() for process in self.processes):
            if reached(self.output_dir):
                self.signal(signal.SIGSTOP)
                if reached(self.output_dir):
                    self.signal(signal.SIGKILL)
                    for process in self.processes:
                        process.join()
                    return True
                self.signal(signal.SIGCONT)
            time.sleep(POLL)
            if time.monotonic() - started > timeout:
                self.signal(signal.SIGKILL)
                raise RuntimeError(f"No end after {timeout:.0f} seconds:\n{self.said()}")
        self.finish()
        return False

    def finish(self, timeout: float = 300.0) -> None:
        """Wait for the end, which must be a good one."""
        for process in self.processes:
            process.join(timeout)
        if [process.exitcode for process in self.processes] != [0] * len(self.processes):
            self.signal(signal.SIGKILL)
            raise RuntimeError(f"exit codes {[process.exitcode for process in self.processes]}:\n{self.said()}")

    def said(self) -> str:
        """What the processes wrote; one that dies while it starts has no file yet, and writes where this one does."""
        if not self.output.is_file():
            return f"No process came so far as to open {self.output}: what stopped it is on this terminal, above."
        return self.output.read_text()


# ----------------------------------------------------------------------------------------------------------- moments


def steps_logged(output_dir: Path) -> int:
    """The last step of which the log has a whole line."""
    path = output_dir / "train_log.jsonl"
    if not path.is_file():
        return 0
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def steps_saved(output_dir: Path) -> int:
    """The step of the last finished checkpoint."""
    steps = [path.name.split("-")[-1] for path in output_dir.glob("checkpoint-*")]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def is_saving(output_dir: Path) -> bool:
    """Whether a checkpoint is half written: files, but not the manifest."""
    partial = list(output_dir.glob("checkpoint-*.partial"))
    try:
        return bool(partial) and any(partial[0].iterdir()) and not (partial[0] / "manifest.json").exists()
    except FileNotFoundError:  # it has just got its name
        return False


def is_exporting(output_dir: Path) -> bool:
    """Whether some of the result is there."""
    names = ("config.json", "model_index.json", "vae", "transformer", "pytorch_lora_weights.safetensors")
    return any((output_dir / name).exists() for name in names)


def phase(output_dir: Path) -> str:
    """Where a run was killed."""
    if is_exporting(output_dir):
        return "exporting"
    if list(output_dir.glob("checkpoint-*.partial")) or list(output_dir.glob("checkpoint-*.deleted")):
        return "writing a checkpoint"
    return (
        "between checkpoints" if steps_logged(output_dir) > steps_saved(output_dir) else "starting, or at a checkpoint"
    )


# ------------------------------------------------------------------------------------------------------- comparison


def tensors_in(state, path: str = "") -> dict:
    """All tensors, arrays and numbers in nested containers, by their path."""
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, (list, tuple)):
        items = enumerate(state)
    else:
        return {path: state}
    return {name: value for key, each in items for name, value in tensors_in(each, f"{path}/{key}").items()}


def differing_tensors(expected: Path, actual: Path) -> list[str]:
    """Of the files of one folder: a file that the other does not have, or a tensor of one that is not equal."""
    import numpy as np
    from accelerate.utils import load
    from safetensors.torch import load_file

    def equal(a, b) -> bool:
        if hasattr(a, "shape"):
            return np.array_equal(a, b, equal_nan=True)
        return type(a) is type(b) and a == b

    found = []
    for path in sorted(expected.glob("*")):
        if path.suffix not in (".safetensors", ".bin", ".pkl") or path.name.startswith("codes"):
            continue
        if not (actual / path.name).is_file():
            found.append(f"{path.name} is missing")
            continue
        read = load_file if path.suffix == ".safetensors" else load
        first, second = tensors_in(read(path)), tensors_in(read(actual / path.name))
        found += [f"{path.name}: {key}" for key in first.keys() ^ second.keys()]
        found += [f"{path.name}: {key}" for key in first.keys() & second.keys() if not equal(first[key], second[key])]
    return found


def differences(expected: Path, actual: Path, step: int) -> list[str]:
    """What two finished runs of `step` steps do not have in common: export, last checkpoint, log."""

    def log(folder: Path) -> list[dict]:
        entries = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in e.items() if not k.startswith(("seconds", "images_per"))} for e in entries]

    found = []
    for folder in ("", "transformer", f"checkpoint-{step}"):
        found += [f"{folder}/{each}" for each in differing_tensors(expected / folder, actual / folder)]
    first, second = log(expected), log(actual)
    if len(first) != len(second):
        found.append(f"train_log.jsonl: {len(first)} lines and {len(second)}")
    return found + [f"train_log.jsonl: {a} and {b}" for a, b in zip(first, second) if a != b]


# -------------------------------------------------------------------------------------------------------------- main


def kill_repeatedly(context, script: str, problem: Path, folder: Path, args) -> dict:
    """One script: the undisturbed run, then those that are killed; returns the row of the report."""
    length = (args.max_train_steps, args.checkpointing_steps)
    started = time.monotonic()
    Trainer(context, script, flags_of(script, problem, folder / "whole", *length), args.num_processes).finish()
    seconds = time.monotonic() - started

    generator = random.Random(args.seed)
    phases, lost, kills_of_runs, found = Counter(), [], [], []
    flags = flags_of(script, problem, folder / "killed", *length)

    def compare() -> None:
        """A finished run with the undisturbed one; then it makes room for the next."""
        kills_of_runs.append(sum(phases.values()) - sum(kills_of_runs))
        different = differences(folder / "whole", folder / "killed", args.max_train_steps)
        found.extend(f"run {len(kills_of_runs)}: {each}" for each in different)
        shutil.rmtree(folder / "killed")

    while sum(phases.values()) < args.kills:
        if sum(phases.values()) % 2:
            saved = steps_saved(folder / "killed")
            # Some are killed at the first save they come to, some at the next: else none would ever get further.
            target = saved + generator.randint(0, 1) * args.checkpointing_steps

            def reached(output_dir: Path, target=target) -> bool:
                return is_saving(output_dir) and steps_saved(output_dir) >= target
        else:
            deadline = time.monotonic() + generator.uniform(0.2, 1.0) * seconds

            def reached(output_dir: Path, deadline=deadline) -> bool:
                return time.monotonic() > deadline

        if not Trainer(context, script, flags, args.num_processes).kill_when(reached):
            compare()  # at its end, with kills left: once more from the beginning
            continue
        phases[phase(folder / "killed")] += 1
        lost.append(steps_logged(folder / "killed") - steps_saved(folder / "killed"))
    Trainer(context, script, flags, args.num_processes).finish()
    compare()
    return {
        "script": script,
        "num_processes": args.num_processes,
        "kills": sum(phases.values()),
        "phases": dict(phases),
        "most_steps_done_again": max(lost, default=0),
        "kills_of_compared_runs": kills_of_runs,  # 0: the run came to its end before its time
        "differences": found,
    }


def said_of(row: dict) -> str:
    """The line of the report."""
    where = ", ".join(f"{count} {name}" for name, count in sorted(row["phases"].items()))
    runs, different = row["kills_of_compared_runs"], row["differences"]
    return (
        f"{row['script']}, {row['num_processes']} process(es): {row['kills']} kills ({where}), at most "
        f"{row['most_steps_done_again']} steps done again; {len(runs)} finished run(s) compared, of "
        f"{', '.join(map(str, runs))} kills: "
        + (f"{len(different)} DIFFERENCES, {different[:5]}" if different else "equal to the bit")
    )


def main(argv=None):
    args = parse_args(argv)
    context = prepare_processes(args.scripts)
    # The first process waits for the server's imports, many times as long as a run: no time to draw kills from.
    first = context.Process(target=os.getpid)
    first.start()
    first.join()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        problem = make_problem(Path(folder) / "problem")
        rows = []
        for script in args.scripts:
            (Path(folder) / script).mkdir()
            rows.append(row := kill_repeatedly(context, script, problem, Path(folder) / script, args))
            print(said_of(row), flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(any(row["differences"] for row in rows))


if __name__ == "__main__":
    main()
