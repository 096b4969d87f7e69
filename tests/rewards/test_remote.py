"""Remote rewards against a small server that speaks vLLM's and OpenRLHF's protocols, and misbehaves on demand."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from plaudit.configs.rewards import RewardsConfig
from plaudit.data.records import Message
from plaudit.rewards.base import NonFiniteRewardError, Sample, as_reward
from plaudit.rewards.build import build_reward
from plaudit.rewards.remote import RemoteReward, rendered_by
from tests.models.conftest import word_tokenizer

SAMPLES = [Sample(f"p{n}", "x" * n) for n in range(7)]


class Server(ThreadingHTTPServer):
    """Scores a text by its length; `faults` are taken one per request before anything else happens."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.faults: list[Any] = []
        self.longest = 10_000
        self.value: Any = lambda text: float(len(text))
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.meeting: threading.Barrier | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append(body)
        server.headers.append(dict(self.headers))
        with server.lock:
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        if server.meeting is not None:
            server.meeting.wait()
        with server.lock:
            server.at_once -= 1
        fault = server.faults.pop(0) if server.faults else None
        if fault == "slow":
            time.sleep(0.6)
        elif fault == "broken":
            self.answer(200, b"{not json")
            return
        elif fault == "cut off":
            self.answer(200, b'{"data": []}', missing=40)
            return
        elif fault is not None:
            self.answer(fault, b"no")
            return
        texts = body["input"] if self.path == "/classify" else body.get("query", [])
        if any(len(text) > server.longest for text in texts):
            self.answer(400, b"too long")
        elif self.path == "/classify":
            assert body["use_activation"] is False
            data = [{"index": i, "label": "LABEL_0", "probs": server.value(t)} for i, t in enumerate(texts)]
            for row in data:
                row["probs"] = row["probs"] if isinstance(row["probs"], list) else [row["probs"]]
            answer = {"id": "classify-1", "object": "list", "model": "m", "data": data[::-1], "usage": {}}
            self.answer(200, json.dumps(answer).encode())
        elif self.path == "/get_reward":
            assert len(body["prompts"]) == len(texts)
            self.answer(200, json.dumps({"rewards": [server.value(t) for t in texts]}).encode())
        elif self.path == "/odd/get_reward":
            self.answer(200, b'{"scores": [1]}')
        else:
            self.answer(404, b"where?")

    def answer(self, code: int, body: bytes, missing: int = 0) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) + missing))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.mark.parametrize("path", ["classify", "get_reward"])
def test_both_protocols_in_batches_and_in_order(server: Server, path: str) -> None:
    reward = RemoteReward(f"{server.url}/{path}", batch_size=3, model="m", headers={"Authorization": "Bearer x"})
    score = reward(SAMPLES)
    assert score.total.tolist() == [2.0 + n for n in range(7)]
    assert score.valid.all()
    key = "input" if path == "classify" else "query"
    assert sorted(len(request[key]) for request in server.requests) == [1, 3, 3]
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer x"}


def test_requests_run_beside_each_other_and_no_more_than_allowed(server: Server) -> None:
    # Nobody is answered before three requests are there together.
    server.meeting = threading.Barrier(3, timeout=20)
    assert RemoteReward(f"{server.url}/get_reward", batch_size=1, parallel=3)(SAMPLES[:6]).valid.all()
    assert server.most_at_once == 3


@pytest.mark.parametrize("fault", [503, 429, "broken", "cut off"])
def test_a_passing_fault_is_tried_again(server: Server, fault: Any) -> None:
    server.faults = [fault, fault]
    score = RemoteReward(f"{server.url}/classify", pause=0.01)(SAMPLES)
    assert score.valid.all()
    assert len(server.requests) == 3


def test_a_time_out_is_tried_again(server: Server) -> None:
    server.faults = ["slow"]
    assert RemoteReward(f"{server.url}/classify", pause=0.01, timeout=0.25)(SAMPLES).valid.all()
    assert len(server.requests) == 2


