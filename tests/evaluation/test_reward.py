"""The whole job: from files and a real (tiny, random) reward model to a report, through Python and the command."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from plaudit.configs.evaluate import EvaluateRewardConfig
from plaudit.data.io import write_comparisons
from plaudit.data.records import Best, Comparison, Ranking
from plaudit.evaluation.reward import evaluate_reward, read_probes
from plaudit.evaluation.scoring import read_scores, write_scores

QUICK = {"resamples": 50, "probe_limit": 4}


@pytest.fixture
def no_page(monkeypatch):
    """Spares the drawing of a page where the numbers are what is tested."""
    monkeypatch.setattr("plaudit.evaluation.reward.write_report", lambda report, folder: folder)


@pytest.fixture(scope="module")
def data(simulated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    comparisons, rewards = simulated(40)
    write_comparisons(comparisons, folder / "data.jsonl")
    write_scores(folder / "truth.jsonl", comparisons, rewards)
    write_scores(folder / "wrong.jsonl", comparisons, [[-v for v in row] for row in rewards])
    return folder


@pytest.fixture(scope="module")
def model_folder(simulated, tmp_path_factory):
    """A tiny random decoder with a reward head, saved as a user would have it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    from plaudit.configs.model import RewardModelConfig
    from plaudit.models.reward_model import RewardModel

    folder = tmp_path_factory.mktemp("model")
    comparisons, _ = simulated(40)
    words = sorted({word for c in comparisons for text in (c.prompt, *c.completions) for word in text.split()})
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *words])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RewardModelConfig(
        model_type="llama", tokenizer=str(folder / "tokenizer"), max_length=64,
        backbone_config={**sizes, "vocab_size": len(vocabulary), "max_position_embeddings": 64},
    )  # fmt: skip
    RewardModel.from_backbone(config).save_pretrained(folder / "model")
    return folder / "model"


def test_scores_from_files(data, tmp_path, capsys):
    config = EvaluateRewardConfig(
        scores=(f"truth={data}/truth.jsonl", f"wrong={data}/wrong.jsonl"), data=(f"{data}/data.jsonl",),
        output=tmp_path / "out", **QUICK,
    )  # fmt: skip
    report = evaluate_reward(config)
    truth, wrong = report.models
    assert truth.metrics["accuracy"].value == pytest.approx(1 - wrong.metrics["accuracy"].value)
    assert [floor.name for floor in report.floors] == ["length", "bag_of_words"]
    assert {(d.first, d.second) for d in report.differences} >= {("truth", "wrong"), ("truth", "length")}
    said = capsys.readouterr().out
    assert "truth orders" in said
    assert "floor: length" in said
    saved = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert saved["data"]["rows_used"] == 40
    assert saved["models"]["truth"]["metrics"]["accuracy"]["value"] == truth.metrics["accuracy"].value


def test_a_model(data, model_folder, tmp_path, simulated, no_page):
    config = EvaluateRewardConfig(
        models=(str(model_folder),), data=(f"{data}/data.jsonl",), output=tmp_path, floors=(), device="cpu", **QUICK
    )
    report = evaluate_reward(config)
    comparisons, _ = simulated(40)
    from plaudit.models.reward_model import RewardModel

    model = RewardModel.from_pretrained(model_folder)
    expected = [
        result.raw.tolist()
        for result in model.score([c.prompt for c in comparisons], [c.completions for c in comparisons])
    ]
    scores = read_scores(tmp_path / "scores" / f"{report.models[0].name}.jsonl", comparisons)
    assert np.concatenate(scores) == pytest.approx(np.concatenate(expected), abs=1e-5)
    assert [result.probe for result in report.probes[report.models[0].name]][:2] == [
        "flattery before",
        "flattery after",
    ]
    assert report.floors == []


def test_probes_go_by_the_same_ties_as_the_rest(data, model_folder, tmp_path, no_page):
    config = EvaluateRewardConfig(
        models=(str(model_folder),), data=(f"{data}/data.jsonl",), output=tmp_path, floors=(), device="cpu",
        resamples=10, tie_threshold=100.0,
    )  # fmt: skip
    (results,) = evaluate_reward(config).probes.values()
    # Of the 40 records the 10 with scores and the 10 with votes are all tied at this threshold.
    assert results[0].rise.count == 20


def test_what_the_model_cannot_read_is_counted(data, model_folder, tmp_path, no_page):
    comparisons = [
        Comparison(prompt=f"what {i}", completions=("tea", "rain " * (80 if i == 3 else 2)), judgement=Best(0))
        for i in range(8)
    ]
    write_comparisons(comparisons, tmp_path / "data.jsonl")
    config = EvaluateRewardConfig(
        models=(f"m={model_folder}",), data=(str(tmp_path / "data.jsonl"),), output=tmp_path / "out", probes=False,
        too_long="refuse", floors=(), device="cpu", **QUICK,
    )  # fmt: skip
    report = evaluate_reward(config)
    assert report.models[0].counts["pairs_without_score"] == 1
    assert "m could not score 1 completions: too long." in report.notes


