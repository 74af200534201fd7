"""Being asked to stop: clusters send a signal some time before they take a machine away."""

import signal
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from accelerate import Accelerator


# SIGTERM is what clusters send before they pre-empt; SIGUSR1 what Slurm's `--signal=USR1@120` is commonly told to;
# SIGINT is Ctrl-C.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into a question that a training loop asks once an optimizer step.

        with StopSignal(accelerator) as stop:
            while step < max_train_steps:
                ...
                if stop.requested():
                    save_checkpoint(...)
                    break

    While the context is open the signals do nothing but set a mark; on leaving it, what they did before is back.
    But a second Ctrl-C ends the process at once. To be made and entered by every process, in its main thread.

    Args:
        accelerator: The run's.
    """

    def __init__(self, accelerator: "Accelerator"):
        self._accelerator = accelerator
        self._received = self._interrupted = False
        self._previous = {}
        self._group = None
        if accelerator.num_processes > 1 and torch.distributed.get_backend() != "gloo":
            # A group on the host: asking through the accelerator would wait for all the work queued there, every step.
            self._group = torch.distributed.new_group(backend="gloo")

    def __enter__(self) -> "StopSignal":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _receive(self, number, frame) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            self._accelerator.print("Ctrl-C: stopping after this step, with a checkpoint. Once more stops at once.")
        self._received = True

    def requested(self) -> bool:
        """Whether any process has got a signal so far: the same answer in all of them.

        Every process has to ask at the same place of its loop. With several it is one sum of one number, on the host.
        """
        if self._accelerator.num_processes == 1:
            return self._received
        mark = torch.tensor(int(self._received))
        torch.distributed.all_reduce(mark, group=self._group)
        return bool(mark > 0)


def ignore_stop_signals(worker_id: int = 0) -> None:
    """`worker_init_fn` of a data loader in a run with a [`StopSignal`].

    Many clusters signal every process of a job. A worker that dies of it takes the training down, by an exception at
    any place, before a checkpoint is saved. Workers still end with the loader, or when their parent is gone.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
