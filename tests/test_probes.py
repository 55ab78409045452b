"""Probes on Ray workers: the same bits for any number of them, and for any deaths."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayActorError

from hawq.curvature import (
    Reducer,
    TracePlan,
    UnitSums,
    estimate_traces,
    output_curvature,
    plan_traces,
    run_unit,
)
from hawq.space import quantizable_layers
from search import probes
from search.config import CurvatureConfig, WorkersConfig
from search.errors import InputError
from search.probes import ProbeWorker, WorkerPool, estimate_on_workers
from search.tasks.classification import ClassificationTask
from search.tracing import trace_on_cluster
from search.unit_file import UnitFile

DIGITS = {"data": "digits", "root": None, "network": "resnet8", "search_size": 100}
TASK = ClassificationTask(**DIGITS)
LAYERS = tuple(quantizable_layers(TASK.model()))

# Workers cannot import a test's module: what is defined here travels by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def make_plan(**changes):
    settings = {
        "layers": LAYERS,
        "estimator": "gauss_newton",
        "split": "train",
        "examples": tuple(range(100)),
        "batch_size": 16,  # the last batch is smaller
        "probes_per_unit": 2,
        "rtol": 1e-9,
        "max_probes": 6,
        "seed": 3,
    }
    return TracePlan(**{**settings, **changes})


def state_of(task=TASK):
    return task.model().state_dict()


def expect(plan, task=TASK):
    torch.set_num_threads(1)
    return estimate_traces(task, task.model(), plan)


def assert_same_bits(actual, expected):
    for field in ("trace", "probe_error", "data_error", "share_probe_error", "share_data_error"):
        np.testing.assert_array_equal(getattr(actual, field), getattr(expected, field))
    assert actual.num_probes == expected.num_probes


def assert_same_unit(actual, expected):
    np.testing.assert_array_equal(actual.sums, expected.sums)
    for field in ("batch", "num_examples", "num_probes", "drawn"):
        np.testing.assert_equal(getattr(actual, field), getattr(expected, field))


# --- any number of workers ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 2])
def pool(request, ray_cluster):
    with WorkerPool(TASK, state_of(), workers=request.param, cpus=0.5) as workers:
        yield workers


PLANS = {
    "drawn by importance": {},
    "channels": {"granularity": "channel"},
    "activations": {"subject": "activations"},
    "mixed": {"estimator": "mixed_gauss_newton"},
    "random signs": None,
    "Hutchinson": {"estimator": "hutchinson"},
    "Hutchinson on activations": {"estimator": "hutchinson", "subject": "activations"},
    "corrected": {"estimator": "corrected_gauss_newton"},
    "Fisher": {"estimator": "fisher"},
}


@pytest.mark.ray
@pytest.mark.parametrize("name", PLANS)
def test_any_number_of_workers_gives_the_bits_of_one_process(pool, tmp_path, name):
    settings = PLANS[name]
    if settings is None:
        plan = make_plan()
    else:
        small = {"num_examples": 40, "pool": 200, "batch_size": 16, "probes_per_unit": 2}
        plan, _ = plan_traces(TASK, TASK.model(), LAYERS, max_probes=4, **small, **settings)
    before = pool.cpu_seconds
    actual = estimate_on_workers(pool, plan, units=UnitFile(tmp_path / "units.jsonl", "a"))
    assert_same_bits(actual, expect(plan))
    assert pool.cpu_seconds > before


@pytest.mark.ray
def test_an_early_stop_is_at_the_same_place(pool, tmp_path):
    plan = make_plan(rtol=0.2, max_probes=200)
    actual = estimate_on_workers(pool, plan, units=UnitFile(tmp_path / "units.jsonl", "a"))
    assert actual.num_probes < 200
    assert_same_bits(actual, expect(plan))


@pytest.mark.ray
def test_looking_keeps_the_order_and_tells_how_far_it_is(pool, monkeypatch):
    monkeypatch.setattr(probes, "_LOOK_CHUNK", 30)
    examples = torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist()
    heard = []
    found = pool.look("train", examples, 16, heard.append)
    assert heard[-1] == 200
    assert heard == sorted(heard)
    here, _, _ = ProbeWorker(TASK, state_of(), 1, "cpu").look("train", examples, 16)
    assert found.tolist() == here


# --- deaths ---------------------------------------------------------------------------------------


class Mortal(ProbeWorker):
    """Kills its own process at a unit, once or whenever it comes to it."""

    def run(self, plan, index):
        marker = Path(os.environ["HAWQ_TEST_MARKER"])
        if index == 5 and not (marker.exists() and os.environ["HAWQ_TEST_ONCE"]):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(plan, index)


class _Marked:
    """A remote class of mortals that know where to leave their mark."""

    def __init__(self, marker, once):
        self._variables = {"HAWQ_TEST_MARKER": str(marker), "HAWQ_TEST_ONCE": "1" if once else ""}

    def options(self, **options):
        runtime = {"env_vars": self._variables}
        return ray.remote(Mortal).options(**options, runtime_env=runtime)


@pytest.mark.ray
def test_a_worker_that_dies_is_replaced_and_changes_no_bit(ray_cluster, tmp_path, monkeypatch):
    marker = tmp_path / "died"
    monkeypatch.setattr(probes, "RemoteProbeWorker", _Marked(marker, once=True))
    plan = make_plan()
    with WorkerPool(TASK, state_of(), workers=2, cpus=0.5) as workers:
        actual = estimate_on_workers(workers, plan, units=UnitFile(tmp_path / "units.jsonl", "a"))
        assert marker.exists()
        assert_same_bits(actual, expect(plan))
        # The pool is whole again, and may be used on.
        assert len(workers.look("train", range(20), 10, lambda _: None)) == 20


@pytest.mark.ray
def test_workers_that_keep_dying_are_given_up(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "RemoteProbeWorker", _Marked(tmp_path / "died", once=False))
    monkeypatch.setattr(probes, "_MAX_LOST_WORKERS", 1)
    with (
        WorkerPool(TASK, state_of(), workers=1, cpus=0.5) as workers,
        pytest.raises(RayActorError),
    ):
        estimate_on_workers(workers, make_plan(), units=UnitFile(tmp_path / "units.jsonl", "a"))


class Unbuildable(ClassificationTask):
    """Its network cannot be built, as where a file is missing on another machine."""

    def model(self):
        raise FileNotFoundError("no weights on this machine")


@pytest.mark.ray
def test_a_task_that_a_worker_cannot_build_is_told_in_a_line(ray_cluster, tmp_path):
    with (
        WorkerPool(Unbuildable(**DIGITS), state_of(), workers=1, cpus=0.5) as workers,
        pytest.raises(InputError, match=r"must be able to build the task, got .*no weights"),
    ):
        estimate_on_workers(workers, make_plan(), units=UnitFile(tmp_path / "units.jsonl", "a"))


@dataclass(frozen=True, slots=True)
class LargeUnit(UnitSums):
    """A unit too large for an answer: it is on its worker's node until it is fetched."""

    ballast: bytes = bytes(1 << 20)