def test_rewardbench_rules(tmp_path, no_page):
    rows = [
        {"prompt": f"p{i}", "chosen": f"yes {i}", "rejected": f"no {i}", "subset": name, "id": str(i)}
        for i, name in enumerate(["hep-go", "math-prm", "alpacaeval-easy", "donotanswer", "llmbar-natural"])
    ]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scores = [{"id": str(i), "scores": [float(i != 1), 0.5]} for i in range(5)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores), encoding="utf-8")
    config = EvaluateRewardConfig(
        scores=(f"m={tmp_path}/m.jsonl",), data=(f"{tmp_path}/bench.jsonl",), output=tmp_path / "out", rewardbench=1,
        floors=(), **QUICK,
    )  # fmt: skip
    found = evaluate_reward(config).rewardbench["m"]
    assert found.sections["Reasoning"] == pytest.approx(164 / (984 + 164))
    assert found.score == pytest.approx((3 + 164 / (984 + 164)) / 4)


def test_rewardbench_2_files(tmp_path, no_page):
    rows = [
        {"id": "0", "prompt": "p", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math"},
        {"id": "ref:0", "prompt": "q", "chosen": ["a"], "rejected": ["b"], "subset": "Ties"},
        {"id": "tied:0", "prompt": "r", "chosen": ["a", "c"], "rejected": ["b"], "subset": "Ties"},
    ]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scores = [[1.0, 1.0, 0.0, 0.0], [2.0, 0.0], [3.0, 2.0, 0.0]]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"scores": row}) + "\n" for row in scores), encoding="utf-8")
    config = EvaluateRewardConfig(
        scores=(f"m={tmp_path}/m.jsonl",), data=(f"{tmp_path}/bench.jsonl",), output=tmp_path / "out", rewardbench=2,
        floors=(), **QUICK,
    )  # fmt: skip
    found = evaluate_reward(config).rewardbench["m"]
    assert found.subsets["Math"] == (0.5, 1)
    assert found.subsets["Ties"][0] == pytest.approx(1.0 + 0.01 * np.tanh(2 / 1 - 1))


def test_dry_run_reads_and_stops(data, tmp_path, capsys):
    config = EvaluateRewardConfig(models=("absent",), data=(f"{data}/data.jsonl",), output=tmp_path / "out")
    assert evaluate_reward(config, dry_run=True) is None
    assert "would score 158 completions" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": ("ties.jsonl",)}, "data: none of the 2 comparisons says that one completion is better"),
        ({"data": ("data.jsonl",), "output": "data.jsonl"}, "is a file; name a folder"),
        ({"data": ("data.jsonl",), "probe_file": "missing.yaml"}, "probe_file: missing.yaml: no such file"),
        ({"data": ("data.jsonl",), "scores": ("a=missing.jsonl",)}, "missing.jsonl: no such file of scores"),
        ({"data": ("data.jsonl",), "device": "gpu7"}, "device: 'gpu7' cannot be used here"),
        ({"data": ("data.jsonl",)}, "no/such/model: no such folder"),
    ],
)
def test_faults_are_found_before_a_model_is_loaded(settings, message, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_bytes((data / "data.jsonl").read_bytes())
    tied = Comparison(prompt="p", completions=("a", "b"), judgement=Ranking(((0, 1),)))
    write_comparisons([tied, tied], tmp_path / "ties.jsonl")
    with pytest.raises(ValueError, match=message):
        evaluate_reward(EvaluateRewardConfig(models=("m=./no/such/model",), **settings))


def test_probe_file(tmp_path):
    path = tmp_path / "probes.yaml"
    path.write_text(yaml.safe_dump([{"name": "lob", "change": "suffix", "text": " Tolle Frage!"}]), encoding="utf-8")
    (probe,) = read_probes(path)
    assert (probe.name, probe.text) == ("lob", " Tolle Frage!")
    path.write_text("- {name: x, change: invert}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"entry 1 .* expected name, change"):
        read_probes(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": ("d",)}, "name a model"),
        ({"models": ("m",)}, "give --data"),
        ({"models": ("a/m", "b/m"), "data": ("d",)}, "two models are called 'm'"),
        ({"models": ("length=x",), "data": ("d",)}, "name of a floor"),
    ],
)
def test_meaningless_configurations_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluateRewardConfig(**settings)


def test_names():
    config = EvaluateRewardConfig(
        models=("runs/big/model", "x=some/where", "plain"), scores=("o/s.jsonl",), data=("d",)
    )
    assert [name for name, _ in config.named_sources()] == ["big", "x", "plain", "s"]


def test_command(data, tmp_path):
    """The verb itself, in a process of its own, as a user types it."""
    words = ["evaluate", "reward", "--scores", f"truth={data}/truth.jsonl", "--data", f"{data}/data.jsonl",
             "--output", str(tmp_path / "out"), "--resamples", "20"]  # fmt: skip
    code = f"from plaudit.cli.app import main; main({words!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "truth orders" in done.stdout
    assert (tmp_path / "out" / "report.html").exists()
