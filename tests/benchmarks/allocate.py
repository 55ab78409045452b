"""Allocators on ResNet50: seconds, and how far from the optimum, beside other ways of allocating.

Sizes and multiply-accumulates are those of torchvision's ResNet50 at 224 × 224. Sensitivities are
a model: Ω = t̄ · √n · 4⁻ᵇ for n elements at b bits, with average traces t̄ = exp(1.5 z)
for layers and activations, times exp(0.8 z) for channels, z standard normal of seed 0. Latencies
are a model, too: MACs / 1000 · (0.3 + w·a / 64) ns and up to 2 µs at random. Seconds are process
time, the best of several.
"""

import json
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import combinations
from time import process_time
from typing import TypeVar

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray

from hawq.allocate import (
    Budget,
    Front,
    constrained_front,
    lagrangian_solution,
    lower_hull,
    milp_solution,
    monotone_front,
    pareto_front,
)
from hawq.allocate.monotone import monotone_count
from hawq.allocate.remainder import spend
from hawq.allocate.solution import relative_gap
from hawq.allocation import Allocation
from hawq.cost import (
    Cost,
    Operation,
    activation_bits,
    bit_operations,
    latency,
    separable,
    weight_bits,
)
from hawq.reads import weight_space
from hawq.space import Group, Space, quantizable_layers
from tests.benchmarks.record import ROOT, Row, record

Found = TypeVar("Found")
ENVIRONMENT = ROOT / "build" / "bench" / "env" / "pulp"
AVERAGES = (2.44, 3.0, 4.0, 5.5)

# Run in the environment of its own: tables in, the optimum and the seconds of CBC out.
PULP = """
import json, resource, sys
import pulp
task = json.load(sys.stdin)
solver = pulp.PULP_CBC_CMD(msg=False, gapRel=0)
if not solver.available():
    raise SystemExit("CBC is not there")
omega = task["omega"]
R, B = range(len(omega)), range(len(omega[0]))
problem = pulp.LpProblem("bits", pulp.LpMinimize)
x = {(r, b): pulp.LpVariable(f"x_{r}_{b}", cat="Binary")
     for r in R for b in B if omega[r][b] is not None}
problem += pulp.lpSum(omega[r][b] * v for (r, b), v in x.items())
for r in R:
    problem += pulp.lpSum(x[r, b] for b in B if (r, b) in x) == 1
y = {}
for i, j in {(i, j) for budget in task["budgets"] for i, j, _ in budget["pairs"]}:
    for b in B:
        for c in B:
            if (i, b) in x and (j, c) in x:
                y[i, j, b, c] = pulp.LpVariable(f"y_{i}_{j}_{b}_{c}", 0)
    for b in B:
        if (i, b) in x:
            problem += pulp.lpSum(y[i, j, b, c] for c in B if (j, c) in x) == x[i, b]
    for c in B:
        if (j, c) in x:
            problem += pulp.lpSum(y[i, j, b, c] for b in B if (i, b) in x) == x[j, c]
for budget in task["budgets"]:
    cost = [budget["table"][r][b] / budget["limit"] * v for (r, b), v in x.items()]
    cost += [table[b][c] / budget["limit"] * y[i, j, b, c] for i, j, table in budget["pairs"]
             for b in B for c in B if (i, j, b, c) in y]
    problem += pulp.lpSum(cost) <= 1
problem.solve(solver)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"status": pulp.LpStatus[problem.status], "omega": pulp.value(problem.objective),
                  "seconds": used.ru_utime + used.ru_stime}))
"""


def main() -> None:
    """Measure everything once."""
    torch.set_num_threads(1)
    record("allocate", [*layers(), *channels(), *three_budgets()])


