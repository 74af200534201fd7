"""A run of a training script: its beginning, what is done between its optimizer steps, and its averaged weights."""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from .budget import Budget
from .checkpoints import checkpoints_in, load_checkpoint, save_checkpoint
from .data import SkippedRows
from .divergence import NonFiniteGuard
from .flags import tracked
from .interruption import StopSignal
from .publishing import create_repository
from .training_log import LogWindow, TrainingLog


# ------------------------------------------------------------------------------------------------- the run's beginning


def make_accelerator(args) -> Accelerator:
    """The run's accelerator, from `mixed_precision`, `gradient_accumulation_steps`, `report_to`, `output_dir`, `seed`.

    The global random state is seeded the same in every process, so that all start from the same weights.

    Raises:
        `ValueError`: what accelerate would pass over in silence: float16 on a CPU, a tracker that is not installed.
    """
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir),
        # The only buffers are the codebook, which the second stage never changes, and its statistics, which
        # update_codebook keeps equal by itself. Sending them from process 0 before every forward would cost 16 MB a
        # step and hide a divergence.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu" and accelerator.scaler is None:
        raise ValueError("--mixed_precision must be 'no' or 'bf16' on a CPU, got 'fp16': that needs a GPU.")
    if args.report_to not in (None, "all") and not accelerator.log_with:
        raise ValueError(f"--report_to must name a tracker that is installed, got {args.report_to!r}.")
    set_seed(args.seed)
    return accelerator


