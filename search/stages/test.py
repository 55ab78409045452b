"""Stage 7: the one look at the test split."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from search.artefacts import Candidate, Difference, Score, TestArtefact, TrialsArtefact
from search.folder import content_hash, write_atomically
from search.pictured import PICTURES_FILE, pictured, take_pictures
from search.replicates import Replicates
from search.stages.scoring import Job, score_all
from search.stages.search import Search
from search.stages.trials import specs
from search.tasks.checkpoint import save_state
from search.trials import TrialSpec, quantized_model

__all__ = ["SCORES_FILE", "inputs", "make"]

# Per-example scores of the unquantized network, shape (N,), and by candidates' keys, shape (R, N),
# rows as in ``Score.seeds``.
SCORES_FILE = "test_scores.safetensors"


def inputs(search: Search) -> dict[str, Any]:
    """The trials, and what they are trials of."""
    trials = TrialsArtefact(trials=search.trials)
    return {
        "config": {},
        "trials": content_hash(trials.model_dump(mode="json")),
        "candidates": sorted({candidate.key for candidate in search.candidates}),
    }


def make(search: Search) -> TestArtefact:
    """Score the unquantized network and every finished trial once, on the same test examples."""
    finished = {(t.digest, t.seed) for t in search.trials if t.status == "finished"}
    tested = [spec for spec in specs(search) if (spec.digest, spec.seed) in finished]
    jobs: list[Job] = [(search.weights, None)]
    jobs += [(load_file(spec.folder / "model.safetensors"), spec) for spec in tested]
    reference, *found = (scores.numpy() for scores in score_all(search, "test", jobs, "test"))
    by_training = {(s.digest, s.seed): row for s, row in zip(tested, found, strict=True)}
    seeds = search.config.training_seeds
    replicates = {
        candidate.key: joined
        for candidate in search.candidates
        if (joined := _joined(candidate, seeds, by_training)) is not None
    }
    save_state(
        search.folder.path / SCORES_FILE,
        {"unquantized": torch.tensor(reference)}
        | {key: torch.tensor(r.scores, dtype=torch.float32) for key, r in replicates.items()},
    )
    _keep_pictures(search, tested)
    full = Replicates((0,), ("",), np.asarray(reference, np.float64)[None])
    return TestArtefact(
        num_examples=len(reference),
        unquantized=_score(full, full.scores[0]).model_copy(
            update={"seeds": [], "seed_scores": [], "digests": []}
        ),
        scores={key: _score(r, full.scores[0]) for key, r in replicates.items()},
        differences=[
            Difference(
                first=first,
                second=second,
                difference=gained.mean,
                standard_error=gained.error,
                num_seeds=gained.num_seeds,
                seeds_error=gained.seeds_error,
            )
            for first, second in combinations(replicates, 2)
            if (gained := replicates[first].minus(replicates[second])) is not None
        ],
    )


def _keep_pictures(search: Search, tested: Sequence[TrialSpec]) -> None:
    """Let the network, and the best of the trained ones, look at a few images, if it finds boxes.

    Of the search split, and the best there: the test split has been looked at once.
    """
    task = pictured(search.task)
    if task is None:
        return
    network = search.task.model()
    network.load_state_dict(search.weights)
    networks = {"fp32": network}
    score = {(t.digest, t.seed): t.search_score or 0.0 for t in search.trials}
    best = max(tested, key=lambda spec: score[spec.digest, spec.seed], default=None)
    if best is not None:
        quantized = quantized_model(search.task, search.weights, best)
        quantized.load_state_dict(load_file(best.folder / "model.safetensors"))
        method = next(c.method for c in search.candidates if best.digest in c.digests)
        networks[f"quantized: {method}"] = quantized
    found = take_pictures(task, {k: v.eval() for k, v in networks.items()})
    write_atomically(search.folder.path / PICTURES_FILE, found.model_dump_json())


def _joined(
    candidate: Candidate,
    seeds: tuple[int, ...],
    found: Mapping[tuple[str, int], NDArray[np.float32]],
) -> Replicates | None:
    """Gather a candidate's trainings that finished; None where none did."""
    trainings = [training for training in candidate.trainings(seeds) if training in found]
    if not trainings:
        return None
    digests, drawn = zip(*trainings, strict=True)
    return Replicates(drawn, digests, np.stack([found[t] for t in trainings]).astype(np.float64))


def _score(found: Replicates, reference: NDArray[np.float64]) -> Score:
    measured, drop = found.measured(), found.drop_from(reference)
    return Score(
        score=measured.mean,
        standard_error=measured.error,
        drop=drop.mean,
        drop_standard_error=drop.error,
        seeds=list(found.seeds),
        seed_scores=found.scores.mean(1).tolist(),
        digests=list(found.digests),
        seeds_error=measured.seeds_error,
    )
