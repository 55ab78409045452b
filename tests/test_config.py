"""The config: what it refuses, and how it says so."""

from dataclasses import fields
from typing import get_args

import pytest
import yaml
from pydantic.fields import FieldInfo

from hawq.finetune import Recipe
from hawq.space import Group, Space
from search.config import Budget, RecipeConfig, SearchConfig
from search.config_file import load_config, template
from search.errors import InputError

VALID = {
    "task": {"data": "digits", "pretrain": {"epochs": 1}, "search_size": 100},
    "budgets": [{"average_bits": 3}],
}


@pytest.fixture
def config_file(tmp_path):
    def write(raw):
        path = tmp_path / "my.yaml"
        path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
        return path

    return write


def test_a_short_config_gets_every_default(config_file):
    config = load_config(config_file(VALID))
    assert config.methods == ["uniform", "hawq-v2", "exact"]
    assert config.weights.bits == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_resolved_config_reads_back_as_itself(config_file):
    config = load_config(config_file(VALID))
    again = load_config(config_file(config.model_dump(mode="json")))
    assert again == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["curvature.rtoll=1"], "curvature.rtoll: unknown key, did you mean 'rtol'?"),
        (["budgets.0.avrage_bits=3"], "unknown key, did you mean 'average_bits'?"),
        (["task.pretrain.epoch=3"], "task.pretrain.epoch: unknown key, did you mean 'epochs'?"),
        (["curvature.rtol=soon"], "curvature.rtol: input should be a valid number"),
        (["curvature.rtol=-1"], "curvature.rtol: input should be greater than 0, got -1"),
        (["weights.bits=[2, 9]"], "weights.bits.1: input should be less than or equal to 8, got 9"),
        (["budgets.0.compression=8"], "give one of weight_mib, compression, average_bits, got"),
        (["budgets=[]"], "budgets: list should have at least 1 item"),
        (["methods=[hawqv2]"], "'hawqv2' is not known, did you mean 'hawq-v2'?"),
        (["task.data=null"], "give one of data (digits, cifar10, imagenet), detector (config: …)"),
        (["task.checkpoint=x.pt"], "give either checkpoint (a file of weights) or pretrain"),
        (["task.network=resnet21"], "network must be resnet8, resnet14, resnet20"),
        (["curvature.examples=32"], "examples must be more than batch_size"),
        (["curvature.rtol"], "--set must be KEY=VALUE"),
        (["seed.deep=1"], "'deep' must be inside a section, got 0"),
    ],
)
def test_a_mistake_is_one_line_that_names_path_value_and_remedy(config_file, overrides, message):
    with pytest.raises(InputError) as caught:
        load_config(config_file({**VALID, "seed": 0}), overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_mistake_of_a_file_is_reported_at_once(config_file):
    with pytest.raises(InputError) as caught:
        load_config(config_file(VALID), ["sed=1", "curvature.rtol=soon"])
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_section_is_named(config_file):
    with pytest.raises(InputError, match=r"my\.yaml: task: must be given"):
        load_config(config_file({"budgets": VALID["budgets"]}))


@pytest.mark.parametrize("text", ["a: [", "just words", ""])
def test_what_is_not_a_mapping_in_yaml_is_refused(config_file, text):
    with pytest.raises(InputError, match=r"my\.yaml: must be"):
        load_config(config_file(text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml: the config must be readable"):
        load_config(tmp_path / "nowhere.yaml")


def test_environment_variables_are_filled_in(config_file, monkeypatch):
    monkeypatch.setenv("MY_DATA", "/somewhere")
    config = load_config(
        config_file(VALID), ["task.root=${MY_DATA}/a", "task.search_indices=${NOT_SET:-b}.json"]
    )
    assert (config.task.root, config.task.search_indices) == ("/somewhere/a", "b.json")


def test_a_variable_that_is_not_set_is_named(config_file):
    with pytest.raises(InputError, match="task: root: environment variable NOT_SET must be set"):
        load_config(config_file(VALID), ["task.root=${NOT_SET}"])


@pytest.mark.parametrize(
    ("budget", "bits", "label"),
    [
        ({"weight_mib": 0.5}, {"weight_bits": 4 << 20}, "0.5 MiB"),
        ({"compression": 16}, {"weight_bits": 2000}, "16×"),
        ({"average_bits": 2.5}, {"weight_bits": 2500}, "2.5 bits"),
        ({"average_bits": 2.44}, {"weight_bits": 2440}, "2.44 bits"),
        ({"activation_mib": 0.5}, {"activation_bits": 4 << 20}, "activations 0.5 MiB"),
        ({"activation_compression": 8}, {"activation_bits": 400}, "activations 8×"),
        ({"activation_average_bits": 4.2}, {"activation_bits": 420}, "activations 4.2 bits"),
        ({"peak_activation_mib": 1}, {"peak_activation_bits": 8 << 20}, "activations' peak 1 MiB"),
        (
            {"compression": 16, "gbops": 0.7, "latency_ms": 1.5},
            {"weight_bits": 2000, "bops": 700_000_000, "latency_ns": 1_500_000},
            "16×, 0.7 GBOPs, 1.5 ms",
        ),
    ],
)
def test_budgets_convert_to_whole_units(budget, bits, label):
    space = Space((Group("w:a", 1000, 0, (1, 2)), Group("a:a#0", 100, 0, (2, 4))))
    assert Budget(**budget).limits(space) == bits
    assert Budget(**budget).label == label


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["budgets=[{}]"], "budgets.0: give at least one of weight_mib, compression"),
        (
            ["budgets=[{average_bits: 3, weight_mib: 1}]"],
            "budgets.0: give one of weight_mib, compression, average_bits, got weight_mib and",
        ),
        (
            ["budgets=[{average_bits: 3}, {average_bits: 3, gbops: 1}]"],
            "budgets.0: must limit activations too, since another budget does",
        ),
        (["budgets=[{average_bits: 3}, {average_bits: 3}]"], "budgets.1: must differ"),
        (["budgets=[{average_bits: 3, latency_ms: 1}]"], "budgets.0: latency_ms needs a latency"),
        (["budgets=[{weight_gib: 3}]"], "budgets.0.weight_gib: unknown key, did you mean"),
        (["weights.bits=[0, 4]"], "weights.bits: 0 is for channels"),
        (["weights.bits=[0]", "methods=[channel]"], "weights.bits: must hold a width above 0"),
        (
            ["budgets=[{average_bits: 3, gbops: 1}]", "methods=[channel]"],
            "budgets.0: gbops does not add up over channels",
        ),
    ],
)
def test_budgets_that_contradict_each_other_are_refused(config_file, changes, message):
    with pytest.raises(InputError) as caught:
        load_config(config_file(VALID), changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_recipe_of_the_config_is_the_recipe_of_the_training_loop():
    loop = {field.name: field.default for field in fields(Recipe)}
    shown: dict[str, FieldInfo] = dict(RecipeConfig.model_fields)
    assert shown.keys() == loop.keys()
    given_in_both = {"epochs", "batch_size", "lr"}
    for name in loop.keys() - given_in_both:
        assert shown[name].default == loop[name], name


def test_the_template_is_a_config_and_shows_every_key_of_every_section(config_file):
    text = template()
    load_config(config_file(text))
    uncommented = "\n".join(
        line.removeprefix("# ") for line in text.split("Commented")[1].splitlines()
    )
    for section, field in SearchConfig.model_fields.items():
        if section == "budgets":  # the head shows some
            continue
        models = [field.annotation, *get_args(field.annotation)]
        for model in (m for m in models if hasattr(m, "model_fields")):
            assert f"{section}:" in uncommented or f"\n{section}:" in text
            for key in model.model_fields:
                assert f"{key}:" in uncommented