class SignedIn(ProbeWorker):
    """Tells its node in a file. Units from 10 and from 20 wait for a second and a third node."""

    def answer(self):
        with Path(os.environ["HAWQ_TEST_PLACES"]).open("a") as file:
            file.write(f"{ray.get_runtime_context().get_node_id()} {os.getpid()}\n")

    def run(self, plan, index):
        while len(places()) < min(3, 1 + index // 10):
            time.sleep(0.05)
        unit, seconds, micro_batch = super().run(plan, index)
        return LargeUnit(**asdict(unit)), seconds, micro_batch


def places():
    """Return the nodes that workers have told, the first first, with their processes."""
    path = Path(os.environ["HAWQ_TEST_PLACES"])
    lines = path.read_text().splitlines() if path.exists() else []
    return {node: int(process) for node, process in map(str.split, lines)}


def lose_nodes(folder: str) -> None:
    """Lose the nodes of two workers; only one has a spare. Runs in a process of its own."""
    from ray.cluster_utils import Cluster  # noqa: PLC0415 (in no other test)

    os.environ["HAWQ_TEST_PLACES"] = f"{folder}/places"
    small = {"object_store_memory": 100 << 20}
    # By default Ray takes up to half a minute to see that a node is gone.
    soon = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 3,
    }
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": soon, **small}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    added = [cluster.add_node(num_cpus=1, **small) for _ in range(3)]
    nodes = {node.node_id: node for node in added}
    ray.init(address=cluster.address, log_to_driver=False)
    probes.RemoteProbeWorker = ray.remote(SignedIn)
    plan = make_plan(max_probes=20)
    done, lost = [], []

    def remove(_):
        """Lose the first node when there is a second, and the second when there is a third."""
        done.append(1)
        if len(lost) < 2 and len(places()) >= len(lost) + 2:
            time.sleep(0 if lost else 0.5)  # until the first node alone has its next unit, done
            node, process = list(places().items())[len(lost)]
            lost.append(node)
            cluster.remove_node(nodes[node], allow_graceful=False)
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)  # Ray's would outlive it for a moment

    with WorkerPool(TASK, state_of(), workers=2, cpus=1) as workers:
        units = UnitFile(Path(folder) / "units.jsonl", "a")
        actual = estimate_on_workers(workers, plan, units=units, on_unit=remove)
        assert len(lost) == 2
        assert workers._lost >= 2
    assert_same_bits(actual, expect(plan))
    assert len(done) == plan.num_units
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_is_lost_and_never_comes_back_changes_no_bit(tmp_path):
    # One process has one cluster, and the other tests' is taken.
    script = f"import conftest, test_probes; test_probes.lose_nodes({str(tmp_path)!r})"
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parent,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
            stdout=output,
            stderr=output,
        )
        try:
            assert process.wait(timeout=150) == 0, log.read_text()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # Ray's processes end with their driver
            process.wait()
            pytest.fail("the estimation did not end after its nodes were lost")


