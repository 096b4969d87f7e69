"""`plaudit gym`: what a run leaves, that it goes on after a stop, plays again from its folder, and films itself."""

import csv
import json
import os
import signal
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from PIL import Image

from plaudit.algorithms.dqn import DQN
from plaudit.configs.base import load_config
from plaudit.configs.gym import GymConfig
from plaudit.rollout.environments import Collector, make_environments
from plaudit.training import gym_video
from plaudit.training.gym import from_workers, main, prepare, worker_task
from plaudit.training.gym_agents import load_agent
from plaudit.training.workers import Report
from tests.algorithms.problems import Echo

SMALL = {
    "algorithm": {"learning_starts": 50, "rollout_steps": 50, "gradient_steps": 4, "batch_size": 16, "hidden": [16]},
    "total_steps": 300,
    "episodes": 4,
    "quiet": True,
    "threads": 1,
}


class Painted(Echo):
    """Echo that can be seen, whose states and actions do not begin at 0."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 Gymnasium's own form
    observation_space = spaces.Discrete(4, start=3)
    action_space = spaces.Discrete(4, start=-1)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, **options):
        observation, info = super().reset(**options)
        return observation + 3, info

    def step(self, action):
        assert self.action_space.contains(action)
        observation, *others = super().step(action + 1)
        return observation + 3, *others

    def render(self):
        return np.full((8, 8, 3), 60 * self.state, dtype=np.uint8)


class Picture(Echo):
    """Echo whose observation is a picture of whole numbers."""

    observation_space = spaces.Box(0, 255, (2, 2, 1), np.uint8)

    def see(self):
        return np.eye(4, dtype=np.uint8)[self.state].reshape(2, 2, 1) * 200

    def reset(self, **options):
        return super().reset(**options) and self.see(), {}

    def step(self, action):
        _, *others = super().step(action)
        return self.see(), *others


@pytest.fixture(autouse=True, scope="module")
def registered():
    for cls in (Echo, Painted, Picture):
        gymnasium.register(f"Test{cls.__name__}-v0", cls)
    yield
    for cls in (Echo, Painted, Picture):
        del gymnasium.registry[f"Test{cls.__name__}-v0"]


def config(folder, **options):
    return load_config(GymConfig, overrides={"env": "TestEcho-v0", "output": folder / "run"} | SMALL | options)


def test_a_run_leaves_an_agent_a_curve_and_a_result_and_plays_again(tmp_path, capsys):
    result = main(config(tmp_path))
    folder = tmp_path / "run"
    assert (result.stopped_by, result.steps, result.exit_code) == ("steps", 300, 0)
    assert result.model_folder == folder / "model"
    rows = list(csv.DictReader((folder / "curve.csv").open()))
    assert [row["steps"] for row in rows] == ["50", "100", "150", "200", "250", "300"]
    assert float(rows[-1]["return"]) == result.metrics["return"]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "result.json").read_text())["episodes"] == 300 // 8
    description = json.loads((folder / "model" / "agent.json").read_text())
    assert (description["env"], description["algorithm"]["name"]) == ("TestEcho-v0", "dqn")
    saved = load_agent(folder)
    seen = torch.arange(4)
    assert torch.equal(saved.policy.action_values(seen), result.agent.greedy_policy().action_values(seen))
    returns = main(load_config(GymConfig, overrides={"evaluate": str(folder), "episodes": 4, "threads": 1}))
    assert np.mean(returns) == result.metrics["return"]  # the same environments by the same seed
    assert "dqn in TestEcho-v0: return" in capsys.readouterr().out
    with pytest.raises(ValueError, match="already holds a run"):
        main(config(tmp_path))
    with pytest.raises(ValueError, match="holds no agent"):
        load_agent(tmp_path)


def test_a_signal_saves_and_the_run_goes_on_with_the_same_agent(tmp_path):
    stopping = config(tmp_path)
    job = prepare(stopping)
    job.collector.environments.close()
    updates = 0
    original = type(job.agent).update

    def update(self, trajectory):
        nonlocal updates
        updates += 1
        if updates == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, trajectory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(job.agent), "update", update)
        stopped = main(stopping)
    assert (stopped.stopped_by, stopped.exit_code, stopped.steps) == ("SIGTERM", 143, 150)
    again = prepare(config(tmp_path, resume=True))
    assert again.resume()
    again.collector.environments.close()
    mine, its = stopped.agent.state_dict(), again.agent.state_dict()
    assert mine["steps"] == its["steps"] == 150
    assert torch.equal(mine["generator"], its["generator"])
    for name in ("network", "target"):
        assert all(torch.equal(mine[name][key], its[name][key]) for key in mine[name])
    mine["replay"]["columns"]["truncated"][:, -1] = True  # the episode under way is cut off: a new one begins
    for name, tensor in mine["replay"]["columns"].items():
        assert torch.equal(tensor, its["replay"]["columns"][name])
    assert again.collector.episode_returns == [float(value) for value in again.collector.episode_returns]
    finished = main(config(tmp_path, resume=True))
    assert (finished.stopped_by, finished.steps) == ("steps", 300)
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [50, 100, 150, 200, 250, 300]
    with pytest.raises(ValueError, match="another configuration"):
        main(config(tmp_path, resume=True, seed=5))


def test_an_episode_is_filmed_and_spaces_may_begin_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(gym_video, "find_spec", lambda name: None)
    result = main(config(tmp_path, env="TestPainted-v0", video=True))
    (film,) = (tmp_path / "run" / "video").iterdir()
    assert film.name == "agent.gif"
    assert 1 < Image.open(film).n_frames <= Echo.limit + 1  # pictures that are alike are one
    assert result.steps == 300
    with pytest.raises(ValueError, match="renders no pictures"):
        main(config(tmp_path, overwrite=True, video=True))


def test_a_film_has_a_picture_before_and_after_every_step(tmp_path):
    films = pytest.importorskip("imageio_ffmpeg")
    pytest.importorskip("pygame")
    left = SimpleNamespace(actions=torch.zeros(1, dtype=torch.int64))
    policy = SimpleNamespace(sample=lambda seen, generator: left)
    film = gym_video.record_video("CartPole-v1", policy, tmp_path / "video", seed=3)
    environment = gymnasium.make("CartPole-v1")
    environment.reset(seed=3)
    steps = 1
    while not environment.step(0)[2]:
        steps += 1
    reader = films.read_frames(str(film))
    about = next(reader)
    pictures = [np.frombuffer(each, dtype=np.uint8).reshape(400, 600, 3) for each in reader]
    assert (film.name, about["size"], about["fps"]) == ("agent.mp4", (600, 400), 50)
    assert len(pictures) == steps + 1
    # A white sky with a brown pole in it, which falls to the right of a cart that is pushed to the left.
    assert pictures[0][5, 5].min() > 250
    brown = (np.abs(pictures[-1].astype(int) - [202, 152, 101]).max(-1) < 40).nonzero()[1].mean()
    black = (pictures[-1][250:340].max(-1) < 30).nonzero()[1].mean()
    assert brown > black + 5


def test_pictures_come_as_one_vector_of_numbers():
    environments = make_environments(Picture, 2)
    collector = Collector(environments)
    job = prepare(load_config(GymConfig, overrides={"env": "TestPicture-v0"} | SMALL))
    assert job.sizes == (4, 4)
    found = collector.collect(job.agent.policy, 3)
    assert found.observations.shape == (2, 3, 4)
    assert found.observations.sum(-1).unique().tolist() == [200.0]
    for each in (environments, job.collector.environments):
        each.close()


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert main(config(tmp_path), dry_run=True) == []
    assert "4 numbers" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert main(config(tmp_path, algorithm={"name": "a3c", "workers": 3}), dry_run=True) == []
    assert "of 5 steps (3 workers)" in capsys.readouterr().out


def test_a_dry_run_takes_the_time_of_an_update_that_learns(tmp_path, capsys, monkeypatch):
    """64 steps an update, and the first four of them, 256 steps, only fill the memory."""
    learns = {"name": "dqn", "num_environments": 1, "rollout_steps": 64, "learning_starts": 256, "gradient_steps": 4}
    found = []
    update = DQN.update

    def watched(self, trajectory):
        found.append("value/mean_q" in (metrics := update(self, trajectory)))
        return metrics

    monkeypatch.setattr(DQN, "update", watched)
    main(config(tmp_path, algorithm=learns, total_steps=1000), dry_run=True)
    assert found == [False] * 4 + [True]
    assert "16 of 64 steps" in capsys.readouterr().out
    monkeypatch.setattr("plaudit.training.gym.PATIENCE", 0.0)
    main(config(tmp_path, algorithm=learns, total_steps=1000), dry_run=True)
    assert found[5:] == [False]


def test_a_run_that_goes_on_plays_other_episodes_than_before(tmp_path):
    """The environments by a seed of their own, the agent's draws where they were."""
    job = prepare(config(tmp_path, env="CartPole-v1"))
    first = job.collector._observations.clone()
    job.steps = 50
    job.agent.update(job.collector.collect(job.agent.policy, 50))
    (tmp_path / "run").mkdir()
    job.save()
    again = prepare(config(tmp_path, env="CartPole-v1", resume=True))
    assert again.resume()
    assert torch.equal(again.collector.generator.get_state(), job.collector.generator.get_state())
    assert not torch.equal(again.collector._observations, first)
    assert again.collector.episode_returns == job.collector.episode_returns
    assert again.collector.num_steps_taken == 50
    asynchronous = prepare(config(tmp_path, algorithm={"name": "a3c"}, seed=3))
    asynchronous.steps = 40
    assert worker_task(asynchronous, asynchronous.agent.config).seed == 43
    for each in (job, again, asynchronous):
        each.collector.environments.close()


