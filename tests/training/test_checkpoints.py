from pathlib import Path

import pytest
import torch

from plaudit.training.checkpoints import (
    DamagedCheckpointError,
    list_checkpoints,
    load_checkpoint,
    load_last_good,
    prune_checkpoints,
    save_checkpoint,
)


def state(value: int) -> dict[str, object]:
    return {"tensor": torch.arange(5) + value, "number": 0.1 + value, "text": "ü", "nested": [{"a": (1, None, True)}]}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, state(1))
    loaded = load_checkpoint(path)
    assert loaded.step == 3
    assert torch.equal(loaded.state["tensor"], torch.arange(5) + 1)
    assert loaded.state["number"] == 1.1
    assert loaded.state["nested"] == [{"a": (1, None, True)}]


def test_objects_are_refused_with_their_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"state\['a'\]\[1\] is a Path|state\['a'\]\[1\] is a PosixPath"):
        save_checkpoint(tmp_path, 1, {"a": [1, Path("x")]})
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "no manifest"])
def test_every_damage_is_found_and_the_one_before_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    save_checkpoint(tmp_path, 9, state(9))
    path = save_checkpoint(tmp_path, 10, state(10))
    file = path / "state.pt"
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        (path / "manifest.json").write_text("{")
    else:
        (path / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpointError):
        load_checkpoint(path)
    found = load_last_good(tmp_path)
    assert found is not None
    assert found.step == 9
    assert "DAMAGED CHECKPOINT" in capsys.readouterr().err


def test_without_a_whole_checkpoint_nothing_is_started_in_silence(tmp_path: Path) -> None:
    assert load_last_good(tmp_path) is None
    path = save_checkpoint(tmp_path, 1, state(1))
    (path / "state.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match="no checkpoint is whole"):
        load_last_good(tmp_path)


def test_a_half_written_one_is_no_checkpoint_and_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".partial-abc").mkdir()
    (tmp_path / ".partial-abc" / "state.pt").write_bytes(b"half")
    assert load_last_good(tmp_path) is None
    save_checkpoint(tmp_path, 1, state(1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def test_pruning_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 1000000000):
        save_checkpoint(tmp_path, step, state(step))
    prune_checkpoints(tmp_path, keep_last=2, keep_steps={2})
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 4, 1000000000]


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    import hashlib
    import json
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, ("raise SystemExit('ran')",))

    path = tmp_path / "step-000000001"
    path.mkdir()
    torch.save({"a": Evil()}, path / "state.pt")
    digest = hashlib.sha256((path / "state.pt").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"step": 1, "sha256": {"state.pt": digest}}))
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(path)


def test_a_checkpoint_of_the_same_step_is_replaced_without_a_moment_of_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 3, state(1))
    rename = Path.rename

    def dying(self: Path, target: Path) -> Path:
        if target == tmp_path / "step-000000003":
            raise OSError("killed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dying)
    with pytest.raises(OSError, match="killed"):
        save_checkpoint(tmp_path, 3, state(2))
    kept = tmp_path / ".partial-old-step-000000003"
    assert load_checkpoint(kept).state["number"] == 1.1, "the older one was removed before the new one stood"
    monkeypatch.undo()
    save_checkpoint(tmp_path, 3, state(2))
    assert load_checkpoint(tmp_path / "step-000000003").state["number"] == 2.1
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003"]
