"""Probes on Ray workers: the same bits for any number of them, and for any deaths."""

import os
import signal
import sys

import numpy as np
import pytest
import ray
import torch

from hawq.curvature import TracePlan, UnitSums, estimate_traces
from hawq.space import quantizable_layers
from search.probes import ProbeWorker, UnitFile, estimate_on_workers
from search.tasks.classification import ClassificationTask

pytestmark = pytest.mark.ray
TASK = ClassificationTask(data="digits", root=None, network="resnet8", search_size=100)


def make_plan(**changes):
    settings = {
        "layers": tuple(quantizable_layers(TASK.model())),
        "estimator": "gauss_newton",
        "split": "train",
        "examples": tuple(range(100)),
        "batch_size": 16,  # the last batch is smaller
        "probes_per_unit": 2,
        "rtol": 0.2,
        "max_probes": 40,
        "seed": 3,
    }
    return TracePlan(**{**settings, **changes})


def expect(plan):
    torch.set_num_threads(1)
    return estimate_traces(TASK, TASK.model(), plan)


def assert_same_bits(actual, expected):
    for field in ("trace", "probe_error", "data_error"):
        np.testing.assert_array_equal(getattr(actual, field), getattr(expected, field))
    assert actual.num_probes == expected.num_probes


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("estimator", ["exact_gauss_newton", "gauss_newton", "hutchinson"])
def test_any_number_of_workers_gives_the_bits_of_one_process(
    ray_cluster, tmp_path, workers, estimator
):
    plan = make_plan(estimator=estimator, max_probes=8)
    actual, cpu_seconds = estimate_on_workers(
        TASK,
        TASK.model().state_dict(),
        plan,
        units=UnitFile(tmp_path / "units.jsonl", "a"),
        workers=workers,
        cpus=0.5,
    )
    assert_same_bits(actual, expect(plan))
    assert cpu_seconds > 0


# Workers cannot import a test's module: what is defined here travels by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Mortal(ProbeWorker):
    """Kills its own process at unit 5, once."""

    def run(self, index):
        marker = os.environ["HAWQ_TEST_MARKER"]
        if index == 5 and not os.path.exists(marker):
            with open(marker, "w"):
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(index)


def test_a_worker_that_dies_is_replaced_and_changes_no_bit(ray_cluster, tmp_path, monkeypatch):
    marker = tmp_path / "died"
    monkeypatch.setattr("search.probes.RemoteProbeWorker", _Marked(str(marker)))
    plan = make_plan(max_probes=6, rtol=1e-9)
    actual, _ = estimate_on_workers(
        TASK,
        TASK.model().state_dict(),
        plan,
        units=UnitFile(tmp_path / "units.jsonl", "a"),
        workers=2,
        cpus=0.5,
    )
    assert marker.exists()
    assert_same_bits(actual, expect(plan))


class _Marked:
    """A remote class of mortals that know where to leave their mark."""

    def __init__(self, marker):
        self._marker = marker

    def options(self, **options):
        variables = {"env_vars": {"HAWQ_TEST_MARKER": self._marker}}
        return ray.remote(Mortal).options(**options, runtime_env=variables)


def test_a_stopped_estimation_goes_on_where_it_stopped(ray_cluster, tmp_path):
    plan = make_plan(max_probes=6, rtol=1e-9)
    arguments = {"workers": 2, "cpus": 0.5}
    path = tmp_path / "units.jsonl"

    class Stop(Exception):
        pass

    done = []

    def stop_after_seven(_):
        done.append(1)
        if len(done) == 7:
            raise Stop

    state = TASK.model().state_dict()
    with pytest.raises(Stop):
        estimate_on_workers(
            TASK, state, plan, units=UnitFile(path, "a"), on_unit=stop_after_seven, **arguments
        )
    with path.open("a") as file:
        file.write('{"index": 99, "ba')  # cut short by the crash
    again = []
    actual, _ = estimate_on_workers(
        TASK, state, plan, units=UnitFile(path, "a"), on_unit=again.append, **arguments
    )
    assert_same_bits(actual, expect(plan))
    assert len(again) <= plan.num_units - 7


def test_units_of_other_inputs_are_discarded(tmp_path):
    path = tmp_path / "units.jsonl"
    unit = UnitSums(0, 4, 2, np.array([1 / 3, 2.0]), np.array([1e-300, 5.0]), np.zeros(2))
    file = UnitFile(path, "a")
    assert list(file.read()) == []
    file.append(7, unit)
    ((index, back),) = UnitFile(path, "a").read()
    assert index == 7
    np.testing.assert_array_equal(back.total, unit.total)
    np.testing.assert_array_equal(back.square, unit.square)
    assert list(UnitFile(path, "b").read()) == []
    assert list(UnitFile(path, "a").read()) == []
