"""The command line as a user meets it: help without torch, one clear line for every fault."""

import os
import subprocess
import sys

import pytest

import plaudit
from plaudit.cli.app import CONFIGURED_VERBS, VERBS, main, registered_verbs
from plaudit.cli.verb import import_string

HEAVY = ("torch", "transformers", "datasets", "scipy", "sklearn", "matplotlib")
EXISTING = registered_verbs()


def run_python(code: str) -> tuple[str, float]:
    """Standard output of a fresh interpreter, and the processor seconds it took (not wall time: others may run)."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, output
    return output, usage.ru_utime + usage.ru_stime


def run_main(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("words", [["--help"], *([*verb.split(), "--help"] for verb in EXISTING)], ids=" ".join)
def test_help_is_quick_and_imports_nothing_heavy(words: list[str]) -> None:
    output, seconds = run_python(
        "import sys\nfrom plaudit.cli.app import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert "HEAVY []" in output
    assert "Usage: plaudit" in output
    assert seconds < 2


def test_help_lists_every_verb_that_exists(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_main(capsys, "--help")
    assert code == 0
    for verb in EXISTING:
        assert verb.split()[0] in out


@pytest.mark.parametrize("verb", EXISTING)
def test_every_verb_resolves_and_says_what_it_does(verb: str) -> None:
    path, about = VERBS[verb]
    function = import_string(path)
    assert function.__doc__
    assert about.endswith(".")
    takes_words = bool(function.__code__.co_flags & 0x04)
    assert takes_words == (verb in CONFIGURED_VERBS), "a verb with *words is one of CONFIGURED_VERBS, and no other"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(capsys, "--version") == (0, f"{plaudit.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rewrd",), "rewrd"),
        (("doctor", "--jsn"), "--json"),
        (("reward", "--optimizer.learning-rat", "1"), "did you mean --optimizer.learning-rate?"),
        (("reward", "missing.yaml"), "missing.yaml: no such configuration file"),
        (("reward", "--epochs", "x", "--model.backbone", "b"), "--epochs: "),
        (("reward", "--seed"), "--seed: needs a value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_faults_are_one_line_and_exit_code_2(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_main(capsys, *words)
    assert code == 2
    assert out == ""
    assert said in err
    assert err.startswith("plaudit: ")
    assert err.count("\n") == 1


def test_a_traceback_on_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" in run_main(capsys, "reward", "missing.yaml", "--traceback")[2]
    monkeypatch.setenv("PLAUDIT_TRACEBACK", "1")
    assert "Traceback" in run_main(capsys, "reward", "missing.yaml")[2]
    monkeypatch.setenv("PLAUDIT_TRACEBACK", "0")
    assert "Traceback" not in run_main(capsys, "reward", "missing.yaml")[2]


def test_a_reader_that_leaves_is_no_fault() -> None:
    command = f'{sys.executable} -c \'from plaudit.cli.app import main; main(["reward", "--help"])\' | head -1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