def check_not_sharded(accelerator: Accelerator, what: str) -> None:
    """Refuse, with a `ValueError`, the ways to train that divide the weights of `what` among the processes."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(f"{what} trains by data parallelism (DDP), got {accelerator.distributed_type.value}.")


def open_output(args, accelerator: Accelerator) -> str | None:
    """Make the folder `output_dir` and, to be pushed to, the repository, whose id the main process gets.

    Raises:
        `ValueError`: there is a run in it, which this one neither resumes nor may overwrite.
    """
    if not accelerator.is_main_process:
        return None
    output_dir = Path(args.output_dir)
    is_resumed = args.resume_from_checkpoint is not None
    before = [] if is_resumed else checkpoints_in(output_dir)
    is_run = before or (output_dir / "train_log.jsonl").exists()
    if is_run and not is_resumed and not args.overwrite_output_dir:
        raise ValueError(
            f"--output_dir must not hold another run, got {output_dir}. --resume_from_checkpoint latest goes on with "
            "it, --overwrite_output_dir begins anew and deletes its checkpoints."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    repo_id = create_repository(args)
    args.hub_model_id = repo_id or args.hub_model_id  # which the card names
    if not is_resumed:  # only now: the repository might have been refused
        for folder in before:
            shutil.rmtree(folder)
        for grid in (*output_dir.glob("samples-*.png"), *output_dir.glob("reconstructions-*.png")):
            grid.unlink()
    return repo_id


# ------------------------------------------------------------------------------------------------------------- the run


class TrainingRun:
    """One run: how far it is, and what is done between its optimizer steps.

        run = TrainingRun(args, accelerator, "train_imagenet", num_images)
        for fraction in run.steps(parameters, validate, summarize):
            run.learning_rate = learning_rate_at(run.step, fraction, args.learning_rate)
            ...  # gradients
            if run.accepts(loss, grad_norm):
                optimizer.step()
                run.measured({"loss": loss, "grad_norm": grad_norm})
            optimizer.zero_grad()
        if run.is_finished: ...

    To be made by every process, once all that trains is prepared or registered: a checkpoint that
    `--resume_from_checkpoint` names is restored here.

    Args:
        args: The flags of [`add_optimization_flags`] and [`add_output_flags`].
        project (`str`): The run's name in trackers, which are started here.
        num_images (`int`, *optional*): Training images, if known.
        data_digest (`str`, *optional*): Of the data, which have to be the same on resuming.
        **marks: What else a checkpoint is to hold, with its value at the beginning.

    Attributes:
        step (`int`): Optimizer steps done, those that were left out included.
        images_seen (`int`): Images that all processes together have read.
        place (`tuple[int, int]`, *optional*): Of a stream: epoch, and rows of it that this process has read.
        learning_rate (`float`): For the log.
        marks (`dict`): As above.
        total_batch_size (`int`): Images of an optimizer step, of all processes and micro-batches together.
        max_train_steps (`int`): Optimizer steps of the run.
        is_finished (`bool`): The run came to its end. Not so after a signal: then there is a checkpoint.

    Raises:
        `ValueError`: neither `max_train_steps` nor the number of images is known; what [`load_checkpoint`] refuses.
    """

    def __init__(
        self,
        args,
        accelerator: Accelerator,
        project: str,
        num_images: int | None,
        data_digest: str | None = None,
        **marks: Any,
    ):
        self.args, self.accelerator, self.num_images = args, accelerator, num_images
        self.output_dir = Path(args.output_dir)
        self.total_batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
        if args.max_train_steps is None and num_images is None:
            raise ValueError("--max_train_steps must be given where the number of images is not known: a stream.")
        self.max_train_steps = args.max_train_steps or math.ceil(
            args.num_train_epochs * num_images / self.total_batch_size
        )
        self._data = {"num_images": num_images, "max_train_steps": self.max_train_steps, "data_digest": data_digest}

        before = {"step": 0, "images": 0, "seconds": 0.0, "skipped_steps": 0, "places": None, "window": None,
                  "is_loss_bad": False}  # fmt: skip
        if args.resume_from_checkpoint is not None:
            run = (self.output_dir, args.resume_from_checkpoint, vars(args), self._data)
            before |= load_checkpoint(accelerator, *run) or {}
        self.step, self.images_seen, self.is_finished = before["step"], before["images"], False
        self.place = None if before["places"] is None else tuple(before["places"][accelerator.process_index])
        self.marks = {name: before.get(name, value) for name, value in marks.items()}
        self.learning_rate = args.learning_rate
        if args.report_to is not None:  # only now: the checkpoint might have been refused
            accelerator.init_trackers(project, config=tracked(args))
        self.log = TrainingLog(accelerator, self.output_dir, self.step)
        self.budget = Budget(accelerator, self.max_train_steps, args.max_train_seconds, before["seconds"])
        self._guard = NonFiniteGuard(accelerator, args.max_nonfinite_steps)
        self._guard.num_skipped = before["skipped_steps"]
        self._first_step, self._begins_with_bad_loss = self.step, before["is_loss_bad"]
        self._window = LogWindow(accelerator, before["window"])

    def describe_images(self, validation: dict[str, Sized]) -> str:
        """How many images there are to train on and, by split, to validate on: for a person."""
        training = "unknown number of" if self.num_images is None else f"{self.num_images:,}"
        return f"images: {training} training" + "".join(f", {len(rows):,} {name}" for name, rows in validation.items())

    def describe(self) -> str:
        """Batch and steps, two lines for a person."""
        args, total = self.args, self.total_batch_size
        return (
            f"total batch: {total:,} = {args.train_batch_size} x {self.accelerator.num_processes} processes x "
            f"{args.gradient_accumulation_steps} micro-batches\n"
            f"steps: {self.max_train_steps:,}"
            + (f" ({self.max_train_steps * total / self.num_images:.1f} epochs)" if self.num_images else "")
            + (f" or {args.max_train_seconds:,.0f} seconds" if args.max_train_seconds else "")
            + f", from step {self.step:,}"
        )

    def entry(self, kind: str) -> dict[str, Any]:
        """The beginning of a line of the log."""
        seconds = round(self.budget.elapsed(), 2)
        return {"kind": kind, "step": self.step, "images": self.images_seen, "seconds": seconds}

    def accepts(self, loss: torch.Tensor, grad_norm: torch.Tensor | float | None) -> bool:
        """Whether to take the step: [`NonFiniteGuard.accepts`]."""
        return self._guard.accepts(loss, grad_norm)

    def measured(self, values: dict[str, torch.Tensor]) -> None:
        """Count in this process's numbers of a step that was taken, for the log: [`LogWindow.add`]."""
        self._window.add({k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in values.items()})

    def steps(
        self,
        parameters: Iterable[torch.nn.Parameter],
        validate: Callable[[], None] | None,
        summarize: Callable[[dict[str, Any]], tuple[dict[str, Any], str]],
    ) -> Iterator[float]:
        """Yields, once an optimizer step, the fraction of the budget that is used, below 1.

        After each it counts the step, and as often as the flags say writes a line of the log, validates and writes a
        checkpoint; after the last, if not just now, it writes the line and validates. A signal ends it with a
        checkpoint, also one in that validation.

        Args:
            parameters: What trains.
            validate (*optional*): What a validation does.
            summarize: From the means of what was measured since the last line, what goes into the log and what a
                person reads.

        Raises:
            `RuntimeError`: at the end, for weights that are not to be exported. No step was finite, or a weight is
                not (with ZeRO-3 no process has them to look at); or the last loss was not, which is that of the
                weights that train, whatever their averages, as no further step has changed them: those are in a
                checkpoint then.
        """
        args = self.args
        bar = tqdm(
            total=self.max_train_steps,
            initial=self.step,
            unit="step",
            disable=None if self.accelerator.is_main_process else True,  # None: only where a person looks on
            bar_format="{desc}{n_fmt}/{total_fmt} steps {postfix}",
        )
        is_stopped = False
        with StopSignal(self.accelerator) as stop, bar:
            while not is_stopped and (fraction := self.budget.fraction_used(self.step)) < 1:
                yield fraction
                self.step += 1
                self.images_seen += self.total_batch_size
                self._window.images += self.total_batch_size
                if self.step % args.logging_steps == 0 or self.step == self.max_train_steps:
                    self._write_line(summarize, bar)
                with self._window.paused():  # images/s is the speed of training alone
                    if validate is not None and self.step % args.validation_steps == 0:
                        bar.clear()
                        validate()
                    is_stopped = stop.requested()
                    if is_stopped or self.step % args.checkpointing_steps == 0:
                        self._checkpoint()
            if not is_stopped:
                self._check_weights(parameters)
                if validate is not None and self.step % args.validation_steps != 0:
                    validate()
                    if is_stopped := stop.requested():
                        self._checkpoint()
        self.is_finished = not is_stopped
        if is_stopped:
            self.accelerator.print(
                f"Stopped by a signal: wrote checkpoint-{self.step}; --resume_from_checkpoint latest goes on."
            )

    def _check_weights(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """The errors at the end of [`steps`]. For every process to call."""
        shards = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
        num_bad = torch.stack([~shard.detach().isfinite().all() for shard in shards]).sum()
        num_finite = self.step - self._guard.num_skipped
        rest = ""
        if self.step == 0:
            fault = "the weights are those of the beginning: --max_train_seconds was over before the first"
        elif num_finite == 0:
            fault = "the weights are those of the beginning"
        elif self.accelerator.reduce(num_bad, "sum").item() > 0:
            fault = "a weight is NaN or infinite"
        elif self._guard.is_loss_bad:
            self._checkpoint()
            fault = "the loss is NaN or infinite"
            rest = f" checkpoint-{self.step} has these weights: to resume from it exports them all the same."
        else:
            if self._begins_with_bad_loss and self.step == self._first_step:
                self.accelerator.print("Warning: the last loss of these weights was NaN or infinite.")
            return
        raise RuntimeError(
            f"Nothing is exported: of {self.step:,} steps {num_finite:,} were finite, and {fault}. Usual causes: a "
            "learning rate too high (--learning_rate), or float16 in a run too short to find its scale "
            f"(--mixed_precision).{rest}"
        )

    def _write_line(self, summarize, bar) -> None:
        means, left = self._window.means(), self.budget.time_left(self.step)
        rate = self._window.images / self._window.seconds()
        numbers, line = summarize(means) if means else ({}, "")
        entry = self.entry("train") | {
            "images_per_second": round(rate, 2),
            "learning_rate": self.learning_rate,
            "skipped_steps": self._guard.num_skipped,
        }
        bar.update(self.step - bar.n)
        bar.set_postfix_str(f"{rate:.1f} images/s, {left} left")
        bar.clear()
        skipped = f"skipped {self._guard.num_skipped}" if self._guard.num_skipped else ""
        pace = f"step {self.step}/{self.max_train_steps} images {self.images_seen:,} {rate:.1f}/s, {left} left"
        line = " ".join(part for part in (f"{pace}, lr {self.learning_rate:.2e}", line, skipped) if part)
        self.log.write(entry | numbers, line)
        self._window.clear()

    def _checkpoint(self) -> None:
        places = None
        if self.place is not None:
            places = self.accelerator.gather(torch.tensor([self.place], device=self.accelerator.device)).tolist()
        progress = {
            "step": self.step,
            "images": self.images_seen,
            "epoch": self.images_seen // self.num_images if self.num_images else self.place[0],
            "seconds": self.budget.elapsed(),
            "skipped_steps": self._guard.num_skipped,
            "is_loss_bad": self._guard.is_loss_bad,
            "places": places,
            "window": self._window.state(),
            **self.marks,
        }
        limit = self.args.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.output_dir, progress, vars(self.args), limit, self._data)

    def close(self, skipped: SkippedRows) -> None:
        """Close the log and say what the run came to."""
        self.log.close()
        self.accelerator.wait_for_everyone()
        if self.is_finished:
            self.accelerator.print(
                f"Saved to {self.output_dir} after {self.step:,} steps, {self.images_seen:,} images, "
                f"{self.budget.elapsed():,.0f} seconds; skipped rows: {skipped}; skipped steps: "
                f"{self._guard.num_skipped:,}."
            )


