"""What sampling costs: counted operations against the least that they can be, and time against the naive sampler.

    python benchmarks/sampling.py --pipeline pipelines/emoji-scenes --batch_size 8

First table: operations of one draft step, one guided revise step and one training step, counted by torch's
`FlopCounterMode` on the meta device (nothing is computed), over the analytic count of `benchmarks/flops.py`, for the
given pipeline and for the sizes of Table 1. Second table: seconds an image of the given pipeline, eager, draft and
revisions together, and the ratio to the naive sampler of the tests, both in this one run.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import flops
import torch
from torch.utils.flop_counter import FlopCounterMode

from rq_draft_revise import ContextualRQTransformerModel, DraftAndRevisePipeline
from rq_draft_revise.conditions import condition_ids


PIPELINE = "DraftAndRevisePipeline"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the naive sampler is the tests' oracle

from naive_sampler import naive_draft_and_revise  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=str(ROOT / "pipelines/emoji-scenes"), help="Folder to time.")
    parser.add_argument("--prompt", default="a volcano at dusk", help="For a text-conditional pipeline.")
    parser.add_argument("--batch_size", type=int, default=8, help="Images at once.")
    parser.add_argument("--runs", type=int, default=3, help="Timed runs; the fastest counts.")
    parser.add_argument("--num_inference_steps", type=int, default=None, help="Default: the pipeline's.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", help="JSON file for the figures.")
    return parser.parse_args(argv)


def count_flops(config_folder: Path, batch_size: int) -> list[dict]:
    """Counted over analytic operations of the three kinds of step of one transformer config."""
    with torch.device("meta"):
        transformer = ContextualRQTransformerModel.from_config(
            {**ContextualRQTransformerModel.load_config(config_folder), "dropout": 0.0}
        )
    config = transformer.config
    shape = (batch_size, config.height, config.width, config.code_depth)
    defaults = json.loads((config_folder.parent / "scheduler/scheduler_config.json").read_text())

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(*shape, dtype=dtype, device="meta")

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
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            transformer(**arguments)
        return counter.get_total_flops()

    def training(block_size):
        condition = {}
        if config.num_classes is not None:
            condition["class_labels"] = zeros(batch_size, dtype=torch.int64)
        elif config.text_vocab_size is not None:
            condition["input_ids"] = zeros(batch_size, config.max_text_length, dtype=torch.int64)
        positions = zeros(batch_size, block_size, dtype=torch.int64)
        labels = zeros(shape, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            transformer(labels, positions, labels=labels, **condition).loss.backward()
        return counter.get_total_flops()

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
    return [dict(step=name, gflop=count / 1e9, counted_over_analytic=count / least) for name, count, least in rows]


def fastest(function, runs: int, device: torch.device) -> float:
    """Seconds of the fastest of some runs, after one to warm up."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def time_sampling(args) -> dict:
    """Seconds an image of the fast and of the naive sampler, decoding left out, and whether their codes are equal."""
    device = torch.device(args.device)
    pipe = DraftAndRevisePipeline.from_pretrained(args.pipeline, torch_dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    transformer, scheduler = pipe.transformer, pipe.scheduler
    condition, naive = {}, {}
    if transformer.config.text_vocab_size is not None:
        condition["prompt"] = [args.prompt] * args.batch_size
        naive = condition_ids(transformer, pipe.tokenizer, prompt=condition["prompt"], device=device)
    elif transformer.config.num_classes is not None:
        condition["class_labels"] = list(range(args.batch_size))
        naive["class_labels"] = torch.arange(args.batch_size, device=device)
    null = {name: torch.full_like(value, transformer.null_condition_id) for name, value in naive.items()}
    steps = args.num_inference_steps or scheduler.config.num_inference_steps

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(args.batch_size)]

    def fast():
        count = {} if condition else dict(num_images_per_prompt=args.batch_size)
        return pipe(
            **condition, **count, num_inference_steps=steps, generator=generators(), output_type="latent"
        ).images

    def slow():
        scheduler.set_timesteps(steps)
        codes = pipe.prepare_latents(args.batch_size)
        return naive_draft_and_revise(transformer, scheduler, codes, naive, null, generators())

    codes = fast()
    agreement = (codes == slow()).float().mean().item()
    fast_seconds, slow_seconds = fastest(fast, args.runs, device), fastest(slow, 1, device)
    decode_seconds = fastest(lambda: pipe.decode_latents(codes, "pt"), args.runs, device)
    return dict(
        batch_size=args.batch_size,
        num_inference_steps=steps,
        seconds_per_image=fast_seconds / args.batch_size,
        naive_seconds_per_image=slow_seconds / args.batch_size,
        naive_over_fast=slow_seconds / fast_seconds,
        decode_seconds_per_image=decode_seconds / args.batch_size,
        equal_codes=agreement,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def main(argv=None):
    args = parse_args(argv)
    given = Path(args.pipeline)
    configs = sorted(path.parent.parent for path in (ROOT / "pipelines").glob("*/transformer/config.json"))
    folders = [given] + [
        folder
        for folder in configs
        if folder.name != given.name
        and json.loads((folder / "model_index.json").read_text())["_class_name"] == PIPELINE
    ]
    report = {"flops": {}, "sampling": None}
    print(f"{'pipeline':<22}{'step':<15}{'GFLOP an image':>15}{'over analytic':>15}")
    for folder in folders:
        rows = count_flops(folder / "transformer", batch_size=2)
        report["flops"][folder.name] = rows
        for row in rows:
            print(f"{folder.name:<22}{row['step']:<15}{row['gflop'] / 2:>15.3f}{row['counted_over_analytic']:>15.4f}")
    report["sampling"] = time_sampling(args)
    print()
    for name, value in report["sampling"].items():
        print(f"{name:<26}{value:.4g}" if isinstance(value, float) else f"{name:<26}{value}")
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
