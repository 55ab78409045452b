"""What agents expect of both environments: Gymnasium's checks, and those that use them."""

import pickle

import cloudpickle
import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv
from test_channel_ratios import make_arguments, make_env, make_space
from test_layer_bits import make_instance

from envs import LayerBits
from envs.picture import listing, picture
from hawq.space import Group, Space

CHANNELS = make_space([(6, 3), (9, 7), (5, 2)], (2, 4, 8))
BOTH = make_space([(6, 3), (9, 7)], (2, 4, 8), [(7, 20)], (3, 4), pinned={"l0": 8})
TIED = make_space([(6, 3), (6, 7), (5, 2)], (0, 2, 4, 8), ties=[["l0", "l1"]])

MAKERS = {
    "channels": lambda **how: make_env(CHANNELS, **how),
    "channels, pinned, two parts": lambda **how: make_env(BOTH, share=0.2, **how),
    "channels, tied, pruned": lambda **how: make_env(TIED, unit="weights", **how),
    "channels by layer": lambda **how: make_env(BOTH, scope="layer", **how),
    "channels, nothing to spare": lambda **how: make_env(CHANNELS, share=0.0, **how),
    "layers": lambda **how: LayerBits(**make_instance(tensors=()), **how),
    "layers, pinned": lambda **how: LayerBits(**make_instance(pinned={"l1": 4}), **how),
    "layers, joint budgets": lambda **how: LayerBits(
        **make_instance(("bops", "peak_activation_bits"), 0.3), **how
    ),
}
every_env = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def rolled(env, num_steps, seed):
    """Everything that some steps with one seed's actions give, over episodes."""
    env.action_space.seed(seed)
    told = [env.reset(seed=seed)]
    for _ in range(num_steps):
        told.append(env.step(env.action_space.sample()))
        if told[-1][2]:
            told.append(env.reset())
    return told


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1:] == other[1:]


@every_env
@pytest.mark.parametrize("render_mode", [None, "rgb_array", "ansi"])
def test_honors_the_gymnasium_contract(make, render_mode):
    check_env(make(render_mode=render_mode), skip_render_check=True)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("ChannelRatios-v0", make_arguments(BOTH)), ("LayerBits-v0", make_instance())],
)
def test_what_gymnasium_makes_can_be_rendered_in_every_mode(name, arguments):
    check_env(gymnasium.make(name, render_mode="ansi", **arguments).unwrapped)


@every_env
def test_one_seed_gives_one_roll_out(make):
    assert_same(rolled(make(), 20, seed=3), rolled(make(), 20, seed=3))


@every_env
@pytest.mark.parametrize("pickles", [pickle, cloudpickle])
def test_a_pickle_in_the_midst_of_an_episode_goes_on_as_it_was(make, pickles):
    env = make()
    env.reset()
    env.step(np.array([0.4], np.float32))
    other = pickles.loads(pickles.dumps(env))
    assert_same([env.step(np.array([0.7]))], [other.step(np.array([0.7]))])
    assert_same(rolled(env, 9, seed=1), rolled(other, 9, seed=1))


@every_env
def test_a_vector_of_them_is_each_of_them(make):
    vector, alone = SyncVectorEnv([make, make]), make()
    actions = np.random.default_rng(0).random((alone.num_steps, 2, 1), np.float32)
    vector.reset()
    for action in actions:
        *_, infos = vector.step(action)
    expected = [alone.allocation_of(actions[:, i, 0]) for i in range(2)]
    assert list(infos["allocation"]) == expected
    vector.close()


@every_env
def test_it_is_drawn_at_every_step(make):
    env, text = make(render_mode="rgb_array"), make(render_mode="ansi")
    drawn, said = [], []
    for each, shown in ((env, drawn), (text, said)):
        each.reset()
        shown.append(each.render())
        for _ in range(each.num_steps):
            each.step(np.array([1.0]))
            shown.append(each.render())
    assert {image.shape for image in drawn} == {drawn[0].shape}
    assert drawn[0].dtype == np.uint8
    assert "open" in said[0]
    assert "open" not in said[-1]
    assert make().render() is None


# --- the picture --------------------------------------------------------------------------------


def test_a_picture_gives_each_layer_its_shares():
    space = Space(tuple(Group(f"w:l{i}[{c}]", 5, 1, (2, 4, 8)) for i in range(2) for c in range(4)))
    one, other = (picture(space, bits) for bits in ([8] * 4 + [2] * 4, [8, 2, 2, 2] * 2))
    purple, gray = (68, 1, 84), (205, 205, 205)

    def share(image, left, color):
        strip = image[26:156, left : left + 250]
        return (strip == color).all(2).mean()

    # Strips begin at 42 and at 342, and are 300 wide.
    assert share(one, 45, purple) == 1
    assert share(one, 345, purple) == 0
    for left in (45, 345):
        assert share(other, left, purple) == pytest.approx(0.25, abs=0.01)
    assert share(picture(space, [None] * 8), 45, gray) == 1
    assert (other[155, 50] == purple).all()  # the widest at the bottom


def test_a_listing_says_what_each_layer_receives():
    space = Space(tuple(Group(f"w:l[{c}]", 5, 1, (1, 4, 8)) for c in range(4)))
    assert listing(space, [8, 1, 1, 1]) == (
        "weights: 2.75 bits on average\n  l  8 bits 25.0%, 1 bit 75.0%"
    )
    assert listing(space, [8, None, None, 4]).splitlines() == [
        "weights: 6.00 bits on average so far",
        "  l  8 bits 25.0%, 4 bits 25.0%, open 50.0%",
    ]
    with pytest.raises(ValueError, match="bits must have 4 entries, got 1"):
        listing(space, [8])


def test_more_layers_than_pixels_are_drawn():
    space = Space(tuple(Group(f"w:l{i}", 5, 1, (2, 4)) for i in range(1500)))
    assert picture(space, [4] * 1500).shape == (180, 780, 3)


# --- agents -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["channels, pinned, two parts", "layers, joint budgets"])
def test_stable_baselines_trains_on_it(name):
    baselines = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.env_checker import check_env as check  # noqa: PLC0415

    check(MAKERS[name](), warn=False)
    agent = baselines.DDPG(
        "MlpPolicy",
        MAKERS[name](),
        learning_starts=50,
        policy_kwargs={"net_arch": [16]},
        seed=0,
        device="cpu",
    )
    agent.learn(200)
    action, _ = agent.predict(MAKERS[name]().reset()[0], deterministic=True)
    assert MAKERS[name]().action_space.contains(action)


@pytest.mark.ray
# RLlib gives every environment of a process the same name.
@pytest.mark.filterwarnings("ignore:.*Overriding environment rllib-single-agent-env-v0")
@pytest.mark.parametrize("name", ["channels, pinned, two parts", "layers, joint budgets"])
def test_rllib_trains_on_it(ray_cluster, name):
    from ray.rllib.algorithms.ppo import PPOConfig  # noqa: PLC0415 (seconds, for these alone)
    from ray.tune.registry import register_env  # noqa: PLC0415

    register_env("bits", lambda config: MAKERS[config["name"]]())
    config = (
        PPOConfig()
        .environment("bits", env_config={"name": name})
        .env_runners(num_env_runners=0)
        .training(train_batch_size=60, minibatch_size=30, num_epochs=1)
        .debugging(seed=0)
    )
    algorithm = config.build_algo()
    try:
        result = algorithm.train()
    finally:
        algorithm.stop()
    episode = result["env_runners"]
    assert episode["episode_len_mean"] == MAKERS[name]().num_steps
    assert episode["episode_return_max"] < 0
