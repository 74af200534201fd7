"""Processes that wait for one another for as long as it takes.

A process group ends a run once a process has waited for ten minutes (NCCL), as the others must be dead. Where one
prepares a data set of which the others know nothing yet, or encodes a larger share, they are alive: such waits go
through a group of their own.
"""

import contextlib
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist


if TYPE_CHECKING:
    from accelerate import Accelerator


PATIENCE = timedelta(days=1)
_groups = {}  # by the default group, of which a process may have another later


def wait_for_everyone(accelerator: "Accelerator") -> None:
    """As `Accelerator.wait_for_everyone`, for up to a day.

    The first wait of a run, this or [`main_process_first`], has to be reached by all processes within the default
    group's timeout.
    """
    group = _patient_group(accelerator)
    if group is None:
        accelerator.wait_for_everyone()
    else:
        dist.barrier(group=group)


@contextlib.contextmanager
def main_process_first(accelerator: "Accelerator"):
    """As `Accelerator.main_process_first`: the others enter once the main process has left, after up to a day."""
    _patient_group(accelerator)  # made while all are here
    if not accelerator.is_main_process:
        wait_for_everyone(accelerator)
    yield
    if accelerator.is_main_process:
        wait_for_everyone(accelerator)


def _patient_group(accelerator: "Accelerator") -> "dist.ProcessGroup | None":
    """A group on the host, made by all processes together; None where there is nobody to wait for."""
    if accelerator.num_processes == 1 or not dist.is_initialized():
        return None
    default = dist.group.WORLD
    if default not in _groups:
        _groups[default] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _groups[default]
