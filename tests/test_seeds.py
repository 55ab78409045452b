"""Several seeds of fine-tuning: what is trained, the errors of the means, and what is shown."""

import numpy as np
import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file
from test_pipeline import TINY
from test_report import Page, changed, make_summary

from search.artefacts import Candidate, Draw, Summary, TrialsArtefact
from search.config_file import load_config
from search.errors import InputError
from search.folder import RunFolder
from search.pipeline import run
from search.quantities import percent
from search.replicates import Replicates
from search.report import render
from search.report.caveats import caveats
from search.report.figures import training_curves
from search.report.findings import searched, verdicts
from search.terminal import result_table


def make_replicates(scores, seeds=None, digests=None):
    scores = np.array(scores, np.float64)
    seeds = tuple(range(len(scores))) if seeds is None else seeds
    return Replicates(seeds, digests or ("d",) * len(scores), scores)


def error(values):
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


# --- the errors of a mean over seeds and images -------------------------------------------------


def test_one_seed_has_the_images_part_alone():
    found = make_replicates([[1, 0, 1, 1]]).measured()
    assert (found.mean, found.seeds_error, found.num_seeds) == (0.75, None, 1)
    assert found.error == found.images_error == pytest.approx(error([1, 0, 1, 1]))


def test_several_seeds_add_the_spread_between_them():
    scores = np.random.default_rng(0).random((3, 50)) < [[0.5], [0.7], [0.9]]
    found = make_replicates(scores).measured()
    images, seeds = error(scores.mean(0)), error(scores.mean(1))
    assert found.images_error == pytest.approx(images)
    assert found.seeds_error == pytest.approx(seeds)
    assert found.error == pytest.approx((images**2 + seeds**2) ** 0.5)


def test_the_error_is_what_means_of_other_images_and_seeds_scatter_by():
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(1500):
        images = rng.normal(0, 1.0, 40)
        seeds = rng.normal(0, 0.3, (5, 1))
        found = make_replicates(images + seeds + rng.normal(0, 0.5, (5, 40))).measured()
        means.append(found.mean)
        errors.append(found.error**2)
    # The part of neither alone, 0.5² / 200, is held twice.
    assert np.mean(errors) == pytest.approx(np.var(means) + 0.5**2 / 200, rel=0.08)


def test_what_a_seed_does_to_both_is_not_in_their_difference():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, (1, 80)) + rng.normal(0, 1, (4, 1))
    first, second = make_replicates(base + 0.25), make_replicates(base)
    gained = first.minus(second)
    assert gained.mean == pytest.approx(0.25)
    assert gained.error == pytest.approx(0, abs=1e-12)
    assert first.measured().error > 0.1
    shuffled = make_replicates(base[[1, 0, 2, 3]])  # other seeds are other trainings
    assert first.minus(shuffled).seeds_error > 0.1


def test_a_difference_is_of_the_seeds_that_both_have():
    first = make_replicates([[1, 1, 1, 0], [0, 0, 0, 0]], seeds=(3, 5))
    second = make_replicates([[1, 0, 0, 0], [1, 1, 1, 1]], seeds=(3, 4))
    gained = first.minus(second)
    assert (gained.mean, gained.num_seeds, gained.seeds_error) == (0.5, 1, None)
    assert first.minus(make_replicates([[1, 0, 0, 0]], seeds=(9,))) is None


def test_random_draws_with_a_seed_each_have_their_spread_in_the_error():
    scores = [[1, 1, 1, 0], [0, 0, 1, 0]]
    one_seed = make_replicates(scores, seeds=(0, 0), digests=("a", "b"))
    two_seeds = make_replicates(scores, seeds=(0, 1), digests=("a", "b"))
    for found in (one_seed, two_seeds):
        assert found.measured().seeds_error == pytest.approx(error([0.75, 0.25]))
    other = make_replicates([[1, 1, 1, 1]], seeds=(0,))
    assert one_seed.minus(other).seeds_error == pytest.approx(error([0.75, 0.25]))
    assert two_seeds.minus(other).seeds_error is None


