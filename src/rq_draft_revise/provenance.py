"""Where a result comes from: seeds, digests, versions, hardware, and the record of a run."""

import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .whole_files import whole_file


LIBRARIES = (
    "accelerate", "diffusers", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "pillow",
    "torchvision", "torch-fidelity", "lpips", "rq_draft_revise",
)  # fmt: skip


def image_seed(seed: int, index: int) -> int:
    """Of the generator of image `index`, which thereby depends on nothing else of the run.

    Not `seed + index`: runs of seeds 0 and 1 would share nearly all their images.
    """
    high, low = np.random.SeedSequence([seed, index]).generate_state(2)
    return int(high >> 1) << 32 | int(low)


def image_digest(image: torch.Tensor) -> int:
    """63 bits that tell images apart."""
    return int.from_bytes(hashlib.sha256(image.contiguous().numpy().tobytes()).digest()[:8], "big") >> 1


def public(config) -> dict[str, Any]:
    """A config without its private entries, which say how it was saved."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def json_sha256(content) -> str:
    """Digest of what JSON can say."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def config_sha256(model) -> str:
    """Digest of a model's configuration: the same weights have other heads by it."""
    return json_sha256(public(model.config))


def weights_sha256(module: torch.nn.Module) -> str:
    """Digest of a module's parameters and buffers, names, types and shapes included: the same wherever they lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """Digest of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def write_json(path: Path, content: dict) -> None:
    """There is never half a file."""
    with whole_file(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_batch(path: Path, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    """What was found of a batch of images, and how it was made. There is never half a file."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as aside:
        save_file(tensors, aside, {"record": json.dumps(record)})


def read_batch(
    path: Path, names: Sequence[str] | None = None, may_lack_record: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What [`save_batch`] wrote.

    Args:
        names (`Sequence[str]`, *optional*): Of the tensors to read; by default all.
        may_lack_record (`bool`, defaults to `False`): Whether an earlier version may have written it without a record,
            which is an empty one then.

    Raises:
        `RuntimeError`: the file is damaged, or lacks one of these.
    """
    try:
        with safe_open(path, framework="pt") as file:
            written = file.metadata() or {}
            record = {} if may_lack_record and "record" not in written else dict(json.loads(written["record"]))
            return {name: file.get_tensor(name) for name in names or file.keys()}, record
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise RuntimeError(f"{path} is damaged ({error}): delete it, and run the same command again.") from error


@functools.cache
def git_revision() -> str | None:
    """The commit that this file is of, with `-dirty` where the checkout has changes; None outside of a checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # to look only: `describe --dirty` updates the index
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
        return result.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # or it is installed into somebody else's checkout
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def library_versions() -> dict[str, str]:
    """Python, torch with its build, and those of `LIBRARIES` that are installed."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}  # with the build: +cpu, +cu130
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def cpu_model() -> str:
    """As the system calls it: "AMD EPYC 9654 96-Core Processor"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), None) or platform.processor() or platform.machine()


def hardware(device: torch.device) -> dict[str, Any]:
    """What a time was measured on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": platform.processor() or platform.machine(),
        "cpu_model": cpu_model(),
        "num_cores": os.cpu_count(),  # logical ones of the machine, not those that this process may use
        "num_gpus": torch.cuda.device_count(),
        "num_threads": torch.get_num_threads(),
    }


def check_same_run(
    output_dir: Path, record: dict[str, Any], may_lack: Sequence[str] = (), made: Sequence[str] = ()
) -> None:
    """Refuse to go on with the images of another run; write down what this one's depend on.

    Args:
        output_dir (`Path`): Its `run.json` is the record of the run that began it.
        record (`dict`): All that the images depend on, as JSON has it.
        may_lack (`Sequence[str]`): Names that a `run.json` of an earlier version may be without.
        made (`Sequence[str]`): Patterns of the files that a run makes. Without a `run.json` they are strangers', and
            would be scored as this run's.

    Raises:
        `ValueError`: `run.json` is damaged, says otherwise, or lacks another name; or there is none, and there are
            files that a run makes.
    """
    path = output_dir / "run.json"
    record = json.loads(json.dumps(record))
    if path.is_file():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} must be the record of a run, and is damaged ({error}): nothing shows of which run the images "
                f"in {output_dir} are. Give another folder, or delete this one."
            ) from error
        names = record.keys() | before.keys()
        lacking = {name for name in record.keys() - before.keys() if record[name] is not None}
        different = [name for name in names - lacking if record.get(name) != before.get(name)]
        unknown = {name: record[name] for name in sorted(lacking - set(may_lack))}
        if unknown and not different:
            raise ValueError(
                f"--output_dir {output_dir} holds images of an earlier version of this program, whose run.json does "
                f"not say their {' and '.join(unknown)}. Give another folder, or delete this one; or, where you know "
                f"that nothing was changed since, add {json.dumps(unknown)[1:-1]} to {path}."
            )
        if different:
            name = sorted(different)[0]
            then, now = before.get(name), record.get(name)
            if isinstance(then, dict) and isinstance(now, dict):  # only what is not the same
                differ = [key for key in then.keys() | now.keys() if then.get(key) != now.get(key)]
                then, now = ({key: value[key] for key in sorted(differ) if key in value} for value in (then, now))
            raise ValueError(
                f"--output_dir {output_dir} holds images of another run: its {name} is {then}, and now it is {now}. "
                "Give another folder, or delete this one."
            )
        return
    found = min((file for pattern in made for file in output_dir.glob(pattern)), default=None)
    if found is not None:
        raise ValueError(
            f"--output_dir {output_dir} must have a run.json, which says of which run its images are, got {found} "
            "without one. Give another folder, or delete this one."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