def test_steps_of_workers_count_as_they_are_reported_and_the_last_reports_are_waited_for(tmp_path):
    job = prepare(config(tmp_path, algorithm={"name": "a3c"}))
    job.agent.shared.counts[0] = torch.tensor([310, 62])  # what was not reported yet counts later
    reports = [Report(0, 150, returns=[1.0], lengths=[8]), Report(1, 150, returns=[2.0], lengths=[9]), Report(0, 10)]
    pool = SimpleNamespace(advance=lambda _: (reports.pop(0), {"left": len(reports)}) if reports else (None, {}))
    assert from_workers(job, pool, lambda: False) == {"left": 2}
    assert (job.steps, job.collector.episode_returns) == (150, [1.0])
    assert from_workers(job, pool, lambda: False) == {"left": 0}
    assert (job.steps, job.collector.episode_lengths) == (310, [8, 9])
    job.collector.environments.close()


def test_steps_of_workers_that_were_not_reported_before_a_stop_count(tmp_path):
    options = {"algorithm": {"name": "a3c"}}
    job = prepare(config(tmp_path, **options))
    job.agent.shared.counts[1] = torch.tensor([40, 8])
    job.steps = 25
    (tmp_path / "run").mkdir()
    job.save()
    again = prepare(config(tmp_path, resume=True, **options))
    assert again.resume()
    assert again.steps == 40
    ended = type("Ended", (), {"advance": lambda self, interrupted: (None, {})})()
    assert from_workers(again, ended, lambda: True) == {}
    with pytest.raises(RuntimeError, match="all workers ended after 40 of 300 steps"):
        from_workers(again, ended, lambda: False)
    for each in (job, again):
        each.collector.environments.close()