def test_draws_that_meet_seeds_crosswise_add_both_spreads():
    scores = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    found = make_replicates(scores, seeds=(0, 1, 0, 1), digests=("a", "a", "b", "b"))
    by_draw, by_seed = error([0.75, 0.25]), error([0.75, 0.25])
    assert found.measured().seeds_error == pytest.approx((by_draw**2 + by_seed**2) ** 0.5)


def test_scores_that_do_not_fit_their_seeds_are_refused():
    with pytest.raises(ValueError, match=r"scores must have shape \(2, N\).* got \(1, 4\)"):
        Replicates((0, 1), ("a", "a"), np.zeros((1, 4)))
    with pytest.raises(ValueError, match="a training and two examples"):
        Replicates((0,), ("a",), np.zeros((1, 1)))


# --- what is trained -----------------------------------------------------------------------------


def make_candidate(**values):
    candidate = make_summary().candidates.candidates[0]
    return Candidate.model_validate(candidate.model_dump() | values)


def make_draw(digest):
    return Draw(digest=digest, bits={}, costs={}, sensitivity=1.0)


def test_a_candidate_is_trained_once_with_every_seed():
    assert make_candidate(digest="d").trainings([4, 2]) == [("d", 4), ("d", 2)]


def test_an_order_makes_another_training_of_the_same_allocation():
    plain, forth = make_candidate(digest="d"), make_candidate(digest="d", order=[["a"], ["b"]])
    back = make_candidate(digest="d", order=[["b"], ["a"]])
    assert plain.key == "d"
    assert len({plain.key, forth.key, back.key}) == 3
    assert forth.key == make_candidate(digest="d", order=[["a"], ["b"]]).key


def test_of_several_draws_each_is_trained_with_one_seed():
    candidate = make_candidate(digest="a", draws=[make_draw("b"), make_draw("c")])
    assert candidate.trainings([7, 8]) == [("a", 7), ("b", 8), ("c", 7)]
    assert candidate.key not in {"a", "b", "c"}


@pytest.mark.parametrize("seeds", ["[]", "[-1]", "[1, 1]", "[0.5]", "1"])
def test_seeds_that_make_no_sense_are_refused_by_name(tmp_path, seeds):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(TINY))
    with pytest.raises(InputError, match=r"trials\.seeds"):
        load_config(path, [f"trials.seeds={seeds}"])


def test_without_seeds_the_one_of_the_config_is_taken(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(TINY))
    assert load_config(path, ["seed=5"]).training_seeds == (5,)
    assert load_config(path, ["trials.seeds=[2, 0]"]).training_seeds == (2, 0)


# --- what is shown -------------------------------------------------------------------------------


def with_seeds(summary: Summary, seeds=(17, 18), failed=None) -> Summary:
    """Copy a summary with every trial done with every seed, but one that failed."""
    digest = summary.candidates.candidates[0].digest
    trials, scores = [], summary.model_dump(mode="json")["test"]["scores"]
    for seed in seeds:
        for trial in summary.model_dump(mode="json")["trials"]["trials"]:
            odd = seed == failed and trial["digest"] == digest
            ended = {"status": "failed", "reason": "the loss is NaN", "epochs": trial["epochs"][:2]}
            trials.append(trial | {"seed": seed} | (ended if odd else {}))
    for key, score in scores.items():
        mine = [s for s in seeds if s != failed or key != digest]
        score |= {"seeds": mine, "seed_scores": [score["score"]] * len(mine)}
        score |= {"digests": [key] * len(mine), "seeds_error": 0.001}
    return changed(summary, trials={"trials": trials}, test={"scores": scores})


def test_the_report_says_how_many_seeds_its_errors_hold():
    one, two = make_summary(), with_seeds(make_summary())
    pages = [" ".join(Page(render(summary)).text["p"].split()) for summary in (one, two)]
    assert "the fine-tuning has one seed, and another would move scores too" in pages[0]
    assert "over the 2 seeds of the fine-tuning, both together" in pages[1]
    assert "with 1 seed, and scored" in searched(one)
    assert "with 2 seeds, and scored" in searched(two)
    assert [Page(render(s)).row("exact")[10] for s in (one, two)] == ["1", "2"]


