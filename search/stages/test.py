"""Stage 7: the one look at the test split."""

from itertools import combinations
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from search.artefacts import Difference, Score, TestArtefact, TrialsArtefact
from search.folder import content_hash
from search.stages.scoring import Job, score_all
from search.stages.search import Search
from search.stages.trials import specs
from search.tasks.checkpoint import save_state

__all__ = ["inputs", "make"]


def inputs(search: Search) -> dict[str, Any]:
    """The trials."""
    trials = TrialsArtefact(trials=search.trials)
    return {"config": {}, "trials": content_hash(trials.model_dump(mode="json"))}


def make(search: Search) -> TestArtefact:
    """Score the unquantized network and every finished trial on the same test examples."""
    finished = {trial.digest for trial in search.trials if trial.status == "finished"}
    tested = [spec for spec in specs(search) if spec.digest in finished]
    jobs: list[Job] = [(search.weights, None)]
    jobs += [(load_file(spec.folder / "model.safetensors"), spec) for spec in tested]
    reference, *found = score_all(search, "test", jobs, "test")
    scores = {spec.digest: values for spec, values in zip(tested, found, strict=True)}
    path = search.folder.path / "test_scores.safetensors"
    save_state(path, {"unquantized": reference, **scores})
    return TestArtefact(
        num_examples=len(reference),
        unquantized=_score(reference, reference),
        scores={digest: _score(values, reference) for digest, values in scores.items()},
        differences=[
            _difference(first, second, scores[first] - scores[second])
            for first, second in combinations(scores, 2)
        ],
    )


def _score(found: Tensor, reference: Tensor) -> Score:
    lost = reference - found
    return Score(
        score=float(found.mean()),
        standard_error=_standard_error(found),
        drop=float(lost.mean()),
        drop_standard_error=_standard_error(lost),
    )


def _difference(first: str, second: str, gained: Tensor) -> Difference:
    return Difference(
        first=first,
        second=second,
        difference=float(gained.mean()),
        standard_error=_standard_error(gained),
    )


def _standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5)
