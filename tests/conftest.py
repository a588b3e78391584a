"""What every test needs before JAX starts, and which tests a run takes."""

import collections
import gc
import importlib
import importlib.metadata
import os

# Sharding tests need eight devices, and one thread a worker is enough. The flags count
# only before JAX starts.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_multi_thread_eigen=false",
]
# Tests compile thousands of small programs and run each of them once or twice, so a
# program that is compiled badly, and soon, is a good one.
QUICK_FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
# A jaxlib aborts on flags it does not know, and newer ones have lost this one.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK_FLAGS.append("--xla_cpu_use_fusion_emitters=false")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# matplotlib must not look for a display.
os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis  # noqa: E402
import pytest  # noqa: E402

from tests import other_python  # noqa: E402
from tests.clients import program  # noqa: E402

# A first call compiles, so examples differ in time by orders of magnitude, and the
# same examples on every run keep a failure reproducible.
hypothesis.settings.register_profile(
    "qwix_train", deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("qwix_train")


def pytest_addoption(parser):
    parser.addoption(
        "--optimized",
        action="store_true",
        help="run the tests marked `optimized`, and compile as users do",
    )


def pytest_configure(config):
    given = os.environ.get("XLA_FLAGS", "")
    flags = FLAGS + ([] if config.option.optimized else QUICK_FLAGS)
    # What the environment says comes first.
    flags = [flag for flag in flags if flag.partition("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *flags]).strip()
    # Before pytest collects doctests: the first module that it imports by its path it
    # imports anew, and what is registered would be registered in one of two. A process
    # that starts workers collects nothing, and they wait for it.
    option = config.option
    starts_workers = getattr(option, "dist", "no") != "no" and option.tx
    if not starts_workers or option.collectonly:
        importlib.import_module("qwix_train")


def pytest_collection_finish(session):
    # Modules, jaxprs and compiled programs are many objects that never die: searching
    # them for garbage again and again takes a tenth of a run.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config, items):
    _thin(items)
    _mark_fast(items)
    _skip_others(items)
    wanted = config.option.optimized
    others = [i for i in items if bool(i.get_closest_marker("optimized")) != wanted]
    if others:
        items[:] = [item for item in items if item not in set(others)]
        config.hook.pytest_deselected(items=others)
    yield
    # What remains, with the longest files first, as one of these at the end leaves the
    # other worker idle: those of many tests, then those of the fewest, which start
    # processes or train an example.
    sizes = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: _turn(sizes[item.path]))


def _turn(size):
    """Whose turn a file is by the number of its tests: the lowest comes first."""
    return -size if size > 20 else size


def _thin(items):
    """Of a test with the marker `thinned(n)`, all but every n-th case is slow."""
    seen = collections.Counter()
    for item in items:
        marker = item.get_closest_marker("thinned")
        if marker is None or item.get_closest_marker("slow"):
            continue
        (every,) = marker.args
        test = item.nodeid.partition("[")[0]
        if seen[test] % every:
            item.add_marker(pytest.mark.slow)
        seen[test] += 1


def _mark_fast(items):
    """The first test of each module that runs by default stands for the module."""
    seen = set()
    for item in items:
        others = ("slow", "interchange", "clients", "documentation")
        if any(item.get_closest_marker(other) for other in others):
            continue
        if item.path not in seen:
            seen.add(item.path)
            item.add_marker(pytest.mark.fast)


def _skip_others(items):
    """Skips what needs an environment of its own, where that is not given."""
    for item in items:
        if item.get_closest_marker("interchange"):
            needed, target = other_python.VARIABLE, "test-interchange"
        elif item.get_closest_marker("clients"):
            client = item.path.stem.removeprefix("test_")
            needed, target = program.variable(client), "test-clients"
        else:
            continue
        if needed not in os.environ:
            reason = f"needs {needed}: run `make {target}`"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def small_heap():
    """Leaves garbage collection what the test makes, and nothing that was there.

    JAX looks for leaked tracers among all objects, many times in one test.
    """
    gc.collect()
    gc.freeze()


def pytest_report_header():
    versions = [f"{x} {importlib.metadata.version(x)}" for x in ("jax", "flax")]
    return f"{', '.join(versions)}, {os.environ['XLA_FLAGS']}"


def pytest_terminal_summary(terminalreporter, config):
    """Says what did not run, and why: one line for each reason."""
    reasons = collections.Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
    )
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} skipped: {reason}")
    optimized = [
        item
        for item in terminalreporter.stats.get("deselected", [])
        if item.get_closest_marker("optimized")
    ]
    if optimized and not config.option.optimized:
        terminalreporter.write_line(
            f"{len(optimized)} tests compile as users do, and run with --optimized."
        )
