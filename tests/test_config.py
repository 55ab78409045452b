"""The config: what it refuses, and how it says so."""

from dataclasses import fields

import pytest
import yaml
from pydantic.fields import FieldInfo

from hawq.finetune import Recipe
from hawq.space import Group, Space
from search.config import Budget, RecipeConfig, SearchConfig
from search.config_file import load_config, template
from search.errors import InputError
from search.searchers import SEARCHERS

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
    assert config.methods == list(SEARCHERS)
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
        (["budgets.0.compression=8"], "give exactly one of weight_mib, compression, average_bits"),
        (["budgets=[{}]"], "give exactly one of weight_mib, compression, average_bits"),
        (["budgets=[]"], "budgets: list should have at least 1 item"),
        (["methods=[hawqv2]"], "'hawqv2' is not known, did you mean 'hawq-v2'?"),
        (["task.data=null"], "give either data (digits, cifar10) or factory"),
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
        (Budget(weight_mib=0.5, compression=None, average_bits=None), 4 << 20, "0.5 MiB"),
        (Budget(weight_mib=None, compression=16, average_bits=None), 2000, "16×"),
        (Budget(weight_mib=None, compression=None, average_bits=2.5), 2500, "2.5 bits"),
    ],
)
def test_budgets_convert_to_whole_bits(budget, bits, label):
    space = Space((Group("w:a", 1000, 0, (1, 2)),))
    assert budget.limit_bits(space) == bits
    assert budget.label == label


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
    for section in ("task", "curvature", "weights", "activations", "finetune", "trials"):
        for key in SearchConfig.model_fields[section].annotation.model_fields:
            assert f"{key}:" in uncommented
