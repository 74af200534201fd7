"""What differs between devices: what they compute in, and when they have finished."""

import time

import torch


def sum_dtype(device: torch.device) -> torch.dtype:
    """For sums of many numbers: float64, in which the mean of one float32 is that number to the bit. Apple's GPUs have
    none, nor have some of Intel's: float32 on all but the CPU, CUDA and ROCm."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def float64_device(device: torch.device) -> torch.device:
    """Where to compute in float64 for `device`: on itself, or on the CPU."""
    return device if sum_dtype(device) == torch.float64 else torch.device("cpu")


def seconds_now(device: torch.device) -> float:
    """A clock for differences: of the process on the CPU, where other programs may run beside it, else of the wall,
    once the device has done its work."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()
