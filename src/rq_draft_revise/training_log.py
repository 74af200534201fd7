"""The log of a training run, `train_log.jsonl`, and what is summed up between two of its lines."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .devices import sum_dtype
from .whole_files import whole_file


if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainingLog:
    """`<output_dir>/train_log.jsonl`: one JSON object a line, each with its `step`. Only the main process writes.

    A run that starts at step 0 starts the file anew. One that resumes appends, after dropping what the interrupted run
    wrote beyond the checkpoint, and does not write again what is there of the checkpoint's own step, such as the last
    validation of a finished run: every step is in the log once.

    Args:
        accelerator: Whose trackers, where it has any, get the numbers too.
        step (`int`): Steps done before, 0 or the resumed checkpoint's.
    """

    def __init__(self, accelerator: "Accelerator", output_dir: str | Path, step: int):
        self._accelerator = accelerator
        self._file, self._written = None, set()
        if not accelerator.is_main_process:
            return
        path = Path(output_dir) / "train_log.jsonl"
        kept = []
        if path.is_file() and step > 0:
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the line that was being written when the run was killed
                    continue
                if entry["step"] <= step:
                    kept.append(line + "\n")
                if entry["step"] == step:
                    self._written.add(self._identity(entry))
        with whole_file(path) as aside:
            aside.write_text("".join(kept))
        self._file = path.open("a", buffering=1)

    @staticmethod
    def _identity(entry: dict[str, Any]) -> tuple:
        return entry["step"], entry.get("kind"), entry.get("split")

    def write(self, entry: dict[str, Any], line: str) -> None:
        """Append `entry`, which has a `step`, and print `line`, which says the same to a person.

        Trackers get its numbers as `<kind>/<name>`, or `<kind>/<split>/<name>`: training and validation of one step
        measure things of the same name.
        """
        if self._file is not None:
            if self._identity(entry) not in self._written:
                self._file.write(json.dumps(entry) + "\n")
            print(line, flush=True)
        prefix = "".join(f"{entry[name]}/" for name in ("kind", "split") if name in entry)
        flat = {}
        for name, value in entry.items():  # trackers take numbers: a list becomes one a place
            flat |= {f"{name}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
        numbers = {prefix + k: v for k, v in flat.items() if isinstance(v, (int, float)) and k != "step"}
        self._accelerator.log(numbers, step=entry["step"])

    def write_image(self, name: str, path: str | Path, step: int) -> None:
        """Hand the picture in the file `path` to those trackers that take pictures. For the main process to call."""
        with Image.open(path) as picture:
            image = np.asarray(picture.convert("RGB"))  # (H, W, 3)
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":  # a batch, and not a list
                tracker.log_images({name: image[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "trackio":  # accelerate's has only `log`
                import trackio

                tracker.log({name: trackio.Image(image)}, step=step)
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [image]}, step=step)

    def close(self) -> None:
        """Close the file; nothing can be written after that."""
        if self._file is not None:
            self._file.close()


class LogWindow:
    """What training measured since the last line of the log: sums, to be saved with a checkpoint between two lines.

    Sums are in the device's [`sum_dtype`].

    Args:
        accelerator: The run's.
        state (`dict`, *optional*): From [`state`], of the run that is resumed. By default nothing has been measured.

    Attributes:
        images (`int`): Images read, those of steps that were left out too.
    """

    def __init__(self, accelerator: "Accelerator", state: dict[str, Any] | None = None):
        self._accelerator = accelerator
        self._dtype = sum_dtype(accelerator.device)
        self.clear()
        if state is None:
            return
        self.images, self._seconds, self._counts = state["images"], state["seconds"], dict(state["counts"])
        for name, sums in state["sums"].items():
            own = sums[accelerator.process_index]
            self._sums[name] = torch.tensor(own, dtype=self._dtype, device=accelerator.device)

    def clear(self) -> None:
        """Begin the next line."""
        self.images, self._seconds, self._started = 0, 0.0, time.monotonic()
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Count in this process's numbers of a step, scalars or vectors. Which there are may differ by step."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.to(self._dtype)
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float | list[float]]:
        """Means over processes and the steps that have the number; empty without steps. For every process to call."""
        means = {name: value / self._counts[name] for name, value in self._sums.items()}
        return {name: self._accelerator.reduce(mean, "mean").tolist() for name, mean in means.items()}

    def seconds(self) -> float:
        """Seconds since the last line, without those in [`paused`]."""
        return self._seconds + (0.0 if self._started is None else time.monotonic() - self._started)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock: validation and checkpoints are no training."""
        self._seconds, self._started = self.seconds(), None
        try:
            yield
        finally:
            self._started = time.monotonic()

    def state(self) -> dict[str, Any]:
        """All of it, of all processes, for JSON. For every process to call."""
        sums = {name: self._accelerator.gather(value[None]).tolist() for name, value in self._sums.items()}
        return {"images": self.images, "seconds": self.seconds(), "counts": self._counts, "sums": sums}
