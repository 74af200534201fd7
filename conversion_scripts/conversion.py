"""What the conversion scripts share: safe reading of foreign files, key tables, writing aside, comparing.

A key table is a list of rows `(original keys, keys here)` or `(original keys, keys here, change)`, to be read as a
table. Placeholders stand for parts of a key: `{i}` and the like for an index, the others for the words of `WORDS`.
`{-u}` is the index `u` counted from the other end. A key is one string; several belong together as a tuple.
"""

import argparse
import json
import re
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import yaml
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
# A shard of float32 weights is read, cast and written at a time; a cast needs its size in memory.
MAX_SHARD_SIZE = "2GB"

# What stands in a checkpoint beside the weights, and why none of it is converted.
BESIDE_THE_WEIGHTS = {
    "optimizer": "training state",
    "optimizer_states": "training state",
    "scheduler": "training state",
    "lr_schedulers": "training state",
    "callbacks": "training state",
    "epoch": "training state",
    "global_step": "training state",
    "discriminator": "only training uses it",
    "state_dict": "--ema takes the averaged weights instead",
    "state_dict_ema": "the authors sample from `state_dict`; --ema takes the averaged weights",
}


# ---- Reading ----


class _Inert:
    """Stands for a class that a checkpoint names but whose code is not wanted: it has nothing to run."""


