"""What a user reads when something goes wrong: plain words with the place and what to do, never a traceback."""

import errno
import io
import json
from pathlib import Path

import pytest

from plaudit.cli.app import main
from plaudit.cli.faults import describe_fault, extra_with
from tests.rollout.language_models import tiny_lm


def said(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == code
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EACCES, "permission denied"), (errno.ENOSPC, "the disk is full"), (errno.ENOTDIR, "is a file, not a")],
)
def test_what_the_system_says_about_a_file_is_put_in_plain_words(number: int, words: str) -> None:
    (line,) = describe_fault(OSError(number, "text of the system", "runs/.a.csv.123.part")) or [""]
    assert line.startswith("runs/a.csv: ")
    assert words in line
    assert "Errno" not in line


def test_other_faults_keep_their_words_and_bugs_their_traceback() -> None:
    assert describe_fault(ValueError("one\ntwo")) == ["one", "two"]
    assert describe_fault(OSError("no route")) == ["no route"]
    assert describe_fault(RuntimeError("mat1 and mat2")) is None
    assert describe_fault(ImportError("cannot import name")) is None
    assert describe_fault(ModuleNotFoundError("No module named 'torch'", name="torch")) is None


def test_a_missing_extra_is_named_with_the_command_that_installs_it() -> None:
    error = ModuleNotFoundError("No module named 'gymnasium.vector'", name="gymnasium.vector")
    assert describe_fault(error) == ["this needs the package gymnasium: pip install 'plaudit[control]'"]
    wrapped = ImportError("adapters need peft: pip install 'plaudit[lora]'")
    assert describe_fault(wrapped) == [str(wrapped)]
    assert (extra_with("peft"), extra_with("pytest"), extra_with("gym")) == ("lora", None, None)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes"),
    ],
)
def test_too_little_memory_says_what_to_lower(error: Exception) -> None:
    (line,) = describe_fault(error) or [""]
    assert line.startswith("out of memory: lower tokens_per_micro_batch")


def test_a_file_in_the_way_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completions": ["b", "c"], "best": 0}\n', encoding="utf-8")
    text = said(["data", "convert", str(data), str(data / "out.jsonl")], capsys)
    assert text.startswith(f"plaudit: {data}: ")
    assert "name another place" in text


def test_a_word_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(["data", "inspect", "a.csv", "b.csv"], capsys).startswith("plaudit: 'b.csv': one word too many")


def test_an_interruption_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("plaudit.data.inspecting.inspect_data", interrupted)
    assert said(["data", "inspect", "a.csv"], capsys, code=130) == "plaudit: interrupted\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_lm().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "the", "tag": "x\\ud800"}', "half a character"),
        (b'{"prompt": "sp\xe4t"}', "not UTF-8"),
        (b"question,answer", "expected one JSON object with a prompt per line"),
    ],
)
def test_lines_that_generate_cannot_read_are_named(
    model: Path, tmp_path: Path, line: bytes, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"prompt": "the"}\n' + line + b"\n")
    text = said(["generate", str(model), "--input", str(source), "--max-new-tokens", "1"], capsys)
    assert text.startswith(f"plaudit: {source}:2: ")
    assert words in text


def test_generate_replaces_a_file_only_when_told_to(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_text("precious", encoding="utf-8")
    words = ["generate", str(model), "--max-new-tokens", "1", "--output", str(output)]
    assert "--overwrite" in said([*words, "--prompt", "the"], capsys)
    assert output.read_text("utf-8") == "precious"
    assert "is the input as well" in said([*words, "--overwrite", "--input", str(output)], capsys)
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "the"}\n'))
    main([*words, "--overwrite"])
    assert json.loads(output.read_text("utf-8"))["prompt"] == "the"


def test_adapters_alone_are_no_language_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in model.iterdir():
        if file.name.startswith("tokenizer"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    text = said(["generate", str(tmp_path), "--prompt", "the"], capsys)
    assert text.startswith(f"plaudit: {tmp_path}: adapters alone, not a whole model; merge them first")


def test_a_reward_model_is_no_language_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "a reward model (or another classifier), not a language model" in said(
        ["generate", str(tmp_path), "--prompt", "the"], capsys
    )
