"""Which share of work that needs no word between processes is this process's."""

import os
from collections.abc import Mapping

from cib_jax.errors import Refusal

# Variables of a process's number and of how many there are, in the order in which they are believed: under Slurm,
# mpirun itself runs as a step. A step of one task, such as a shell, splits nothing.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


class ShareError(Refusal):
    """Number and count of processes do not go together."""


def share(processes: int | None, process: int | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Returns how many processes share the work, and which of them this is, from 0.

    Args:
      processes: as the user says; None where nothing is said.
      process: the same.
      environment: what mpirun (Open MPI) and srun (Slurm) tell a process, believed where the user says nothing.

    Raises:
      ShareError: one of the two is missing, or out of range.
    """
    if processes is None and process is None:
        for number, count in _LAUNCHERS:
            if environment.get(count, "1").isdigit() and int(environment.get(count, "1")) > 1:
                return int(environment[count]), int(environment[number])
        return 1, 0
    if processes is None:
        raise ShareError(f"--processes: it is missing beside --process={process}; give how many there are in all")
    if process is None:
        raise ShareError(
            f"--process: it is missing beside --processes={processes}; give each its number, from 0 to {processes - 1}"
        )
    if processes < 1:
        raise ShareError(f"--processes: {processes} must be 1 or more")
    if not 0 <= process < processes:
        raise ShareError(f"--process: {process} must be from 0 to {processes - 1}, one of --processes={processes}")
    return processes, process


def parts_of(parts: int, processes: int, process: int) -> range:
    """Returns which of `parts` are a process's: every one whose number leaves `process` when divided by `processes`."""
    return range(process, parts, processes)
