"""Configurations told apart by `name`: how layers of them merge, what stands for a whole one, what is refused."""

from pathlib import Path

import pytest

from plaudit.configs.algorithm import AlgorithmConfig
from plaudit.configs.align import AlignConfig
from plaudit.configs.base import ConfigError, dump_config, load_config
from plaudit.configs.flags import parse_flags
from plaudit.configs.gym import GymConfig
from plaudit.configs.policy_gradient import PolicyGradientConfig
from plaudit.configs.q_learning import QLearningConfig
from plaudit.configs.reference import key_references


def gym(*words: str) -> GymConfig:
    files, layer = parse_flags(GymConfig, words)
    return load_config(GymConfig, files, layer)


def fault(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        gym(*words)
    return str(caught.value)


def test_a_name_alone_or_with_options_chooses_the_family() -> None:
    assert gym().algorithm == QLearningConfig()
    assert gym("--algorithm", "ppo").algorithm == PolicyGradientConfig(name="ppo")
    assert gym("--algorithm.name", "double_dqn").algorithm == QLearningConfig(name="double_dqn")
    wanted = PolicyGradientConfig(name="a2c", learning_rate=0.01)
    assert gym("--algorithm", "a2c", "--algorithm.learning-rate", "0.01").algorithm == wanted
    assert gym("--algorithm.learning-rate", "0.01", "--algorithm", "a2c").algorithm == wanted
    assert gym("--algorithm", "{name: a2c, learning_rate: 0.01}").algorithm == wanted
    # One key of the default member needs no name.
    assert gym("--algorithm.dueling").algorithm == QLearningConfig(dueling=True)


def test_layers_of_one_family_are_merged_and_another_family_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("algorithm: {name: dqn, dueling: true}\n")
    assert gym(str(path), "--algorithm", "double_dqn").algorithm == QLearningConfig(name="double_dqn", dueling=True)
    assert gym(str(path), "--algorithm", "ppo").algorithm == PolicyGradientConfig(name="ppo")
    path.write_text("algorithm: ppo\n")
    assert gym(str(path)).algorithm == PolicyGradientConfig(name="ppo")
    again = gym(str(path), "--algorithm.epochs", "2")
    assert again.algorithm == PolicyGradientConfig(name="ppo", epochs=2)
    path.write_text(dump_config(again))
    assert gym(str(path)) == again


def test_faults_name_the_place_and_what_would_be_right(tmp_path: Path) -> None:
    found = fault("--algorithm", "dqm")
    assert found.startswith("--algorithm: algorithm.name: there is no 'dqm'; did you mean 'dqn'? it is one of")
    found = fault("--algorithm", "ppo", "--algorithm.dueling")
    assert "this key belongs to another name" in found
    assert fault("--algorithm.duelling") == "--algorithm.duelling: unknown option; did you mean --algorithm.dueling?"
    path = tmp_path / "a.yaml"
    path.write_text("algorithm:\n  name: dqn\n  batch_size: many\n  duelling: true\n")
    lines = fault(str(path)).splitlines()
    assert any(line.startswith(f"{path}:3: algorithm.batch_size: ") for line in lines)
    assert any("did you mean 'algorithm.dueling'" in line for line in lines)


def test_a_word_stands_for_a_configuration_with_a_name_in_every_job() -> None:
    _, layer = parse_flags(AlignConfig, ["--algorithm", "rloo", "--optimizer", "sgd", "--model.backbone", "x"])
    config = load_config(AlignConfig, [], layer)
    assert config.algorithm == AlgorithmConfig(name="rloo")
    assert config.optimizer.name == "sgd"
    assert config.optimizer.learning_rate == 1e-5  # the job's own default stays


def test_the_reference_has_every_name_and_says_whose_key_it_is() -> None:
    rows = {}
    for row in key_references(GymConfig):
        rows.setdefault(row.key, []).append(row)
    (name,) = rows["algorithm.name"]
    assert "ppo" in name.type
    assert "double_dqn" in name.type
    assert name.default == "dqn"
    (dueling,) = rows["algorithm.dueling"]
    assert dueling.meaning.startswith("(dqn, double_dqn) ")
    assert len(rows["algorithm.learning_rate"]) > 1  # another default in each family


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exploration_start": 2.0}, "ε is a probability"),
        ({"exploration": "boltzmann", "exploration_end": 0.0}, "above 0"),
        ({"batch_size": 65, "buffer_size": 64}, "more than buffer_size"),
    ],
)
def test_meaningless_options_of_q_learning_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(QLearningConfig, overrides=options)


def test_a_policy_gradient_that_plays_stands_for_what_the_zoo_sets() -> None:
    ppo = PolicyGradientConfig(name="ppo")
    settings = ppo.resolved()
    assert (settings.epochs, settings.gae_lambda, settings.clip_schedule) == (20, 0.8, "linear")
    assert (settings.value_coefficient, settings.kl_coefficient) == (0.5, 0.0)
    assert ppo.playing() == {"rollout_steps": 32, "learning_rate": 1e-3, "optimizer": "adam", "schedule": "linear"}
    assert PolicyGradientConfig(name="ppo", epochs=3, gae_lambda=0.9).resolved().gae_lambda == 0.9
    assert PolicyGradientConfig(name="reinforce").resolved().value_coefficient == 0
    with pytest.raises(ConfigError, match="whole answers"):
        load_config(PolicyGradientConfig, overrides={"name": "reinforce", "baseline": "leave_one_out"})
    with pytest.raises(ConfigError, match="no reference"):
        load_config(PolicyGradientConfig, overrides={"kl_placement": "reward"})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("dqn", "--algorithm.priority-exponent", "0.9"), "priority_exponent: 0.9 needs prioritised"),
        (("dqn", "--algorithm.polyak", "0.1", "--algorithm.target-every", "50"), "target_every: 50 is for hard copies"),
        (("acer", "--algorithm.trust-region", "none", "--algorithm.average-decay", "0.9"), "without a trust_region"),
        (
            ("acer", "--algorithm.replay-ratio", "0", "--algorithm.buffer-size", "9"),
            "buffer_size: 9 has no effect with",
        ),
        (("dqn", "--algorithm.hidden", "[]"), "hidden: "),
        (("dyna", "--algorithm.threshold", "0.1"), "threshold: 0.1 is for planning: prioritised"),
        (("world_model", "--algorithm.code-size", "4"), "code_size: 4 has no effect with encoder: plain"),
        (("world_model", "--algorithm.pixel-scale", "2"), "pixel_scale: 2.0 is for pictures"),
    ],
)
def test_options_that_the_others_leave_without_effect_are_refused(words: tuple[str, ...], said: str) -> None:
    assert said in fault("--algorithm", *words)


def test_what_a_saved_agent_writes_down_with_its_defaults_is_read_again() -> None:
    for name in ("dqn", "acer", "dyna", "world_model", "ppo", "reinforce"):
        config = gym("--algorithm", name).algorithm
        assert type(config).model_validate(config.model_dump(mode="json")) == config
