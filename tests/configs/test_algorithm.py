import pytest

from plaudit.configs.algorithm import DEFAULTS, AlgorithmConfig
from plaudit.configs.base import ConfigError, load_config
from plaudit.configs.policy_gradient import PolicyGradientConfig

NEVER = float("inf")


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_name_fills_in_what_it_stands_for_and_a_round_trip_changes_nothing(name):
    config = AlgorithmConfig(name=name)
    settings = config.resolved()
    for key, value in DEFAULTS[name].items():
        assert getattr(settings, key) == value, key
    assert (settings.epochs > 1) == (name == "ppo")
    assert (settings.clip_low == NEVER) == (settings.surrogate in ("policy_gradient", "preference"))
    assert (settings.value_coefficient > 0) == (settings.baseline == "value")
    assert AlgorithmConfig.model_validate(config.model_dump()).resolved() == settings


def test_what_is_given_replaces_what_the_name_stands_for():
    given = AlgorithmConfig(name="ppo", epochs=2, clip_low=0.1, baseline="leave_one_out").resolved()
    assert (given.epochs, given.clip_low, given.clip_high, given.value_coefficient) == (2, 0.1, 0.1, 0.0)
    assert AlgorithmConfig(name="ppo", clip_high=0.3).resolved().clip_low == 0.2
    assert AlgorithmConfig(name="ppo", surrogate="kl").resolved().old_kl_coefficient == 1.0
    # n steps and λ are two ways to the same advantage: one given replaces the other of the name.
    steps = AlgorithmConfig(name="a2c", num_steps=5).resolved()
    assert steps.num_steps == 5
    assert AlgorithmConfig(name="actor_critic", gae_lambda=0.5).resolved().num_steps is None
    assert AlgorithmConfig(kl_placement="none").resolved().kl_coefficient == 0.0
    assert AlgorithmConfig(kl_placement="loss").resolved().kl_estimator == "k3"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "rloo", "baseline": "none"}, "rloo stands for leave_one_out"),
        ({"name": "a2c", "baseline": "greedy"}, "a2c stands for value"),
        ({"name": "reinforce", "epochs": 2}, "epochs: 2: the plain policy gradient"),
        ({"kl_placement": "loss", "kl_estimator": "k1"}, "expected gradient 0"),
        ({"name": "rloo", "gae_lambda": 0.9}, "gae_lambda: 0.9 needs a learned value"),
        ({"name": "rloo", "critic_warmup": 2}, "critic_warmup: 2 needs a learned value"),
        ({"name": "grpo", "critic_lambda": 1}, "critic_lambda: 1.0 needs a learned value"),
        ({"view": "answer", "gae_lambda": 0.9}, "one step only"),
        ({"gae_lambda": 0.9, "num_steps": 3}, "not both"),
        ({"normalise_lengths": True}, "view: answer"),
        ({"name": "dpo", "view": "token"}, "dpo knows answer only"),
        ({"name": "dpo", "reduction": "per_token"}, "dpo knows per_prompt only"),
        ({"name": "dpo", "kl_coefficient": 0}, "must be positive"),
        ({"name": "dpo", "kl_estimator": "k2"}, "has no meaning for dpo"),
        ({"surrogate": "preference"}, "preference is dpo's"),
        ({"name": "dpo", "surrogate": "clip"}, "preference is dpo's"),
        ({"name": "rloo", "normalise_lengths": True}, "surrogate with a ratio"),
        ({"name": "a2c", "clip_low": 0.1}, "clip_low: 0.1 needs the surrogate"),
        ({"name": "ppo", "surrogate": "kl", "clip_schedule": "linear"}, "clip_schedule: linear needs the surrogate"),
        ({"name": "ppo", "old_kl_target": 0.1}, "old_kl_target: 0.1 needs the surrogate"),
        ({"name": "rloo", "dual_clip": 3}, "dual_clip: 3.0 needs"),
        ({"name": "ppo", "epochs": 1, "target_kl": 0.1}, "there is only one"),
        ({"name": "grpo", "clip_high": 0.28}, "clip_high: 0.28 bounds how far steps on a batch go"),
        ({"name": "ppo", "epochs": 1, "dual_clip": 3}, "dual_clip: 3.0 bounds"),
        ({"name": "ppo", "epochs": 1, "value_clip": 0.2}, "raise epochs or minibatches"),
        ({"name": "grpo", "surrogate": "kl", "old_kl_target": 0.01}, "old_kl_target: 0.01 bounds"),
        ({"name": "rloo", "baseline_decay": 0.5}, "running_mean"),
        ({"kl_placement": "none", "kl_target": 3}, "no effect"),
        ({"kl_placement": "none", "kl_coefficient": 0.5}, "kl_coefficient: 0.5 has no effect"),
        ({"kl_coefficient": 0, "kl_target": 3}, "start above 0"),
        ({"kl_adaptation": 0.3}, "adapts nothing"),
    ],
)
def test_combinations_that_mean_nothing_are_refused_with_value_and_reason(options, words):
    with pytest.raises(ConfigError, match=words):
        load_config(AlgorithmConfig, overrides=options)


def test_what_bounds_later_steps_is_taken_where_there_are_some_or_the_first_is_off_policy():
    assert AlgorithmConfig(name="grpo", minibatches=2, clip_high=0.28).resolved().clip_high == 0.28
    # In an environment, steps of a long episode wait for its end while the policy moves on.
    assert PolicyGradientConfig(name="reinforce", surrogate="clip", clip_low=0.1).resolved().clip_low == 0.1
    with pytest.raises(ValueError, match="value_clip"):
        PolicyGradientConfig(name="a2c", value_clip=0.2)
