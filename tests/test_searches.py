"""Methods that score what they try: within the budget, each allocation once, whatever happens."""

import json
import os
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
import ray
from oracles import TinyTask
from test_searchers import make_tables

from hawq.allocation import Allocation, by_group, by_owner
from hawq.finetune import Recipe
from hawq.space import Group, Space, quantizable_layers
from search.evaluate import Evaluation
from search.scorers import scored
from search.scores import ScoreSpec
from search.searchers import SEARCHERS, Effort, Problem, Reward, around
from search.searchers.processes import MOST_REPEATS, Process, distinct
from search.searches import (
    EvaluationFailedError,
    SearchSpec,
    TrainedScores,
    run_search,
    run_searches,
)
from search.searches.log import EvaluationLog
from search.tasks.checkpoint import save_state

# Ray's workers cannot import it.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

SAMPLERS = ["random", "tpe", "cma-es", "nsga2"]
CLIMBERS = ["hill-climbing", "hill-climbing-layers"]
SIZES = [50, 200, 90, 10, 70, 120, 30, 160]
QUIET = [*SAMPLERS, *(f"{name}-layers" for name in SAMPLERS), *CLIMBERS]
WARM = ["warm-tpe", "warm-cma-es", "warm-nsga2", "warm-tpe-layers"]
AGENTS = ["cw-hawq", "haq", "sac", "ppo"]


def make_channels(seed=0, layers=(6, 8, 6), menu=(1, 2, 4, 8)):
    """Tables of channels, of which every layer has some."""
    tables = make_tables([4] * sum(layers), menu, seed)
    names = [f"w:l{i}[{c}]" for i, n in enumerate(layers) for c in range(n)]
    groups = [
        Group(name, group.num_elements, group.macs, group.menu)
        for name, group in zip(names, tables.space.groups, strict=True)
    ]
    return replace(tables, space=Space(tuple(groups)))


def make_problem(method, tables=None, evaluate=None, share=0.4):
    by_channel = SEARCHERS[method].by_channel
    tables = tables or (make_channels() if by_channel else make_tables(SIZES, (1, 2, 4, 8), 0))
    most = int(tables.costs["weight_bits"].steps[0].max(1).sum())
    budgets = tables.budgets({"weight_bits": int(share * most)})
    features = None
    if not by_channel:
        features = np.random.default_rng(0).random((len(tables.space.rows()), 3), np.float32)
    return Problem(
        tables,
        budgets,
        evaluate or tables.proxy,
        reward=Reward(0.0, 1 / tables.sensitivity[:, 0].sum()),
        features=features,
    )


def found_by(method, problem, evaluations=12, seed=0):
    return list(SEARCHERS[method].search(problem, evaluations=evaluations, seed=seed))


@pytest.mark.parametrize("method", [*QUIET, *WARM])
def test_every_proposal_is_within_the_budget_and_new(method):
    problem = make_problem(method)
    found = found_by(method, problem)
    assert len(found) == 12
    assert len({evaluation.allocation.digest for evaluation in found}) == 12
    assert all(problem.fits(evaluation.allocation) for evaluation in found)
    assert all(e.score == problem.tables.proxy(e.allocation).score for e in found)


