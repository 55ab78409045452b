"""Searches whose best is known: 20 channels, 3 widths, every reachable allocation enumerated."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from test_searches import make_channels, make_problem

from search.searchers import SEARCHERS
from search.searchers.processes import Process

EPISODES = 300
# The agents' own numbers were chosen on problems 0 to 4: these are others.
PROBLEMS = range(10, 15)


def make_known(seed):
    """The proxy on 20 channels of one layer, with the least Ω that ratios can reach."""
    problem = make_problem("cw-hawq", make_channels(seed, layers=(20,), menu=(2, 4, 8)), share=0.45)
    process = Process(problem, True)()
    # A grid of every number of channels, for both of the steps.
    actions = [k / 20 for k in range(21)]
    reachable = {
        allocation.digest: problem.tables.omega(allocation)
        for pair in product(actions, repeat=process.num_steps)
        for allocation in [process.allocation_of(pair)]
    }
    return problem, min(reachable.values()), len(reachable)


def best_within(method, problem, seed):
    """Return the least Ω among the first episodes."""
    episodes, best = 0, np.inf
    for evaluation in SEARCHERS[method].search(problem, evaluations=EPISODES, seed=seed):
        episodes += evaluation.proposals
        if episodes > EPISODES:
            break
        best = min(best, -evaluation.score)
    return best


@pytest.mark.parametrize(("method", "least"), [("random", 4), ("tpe", 5), ("cma-es", 4)])
def test_samplers_find_nearly_the_best_of_five_as_often_as_they_did(method, least):
    found = 0
    for seed in PROBLEMS:
        problem, optimum, num_reachable = make_known(seed)
        assert num_reachable > 50
        found += optimum / best_within(method, problem, seed) >= 0.95
    assert found >= least


@pytest.mark.ray
def test_ddpg_finds_nearly_the_best_with_every_seed(ray_cluster, tmp_path):
    for seed in PROBLEMS:
        problem, optimum, _ = make_known(seed)
        effort = replace(problem.effort, checkpoint=tmp_path / f"agent{seed}")
        found = best_within("cw-hawq", replace(problem, effort=effort), seed)
        assert optimum / found >= 0.95, f"seed {seed}"
