"""Processes that do one thing together: they wait for each other a few minutes, hear what the first one decides, and end with their launcher."""

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

RENDEZVOUS = timedelta(minutes=10)  # a process whose peers do not come within it ends
PATIENCE = timedelta(days=7)  # for what one process does alone, while the others wait


def follow_launcher(seconds: float = 2.0) -> None:
    """Lets this process end with the `torchrun` or `accelerate launch` that started it, which looks every few `seconds`.

    A launcher that is killed leaves its workers waiting for peers that never come. What a shell started goes on without the shell.
    """
    parent = os.getppid()
    words = read_command(parent)
    by_python = bool(words) and os.path.basename(words[0]).startswith("python")
    if "TORCHELASTIC_RUN_ID" in os.environ and not by_python:  # it died while this process began
        end_orphan()
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and any("accelerate" in word for word in words[1:3])
    if "TORCHELASTIC_RUN_ID" in os.environ or by_python and by_accelerate:
        threading.Thread(target=watch, args=(parent, seconds), daemon=True).start()


def read_command(pid: int) -> list[str]:
    """The command line of a process; empty when it is gone or of another user."""
    import psutil

    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []


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

    try:
        state = PartialState(**options, timeout=RENDEZVOUS)
        state.wait_for_everyone()
    except (dist.DistError, RuntimeError) as error:
        raise TimeoutError(
            f"The processes of this run did not find each other within {RENDEZVOUS.seconds // 60} minutes "
            f"({str(error).splitlines()[0]}); start all of them again."
        ) from error
    if state.num_processes > 1:
        dist.distributed_c10d._set_pg_timeout(PATIENCE)
    return state


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