# --------------------------------------------------------------------------------------------------- averaged weights


def averaged_weights(
    args, accelerator: Accelerator, parameters: Iterable[torch.nn.Parameter]
) -> "AveragedWeights | None":
    """The averages that `--ema_decay` asks for, in checkpoints too; None for 0."""
    if args.ema_decay == 0:
        return None
    ema = AveragedWeights(parameters, args.ema_decay)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    return ema


@contextmanager
def exported_weights(ema: "AveragedWeights | None", parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Within the context the parameters are those that would be exported: the averages, if there are."""
    if ema is None:
        yield
        return
    parameters = list(parameters)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


class AveragedWeights(EMAModel):
    """Exponential moving average of weights that may be sharded: a checkpoint holds them whole.

    With the warm-up the decay is min(decay, 1 - (1 + step)^(-2/3)): 0.9999 is only reached after a million steps, and
    a short run exports more than its initialisation.
    """

    def __init__(self, parameters, decay: float):
        parameters = list(parameters)
        self.is_sharded = any(hasattr(parameter, "full_tensor") for parameter in parameters)
        # Copying many sharded tensors at once is not implemented in torch.
        super().__init__(parameters, decay=decay, use_ema_warmup=True, power=2 / 3, foreach=not self.is_sharded)

    def store(self, parameters) -> None:
        """As of the base class, which moves the weights to the CPU; shards stay where their mesh is."""
        if self.is_sharded:
            self.temp_stored_params = [parameter.detach().clone() for parameter in parameters]
        else:
            super().store(parameters)

    def state_dict(self) -> dict:
        """As of the base class; every process has to call it."""
        state = super().state_dict()
        state["shadow_params"] = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in self.shadow_params]
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """As of the base class, on the devices where the weights are now; each process keeps its shards."""
        present = self.shadow_params
        super().load_state_dict(state_dict)
        # accelerate reads checkpoints into the memory of the CPU
        self.shadow_params = [loaded.to(before.device) for loaded, before in zip(self.shadow_params, present)]
        if self.is_sharded:
            from torch.distributed.tensor import distribute_tensor

            self.shadow_params = [
                distribute_tensor(whole, shard.device_mesh, shard.placements)
                if hasattr(shard, "full_tensor")
                else whole
                for whole, shard in zip(self.shadow_params, present)
            ]
