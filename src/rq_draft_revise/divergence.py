"""Steps whose loss or gradient is not a number: left out, counted, and after too many of them the end of the run."""

from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from accelerate import Accelerator


class NonFiniteGuard:
    """Decides, once an optimizer step and before it is taken, whether to take it.

        grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
        if guard.accepts(loss, grad_norm):
            optimizer.step()
            ema.step(...)
        optimizer.zero_grad()

    One process with a non-finite value makes all leave the step out: otherwise their weights would part.

    *float16.* Its `GradScaler` multiplies the loss by a scale that it has to find, from 65,536 down, and an overflow
    of the *gradient* is how it notices that the scale is too large. Such a step is left out too, and this class then
    lowers the scale as `optimizer.step()` would have done, but it does not count towards `max_in_row` while the scale
    is above 1: no more than 16 halvings can pass so. At a scale of 1 or less the gradient itself has overflowed.

    Args:
        accelerator: The run's.
        max_in_row (`int`): So many steps left out one after the other are an error. At least 1.

    Attributes:
        num_skipped (`int`): Steps left out so far, those of the scale's search included. A resumed run may set it.
        is_loss_bad (`bool`): The loss of the last step asked about was not finite, in any process.

    Raises:
        `ValueError`: `max_in_row` below 1.
    """

    def __init__(self, accelerator: "Accelerator", max_in_row: int):
        if max_in_row < 1:
            raise ValueError(f"`max_in_row` must be at least 1, got {max_in_row}.")
        self.max_in_row, self.num_skipped, self.is_loss_bad = max_in_row, 0, False
        self._accelerator, self._in_row = accelerator, 0

    def accepts(self, loss: torch.Tensor, grad_norm: torch.Tensor | float | None) -> bool:
        """Whether to take the step; the same answer in every process. All have to ask, once a step.

        This waits for the device.

        Args:
            loss (`torch.Tensor`, scalar): This process's loss.
            grad_norm (scalar `torch.Tensor` or `float`, *optional*): What `accelerator.clip_grad_norm_` returned, or
                None where nothing is clipped.

        Raises:
            `RuntimeError`: this is the `max_in_row`-th non-finite step in a row.
        """
        if hasattr(grad_norm, "full_tensor"):  # FSDP2 returns it as a distributed tensor
            grad_norm = grad_norm.full_tensor()
        grad_norm = None if grad_norm is None else torch.as_tensor(grad_norm)  # DeepSpeed returns it as a float
        finite = [torch.isfinite(value.detach()) for value in (loss, grad_norm) if value is not None]
        bad = torch.stack([~value.to(self._accelerator.device) for value in finite]).int()
        if self._accelerator.num_processes > 1:
            bad = self._accelerator.reduce(bad, "sum")
        bad_loss, bad_gradient = (bad.tolist() + [0])[:2]
        self.is_loss_bad = bool(bad_loss)
        if not bad_loss and not bad_gradient:
            self._in_row = 0
            return True

        self.num_skipped += 1
        scaler = self._accelerator.scaler
        searching = scaler is not None and not bad_loss and scaler.get_scale() > 1
        if scaler is not None and grad_norm is not None:
            # Clipping has unscaled the gradients and noted the overflow. Without this the scale would never fall, and
            # the next step's unscaling would be refused as the second of the same step.
            scaler.update()
        if not searching:
            self._in_row += 1
        if self._in_row >= self.max_in_row:
            what = " and the ".join(["loss"] * bool(bad_loss) + ["gradient's norm"] * bool(bad_gradient))
            raise RuntimeError(
                f"The {what} has been NaN or infinite for {self._in_row} optimizer steps in a row, so the run stops; "
                "the weights are those of the last finite step. Usual causes: a learning rate too high or warmed up "
                "too fast (--learning_rate, --lr_warmup_steps), gradients not clipped (--max_grad_norm), float16 "
                "where bfloat16 or float32 is needed (--mixed_precision), or data that are not numbers. Start "
                "again with one of them changed."
            )
        return False
