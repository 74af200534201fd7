"""What a device can do, measured where it is used, and how long a run of a sampler must take on it at least.

A run is a chain of *parts*, each of which needs the result of the one before: in every step a pass of the spatial
transformer, then the D codes of the stacks, one after the other. A part has operations (`benchmarks/flops.py`) and
reads its weights and the keys and values it attends to. It may do both at once, so it takes no less than the longer of
the two; the parts follow each other, so a run takes no less than

    Σ over parts of max(operations / rate of a matrix product, bytes / bandwidth)

Activations count as nothing, since a better program might keep them on the chip. The depth transformer's weights are
read D times a step. The bandwidth is that of reading as much memory as the transformer's weights take: small models
live in a cache, and main memory is not their limit.
"""

import contextlib
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flops
import torch

from rq_draft_revise.devices import seconds_now


class Part(NamedTuple):
    """Operations and bytes of what is done at once, and how often it is done in a run."""

    flops: float
    bytes: float
    times: int = 1


def seconds(function: Callable, device: torch.device) -> float:
    """Of one call: process time on the CPU, so that other programs do not count, and else of the clock on the wall."""
    start = seconds_now(device)
    function()
    return seconds_now(device) - start


def matrix_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, the best of ten."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(10))


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes/s of going over `size` bytes of memory: the better of summing and of copying, the best of ten."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    read = min(seconds(source.sum, device) for _ in range(10))
    copy = min(seconds(lambda: target.copy_(source), device) for _ in range(10))
    return max(size / read, 2 * size / copy)


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far. Where the system does not let us, the peak is that of the process since it started."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the device, or on the CPU resident of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def block_sizes(num_positions: int, num_steps: int) -> list[int]:
    """Of a balanced partition."""
    bounds = [step * num_positions // num_steps for step in range(num_steps + 1)]
    return [end - start for start, end in zip(bounds, bounds[1:])]


def draft_and_revise_parts(transformer, scheduler, batch_size: int, num_inference_steps: int) -> list[Part]:
    """All parts of a run of the Draft-and-Revise pipeline, its decoding left out; what is not given is the default.

    Args:
        transformer ([`ContextualRQTransformerModel`]).
        scheduler: The scheduler's config.
        batch_size (`int`): Images, each with a condition of its own.
        num_inference_steps (`int`): T_draft.
    """
    config, itemsize = transformer.config, transformer.mask_embedding.element_size()
    dim, num_positions = config.num_attention_heads * config.attention_head_dim, transformer.num_positions
    spatial_weights = sum(p.numel() for p in transformer.blocks.parameters()) * itemsize
    depth_weights = sum(p.numel() for p in transformer.depth_transformer.parameters()) * itemsize
    conditional = transformer.prefix_length > 0
    phases = [(num_inference_steps, 1, conditional and scheduler.draft_guidance_scale != 1)]
    phases += [(scheduler.num_revise_steps, scheduler.num_revisions, conditional and scheduler.guidance_scale != 1)]
    guided_at_all = any(guided and times for _, times, guided in phases)
    prefix = flops.prefix(config, batch_size * (1 + guided_at_all))
    parts = [Part(prefix, spatial_weights)] if conditional else []
    for num_steps, times, guided in phases:
        rows = batch_size * (1 + guided)
        prefix = 2 * config.num_spatial_layers * rows * transformer.prefix_length * dim * itemsize
        for size in block_sizes(num_positions, num_steps):
            parts.append(Part(flops.spatial(config, batch_size, rows), spatial_weights + prefix, times))
            for depth in range(1, config.code_depth + 1):
                stacks = batch_size * size
                parts.append(Part(flops.depth_step(config, stacks, depth, guided), depth_weights, times))
    return parts


def autoregressive_parts(transformer, batch_size: int, guided: bool) -> list[Part]:
    """All parts of a run of the autoregressive baseline: a token a step, with all keys and values before it."""
    config, itemsize = transformer.config, transformer.position_embedding.element_size()
    dim, rows = config.num_attention_heads * config.attention_head_dim, batch_size * (1 + guided)
    spatial_weights = sum(p.numel() for p in transformer.blocks.parameters()) * itemsize
    depth_weights = sum(p.numel() for p in transformer.depth_transformer.parameters()) * itemsize
    parts = []
    if transformer.prefix_length > 1:
        parts.append(Part(flops.autoregressive_prefix(config, rows), spatial_weights))
    for position in range(transformer.num_positions):
        seen = transformer.prefix_length + position
        cache = 2 * config.num_spatial_layers * rows * seen * dim * itemsize
        operations = flops.autoregressive_spatial(config, batch_size, rows, position)
        parts.append(Part(operations, spatial_weights + cache))
        for depth in range(1, config.code_depth + 1):
            parts.append(Part(flops.depth_step(config, batch_size, depth, guided), depth_weights))
    return parts


def least_seconds(parts: list[Part], rate: float, bytes_per_second: float) -> dict[str, float]:
    """The bound above, and the seconds of the operations and of the bytes alone."""
    return {
        "least": sum(part.times * max(part.flops / rate, part.bytes / bytes_per_second) for part in parts),
        "operations": sum(part.times * part.flops for part in parts) / rate,
        "bytes": sum(part.times * part.bytes for part in parts) / bytes_per_second,
    }
