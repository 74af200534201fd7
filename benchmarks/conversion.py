"""Convert a random checkpoint of a published size there and back, and say what it took.

    python benchmarks/conversion.py --size rq-imagenet-256-3.8b --dtype bfloat16
    python benchmarks/conversion.py --size rq-imagenet-256-480m --dtype float32 --logits

It writes `stage2/model.pt` and `config.yaml` of the authors' layout with random weights, converts them with
`conversion_scripts/convert_rq_transformer_to_diffusers.py`, converts the result back with `--to_original`, and
compares every tensor with the first, one at a time. With `--logits` it also computes the logits of one image in
float64 by the converted model and by the tests' reference, which takes 16 bytes of memory a parameter and more.

Peak memory is that of the converting process: what it holds itself (RssAnon), without the mapped files, which the
system takes back as it needs. Disk: three times the checkpoint.
"""

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "conversion_scripts")]

import original_models as original  # noqa: E402
from test_conversion_models import PUBLISHED, check_transformer, published_config  # noqa: E402

from rq_draft_revise import RQTransformerModel  # noqa: E402


def write_checkpoint(folder: Path, name: str, dtype: torch.dtype) -> int:
    """A folder with `model.pt` and `config.yaml` of random weights; returns the number of parameters."""
    config = published_config(name)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in original.rq_transformer_shapes(config).items():
        # As a layer starts out: activations neither explode nor vanish.
        scale = 1 / math.sqrt(shape[-1]) if len(shape) > 1 and "emb" not in key else 0.1
        weights[key] = torch.empty(shape, dtype=dtype).normal_(std=scale, generator=generator)
    folder.mkdir(parents=True)
    torch.save({"state_dict": weights}, folder / "model.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return sum(math.prod(tensor.shape) for tensor in weights.values())


def run(*arguments: str) -> tuple[float, float]:
    """Run a conversion script; returns seconds, and the most memory that it held itself, in GB."""
    started, peak = time.perf_counter(), 0
    script = ROOT / "conversion_scripts" / "convert_rq_transformer_to_diffusers.py"
    process = subprocess.Popen([sys.executable, str(script), *arguments], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            held = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            peak = max(peak, int(held.split()[1]) * 1024)
        except (OSError, StopIteration):  # it ended in between
            pass
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{script.name} {' '.join(arguments)} failed.")
    return time.perf_counter() - started, peak / 1e9


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=PUBLISHED, default="rq-imagenet-256-3.8b")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--logits", action="store_true", help="Compare the logits of one image as well.")
    parser.add_argument("--folder", help="Where to work; by default a temporary folder.")
    args = parser.parse_args(argv)

    work = Path(tempfile.mkdtemp(prefix="conversion.", dir=args.folder))
    try:
        num_parameters = write_checkpoint(work / "stage2", args.size, getattr(torch, args.dtype))
        # The transformer reads codes in the codebook of the RQ-VAE that it was trained on.
        vae = original.rqvae_config(original.IMAGENET_AUTOENCODER, n_embed=PUBLISHED[args.size][4], code_depth=4)
        (work / "stage1").mkdir()
        rqvae = original.random_rqvae(vae)
        torch.save({"state_dict": rqvae}, work / "stage1" / "model.pt")
        (work / "stage1" / "config.yaml").write_text(yaml.safe_dump(vae))
        there = run("--checkpoint_path", f"{work}/stage2/model.pt", "--config_path", f"{work}/stage2/config.yaml",
                    "--rqvae_path", f"{work}/stage1/model.pt", "--output_dir", f"{work}/transformer",
                    "--dtype", args.dtype)  # fmt: skip
        shards = len(list((work / "transformer").glob("*.safetensors")))
        back = run("--checkpoint_path", f"{work}/transformer", "--output_dir", f"{work}/back", "--to_original",
                   "--dtype", args.dtype)  # fmt: skip
        load = {"map_location": "cpu", "mmap": True, "weights_only": True}
        before = torch.load(work / "stage2" / "model.pt", **load)["state_dict"]
        after = torch.load(next((work / "back").rglob("*.pt")), **load)["state_dict"]
        equal = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        print(f"{args.size}, {num_parameters:,} parameters, {args.dtype}: {shards} shards; there {there[0]:.0f} s, "
              f"{there[1]:.1f} GB; back {back[0]:.0f} s, {back[1]:.1f} GB; every key, shape and value as before: "
              f"{equal}")  # fmt: skip
        if args.logits:
            transformer = RQTransformerModel.from_pretrained(work / "transformer").eval()
            codes = torch.randint(PUBLISHED[args.size][4], (1, 8, 8, 4), generator=torch.Generator().manual_seed(0))
            difference = check_transformer(transformer, before, published_config(args.size), rqvae, codes)
            print(f"logits in float64 as the reference's, within 1e-9; in float32 within {difference:.1e}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
