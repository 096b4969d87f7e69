"""The scoring stream: one line out for each row in, in order, in constant memory, and on again after a stop."""

import io
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import plaudit.models.scoring as scoring
from plaudit.data.sources import Row, parse_line
from plaudit.evaluation.score_job import load_scoring_model, score_job
from plaudit.evaluation.score_stream import ScoreTally, parse_request, score_stream
from plaudit.models.reward_model import RewardModel
from tests.models.conftest import word_tokenizer
from tests.models.test_saving import build

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "why is it so", "completion": "yes it is"},
    {"id": 7, "prompt": "why is it so", "completions": ["no", "very bad yes"], "best": 0},
    {"prompt": "the cat", "completion": ""},
    {"id": "d", "prompt": [{"role": "user", "content": "the dog"}], "completions": [{"text": "ran"}], "scores": [1]},
    {"id": "e", "prompt": "the cat", "completions": ["sat on the mat", "ran"], "cut_off": [True, False]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    folder = tmp_path_factory.mktemp("stream")
    word_tokenizer().save_pretrained(folder)
    made = build(str(folder))
    with torch.no_grad():
        made.head.bias.fill_(0.25)
    made.set_normalisation(-1.5, 2.0)
    return made


def rows_of(values: list[Any]) -> Iterator[Row]:
    for number, value in enumerate(values, start=1):
        line = value if isinstance(value, bytes) else json.dumps(value).encode()
        yield parse_line(line, "rows.jsonl", number)


def results(model: RewardModel, values: list[Any], **options: Any) -> list[dict[str, Any]]:
    return [result for window in score_stream(model, rows_of(values), **options) for result in window]


def stream(values: list[Any]) -> io.BytesIO:
    return io.BytesIO(b"".join(json.dumps(value).encode() + b"\n" for value in values))


@pytest.mark.parametrize("window_rows", [1, 2, 256])
@pytest.mark.parametrize("token_budget", [1, 8192])
def test_numbers_order_and_ids(model: RewardModel, window_rows: int, token_budget: int) -> None:
    got = results(model, ROWS, window_rows=window_rows, token_budget=token_budget)
    assert [result["id"] for result in got] == ["a", 7, None, "d", "e"]
    for row, result in zip(ROWS[:4], got, strict=False):
        texts = [c["text"] if isinstance(c, dict) else c for c in row.get("completions", [row.get("completion")])]
        wanted = model.score([parse_request(row).prompt], [texts])[0]
        for key in ("raw", "normalised"):
            values = result[key] if "completions" in row else [result[key]]
            assert values == pytest.approx(getattr(wanted, key).tolist(), abs=1e-5)
    assert got[0]["normalised"] == pytest.approx(got[0]["raw"] + 1.5, abs=1e-5)
    whole = model.score(["the cat"], [["sat on the mat", "ran"]])[0].raw
    assert abs(got[4]["raw"][0] - whole[0].item()) > 1e-3, "the cut-off answer got an end token"
    assert got[4]["raw"][1] == pytest.approx(whole[1].item(), abs=1e-5)


def test_probabilities_and_attributes(model: RewardModel) -> None:
    got = results(model, [ROWS[1]], probabilities=True)[0]
    assert got["probabilities"] == pytest.approx(
        model.probabilities("why is it so", ["no", "very bad yes"]).tolist(), abs=1e-6
    )
    assert sum(got["probabilities"]) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: one completion for probabilities"):
        results(model, [ROWS[0]], probabilities=True)


def test_attributes(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    model = build(str(tmp_path), attributes=("helpful", "brief"), attribute_weights=(1.0, 3.0))
    got = results(model, ROWS[:2])
    wanted = model.score(["why is it so"], [["no", "very bad yes"]])[0]
    assert wanted.attributes is not None
    assert got[1]["attributes"]["brief"] == pytest.approx(wanted.attributes[:, 1].tolist(), abs=1e-5)
    assert got[1]["raw"] == pytest.approx(wanted.raw.tolist(), abs=1e-5)
    assert got[0]["raw"] == pytest.approx(got[0]["attributes"]["helpful"] + 3 * got[0]["attributes"]["brief"], abs=1e-5)


BAD: list[tuple[Any, str]] = [
    (b"{broken", "broken JSON"),
    (b"[1]", "not a JSON object"),
    (b'{"id": 1, "prompt": "a\xff"}', "not UTF-8"),
    ({"id": 1, "completion": "yes"}, "missing key in key 'prompt'"),
    ({"id": 1, "prompt": "the cat"}, "missing key in key 'completions'"),
    ({"id": 1, "prompt": "the cat", "completions": []}, "no completions"),
    ({"id": 1, "prompt": "the cat", "completions": ["a", 3]}, r"wrong type in key 'completions\[1\]'"),
    ({"id": 1, "prompt": "the cat", "completion": "a", "completions": ["a"]}, "two kinds of completions"),
    ({"id": 1, "prompt": " ", "completion": "a"}, "empty prompt"),
    ({"id": 1, "prompt": [{"role": "assistant", "content": "a"}], "completion": "a"}, "ends with an assistant turn"),
    ({"id": 1, "prompt": "the cat", "completion": "\ud800"}, "lone surrogate"),
    ({"id": 1, "prompt": "the cat", "completion": "cat " * 500}, "more than max_length"),
    ({"id": 1, "prompt": "the cat", "completion": "", "cut_off": True}, "is empty and has no end token"),
    ({"id": 1, "prompt": "the cat", "completion": "a", "cut_off": "no"}, "wrong type in key 'cut_off'"),
    ({"id": {"x": 1}, "prompt": "the cat", "completion": "a"}, "wrong type in key 'id'"),
]


@pytest.mark.parametrize(("bad", "said"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_row_is_an_error_with_its_place_and_never_a_number(model: RewardModel, bad: Any, said: str) -> None:
    tally = ScoreTally()
    got = results(model, [ROWS[0], bad, ROWS[1]], on_error="skip", tally=tally)
    assert [set(result) for result in got] == [
        {"id", "raw", "normalised"},
        {"id", "error"},
        {"id", "raw", "normalised"},
    ]
    assert got[1]["error"].startswith("rows.jsonl:2: ")
    if isinstance(bad, dict) and bad["id"] == 1:
        assert got[1]["id"] == 1
    assert tally.rows == 3
    assert tally.completions == 3
    assert tally.errors.total() == 1
    refusing = score_stream(model, rows_of([ROWS[0], bad, ROWS[1]]))
    assert [result["id"] for result in next(refusing)] == ["a"], "what stood before the bad row was lost"
    with pytest.raises(ValueError, match=said) as caught:
        next(refusing)
    assert "rows.jsonl:2: " in str(caught.value)


def test_a_score_that_is_no_number_is_an_error(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "score_groups", lambda *_, **__: [torch.tensor([1.0]), torch.tensor([1.0, torch.nan])])
    got = results(model, ROWS[:2])
    assert got == [
        {"id": "a", "raw": 1.0, "normalised": 2.5},
        {"id": 7, "error": "the model's score is not finite"},
    ]


def test_memory_does_not_grow(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward is left out, so that thousands of rows are quick; everything else is real."""
    largest = 0

    def fake(_: Any, groups: list[Any], *, token_budget: int) -> list[torch.Tensor]:
        nonlocal largest
        largest = max(largest, len(groups))
        return [torch.zeros(group.num_slots) for group in groups]

    monkeypatch.setattr(scoring, "score_groups", fake)

    class Discarding(io.RawIOBase):
        lines = 0

        def write(self, data: Any) -> int:
            self.lines += bytes(data).count(b"\n")
            return len(data)

    def peak(count: int) -> int:
        sink = Discarding()
        values = (
            {"id": number, "prompt": "why is it so", "completions": ["no", "yes it is"]} for number in range(count)
        )
        source: Any = (json.dumps(value).encode() + b"\n" for value in values)
        tracemalloc.start()
        tally = score_job(model, source, sink, window_rows=64)  # type: ignore[arg-type]
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert tally.rows == sink.lines == count
        return highest

    peak(64)
    few, many = peak(256), peak(1920)
    assert largest == 64
    assert many < 1.2 * few, f"{few} bytes for 256 rows, {many} for 1920"


def test_a_window_of_long_rows_ends_early(model: RewardModel) -> None:
    sizes = [len(w) for w in score_stream(model, rows_of([ROWS[0]] * 10), window_rows=8, window_tokens=30)]
    assert sum(sizes) == 10
    assert max(sizes) < 8


@pytest.mark.parametrize(
    "cut", ["0", "in line 1", "behind 3", "in line 5", "behind 8", "whole", "behind a refusal", "a longer tail"]
)
def test_resuming_gives_the_same_bytes(model: RewardModel, cut: str, tmp_path: Path) -> None:
    """Cut anywhere, as a kill does; nothing is lost, nothing comes twice, and every byte is the same."""
    values = [ROWS[0] | {"id": f"row {n}"} if n % 3 else ROWS[1] | {"id": n} for n in range(11)]
    if cut == "behind a refusal":
        values[6] = {"id": "bad"}
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    options: dict[str, Any] = {"window_rows": 4}
    if cut == "behind a refusal":
        with pytest.raises(ValueError, match="<stdin>:7: missing key"):
            score_job(model, stream(values), output=part, **options)
        assert len(part.read_bytes().splitlines()) == 6
        options["on_error"] = "skip"
    score_job(model, stream(values), output=whole, **options)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 11
    if cut == "a longer tail":
        part.write_bytes(b"".join(lines[:5]) + b'{"id": "' + b"x" * 9999)
    elif cut != "behind a refusal":
        kind, number = cut.rsplit(" ", 1) if " " in cut else ("behind", "11" if cut == "whole" else "0")
        kept = b"".join(lines[: int(number)])
        part.write_bytes(kept[:-9] if kind == "in line" else kept)
    tally = score_job(model, stream(values), output=part, resume=True, **options)
    assert part.read_bytes() == whole.read_bytes()
    done = {"0": 0, "in line 1": 0, "behind 3": 0, "whole": 8, "behind 8": 8}.get(cut, 4)
    assert (tally.resumed, tally.rows) == (done, 11 - done)


def test_resuming_what_belongs_to_something_else_is_refused(model: RewardModel, tmp_path: Path) -> None:
    values = [ROWS[1] | {"id": n} for n in range(8)]
    output = tmp_path / "scores.jsonl"
    score_job(model, stream(values), output=output, window_rows=4)
    before = output.read_bytes()
    with pytest.raises(ValueError, match="--resume"):
        score_job(model, stream(values), output=output)
    with pytest.raises(ValueError, match="another input's"):
        score_job(model, stream(values[:3]), output=output, resume=True, window_rows=4)
    with pytest.raises(ValueError, match=r"scores.jsonl:1: id 0, but <stdin>:1 has 7"):
        score_job(model, stream(values[::-1]), output=output, resume=True, window_rows=4)
    with pytest.raises(ValueError, match="other options"):
        score_job(model, stream(values), output=output, resume=True, window_rows=4, probabilities=True)
    weight = model.head.weight.detach().clone()
    try:
        with torch.no_grad():
            model.head.weight.mul_(1.5)
        with pytest.raises(ValueError, match="another model"):
            score_job(model, stream(values), output=output, resume=True, window_rows=4)
    finally:
        with torch.no_grad():
            model.head.weight.copy_(weight)
    assert output.read_bytes() == before, "a refused run changed the file"
    for content in (b"my notes", b"my notes\n", b'{"prompt": 1}\n', before + b"\nmy notes"):
        other = tmp_path / "notes.txt"
        other.write_bytes(content)
        with pytest.raises(ValueError, match=r"notes.txt:\d+: not a line that this command wrote"):
            score_job(model, stream(values), output=other, resume=True, window_rows=4)
        assert other.read_bytes() == content
    with pytest.raises(ValueError, match="--output FILE"):
        score_job(model, stream(values), io.BytesIO(), resume=True)
    score_job(model, stream(values[:2]), output=output, overwrite=True)
    assert len(output.read_bytes().splitlines()) == 2


def test_loading_takes_the_policy_for_long_texts(model: RewardModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    long = {"prompt": "cat " * 200, "completion": "yes"}
    cut = load_scoring_model(str(tmp_path), device="cpu", too_long="truncate_prompt")
    assert isinstance(results(cut, [long])[0]["raw"], float)
    short = load_scoring_model(str(tmp_path), device="cpu", max_length=12)
    with pytest.raises(ValueError, match="more than max_length 12"):
        results(short, [{"prompt": "cat " * 20, "completion": "yes"}])
    with pytest.raises(ValueError, match="device"):
        load_scoring_model(str(tmp_path), device="cuda:99")


def test_truncation_does_not_depend_on_neighbours(model: RewardModel, tmp_path: Path) -> None:
    """Rows that share a prompt are scored together, yet the long one does not cost the short one its prompt."""
    model.save_pretrained(tmp_path)
    cut = load_scoring_model(str(tmp_path), device="cpu", too_long="truncate_prompt")
    prompt = "why is it so " * 30
    pair = [{"prompt": prompt, "completion": "yes"}, {"prompt": prompt, "completion": "no " * 60}]
    together = results(cut, pair)
    alone = [results(cut, [row])[0] for row in pair]
    assert [r["raw"] for r in together] == pytest.approx([r["raw"] for r in alone], abs=1e-5)
