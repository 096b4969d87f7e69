"""Schedules, optimizers, guards, random state, stopping, signals, precision, progress."""

import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn

from plaudit.configs.training import OptimizerConfig
from plaudit.training.guards import NonFiniteError, require_finite_gradient, require_finite_losses
from plaudit.training.optimizers import (
    build_optimizer,
    clip_gradients,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
)
from plaudit.training.precision import autocast, pick_device
from plaudit.training.progress import ProgressReport, duration_text
from plaudit.training.random_state import random_state, seeded, set_random_state
from plaudit.training.schedules import learning_rate_factor, warmup_steps_of
from plaudit.training.signals import StopRequest
from plaudit.training.stopping import BestSoFar


def factors(schedule: str, steps: int = 10, warmup: int = 2, final: float = 0.0) -> list[float]:
    return [
        learning_rate_factor(s, schedule=schedule, total_steps=steps, warmup_steps=warmup, final_fraction=final)
        for s in range(steps + 2)
    ]


def test_schedules_by_hand() -> None:
    assert factors("constant") == [1 / 3, 2 / 3] + [1.0] * 10
    assert factors("linear") == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0, 0])
    cosine = factors("cosine", final=0.1)
    assert cosine[2] == 1.0
    assert cosine[6] == pytest.approx(0.55)
    assert cosine[4] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert cosine[10:] == pytest.approx([0.1, 0.1])


def test_schedule_extremes() -> None:
    assert learning_rate_factor(0, schedule="linear", total_steps=1) == 1.0
    assert warmup_steps_of(0.05, 30) == 2
    assert warmup_steps_of(7, 30) == 7
    with pytest.raises(ValueError, match="'step' is unknown"):
        learning_rate_factor(0, schedule="step", total_steps=1)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.layer = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 1)
        self.output = nn.Linear(4, 5, bias=False)
        self.output.weight = self.embedding.weight


def test_groups_decay_only_matrices_and_give_the_head_its_rate() -> None:
    model = Small()
    model.norm.bias.requires_grad_(False)
    groups = parameter_groups(
        model, learning_rate=0.1, weight_decay=0.5, head_learning_rate=1.0, head_prefixes=("head.",)
    )
    ids = {group["name"]: {id(parameter) for parameter in group["params"]} for group in groups}
    assert ids == {
        "backbone/decayed": {id(model.layer.weight)},
        "backbone/not decayed": {id(model.embedding.weight), id(model.layer.bias), id(model.norm.weight)},
        "head/decayed": {id(model.head.weight)},
        "head/not decayed": {id(model.head.bias)},
    }
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "backbone/decayed": (0.1, 0.5),
        "backbone/not decayed": (0.1, 0.0),
        "head/decayed": (1.0, 0.5),
        "head/not decayed": (1.0, 0.0),
    }
    model.expert_bias = nn.Parameter(torch.zeros(3, 4))
    groups = parameter_groups(model, learning_rate=0.1, weight_decay=0.5)
    undecayed = next(group for group in groups if group["name"] == "backbone/not decayed")
    assert any(parameter is model.expert_bias for parameter in undecayed["params"])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        parameter_groups(model, learning_rate=0.1, weight_decay=0.0)


def test_weights_that_lose_small_updates_are_said_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    build_optimizer(nn.Linear(2, 2), OptimizerConfig())
    assert capsys.readouterr().err == ""
    build_optimizer(nn.Linear(2, 2).bfloat16(), OptimizerConfig())
    assert "weights in bfloat16 are trained: updates below 1/256" in capsys.readouterr().err


def test_sgd_and_adamw_take_the_first_step_by_hand() -> None:
    for name, expected in (("sgd", 1 - 0.5 * (3 + 0.2 * 1)), ("adamw", 1 - 0.5 * 0.2 - 0.5)):
        parameter = nn.Parameter(torch.ones(2, 2))
        holder = nn.Module()
        holder.weight = parameter
        optimizer = make_optimizer(parameter_groups(holder, learning_rate=1.0, weight_decay=0.2), name=name)
        set_learning_rate(optimizer, 0.5)
        parameter.grad = torch.full((2, 2), 3.0)
        optimizer.step()
        torch.testing.assert_close(parameter.data, torch.full((2, 2), expected), rtol=1e-6, atol=1e-6)


