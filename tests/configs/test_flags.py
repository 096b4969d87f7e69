"""Flags become a layer of settings."""

from pathlib import Path
from typing import Any, Literal

import pytest

from plaudit.configs.base import Config, ConfigError, load_config
from plaudit.configs.flags import parse_flags


class Adapter(Config):
    rank: int = 8
    """Rank."""


class Model(Config):
    backbone: str | None = None
    """Backbone."""
    adapter: Adapter | None = None
    """Adapter."""
    options: dict[str, Any] | None = None
    """Free options."""
    attention: Literal["auto", "none"] | None = "auto"
    """A literal that looks like None."""


class Job(Config):
    model: Model = Model()
    """Model."""
    data: tuple[str, ...] = ()
    """Files."""
    names: str | list[str] = "all"
    """One or several."""
    layers: tuple[int, ...] | Literal["all"] | None = None
    """A list, or a word that stands for one."""
    output: Path | None = None
    """Folder."""
    max_steps: int | None = None
    """Steps."""
    seed: int = 0
    """Seed."""
    shuffle: bool = True
    """Shuffle."""
    bits: Literal[4, 8] = 8
    """Bits."""


def job(*words: str, positional: str | None = None) -> Job:
    files, layer = parse_flags(Job, words, positional=positional)
    return load_config(Job, files, layer)


def fault(*words: str, positional: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        job(*words, positional=positional)
    return str(caught.value)


def test_values_with_a_space_or_an_equals_sign() -> None:
    assert job("--max-steps", "5").max_steps == 5
    assert job("--max_steps=5").max_steps == 5
    assert job("--seed", "-3").seed == -3
    assert job("--model.backbone", "123").model.backbone == "123"
    assert job("--model.backbone=a=b").model.backbone == "a=b"
    assert job("--model.backbone=--x").model.backbone == "--x"
    assert job("--bits", "4").bits == 4


def test_none_can_be_set() -> None:
    for word in ("None", "none", "null"):
        assert job("--max-steps", "5", "--max-steps", word).max_steps is None
        assert job("--model.adapter.rank", "2", "--model.adapter", word).model.adapter is None
    assert job("--output", "none").output is None
    assert job("--model.attention", "none").model.attention == "none"
    assert job("--model.attention", "null").model.attention is None


def test_switches() -> None:
    assert job("--no-shuffle").shuffle is False
    assert job("--shuffle").shuffle is True
    assert job("--shuffle", "false").shuffle is False
    assert job("--shuffle=false").shuffle is False
    assert job("--shuffle", "a.jsonl", positional="data") == Job(shuffle=True, data=("a.jsonl",))
    assert "no-seed" in fault("--no-seed")
    assert "valid boolean" in fault("--shuffle=perhaps")


def test_lists() -> None:
    assert job("--data", "a", "--data=b").data == ("a", "b")
    assert job("--data", "[a, 'b c']").data == ("a", "b c")
    assert job("a", "b", positional="data").data == ("a", "b")
    assert job("--names", "x").names == "x"
    assert job("--names", "x", "--names", "y", "--names", "z").names == ["x", "y", "z"]
    assert job("--layers", "all").layers == "all"
    assert job("--layers", "4", "--layers", "5").layers == job("--layers", "[4, 5]").layers == (4, 5)


def test_groups_and_free_mappings() -> None:
    assert job("--model.adapter").model.adapter == Adapter()
    assert job("--model.adapter", "--seed", "1").model.adapter == Adapter()
    assert job("--model.adapter", "{rank: 3}").model.adapter == Adapter(rank=3)
    options = job("--model.options.hidden_size", "64", "--model.options.act", "gelu").model.options
    assert options == {"hidden_size": 64, "act": "gelu"}


def test_files_and_words(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("seed: 4\nmax_steps: 9\n")
    assert job(str(path), "--seed", "5") == Job(seed=5, max_steps=9)
    assert job("--seed", "5", str(path), "x.jsonl", positional="data").data == ("x.jsonl",)
    assert job("--", "--odd-name", positional="data").data == ("--odd-name",)
    assert "unexpected word" in fault("x.jsonl")
    assert "only one output" in fault("a", "b", positional="output")


def test_unknown_flags_are_named_with_the_nearest() -> None:
    assert fault("--sed", "1") == "--sed: unknown option; did you mean --seed?"
    assert (
        fault("--model.adapter.rnk", "1") == "--model.adapter.rnk: unknown option; did you mean --model.adapter.rank?"
    )
    assert fault("--rank", "1") == "--rank: unknown option; did you mean --model.adapter.rank?"
    assert fault("--qqqqqqq", "1") == "--qqqqqqq: unknown option; --help lists every option"
    assert "two hyphens" in fault("-s", "1")


def test_missing_and_broken_values() -> None:
    assert "needs a value" in fault("--seed")
    assert "needs a value" in fault("--seed", "--max-steps", "3")
    assert "not YAML" in fault("--data", "[a")
    line = fault("--seed", "many")
    assert line.startswith("--seed: ")
    assert line.endswith("not 'many'")
    assert "\n" not in line


class Source(Config):
    path: str
    """Where."""


class Sources(Config):
    data: tuple[str | Source, ...] = ()
    """Files, or files with options."""
    sizes: tuple[int, ...] = ()
    """Numbers."""


def test_one_text_or_mapping_stands_for_a_list_of_one(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: a.csv\n")
    assert load_config(Sources, [file]).data == ("a.csv",)
    file.write_text("data: {path: a.csv}\n")
    assert load_config(Sources, [file]).data == (Source(path="a.csv"),)
    _, layer = parse_flags(Sources, ["--data", "{path: a.csv}", "--data", "b.csv", "--data={path: c.csv}"])
    assert load_config(Sources, overrides=layer).data == (Source(path="a.csv"), "b.csv", Source(path="c.csv"))
    file.write_text("sizes: many\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:1: sizes: expected a list, not 'many'"):
        load_config(Sources, [file])


def test_a_missing_part_is_asked_for_by_its_first_key() -> None:
    class Needs(Config):
        model: Model
        """Model."""

    with pytest.raises(ConfigError, match=r"pass --model\.backbone VALUE"):
        load_config(Needs)