def test_an_environment_that_does_not_fit_is_a_fault_of_the_user(tmp_path):
    with pytest.raises(ValueError, match="env: Environment version v9 for environment CartPole doesn't exist"):
        make_environments("CartPole-v9", 1)
    with pytest.raises(ValueError, match="env_options: color: "):
        make_environments("CartPole-v1", 1, color="red")
    for options, fault in (
        ({"env": "CartPole-v9"}, "env: Environment version v9"),
        ({"env": "CartPole-v1", "env_options": {"color": "red"}}, "env_options: color: "),
        ({"env": "Pendulum-v1"}, "env: Box or Discrete"),
    ):
        with pytest.raises(ValueError, match=fault):
            prepare(config(tmp_path, video=True, **options))
    folder = tmp_path / "run"
    main(load_config(GymConfig, overrides=SMALL | {"total_steps": 60, "output": folder}))
    with pytest.raises(
        ValueError, match="MountainCar-v0 has 2 observations and 3 actions, but this agent learned in Ca"
    ):
        main(load_config(GymConfig, overrides={"evaluate": folder, "env": "MountainCar-v0", "episodes": 1}))


def test_an_environment_without_a_time_limit_is_named_and_evaluated_all_the_same(tmp_path, capsys):
    options = {"env": "CliffWalking-v1", "algorithm": {"name": "dyna"}, "total_steps": 10, "evaluate_every": 10}
    result = main(config(tmp_path, **options, episodes=2, episode_limit=20, quiet=False))
    assert "CliffWalking-v1 has no time limit; episodes of evaluations are cut off after 20" in capsys.readouterr().err
    assert -20 * 100 <= result.metrics["return"] <= -13
    assert len(main(load_config(GymConfig, overrides={"evaluate": tmp_path / "run", "episodes": 1}
                                | {"episode_limit": 20}))) == 1  # fmt: skip


