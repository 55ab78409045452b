"""What all tests share: one thread, the real data where it is, and one Ray cluster."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Ray reads these when it is imported: nobody else may use the test's cluster, nothing is reported
# home, a worker that asks for no GPU still sees those of the machine, and what a test waits for
# does not stand behind everything else on it.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (Ray's own name)

# Results have the same bits for the same number of threads only; tests may run side by side.
torch.set_num_threads(1)

# The same examples every time, however slow the machine is.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

DEFAULT_DATA = Path(__file__).parents[1] / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the real data sets."""
    root = Path(os.environ.get("HAWQ_DATA", DEFAULT_DATA)).resolve()
    if not root.is_dir():
        pytest.skip(f"no data at {root}; set HAWQ_DATA to the folder of the real data sets")
    return root


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of two CPUs on this machine."""
    import ray  # noqa: PLC0415 (only the tests that ask for a cluster pay for it)

    ray.init(
        address="local",  # never someone's cluster that was left on this machine
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 << 20,
    )
    yield
    ray.shutdown()