def test_clipping_by_hand() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    for limit, expected in ((None, (3.0, 4.0)), (10.0, (3.0, 4.0)), (1.0, (0.6, 0.8))):
        a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
        assert clip_gradients([a, b], limit).item() == 5.0
        assert (a.grad.item(), b.grad.item()) == pytest.approx(expected, abs=1e-5)


def test_guards_name_the_records() -> None:
    require_finite_losses([1.0, -2.0], [["a"], ["b"]], step=4)
    with pytest.raises(NonFiniteError, match=r"step 4: the loss is nan.*Records: c, d\."):
        require_finite_losses([1.0, math.nan], [["a", "b"], ["c", "d"]], step=4)
    model = nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[1.0, math.inf]]), torch.zeros(1)
    require_finite_gradient(1.0, model, [["a"]], step=0)
    with pytest.raises(NonFiniteError, match=r"gradient is inf in weight.*Records: a, b\."):
        require_finite_gradient(math.inf, model, [["a"], ["b"]], step=0)


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_all_random_state_is_saved_and_restored(tmp_path: object) -> None:
    random.gauss(0, 1)
    np.random.standard_normal()  # noqa: NPY002
    saved = random_state()
    first = (*draws(), random.gauss(0, 1), np.random.standard_normal())  # noqa: NPY002
    set_random_state(saved)
    assert (*draws(), random.gauss(0, 1), np.random.standard_normal()) == first  # noqa: NPY002


def test_seeded_is_repeatable_and_leaves_the_caller_alone() -> None:
    before = random_state()
    with seeded(5):
        first = draws()
    with seeded(5):
        assert draws() == first
    with seeded(6):
        assert draws() != first
    untouched = draws()
    set_random_state(before)
    assert draws() == untouched


def test_patience_and_best() -> None:
    best = BestSoFar(tolerance=0.1, patience=2)
    assert best.update(1, 1.0)
    assert best.update(2, 0.95)  # the lowest, yet no improvement by the tolerance
    assert not best.exhausted
    again = BestSoFar(tolerance=0.1, patience=2)
    again.load_state_dict(best.state_dict())
    for each in (best, again):
        assert not each.update(3, 0.97)
        assert each.exhausted
        assert (each.step, each.value) == (2, 0.95)
    recovered = BestSoFar(tolerance=0.1, patience=2)
    for step, value in enumerate((1.0, 1.0, 0.8, 0.85)):
        recovered.update(step, value)
    assert not recovered.exhausted
    with pytest.raises(ValueError, match="step 7: the held-out value is not a number"):
        best.update(7, math.nan)


def test_slow_improvement_adds_up_against_the_tolerance() -> None:
    best = BestSoFar(tolerance=0.1, patience=3)
    for step in range(12):
        best.update(step, 1.0 - 0.04 * step)  # each alone is below the tolerance, three together are not
    assert not best.exhausted


def test_stop_request_takes_one_signal_and_gives_handlers_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_in_a_job_within_a_job_asks_both_and_a_second_one_is_not_swallowed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as outer:
        with StopRequest() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert (outer.requested, inner.requested) == ("SIGTERM", "SIGTERM")
            assert signal.getsignal(signal.SIGTERM) == before
        assert signal.getsignal(signal.SIGTERM) == before
    with StopRequest() as outer:
        with StopRequest():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert outer.requested == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


def test_precision() -> None:
    device = torch.device("cpu")
    layer = nn.Linear(4, 4)
    with autocast(device, "bf16"):
        assert layer(torch.ones(1, 4)).dtype == torch.bfloat16
    with autocast(device, "float32"):
        assert layer(torch.ones(1, 4)).dtype == torch.float32
    with pytest.raises(ValueError, match="'fp8' is unknown"):
        autocast(device, "fp8")
    if not torch.cuda.is_available():
        assert pick_device("auto") == device
        with pytest.raises(ValueError, match="no CUDA device is visible"):
            pick_device("cuda")


def test_progress_prints_plain_lines_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport(4, every=2, label="job", quiet=False) as progress:
        for step in range(1, 5):
            clock = progress.update(step, tokens=100, metrics={"loss": 0.5})
        progress.note("a note")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("job: step 2/4, loss 0.5, ")
    assert "tokens/s" in lines[0]
    assert "left" in lines[0]
    assert lines[2] == "job: a note"
    assert clock["time/tokens_per_second"] > 0
    assert clock["time/seconds_left"] == 0
    assert [duration_text(s) for s in (42.2, 200, 7500)] == ["42 s", "3 min 20 s", "2 h 05 min"]