# --- stops ----------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_stopped_estimation_goes_on_where_it_stopped(pool, tmp_path):
    plan = make_plan()
    path = tmp_path / "units.jsonl"

    class Stop(Exception):
        pass

    done = []

    def stop_after_seven(_):
        done.append(1)
        if len(done) == 7:
            raise Stop

    with pytest.raises(Stop):
        estimate_on_workers(pool, plan, units=UnitFile(path, "a"), on_unit=stop_after_seven)
    with path.open("a") as file:
        file.write('{"index": 99, "ba')  # cut short by the crash
    again = []
    actual = estimate_on_workers(pool, plan, units=UnitFile(path, "a"), on_unit=again.append)
    assert_same_bits(actual, expect(plan))
    assert len(again) == plan.num_units - 7
    # All of it is there now.
    assert_same_bits(
        estimate_on_workers(pool, plan, units=UnitFile(path, "a"), on_unit=again.append), actual
    )
    assert len(again) == plan.num_units - 7


@pytest.mark.parametrize("estimator", ["exact_gauss_newton", "mixed_gauss_newton", "gauss_newton"])
def test_units_keep_every_bit_on_disk(tmp_path, estimator):
    plan = make_plan(estimator=estimator, examples=(1, 2, 3, 4), batch_size=2)
    units = [run_unit(TASK, TASK.model(), plan, index) for index in range(2)]
    path = tmp_path / "units.jsonl"
    file = UnitFile(path, "a")
    assert list(file.read()) == []
    for index, unit in enumerate(units):
        file.append(index, unit)
    back = dict(UnitFile(path, "a").read())
    assert list(back) == [0, 1]
    for index, unit in enumerate(units):
        assert_same_unit(back[index], unit)


