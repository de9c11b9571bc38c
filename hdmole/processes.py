"""Work that several processes share: each takes the next task that no other works at."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from hdmole.files import OutputError, alone

if TYPE_CHECKING:
    from accelerate import PartialState

POLL = 2.0  # seconds until a process that has nothing to do looks again
TOLD = 60.0  # seconds between two lines that say so


@dataclass(frozen=True)
class Task:
    """What one process does at a time, such as a training run.

    Args:
        name: unique among the tasks.
        ready: whether everything that it needs is there.
        finished: whether its result is there.
        run: does it. What it writes must appear only when it is complete.
    """

    name: str
    ready: Callable[[], bool]
    finished: Callable[[], bool]
    run: Callable[[], None]


def share(tasks: Sequence[Task], locks: Path, report: Callable[[str], None]) -> None:
    """Do all tasks that are not finished, in their order, beside other processes that do the same.

    Args:
        tasks: the same in all processes.
        locks: a folder that all processes see. A task whose process was killed is free again.
        report: called with a line while this process waits for others.
    """
    told = time.time()
    while left := [task for task in tasks if not task.finished()]:
        with ExitStack() as held:
            task = next((task for task in left if task.ready() and claim(task, locks, held)), None)
            if task is not None:
                if not task.finished():  # another process may just have finished it
                    task.run()
                continue
        if time.time() - told > TOLD:
            told = time.time()
            report(f"waiting for {len(left)} results of other processes")
        time.sleep(POLL)


def claim(task: Task, locks: Path, held: ExitStack) -> bool:
    """Whether this process may do a task. No other can then claim it until `held` is closed."""
    try:
        held.enter_context(alone(locks / task.name))
    except OutputError:
        return False
    return True


@contextmanager
def others(arguments: Sequence[str], count: int) -> Iterator[None]:
    """In the block, `count` processes run a command of hdmole; this process is one of them.

    They share the processor cores. The others end with the block.

    Args:
        arguments: the command's arguments for the others.
        count: number of processes; with 1 nothing is started.
    """
    import torch

    if count == 1:
        yield
        return
    threads = max(1, (os.cpu_count() or 1) // count)
    torch.set_num_threads(threads)
    command = [sys.executable, "-W", "ignore", "-m", "hdmole.cli", *arguments]
    shared = {"OMP_NUM_THREADS": str(threads), **os.environ, "WORLD_SIZE": str(count)}
    started = [subprocess.Popen(command, env={**shared, "RANK": str(rank)}) for rank in range(1, count)]
    try:
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(60)


def end_with_parent(parent: int) -> None:
    """Have this process end within a second of its parent, also where the parent is killed.

    It would otherwise go on to write where the parent's command, run again, writes too. `parent` is
    the parent's process id, which changes when it ends.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def rank_and_count() -> tuple[int, int]:
    """The number of this process, and how many processes `others` or `accelerate launch` started.

    Under `accelerate launch` each process works on its own GPU. The environment variables are
    removed, because transformers' Trainer would otherwise spread one run over all processes.
    """
    rank, count = int(os.environ.pop("RANK", 0)), int(os.environ.pop("WORLD_SIZE", 1))
    local = os.environ.pop("LOCAL_RANK", None)
    if local is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(local)] if visible else local
    return rank, count


def train_together(rank: int, count: int) -> PartialState:
    """From now on transformers' Trainer spreads a training over all processes.

    `rank_and_count` gave the arguments, and left each process its own GPU, which is the first that
    it sees.
    """
    import torch
    from accelerate import PartialState

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": "0"}
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))


def team() -> PartialState:
    """This process among those that `torchrun` or `accelerate launch` started, on its own GPU.

    The processes share files, so that they need each other only to wait. They do so over gloo, for
    as long as it takes: NCCL would give up on one whose speech takes ten minutes longer. Without a
    launcher this process is alone.
    """
    import torch
    from accelerate import PartialState

    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    state = PartialState(cpu=many, timeout=timedelta(days=30))
    if many and torch.cuda.is_available():
        torch.cuda.set_device(state.local_process_index)
    return state
