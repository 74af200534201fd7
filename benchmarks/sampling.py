"""What sampling costs: seconds an image, memory, and the share of the hardware's limit, of several models in one run.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py                       # small models of equal width, on the CPU
    python benchmarks/sampling.py --device cuda --output sampling.json --plot sampling.png      # the published sizes
    python benchmarks/sampling.py --device cuda --profile profile         # with torch.profiler's table of each case

A *case* is a pipeline and a number of draft steps, at a batch size, a dtype and a mode. Weights are random, made in
the dtype on the device; the calls are those a user makes, with the defaults of the pipeline's config, up to the codes.
The RQ-VAE's decoding is timed apart. Cases of one batch size, dtype and mode take turns, and the median of their runs
counts. The mode is `eager`, `blocks` (each block is compiled, diffusers' `compile_repeated_blocks`), `cudagraphs` (the
eager kernels of the transformer's call, replayed as one CUDA graph), `blocks-cudagraphs` (the same of compiled
blocks), or a mode of `torch.compile`, in which the transformer's call is one graph; `reduce-overhead` and
`max-autotune` replay that as a CUDA graph. With `--max_seconds`, cases are left out, and named, of which a run must
take longer than that by their operations alone, and no case is run again once its runs have taken as long together.

*Share* is the least time that the hardware allows, as `benchmarks/limits.py` defines it, over the time measured, with
rate and bandwidth measured in this run. Then the ratios that must hold are printed, each with its figures:

(a) a model with codes of depth D > 1 is at least 10 times faster a sample than one of equal width and blocks with
    D = 1 and more positions, each with its own T_draft (published: 0.08 and 0.83 s);
(b) with T_draft 8 a run takes at most 1.15 times its share of the FLOPs of a run with the pipeline's T_draft. Both
    runs are whole ones but for the decoding: condition, draft, and all revisions of the pipeline's config;
(c) on an accelerator, batch 100, bfloat16, compiled: ImageNet 371M in 10 ms a sample, 821M in 20 ms.

On the CPU there is one thread, and the times are process time, so that other programs on the machine do not count but
for what they take of the caches; memory is the peak of the whole process, torch included.
"""

import argparse
import platform
import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import limits
import torch
from random_pipelines import build_pipeline, compile_step
from sampling_report import laws, print_report

from rq_draft_revise import DraftAndRevisePipeline
from rq_draft_revise.provenance import git_revision, library_versions, write_json


ROOT = Path(__file__).resolve().parents[1]
SMALL = ["cifar10-32", "table-2-cifar10-vq", "table-2-cifar10-ar"]
PUBLISHED = ["imagenet-256-371m", "imagenet-256-821m", "imagenet-256-1.4b", "imagenet-256-vq-350m",
             "rq-imagenet-256-1.4b", "cc3m-256-366m", "cc3m-256-654m"]  # fmt: skip
