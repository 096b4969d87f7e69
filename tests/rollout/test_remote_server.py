"""The client against a real server on the CPU: `transformers serve` with a tiny model (`transformers[serving]`)."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from plaudit.configs.generation import SamplingConfig
from plaudit.data.records import Message
from plaudit.rollout.generate import generate
from plaudit.rollout.remote import CompletionClient
from tests.rollout.language_models import tiny_lm

MISSING = [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"transformers serve needs {', '.join(MISSING)}: transformers[serving]"),
]

PROMPTS = ["the cat sat", "why is it so"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served") / "model"
    model = tiny_lm()
    model.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
    log = folder.parent / "log"
    with log.open("wb") as said:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"], stdout=said, stderr=said
        )
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                assert server.poll() is None, log.read_text()[-2000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def test_text(url: str, folder: Path) -> None:
    client = CompletionClient(url=url, model=str(folder), endpoint="text", several=False, workers=1)
    sampling = SamplingConfig(method="greedy", max_new_tokens=6)
    answers = client.generate(PROMPTS, sampling=sampling)
    model = tiny_lm()
    ids = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    ours = generate(model, model.tokenizer, ids, sampling=sampling)
    assert [row[0].text.split() for row in answers] == [text.split() for text in ours.text]
    assert [row[0].finished for row in answers] == ours.finished


def test_chat_with_several_samples(url: str, folder: Path) -> None:
    client = CompletionClient(url=url, model=str(folder), several=False, workers=1)
    sampling = SamplingConfig(max_new_tokens=8)
    answers = client.generate([(Message("user", "why is it so"),)], samples_per_prompt=3, sampling=sampling)
    assert [len(row) for row in answers] == [3]
    again = client.generate([(Message("user", "why is it so"),)], samples_per_prompt=3, sampling=sampling)
    assert again == answers


def test_a_server_that_takes_no_n_says_so(url: str, folder: Path) -> None:
    client = CompletionClient(url=url, model=str(folder), endpoint="text", workers=1)
    with pytest.raises(ValueError, match=r"several=False|refused"):
        client.generate(PROMPTS[:1], samples_per_prompt=2, sampling=SamplingConfig(max_new_tokens=2))