def test_what_keeps_failing_is_invalid_and_says_why(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.faults = [500] * 3
    reward = RemoteReward(f"{server.url}/get_reward", batch_size=4, parallel=1, retries=2, pause=0.01)
    score = reward(SAMPLES)
    assert score.valid.tolist() == [False] * 4 + [True] * 3
    assert score.total.isnan().tolist() == [True] * 4 + [False] * 3
    assert "answered 500" in score.problems[0]
    assert "tried 3 times" in score.problems[3]
    assert "4 of 7 samples have no score" in caplog.text
    assert score.metrics()["reward/invalid"] == pytest.approx(4 / 7)


def test_nobody_there() -> None:
    score = RemoteReward("http://127.0.0.1:9/classify", retries=1, pause=0.01)(SAMPLES[:2])
    assert not score.valid.any()
    assert set(score.problems) == {0, 1}


def test_only_the_text_at_fault_is_invalid(server: Server) -> None:
    server.longest = 7
    score = RemoteReward(f"{server.url}/classify")(SAMPLES)
    assert score.valid.tolist() == [True] * 6 + [False]
    assert "too long" in score.problems[6]


def test_null_is_invalid_and_nan_stops(server: Server) -> None:
    server.value = lambda text: None if text == "p1x" else 1.0
    assert RemoteReward(f"{server.url}/get_reward")(SAMPLES).valid.tolist() == [True, False] + [True] * 5
    server.value = lambda text: float("nan") if text == "p2xx" else 1.0
    with pytest.raises(NonFiniteRewardError, match="'xx'"):
        RemoteReward(f"{server.url}/get_reward")(SAMPLES)


def test_several_numbers_must_be_chosen_from(server: Server) -> None:
    server.value = lambda text: [float(len(text)), 10.0]
    with pytest.raises(ValueError, match="2 numbers per text"):
        RemoteReward(f"{server.url}/classify")(SAMPLES)
    score = RemoteReward(f"{server.url}/classify", outputs={0: 2.0, 1: -1.0})(SAMPLES)
    assert score.total.tolist() == [2.0 * (2 + n) - 10.0 for n in range(7)]


def test_a_wrong_address_or_form_is_no_missing_reward(server: Server) -> None:
    with pytest.raises(ValueError, match="answered 404"):
        RemoteReward(f"{server.url}/nowhere", protocol="classify")(SAMPLES)
    with pytest.raises(ValueError, match="not the form of get_reward"):
        RemoteReward(f"{server.url}/odd/get_reward")(SAMPLES)
    for url in ("ftp://x/classify", "http://127.0.0.1:1/score"):
        with pytest.raises(ValueError, match="address"):
            RemoteReward(url)
    with pytest.raises(ValueError, match="batch_size 0"):
        RemoteReward("http://127.0.0.1:1/classify", batch_size=0)


def test_an_address_is_a_reward(server: Server) -> None:
    assert as_reward(f"{server.url}/get_reward", name="far")(SAMPLES).parts["far"].tolist() == [
        2.0 + n for n in range(7)
    ]


def test_conversations_are_rendered_by_the_reward_models_own_template(server: Server) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    sample = Sample((Message("user", "why"),), "yes")
    with pytest.raises(ValueError, match="rendered_by"):
        RemoteReward(f"{server.url}/classify")([sample])
    text = rendered_by(tokenizer)(sample)
    cut = rendered_by(tokenizer)(Sample(sample.prompt, "yes", finished=False))
    assert text.index("why") < text.index("yes")
    assert text.startswith(cut)
    assert len(text) > len(cut)


def test_a_configuration_names_the_tokenizer_that_renders(server: Server, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    sample = Sample((Message("user", "why"),), "yes")
    options = {"tokenizer": str(tmp_path), "outputs": {"1": 2.0}, "retries": 0, "headers": {"X-Who": "me"}}
    server.value = lambda text: [0.0, 3.0]
    reward = build_reward(
        RewardsConfig.model_validate({"parts": {"far": {"reward": f"{server.url}/classify", "options": options}}})
    )
    assert reward([sample]).parts["far"].tolist() == [6.0]
    assert server.requests[0]["input"] == [rendered_by(tokenizer)(sample)]
    assert server.headers[0]["X-Who"] == "me"
