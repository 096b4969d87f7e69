"""The comparison is worth nothing unless everyone computes the same: the gate that sees to it, at a tiny size."""

import gzip
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import against_trl
import pytest
import torch
from against_trl import check_agreement, fitting, measure, rows, tokens_of
from peer_model import load, shared_names
from torch.optim.optimizer import register_optimizer_step_pre_hook
from work_loop import batch_loss, batches
from work_plaudit import open_run
from work_plaudit import shared_names as our_names
from workloads import WORKLOADS, Workload, choose_steps, prepare

from plaudit.data.io import read_comparisons
from plaudit.data.records import preference_pairs
from plaudit.training.reward import run_steps
from plaudit.training.trackers import read_metrics

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
WORKLOAD = replace(WORKLOADS["fgrlhf_qa-k4"], name="tiny", prompts=3, pairs=16, peer_pairs=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty prompts with four completions of very different lengths, with ties."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("data")
    words = [f"word{i}" for i in range(40)]
    records = [
        {
            "prompt": " ".join(rng.choices(words, k=rng.randint(2, 20))),
            "completions": [" ".join(rng.choices(words, k=rng.randint(1, 25))) for _ in range(4)],
            "scores": [rng.randint(0, 4) for _ in range(4)],
        }
        for _ in range(30)
    ]
    path = folder / "fgrlhf_qa" / "train.jsonl.gz"
    path.parent.mkdir()
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return folder


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(WORKLOAD, 2, data, sizes=TINY, cache=tmp_path_factory.mktemp("cache"))


def test_every_step_has_the_same_pairs_and_no_prompt_comes_twice(data: Path) -> None:
    records = read_comparisons(data / "fgrlhf_qa" / "train.jsonl.gz").records
    steps = choose_steps(records, WORKLOAD, 3)
    assert [sum(len(preference_pairs(r)) for r in step) for step in steps] == [16, 16, 16]
    assert [sum(r.weight for r in step) for step in steps] == [16.0, 16.0, 16.0]
    prompts = [r.prompt for step in steps for r in step]
    assert len(prompts) == len(set(prompts)) == 9
    with pytest.raises(ValueError, match="steps of 16 pairs found, 11 wanted"):
        choose_steps(records, WORKLOAD, 11)


def gradients_of_the_loop(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    settings = json.loads((folder / "steps.json").read_text())
    model = load(folder).train()
    parts = batches(settings["steps"][0], places=100)
    assert len(parts) > 1
    losses = [batch_loss(model, groups, settings["pad_id"], WORKLOAD.pairs) for groups in parts]
    torch.stack(losses).sum().backward()
    return sum(loss.item() for loss in losses), {name: value.grad for name, value in shared_names(model).items()}


def gradients_of_plaudit(folder: Path) -> tuple[float, dict[str, torch.Tensor | None]]:
    trainer, session = open_run(folder)
    kept: dict[str, torch.Tensor | None] = {}

    def keep(*_: object) -> None:
        if not kept:
            kept.update({n: None if v.grad is None else v.grad.clone() for n, v in our_names(trainer.model).items()})

    handle = register_optimizer_step_pre_hook(keep)
    try:
        run_steps(trainer, session)
    finally:
        handle.remove()
    return read_metrics(trainer.config.output / "metrics.jsonl")[0]["loss"], kept


def test_the_gate_passes_what_agrees_and_stops_what_does_not(folder: Path) -> None:
    loop_loss, loop = gradients_of_the_loop(folder)
    loss, ours = gradients_of_plaudit(folder)
    assert loss > 0.1
    torch.save(ours, folder / "plaudit-gradient.pt")
    torch.save(loop, folder / "loop-gradient.pt")
    found = check_agreement(folder, {"plaudit": [loss, 1.0], "loop": [loop_loss, 1.0]})
    assert found["loop"]["loss"] < 1e-5
    assert found["loop"]["gradient"] < 1e-4
    with pytest.raises(RuntimeError, match="do not compute the same"):
        check_agreement(folder, {"plaudit": [loss, 1.0], "loop": [loop_loss * 1.001, 1.0]})
    name = "layers.0.self_attn.q_proj.weight"
    torch.save(loop | {name: 1.01 * loop[name]}, folder / "loop-gradient.pt")
    with pytest.raises(RuntimeError, match="do not compute the same"):
        check_agreement(folder, {"plaudit": [loss, 1.0], "loop": [loop_loss, 1.0]})
    del loop[name]
    torch.save(loop, folder / "loop-gradient.pt")
    with pytest.raises(RuntimeError, match="has no parameters"):
        check_agreement(folder, {"plaudit": [loss, 1.0], "loop": [loop_loss, 1.0]})


def test_other_ids_than_the_peers_get_are_noticed(folder: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for entry in folder.iterdir():
        (changed / entry.name).symlink_to(entry)
    settings = json.loads((folder / "steps.json").read_text())
    settings["steps"][1][0]["rows"][0][0] += 1
    (changed / "steps.json").unlink()
    (changed / "steps.json").write_text(json.dumps(settings))
    with pytest.raises(RuntimeError, match="step 1 does not hold the ids"):
        open_run(changed)


def test_tokens_are_counted_as_each_way_needs_them(tmp_path: Path) -> None:
    # Prompt of 2 tokens; completions of 1, 2 and 4: 9 unique tokens, rows of 3, 4 and 6.
    group = {"rows": [[1] * 3, [1] * 4, [1] * 6], "unique": 9, "pairs": [[0, 1], [0, 2]]}
    step = [group, {"rows": [[1] * 5, [1] * 5], "unique": 7, "pairs": [[1, 0]]}]
    settings = {"workload": {"peer_pairs": 3}, "steps": [step, step]}
    (tmp_path / "steps.json").write_text(json.dumps(settings))
    assert tokens_of(tmp_path) == {"trl": [2 * 3 * 6], "loop": [5 * 6], "plaudit": [16]}


def test_a_share_is_the_time_ratio_over_the_token_ratio() -> None:
    result = {
        "workload": "hh-8",
        "prompts": 8,
        "pairs": 16,
        "clock": "seconds",
        "seconds": {"trl": [4.0, 8.0, 4.0], "loop": [2.0, 2.0, 2.0], "plaudit": [1.0, 2.0, 2.0]},
        "tokens": {"trl": [50, 50, 50], "loop": [20, 20, 20], "plaudit": [10, 10, 10]},
    }
    (row,) = rows([result])
    assert row["time, TRL / Plaudit"] == 4.0
    assert row["share of tokens that becomes time"] == "80%"
    assert row["Plaudit pairs/s"] == 8.0
    assert row["goal"] == 3.3


def test_what_the_memory_does_not_suffice_for_is_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert fitting(64.0) == list(WORKLOADS)
    assert set(WORKLOADS) - set(fitting(4.0)) == {"hh-64"}
    assert "hh-64 is left out: it needs 30 GiB of free memory, and 4.0 are free" in capsys.readouterr().out


@pytest.mark.slow
def test_all_three_take_turns_and_agree(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(workload: Workload, steps: int, data: Path, **options: object) -> Path:
        return prepare(workload, steps, data, sizes=TINY, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(against_trl, "prepare", tiny)
    # The environment of the tests has TRL as well.
    monkeypatch.setattr(against_trl, "trl_python", lambda: Path(sys.executable))
    found = measure(WORKLOAD, 2, data, cache=tmp_path)
    assert {name: len(times) for name, times in found["seconds"].items()} == {"trl": 2, "loop": 2, "plaudit": 2}
    assert found["agreement"]["trl"]["gradient"] < 1e-4
    assert found["agreement"]["trl"]["later_losses"] < 1e-4
    assert all(memory["memory_peak"] > 0 for memory in found["memory"].values())