@pytest.mark.parametrize("method", [*QUIET, *WARM])
def test_the_same_seed_proposes_the_same_and_another_one_something_else(method):
    problem = make_problem(method)
    digests = [
        [e.allocation.digest for e in found_by(method, problem, 8, seed)] for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("method", CLIMBERS)
def test_climbing_begins_with_the_hessians_solution_and_never_loses_it(method):
    problem = make_problem(method)
    base = "channel" if SEARCHERS[method].by_channel else "exact"
    (solution,) = SEARCHERS[base].search(problem, evaluations=1, seed=0)
    found = found_by(method, problem)
    assert found[0].allocation == solution.allocation
    # By the proxy itself nothing is better.
    assert max(found, key=lambda e: e.score).score <= found[0].score + 1e-12


@pytest.mark.parametrize("method", ["hill-climbing", "hill-climbing-layers"])
def test_climbing_goes_where_scores_say(method):
    problem = make_problem(method)
    space = problem.tables.space
    first = [i for i, group in enumerate(space.groups) if group.owner == "l0"]

    def evaluate(allocation):
        """Only the first layer's bits count."""
        return Evaluation(allocation, float(sum(allocation.bits[i] for i in first)), "none")

    found = found_by(method, replace(problem, evaluate=evaluate), 40)
    assert max(e.score for e in found) > found[0].score


@pytest.mark.parametrize("method", ["tpe", "cma-es"])
def test_a_sampler_learns_from_what_it_is_told(method):
    problem = make_problem(method, make_channels(layers=(60, 60), menu=(1, 2, 3, 4)))
    scores = [e.score for e in found_by(method, problem, 60)]
    assert np.mean(scores[40:]) > np.mean(scores[:20]) + np.std(scores[:20]) / 3


def test_a_warm_start_begins_with_what_the_hessian_chose():
    problem = make_problem("warm-tpe-layers")
    starts = [
        next(iter(SEARCHERS[base].search(problem, evaluations=1, seed=0))).allocation
        for base in ("exact", "hawq-v2")
    ]
    found = found_by("warm-tpe-layers", problem)
    distinct_starts = list(dict.fromkeys(a.digest for a in starts))
    assert [e.allocation.digest for e in found[: len(distinct_starts)]] == distinct_starts


def test_a_drawn_neighbor_of_the_solution_is_within_the_budget():
    problem = make_problem("hill-climbing")
    rng = np.random.default_rng(3)
    drawn = [around(SEARCHERS["channel"], problem, rng) for _ in range(5)]
    assert all(problem.fits(allocation) for allocation in drawn)
    assert len({allocation.digest for allocation in drawn}) > 1


def test_repeats_are_counted_and_do_not_go_on_for_ever():
    problem = make_problem("random")
    (one,) = SEARCHERS["channel"].search(problem, evaluations=1, seed=0)
    (two,) = SEARCHERS["channel"].search(make_problem("random", share=0.6), evaluations=1, seed=0)
    closed = []

    def proposed():
        try:
            yield from (one, one, one, two)
            while True:
                yield one
        finally:
            closed.append(True)

    found = list(distinct(proposed(), 5))
    assert [e.proposals for e in found] == [1, 3]
    assert closed == [True]
    assert MOST_REPEATS < 1000


def test_a_process_travels_to_where_it_is_played():
    process = Process(make_problem("random"), True)
    travelled = pickle.loads(pickle.dumps(process))()
    env = process()
    actions = [0.3] * env.num_steps
    assert travelled.allocation_of(actions) == env.allocation_of(actions)
    env.reset()
    for action in actions:
        _, reward, terminated, _, info = env.step(np.array([action], np.float32))
    assert terminated
    assert reward == process.problem.reward(info["evaluation"])


def test_bits_by_layer_and_by_channel_are_the_same_bits():
    bits = {"w:a[0]": 2, "w:a[1]": 3, "w:b": 4}
    assert by_group(by_owner(bits)) == bits


# --- what becomes of a search that is stopped ---------------------------------------------------


class Counting:
    """Scores by the proxy, and remembers on disk what it was asked."""

    def __init__(self, tables, folder, stop_after=None):
        self.tables, self.folder, self.stop_after = tables, folder, stop_after

    def __call__(self, allocation):
        asked = self.folder / "asked"
        with asked.open("a") as file:
            file.write(f"{allocation.digest}\n")
        if self.stop_after is not None and len(asked.read_text().split()) > self.stop_after:
            raise KeyboardInterrupt
        return self.tables.proxy(allocation)


def make_spec(method, folder, evaluations=10, seed=0):
    return SearchSpec(method, "b", seed, evaluations, folder, "inputs")


@pytest.mark.parametrize("method", QUIET)
def test_a_search_that_was_stopped_goes_on_to_the_same_end(method, tmp_path):
    problem = make_problem(method)
    whole = run_search(make_spec(method, tmp_path / "whole"), problem)
    stopped = replace(problem, evaluate=Counting(problem.tables, tmp_path, stop_after=4))
    with pytest.raises(KeyboardInterrupt):
        run_search(make_spec(method, tmp_path / "parts"), stopped)
    parts = run_search(make_spec(method, tmp_path / "parts"), problem)
    assert [e.digest for e in parts.evaluations] == [e.digest for e in whole.evaluations]
    assert parts.bits == whole.bits
    assert parts.num_starts == (1 if method in CLIMBERS else 0)


def test_a_finished_search_is_not_searched_again(tmp_path):
    problem = make_problem("random")
    spec = make_spec("random", tmp_path / "s")
    first = run_search(spec, problem)

    def refuse(_):
        raise AssertionError("nothing is to be scored")

    assert run_search(spec, replace(problem, evaluate=refuse)) == first
    spec.record.unlink()  # killed between the last score and the record
    assert run_search(spec, replace(problem, evaluate=refuse)) == first
    other = replace(spec, inputs="others")
    with pytest.raises(EvaluationFailedError):
        run_search(other, replace(problem, evaluate=refuse))


def test_a_line_cut_short_is_left_out(tmp_path):
    problem = make_problem("random")
    spec = make_spec("random", tmp_path / "s")
    run_search(spec, problem)
    lines = spec.log.read_text().splitlines()
    spec.log.write_text("\n".join(lines[:4]) + "\n" + lines[4][:20])
    log = EvaluationLog(spec.log, "inputs", problem.tables.space)
    assert len(log.found) == 3
    allocation = log.allocation(2)
    assert allocation.digest == log.found[2].digest
    assert Allocation.of(problem.tables.space, allocation.bits) == allocation
    assert EvaluationLog(spec.log, "other inputs", problem.tables.space).found == []


@pytest.mark.ray
def test_an_agent_that_was_stopped_goes_on_to_the_same_end(ray_cluster, tmp_path):
    problem = make_problem("cw-hawq")
    whole = run_search(make_spec("cw-hawq", tmp_path / "whole"), problem)
    stopped = replace(problem, evaluate=Counting(problem.tables, tmp_path, stop_after=4))
    with pytest.raises(KeyboardInterrupt):
        run_search(make_spec("cw-hawq", tmp_path / "parts"), stopped)
    parts = run_search(make_spec("cw-hawq", tmp_path / "parts"), problem)
    assert [e.digest for e in parts.evaluations] == [e.digest for e in whole.evaluations]
    # The agent's state is for going on alone.
    assert not (tmp_path / "parts" / "agent").exists()


@pytest.mark.ray
def test_a_warm_agent_begins_where_the_hessian_ends(ray_cluster, tmp_path):
    problem = make_problem("warm-haq")
    record = run_search(make_spec("warm-haq", tmp_path / "s", 4), problem)
    (exact,) = SEARCHERS["exact"].search(problem, evaluations=1, seed=0)
    assert record.evaluations[0].digest == exact.allocation.digest
    assert record.num_starts == 2


# --- scores that fail ----------------------------------------------------------------------------


class Flaky:
    """Fails at some allocations, as often as is said."""

    def __init__(self, tables, folder, times, how):
        self.tables, self.folder, self.times, self.how = tables, folder, times, how

    def __call__(self, allocation):
        path = self.folder / allocation.digest
        failed = len(path.read_text()) if path.exists() else 0
        if failed < self.times:
            path.write_text("x" * (failed + 1))
            if self.how == "raises":
                raise OSError("the data\nare gone")
            return Evaluation(allocation, -np.inf, "none", status="failed", reason="not finite")
        return self.tables.proxy(allocation)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("how", "reason"), [("raises", "OSError: are gone"), ("says", "not finite")]
)
def test_a_score_that_fails_once_is_recorded_and_repeated_elsewhere(
    ray_cluster, tmp_path, how, reason
):
    problem = make_problem("random")
    flaky = replace(problem, evaluate=Flaky(problem.tables, tmp_path, 1, how))
    record = run_search(make_spec("random", tmp_path / "s", 3), flaky)
    assert [e.digest for e in record.evaluations] == [
        e.digest for e in run_search(make_spec("random", tmp_path / "t", 3), problem).evaluations
    ]
    assert record.failures == [f"{e.digest}: {reason}" for e in record.evaluations]