def test_units_of_other_inputs_are_discarded(tmp_path):
    path = tmp_path / "units.jsonl"
    unit = UnitSums.of(0, 4, np.array([[1 / 3, 1e-300], [2.0, 5.0]]), 2)
    file = UnitFile(path, "a")
    assert list(file.read()) == []
    file.append(7, unit)
    ((index, back),) = UnitFile(path, "a").read()
    assert index == 7
    assert_same_unit(back, unit)
    assert list(UnitFile(path, "b").read()) == []
    assert list(UnitFile(path, "a").read()) == []


# --- memory ---------------------------------------------------------------------------------------


class Hungry(ClassificationTask):
    """A machine whose memory holds three examples."""

    error = torch.OutOfMemoryError

    def batch(self, split, indices):
        if len(indices) > 3:
            raise self.error("can't allocate memory: you tried to allocate too much")
        return super().batch(split, indices)


class HungryOnTheCpu(Hungry):
    """The same where running out of memory has no name."""

    error = RuntimeError


class Starving(Hungry):
    """A machine that holds no example."""

    def batch(self, split, indices):
        raise torch.OutOfMemoryError("nothing fits")


class Broken(Hungry):
    """Another error than of memory."""

    def batch(self, split, indices):
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize("kind", [Hungry, HungryOnTheCpu])
@pytest.mark.parametrize("estimator", ["exact_gauss_newton", "gauss_newton"])
def test_a_unit_that_does_not_fit_is_done_in_parts(kind, estimator):
    plan = make_plan(estimator=estimator)
    worker = ProbeWorker(kind(**DIGITS), state_of(), 1, "cpu")
    unit, seconds, micro_batch = worker.run(plan, 0)
    assert micro_batch == 2  # 16, 8, 4, 2
    assert seconds > 0
    assert_same_unit(unit, run_unit(TASK, TASK.model(), plan, 0, micro_batch=2))
    if estimator == "exact_gauss_newton":  # whose values do not depend on the parts
        whole = run_unit(TASK, TASK.model(), plan, 0)
        np.testing.assert_allclose(unit.sums, whole.sums, rtol=1e-4, atol=1e-9)
    # What has been learned is kept.
    assert worker._micro_batch == 2
    assert worker.run(plan, 1)[2] == 2


def test_one_example_that_does_not_fit_is_an_error():
    worker = ProbeWorker(Starving(**DIGITS), state_of(), 1, "cpu")
    with pytest.raises(torch.OutOfMemoryError, match="nothing fits"):
        worker.run(make_plan(), 0)


def test_other_errors_are_not_taken_for_one_of_memory():
    worker = ProbeWorker(Broken(**DIGITS), state_of(), 1, "cpu")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        worker.run(make_plan(), 0)
    assert worker._micro_batch is None


def test_a_worker_may_know_its_memory_beforehand():
    worker = ProbeWorker(TASK, state_of(), 1, "cpu", micro_batch=5)
    unit, _, micro_batch = worker.run(make_plan(), 0)
    assert micro_batch == 5
    assert_same_unit(unit, run_unit(TASK, TASK.model(), make_plan(), 0, micro_batch=5))


@pytest.mark.ray
def test_a_shortage_of_memory_is_noted_once(ray_cluster, tmp_path):
    plan = make_plan(estimator="exact_gauss_newton")
    notes = []
    with WorkerPool(Hungry(**DIGITS), state_of(), workers=1, cpus=0.5) as workers:
        units = UnitFile(tmp_path / "units.jsonl", "a")
        estimate = estimate_on_workers(workers, plan, units=units, on_note=notes.append)
    assert notes == ["2 examples at once, as memory allows"]
    np.testing.assert_allclose(estimate.trace, expect(plan).trace, rtol=1e-5)


# --- looking --------------------------------------------------------------------------------------


