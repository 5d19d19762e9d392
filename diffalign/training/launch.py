"""What ``accelerate launch`` says to the scripts that it starts.

``--cpu --num_processes N`` on one machine means N processes. For processors accelerate starts a single process and
leaves the rest to MPI. It does so without a word, and a run would go on with another global batch than was asked for.
Where that has happened the processes are started here.

``--mixed_precision`` stands for the run's option of the same name.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence

from diffalign.errors import UserError

_STARTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def missing_processes(environment: Mapping[str, str], launcher: Sequence[str]) -> int:
    """Return how many processes should have been started where only this one was; 0 where all is well.

    Args:
        environment: of this process.
        launcher: command line of the process that started it.
    """
    alone = "MASTER_ADDR" in environment and not any(name in environment for name in _STARTED)
    words = " ".join(launcher)
    asked = re.search(r"--num[_-]processes[ =](\d+)", words)
    if not alone or "accelerate" not in words or asked is None:
        return 0
    machines = re.search(r"--num[_-]machines[ =](\d+)", words)
    several_machines = machines is not None and int(machines.group(1)) > 1
    count = int(asked.group(1))
    return 0 if several_machines or count < 2 else count


def start_missing_processes() -> None:
    """Replace this process by as many as were asked for, where accelerate has started only one."""
    if "MASTER_ADDR" not in os.environ:
        return
    import psutil

    parent = psutil.Process().parent()
    count = missing_processes(os.environ, parent.cmdline() if parent is not None else [])
    if count:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        os.execv(sys.executable, [*command, *sys.argv])


def launched_precision(environment: Mapping[str, str]) -> str | None:
    """Return the mixed precision that accelerate was launched with, "bf16" or "fp16"; None where it was not.

    The launcher's "no" decides nothing: it is also what it passes on where nothing was said.

    Args:
        environment: of this process; accelerate leaves its choice there.

    Raises:
        UserError: for types that runs do not know (fp8).
    """
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", "fp16", "bf16"):
        raise UserError(f"accelerate is configured for --mixed_precision {launched}: give it bf16, fp16 or no")
    return None if launched == "no" else launched