def test_a_score_that_fails_twice_stops_the_search_with_its_reason(tmp_path):
    problem = make_problem("random")
    flaky = replace(problem, evaluate=Flaky(problem.tables, tmp_path, 2, "raises"))
    with pytest.raises(EvaluationFailedError, match=r"here or elsewhere: OSError: are gone"):
        run_search(make_spec("random", tmp_path / "s", 3), flaky)
    (first, again) = (tmp_path / "s" / "failures.jsonl").read_text().splitlines()
    assert json.loads(first)["reason"] == json.loads(again)["reason"] == "OSError: are gone"


def test_a_score_may_be_a_short_training(tmp_path):
    task = TinyTask(num_examples=24)
    save_state(tmp_path / "model.safetensors", task.model().state_dict())
    spec = ScoreSpec(task, tmp_path / "model.safetensors", folder=tmp_path / "scores")
    recipe = Recipe(epochs=2, batch_size=8, lr=0.05)
    bits = {f"w:{name}": 4 for name in quantizable_layers(task.model())}
    groups = tuple(Group(name, 1, 1, (2, 4)) for name in bits)
    allocation = Allocation.of(Space(groups), bits)
    found = TrainedScores(spec, recipe)(allocation)
    assert found.fidelity == "finetuned"
    assert 0 <= found.score <= 1
    (folder,) = (tmp_path / "scores" / "finetuned").iterdir()
    assert not list(folder.glob("*.safetensors"))
    again = pickle.loads(pickle.dumps(TrainedScores(spec, recipe)))(allocation)
    assert again == found
    other = TrainedScores(spec, replace(recipe, epochs=1))(allocation)
    assert other.seconds < found.seconds or other.score != found.score
    assert len(list((tmp_path / "scores" / "finetuned").iterdir())) == 2


