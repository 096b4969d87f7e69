"""`plaudit evaluate policy` as a user types it: folders of models, files of completions, dry run, faults."""

import json
from pathlib import Path

import pytest
import yaml

from plaudit.cli.app import main
from tests.evaluation.test_policy_answers import other_lm, write
from tests.rollout.language_models import tiny_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A starting model, a policy, prompts and completions made elsewhere."""
    folder = tmp_path_factory.mktemp("policies")
    tiny_lm().save_pretrained(folder / "start" / "model")
    other_lm().save_pretrained(folder / "ppo" / "model")
    prompts = [{"prompt": text, "answer": "alpha"} for text in ("alpha", "beta", "gamma", "delta")]
    write(folder / "prompts.jsonl", *prompts)
    write(folder / "elsewhere.jsonl", *({**row, "completions": ["alpha", "no"]} for row in prompts))
    return folder


def words(folder: Path, *more: str) -> list[str]:
    return [
        "evaluate", "policy", f"{folder}/ppo/model", f"{folder}/elsewhere.jsonl",
        "--reference", f"{folder}/start/model",
        "--data", f"{folder}/prompts.jsonl", "--rewards", "brief=length_penalty=0.1", "--rewards", "gold=exact_match",
        "--samples", "2", "--best-of", "2", "--resamples", "40", "--sampling.max-new-tokens", "4", "--device", "cpu",
        "--output", f"{folder}/out", *more,
    ]  # fmt: skip


def test_the_verb(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(words(folder))
    out, err = capsys.readouterr()
    assert "elsewhere wins" in out
    assert "against the starting model by gold" in out
    assert "ppo: 4 of 4 prompts answered" in err
    saved = json.loads((folder / "out" / "report.json").read_text("utf-8"))
    assert list(saved["models"]) == ["start", "ppo", "elsewhere"]
    assert saved["models"]["elsewhere"]["metrics"]["reward/gold"]["value"] == 0.5
    assert saved["models"]["ppo"]["metrics"]["kl"]["value"] is not None
    assert (saved["proxy"], saved["gold"]) == ("brief", "gold")
    assert (folder / "out" / "report.html").exists()
    assert sorted(path.name for path in (folder / "out" / "answers").iterdir()) == [
        "elsewhere.jsonl", "ppo.jsonl", "start.jsonl",
    ]  # fmt: skip


def test_what_a_dry_run_and_the_configuration_say(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(words(folder, "--dry-run", "--output", str(folder / "dry")))
    out = capsys.readouterr().out
    assert "would answer 4 prompts" in out
    assert not (folder / "dry").exists()
    main(words(folder, "--print-config"))
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["rewards"] == ["brief=length_penalty=0.1", "gold=exact_match"]
    assert printed["sampling"]["max_new_tokens"] == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--reference", "None"), "give --reference"),
        (("--rewards", "mtld"), "has no name; write name=REWARD"),
        (("--gold", "silver"), "no reward is called 'silver'"),
        (("--sampling.temperature", "0"), "temperature"),
        (("--samplez", "2"), "did you mean --samples?"),
    ],
)
def test_faults_are_one_line(
    change: tuple[str, ...], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words(folder, *change))
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_folder_that_is_not_there_is_found_before_anything_is_answered(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words(folder, f"{folder}/nowhere/model", "--output", str(folder / "none")))
    out, err = capsys.readouterr()
    assert "no such folder" in err
    assert "answered" not in out + err
    assert not (folder / "none").exists()
