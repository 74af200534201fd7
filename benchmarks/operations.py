"""Operations of the steps of sampling and training, counted, over the least that they can be.

    python benchmarks/operations.py

Counted by torch's `FlopCounterMode` on the meta device, where nothing is computed, over the analytic count of
`benchmarks/flops.py`, for all pipelines: a draft step, a guided revise step and a training step, or of the
autoregressive baseline a whole image and a training step. At 1.0000 nothing is computed and thrown away.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import flops
import torch
from torch.utils.flop_counter import FlopCounterMode

from rq_draft_revise import ContextualRQTransformerModel, RQTransformerModel


ROOT = Path(__file__).resolve().parents[1]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipelines", nargs="+", help="Folders, of which only configs are read. Default: all.")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--output", help="JSON file for the figures.")
    return parser.parse_args(argv)


def count(function: Callable) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device="meta")


def conditions(config, rows: int) -> dict[str, torch.Tensor]:
    if config.num_classes is not None:
        return {"class_labels": zeros(rows, dtype=torch.int64)}
    if config.text_vocab_size is not None:
        return {"input_ids": zeros(rows, config.max_text_length, dtype=torch.int64)}
    return {}


def as_ratios(rows: list[tuple[str, int, int]]) -> list[dict]:
    return [dict(step=name, gflop=count / 1e9, counted_over_analytic=count / least) for name, count, least in rows]


def count_flops(config_folder: Path, batch_size: int) -> list[dict]:
    """Counted over analytic operations of the kinds of step of one transformer config."""
    index = json.loads((config_folder.parent / "model_index.json").read_text())
    if index["_class_name"] == "RQTransformerPipeline":
        return count_autoregressive_flops(config_folder, batch_size)
    with torch.device("meta"):
        transformer = ContextualRQTransformerModel.from_config(
            {**ContextualRQTransformerModel.load_config(config_folder), "dropout": 0.0}
        )
    config = transformer.config
    shape = (batch_size, config.height, config.width, config.code_depth)
    defaults = json.loads((config_folder.parent / "scheduler/scheduler_config.json").read_text())

    def sampling(block_size, guided):
        arguments = dict(
            codes=zeros(shape, dtype=torch.int64),
            positions=zeros(batch_size, block_size, dtype=torch.int64),
            uniforms=zeros(batch_size, block_size, config.code_depth),
        )
        if guided:
            arguments["guidance_scale"] = zeros(())
        if transformer.prefix_length:
            heads = (config.num_attention_heads, config.attention_head_dim)
            rows = batch_size * (1 + guided)
            arguments["prefix_key_values"] = zeros(
                config.num_spatial_layers, 2, rows, transformer.prefix_length, *heads
            )
        with torch.no_grad():
            return count(lambda: transformer(**arguments))

    def training(block_size):
        positions = zeros(batch_size, block_size, dtype=torch.int64)
        labels = zeros(shape, dtype=torch.int64)
        condition = conditions(config, batch_size)
        return count(lambda: transformer(labels, positions, labels=labels, **condition).loss.backward())

    num_positions = transformer.num_positions
    draft = max(1, num_positions // defaults["num_inference_steps"])
    revise = num_positions // defaults["num_revise_steps"]
    guided = bool(transformer.prefix_length) and defaults["guidance_scale"] != 1
    masked = round(num_positions * 0.64)  # mean of the cosine schedule, 2/π
    rows = [
        ("draft step", sampling(draft, False), flops.sampling_step(config, batch_size, draft)),
        ("revise step", sampling(revise, guided), flops.sampling_step(config, batch_size, revise, guided)),
        (
            "training step",
            training(masked),
            flops.teacher_forcing(config, batch_size, batch_size * masked, trained=True),
        ),
    ]
    return as_ratios(rows)


def count_autoregressive_flops(config_folder: Path, batch_size: int) -> list[dict]:
    """The same for the autoregressive baseline: all steps of an image without guidance, and a training step."""
    with torch.device("meta"):
        transformer = RQTransformerModel.from_config({**RQTransformerModel.load_config(config_folder), "dropout": 0.0})
    config, positions = transformer.config, transformer.num_positions
    codes = zeros(batch_size, config.height, config.width, config.code_depth, dtype=torch.int64)
    condition = conditions(config, batch_size)

    caches = []
    step = dict(position=zeros(1, dtype=torch.int64), uniforms=zeros(batch_size, config.code_depth), codes=codes)
    with torch.no_grad():
        sampled = count(lambda: caches.append(transformer(**condition or {"codes": codes}).past_key_values))
        # the cache has one size in all steps, so all cost the same
        sampled += positions * count(lambda: transformer(**step, past_key_values=caches[0], **condition))
    steps = sum(flops.autoregressive_step(config, batch_size, position) for position in range(positions))
    trained = count(lambda: transformer(labels=codes, **condition).loss.backward())
    return as_ratios(
        [
            ("image", sampled, flops.autoregressive_prefix(config, batch_size) + steps),
            ("training step", trained, flops.autoregressive_teacher_forcing(config, batch_size, trained=True)),
        ]
    )


def main(argv=None):
    args = parse_args(argv)
    folders = [Path(folder) for folder in args.pipelines or []]
    folders = folders or sorted(path.parents[1] for path in (ROOT / "pipelines").glob("*/transformer/config.json"))
    report = {}
    print(f"{'pipeline':<30}{'step':<15}{'GFLOP an image':>15}{'over analytic':>15}")
    for folder in folders:
        report[folder.name] = rows = count_flops(folder / "transformer", args.batch_size)
        for row in rows:
            gflop = row["gflop"] / args.batch_size
            print(f"{folder.name:<30}{row['step']:<15}{gflop:>15.3f}{row['counted_over_analytic']:>15.4f}")
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
