"""What every test needs before JAX is imported."""

import collections
import os

# Sharding tests need eight devices. The flag counts only before JAX starts.
_DEVICES = "--xla_force_host_platform_device_count=8"
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} {_DEVICES}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# matplotlib must not look for a display.
os.environ.setdefault("MPLBACKEND", "agg")

import flax  # noqa: E402
import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# A first call compiles, so examples differ in time by orders of magnitude, and the
# same examples on every run keep a failure reproducible.
hypothesis.settings.register_profile(
    "qwix_train", deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("qwix_train")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
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


def pytest_report_header():
    versions = f"jax {jax.__version__}, flax {flax.__version__}"
    return f"{versions}, {jax.device_count()} devices"