# Lightning keys the state of its callbacks by their classes; the checkpoints of taming-transformers name this one.
INERT_CLASSES = [(_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


def load_checkpoint(path: str | Path, ema: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The weights in a PyTorch checkpoint, left on the disk until they are read, and what else it holds.

    Only tensors and plain containers are unpickled: a pickle that would run code is refused.

    Args:
        path: The file.
        ema (`bool`, defaults to `False`): `state_dict_ema`, the averaged weights, instead of `state_dict`.

    Returns:
        The state dict, and the reasons for which the rest is left out, by name.

    Raises:
        `ValueError`: there is no such file, it is damaged, it would run code, or it holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`checkpoint_path` must be a checkpoint's file, got {str(path)!r}, which is none.")
    damaged = None
    try:
        # files from before torch 1.6 are no archives: they have no checksums and cannot be mapped
        is_archive = zipfile.is_zipfile(path)
        if is_archive:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch looks at no checksum of a file that it maps
        with torch.serialization.safe_globals(INERT_CLASSES):
            checkpoint = torch.load(path, map_location="cpu", mmap=is_archive, weights_only=True)
    except Exception as error:  # what a foreign file raises is beyond listing
        said = next((line.strip() for line in str(error).splitlines() if "rror" in line), str(error)[:200])
        raise ValueError(
            f"{path} must be a complete PyTorch checkpoint of tensors and plain containers alone, but reading it ends "
            f"in {type(error).__name__}: {said}"
        ) from error
    if damaged is not None:
        raise ValueError(
            f"{path} must be a complete PyTorch checkpoint, but the checksum of {damaged!r} in it is wrong."
        )
    name = "state_dict_ema" if ema else "state_dict"
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(name), dict):
        found = list(checkpoint) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{path} must hold a dictionary with the weights under {name!r}, got {found}.")
    state_dict = dict(checkpoint.pop(name))
    strange = [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise ValueError(f"{path} must hold tensors alone under {name!r}, but {strange[:5]} are none.")
    return state_dict, {str(name): BESIDE_THE_WEIGHTS.get(name, "not the weights of the model") for name in checkpoint}


def load_config(path: str | Path) -> dict:
    """A `config.yaml`, read without making objects of any class.

    Raises:
        `ValueError`: there is no such file, or it is no YAML mapping of plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"`config_path` must be the checkpoint's config.yaml, by default the one beside it, got {str(path)!r}, "
            "which is no file."
        )
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())  # the parser draws the place over several lines
        raise ValueError(f"{path} must be YAML of plain values: {said}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must be a YAML mapping, got {type(config).__name__}.")
    return config


def derive_config(derive: Callable[[dict], dict], path: str | Path) -> dict:
    """A model's arguments, derived from the `config.yaml` at `path`.

    Raises:
        `ValueError`: there is no such file, or it is not of the form that `derive` knows.
    """
    try:
        return derive(load_config(path))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} must have the form of the original's configs: {error!r}") from error


_REQUIRED = object()


def setting(config: dict, name: str, default=_REQUIRED):
    """The value of a dotted name such as `arch.block_size`.

    Raises:
        `ValueError`: it is absent, and there is no default.
    """
    value = config
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            if default is _REQUIRED:
                raise ValueError(f"config.yaml must have `{name}`, but it ends before `{part}`.")
            return default
        value = value[part]
    return value


def require(config: dict, default=_REQUIRED, **expected) -> None:
    """Refuse a config in which a setting has another value than the one the models here have.

    Args:
        expected: Names with `__` for the dot, and the one value each may have.
        default: What an absent setting means; by default it must be there.
    """
    for name, value in expected.items():
        name = name.replace("__", ".")
        got = setting(config, name, default)
        if got != value:
            raise ValueError(f"`{name}` must be {value!r}: nothing else has a counterpart here, got {got!r}.")


def load_folder(folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a component's folder, in one file or many, left on the disk until they are read.

    Raises:
        `ValueError`: files are missing or damaged.
    """
    folder = Path(folder)
    tensors = {}
    try:
        if (folder / INDEX).is_file():
            files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        else:
            files = [WEIGHTS.format(suffix="")]
        for file in files:
            # by the last part alone: an index is no reason to read outside the folder
            with safe_open(folder / Path(file).name, framework="pt") as shard:
                tensors.update({key: shard.get_tensor(key) for key in shard.keys()})  # noqa: SIM118  (not a dict)
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} must be a component's folder with complete weights: {error}") from error
    return tensors


# ---- Key tables ----

WORDS = {"p": "weight|bias", "layer": "norm1|conv1|norm2|conv2", "side": "encoder|decoder"}


@dataclass(frozen=True)
class Change:
    """How the tensors of one row become those of the other side.

    Both functions take a list of tensors and return one. `to_new` is told the shapes to make, `to_old` how many
    tensors. `to_old` must work on the meta device too: so the original's shapes are known from the config.
    """

    to_new: Callable[[list[torch.Tensor], list[torch.Size]], list[torch.Tensor]]
    to_old: Callable[[list[torch.Tensor], int], list[torch.Tensor]]


SAME = Change(lambda old, shapes: old, lambda new, number: new)
# (1, length, width) <-> (length, width)
UNBATCHED = Change(lambda old, shapes: [old[0][0]], lambda new, number: [new[0][None]])
# a 1×1 convolution <-> the linear layer that it is
POINTWISE = Change(lambda old, shapes: [old[0][:, :, 0, 0]], lambda new, number: [new[0][:, :, None, None]])


@dataclass(frozen=True)
class Link:
    """A row for one choice of its placeholders: which tensors become which."""

    old: tuple[str, ...]
    new: tuple[str, ...]
    change: Change


def _keys(cell: str | tuple[str, ...]) -> tuple[str, ...]:
    return (cell,) if isinstance(cell, str) else cell


def _pattern(template: str) -> re.Pattern:
    def group(match):
        name = match[1]
        return f"(?P<{name.replace('-', 'minus_')}>{WORDS.get(name, r'[0-9]+')})"

    return re.compile(re.sub(r"\\\{(.*?)\\\}", group, re.escape(template).replace(r"\-", "-")))


def _fill(template: str, values: dict[str, str], counts: dict[str, int]) -> list[str]:
    """Keys of a template: one, or one for each index of a placeholder that has no value but a count."""
    names = re.findall(r"\{(.*?)\}", template)
    free = [name for name in names if name not in values]
    if not free:
        return [re.sub(r"\{(.*?)\}", lambda match: values[match[1]], template)]
    (name,) = free
    return [key for i in range(counts[name]) for key in _fill(template, values | {name: str(i)}, counts)]


def link_keys(rows: Sequence[tuple], new_keys: Sequence[str], counts: dict[str, int]) -> list[Link]:
    """The table for one model.

    Args:
        rows: The table.
        new_keys: All keys of the model here. Each must be in exactly one row.
        counts: How many there are of a placeholder that is counted from the other end, or that only the original has.
    """
    links = {}
    for key in new_keys:
        found = []
        for row in rows:
            for template in _keys(row[1]):
                if match := _pattern(template).fullmatch(key):
                    found.append((row, match))
        if len(found) != 1:
            raise ValueError(f"{key!r} must be in one row of the table, but is in {len(found)}.")
        row, match = found[0]
        values = match.groupdict()
        for name in [name for name in values if name.startswith("minus_")]:
            index = int(values.pop(name))
            name = name.removeprefix("minus_")
            values |= {f"-{name}": str(index), name: str(counts[name] - 1 - index)}
        old = tuple(key for template in _keys(row[0]) for key in _fill(template, values, counts))
        new = tuple(key for template in _keys(row[1]) for key in _fill(template, values, counts))
        links[new] = Link(old, new, row[2] if len(row) > 2 else SAME)
    return list(links.values())


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


class Component:
    """A model of this package and the key table between its state dict and the original's.

    Args:
        model_class: The model's class.
        config (`dict`): Its arguments.
        rows: The key table.
        counts (`dict[str, int]`): See [`link_keys`].
        dropped (`dict[str, str]`): Shell patterns of keys that only the original has, and the reason for which each is
            left out.
    """

    def __init__(
        self, model_class: type[ModelMixin], config: dict, rows, counts, dropped: dict[str, str] | None = None
    ):
        with torch.device("meta"):
            self.model = model_class(**config)
        self.shapes = {key: value.shape for key, value in self.model.state_dict().items()}
        self.links = link_keys(rows, list(self.shapes), counts)
        self.dropped = dropped or {}

    def original_shapes(self) -> dict[str, torch.Size]:
        """Keys and shapes that the original has at this config."""
        shapes = {}
        for link in self.links:
            new = [torch.empty(self.shapes[key], device="meta") for key in link.new]
            shapes |= {
                key: tensor.shape for key, tensor in zip(link.old, link.change.to_old(new, len(link.old)), strict=True)
            }
        return shapes

    def check(self, source: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Whether the table consumes the original state dict, every key and shape.

        Returns:
            The keys that are left out, and why.

        Raises:
            `ValueError`: keys are missing or nobody's, or have shapes that the config does not give.
        """
        expected = self.original_shapes()
        reasons = {
            key: reason for key in source for pattern, reason in self.dropped.items() if fnmatchcase(key, pattern)
        }
        missing = [key for key in expected if key not in source]
        extra = [key for key in source if key not in expected and key not in reasons]
        if missing or extra:
            raise ValueError(
                "The checkpoint must have the keys that its config gives. "
                + (f"Missing: {_some(missing)}. " if missing else "")
                + (f"Not known: {_some(extra)}. " if extra else "")
            )
        wrong = [
            f"{key} {tuple(source[key].shape)}, not {tuple(shape)}"
            for key, shape in expected.items()
            if source[key].shape != shape
        ]
        if wrong:
            raise ValueError(f"The checkpoint must have the shapes that its config gives, but has {_some(wrong)}.")
        return reasons

    def _dtype(self, key: str, dtype: torch.dtype) -> torch.dtype:
        kept = self.model._keep_in_fp32_modules or []
        return torch.float32 if any(name in key.split(".") for name in kept) else dtype

    def _new(self, link: Link, source: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        tensors = link.change.to_new([source[key] for key in link.old], [self.shapes[key] for key in link.new])
        return {
            key: tensor.to(self._dtype(key, dtype)).contiguous() for key, tensor in zip(link.new, tensors, strict=True)
        }

    def shards(self, dtype: torch.dtype, max_shard_size: str) -> StateDictSplit:
        """Which tensors go into which file."""
        placeholders = {
            key: torch.empty(shape, dtype=self._dtype(key, dtype), device="meta") for key, shape in self.shapes.items()
        }
        return split_torch_state_dict_into_shards(
            placeholders, filename_pattern=WEIGHTS, max_shard_size=max_shard_size
        )

    def save(self, source: Mapping[str, torch.Tensor], folder: Path, dtype: torch.dtype, max_shard_size: str) -> None:
        """Write config and weights, shard by shard, read them again and compare every tensor with the source."""
        self.model.save_config(folder)
        shards = self.shards(dtype, max_shard_size)
        links = {key: link for link in self.links for key in link.new}
        for file, keys in shards.filename_to_tensors.items():
            tensors = {key: self._new(links[key], source, dtype)[key] for key in keys}
            for key, tensor in tensors.items():
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"The checkpoint must be finite in {tensor.dtype}, but {key} is not.")
            save_file(tensors, folder / file, metadata={"format": "pt"})
            del tensors
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

        written = load_folder(folder)
        if set(written) != set(self.shapes):
            raise ValueError(f"{folder} was not written as meant: {_some(sorted(set(written) ^ set(self.shapes)))}.")
        for link in self.links:
            for key, tensor in self._new(link, source, dtype).items():
                if written[key].dtype != tensor.dtype or not torch.equal(written[key], tensor):
                    raise ValueError(f"{folder} was not written as meant: {key} differs when it is read again.")

    def restore(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The original's state dict, from that of a model here.

        Raises:
            `ValueError`: the state dict is not that of the config, or has something that the original cannot hold.
        """
        got = {key: value.shape for key, value in tensors.items()}
        if got != self.shapes:
            wrong = [key for key in got.keys() | self.shapes.keys() if got.get(key) != self.shapes.get(key)]
            raise ValueError(
                f"The weights must have the keys and shapes that config.json gives, unlike {_some(wrong)}."
            )
        restored = {}
        for link in self.links:
            old = link.change.to_old([tensors[key] for key in link.new], len(link.old))
            restored |= {key: tensor.to(dtype) for key, tensor in zip(link.old, old, strict=True)}
        return restored


def component_config(model_class: type[ModelMixin], folder: str | Path) -> dict:
    """The arguments of the model in a folder.

    Raises:
        `ValueError`: the folder is none of this model.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(folder)!r} must be the folder of a {model_class.__name__}: {error}") from error
    if config.get("_class_name") != model_class.__name__:
        raise ValueError(f"{path} must be of a {model_class.__name__}, got {config.get('_class_name')!r}.")
    return {key: value for key, value in config.items() if not key.startswith("_")}


# ---- Writing ----


def save_checkpoint(state_dict: dict[str, torch.Tensor], path: Path, name: str = "state_dict") -> None:
    """Write a checkpoint in the original's form, read it again and compare every tensor."""
    torch.save({name: state_dict}, path)
    written, _ = load_checkpoint(path, ema=name == "state_dict_ema")
    for key in state_dict.keys() | written.keys():
        if not torch.equal(state_dict[key], written[key]):
            raise ValueError(f"{path} was not written as meant: {key} differs when it is read again.")


def save_model_index(folder: Path, pipeline_class: type, components: dict, settings: dict) -> None:
    """Write `model_index.json`: what `save_pretrained` writes, without loading the components.

    Args:
        folder: The pipeline's folder, whose components are there.
        pipeline_class: Its class.
        components (`dict[str, tuple[str, str] | None]`): Module and class of each component.
        settings (`dict`): Its other arguments.
    """
    index = {name: list(recorded or (None, None)) for name, recorded in components.items()} | settings
    # the version is that of the components, which diffusers wrote a moment ago
    version = json.loads((folder / "vae" / "config.json").read_text())["_diffusers_version"]
    index |= {"_class_name": pipeline_class.__name__, "_diffusers_version": version}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def recorded_class(model_class: type) -> tuple[str, str]:
    """How `model_index.json` names a class."""
    return model_class.__module__, model_class.__name__


def report(component: Component, folder: Path, left_out: dict[str, str]) -> None:
    """Say what was converted and, by its reason, what was left out."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{len(component.shapes)} tensors ({size / 1e9:.2f} GB) written and compared.")
    for reason in sorted(set(left_out.values())):
        print(f"Left out ({reason}): {_some([key for key in left_out if left_out[key] == reason])}")


# ---- Command lines ----


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all scripts for models have."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint_path", required=True, help="The original checkpoint; with --to_original the converted folder."
    )
    parser.add_argument("--config_path", help="The checkpoint's config.yaml; by default the one beside it.")
    parser.add_argument("--output_dir", required=True, help="Folder to write; must not exist or be empty.")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="Of the weights; the RQ-VAE's codebook keeps float32."
    )
    parser.add_argument(
        "--to_original", action="store_true", help="The other way: write a checkpoint in the original's form."
    )
    return parser


def config_beside(args: argparse.Namespace) -> Path:
    """The config.yaml of the checkpoint."""
    return Path(args.config_path) if args.config_path else Path(args.checkpoint_path).with_name("config.yaml")


def run(main: Callable[[], None]) -> None:
    """Run a script whose errors are one line for whoever started it."""
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {error}") from error
