"""Asynchronous alignment: without staleness the synchronous run, with it answers no older than they may be.

Most tests run workers as threads of this process, which is the same code and starts at once.
"""

import copy
import os
import signal
import threading
from multiprocessing.connection import Connection

import pytest
import torch

from plaudit.rollout.generate import generate
from plaudit.training import rollout_workers
from plaudit.training.align import TrainingResult
from plaudit.training.rollout_workers import PublishedWeights, RolloutWorkers
from tests.training.conftest import SIZES, save_tokenizer
from tests.training.test_align import logged, run, settings, weights


class Threads:
    """What `RolloutWorkers` needs of a multiprocessing context, with threads for processes."""

    Lock = staticmethod(threading.Lock)

    Pipe = staticmethod(torch.multiprocessing.get_context("spawn").Pipe)

    @staticmethod
    def Process(target, args, daemon):
        model, published, channel = args
        # A process has copies of the model and of its end of the channel.
        end = Connection(os.dup(channel.fileno()))
        thread = threading.Thread(target=target, args=(copy.deepcopy(model), published, end), daemon=daemon)
        thread.exitcode = 0
        return thread


@pytest.fixture
def as_threads(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(rollout_workers.multiprocessing, "get_context", lambda _: Threads)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def without_clocks(result: TrainingResult):
    return [{name: value for name, value in line.items() if not name.startswith("workers/")} for line in logged(result)]


STYLES = {"name": "option_critic", "baseline": "leave_one_out", "num_options": 2, "sentence_ends": ["good"]}
GOALS = {"name": "feudal", "baseline": "leave_one_out", "horizon": 2}


@pytest.mark.parametrize(
    ("options", "others"),
    [({}, {}), ({"lora": {"rank": 2}}, {}), ({}, {"algorithm": STYLES}), ({}, {"algorithm": GOALS})],
    ids=["whole", "adapters", "styles", "goals"],
)
def test_without_staleness_it_is_the_synchronous_run(options, others, as_threads, tokenizer_path, tmp_path):
    model = {"model_type": "llama", "backbone_config": SIZES, "tokenizer": tokenizer_path, "template": "raw"}
    apart = run(settings(tokenizer_path, tmp_path / "apart", model=model | options, **others,
                         asynchronous={"workers": 1, "max_staleness": 0}))  # fmt: skip
    plain = run(settings(tokenizer_path, tmp_path / "plain", model=model | options, **others))
    ours, theirs = weights(apart), weights(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert without_clocks(apart) == logged(plain)
    staleness = [line["workers/staleness"] for line in logged(apart) if "workers/staleness" in line]
    assert staleness == [0.0] * 3


@pytest.mark.parametrize("algorithm", [{"name": "ppo", "epochs": 1, "importance_cap": 2.0}, {"name": "dqn"}])
def test_stale_answers_are_learned_from_and_are_never_older_than_the_bound(
    algorithm, as_threads, tokenizer_path, tmp_path
):
    config = settings(tokenizer_path, tmp_path, algorithm=algorithm, iterations=6,
                      asynchronous={"workers": 2, "max_staleness": 2})  # fmt: skip
    result = run(config)
    lines = [line for line in logged(result) if "workers/staleness" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    staleness = [line["workers/staleness"] for line in lines]
    assert staleness[0] == 0
    assert max(staleness) <= 2
    assert all(line.get("objective/rows_left_out", 0) == 0 for line in lines)


def test_a_worker_leaves_signals_to_the_learner_which_saves_the_run(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    mine, theirs = Threads.Pipe()
    mine.close()
    rollout_workers.write_answers(None, None, theirs)
    assert handlers == dict.fromkeys((signal.SIGINT, signal.SIGTERM), signal.SIG_IGN)


def test_workers_sample_as_few_together_as_the_run_does(as_threads, tokenizer_path, tmp_path, monkeypatch):
    together = []

    def watched(*arguments, **options):
        together.append(options["max_rows"])
        return generate(*arguments, **options)

    monkeypatch.setattr(rollout_workers, "generate", watched)
    run(settings(tokenizer_path, tmp_path, iterations=2, max_rows=5, asynchronous={"workers": 1, "max_staleness": 0}))
    assert together == [5, 5]


def test_what_may_be_asked_for():
    model = torch.nn.Linear(2, 2)
    workers = RolloutWorkers(model, workers=1, max_staleness=2, version=4)
    assert workers.wanted(100) == range(4, 7)
    assert workers.wanted(6) == range(4, 6)
    workers.begin_after(5)
    assert workers.wanted(100) == range(5, 7)
    workers.publish(model, 5)
    assert workers.wanted(100) == range(5, 8)


def test_published_weights_are_read_whole_with_their_version():
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    published = PublishedWeights(model, 7, threading.Lock())
    assert list(published.weights) == ["weight"]  # what does not learn does not travel
    assert published.read(other) == 7
    assert torch.equal(other.weight, model.weight)
    with torch.no_grad():
        model.weight.add_(1)
    published.write(model, 8)
    assert published.read(other) == 8
    assert torch.equal(other.weight, model.weight)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"asynchronous": {"workers": 3}}, r"workers: 3, but with max_staleness 1 answers of at most 2 iterations"),
        ({"algorithm": {"name": "ppo"}}, r"max_staleness: 1: answers of older weights.*importance_cap"),
        ({"algorithm": {"name": "acer"}}, "algorithm acer needs the whole distributions"),
    ],
)
def test_what_cannot_be_asynchronous_is_refused(options, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        settings("", tmp_path, **{"asynchronous": {}} | options)


@pytest.mark.slow
def test_processes_answer_as_threads_do_and_a_death_is_told(tokenizer_path, tmp_path, monkeypatch):
    apart = run(settings(tokenizer_path, tmp_path / "apart", asynchronous={"workers": 1, "max_staleness": 0}))
    plain = run(settings(tokenizer_path, tmp_path / "plain"))
    ours, theirs = weights(apart), weights(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    original = RolloutWorkers.take

    def killed(self, iteration):
        if iteration == 1:
            self._processes[0].kill()
        return original(self, iteration)

    monkeypatch.setattr(RolloutWorkers, "take", killed)
    with pytest.raises(RuntimeError, match=r"rollout worker 0 of 1 was killed by SIGKILL, so the run stops"):
        run(settings(tokenizer_path, tmp_path / "dead", asynchronous={"workers": 1, "max_staleness": 0}))
