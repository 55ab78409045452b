"""What a comparison says in words: every branch, to the letter."""

import zlib
from typing import Any

import numpy as np
import pytest

from search.comparison.document import ComparisonDocument
from search.comparison.families import family, is_by_layer, needs_curvature
from search.comparison.phrases import listed, sides, spread
from search.comparison.standings import hessian_beside, spent, standings
from search.comparison.statistics import Interval
from search.comparison.text import comparison_text
from search.comparison.trust import agreement_of
from search.comparison.verdict import verdict

# How far above the exact choice a method's searches end, in accuracy, and how fast they get there.
LEVELS = {
    "cw-hawq": (0.004, 40),
    "haq": (-0.004, 60),
    "tpe": (0.005, 25),
    "random": (-0.008, 50),
    "warm-cw-hawq": (0.004, 20),
}
CHOICES = {"uniform": (-0.02, 5.1), "exact": (0.0, 1.9), "channel": (0.002, 1.2)}
SIZES = {"3 bits": 813_000, "4 bits": 1_084_000}
LEVEL = {"3 bits": 0.861, "4 bits": 0.902}


def make_comparison(
    methods: tuple[str, ...] = tuple(LEVELS),
    budgets: tuple[str, ...] = ("3 bits",),
    *,
    num_seeds: int = 12,
    length: int = 120,
    finalists: bool = True,
    num_agreement: int = 12,
    agreement_noise: float = 0.002,
    **changes: Any,
) -> ComparisonDocument:
    """Make up a comparison."""
    hessian = [
        {
            "method": method,
            "budget": budget,
            "chosen": scored(f"{method} {budget}", LEVEL[budget] + lead, 0.0, SIZES[budget], omega),
            "cpu_seconds": 0.4,
        }
        for budget in budgets
        for method, (lead, omega) in CHOICES.items()
    ]
    searches = [
        make_search(method, budget, seed, length)
        for budget in budgets
        for method in methods
        for seed in range(num_seeds)
    ]
    draw = np.random.default_rng(7)
    values = np.linspace(0.8, 0.87, num_agreement)
    document = {
        "name": "resnet20-cifar10",
        "finished": "2025-03-04T05:06:07Z",
        "machine": {"cpu": "8 cores, AVX-512", "memory": "31 GiB"},
        "versions": {"python": "3.11.9", "torch": "2.11.0"},
        "config": {"name": "resnet20-cifar10"},
        "fidelity": "batch_norm",
        "num_examples": 5000,
        "unquantized": 0.9264,
        "search_seen": False,
        "curvature_core_seconds": 214.0,
        "searches": searches,
        "hessian": hessian,
        "agreement": [
            {
                "digest": f"a{i}",
                "budget": budgets[i % len(budgets)],
                "score": value,
                "finetuned": value + 0.03 + draw.normal(0, agreement_noise),
            }
            for i, value in enumerate(values.tolist())
        ],
        "finalists": make_finalists(methods, budgets) if finalists else [],
        "differences": make_differences(methods, budgets) if finalists else [],
    }
    return ComparisonDocument.model_validate(document | changes)


def scored(
    digest: str, score: float, seconds: float, size: int, omega: float = 2.0
) -> dict[str, Any]:
    """Make up a scored allocation."""
    return {
        "digest": digest,
        "score": score,
        "seconds": seconds,
        "weight_bits": size,
        "activation_bits": None,
        "sensitivity": omega,
    }


def make_search(method: str, budget: str, seed: int, length: int) -> dict[str, Any]:
    """Make up a search whose best rises to the method's level."""
    lead, pace = LEVELS[method]
    draw = np.random.default_rng([zlib.crc32(f"{method} {budget}".encode()), seed])
    end = LEVEL[budget] + lead + draw.normal(0, 0.001)
    reached = end - 0.2 * np.exp(-np.arange(1, length + 1) / (pace / 5))
    scores = np.minimum(reached - np.abs(draw.normal(0, 0.02, length)), end)
    scores[-1] = end
    num_starts = 2 if method.startswith("warm-") else 0
    scores[:num_starts] = LEVEL[budget] + 0.001
    price = 31.0 if family(method) == "agent" else 24.0
    return {
        "method": method,
        "budget": budget,
        "seed": seed,
        "evaluations": [
            scored(f"{method} {seed} {i}", score, price * (i + 1), SIZES[budget] - 40 * i)
            for i, score in enumerate(scores.tolist())
        ],
        "num_starts": num_starts,
        "episodes": int(1.3 * length),
        "cpu_seconds": price * length,
        "bits": {"w:conv1": 8},
        "fidelity": "batch_norm",
        "inputs": "",
    }


