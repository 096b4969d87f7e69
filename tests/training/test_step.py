"""The step around the network: fused updates, a guard without a wait, records in parts, batches made ahead."""

import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plaudit.configs.reward import RewardTrainingConfig
from plaudit.configs.training import OptimizerConfig
from plaudit.data.records import Best, Comparison, Ranking
from plaudit.training import reward
from plaudit.training.guards import NonFiniteError
from plaudit.training.optimizers import make_optimizer
from plaudit.training.reward import main, prepare
from plaudit.training.reward_batches import MicroBatch
from plaudit.training.run import Run

from .conftest import tiny_model

TEXTS = ("so good", "very bad", "the cat sat on the mat", "yes")


def rankings(count: int) -> list[Comparison]:
    orders = (((2,), (0, 3), (1,)), ((1,), (0,)), ((3,), (2,), (1,), (0,)))
    words = ("why", "is it", "the dog ran", "a cat")
    return [
        Comparison(
            prompt=" ".join(words[: 1 + n % 4]), completions=TEXTS, judgement=Ranking(orders[n % 3]), id=f"number {n}"
        )
        for n in range(count)
    ]


def config_for(tokenizer: str, folder: Path, **options: Any) -> RewardTrainingConfig:
    settings: dict[str, Any] = {
        "model": tiny_model(tokenizer),
        "output": folder / "run",
        "records_per_step": 4,
        "epochs": 2,
        "quiet": True,
        "device": "cpu",
        "optimizer": OptimizerConfig(learning_rate=1e-2),
    }
    return RewardTrainingConfig(**(settings | options))


def metrics(config: RewardTrainingConfig) -> list[dict[str, float]]:
    lines = (config.output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time")} for line in lines]


def weights(result: Any) -> dict[str, Tensor]:
    return dict(result.model.state_dict())


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_the_equation(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from plaudit.training import optimizers

    monkeypatch.setattr(optimizers, "FUSED_DEVICES", ("cpu",) if fused else ())
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.double))
    groups = [{"params": [weight], "lr": 0.1, "weight_decay": 0.5}]
    optimizer = make_optimizer(groups, name="adamw", betas=(0.9, 0.99), epsilon=1e-6)
    assert optimizer.param_groups[0]["fused"] is fused
    expected, mean, square = weight.detach().clone(), torch.zeros(2), torch.zeros(2)
    for step in range(1, 4):
        gradient = torch.tensor([0.3 * step, -1.0], dtype=torch.double)
        weight.grad = gradient.clone()
        optimizer.step()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient.square()
        expected = expected * (1 - 0.1 * 0.5)
        expected -= 0.1 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.99**step)).sqrt() + 1e-6)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=0)