def test_options_of_an_agent_s_environment_are_not_another_one_s(tmp_path):
    options = {"env": "FrozenLake-v1", "env_options": {"map_name": "4x4"}, "algorithm": {"name": "dyna"}}
    folder = main(config(tmp_path, **options | {"total_steps": 5, "episodes": 1})).output
    saved = {"evaluate": folder, "episodes": 1}
    with pytest.raises(ValueError, match="env: Taxi-v4 has 500 observations"):
        main(load_config(GymConfig, overrides=saved | {"env": "Taxi-v4"}))
    with pytest.raises(ValueError, match=r"FrozenLake-v1 has 64 observations.*leave env and env_options out"):
        main(load_config(GymConfig, overrides=saved | {"env_options": {"map_name": "8x8"}}))


def test_a_run_that_ends_before_it_learns_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"total_steps: 50 ends before anything is learned.*learning_starts is 50"):
        config(tmp_path, total_steps=50)
    config(tmp_path, total_steps=51)  # rounds are whole: 100 are played
    assert load_config(GymConfig, overrides={"evaluate": tmp_path, "total_steps": 1}).evaluate == tmp_path


def test_a_finished_run_may_go_on_with_a_video_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gym_video, "find_spec", lambda name: None)
    main(config(tmp_path, env="TestPainted-v0", total_steps=100))
    main(config(tmp_path, env="TestPainted-v0", total_steps=100, resume=True, video=True, episodes=1, episode_limit=9))
    assert (tmp_path / "run" / "video" / "agent.gif").is_file()


@pytest.mark.parametrize(("steps", "warned"), [(24, True), (64, False)])
def test_a_run_that_waited_for_the_end_of_an_episode_in_vain_says_so(steps, warned, tmp_path, capsys):
    options = {"name": "reinforce", "num_environments": 4, "rollout_steps": 6, "hidden": [4]}
    main(config(tmp_path, algorithm=options, total_steps=steps, episodes=1))
    assert ("no episode ended in 24 steps, and reinforce" in capsys.readouterr().err) is warned