def make_finalists(methods: tuple[str, ...], budgets: tuple[str, ...]) -> list[dict[str, Any]]:
    """Make up a finalist for each method."""
    leads = {m: lead for m, (lead, _) in CHOICES.items()} | {m: LEVELS[m][0] for m in methods}
    return [
        {
            "method": method,
            "budget": budget,
            "digest": f"{method} {budget}",
            "search_seed": None if method in CHOICES else 3,
            "score": LEVEL[budget] + 0.02 + 0.5 * lead,
            "standard_error": 0.0031,
            "by_seed": [LEVEL[budget] + 0.02 + 0.5 * lead + d for d in (-0.001, 0.0, 0.001)],
        }
        for budget in budgets
        for method, lead in leads.items()
    ]


def make_differences(
    methods: tuple[str, ...], budgets: tuple[str, ...], half: float = 0.0015
) -> list[dict[str, Any]]:
    """Make up the difference of every two finalists of a budget, all with one error."""
    found = make_finalists(methods, budgets)
    return [
        {
            "budget": first["budget"],
            "first": first["method"],
            "second": second["method"],
            "difference": first["score"] - second["score"],
            "low": first["score"] - second["score"] - half,
            "high": first["score"] - second["score"] + half,
            "num_seeds": 3,
        }
        for i, first in enumerate(found)
        for second in found[i + 1 :]
        if first["budget"] == second["budget"]
    ]


def difference(first: str, second: str, low: float, high: float) -> dict[str, Any]:
    """Make up a difference of two finalists in the middle of its interval."""
    ends = {"difference": (low + high) / 2, "low": low, "high": high}
    return {"budget": "3 bits", "first": first, "second": second, "num_seeds": 3, **ends}


def said(start: str, document: ComparisonDocument) -> str:
    """Return the one sentence of the verdict that begins like this."""
    found = [sentence for sentence in verdict(document) if sentence.startswith(start)]
    assert len(found) == 1, verdict(document)
    return found[0]


NOTHING = "nothing is concluded from them"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"num_agreement": 0},
            f"Whether scores follow the fine-tuned accuracy was not measured: {NOTHING}.",
        ),
        (
            {"num_agreement": 7},
            "Whether scores follow the fine-tuned accuracy was measured on 7 allocations, fewer "
            f"than 8: {NOTHING}.",
        ),
        (
            {"agreement": [{"digest": f"{i}", "score": 0.5, "finetuned": i} for i in range(9)]},
            "Whether scores follow the fine-tuned accuracy is not known, for over 9 allocations "
            f"one of the two does not vary: {NOTHING}.",
        ),
        (
            {"num_agreement": 0, "fidelity": "proxy"},
            f"Whether scores follow the fine-tuned accuracy was not measured: {NOTHING}. They are "
            "−Ω, the Hessian’s own measure: its choices are the best, or nearly, by construction.",
        ),
    ],
)
def test_a_score_that_nothing_vouches_for_is_said_to_be_so_first(changes, expected):
    told = verdict(make_comparison(**changes))
    assert told[0] == expected
    assert not [
        sentence for sentence in told if "by score" in sentence or "searches of" in sentence
    ]
    assert not [sentence for sentence in told if "from the Hessian" in sentence]


@pytest.mark.parametrize(
    ("noise", "start", "end"),
    [
        (0.002, "Scores follow the fine-tuned accuracy (Spearman’s ρ = 1.00, ", "12 allocations)."),
        (0.025, "Scores seem to follow the fine-tuned accuracy (", "of them is provisional."),
        (0.09, "Scores do not follow the fine-tuned accuracy closely enough (", f"{NOTHING}."),
    ],
)
def test_the_agreement_decides_whether_scores_are_believed(noise, start, end):
    document = make_comparison(agreement_noise=noise)
    told = verdict(document)
    assert told[0].startswith(start)
    assert told[0].endswith(end)
    rho = agreement_of(document)
    assert rho is not None
    assert f"ρ = {rho.value:.2f}, 95 % interval" in told[0]
    assert any("by score" in sentence for sentence in told) is (rho.value >= 0.6)


