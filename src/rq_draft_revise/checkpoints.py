"""Checkpoints of a training run: everything that resuming needs.

A checkpoint is a folder `checkpoint-<step>` of what `accelerate.Accelerator.save_state` writes (weights, optimizer,
registered objects, each process's random states; sharded where FSDP shards), and of two files of ours:

- `progress.json`: how far the run is, its arguments, its data, how it was launched, git revision and library versions;
- `manifest.json`: size and CRC-32 of every other file. Written last: a folder that has one is complete.

Both functions are handed the run's `accelerate.Accelerator`; nothing of accelerate is imported with this module.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .provenance import git_revision, library_versions


if TYPE_CHECKING:
    from accelerate import Accelerator


MANIFEST, PROGRESS = "manifest.json", "progress.json"

# What may differ between a run and its continuation: where things are written, how often, and what is only looked at.
# Everything else decides the weights, the length of the run too: the cosine ends with it.
CHANGEABLE = frozenset(
    [
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "logging_steps",
        "report_to",
        "dataloader_num_workers",
        "max_nonfinite_steps",
        "validation_steps",
        "validation_split",
        "validation_data_files",
        "validation_batch_size",
        "max_validation_images",
        "num_validation_images",
        "validation_prompt",
        "validation_prompts",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
    ]
)

# --------------------------------------------------------------------------------------------------------- on the disk


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The finished `checkpoint-<step>` folders of a run in the order in which they were written, oldest first.

    That is the order of their steps, unless the run once went on from an older checkpoint. One that is still being
    written is not listed; one whose manifest cannot be read is, at the end, for [`load_checkpoint`] to refuse it.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(folders, key=lambda path: (_sequence(path), int(path.name.split("-")[-1])))


def _sequence(folder: Path) -> float:
    """How many checkpoints of the run had been written with this one. No clock: those of two nodes may disagree."""
    try:
        return _read_manifest(folder)["sequence"]
    except ValueError:
        return float("inf")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        return {
            "sequence": int(manifest["sequence"]),
            "files": {k: (v[0], v[1]) for k, v in manifest["files"].items()},
        }
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a finished checkpoint: it has no {MANIFEST}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is damaged or not of this package: {error}.") from None


def _checksum(path: Path, flush: bool = False) -> tuple[int, int]:
    """Size and CRC-32 of a file. It is to find damage, not malice, and reads 3 GB/s where SHA-256 reads one."""
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
        if flush:
            os.fsync(file.fileno())
    return size, checksum


def verify_checkpoint(folder: str | Path) -> None:
    """Compare every file of a checkpoint with the manifest. Nothing is loaded or changed.

    Raises:
        `ValueError`: names what is missing, of another size or of other contents, or that this is no checkpoint.
    """
    folder = Path(folder)
    files = _read_manifest(folder)["files"]

    def fault(name: str) -> str | None:
        size, checksum = files[name]
        try:
            found = (folder / name).stat().st_size
            if found != size:  # before 20 GB are read
                return f"{name} has {found:,} bytes and should have {size:,}"
            return None if _checksum(folder / name) == (size, checksum) else f"the contents of {name} have changed"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error})"

    with ThreadPoolExecutor(8) as pool:
        faults = [fault for fault in pool.map(fault, files) if fault is not None]
    if faults:
        raise ValueError(f"{folder} is damaged: {'; '.join(faults)}.")


def _flush_folder(folder: Path) -> None:
    """Make the names in a folder survive a power loss, where the system lets a folder be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _seal(folder: Path, sequence: int) -> None:
    """Bring all files of a folder to the disk, then write the manifest over them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(8) as pool:
        files = dict(zip((str(p.relative_to(folder)) for p in paths), pool.map(lambda p: _checksum(p, True), paths)))
    for subfolder in {path.parent for path in paths}:
        _flush_folder(subfolder)
    with (folder / MANIFEST).open("w") as file:
        json.dump({"sequence": sequence, "files": files}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _flush_folder(folder)


def _put_in_place(partial: Path, final: Path) -> None:
    """Rename; what had the name goes away only once the new one is there."""
    replaced = final.with_name(final.name + ".deleted")
    if final.exists():
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    _flush_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _finish_interrupted(output_dir: Path) -> None:
    """A run that was killed between the two renames of [`_put_in_place`] left a whole checkpoint under no name."""
    for partial in output_dir.glob("checkpoint-*.partial"):
        final = partial.with_suffix("")
        if (partial / MANIFEST).is_file() and not final.exists():
            try:
                verify_checkpoint(partial)
            except ValueError:
                continue
            partial.rename(final)


# ------------------------------------------------------------------------------------------------------------- the run


def _as_json(arguments: dict[str, Any]) -> dict[str, Any]:
    """What reading the arguments back will give: paths as text, tuples as lists; no secrets, and no `_given`."""
    kept = {k: v for k, v in arguments.items() if not k.endswith("_token") and not k.startswith("_")}
    return json.loads(json.dumps(kept, default=str))


def _launch(accelerator: "Accelerator") -> dict[str, Any]:
    return {
        "num_processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
    }


def _everywhere(accelerator: "Accelerator", function: Callable[[], Any]) -> tuple[list[str], Exception | None]:
    """Call `function` in every process and wait for all.

    Returns what went wrong in any process, the same list in all of them, and this process's own exception.
    """
    error = None
    try:
        function()
    except Exception as caught:
        error = caught
    fault = None if error is None else f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if accelerator.num_processes == 1:
        return [fault] if fault else [], error
    from accelerate.utils import gather_object

    return [f"process {i}: {text}" for i, text in enumerate(gather_object([fault])) if text], error


def _by_main_process(accelerator: "Accelerator", function: Callable[[], Any]) -> Any:
    """What `function` returns in the main process, or the ValueError that it raises there, in every process."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def save_checkpoint(
    accelerator: "Accelerator",
    output_dir: str | Path,
    progress: dict[str, Any],
    arguments: dict[str, Any],
    total_limit: int | None = None,
    data: dict[str, Any] | None = None,
) -> None:
    """Write `<output_dir>/checkpoint-<step>`, under the name `checkpoint-<step>.partial` until it is complete.

    So a run that is killed while writing leaves no folder that looks like a checkpoint. All files have reached the
    disk before the folder gets its name, and older checkpoints are deleted only after that. To be called by every
    process; `output_dir` must be one folder for the processes of all nodes.

    Args:
        accelerator: Its prepared and registered objects are saved, and each process's random states.
        progress (`dict`): How far the run is: `step`, and whatever else [`load_checkpoint`] is to return. For JSON.
        arguments (`dict`): The run's arguments, all that its result depends on; [`load_checkpoint`] compares them.
        total_limit (`int`, *optional*): Keep only so many checkpoints, the newest, and delete the others.
        data (`dict`, *optional*): What the run found its data to be; [`load_checkpoint`] compares it too.

    Raises:
        `OSError`: the checkpoint cannot be written: a full disk, no permission. What was written of it is removed, and
            every older checkpoint is still there.
    """
    output_dir = Path(output_dir)
    final = output_dir / f"checkpoint-{progress['step']}"
    partial = final.with_name(final.name + ".partial")
    record = progress | {
        "arguments": _as_json(arguments),
        "data": _as_json(data or {}),
        "launch": _launch(accelerator),
        "git_revision": git_revision(),
        "versions": library_versions(),
    }

    def attempt(function: Callable[[], Any]) -> None:
        """If one process fails, all do: nobody is left waiting."""
        faults, error = _everywhere(accelerator, function)
        if not faults:
            return
        older, free = [], ""
        if output_dir.is_dir():  # the space as the writing found it: torch's own words for a full disk are obscure
            free = f" ({shutil.disk_usage(output_dir).free / 1e9:,.1f} GB are free on that disk)"
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()  # or the end of one process may have its launcher kill the one that tidies up
        if output_dir.is_dir():
            older = checkpoints_in(output_dir)[-1:]
        raise OSError(
            f"{final} could not be written{free}: {'; '.join(faults)}. What was written of it has been removed; "
            + (f"{older[0].name} is untouched, to resume from." if older else "there is no older checkpoint.")
        ) from error

    def prepare() -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        for leftover in (*output_dir.glob("checkpoint-*.partial"), *output_dir.glob("checkpoint-*.deleted")):
            shutil.rmtree(leftover)  # of a run that was killed

    def seal() -> None:
        for i in range(accelerator.num_processes):
            if not (partial / f"random_states_{i}.pkl").is_file():
                raise ValueError(
                    f"process {i} wrote its random states elsewhere; --output_dir must be one folder for all nodes"
                )
        (partial / PROGRESS).write_text(json.dumps(record, indent=2) + "\n")
        known = [_sequence(path) for path in checkpoints_in(output_dir)]
        _seal(partial, 1 + max((n for n in known if n != float("inf")), default=0))
        _put_in_place(partial, final)

    in_main_process = accelerator.is_main_process
    attempt(prepare if in_main_process else lambda: None)
    attempt(lambda: accelerator.save_state(str(partial)))
    attempt(seal if in_main_process else lambda: None)
    if in_main_process and total_limit is not None:
        readable = [path for path in checkpoints_in(output_dir) if _sequence(path) != float("inf")]
        for old in readable[:-total_limit]:
            doomed = old.with_name(old.name + ".deleted")  # or one half deleted would look like a damaged checkpoint
            try:
                old.rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:  # no reason to stop a run whose checkpoint is written
                print(f"Note: {old} could not be deleted: {error}", flush=True)
    accelerator.wait_for_everyone()


