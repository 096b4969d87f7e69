"""What every verb with a configuration shares."""

import gc
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pydantic import Field

from plaudit.cli.verb import import_string, run_verb
from plaudit.configs.base import Config, ConfigError, load_config


class Inner(Config):
    width: int = Field(4, gt=0)
    """How wide it is."""


class Job(Config):
    """A job."""

    inner: Inner = Inner(width=6)
    """The inside."""
    model: str | None = None
    """What to measure."""
    seed: int = 0
    """The seed."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Job, bool]]:
    seen: list[tuple[Job, bool]] = []

    def main(config: Job, *, dry_run: bool = False) -> None:
        seen.append((config, dry_run))

    monkeypatch.setitem(sys.modules, "a_job", SimpleNamespace(main=main))
    return seen


def run(*words: str) -> None:
    run_verb(words, Job, "a_job:main", verb="job", about="Does the job.", positional="model")


def test_the_job_gets_the_configuration(calls: list[tuple[Job, bool]], tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("seed: 3\ninner: {width: 9}\n")
    run(str(path), "--inner.width", "5", "folder")
    assert calls == [(Job(inner=Inner(width=5), model="folder", seed=3), False)]


def test_a_result_may_set_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (0, 143):
        result = SimpleNamespace(exit_code=code)
        monkeypatch.setitem(sys.modules, "a_job", SimpleNamespace(main=lambda config, result=result: result))
        if code:
            with pytest.raises(SystemExit, match="143"):
                run()
        else:
            run()


def test_print_config_prints_yaml_and_runs_nothing(
    calls: list[tuple[Job, bool]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run("--seed", "7", "--print-config")
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == {"inner": {"width": 6}, "model": None, "seed": 7}
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    assert load_config(Job, [path]) == Job(seed=7)
    assert not calls


def test_dry_run_prints_the_configuration_and_passes_through(
    calls: list[tuple[Job, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    run("--dry-run", "--seed", "7")
    assert "seed: 7" in capsys.readouterr().out
    assert calls == [(Job(seed=7), True)]


def test_help_lists_every_key(calls: list[tuple[Job, bool]], capsys: pytest.CaptureFixture[str]) -> None:
    run("--help", "--nonsense")
    out = capsys.readouterr().out
    for text in ("--inner.width", "How wide it is.", "default 6", "--model", "text or none", "--seed", "The seed."):
        assert text in out
    for option in ("--print-config", "--dry-run", "--traceback"):
        assert option in out
    assert not calls


def test_a_fault_runs_nothing(calls: list[tuple[Job, bool]]) -> None:
    with pytest.raises(ConfigError, match=r"inner\.width"):
        run("--inner.width", "0")
    assert not calls


def test_the_collector_rests_while_a_job_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job_that_looks.py").write_text("import gc\nresting = not gc.isenabled()\nkept = [[]]\n")
    (tmp_path / "job_that_fails.py").write_text("raise LookupError('lost')\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert import_string("job_that_looks:resting") is True
        assert gc.isenabled()
        assert gc.get_freeze_count() > 1000  # All that this process had imported.
        gc.unfreeze()
        import_string("job_that_looks:kept")
        assert gc.get_freeze_count() == 0
        with pytest.raises(LookupError, match="lost"):
            import_string("job_that_fails:name")
        assert gc.isenabled()
    finally:
        gc.unfreeze()