def test_an_agreement_that_is_only_one_of_sizes_is_none():
    """Under each budget scores and accuracies are opposed; over both they go together."""
    points = [
        {"digest": f"{i}", "budget": b, "score": 0.1 * i + lift, "finetuned": lift - 0.1 * i}
        for b, lift in (("3 bits", 0.0), ("4 bits", 5.0))
        for i in range(6)
    ]
    rho = agreement_of(make_comparison(agreement=points))
    assert rho is not None
    assert rho.value == -1


def test_prices_are_told_beside_the_hessians():
    assert said("A search took", make_comparison()) == (
        "A search took 120 evaluations and 3,090 to 3,930 core-seconds, medians over seeds; the "
        "Hessian’s choice took no evaluation and 214 core-seconds, the curvature included."
    )


def test_without_hessian_methods_there_is_nothing_beside_the_price():
    told = said("A search took", make_comparison(hessian=[]))
    assert told.endswith("medians over seeds; no Hessian method is beside it.")


def test_a_comparison_without_searches_says_so():
    assert "No search has finished." in verdict(make_comparison(methods=()))


def test_the_search_that_ends_highest_is_told_apart_from_others_or_not():
    assert said("At 3 bits the searches", make_comparison()) == (
        "At 3 bits the searches of tpe end highest, at 86.59 % in the median: above haq, random "
        "and warm-cw-hawq, not told apart from cw-hawq."
    )


def test_fewer_than_ten_searches_are_not_compared():
    methods = ("cw-hawq", "tpe", "warm-cw-hawq")
    told = verdict(make_comparison(methods=methods, num_seeds=9))
    assert [s for s in told if "seeds" in s and "claimed" in s] == [
        "Nothing is claimed of the searches of cw-hawq, tpe and warm-cw-hawq: fewer than 10 seeds."
    ]
    assert not [s for s in told if "by score" in s or "end highest" in s or "from the Hessian" in s]


def test_searches_are_compared_with_the_hessians_choice_of_the_same_things():
    told = verdict(make_comparison())
    assert (
        "At 3 bits, beside channel by score: above it tpe (+0.29 points), cw-hawq (+0.19 points) "
        "and warm-cw-hawq (+0.17 points); below it random (−1.00 points)."
    ) in told
    assert "At 3 bits, beside exact by score: below it haq (−0.43 points)." in told


def test_the_hessians_choice_is_the_one_of_least_omega_not_of_highest_score():
    document = make_comparison()
    other = document.hessian[1].model_copy(
        update={
            "method": "hawq-v2",
            "chosen": document.hessian[1].chosen.model_copy(
                update={"score": 0.99, "sensitivity": 2.5}
            ),
        }
    )
    document = document.model_copy(update={"hessian": [other, *document.hessian]})
    found = standings(document)
    beside = {s.method: hessian_beside(found, s) for s in found if s.searches}
    assert {m: b.method for m, b in beside.items() if b} == {
        "cw-hawq": "channel",
        "haq": "exact",
        "tpe": "channel",
        "random": "channel",
        "warm-cw-hawq": "channel",
    }


def test_a_warm_start_is_worth_the_evaluations_that_it_saves():
    assert said("At 3 bits cw-hawq takes", make_comparison()) == (
        "At 3 bits cw-hawq takes 43 evaluations for what warm-cw-hawq has after 2 from the Hessian."
    )


def test_a_start_that_is_never_reached_is_said_to_be():
    document = make_comparison(methods=("cw-hawq", "warm-cw-hawq"), length=10)
    searches = [
        s.model_copy(update={"evaluations": s.evaluations[:5]}) if s.method == "cw-hawq" else s
        for s in document.searches
    ]
    assert said("At 3 bits cw-hawq does", document.model_copy(update={"searches": searches})) == (
        "At 3 bits cw-hawq does not reach, in 5 evaluations, what warm-cw-hawq has after 2 from "
        "the Hessian."
    )


