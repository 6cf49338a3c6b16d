"""Processes of one run: they find each other, follow the decisions of the main one, and end with their launcher."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

# A process ends if its peers do not start within this time.
RENDEZVOUS = timedelta(minutes=10)
# One process may work alone for this long while the others wait.
PATIENCE = timedelta(days=7)


def read_command(pid: int) -> list[str]:
    """The command line of a process; empty if it has ended or belongs to another user."""
    import psutil

    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []


LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
PARENT = os.getppid()
# Read at import, since the launcher may be killed while this process starts.
PARENT_WORDS = read_command(PARENT) if LAUNCHED else []


def follow_launcher(seconds: float = 2.0) -> None:
    """Ends this process when the `torchrun` or `accelerate launch` that started it ends. Checks every `seconds`.

    A killed launcher would leave its workers waiting for peers that never start. A process that a shell started
    outlives the shell.
    """
    by_python = bool(PARENT_WORDS) and os.path.basename(PARENT_WORDS[0]).startswith("python")
    by_accelerate = by_python and any("accelerate" in word for word in PARENT_WORDS[1:3])
    by_torch = "TORCHELASTIC_RUN_ID" in os.environ
    # The launcher has already ended, and another process has adopted this one.
    if by_torch and not by_python:
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
    """Returns `accelerate.PartialState(**options)` once all processes have started, within `RENDEZVOUS`.

    After that they wait for each other for up to `PATIENCE`.

    Raises:
        `TimeoutError`: when a process does not start in time.
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
    """Turns the error of torch for a missing process into a `TimeoutError` of one sentence."""
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        if "WORLD_SIZE" not in os.environ or not isinstance(error, dist.DistError):
            raise
        reason = str(error).splitlines()[0]
        raise TimeoutError(
            f"The processes of this run did not find each other ({reason}); start all of them again."
        ) from error


def agree(decide: Callable):
    """Returns what `decide` returns on the main process to all of them. If it raises, the others exit silently."""
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