def resnet50(menu: Sequence[int]) -> tuple[Space, Space, list[Operation]]:
    """The space of weights, that of weights and activations, and what reads what."""
    model = torchvision.models.resnet50().eval()
    image = torch.zeros(1, 3, 224, 224)
    weights = weight_space(model, image, menu)
    tensors: dict[int, tuple[str, torch.Tensor]] = {}  # kept, so that no other has its id
    reads: dict[str, str] = {}

    def reading(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            first, _tensor = tensors.setdefault(id(inputs[0]), (f"a:{name}#0", inputs[0]))
            reads[f"w:{name}"] = first

        return hook

    for name in quantizable_layers(model):
        model.get_submodule(name).register_forward_pre_hook(reading(name))
    with torch.no_grad():
        model(image)
    sites = [Group(name, t.numel(), 0, tuple(menu[1:])) for name, t in tensors.values()]
    operations = [Operation(g.name, reads[g.name], g.macs) for g in weights.groups]
    return weights, Space((*weights.groups, *sites)), operations


def tables(space: Space, levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ω of the model above, shape (L, B), for the logarithms of average traces."""
    sizes = np.array([group.num_elements for group in space.groups])
    errors = np.sqrt(sizes)[:, None] * 4.0 ** -np.array(space.widths)
    table: NDArray[np.float64] = np.exp(levels)[:, None] * errors
    return np.where(space.allowed(), table, np.inf)


def layers() -> Iterator[Row]:
    """One budget, 54 layers."""
    for widths in (range(1, 9), (2, 4, 6, 8)):
        weights, _, _ = resnet50(list(widths))
        levels = 1.5 * np.random.default_rng(0).normal(size=len(weights))
        omega, cost = tables(weights, levels), weight_bits(weights)
        sizes = cost[:, 0] // weights.widths[0]
        label = f"{len(weights)} layers × {len(weights.widths)} widths"
        seconds, front = best_of(3, lambda w=weights, o=omega, c=cost: pareto_front(w, o, c))
        yield Row(f"exact front, {label}", "", seconds, "s CPU")
        yield Row(f"exact front, {label}", "", len(front), "points")
        traces = np.exp(levels) * sizes
        seconds, monotone = best_of(
            3, lambda w=weights, o=omega, c=cost, t=traces: monotone_front(w, o, c, t)
        )
        yield Row(f"monotone front, {label}", "", seconds, "s CPU")
        count = monotone_count(len(weights), len(weights.widths))
        yield Row("NNCF's candidates", "", count, f"bit vectors, {label}")
        if count < 100_000:
            seconds, best = best_of(1, lambda o=omega, c=cost, t=levels: enumerated(o, c, t))
            yield Row(f"NNCF's enumeration, {label}, by us after its code", "", seconds, "s CPU")
            least = [best(int(a * sizes.sum())) for a in AVERAGES if a >= weights.widths[0]]
            ours = [value_at(monotone, int(a * sizes.sum())) for a in AVERAGES]
            worst = max(abs(a / b - 1) for a, b in zip(ours, least, strict=True))
            yield Row("Ω of the monotone front", "NNCF's enumeration", worst, "worst relative gap")
        for average in AVERAGES:
            budget = int(average * sizes.sum())
            exact = value_at(front, budget)
            at = f"Ω above the optimum, {label}, {average} bits"
            yield Row(at, "monotone", value_at(monotone, budget) / exact - 1, "relative")
            yield Row(at, "greedy", greedy(omega, cost, budget) / exact - 1, "relative")
            seconds, swept = best_of(
                3, lambda o=omega, c=cost, b=budget: spend(lower_hull(o, c), b)
            )
            yield Row(at, "hull and remainder", swept.sensitivity / exact - 1, "relative")
            yield Row(f"hull and remainder, {label}, {average} bits", "", seconds, "s CPU")
            limits = [Budget(separable("weight_bits", cost), budget)]
            seconds, found = best_of(3, lambda w=weights, o=omega, b=limits: milp_solution(w, o, b))
            yield Row(at, "HiGHS", found.sensitivity / exact - 1, "relative")
            yield Row(f"HiGHS, {label}, {average} bits", "", seconds, "s CPU")
            yield from with_pulp(f"{label}, {average} bits", omega, limits, exact)


def channels() -> Iterator[Row]:
    """One budget, every output channel of the 53 convolutions, 7 widths."""
    weights, _, _ = resnet50(range(2, 9))
    generator = np.random.default_rng(0)
    model = torchvision.models.resnet50()
    groups, levels = [], []
    for group in weights.groups:
        layer = model.get_submodule(group.name[2:])
        level = 1.5 * generator.normal()
        if isinstance(layer, torch.nn.Conv2d):
            num_channels = layer.out_channels
            size = group.num_elements // num_channels
            names = (f"{group.name}[{c}]" for c in range(num_channels))
            groups += [Group(name, size, 0, tuple(range(2, 9))) for name in names]
            levels.append(level + 0.8 * generator.normal(size=num_channels))
    space = Space(tuple(groups))
    omega, cost = tables(space, np.concatenate(levels)), weight_bits(space)
    label = f"{len(space)} channels × 7 widths"
    seconds, hull = best_of(3, lambda: lower_hull(omega, cost))
    yield Row(f"hull of all budgets, {label}", "", seconds, "s CPU")
    yield Row(f"hull of all budgets, {label}", "", len(hull), "points")
    for average in AVERAGES:
        budget = int(average * cost[:, 0].sum() / 2)
        at = f"{label}, {average} bits"
        seconds, choice = best_of(3, lambda b=budget: spend(hull, b))
        gap = relative_gap(choice.sensitivity, choice.bound)
        unspent = relative_gap(float(hull.total[hull.within(budget)]), hull.bound(budget))
        yield Row(f"proven gap of the hull's point, {at}", "", unspent, "relative")
        yield Row(f"proven gap with the remainder spent, {at}", "", gap, "relative")
        yield Row(f"remainder, {at}", "", seconds, "s CPU")
        seconds, value = best_of(1, lambda b=budget: greedy(omega, cost, b))
        yield Row(f"Ω above, {at}", "greedy", value / choice.sensitivity - 1, "relative")
        yield Row(f"greedy, {at}", "", seconds, "s CPU")
    budget = int(3 * cost[:, 0].sum() / 2)
    rules: dict[str, dict[str, int]] = {
        "no rule": {},
        "2 widths a layer": {"max_widths": 2},
        "3 widths a layer": {"max_widths": 3},
        "multiples of 8": {"multiple": 8},
        "multiples of 16": {"multiple": 16},
        "multiples of 32": {"multiple": 32},
    }
    for name, rule in rules.items():
        seconds, found = best_of(
            1, lambda r=rule: lagrangian_solution(space, omega, cost, budget, **r)
        )
        at = f"allocation, {label}, 3 bits, {name}"
        yield Row(at, "", seconds, "s CPU")
        yield Row(f"proven gap, {at}", "", found.gap, "relative")
        yield Row(at, "no rule", found.loss_of_rules / found.sensitivity, "part of Ω lost")


def three_budgets() -> Iterator[Row]:
    """Size, bit operations and latency together, weights and shared activations."""
    for widths in ([2, 4, 8], [1, 2, 3, 4, 5, 6, 7, 8]):
        _, space, operations = resnet50(widths)
        generator = np.random.default_rng(0)
        omega = tables(space, 1.5 * generator.normal(size=len(space)))
        times = {
            op.weight[2:]: {
                (w, a): int(op.macs / 1000 * (0.3 + w * a / 64) + 2000 * generator.random())
                for w in widths
                for a in widths[1:]
            }
            for op in operations
        }
        costs = [
            separable("weight_bits", weight_bits(space)),
            bit_operations(space, operations),
            latency(space, operations, times),
        ]
        budgets = [Budget(cost, between(space, cost, 0.4)) for cost in costs]
        seconds, found = best_of(3, lambda s=space, o=omega, b=budgets: milp_solution(s, o, b))
        at = f"three budgets, {len(space)} groups, {len(widths)} widths"
        yield Row(f"HiGHS, {at}", "", seconds, "s CPU")
        yield Row(f"gap of HiGHS, {at}", "", found.gap, "relative")
        yield from with_pulp(at, omega, budgets, found.sensitivity)
        memory = activation_bits(space)
        limit = between(space, separable("activation_bits", memory), 0.4)
        seconds, front = best_of(
            1,
            lambda s=space, o=omega, m=memory, b=limit: constrained_front(
                s, o, weight_bits(s), m, b
            ),
        )
        at = f"front over size within activation memory, {len(space)} groups, {len(widths)} widths"
        yield Row(at, "", seconds, "s CPU")
        yield Row(at, "", len(front), "points")


def between(space: Space, cost: Cost, fraction: float) -> int:
    """The limit between all least and all largest widths."""
    low, high = (
        cost.of(space, Allocation.of(space, [group.menu[i] for group in space.groups]))
        for i in (0, -1)
    )
    return int(low + fraction * (high - low))


def value_at(front: Front, budget: int) -> float:
    """Ω of a front within a budget."""
    return float(front.sensitivity[front.within(budget)])


def enumerated(
    omega: NDArray[np.float64], cost: NDArray[np.int64], levels: NDArray[np.float64]
) -> Callable[[int], float]:
    """NNCF's way, after its code: build every monotone bit vector, score it, keep all.

    A vector is a subset of the widths and the cut points between them along the order of the
    average traces; each is scored layer by layer.
    """
    order = np.argsort(-levels)
    num_layers, num_widths = cost.shape
    totals, losses = [], []
    for used in range(1, num_widths + 1):
        for columns in combinations(range(num_widths)[::-1], used):
            for cuts in combinations(range(1, num_layers), used - 1):
                choice = np.empty(num_layers, np.int64)
                choice[order] = np.repeat(columns, np.diff([0, *cuts, num_layers]))
                at = np.arange(num_layers), choice
                totals.append(cost[at].sum())
                losses.append(omega[at].sum())
    all_totals, all_losses = np.array(totals), np.array(losses)
    return lambda budget: float(all_losses[all_totals <= budget].min())


def greedy(omega: NDArray[np.float64], cost: NDArray[np.int64], budget: int) -> float:
    """Ω of taking the next width that saves most Ω for its cost, while any fits."""
    at = np.zeros(len(cost), np.int64)
    left = budget - int(cost[:, 0].sum())

    def step(row: int) -> tuple[float, int]:
        added = int(cost[row, at[row] + 1] - cost[row, at[row]])
        return -float(omega[row, at[row]] - omega[row, at[row] + 1]) / added, row

    steps = [step(row) for row in range(len(cost))]
    heapify(steps)
    while steps:
        _, row = heappop(steps)
        added = int(cost[row, at[row] + 1] - cost[row, at[row]])
        if added <= left:
            left -= added
            at[row] += 1
            if at[row] + 1 < cost.shape[1]:
                heappush(steps, step(row))
    return float(omega[np.arange(len(cost)), at].sum())


def with_pulp(
    label: str, omega: NDArray[np.float64], budgets: Sequence[Budget], optimum: float
) -> Iterator[Row]:
    """The same programme by PuLP's CBC, in an environment of its own."""
    task = {
        "omega": [[v if np.isfinite(v) else None for v in row] for row in omega.tolist()],
        "budgets": [
            {
                "table": budget.cost.steps[0].tolist(),
                "pairs": [[p.first, p.second, p.table.tolist()] for p in budget.cost.pairs],
                "limit": budget.limit,
            }
            for budget in budgets
        ],
    }
    try:
        if not (ENVIRONMENT / "ready").exists():
            venv.create(ENVIRONMENT, with_pip=True)
            pip = [ENVIRONMENT / "bin" / "pip", "install", "--quiet", "pulp"]
            subprocess.run(pip, check=True, capture_output=True, text=True)
            (ENVIRONMENT / "ready").touch()
        answer = subprocess.run(
            [ENVIRONMENT / "bin" / "python", "-c", PULP],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
    except subprocess.TimeoutExpired:
        print(f"PuLP's CBC, {label}: left out, not done in 120 s", file=sys.stderr)
        return
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1:]
        print(f"PuLP's CBC, {label}: left out, {' '.join(reason)}", file=sys.stderr)
        return
    found = json.loads(answer.stdout)
    yield Row(f"PuLP's CBC, {label}", "", found["seconds"], "s CPU")
    yield Row(f"Ω of PuLP's CBC, {label}", "ours", found["omega"] / optimum - 1, "relative")


def best_of(times: int, work: Callable[[], Found]) -> tuple[float, Found]:
    """The least process seconds of several runs, and what the last one found."""
    seconds = []
    for _ in range(times):
        started = process_time()
        found = work()
        seconds.append(process_time() - started)
    return min(seconds), found


if __name__ == "__main__":
    main()
