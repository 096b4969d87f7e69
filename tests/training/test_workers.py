"""Worker processes: one of them is the synchronous run, and one that dies or fails stops the run and says so."""

import signal
from multiprocessing import Pipe

import pytest
import torch
from safetensors.torch import load_file

from plaudit.algorithms.a3c import A3CAgent
from plaudit.algorithms.base import TaskSizes
from plaudit.configs.a3c import A3CConfig
from plaudit.configs.gym import GymConfig
from plaudit.rollout.environments import Collector, make_environments
from plaudit.training import gym
from plaudit.training.workers import WorkerPool, WorkerTask, work

SIZES = TaskSizes(4, 2)


def pool_of(workers, env="CartPole-v1"):
    config = A3CConfig(workers=workers, hidden=(8,))
    agent = A3CAgent(config, SIZES, total_steps=100, seed=0)
    task = WorkerTask(config=config, sizes=SIZES, env=env, env_options={}, total_steps=100, seed=0, report_every=4)
    return WorkerPool(task, agent)


@pytest.mark.slow
def test_a_run_with_one_worker_is_the_synchronous_run(tmp_path):
    found = []
    for name, algorithm in (
        ("a3c", {"name": "a3c", "workers": 1, "hidden": [8]}),
        ("a2c", {"name": "a2c", "num_environments": 1, "hidden": [8], "discount": 0.99, "value_coefficient": 0.5}),
    ):
        config = GymConfig.model_validate(
            {"algorithm": algorithm, "total_steps": 400, "output": tmp_path / name, "episodes": 2, "quiet": True,
             "evaluate_every": 400, "save_every": 400, "seed": 4}
        )  # fmt: skip
        result = gym.main(config)
        found.append((load_file(result.model_folder / "agent.safetensors"), result.steps, result.episodes))
    (mine, *counts), (theirs, *expected) = found
    assert counts == expected
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_worker_that_dies_stops_the_run():
    with pool_of(1) as pool:
        pool.processes[0].kill()
        with pytest.raises(RuntimeError, match=r"worker 0 of 1 was killed by SIGKILL after 0 of its steps.*resume"):
            pool.advance()
    assert pool.processes[0].exitcode == -signal.SIGKILL


def test_a_worker_that_fails_says_why(monkeypatch):
    pool = pool_of(2, env="NoSuchEnvironment-v0")
    receiver, sender = Pipe(duplex=False)
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    work(pool.task, pool.agent.shared, 1, pool.stop, sender)
    assert handlers == dict.fromkeys((signal.SIGINT, signal.SIGTERM), signal.SIG_IGN)  # the first process saves the run
    sender.close()
    pool._reports[receiver] = 1
    with pytest.raises(RuntimeError, match=r"worker 1 failed, so the run stops:\n(?s:.*)NoSuchEnvironment"):
        pool.advance()


def test_workers_report_all_that_they_have_done(monkeypatch):
    """In this process, one after the other: every step, update and episode is in exactly one report."""
    pool = pool_of(2)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    receiver, sender = Pipe(duplex=False)
    work(pool.task, pool.agent.shared, 0, pool.stop, sender)
    sender.close()
    pool._reports[receiver] = 0
    pool.processes.append(type("Ended", (), {"exitcode": 0, "join": lambda self: None})())
    reports = []
    while (report := pool.next_report()) is not None:
        reports.append(report)
    assert [report.steps for report in reports] == [20] * 5
    assert pool.agent.shared.counts.tolist() == [[100, 20], [0, 0]]
    assert sum(sum(report.lengths) for report in reports) <= 100
    assert all(len(report.staleness) == 4 and max(report.staleness) == 0 for report in reports)


def test_workers_play_other_episodes(monkeypatch):
    """The first one's are those of the run's seed."""
    begun, plain = [], Collector.collect

    def noted(self, *rest):
        begun.append(self._observations)
        return plain(self, *rest)

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(Collector, "collect", noted)
    first = []
    for place in range(2):
        begun.clear()
        pool = pool_of(2)
        receiver, sender = Pipe(duplex=False)
        work(pool.task, pool.agent.shared, place, pool.stop, sender)
        receiver.close()
        first.append(begun[0])
    assert torch.equal(first[0], Collector(make_environments("CartPole-v1", 1), seed=0)._observations)
    assert not torch.equal(first[0], first[1])
