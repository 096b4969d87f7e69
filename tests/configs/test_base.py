"""Merging and validating configurations: layers, places, suggestions."""

from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import Field, model_validator

from plaudit.configs.base import (
    Config,
    ConfigError,
    config_keys,
    dump_config,
    load_config,
    merge_values,
    suggest_key,
)


class Adapter(Config):
    rank: int = Field(8, gt=0)
    """Rank."""
    scale: float = 1.0
    """Scale."""


class Cosine(Config):
    kind: Literal["cosine"] = "cosine"
    """Which schedule."""
    cycles: int = 1
    """Cycles."""


class Linear(Config):
    kind: Literal["linear"] = "linear"
    """Which schedule."""
    floor: float = 0.0
    """Floor."""


class Model(Config):
    backbone: str | None = None
    """Backbone."""
    adapter: Adapter | None = None
    """Adapter."""
    options: dict[str, object] | None = None
    """Free options."""


class Job(Config):
    data: tuple[str, ...]
    """Files."""
    model: Model = Model(backbone="tiny", adapter=Adapter(rank=4))
    """Model."""
    schedule: Cosine | Linear = Field(Cosine(), discriminator="kind")
    """Schedule."""
    batch_size: int = Field(8, gt=0)
    """Prompts."""
    learning_rate: float = 1e-4
    """Rate."""

    @model_validator(mode="after")
    def _check(self) -> "Job":
        if self.batch_size == 13:
            raise ValueError("batch_size: 13 cannot be split; take 12")
        return self


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def fault(paths: list[Path], overrides: dict[str, object] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(Job, paths, overrides)
    return str(caught.value).splitlines()


def test_later_layers_win_and_the_rest_stays(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "data: [a]\nbatch_size: 2\nmodel: {backbone: first, options: {x: 1, y: 2}}\n")
    second = write(tmp_path, "b.yaml", "batch_size: 3\nmodel: {options: {y: 5}}\nlearning_rate: 1e-3\n")
    job = load_config(Job, [first, second], {"model.backbone": "last", "model": {"adapter": {"scale": 2}}})
    assert job.batch_size == 3
    assert job.learning_rate == 1e-3
    assert job.model.backbone == "last"
    assert job.model.options == {"x": 1, "y": 5}
    assert job.model.adapter == Adapter(rank=4, scale=2.0)


def test_a_nested_default_survives_a_partial_layer() -> None:
    job = load_config(Job, overrides={"data": ["a"], "model.adapter.scale": 3})
    assert job.model == Model(backbone="tiny", adapter=Adapter(rank=4, scale=3.0))


def test_an_earlier_fault_may_be_repaired_by_a_later_layer(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "data: [a]\nbatch_size: -1\n")
    assert load_config(Job, [path], {"batch_size": 4}).batch_size == 4


def test_none_unsets_a_group_and_a_group_may_come_back() -> None:
    assert load_config(Job, overrides={"data": ["a"], "model.adapter": None}).model.adapter is None
    layered = merge_values({"model": {"adapter": None}}, {"model": {"adapter": {"rank": 2}}})
    assert layered == {"model": {"adapter": {"rank": 2}}}


def test_another_kind_replaces_the_whole_group(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "data: [a]\nschedule: {kind: cosine, cycles: 3}\n")
    assert load_config(Job, [path], {"schedule": {"kind": "linear"}}).schedule == Linear()
    assert load_config(Job, [path], {"schedule.cycles": 5}).schedule == Cosine(cycles=5)
    assert load_config(Job, overrides={"data": ["a"], "schedule.cycles": 5}).schedule == Cosine(cycles=5)
    (line,) = fault([path], {"schedule.floor": 1.0})
    assert line.endswith("schedule.floor: this key belongs to another kind; set schedule.kind to the kind that has it")


def test_unknown_keys_name_file_line_and_nearest_key(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "data: [a]\nbatchsize: 2\nmodel:\n  adapter:\n    rnk: 3\nbackbone: x\n")
    lines = fault([path])
    assert f"{path}:2: batchsize: unknown key; did you mean 'batch_size'?" in lines
    assert f"{path}:5: model.adapter.rnk: unknown key; did you mean 'model.adapter.rank'?" in lines
    assert f"{path}:6: backbone: unknown key; did you mean 'model.backbone'?" in lines
    assert len(lines) == 3


def test_a_key_like_no_other_lists_the_known_ones() -> None:
    (line,) = fault([], {"data": ["a"], "zzz": 1})
    assert line.startswith("zzz: unknown key; known keys: data, model,")


def test_wrong_values_name_their_place(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "data: [a]\nbatch_size: many\n")
    second = write(tmp_path, "b.yaml", "learning_rate: fast\nschedule:\n  cycles: x\n")
    lines = fault([first, second])
    assert len(lines) == 3
    assert any(line.startswith(f"{first}:2: batch_size: ") and line.endswith("not 'many'") for line in lines)
    assert any(line.startswith(f"{second}:1: learning_rate: ") for line in lines)
    assert any(line.startswith(f"{second}:3: schedule.cycles: ") for line in lines)


def test_the_last_layer_that_set_a_value_is_named(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "data: [a]\nbatch_size: 0\n")
    second = write(tmp_path, "b.yaml", "batch_size: -1\n")
    (line,) = fault([first, second])
    assert line.startswith(f"{second}:1: batch_size: ")


@pytest.mark.parametrize("value", ["nan", "inf", float("nan"), "-inf"])
def test_numbers_are_finite(value: object) -> None:
    (line,) = fault([], {"data": ["a"], "learning_rate": value})
    assert "finite" in line


def test_missing_keys_and_meaningless_combinations() -> None:
    assert fault([]) == ["data: required but not given: write it in a YAML file or pass --data"]
    assert fault([], {"data": ["a"], "batch_size": 13}) == ["batch_size: 13 cannot be split; take 12"]


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    write(tmp_path, "reward.yaml", "")
    missing = tmp_path / "rewrd.yaml"
    assert fault([missing]) == [f"{missing}: no such configuration file; did you mean 'reward.yaml'?"]
    broken = write(tmp_path, "broken.yaml", "data: [a\nbatch_size: 2\n")
    assert fault([broken])[0].startswith(f"{broken}:2: this is not YAML")
    listed = write(tmp_path, "list.yaml", "- a\n")
    assert fault([listed]) == [f"{listed}: a configuration is a mapping of keys to values, not list"]
    twice = write(tmp_path, "twice.yaml", "data: [a]\nbatch_size: 2\nbatch_size: 3\n")
    assert fault([twice]) == [f"{twice}:3: 'batch_size' is given twice (first in line 2)"]
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert len(fault([binary])) == 1


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "empty.yaml", "# nothing\n")
    assert load_config(Job, [path], {"data": ["a"]}) == Job(data=("a",))


def test_what_is_printed_reads_back(tmp_path: Path) -> None:
    job = load_config(Job, overrides={"data": ["ä", "b"], "model.adapter": None, "learning_rate": 3e-7})
    path = write(tmp_path, "printed.yaml", dump_config(job))
    assert load_config(Job, [path]) == job
    assert list(yaml.safe_load(dump_config(job))) == list(Job.model_fields)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Job(data=("a",)).batch_size = 3  # type: ignore[misc]


def test_keys_and_suggestions() -> None:
    keys = config_keys(Job)
    assert {"data", "model.adapter.rank", "schedule.cycles", "schedule.floor"} <= set(keys)
    assert suggest_key(Job, "model.adaptor.rank") == "model.adapter.rank"
    assert suggest_key(Job, "rank") == "model.adapter.rank"
    assert suggest_key(Job, "qqqqqq") is None
