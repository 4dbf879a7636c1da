"""How work is shared without a word: every part once, for any number of processes; and which one this is."""

import hypothesis
import hypothesis.strategies as st
import pytest

from cib_jax.jobs.share import ShareError, parts_of, share


@hypothesis.given(parts=st.integers(0, 500), processes=st.integers(1, 64))
def test_every_part_is_one_processs(parts, processes):
    taken = [part for process in range(processes) for part in parts_of(parts, processes, process)]
    assert sorted(taken) == list(range(parts))
    sizes = [len(parts_of(parts, processes, process)) for process in range(processes)]
    assert max(sizes) - min(sizes) <= 1


SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, (1, 0)),
        (SLURM, (8, 3)),
        (OPEN_MPI, (2, 1)),
        (OPEN_MPI | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, (2, 1)),  # mpirun's own step, one task a node
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (1, 0)),  # a batch script itself, outside srun
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (1, 0)),  # a shell
    ],
)
def test_a_launcher_says_which_process_this_is(environment, wanted):
    assert share(None, None, environment) == wanted
    assert share(5, 4, environment) == (5, 4)


@pytest.mark.parametrize(
    ("processes", "process", "message"),
    [
        (None, 1, "--processes: it is missing beside --process=1"),
        (3, None, "--process: it is missing beside --processes=3; give each its number, from 0 to 2"),
        (0, 0, "--processes: 0 must be 1 or more"),
        (3, 3, "--process: 3 must be from 0 to 2"),
        (3, -1, "--process: -1 must be from 0 to 2"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(processes, process, message):
    with pytest.raises(ShareError, match=message):
        share(processes, process, {})