def load_checkpoint(
    accelerator: "Accelerator",
    output_dir: str | Path,
    resume_from_checkpoint: str | Path,
    arguments: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Restore what [`save_checkpoint`] wrote into the same prepared and registered objects. For every process to call.

    Nothing is loaded before all files have been compared with the manifest, and no object is unpickled that
    `torch.load(weights_only=True)` refuses; only torch's index of sharded weights and DeepSpeed's files are read by
    those libraries in their own way. So resume from your own checkpoints.

    Args:
        resume_from_checkpoint (`str`): A checkpoint's folder, or `"latest"`: the newest finished one in `output_dir`.
            A damaged newest one is refused and not passed over: what it held would be lost without a word.
        arguments (`dict`, *optional*): The run's arguments now. By default they are not compared.
        data (`dict`, *optional*): The run's data now. What is None, here or in the checkpoint, is not compared.

    Returns:
        The `progress` of the checkpoint, or None where `"latest"` finds none: the run then starts from the beginning.

    Raises:
        `ValueError`: the folder is not a finished checkpoint, is damaged (the file is named), is of another model, or
            of a run with other arguments, data, processes or precision (each is named with both values).
    """
    output_dir = Path(output_dir)

    def choose() -> str | None:
        if resume_from_checkpoint != "latest":
            folder = Path(resume_from_checkpoint)
            if not folder.is_dir() or folder.suffix in (".partial", ".deleted"):
                raise ValueError(
                    "`resume_from_checkpoint` must be 'latest' or the folder of a finished checkpoint, "
                    f"got {str(resume_from_checkpoint)!r}."
                )
            verify_checkpoint(folder)
            return str(folder)
        _finish_interrupted(output_dir)
        found = checkpoints_in(output_dir)
        for i, folder in enumerate(reversed(found)):
            try:
                verify_checkpoint(folder)
            except ValueError as error:
                if i == 0:
                    newest_fault = error
                continue
            if i == 0:
                return str(folder)
            raise ValueError(
                f"{newest_fault} The last good checkpoint is {folder}: resume from that by its name, or move the "
                "damaged one away."
            )
        if found:
            raise ValueError(f"{newest_fault} No other checkpoint in {output_dir} is whole either.")
        return None

    folder = _by_main_process(accelerator, choose)
    if folder is None:
        return None
    folder = Path(folder)
    record = json.loads((folder / PROGRESS).read_text())
    saved = {name: record.pop(name) for name in ("arguments", "launch", "git_revision", "versions")}
    saved["data"] = record.pop("data", {})  # which older checkpoints lack
    if arguments is not None:
        _check_same_run(folder, saved, _as_json(arguments), _as_json(data or {}), _launch(accelerator))
    faults, error = _everywhere(accelerator, lambda: _load_state(accelerator, folder))
    if faults:
        raise ValueError(f"{folder} does not fit this run: {'; '.join(faults)}.") from error
    accelerator.print(f"Resuming from {folder}")
    now = {"git revision": git_revision(), **library_versions()}
    for name, before in {"git revision": saved["git_revision"], **saved["versions"]}.items():
        if now.get(name) != before:
            accelerator.print(
                f"Note: {name} was {before} when the checkpoint was written and is {now.get(name)} now; the run goes "
                "on, but no longer to the same bits as without the interruption."
            )
    return record


def _check_same_run(
    folder: Path, saved: dict[str, Any], arguments: dict[str, Any], data: dict[str, Any], launch: dict[str, Any]
) -> None:
    """Refuse what would give other weights than the run that wrote the checkpoint.

    A flag that only one of the two knows was added or removed with the version of the script and is let pass. So is
    what one of the two does not know of the data: the length of a stream may be known in one start only.
    """
    data_before = {name: value for name, value in saved["data"].items() if value is not None}
    data = {name: value for name, value in data.items() if value is not None}
    changes = [
        f"{prefix}{name} was {before[name]!r} and is {value!r}"
        for prefix, before, now in (
            ("--", saved["arguments"], arguments),
            ("", data_before, data),
            ("", saved["launch"], launch),
        )
        for name, value in now.items()
        if name not in CHANGEABLE and name in before and before[name] != value
    ]
    if changes:
        raise ValueError(
            f"`resume_from_checkpoint`: {folder} is of another configuration: {'; '.join(changes)}. Resume with what "
            "it was, or start another run in another --output_dir. What may change: "
            f"{', '.join(f'--{name}' for name in sorted(CHANGEABLE))}."
        )


def _load_state(accelerator: "Accelerator", folder: Path) -> None:
    from accelerate.utils import load

    # accelerate reads registered objects (averaged weights) by a full unpickling; these lines refuse what needs one.
    for path in sorted(folder.glob("custom_checkpoint_*.pkl")):
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    # It also goes on without a word where the random states are missing or do not fit: so compare.
    states = load(folder / f"random_states_{accelerator.process_index}.pkl")
    accelerator.load_state(str(folder))
    restored = [torch.equal(torch.get_rng_state(), states["torch_manual_seed"])]
    if "torch_cuda_manual_seed" in states:
        now = torch.cuda.get_rng_state_all()
        restored += [len(now) == len(states["torch_cuda_manual_seed"])]
        restored += [torch.equal(a, b) for a, b in zip(now, states["torch_cuda_manual_seed"])]
    if not all(restored):
        raise ValueError("the random states could not be restored; is the number of devices the same?")
