"""Make a trained pipeline ready to publish: cast, in small files, without the paths of the machine that made it.

    python examples/export_pipeline.py runs/emoji-transformer pipelines/emoji-scenes --dtype float16

What is written is loaded again and compared; weights of the same variant that `output_dir` had are replaced. Where it
has no README.md yet, the pipeline's own is copied, or one is written of what is known.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import torch

from rq_draft_revise.model_card import copy_card, model_card, only_variant
from rq_draft_revise.publishing import pipeline_class_of


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", help="Folder of the trained pipeline.")
    parser.add_argument("output_dir", help="Folder to write; files of the same names are replaced.")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float16", help="Of the weights; the RQ-VAE's codebook stays float32."
    )
    parser.add_argument("--variant", help="Names the files of weights, such as fp16.")
    parser.add_argument("--max_shard_size", default="16MB", help="Of each file of weights.")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    source, folder = Path(args.pipeline), Path(args.output_dir)
    pipe = load_pipeline(source, DTYPES[args.dtype])
    partial = folder.resolve().with_name(folder.resolve().name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_pipeline(pipe, partial, args.max_shard_size, args.variant)
        replace_files(partial, folder, args.variant)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    compare(pipe, folder, DTYPES[args.dtype], args.variant)
    if not (folder / "README.md").exists() and not copy_card(source, folder, folder.as_posix()):
        model_card(pipe, folder.as_posix(), variant=args.variant).save(folder / "README.md")
    files = [path for path in folder.glob("**/*") if path.is_file()]
    print(f"Wrote {folder}: {sum(path.stat().st_size for path in files) / 1e6:.1f} MB in {len(files)} files.")


def write_pipeline(pipe, folder: Path, max_shard_size: str, variant: str | None) -> None:
    """Save, without the paths of this machine."""
    pipe.save_pretrained(folder, max_shard_size=max_shard_size, variant=variant)
    for path in [folder / "model_index.json", *sorted(folder.glob("*/*config.json"))]:
        content = json.loads(path.read_text(encoding="utf-8"))
        for name in ("_name_or_path", "is_local", "local_files_only"):
            content.pop(name, None)
        if content.get("tokenizer_class") == "TokenizersBackend":
            # transformers 5 renamed the class; 4 and 5 both know the old name
            content["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_files(source: Path, folder: Path, variant: str | None) -> None:
    """Move all files of `source` into `folder`, and delete there what its components had as weights of `variant`.

    An index of shards that stays behind would be read in place of a single file.
    """
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source / file, folder / file)  # also where `folder` is a disk of its own
    suffix = "" if variant is None else rf"\.{re.escape(variant)}"
    weights = re.compile(
        rf"diffusion_pytorch_model({suffix}(-\d+-of-\d+)?\.safetensors|\.safetensors\.index{suffix}\.json)"
    )
    for component in {file.parent for file in files}:
        for path in (folder / component).iterdir():
            if weights.fullmatch(path.name) and path.relative_to(folder) not in files:
                path.unlink()


def compare(pipe, folder: Path, dtype: torch.dtype, variant: str | None) -> None:
    """Load the pipeline in `folder`; raise a `ValueError` where its weights are not those of `pipe`."""
    loaded = type(pipe).from_pretrained(folder, dtype=dtype, variant=variant)
    for name, component in pipe.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        expected, got = component.state_dict(), getattr(loaded, name).state_dict()
        for key in expected.keys() | got.keys():
            if key not in expected or key not in got or not same(expected[key], got[key]):
                raise ValueError(f"{folder / name} was not written as meant: {key} differs when it is read again.")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def load_pipeline(folder: Path, dtype: torch.dtype):
    """A pipeline of whichever class of this package its index names, cast."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"`pipeline` must be the folder of a pipeline, got {folder}, without a model_index.json.")
    return pipeline_class_of(folder).from_pretrained(folder, dtype=dtype, variant=only_variant(folder))


if __name__ == "__main__":
    main()