SHORT_DRAFT = 8
GRAPHED_MODES = ["cudagraphs", "blocks-cudagraphs"]
COMPILED_MODES = ["blocks", *GRAPHED_MODES, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipelines", nargs="+", help="Folders, of which only configs are read. Default: see above.")
    parser.add_argument("--batch_sizes", nargs="+", type=int, help="Default: 1 16 100, on the CPU 1 4.")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument(
        "--modes", nargs="+", choices=["eager", *COMPILED_MODES], help="Default: eager, blocks, and both CUDA graphs."
    )
    parser.add_argument("--fuse_qkv", action="store_true", help="One matrix product for queries, keys and values.")
    parser.add_argument("--runs", type=int, default=3, help="Timed runs of each case; the median counts.")
    parser.add_argument("--max_seconds", type=float, default=float("inf"), help="See above.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", help="JSON file for the figures.")
    parser.add_argument("--plot", help="PNG of the figures; needs matplotlib.")
    parser.add_argument("--profile", help="Folder for torch.profiler's table of one more run of each case.")
    args = parser.parse_args(argv)
    cpu = torch.device(args.device).type == "cpu"
    args.pipelines = args.pipelines or [str(ROOT / "pipelines" / name) for name in (SMALL if cpu else PUBLISHED)]
    args.batch_sizes = args.batch_sizes or ([1, 4] if cpu else [1, 16, 100])
    args.modes = args.modes or (["eager", "blocks"] if cpu else ["eager", "blocks", *GRAPHED_MODES])
    return args


@dataclass
class Case:
    """One row of the report."""

    pipeline: str
    num_inference_steps: int
    batch_size: int
    dtype: str
    mode: str
    width: tuple[int, int, int]  # d, spatial and depth blocks
    code_map: tuple[int, int, int]  # h, w, D
    draft_and_revise: bool
    parts: list[limits.Part]
    weight_bytes: int
    peak_memory: int = 0
    times: list[float] = field(default_factory=list)
    decode_times: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.pipeline}, T {self.num_inference_steps}"

    @property
    def read_megabytes(self) -> int:
        """Memory over which the bandwidth is measured: as much as the weights take."""
        return max(1, round(self.weight_bytes / 1e6))

    @property
    def seconds(self) -> float:
        """An image."""
        return median(self.times) / self.batch_size

    @property
    def flops(self) -> float:
        """An image."""
        return sum(part.times * part.flops for part in self.parts) / self.batch_size

    def figures(self, rates: dict[str, float], bandwidths: dict[int, float]) -> dict:
        least = limits.least_seconds(self.parts, rates[self.dtype], bandwidths[self.read_megabytes])
        left_out = ("parts", "weight_bytes", "peak_memory", "times", "decode_times", "draft_and_revise")
        return {name: value for name, value in asdict(self).items() if name not in left_out} | {
            "seconds_per_image": self.seconds,
            "images_per_second": 1 / self.seconds,
            "spread": (max(self.times) - min(self.times)) / median(self.times),
            "decode_seconds_per_image": median(self.decode_times) / self.batch_size,
            "peak_memory_gb": self.peak_memory / 1e9,
            "weights_gb": self.weight_bytes / 1e9,
            "gflop_per_image": self.flops / 1e9,
            "tflops": self.flops / self.seconds / 1e12,
            "least_seconds_per_image": least["least"] / self.batch_size,
            "share_of_limit": least["least"] / self.batch_size / self.seconds,
            "least_seconds_of_operations": least["operations"] / self.batch_size,
            "least_seconds_of_bytes": least["bytes"] / self.batch_size,
        }


def cases_of(name: str, pipe, batch_size: int, dtype: str, mode: str) -> list[Case]:
    """The pipeline's own T_draft, and a short draft where there are stacks of several codes."""
    config = pipe.transformer.config
    draft_and_revise = isinstance(pipe, DraftAndRevisePipeline)
    lengths = [pipe.scheduler.config.num_inference_steps if draft_and_revise else pipe.transformer.num_positions]
    if draft_and_revise and config.code_depth > 1 and lengths[0] > SHORT_DRAFT:
        lengths.append(SHORT_DRAFT)
    cases = []
    for length in lengths:
        if draft_and_revise:
            parts = limits.draft_and_revise_parts(pipe.transformer, pipe.scheduler.config, batch_size, length)
        else:
            parts = limits.autoregressive_parts(pipe.transformer, batch_size, guided=pipe.config.guidance_scale != 1)
        cases.append(
            Case(
                pipeline=name,
                num_inference_steps=length,
                batch_size=batch_size,
                dtype=dtype,
                mode=mode,
                width=(
                    config.num_attention_heads * config.attention_head_dim,
                    config.num_spatial_layers,
                    config.num_depth_layers,
                ),
                code_map=(config.height, config.width, config.code_depth),
                draft_and_revise=draft_and_revise,
                parts=parts,
                weight_bytes=sum(p.numel() * p.element_size() for p in pipe.transformer.parameters()),
            )
        )
    return cases


def sample(pipe, case: Case, warm_up: bool = False) -> torch.Tensor:
    """One call, up to the codes. To warm up, all but the first two blocks of the draft are known: no other shapes."""
    config, size = pipe.transformer.config, case.batch_size
    arguments = {"generator": [torch.Generator().manual_seed(seed) for seed in range(size)], "output_type": "latent"}
    if config.num_classes is not None:
        arguments["class_labels"] = [row % config.num_classes for row in range(size)]
    elif config.text_vocab_size is not None:
        arguments["prompt"] = ["a volcano at dusk"] * size
    else:
        arguments["num_images_per_prompt"] = size
    if case.draft_and_revise:
        arguments["num_inference_steps"] = case.num_inference_steps
        if warm_up and case.num_inference_steps > 2:
            latents = pipe.prepare_latents(size)
            block = pipe.transformer.num_positions // case.num_inference_steps
            latents.flatten(1, 2)[:, 2 * block :] = 0
            arguments |= {"latents": latents, "num_inference_steps": 2, "num_revisions": 1}
            arguments.pop("num_images_per_prompt", None)
    return pipe(**arguments).images


