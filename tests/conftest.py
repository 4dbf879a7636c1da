"""Settings shared by all tests: CPU, programs compiled quickly and once, a hypothesis profile without deadlines."""

import gc
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# In the environment, so that processes that tests start take what others have compiled, and come to the same bits.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parent.parent / ".cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"
# Each of the processes that tests start would compile the package's sources again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Threads of OpenMP wait by spinning: on cores that are shared, t-SNE of 200 points takes twenty times as long with two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# For programs that run for moments, compiled for seconds: XLA's own passes alone, few of LLVM's. Where a test asks for
# more, LLVM's first level instead of its third: programs compile twice as fast, and run nearly as fast. XLA's older
# emitters of fused loops halve the time again; loops that are neither unrolled nor made of vectors by LLVM, in one part
# of code instead of many, take another third less. With "0" and an empty text in the environment, all programs are
# compiled with the default optimizations.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_extra_options="
    "xla_cpu_optimize_for_size,xla_cpu_disable_slp_vectorizer,xla_cpu_disable_loop_unrolling",
)

import hypothesis
import jax
import jaxtyping
import pytest

from tests.command_line import refusal, run_cli  # noqa: F401 - fixtures

hypothesis.settings.register_profile("cib", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("cib")

FEW_OPTIMIZATIONS = jax.config.values["jax_disable_most_optimizations"]  # unless the environment asks for more

LONGEST = (
    "end_to_end/test_processes.py",
    "commands/test_train.py",
    "test_fitting.py",
    "distributed/test_sharding.py",
    "end_to_end/test_data_sets.py",
    "end_to_end/test_run.py",
    "end_to_end/test_readme.py",
    "commands/test_index.py",
    "commands/test_tune.py",
    "end_to_end/test_index.py",
    "commands/test_duplicates.py",
    "runs/test_report.py",
    "commands/test_compare.py",
    "commands/test_encode.py",
    "end_to_end/test_corpus.py",
    "commands/test_search.py",
    "commands/test_fine_tuned_runs.py",
    "commands/test_teaching.py",
    "web/test_page.py",
    "augment/test_augment.py",
    "models/test_finetune.py",
)
"""The files that take longest, begun first: each is one worker's, and what is begun last is done while others idle.

Before them come those that use `compiled_to_run`, so that the programs are thrown away once.
"""


def pytest_collection_modifyitems(items):
    tests = pathlib.Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(LONGEST)}
    optimized = {item.path for item in items if "compiled_to_run" in item.fixturenames}
    items.sort(key=lambda item: (item.path not in optimized, places.get(item.path, len(places)), item.path))


def pytest_collection():
    gc.disable()  # while modules are imported, which stay


def pytest_collection_finish():
    gc.freeze()  # later collections pass over the modules' objects, which take most of the time of each
    gc.enable()


@pytest.fixture(scope="module")
def compiled_to_run():
    """More optimizations, in started processes too, for tests that train or compare programs bit for bit."""
    switch_optimizations(few=False)


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(request):
    """Fewer optimizations again for other tests; modules that follow one another with the same share their programs."""
    if "compiled_to_run" not in request.fixturenames:
        switch_optimizations(few=FEW_OPTIMIZATIONS)


def switch_optimizations(few: bool):
    if jax.config.values["jax_disable_most_optimizations"] != few:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(few))
        # JAX's caches in memory do not distinguish the two, but their results differ in the last bits.
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", few)


@pytest.fixture(scope="module")
def few_digits():
    """Registers the data set of `small.FEW_DIGITS`, for runs in the test's own process."""
    from cib_jax.data import sources
    from tests import small

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sources.DATA_SETS, small.FEW_DIGITS["data__name"], small.load_few_digits)
        yield


@pytest.fixture
def own_parts():
    """Forgets at the end of a test what it has registered; called, it forgets at once, as a new process would."""
    from cib_jax.augment import features
    from cib_jax.config import extensions, own_fields, schema

    tables = [*extensions.TABLES.values(), features.FAMILIES, own_fields, schema.FIELDS]
    before = [dict(table) for table in tables]

    def forget():
        for table, rows in zip(tables, before, strict=True):
            table.clear()
            table.update(rows)

    yield forget
    forget()


@pytest.fixture
def without_shape_checks():
    """Lets wrong shapes and types reach the code's own validation when jaxtyping checks the signatures."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
