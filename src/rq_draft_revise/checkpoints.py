"""Checkpoints of a training run: everything that resuming needs, and the log that goes with them.

Both are handed the run's `accelerate.Accelerator`; nothing of accelerate is imported here.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from accelerate import Accelerator


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The finished `checkpoint-<step>` folders of a run, oldest first. One still being written is not listed."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[-1]))


def save_checkpoint(
    accelerator: "Accelerator",
    output_dir: str | Path,
    progress: dict[str, Any],
    arguments: dict[str, Any],
    total_limit: int | None = None,
) -> None:
    """Write `<output_dir>/checkpoint-<step>`, under the name `checkpoint-<step>.partial` until it is complete.

    So a run that is killed while writing leaves no folder that looks like a checkpoint. To be called by every process.

    Args:
        accelerator: Its prepared and registered objects are saved, and each process's random states.
        progress (`dict`): How far the run is: `step`, and whatever else [`load_checkpoint`] is to return.
        arguments (`dict`): The run's arguments; written into `progress.json` for the reader, not read back.
        total_limit (`int`, *optional*): Keep only so many checkpoints, the newest, and delete the others.
    """
    final = Path(output_dir) / f"checkpoint-{progress['step']}"
    partial = final.with_name(final.name + ".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "progress.json").write_text(json.dumps(progress | {"arguments": arguments}, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if total_limit is not None:
            for old in checkpoints_in(output_dir)[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(
    accelerator: "Accelerator", output_dir: str | Path, resume_from_checkpoint: str
) -> dict[str, Any] | None:
    """Restore what [`save_checkpoint`] wrote into the same prepared and registered objects.

    Resume from your own checkpoints only: accelerate unpickles the random states and the averaged weights.

    Args:
        resume_from_checkpoint (`str`): A checkpoint's folder, or `"latest"`: the newest finished one in `output_dir`.

    Returns:
        The `progress` of the checkpoint, or None where `"latest"` finds none: the run then starts from the beginning.

    Raises:
        `ValueError`: the folder is not a finished checkpoint.
    """
    if resume_from_checkpoint == "latest":
        found = checkpoints_in(output_dir)
        if not found:
            return None
        folder = found[-1]
    else:
        folder = Path(resume_from_checkpoint)
        if not (folder / "progress.json").is_file():
            raise ValueError(
                f"`resume_from_checkpoint` must be 'latest' or a checkpoint folder, got {resume_from_checkpoint!r}."
            )
    accelerator.load_state(str(folder))
    accelerator.print(f"Resuming from {folder}")
    return json.loads((folder / "progress.json").read_text())


class TrainingLog:
    """`<output_dir>/train_log.jsonl`: one JSON object a line, each with its `step`. Only the main process writes.

    A run that starts at step 0 starts the file anew. One that resumes appends, after dropping what the interrupted run
    wrote beyond the checkpoint: every step is in the log once.

    Args:
        accelerator: Whose trackers, where it has any, get the numbers too.
        step (`int`): Steps done before, 0 or the resumed checkpoint's.
    """

    def __init__(self, accelerator: "Accelerator", output_dir: str | Path, step: int):
        self._accelerator = accelerator
        self._file = None
        if not accelerator.is_main_process:
            return
        path = Path(output_dir) / "train_log.jsonl"
        kept = []
        if path.is_file() and step > 0:
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except json.JSONDecodeError:  # the line that was being written when the run was killed
                    continue
        path.write_text("".join(kept))
        self._file = path.open("a", buffering=1)

    def write(self, entry: dict[str, Any], line: str) -> None:
        """Append `entry`, which has a `step`, and print `line`, which says the same to a person."""
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            print(line, flush=True)
        flat = {}
        for name, value in entry.items():  # trackers take numbers: a list becomes one a place
            flat |= {f"{name}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
        self._accelerator.log({k: v for k, v in flat.items() if isinstance(v, (int, float))}, step=entry["step"])

    def close(self) -> None:
        """Close the file; nothing can be written after that."""
        if self._file is not None:
            self._file.close()
