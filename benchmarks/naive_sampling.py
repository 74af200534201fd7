"""Seconds an image of the fast sampler and of the naive one of the tests, and whether they draw the same codes.

    OMP_NUM_THREADS=1 python benchmarks/naive_sampling.py --batch_size 8

The naive sampler sends every position through depth blocks and head, one full pass a depth, has no cache of the prefix
and makes a second pass for guidance. Both in one run, with the pipeline's weights and defaults, eager, in float32; on
the CPU in process time.
"""

import argparse
import json
import sys
from pathlib import Path

import limits
import torch

from rq_draft_revise import DraftAndRevisePipeline
from rq_draft_revise.conditions import condition_ids


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the naive sampler is the tests' oracle

from naive_sampler import naive_draft_and_revise  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", default=str(ROOT / "pipelines/emoji-scenes"), help="Folder to time.")
    parser.add_argument("--prompt", default="a volcano at dusk", help="For a text-conditional pipeline.")
    parser.add_argument("--batch_size", type=int, default=8, help="Images at once.")
    parser.add_argument("--runs", type=int, default=3, help="Timed runs of the fast one; the fastest counts.")
    parser.add_argument("--num_inference_steps", type=int, default=None, help="Default: the pipeline's.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", help="JSON file for the figures.")
    return parser.parse_args(argv)


def time_sampling(args) -> dict:
    """Seconds an image of the fast and of the naive sampler, decoding left out, and whether their codes are equal."""
    device = torch.device(args.device)
    pipe = DraftAndRevisePipeline.from_pretrained(args.pipeline, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    transformer, scheduler = pipe.transformer, pipe.scheduler
    condition, naive = {}, {}
    if transformer.config.text_vocab_size is not None:
        condition["prompt"] = [args.prompt] * args.batch_size
        naive = condition_ids(transformer, pipe.tokenizer, prompt=condition["prompt"], device=device)
    elif transformer.config.num_classes is not None:
        naive["class_labels"] = torch.arange(args.batch_size, device=device) % transformer.config.num_classes
        condition["class_labels"] = naive["class_labels"].tolist()
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

    def seconds(function, runs):
        return min(limits.seconds(function, device) for _ in range(runs))

    codes = fast()
    agreement = (codes == slow()).float().mean().item()
    fast_seconds, slow_seconds = seconds(fast, args.runs), seconds(slow, 1)
    return dict(
        batch_size=args.batch_size,
        num_inference_steps=steps,
        seconds_per_image=fast_seconds / args.batch_size,
        naive_seconds_per_image=slow_seconds / args.batch_size,
        naive_over_fast=slow_seconds / fast_seconds,
        equal_codes=agreement,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def main(argv=None):
    args = parse_args(argv)
    report = time_sampling(args)
    for name, value in report.items():
        print(f"{name:<26}{value:.4g}" if isinstance(value, float) else f"{name:<26}{value}")
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
