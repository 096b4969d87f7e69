"""The client against a server that speaks the protocol; the in-process engine against its own model."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from plaudit.cli.app import main
from plaudit.configs.generation import SamplingConfig
from plaudit.data.records import Message
from plaudit.evaluation.policy_answers import read_answers
from plaudit.rollout.engine import InProcessEngine
from plaudit.rollout.remote import CompletionClient, RemoteAnswer
from tests.rollout.language_models import random_prompts, tiny_lm


class Server(ThreadingHTTPServer):
    """Answers with what it was asked, and keeps the requests; the first `busy` ones are turned away.

    The first `cut` answers break off `missing` bytes before their end; without any missing they are no JSON.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.busy = self.cut = self.missing = 0
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        status = server.status
        if server.busy > 0:
            server.busy -= 1
            status = 503
        chat = self.path.endswith("chat/completions")
        asked = body["messages"][-1]["content"] if chat else body.get("prompt")
        choices = []
        for index in reversed(range(body.get("n", 1))):
            text = f"{asked} {index + body.get('seed', 0)}"
            said = None if asked == "say nothing" else text
            answer = {"message": {"role": "assistant", "content": said}} if chat else {"text": text}
            choices.append({"index": index, "finish_reason": "length" if index == 1 else "stop", **answer})
        data = json.dumps({"choices": choices} if status == 200 else {"error": "no"}).encode()
        missing = 0
        if server.cut > 0:
            server.cut, missing, data = server.cut - 1, server.missing, data[:9]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) + missing))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def test_chat(server: Server) -> None:
    client = CompletionClient(url=server.url, model="m", api_key="secret")
    conversation = (Message("system", "be brief"), Message("user", "hello"))
    sampling = SamplingConfig(max_new_tokens=5, temperature=0.5, top_p=0.9, top_k=3, stop_strings=("x",), seed=7)
    found = client.generate([conversation, "why"], samples_per_prompt=2, sampling=sampling)
    assert found == [
        [RemoteAnswer("hello 7", True), RemoteAnswer("hello 8", False)],
        [RemoteAnswer("why 7", True), RemoteAnswer("why 8", False)],
    ]
    request = next(r for r in server.requests if len(r["messages"]) == 2)
    assert request["messages"][0] == {"role": "system", "content": "be brief"}
    wanted = {"model": "m", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop": ["x"], "n": 2}
    assert {key: request[key] for key in wanted} == wanted
    assert request["key"] == "Bearer secret"
    assert "min_p" not in request
    assert client.generate(["say nothing"]) == [[RemoteAnswer("", True)]]


def test_text_and_servers_without_n(server: Server) -> None:
    client = CompletionClient(url=server.url, model="m", endpoint="text", several=False)
    found = client.generate(["a", "b"], samples_per_prompt=3, sampling=SamplingConfig(method="greedy"))
    assert [[answer.text for answer in row] for row in found] == [["a 0", "a 1", "a 2"], ["b 0", "b 1", "b 2"]]
    assert all("n" not in request and request["temperature"] == 0.0 for request in server.requests)
    with pytest.raises(ValueError, match="chat"):
        client.generate([(Message("user", "a"),)])


def test_plaudit_generate_collects_from_a_server_what_evaluate_reads(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    rows = [{"id": 1, "prompt": "why"}, {"prompt": [{"role": "user", "content": "hello"}]}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["generate", "m", "--server", server.url, "--samples", "2", "--seed", "7"]
    main([*words, "--input", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "answers.jsonl")])
    found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    wanted = [{"completions": [f"{asked} 7", f"{asked} 8"], "finished": [True, False]} for asked in ("why", "hello")]
    assert found == [row | answer for row, answer in zip(rows, wanted, strict=True)]
    assert {request["key"] for request in server.requests} == {"Bearer secret"}
    answers = read_answers(tmp_path / "answers.jsonl", ["why"])
    assert answers.completions == [["why 7", "why 8"]]

    main([*words, "--endpoint", "text", "--one-answer-a-request", "--prompt", "so"])
    assert capsys.readouterr().out == "so 7\nso 8\n"
    assert all("n" not in request for request in server.requests[-2:])
    with pytest.raises(SystemExit):
        main([*words, "--prompt", "so", "--logprobs"])
    assert "--logprobs" in capsys.readouterr().err


def test_what_may_pass_is_tried_again_and_what_may_not_is_said(server: Server) -> None:
    client = CompletionClient(url=server.url, model="m", attempts=2)
    server.busy = 1
    assert client.generate(["a"])[0][0].text == "a 0"
    server.busy = 9
    with pytest.raises(ConnectionError, match="after 2 attempts: 503"):
        client.generate(["a"])
    server.busy, server.status = 0, 400
    with pytest.raises(ValueError, match="refused the request: 400"):
        client.generate(["a"])
    with pytest.raises(ValueError, match="beam"):
        client.generate(["a"], sampling=SamplingConfig(method="beam", num_beams=2))


@pytest.mark.parametrize("missing", [30, 0])
def test_an_answer_that_breaks_off_is_asked_for_again(server: Server, missing: int) -> None:
    client = CompletionClient(url=server.url, model="m", attempts=2)
    server.cut, server.missing = 1, missing
    assert client.generate(["a"])[0][0].text == "a 0"
    assert len(server.requests) == 2
    server.cut = 9
    with pytest.raises(ConnectionError, match="after 2 attempts: " + ("IncompleteRead" if missing else "Unterminated")):
        client.generate(["a"])


def test_an_engine_takes_new_weights() -> None:
    policy, engine = tiny_lm(), InProcessEngine(tiny_lm())
    prompts = random_prompts((5,))
    sampling = SamplingConfig(method="greedy", max_new_tokens=8)
    first = engine.generate(prompts, sampling=sampling, end_token_ids=())
    assert first == InProcessEngine(policy).generate(prompts, sampling=sampling, end_token_ids=())
    with torch.no_grad():
        policy.model.lm_head.weight.copy_(policy.model.lm_head.weight.roll(1, 0))  # type: ignore[union-attr, operator, arg-type]
    engine.load_weights(policy.model.named_parameters())
    second = engine.generate(prompts, sampling=sampling, end_token_ids=())
    assert first.token_ids != second.token_ids
    assert second == InProcessEngine(policy).generate(prompts, sampling=sampling, end_token_ids=())
    with pytest.raises(ValueError, match="no weight 'x'"):
        engine.load_weights([("x", torch.zeros(1))])
