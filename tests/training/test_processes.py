"""What needs no second process: what is refused, who gets which batch, whole tensors into shards and skeletons."""

import pytest
import torch
from torch import nn

from plaudit.configs.reward import RewardTrainingConfig
from plaudit.models.reward_model import RewardModel
from plaudit.training.messages import logger
from plaudit.training.parallel import blocks_of, fill_skeleton, skeleton
from plaudit.training.processes import Processes, joined, lost_process, refuse_misuse
from plaudit.training.random_state import random_state, reseed, seeded
from tests.training.conftest import tiny_model


def config_of(tokenizer: str, **options: object) -> RewardTrainingConfig:
    return RewardTrainingConfig(model=tiny_model(tokenizer), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "launched", "world", "dry_run", "message"),
    [
        ({}, True, 2, False, r"torchrun started 2 processes, but parallel is not set.*--parallel auto"),
        ({"parallel": "fsdp"}, False, 1, False, r"parallel: fsdp shares a run.*torchrun --nproc-per-node"),
        ({"parallel": "auto", "records_per_step": 3}, True, 4, False, r"4 processes cannot share records_per_step: 3"),
        ({"parallel": "ddp", "device": "cuda:1"}, True, 2, False, r"device: cuda:1 is one device"),
        ({"parallel": "ddp"}, True, 2, True, r"--dry-run measures a single process"),
    ],
)
def test_wrong_use_is_refused(
    tokenizer_folder: str, options: dict[str, object], launched: bool, world: int, dry_run: bool, message: str
) -> None:
    config = config_of(tokenizer_folder, **options)
    with pytest.raises(ValueError, match=message):
        refuse_misuse(config, launched=launched, world_size=world, dry_run=dry_run)


@pytest.mark.parametrize(
    ("parallel", "launched", "world"), [(None, False, 1), ("auto", False, 1), ("ddp", True, 2), (None, True, 1)]
)
def test_right_use_is_not(tokenizer_folder: str, parallel: str | None, launched: bool, world: int) -> None:
    refuse_misuse(config_of(tokenizer_folder, parallel=parallel), launched=launched, world_size=world, dry_run=False)


def test_alone_everything_is_as_it_was(tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    config = config_of(tokenizer_folder, parallel="auto", device="cpu")
    with joined(config) as processes:
        assert (processes.rank, processes.world_size, processes.strategy) == (0, 1, None)
        assert processes.quieted(config) is config
        assert processes.gather(3) == [3]
        assert processes.from_first(lambda: "made") == "made"
        assert processes.add({"a": 1.5}) == {"a": 1.5}
        batches = [([1, 2], 1), ([3], 4)]
        assert processes.share(batches) == batches
        processes.require_same(anything=object())


def test_torchrun_without_parallel_is_refused_before_anything_else(
    tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="parallel is not set"), joined(config_of(tokenizer_folder)):
        raise AssertionError("never joined")


def test_shares_are_of_equal_number_and_cover_everything() -> None:
    batches = [([0, 1], 1), ([2], 3), ([3], 1), ([4], 2), ([5], 1)]
    shares = [Processes(rank=rank, world_size=3).share(batches) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    assert [[passes for _, passes in share] for share in shares] == [[3, 2]] * 3
    assert sorted(index for share in shares for chosen, _ in share for index in chosen) == [0, 1, 2, 3, 4, 5]
    assert list(shares[2][1][0]) == []


def test_a_lost_partner_is_told_from_other_errors() -> None:
    told = lost_process(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"))
    assert told is not None
    assert "resume" in told
    assert lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert logger.name == "plaudit"


class Tied(nn.Module):
    """Two layers, tied, a frozen one, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.third.requires_grad_(False)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("made", torch.arange(2.0), persistent=False)


def test_a_skeleton_takes_no_memory_and_gets_its_weights_back() -> None:
    model = Tied()
    bones = skeleton(model)
    assert all(each.device.type == "meta" for each in bones.parameters())
    values = {name: value * 2 for name, value in model.state_dict().items()}
    filled = fill_skeleton(bones, values)
    assert isinstance(filled, Tied)
    assert filled.second.weight is filled.first.weight
    assert torch.equal(filled.first.weight, 2 * model.first.weight)
    assert torch.equal(filled.kept, torch.full((2,), 2.0))
    assert torch.equal(filled.made, torch.arange(2.0))
    assert list(filled.state_dict()) == list(model.state_dict())
    assert not filled.third.weight.requires_grad
    assert len(list(filled.parameters())) == len(list(model.parameters()))


def test_the_blocks_are_the_transformer_layers(tokenizer_folder: str) -> None:
    model = RewardModel.from_backbone(tiny_model(tokenizer_folder, num_hidden_layers=3))
    assert [type(block).__name__ for block in blocks_of(model)] == ["LlamaDecoderLayer"] * 3
    assert blocks_of(nn.Linear(2, 2)) == []


def test_processes_draw_different_numbers_and_the_first_what_it_always_drew() -> None:
    with seeded(3):
        before = random_state()
        reseed(3, 0)
        assert torch.equal(random_state()["torch"], before["torch"])
        draws = []
        for rank in (1, 2, 1):
            reseed(3, rank)
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
