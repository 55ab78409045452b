"""Ray's Optuna searcher, for a study that is on disk and goes on where it stands.

The study is an SQLite file, which is whole after any kill: ``optuna-dashboard
sqlite:///RUN/study/optuna.db`` shows it while it runs. A trial that was interrupted is given to
Tune again under its own number, and the sampler is seeded anew for every trial from the seed and
its number, so that what is tried depends on what has ended before and on nothing that a process
remembers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search.optuna import OptunaSearch
from typing_extensions import override

from hawq.curvature.probes import probe_seed
from search.artefacts import Trial
from search.study.trying import NUMBER, StudySpecs
from search.trials import TrialSpec, settled

__all__ = ["RecipeSearch", "storage_url"]

# Fewer than Optuna's ten and fifty: trainings are dear, and studies short.
_NUM_RANDOM = 5
_POPULATION = 8


def storage_url(path: Path) -> str:
    """Return what Optuna and its dashboard call the file of a study."""
    return f"sqlite:///{path}"


class RecipeSearch(OptunaSearch):
    """Choose parameters by a study on disk, and tell it how trials ended.

    A finished trial has its scores there, one that was stopped early is pruned, one that diverged
    failed; a reason is in the attribute ``reason``.

    Args:
        space: What may be chosen.
        path: Of the file.
        name: Of the study in it.
        sampler: ``tpe`` maximizes the score; ``nsga2`` trades it for the stored size.
        seed: Of the sampler.
        num_trials: Of the whole study; it can be continued with more.
        first: Parameters to try first.
        specs: Makes a trial of parameters.
    """

    def __init__(
        self,
        space: Mapping[str, BaseDistribution],
        *,
        path: Path,
        name: str,
        sampler: Literal["tpe", "nsga2"],
        seed: int,
        num_trials: int,
        first: Mapping[str, Any] | None,
        specs: StudySpecs,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._is_pareto = sampler == "nsga2"
        self._wanted, self._seed_of_all, self.specs = num_trials, seed, specs
        self._names = space.keys()
        super().__init__(
            dict(space),
            metric=["search_score", "stored_bits"] if self._is_pareto else "search_score",
            mode=["max", "min"] if self._is_pareto else "max",
            sampler=self._sampler_of(0),
            study_name=name,
            storage=RDBStorage(storage_url(path)),
        )
        study = self.study
        if first is not None and not study.trials:
            study.enqueue_trial(dict(first))
        running = study.get_trials(states=[TrialState.RUNNING])
        for trial in running:
            if trial.params.keys() != space.keys():  # killed while it was being chosen
                study.tell(trial.number, state=TrialState.FAIL)
        self._interrupted = [t for t in running if t.params.keys() == space.keys()]

    @property
    def study(self) -> optuna.Study:
        """Optuna's study."""
        return cast("optuna.Study", self._ot_study)

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials whose parameters were chosen, in order."""
        found = self.study.get_trials(deepcopy=False)
        return [t for t in found if t.params.keys() == self._names and _is_begun(t)]

    @property
    def num_left(self) -> int:
        """How many trials are still to be run or to be ended."""
        return self._wanted - sum(trial.state.is_finished() for trial in self.trials)

    def spec(self, trial: FrozenTrial) -> TrialSpec:
        """Return what a trial of the study is a trial of."""
        return self.specs(trial.params | {NUMBER: trial.number})

    def result(self, trial: FrozenTrial, error: Exception | None) -> Trial:
        """Return how a trial ended; what its worker died of is None where it was stopped early."""
        return settled(self.spec(trial), error)

    @override
    def suggest(self, trial_id: str) -> dict[str, Any]:
        if trial_id not in self._ot_trials and self._interrupted:
            trial = optuna.trial.Trial(self.study, self._interrupted.pop(0)._trial_id)
            self._ot_trials[trial_id] = trial
        elif trial_id not in self._ot_trials:
            number = sum(map(_is_begun, self.study.get_trials(deepcopy=False)))
            self.study.sampler = self._sampler_of(number)
        parameters = super().suggest(trial_id)
        assert parameters is not None
        return parameters | {NUMBER: self._ot_trials[trial_id].number}

    @override
    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if "search_score" in result:  # else it ended before its first epoch
            self._report(self._ot_trials[trial_id], result["epoch"], result["search_score"])

    @override
    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if not error:  # a death is for the driver to judge, which has its reason
            self.tell(self._ot_trials[trial_id], None)

    @override
    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the study is a file already."""

    def tell(self, trial: optuna.trial.Trial | FrozenTrial, error: Exception | None) -> Trial:
        """End a trial in the study as it ended in its folder.

        Args:
            trial: Of the study.
            error: What its worker died of; None where it ended by itself or was stopped early.
        """
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        found = self.result(frozen, error)
        if frozen.state.is_finished():
            return found
        if isinstance(trial, FrozenTrial):
            trial = optuna.trial.Trial(self.study, trial._trial_id)
        for record in found.epochs:  # Tune keeps to itself what it stopped a trial for
            self._report(trial, record.epoch + 1, record.search_score)
        trial.set_user_attr("folder", found.folder)
        trial.set_user_attr("seconds", found.seconds)
        trial.set_user_attr("reason", found.reason)
        if found.status == "finished":
            assert found.search_score is not None
            size = self.spec(frozen).stored_bits
            self.study.tell(trial, [found.search_score, *([size] if size is not None else [])])
        else:
            is_stopped = found.status == "stopped"
            self.study.tell(trial, state=TrialState.PRUNED if is_stopped else TrialState.FAIL)
        return found

    def _report(self, trial: optuna.trial.Trial, step: int, score: float) -> None:
        """Tell a score under way, once; Optuna has none of several objectives."""
        told = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        if not self._is_pareto and step not in told:
            trial.report(score, step=step)

    def _sampler_of(self, number: int) -> BaseSampler:
        seed = probe_seed(self._seed_of_all, number, 0) % (1 << 32)
        if self._is_pareto:
            return NSGAIISampler(population_size=_POPULATION, seed=seed)
        return TPESampler(n_startup_trials=_NUM_RANDOM, seed=seed)


def _is_begun(trial: FrozenTrial) -> bool:
    return trial.state != TrialState.WAITING