def test_looking_is_the_outputs_curvature_within_half_precision():
    state = state_of()
    trained = {**state, "linear.weight": 6 * state["linear.weight"]}  # as sure as a trained one
    model = TASK.model()
    model.load_state_dict(trained)
    examples = list(range(0, 300, 2))
    expected = output_curvature(TASK, model.eval(), TASK.batch("train", torch.tensor(examples)))
    worker = ProbeWorker(TASK, trained, 1, "cpu")
    found, seconds, batch_size = worker.look("train", examples, 32)
    assert seconds > 0
    assert batch_size == 32
    assert float(expected.max()) > 100 * float(expected.min())
    # bfloat16 has 8 bits: logits of size 5 are off by some hundredths.
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.05)
    assert np.corrcoef(found, expected)[0, 1] > 0.99
    assert sum(found) == pytest.approx(float(expected.sum()), rel=0.02)


class Bessel(ClassificationTask):
    """An operator that has no kernel in half precision."""

    def curvature(self, model, batch):
        torch.special.bessel_j0(model(self.inputs(batch)))
        return super().curvature(model, batch)


def test_looking_is_in_full_precision_where_an_operator_has_no_half():
    task = Bessel(**DIGITS)
    expected = output_curvature(task, task.model().eval(), task.batch("train", torch.arange(8)))
    found, _, _ = ProbeWorker(task, state_of(), 1, "cpu").look("train", range(8), 8)
    assert found == expected.tolist()


# --- from settings to an estimate -----------------------------------------------------------------


@pytest.mark.ray
def test_tracing_on_the_cluster_is_planning_and_estimating_here(ray_cluster, tmp_path, monkeypatch):
    # Looks of both are the same only where both are in the same precision.
    monkeypatch.setattr(probes, "RemoteProbeWorker", ray.remote(WholePrecision))
    settings = CurvatureConfig(examples=40, pool=200, batch_size=16, rtol=0.1)
    notes, heard = [], []
    traced = trace_on_cluster(
        TASK,
        state_of(),
        LAYERS,
        settings=settings,
        workers=WorkersConfig(count=2, cpus=0.5),
        seed=4,
        units=UnitFile(tmp_path / "units.jsonl", "a"),
        granularity="channel",
        progress=lambda *how: heard.append(how),
        note=notes.append,
    )
    model = TASK.model()
    plan, reason = plan_traces(
        TASK,
        model,
        LAYERS,
        granularity="channel",
        num_examples=40,
        pool=200,
        batch_size=16,
        rtol=0.1,
        seed=4,
    )
    assert traced.plan == plan
    assert traced.reason == reason
    assert notes == [f"{plan.estimator}: {reason}"]
    assert_same_bits(traced.estimate, expect(plan))
    assert ("images", "which examples matter") in {how[2:4] for how in heard}
    assert heard[-1][0] == heard[-1][1]
    assert traced.cpu_seconds > 0


class WholePrecision(ProbeWorker):
    """Looks in single precision, whatever the machine has."""

    def look(self, split, examples, batch_size):
        found = [
            output_curvature(self._task, self._model, self._task.batch(split, part))
            for part in torch.tensor(examples).split(batch_size)
        ]
        return torch.cat(found).tolist(), 0.0, batch_size


class Flickering(ClassificationTask):
    """Augments its examples whether it is asked to or not."""

    def batch(self, split, indices):
        images, labels = super().batch(split, indices)
        return images + 0.1 * torch.randn_like(images), labels


def test_a_task_whose_examples_change_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"batch\(\) must return the same examples"):
        trace_on_cluster(
            Flickering(**DIGITS),
            state_of(),
            LAYERS,
            settings=CurvatureConfig(examples=40),
            workers=WorkersConfig(count=1),
            seed=0,
            units=UnitFile(tmp_path / "units.jsonl", "a"),
        )


def test_a_reducer_ignores_what_comes_after_its_stop():
    plan = make_plan(estimator="exact_gauss_newton", examples=(1, 2, 3, 4), batch_size=2)
    reducer = Reducer(plan)
    units = [run_unit(TASK, TASK.model(), plan, index) for index in range(2)]
    for index in (1, 0):
        reducer.add(index, units[index])
    assert reducer.finished
    estimate = reducer.estimate
    reducer.add(0, units[1])
    assert reducer.estimate is estimate
