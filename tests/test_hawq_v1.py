"""HAWQ by blocks and the controls: their order, their orders, and that they are what they claim."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline import TINY
from test_report import changed, make_summary
from test_searchers import best, make_problem, make_tables, with_budget

from hawq.allocation import Allocation
from hawq.curvature.power_iteration import top_eigenvalues
from search.artefacts import BlockEigenvalue
from search.commands.allocate import allocate
from search.config import Budget
from search.config_file import load_config
from search.errors import InputError
from search.pipeline import run
from search.report import render
from search.report.caveats import caveats
from search.searchers import SEARCHERS, fine_tuning_order
from search.stages.candidates import candidate
from search.stages.eigenvalues import _read
from search.tasks.build import build_task
from search.tasks.checkpoint import read_state

SIZES = [30, 200, 90, 120, 40]
seeds_and_shares = given(seed=st.integers(0, 99), share=st.floats(0, 1))


def objective(tables, allocation):
    """Σ (λ/n)·‖Q(W) − W‖² over blocks, and S = λ/n of each."""
    column = allocation.choice(tables.space)
    rows = {name: i for i, name in enumerate(tables.space.names)}
    total, order = 0.0, {}
    for block in tables.blocks:
        order[block.block] = max(block.eigenvalue, 0) / block.n
        for layer in block.layers:
            row = rows[f"w:{layer}"]
            total += order[block.block] * tables.squared_errors[row, column[row]]
    return total, order


def by_block(tables, allocation):
    return {block.block: {allocation[f"w:{la}"] for la in block.layers} for block in tables.blocks}


def staircases(tables, problem):
    """Every allocation of one width a block that does not rise along S, within the budget."""
    blocks = sorted(tables.blocks, key=lambda block: -max(block.eigenvalue, 0) / block.n)
    for bits in product(tables.space.widths, repeat=len(blocks)):
        if list(bits) != sorted(bits, reverse=True):
            continue
        chosen = {
            f"w:{la}": b for block, b in zip(blocks, bits, strict=True) for la in block.layers
        }
        allocation = Allocation.of(tables.space, chosen)
        if problem.fits(allocation):
            yield allocation


@seeds_and_shares
def test_hawq_chooses_the_least_of_its_own_objective_among_its_staircases(seed, share):
    tables = make_tables(SIZES, (2, 4, 8), seed)
    problem = with_budget(tables, share)
    found = best("hawq-v1", problem)
    least = min(objective(tables, a)[0] for a in staircases(tables, problem))
    assert objective(tables, found.allocation)[0] == pytest.approx(least, rel=1e-9)
    assert found.bound is None
    assert found.score == -tables.omega(found.allocation)


@seeds_and_shares
def test_layers_of_a_block_share_their_bits_and_a_larger_s_has_no_fewer(seed, share):
    tables = make_tables(SIZES, (1, 2, 3, 4, 8), seed)
    found = best("hawq-v1", with_budget(tables, share)).allocation
    bits, order = by_block(tables, found), objective(tables, found)[1]
    assert all(len(widths) == 1 for widths in bits.values())
    ranked = [min(bits[block]) for block in sorted(order, key=lambda block: -order[block])]
    assert ranked == sorted(ranked, reverse=True)


def test_a_pinned_layer_keeps_its_bits_and_its_block_is_tied_without_it():
    tables = make_tables(SIZES, (2, 4, 8), 0, pinned={"l1": 8})
    found = best("hawq-v1", with_budget(tables, 0.4)).allocation
    assert found["w:l1"] == 8
    assert found["w:l2"] == found["w:l3"]


def test_an_eigenvalue_below_zero_counts_as_zero():
    tables = make_tables(SIZES, (2, 4, 8), 0)
    negative = tables.blocks[0].model_copy(update={"eigenvalue": -1e9})
    zero = tables.blocks[0].model_copy(update={"eigenvalue": 0.0})
    chosen = [
        best("hawq-v1", with_budget(replace(tables, blocks=(first, *tables.blocks[1:])), 0.5))
        for first in (negative, zero)
    ]
    assert chosen[0].allocation == chosen[1].allocation
    few = [
        b.model_copy(update={"eigenvalue": e})
        for b, e in zip(tables.blocks, (-9.0, -0.1, 1.0), strict=True)
    ]
    order = orders(replace(tables, blocks=tuple(few)))[1]
    assert order == (("l4",), ("l0", "l1"), ("l2", "l3"))  # the two as they stand in the network


def test_its_front_is_of_omega_at_every_size_that_it_offers():
    tables = make_tables(SIZES, (2, 4, 8), 3)
    for method in ("hawq-v1", "weight-norm", "largest-omega"):
        front = SEARCHERS[method].front(tables, "weights")
        assert (np.diff(front.cost) > 0).all()
        for point in range(len(front)):
            problem = make_problem(tables, weight_bits=int(front.cost[point]))
            assert -best(method, problem).score == pytest.approx(front.sensitivity[point])


def test_without_eigenvalues_it_is_refused_by_name():
    tables = replace(make_tables(SIZES, (2, 4), 0), blocks=())
    with pytest.raises(InputError, match=r"hawq-v1 at 3 bits: the top eigenvalues .* be known"):
        candidate("hawq-v1", Budget(average_bits=3), tables)


def test_activations_are_not_its_own():
    tables = make_tables(SIZES, (2, 4), 0, tensors=[5, 7])
    with pytest.raises(InputError, match="activations must not be searched"):
        candidate("hawq-v1", Budget(average_bits=3, activation_average_bits=3), tables)


# --- orders of fine-tuning -----------------------------------------------------------------------


def orders(tables, method="hawq-v1", seed=0):
    chosen = best("hawq-v1", with_budget(tables, 0.5)).allocation
    return chosen, fine_tuning_order(method, tables, chosen, seed)


def test_the_block_of_the_largest_omega_comes_first():
    tables = make_tables(SIZES, (2, 4, 8), 1)
    chosen, found = orders(tables)
    rows, column = {n: i for i, n in enumerate(tables.space.names)}, chosen.choice(tables.space)
    omegas = {
        tuple(block.layers): block.eigenvalue
        * sum(
            tables.squared_errors[rows[f"w:{la}"], column[rows[f"w:{la}"]]] for la in block.layers
        )
        for block in tables.blocks
    }
    assert list(found) == sorted(omegas, key=lambda layers: -omegas[layers])
    assert orders(tables, "hawq-v1-reverse")[1] == found[::-1]


def test_a_random_order_is_that_of_its_seed_and_names_every_layer_once():
    tables = make_tables(SIZES * 2, (2, 4, 8), 1)
    found = {seed: orders(tables, "hawq-v1-random", seed)[1] for seed in range(8)}
    assert len(set(found.values())) > 4
    assert found[3] == orders(tables, "hawq-v1-random", 3)[1]
    for order in found.values():
        assert sorted(layer for block in order for layer in block) == sorted(
            f"l{i}" for i in range(len(SIZES) * 2)
        )


@pytest.mark.parametrize("method", ["hawq-v1-together", "exact", "uniform", "channel"])
def test_other_methods_quantize_all_layers_at_once(method):
    assert orders(make_tables(SIZES, (2, 4), 0), method)[1] == ()


def test_candidates_of_one_allocation_in_several_orders_are_trained_apart():
    tables = make_tables(SIZES * 2, (2, 4, 8), 1)
    names = ["hawq-v1", "hawq-v1-reverse", "hawq-v1-random", "hawq-v1-together"]
    found = [candidate(name, Budget(average_bits=4), tables) for name in names]
    assert len({c.digest for c in found}) == 1
    assert len({c.key for c in found}) == 4
    assert found[3].key == found[3].digest
    assert [c.order == [] for c in found] == [False, False, False, True]


# --- controls ------------------------------------------------------------------------------------


@seeds_and_shares
@settings(max_examples=30)
def test_the_largest_omega_is_that_of_all_of_at_least_its_size(seed, share):
    tables = make_tables(SIZES[:4], (2, 4, 8), seed)
    problem = with_budget(tables, share)
    found, cost = best("largest-omega", problem).allocation, tables.costs["weight_bits"]
    omega, size = tables.omega(found), cost.of(tables.space, found)
    every = [Allocation.of(tables.space, bits) for bits in product((2, 4, 8), repeat=4)]
    sizes = [cost.of(tables.space, allocation) for allocation in every]
    limit = problem.budgets[0].limit
    of_size = [tables.omega(a) for a, s in zip(every, sizes, strict=True) if s >= size]
    assert omega == pytest.approx(max(of_size))
    nearer = [tables.omega(a) for a, s in zip(every, sizes, strict=True) if size < s <= limit]
    above = [tables.omega(a) for a, s in zip(every, sizes, strict=True) if s > limit]
    # What is nearer to the budget is beaten by something still larger, or it would be the choice.
    assert not nearer or max(nearer) <= max(above)
    assert omega >= -best("exact", problem).score


@seeds_and_shares
@settings(max_examples=30)
def test_the_norm_knows_nothing_of_the_hessian(seed, share):
    tables = make_tables(SIZES, (2, 4, 8), seed)
    other = replace(tables, sensitivity=tables.sensitivity[:, ::-1], traces=tables.traces[::-1])
    problem = with_budget(tables, share)
    found = best("weight-norm", problem).allocation
    rows = np.arange(len(tables.space))
    norm = tables.squared_errors[rows, found.choice(tables.space)].sum()
    every = [Allocation.of(tables.space, bits) for bits in product((2, 4, 8), repeat=5)]
    least = min(
        tables.squared_errors[rows, a.choice(tables.space)].sum() for a in every if problem.fits(a)
    )
    assert norm == pytest.approx(least)
    assert best("weight-norm", with_budget(other, share)).allocation == found


@pytest.mark.parametrize("method", ["largest-omega", "weight-norm"])
def test_controls_choose_weights_and_activations_each_within_its_budget(method):
    tables = make_tables(SIZES, (2, 4, 8), 0, tensors=[5, 70, 20])
    names = ("weight_bits", "activation_bits")
    problem = with_budget(tables, 0.5, names)
    assert problem.fits(best(method, problem).allocation)
    with pytest.raises(ValueError, match="one sum of the weights and one of the activations"):
        best(method, make_problem(tables, bops=10**6))


# --- configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["methods=[hawq-v1-reverse]", "budgets.0.activation_average_bits=4"],
            "methods: hawq-v1-reverse orders blocks of weights alone",
        ),
        (
            ["methods=[exact, weight-norm]", "budgets.0.gbops=1"],
            r"budgets\.0: gbops is no sum .* leave weight-norm out of methods",
        ),
        (["methods=[hawq-v11]"], "'hawq-v11' is not known, did you mean 'hawq-v1'"),
        (["uniform_draws=0"], "uniform_draws"),
    ],
)
def test_methods_that_make_no_sense_are_refused_by_name(tmp_path, overrides, message):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(TINY))
    with pytest.raises(InputError, match=message):
        load_config(path, overrides)


# --- eigenvalues in a run ------------------------------------------------------------------------


def make_block(name):
    return BlockEigenvalue(
        block=name,
        layers=[name],
        n=3,
        eigenvalue=1 / 3,
        residual=0.1,
        data_error=0.2,
        iterations=4,
        converged=True,
    )


def test_blocks_on_disk_survive_a_line_cut_short_and_are_none_of_other_inputs(tmp_path):
    path = tmp_path / "blocks.jsonl"
    assert _read(path, "x") == {}
    whole = make_block("a")
    with path.open("a") as file:
        file.write(whole.model_dump_json() + "\n" + make_block("b").model_dump_json()[:20])
    assert _read(path, "x") == {"a": whole}
    with path.open("a") as file:
        file.write(make_block("c").model_dump_json() + "\n")
    assert list(_read(path, "x")) == ["a", "c"]
    assert _read(path, "y") == {}
    assert _read(path, "x") == {}  # they are gone


@pytest.mark.ray
def test_a_search_by_blocks_finds_eigenvalues_once_and_trains_in_their_order(ray_cluster, tmp_path):
    path, out = tmp_path / "tiny.yaml", tmp_path / "run"
    methods = ["hawq-v1", "hawq-v1-reverse", "hawq-v1-together"]
    tiny = TINY | {"methods": methods, "calibration": {"examples": 64, "choices": 1, "draws": 2}}
    path.write_text(yaml.safe_dump(tiny))
    config = load_config(path, ["finetune.examples_per_epoch=256", "finetune.epochs=2"])
    summary = run(config, out, name="tiny")
    blocks = summary.curvature.blocks
    names = ["conv1", "layer1.0", "layer2.0", "layer3.0", "linear"]
    assert [block.block for block in blocks] == names
    forth, back, together = summary.candidates.candidates
    assert sorted(forth.order) == sorted(block.layers for block in blocks)
    assert back.order == forth.order[::-1]
    assert together.order == []
    assert len(summary.test.scores) == 3
    assert summary.test.scores.keys() == {forth.key, back.key, together.key}
    assert [f.method for f in summary.candidates.fronts] == methods
    _agrees_with_one_process(config, out, blocks)
    found, _ = allocate(out, ["average_bits=4"], method="hawq-v1")
    assert found.order
    assert found.average_bits <= 4
    lines = (out / "curvature.eigenvalues.jsonl").read_text().splitlines()
    (out / "curvature.eigenvalues.jsonl").write_text("\n".join(lines[:4]) + "\n")
    (out / "curvature.json").unlink()
    assert run(config, out, name="tiny").curvature == summary.curvature
    resumed = (out / "curvature.eigenvalues.jsonl").read_text().splitlines()
    assert sorted(resumed) == sorted(lines)


def _agrees_with_one_process(config, out, blocks):
    task = build_task(config.task, config.seed)
    model = task.model()
    model.load_state_dict(read_state(out / "model.safetensors"))
    alone = top_eigenvalues(
        task,
        model,
        blocks[1].layers,
        split="train",
        examples=range(task.size("train")),
        batch_size=64,
    )
    # Another draw of images: within three of its errors, and of the residuals.
    error = np.hypot(blocks[1].data_error, float(alone.data_error[0]))
    slack = 3 * error + blocks[1].residual + float(alone.residual[0])
    assert abs(blocks[1].eigenvalue - float(alone.values[0])) < slack


# --- the report ----------------------------------------------------------------------------------


def test_the_report_shows_the_blocks_and_warns_of_eigenvalues_that_are_none():
    plain = make_summary(methods=("exact", "hawq-v1"))
    assert "Top eigenvalues of blocks" not in render(plain)
    loose = make_block("b").model_copy(update={"converged": False, "eigenvalue": -2.0})
    blocks = [make_block("a").model_dump(), loose.model_dump()]
    summary = changed(plain, curvature={"blocks": blocks})
    html = render(summary)
    assert "What hawq-v1 goes by" in html
    assert "<td>0.333</td>" in html
    assert "<td>0.111</td>" in html  # λ / n
    told = " ".join(caveats(summary))
    assert "The power iteration of 1 block (b) had not converged" in told
    assert "The top eigenvalue of 1 block (b) is negative and counts as zero" in told