def test_a_guard_on_the_device_gives_the_same_run(
    tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = config_for(tokenizer_folder, tmp_path / "a", log_every=3)
    expected = main(plain, train=rankings(14))
    monkeypatch.setattr(Run, "defers", property(lambda self: True))
    config = config_for(tokenizer_folder, tmp_path / "b", log_every=3)
    found = main(config, train=rankings(14))
    for name, value in weights(expected).items():
        assert torch.equal(weights(found)[name], value), name
    assert metrics(config) == metrics(plain)
    assert len(metrics(config)) == 8


@pytest.mark.parametrize("poisoned", ["loss", "gradient"])
def test_a_guard_on_the_device_stops_before_the_weights_move(
    tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poisoned: str
) -> None:
    """Step 2 of 8 is not finite; it is noticed where the epoch ends, and the weights are those after step 1."""
    good = config_for(tokenizer_folder, tmp_path / "good", max_steps=2, normalise=False, keep_best=False)
    options: dict[str, Any] = {"schedule": "constant", "warmup": 0.0, "learning_rate": 1e-2}
    good = good.model_copy(update={"optimizer": OptimizerConfig(**options)})
    expected = weights(main(good, train=rankings(14)))
    monkeypatch.setattr(Run, "defers", property(lambda self: True))
    trainers: list[Any] = []
    count = 0
    original = reward.RewardTrainer.backward

    def backward(self: Any, micro: MicroBatch, weight_sum: float) -> Any:
        nonlocal count
        trainers.append(self)
        loss, sums = original(self, micro, weight_sum)
        count += 1
        if count == 3 and poisoned == "loss":
            return loss * math.nan, sums
        if count == 3:
            self.model.head.weight.grad.fill_(math.inf)
        return loss, sums

    monkeypatch.setattr(reward.RewardTrainer, "backward", backward)
    config = good.model_copy(update={"output": tmp_path / "bad", "max_steps": 8, "log_every": 5})
    message = "the loss is nan" if poisoned == "loss" else "the norm of the gradient is"
    with pytest.raises(NonFiniteError, match=rf"step 2: {message}.*Records: number"):
        main(config, train=rankings(14))
    assert count == 4
    now = trainers[0].model.state_dict()
    for name, value in expected.items():
        assert torch.equal(now[name], value), name
    assert [line["loss"] for line in metrics(config)] == [line["loss"] for line in metrics(good)]


@pytest.mark.parametrize("loss", ["pairwise", "plackett_luce", "davidson", "best_of_k"])
@pytest.mark.parametrize("packed", ["packed", "padded"])
def test_records_above_the_budget_give_the_loss_and_gradient_of_the_whole(
    tokenizer_folder: str, tmp_path: Path, loss: str, packed: str
) -> None:
    model = tiny_model(tokenizer_folder).model_copy(update={"attn_implementation": packed})
    records = [
        Comparison(prompt="why is it", completions=(*TEXTS, "a dog", "so bad on it"), judgement=judgement)
        for judgement in (
            Best(2) if loss == "best_of_k" else Ranking(((4,), (0, 3), (1,), (5,), (2,))),
            Best(5) if loss == "best_of_k" else Ranking(((1,), (2,), (0, 4))),
        )
    ]

    def gradient(budget: int, checkpointing: bool) -> tuple[float, dict[str, Tensor], int]:
        config = config_for(
            tokenizer_folder, tmp_path, model=model, loss=loss, tokens_per_micro_batch=budget,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        trainer, _, _ = prepare(config, records)
        schedule = trainer.train.tokenised.schedule(config)
        total, passes = 0.0, 0
        for _, micro in trainer.train.stream(schedule, 0, 1, trainer.device):
            total += trainer.backward(micro, 2.0)[0].item()
            passes = max(passes, len(micro.passes))
            assert all(batch.layout.num_tokens <= max(budget, 11) for batch in micro.passes)
        return total, {n: p.grad for n, p in trainer.trained.named_parameters() if p.grad is not None}, passes

    expected, gradients, passes = gradient(10_000, checkpointing=False)
    assert passes == 1
    for budget, checkpointing in ((14, False), (14, True), (1, False)):
        found, others, passes = gradient(budget, checkpointing)
        assert passes > 1
        assert found == pytest.approx(expected, rel=1e-6)
        assert others.keys() == gradients.keys()
        # Float32 sums in another order; a part left out or counted twice would be off by far more.
        # The bias has no gradient but rounding: no comparison says anything about it.
        for name, value in gradients.items():
            assert (others[name] - value).norm() <= 1e-5 * value.norm() + 1e-6 * (name == "model.head.bias"), name


def test_idle_passes_add_nothing(tokenizer_folder: str, tmp_path: Path) -> None:
    config = config_for(tokenizer_folder, tmp_path)
    trainer, _, _ = prepare(config, rankings(3))
    trainer.backward(trainer.train.micro_batch([0, 1]), 2.0)
    expected = {name: p.grad.clone() for name, p in trainer.trained.named_parameters() if p.grad is not None}
    trainer.optimizer.zero_grad()
    calls: list[bool] = []
    trainer.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    loss, sums = trainer.backward(trainer.train.micro_batch([0, 1], 3), 2.0)
    # Two passes that only keep others company, the one that counts, and the two again with a graph.
    assert calls == [False, False, True, True, True]
    assert sums["completions"].item() == 8
    idle, nothing = trainer.backward(trainer.train.micro_batch([], 2), 2.0)
    assert calls[5:] == [False, True, True]
    assert idle.item() == 0.0
    assert {name: value.item() for name, value in nothing.items()} == dict.fromkeys(sums, 0.0)
    assert loss.item() > 0
    for name, value in trainer.trained.named_parameters():
        if value.grad is not None:
            assert torch.equal(value.grad, expected[name]), name


def test_nothing_of_the_size_of_the_vocabulary_is_computed(tokenizer_folder: str, tmp_path: Path) -> None:
    trainer, _, _ = prepare(config_for(tokenizer_folder, tmp_path), rankings(3))
    widths: set[int] = set()

    class Widths(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            found = func(*args, **(kwargs or {}))
            widths.update(each.shape[-1] for each in tree_leaves(found) if isinstance(each, Tensor) and each.ndim)
            return found

    vocabulary, hidden = trainer.model.backbone.get_input_embeddings().weight.shape
    with Widths():
        trainer.backward(trainer.train.micro_batch([0, 1, 2]), 3.0)
    assert hidden in widths
    assert vocabulary not in widths


def test_batches_made_ahead_change_nothing_and_leave_no_thread(tokenizer_folder: str, tmp_path: Path) -> None:
    results = [
        main(config_for(tokenizer_folder, tmp_path / str(depth), prefetch=depth), train=rankings(14))
        for depth in (0, 3)
    ]
    for name, value in weights(results[0]).items():
        assert torch.equal(weights(results[1])[name], value), name
    assert not [each for each in threading.enumerate() if each.name == "plaudit-prefetch"]


def test_processes_share_every_step(tokenizer_folder: str, tmp_path: Path) -> None:
    """The gradients that several processes would compute add up to that of one, whatever the budget cuts."""
    records: Sequence[Comparison] = rankings(7)
    config = config_for(tokenizer_folder, tmp_path, records_per_step=7, tokens_per_micro_batch=24)
    trainer, _, _ = prepare(config, records)

    def gradient(world: int) -> tuple[dict[str, Tensor], list[tuple[int, ...]]]:
        trainer.optimizer.zero_grad()
        calls = []
        for rank in range(world):
            schedule = trainer.train.tokenised.schedule(config, rank=rank, world_size=world)
            made = list(trainer.train.stream(schedule, 0, 1, trainer.device))
            calls.append(tuple(len(micro.passes) for _, micro in made))
            for _, micro in made:
                trainer.backward(micro, 7.0)
        return {n: p.grad.clone() for n, p in trainer.trained.named_parameters() if p.grad is not None}, calls

    expected, _ = gradient(1)
    for world in (2, 3, 8):
        found, calls = gradient(world)
        assert len(set(calls)) == 1
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 2e-6 * value.norm() + 1e-7, name
