"""Processes that do one thing together: they wait for each other a few minutes, hear what the first one decides, and end with their launcher."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

RENDEZVOUS = timedelta(minutes=10)  # a process whose peers do not come within it ends
PATIENCE = timedelta(days=7)  # for what one process does alone, while the others wait


def read_command(pid: int) -> list[str]:
    """The command line of a process; empty when it is gone or of another user."""
    import psutil

    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []


LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
PARENT = os.getppid()
PARENT_WORDS = (
    read_command(PARENT) if LAUNCHED else []
)  # read at once, since it may be killed while this process begins


def follow_launcher(seconds: float = 2.0) -> None:
    """Lets this process end with the `torchrun` or `accelerate launch` that started it, which looks every few `seconds`.

    A launcher that is killed leaves its workers waiting for peers that never come. What a shell started goes on without the shell.
    """
    by_python = bool(PARENT_WORDS) and os.path.basename(PARENT_WORDS[0]).startswith("python")
    by_accelerate = by_python and any("accelerate" in word for word in PARENT_WORDS[1:3])
    by_torch = "TORCHELASTIC_RUN_ID" in os.environ
    if by_torch and not by_python:  # what it sees is who took it over
        end_orphan()
    if by_torch or by_accelerate:
        threading.Thread(target=watch, args=(PARENT, seconds), daemon=True).start()


def watch(parent: int, seconds: float) -> None:
    while os.getppid() == parent:
        time.sleep(seconds)
    end_orphan()


def end_orphan() -> None:
    print("The launcher of this process has ended, so the process ends, too.", file=sys.stderr, flush=True)
    os._exit(1)


def join(**options):
    """`accelerate.PartialState(**options)` whose processes come within `RENDEZVOUS` and wait for each other up to `PATIENCE` later.

    Raises:
        `TimeoutError`: when one of them does not come.
    """
    import torch.distributed as dist
    from accelerate import PartialState

    with expected_peers():
        state = PartialState(**options, timeout=RENDEZVOUS)
        state.wait_for_everyone()
    if state.num_processes > 1:
        dist.distributed_c10d._set_pg_timeout(PATIENCE)
    return state


@contextmanager
def expected_peers() -> Iterator[None]:
    """Turns what torch raises when a process of this run does not come into a `TimeoutError` of one sentence."""
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        if "WORLD_SIZE" not in os.environ or not isinstance(error, dist.DistError):
            raise
        raise TimeoutError(
            f"The processes of this run did not find each other ({str(error).splitlines()[0]}); start all of them again."
        ) from error


def agree(decide: Callable):
    """What `decide` returns on the main process, on all of them. Where it raises there, the others end without a word of their own."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    if state.num_processes == 1:
        return decide()
    news, refusal = {}, None
    if state.is_main_process:
        try:
            news = {"decided": decide()}
        except Exception as error:
            refusal = error
    (news,) = broadcast_object_list([news], from_process=0)
    if refusal is not None:
        raise refusal
    if "decided" not in news:
        sys.exit(2)
    return news["decided"]