def test_accuracy_is_not_compared_before_it_is_measured():
    assert verdict(make_comparison(finalists=False))[-2:] == [
        "No method’s best has been fine-tuned and tested: accuracy, which has the last word, is "
        "not compared.",
        "Whether reinforcement learning is worth its price is therefore not answered.",
    ]


def test_finalists_are_above_below_the_same_or_not_told_apart():
    document = make_comparison(
        differences=[
            difference("channel", "cw-hawq", -0.006, -0.002),
            difference("tpe", "channel", -0.001, 0.002),
            difference("random", "channel", -0.007, -0.003),
            difference("uniform", "exact", -0.009, -0.005),
        ]
    )
    same = [
        f.model_copy(update={"digest": "channel 3 bits"}) if f.method == "warm-cw-hawq" else f
        for f in document.finalists
    ]
    told = verdict(document.model_copy(update={"finalists": same}))
    assert (
        "Fine-tuned, at 3 bits, beside channel: above it cw-hawq (+0.40 points, 95 % interval "
        "+0.20 … +0.60); not told apart from it tpe; below it random (−0.50 points, 95 % interval "
        "−0.70 … −0.30); the same allocation warm-cw-hawq."
    ) in told
    assert (
        "Fine-tuned, at 3 bits, beside exact: below it uniform (−0.70 points, 95 % interval −0.90 "
        "… −0.50); without a seed in common haq."
    ) in told


@pytest.mark.parametrize(
    ("tested", "rho", "means"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], "1.00", "scores order these, too"),
        ([4, 2, 6, 0, 7, 1, 5, 3], "0.00", "which of them is better, scores do not tell"),
        ([7, 6, 5, 4, 3, 2, 1, 0], "−1.00", "scores order these the other way round"),
    ],
)
def test_scores_may_rank_all_kinds_of_allocations_and_not_the_finalists(tested, rho, means):
    document = make_comparison()
    found = {s.method: s for s in standings(document)}
    ranked = sorted(found.values(), key=lambda s: s.bests[0].score)
    finalists = [
        f.model_copy(
            update={
                "digest": found[f.method].bests[0].digest,
                "score": 0.88 + 0.001 * tested[ranked.index(found[f.method])],
            }
        )
        for f in document.finalists
    ]
    document = document.model_copy(update={"finalists": finalists})
    told = said("Among the 8 finalists themselves ρ with the tested accuracy is", document)
    assert f" is {rho}, 95 % interval " in told
    assert told.endswith(f": {means}.")
    few = document.model_copy(update={"finalists": finalists[1:]})
    assert not [s for s in verdict(few) if s.startswith("Among")]


def test_intervals_of_one_training_seed_are_said_to_be_over_images_alone():
    once = difference("channel", "cw-hawq", -0.006, -0.002) | {"num_seeds": 1}
    told = verdict(make_comparison(methods=("cw-hawq",), differences=[once]))
    assert told[-2] == (
        "Some intervals are over images alone, for finalists with one training seed in common: "
        "other seeds may turn them round."
    )
    assert not [s for s in verdict(make_comparison()) if "images alone" in s]


def test_finalists_without_one_of_the_hessians_are_not_compared():
    document = make_comparison(methods=("tpe",))
    alone = [f for f in document.finalists if f.method == "tpe"]
    told = verdict(document.model_copy(update={"finalists": alone}))
    assert told[-1] == "No finalist has one of the Hessian’s to be compared with."


def test_reinforcement_learning_that_gains_nothing_is_said_to_be_unproved():
    assert verdict(make_comparison())[-1] == (
        "Nothing here shows reinforcement learning to be worth its price: no agent’s finalist is "
        "above the Hessian’s by more than the error, at 3,720 to 3,930 core-seconds a search (a "
        "finalist is the best of 12), beside the Hessian’s 214."
    )