# --- on a cluster --------------------------------------------------------------------------------


@pytest.mark.ray
def test_searches_run_side_by_side_find_what_they_find_alone(ray_cluster, tmp_path):
    problem = make_problem("random")
    specs = [
        make_spec(method, tmp_path / f"{method}{seed}", 6, seed)
        for method in ("random", "tpe", "hill-climbing")
        for seed in (0, 1)
    ]
    told = []
    found = run_searches(
        specs,
        {("b", True): problem},
        effort=problem.effort,
        progress=lambda *how: told.append(how),
    )
    alone = [
        run_search(replace(spec, folder=tmp_path / "alone" / spec.folder.name), problem)
        for spec in specs
    ]
    assert [[e.digest for e in r.evaluations] for r in found] == [
        [e.digest for e in r.evaluations] for r in alone
    ]
    assert told[-1] == (36, 36)


@pytest.mark.ray
def test_searches_with_runners_of_their_own_do_not_wait_for_each_other(ray_cluster, tmp_path):
    effort = Effort(runners=2, cpus=0.9)
    problem = replace(make_problem("tpe"), effort=effort)
    methods = ["tpe", "cw-hawq", "hill-climbing"]
    specs = [make_spec(method, tmp_path / method, 6) for method in methods]
    found = run_searches(specs, {("b", True): problem}, effort=effort)
    assert [(record.method, len(record.evaluations)) for record in found] == [
        (method, 6) for method in methods
    ]


@pytest.mark.ray
def test_scorers_give_their_scores_in_order_and_are_replaced_when_they_die(ray_cluster, tmp_path):
    problem = make_problem("random")
    process = Process(problem, True)()
    rng = np.random.default_rng(0)
    allocations = [process.allocation_of(rng.random(process.num_steps)) for _ in range(5)]
    expected = [problem.tables.proxy(allocation) for allocation in allocations]
    with scored(problem.evaluate, 2, 0.5, 0) as score:
        assert score(allocations) == expected

    def dying(allocation):
        """Take the process along, once."""
        died = tmp_path / "died"
        if not died.exists():
            died.touch()
            os._exit(1)
        return problem.tables.proxy(allocation)

    with scored(dying, 1, 0.5, 0) as score:
        assert score(allocations) == expected
    assert (tmp_path / "died").exists()
