"""The budget of a training run, in optimizer steps and in seconds, and the learning rate that follows it."""

import math
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from accelerate import Accelerator


class Budget:
    """What a run may use up. The clock starts with the object.

    Args:
        accelerator: The run's; its process 0 has the clock that counts.
        max_train_steps (`int`): Optimizer steps.
        max_train_seconds (`float`, *optional*): Seconds of training; by default any number.
        seconds_before (`float`, defaults to 0): Seconds that a resumed run had already used.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        max_train_steps: int,
        max_train_seconds: float | None = None,
        seconds_before: float = 0.0,
    ):
        for name, value in (("max_train_steps", max_train_steps), ("max_train_seconds", max_train_seconds)):
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        self.max_train_steps, self.max_train_seconds = max_train_steps, max_train_seconds
        self._accelerator, self._started = accelerator, time.monotonic() - seconds_before

    def elapsed(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return time.monotonic() - self._started

    def fraction_used(self, step: int) -> float:
        """Of the steps or of the seconds, whichever is further on: 0 at the beginning, 1 or more when all is used up.

        Every process has to call it, and all get the same. The clock of process 0 counts: clocks that disagree would
        give the processes different learning rates, and so different weights.
        """
        fraction = step / self.max_train_steps
        if self.max_train_seconds is not None:
            seconds = self.elapsed()
            if self._accelerator.num_processes > 1:
                from accelerate.utils import broadcast

                seconds = broadcast(torch.tensor(seconds, device=self._accelerator.device)).item()
            fraction = max(fraction, seconds / self.max_train_seconds)
        return fraction

    def time_left(self, step: int) -> str:
        """At the pace so far, `[days, ]h:mm:ss`; a question mark where there is nothing to go by. Every process has to
        call it."""
        fraction = self.fraction_used(step)
        seconds = self.elapsed() * (1 - fraction) / fraction if fraction > 0 else math.inf
        return str(timedelta(seconds=max(0, round(seconds)))) if seconds < 1e8 else "?"


def warmup_at(step: int, fraction: float, warmup_steps: int = 0, warmup_share: float | None = None) -> float:
    """Share of the peak, linear up to 1, that the warm-up allows: by the steps or by the budget, whichever is further.

    Args:
        step (`int`): Optimizer steps done.
        fraction (`float`): From [`Budget.fraction_used`].
        warmup_steps (`int`, defaults to 0): Steps until the peak, the first of which already moves.
        warmup_share (`float`, *optional*): Fraction of the budget by which the warm-up is over, whatever the steps. By
            default the steps alone decide.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return warmup if warmup_share is None else max(warmup, min(1.0, fraction / warmup_share))


def learning_rate_at(
    step: int,
    fraction: float,
    peak: float,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    warmup_share: float | None = None,
) -> float:
    """The warm-up of [`warmup_at`], times a cosine of the budget's used `fraction` down to 0.

    The fraction and not the step drives the cosine, so that a budget in seconds ends at learning rate 0 too.

    Args:
        step (`int`): Optimizer steps done.
        fraction (`float`): From [`Budget.fraction_used`], in [0, 1]; beyond counts as 1.
        peak (`float`): The learning rate after the warm-up.
        schedule (`str`, defaults to `"cosine"`): Or `"constant"`, which stays at the peak.
        warmup_steps (`int`, defaults to 0), warmup_share (`float`, *optional*): See [`warmup_at`].

    Raises:
        `ValueError`: an unknown `schedule`.
    """
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"`schedule` must be 'cosine' or 'constant', got {schedule!r}.")
    warmup = warmup_at(step, fraction, warmup_steps, warmup_share)
    decay = 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0))) if schedule == "cosine" else 1.0
    return peak * warmup * decay