def test_reinforcement_learning_that_gains_is_credited_and_so_is_what_does_as_well():
    gained = difference("cw-hawq", "channel", 0.002, 0.006)
    alike = difference("tpe", "cw-hawq", -0.002, 0.002)
    worse = difference("random", "cw-hawq", -0.006, -0.002)
    methods = ("cw-hawq", "tpe", "random")
    told = verdict(make_comparison(methods=methods, differences=[gained, alike, worse]))
    assert told[-2:] == [
        "Reinforcement learning gained accuracy on the Hessian in 1 of 1 comparison: cw-hawq at 3 "
        "bits (+0.40 points), at 3,930 core-seconds a search (a finalist is the best of 12), "
        "beside the Hessian’s 214.",
        "At 3 bits cw-hawq is not above tpe, without learning, by more than the error.",
    ]
    told = verdict(make_comparison(methods=methods, differences=[gained, worse]))
    assert told[-1].startswith("Reinforcement learning gained accuracy")


def test_without_agents_nothing_is_said_of_them():
    told = verdict(make_comparison(methods=("tpe", "random")))
    assert not [sentence for sentence in told if "einforcement" in sentence]


def test_scores_by_proxy_are_written_as_they_are():
    document = make_comparison(fidelity="proxy")
    assert "−Ω" not in said("At 3 bits the searches", document)
    assert "at 0.866 in the median" in said("At 3 bits the searches", document)
    assert "haq (−0.00431)" in " ".join(verdict(document))


@pytest.mark.parametrize(
    ("method", "chooser", "by_layer", "curvature"),
    [
        ("uniform", "reference", True, False),
        ("exact", "hessian", True, True),
        ("channel", "hessian", False, True),
        ("cw-hawq", "agent", False, True),
        ("haq", "agent", True, False),
        ("warm-haq", "agent", True, True),
        ("sac-layers", "agent", True, False),
        ("tpe", "sampler", False, True),
        ("random-layers", "sampler", True, False),
        ("warm-tpe-layers", "sampler", True, True),
        ("hill-climbing", "sampler", False, True),
        ("hill-climbing-layers", "sampler", True, True),
    ],
)
def test_a_name_says_who_chooses_among_what_and_at_what_price(method, chooser, by_layer, curvature):
    assert family(method) == chooser
    assert is_by_layer(method) is by_layer
    assert needs_curvature(method) is curvature


def test_a_search_begins_with_the_price_of_the_curvature_and_ends_with_its_own():
    (search, *_) = make_comparison(methods=("cw-hawq",)).searches
    costs = spent(search, 214.0)
    assert costs[0] == 214 + 31
    assert costs[-1] == 214 + search.cpu_seconds


def test_a_standing_has_the_median_of_its_searches_and_their_quartiles():
    found = standings(make_comparison(methods=("cw-hawq",)))[-1]
    finals = sorted(search.best.score for search in found.searches)
    assert found.median == pytest.approx((finals[5] + finals[6]) / 2)
    assert found.quartiles == pytest.approx(tuple(np.quantile(finals, [0.25, 0.75])))
    assert found.core_seconds == 214 + 31 * 120


def test_searches_that_scored_nothing_are_left_out():
    document = make_comparison(methods=("cw-hawq",), num_seeds=1)
    empty = [s.model_copy(update={"evaluations": []}) for s in document.searches]
    found = standings(document.model_copy(update={"searches": empty}))
    assert [s.method for s in found] == ["uniform", "exact", "channel"]


def test_phrases_join_what_they_are_given():
    assert [listed(names) for names in ((), ("a",), ("a", "b"), ("a", "b", "c"))] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]
    assert [spread([214.0]), spread([214.0, 12_345.0])] == ["214", "214 to 12,300"]
    leads = {"a": Interval(1, 0.5, 2), "b": Interval(2, 1, 3), "c": Interval(-1, -2, 1)}
    assert sides(leads, lambda lead: f"{lead.value}") == [
        "above it b (2) and a (1)",
        "not told apart from it c",
    ]


def test_the_text_is_a_table_and_the_verdict():
    document = make_comparison(methods=("cw-hawq",), finalists=False)
    lines = comparison_text(document).splitlines()
    assert lines[0] == (
        "| budget | method | searches | evaluations | episodes | core-seconds | best score, % "
        "[quartiles] | fine-tuned accuracy, % |"
    )
    assert lines[2] == "| 3 bits | uniform | — | 0 | — | 0.400 | 84.10 | — |"
    assert lines[5] == ("| 3 bits | cw-hawq | 12 | 120 | 156 | 3,930 | 86.49 [86.41 … 86.58] | — |")
    assert [line[2:] for line in lines if line.startswith("- ")] == verdict(document)
