"""A process may be busy for longer than a process group waits, and the run goes on."""

from components import run_in_two_processes


# The time of each event is written by each process, in seconds of the same clock.
PROGRAM = """
import sys
import time
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, InitProcessGroupKwargs
from rq_draft_revise.waiting import main_process_first, wait_for_everyone

accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=2))])
times = []
with main_process_first(accelerator):
    times.append(time.time())
    if accelerator.is_main_process:
        time.sleep(4)
    times.append(time.time())
if not accelerator.is_main_process:
    time.sleep(4)
times.append(time.time())
wait_for_everyone(accelerator)
times.append(time.time())
Path(sys.argv[1], f"{accelerator.process_index}.txt").write_text(" ".join(map(str, times)))
accelerator.end_training()
"""


def test_processes_wait_for_longer_than_their_group(tmp_path):
    run_in_two_processes(PROGRAM, tmp_path)
    main, other = ([float(word) for word in (tmp_path / f"{i}.txt").read_text().split()] for i in range(2))
    assert main[1] <= other[0]  # the main process had left before the other entered
    assert min(main[3], other[3]) >= max(main[2], other[2])  # nobody went on before both had arrived
