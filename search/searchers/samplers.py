"""Optuna's samplers as drivers of a decision process: ask for actions, tell what came of them."""

import warnings
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Literal

from search.evaluate import Evaluation
from search.searchers.processes import Drive, Process

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

__all__ = ["SamplerName", "sampler"]

SamplerName = Literal["random", "tpe", "cma-es", "nsga2"]

# As many random trials as DDPG's warm-up has episodes; a population of NSGA-II.
_WARMUP = 20
# The evolution strategy's own first step, of a range of 1, is a sixth.
_WARM_SIGMA = 0.1


def sampler(name: SamplerName) -> Drive:
    """Return the driver that asks a sampler for every action of an episode at once.

    ``nsga2`` looks for two things, the reward and a small size; the others for the reward alone.
    """

    def drive(
        process: Process,
        *,
        starts: Sequence[Sequence[float]],
        evaluations: int,  # noqa: ARG001 (samplers have no schedule)
        seed: int,
    ) -> Generator[Evaluation]:
        import optuna  # noqa: PLC0415 (takes a second)

        from search.scorers import scored  # noqa: PLC0415 (Ray)

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        env = process()
        names = [f"a{step}" for step in range(env.num_steps)]
        both = name == "nsga2"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                sampler=_SAMPLERS[name](seed, starts),
                directions=["maximize", "minimize"] if both else ["maximize"],
            )
            # The evolution strategy begins around the first; the others are shown each of them.
            for start in starts:
                study.enqueue_trial(dict(zip(names, start, strict=True)))
        problem, effort = process.problem, process.problem.effort
        size = problem.tables.costs["weight_bits"]
        with scored(problem.evaluate, effort.runners, effort.cpus, effort.gpus) as score:
            while True:
                trials = [study.ask() for _ in range(max(1, effort.runners))]
                allocations = [
                    env.allocation_of([trial.suggest_float(n, 0, 1) for n in names])
                    for trial in trials
                ]
                found = score(allocations)
                for trial, evaluation in zip(trials, found, strict=True):
                    values: list[float] = [problem.reward(evaluation)]
                    if both:
                        values.append(size.of(problem.tables.space, evaluation.allocation))
                    study.tell(trial, values)
                yield from found

    return drive


def _cma(seed: int, starts: Sequence[Sequence[float]]) -> "BaseSampler":
    from optuna.samplers import CmaEsSampler  # noqa: PLC0415

    if not starts:
        return CmaEsSampler(seed=seed)
    with warnings.catch_warnings():
        # To go with Optuna 6: what it offers instead takes other trials' scores, not a start.
        warnings.simplefilter("ignore", FutureWarning)
        x0 = {f"a{step}": action for step, action in enumerate(starts[0])}
        return CmaEsSampler(x0=x0, sigma0=_WARM_SIGMA, seed=seed)


def _tpe(seed: int, _: Sequence[Sequence[float]]) -> "BaseSampler":
    from optuna.samplers import TPESampler  # noqa: PLC0415

    return TPESampler(n_startup_trials=_WARMUP, multivariate=True, seed=seed)


def _nsga(seed: int, _: Sequence[Sequence[float]]) -> "BaseSampler":
    from optuna.samplers import NSGAIISampler  # noqa: PLC0415

    return NSGAIISampler(population_size=_WARMUP, seed=seed)


def _random(seed: int, _: Sequence[Sequence[float]]) -> "BaseSampler":
    from optuna.samplers import RandomSampler  # noqa: PLC0415

    return RandomSampler(seed=seed)


_SAMPLERS: dict[SamplerName, Callable[[int, Sequence[Sequence[float]]], "BaseSampler"]] = {
    "random": _random,
    "tpe": _tpe,
    "cma-es": _cma,
    "nsga2": _nsga,
}
