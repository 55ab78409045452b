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