def test_every_seed_has_its_curve_in_the_look_of_its_method():
    one, two = (training_curves(s)["3 bits"] for s in (make_summary(), with_seeds(make_summary())))
    assert len(two.data) == 2 * len(one.data)
    assert {trace.meta for trace in two.data} == {trace.meta for trace in one.data}
    assert "uniform, seed 18, finished" in {trace.text[0] for trace in two.data}


def test_a_failed_seed_is_named_and_the_score_is_of_the_others():
    summary = with_seeds(make_summary(), failed=18)
    (found,) = [text for text in caveats(summary) if "failed" in text]
    assert found == (
        "Fine-tuning failed: uniform, 3 bits, seed 18: the loss is NaN Its score is of 1 other "
        "training."
    )
    page = Page(render(summary))
    of_finished = summary.trials.trials[0].epochs[-1].search_score
    assert page.row("uniform")[7] == f"1 of 2 failed {percent(of_finished)}"
    assert page.row("uniform")[10] == "1"


def test_the_terminal_names_seeds_and_the_rows_with_fewer():
    console = Console(width=120, record=True)
    console.print(result_table(with_seeds(make_summary(), failed=18)))
    assert "10000 test examples, 2 seeds (uniform 1)" in console.export_text()


def test_candidates_without_a_common_seed_are_not_compared():
    summary = with_seeds(make_summary())
    told = verdicts(changed(summary, test={"differences": []}))
    assert {verdict.difference for verdict in told} == {
        "No seed is common to both: their difference is not known."
    }


# --- a search ------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_search_with_two_seeds_trains_all_twice_and_goes_on_from_one(ray_cluster, tmp_path):
    path, out = tmp_path / "tiny.yaml", tmp_path / "run"
    tiny = TINY | {"methods": ["uniform", "exact"], "calibration": {"examples": 64, "choices": 1}}
    path.write_text(yaml.safe_dump(tiny))
    one = run(load_config(path), out, name="tiny")
    with pytest.raises(InputError, match="'trials' was made with another config: seeds"):
        run(load_config(path, ["trials.seeds=[0, 1]"]), out)
    again = ["trials.seeds=[0, 1]", "uniform_draws=3"]
    two = run(load_config(path, again), out, name="tiny", force=True)
    uniform, exact = two.candidates.candidates
    assert len({uniform.digest, *(draw.digest for draw in uniform.draws)}) == 3
    trained = [(trial.seed, trial.digest) for trial in two.trials.trials]
    assert trained == [
        *((0, digest) for digest in (uniform.digest, uniform.draws[1].digest, exact.digest)),
        *((1, digest) for digest in (uniform.draws[0].digest, exact.digest)),
    ]
    before = {trial.digest: trial for trial in one.trials.trials}
    kept = {t.digest: t for t in two.trials.trials if t.seed == 0 and t.digest in before}
    assert kept == before  # not trained again
    score, values = two.test.scores[exact.key], load_file(out / "test_scores.safetensors")
    assert values[exact.key].shape == (2, two.test.num_examples)

    assert score.seed_scores[0] == pytest.approx(one.test.scores[exact.key].score)
    assert score.seed_scores == pytest.approx(values[exact.key].double().mean(1).tolist())
    assert score.seeds_error == pytest.approx(error(score.seed_scores), rel=1e-5)
    assert two.test.scores[uniform.key].seeds == [0, 1, 0]
    (difference,) = two.test.differences
    assert difference.num_seeds == 2
    with pytest.raises(InputError, match="delete it to run the stage again"):
        _without_seeds(out)


def _without_seeds(out):
    """Make the trials look like those of an earlier version, and read them."""
    path = out / "trials.json"
    path.write_text(path.read_text().replace('"seed": 0', '"era": 0'))
    RunFolder(out).load("trials", TrialsArtefact)