def time_cases(pipes: dict, cases: list[Case], args, device: torch.device) -> None:
    """Fill in times and memory; the cases take turns."""
    for case in cases:
        others = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        limits.reset_peak_memory(device)
        # Twice, as torch.compile records a CUDA graph at the second call, also of the condition. A graph takes its
        # memory when it is recorded, so the peak is that of these calls: the run's own shapes.
        for _ in range(2):
            sample(pipes[case.pipeline], case, warm_up=True)
        own = case.weight_bytes if device.type == "cuda" else 0  # of the models in memory only this one
        case.peak_memory = limits.peak_memory(device) - others + own
    for run in range(args.runs):
        for case in cases:
            if sum(case.times) > args.max_seconds:
                continue
            pipe = pipes[case.pipeline]
            codes = []
            case.times.append(limits.seconds(lambda: codes.append(sample(pipe, case)), device))  # noqa: B023
            decode = lambda: pipe.decode_latents(codes[0], "pt")  # noqa: B023, E731
            if run == 0:
                decode()  # to warm up
            case.decode_times.append(limits.seconds(decode, device))


def profile(pipes: dict, cases: list[Case], folder: Path, device: torch.device) -> None:
    """torch.profiler's table of one run of each case, the operators that take longest first."""
    folder.mkdir(parents=True, exist_ok=True)
    cpu = device.type == "cpu"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (not cpu)
    for case in cases:
        with torch.profiler.profile(activities=activities) as profiler:
            sample(pipes[case.pipeline], case)
        table = profiler.key_averages().table(
            sort_by="self_cpu_time_total" if cpu else "self_device_time_total", row_limit=40, max_name_column_width=70
        )
        name = f"{case.pipeline}-T{case.num_inference_steps}-{case.dtype}-{case.mode}-batch{case.batch_size}.txt"
        (folder / name).write_text(f"{case.name}, {case.seconds:.4g} s an image without the profiler\n\n{table}\n")


def report_of(cases: list[Case], left_out: list[Case], rates: dict, bandwidths: dict, args) -> dict:
    """All that was measured, and of what."""
    device = torch.device(args.device)
    return {
        "command": shlex.join(sys.argv),
        "git_revision": git_revision(),
        "seed": 0,
        "versions": library_versions(),
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "flop_per_second": rates,
            "bytes_per_second_over_mb": {str(size): value for size, value in sorted(bandwidths.items())},
        },
        "runs": args.runs,
        "left_out": [f"{case.name}, batch {case.batch_size}, {case.dtype}, {case.mode}" for case in left_out],
        "cases": [case.figures(rates, bandwidths) for case in cases],
        "laws": laws(cases, on_cpu=device.type == "cpu"),
    }


def main(argv=None):
    args = parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # all sizes of the batch and of the block are graphs of their own
    cases, left_out, rates, bandwidths = [], [], {}, {}
    for dtype in args.dtypes:
        for mode in args.modes:
            folders = [Path(folder) for folder in args.pipelines]
            pipes = {folder.name: build_pipeline(folder, getattr(torch, dtype), device) for folder in folders}
            for pipe in pipes.values():
                if args.fuse_qkv:
                    pipe.transformer.fuse_qkv_projections()
                compile_step(pipe, mode)
            for batch_size in args.batch_sizes:
                # between the cases, so that rates and times are of the same hour of a machine that is shared
                rates[dtype] = max(rates.get(dtype, 0), limits.matrix_product_rate(device, getattr(torch, dtype)))
                group = []
                for name, pipe in pipes.items():
                    for case in cases_of(name, pipe, batch_size, dtype, mode):
                        fits = case.flops * batch_size / rates[dtype] <= args.max_seconds
                        (group if fits else left_out).append(case)
                time_cases(pipes, group, args, device)
                for size in {case.read_megabytes for case in group}:
                    bandwidths[size] = max(bandwidths.get(size, 0), limits.bandwidth(device, size * 10**6))
                if args.profile:
                    profile(pipes, group, Path(args.profile), device)
                cases += group
                for case in group:
                    print(f"{case.name}, batch {batch_size}, {dtype}, {mode}: {case.seconds:.4g} s", file=sys.stderr)
                report = report_of(cases, left_out, rates, bandwidths, args)
                if args.output:  # after each group, so that a run cut short leaves what it has
                    write_json(Path(args.output), report)
                if mode in GRAPHED_MODES:
                    for pipe in pipes.values():
                        pipe.transformer.forward.clear()
                elif mode != "eager":
                    torch.compiler.reset()
            del pipes, pipe
    print_report(report)
    if args.plot:
        from sampling_plot import plot

        plot(report, args.plot)


if __name__ == "__main__":
    main()
