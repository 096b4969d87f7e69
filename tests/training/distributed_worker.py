"""Runs training jobs in the processes that torchrun started, several jobs one after the other in one process group.

Called as `torchrun … distributed_worker.py JOBS.json`. A job says with how many processes it runs (1: the first one
alone, as without torchrun), how they share it, what is trained, whether a process gets SIGTERM after a step, and from
which earlier job's folder it goes on.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from conftest import SIZES, WORDS, save_tokenizer, tiny_model
from torch.distributed.tensor import DTensor

from plaudit.configs.model import LoraConfig
from plaudit.configs.reward import RewardTrainingConfig
from plaudit.configs.sft import LanguageModelConfig, SftConfig
from plaudit.configs.training import OptimizerConfig
from plaudit.data.records import Comparison, Demonstration, Judgement, Ranking, Votes
from plaudit.models.reward_model import RewardModel
from plaudit.training import reward, run, sft
from plaudit.training.parallel import Network

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def sentence(draw: random.Random, longest: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, longest)))


def comparisons(count: int, seed: int) -> list[Comparison]:
    """Rankings with ties and votes, of unequal weight and very unequal length."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        texts = list(dict.fromkeys(sentence(draw, 24 if number % 5 == 0 else 5) for _ in range(8)))[:4]
        order = sorted(range(len(texts)), key=lambda k: (-texts[k].count("good"), len(texts[k])))
        judgement: Judgement = Ranking((tuple(order[:2]), *((k,) for k in order[2:])))
        if number % 4 == 3:
            judgement = Votes((*(draw.randint(0, 3) for _ in texts[1:]), 1))
        made.append(
            Comparison(
                prompt=sentence(draw, 12),
                completions=tuple(texts),
                judgement=judgement,
                id=f"r{number}",
                weight=draw.choice((0.5, 1.0, 2.0)),
            )
        )
    return made


def demonstrations(count: int, seed: int) -> list[Demonstration]:
    """Texts of very unequal length and unequal weight."""
    draw = random.Random(seed)
    return [
        Demonstration(
            prompt=sentence(draw, 12),
            completion=sentence(draw, 30 if number % 5 == 0 else 5),
            weight=draw.choice((0.5, 1.0, 2.0)),
        )
        for number in range(count)
    ]


def train(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """One run; what this process saw of it."""
    tokenizer = str(folder.parent / "tokenizer")
    options: dict[str, Any] = dict(job.get("options", {}))
    dropout, lora = options.pop("dropout", 0.0), options.pop("lora", False)
    common: dict[str, Any] = {
        "output": folder / "run",
        "records_per_step": 8,
        "tokens_per_micro_batch": 64,
        "device": "cpu",
        "quiet": True,
        "epochs": 2,
        "parallel": job.get("strategy"),
        "optimizer": OptimizerConfig(learning_rate=3e-3, max_gradient_norm=options.pop("max_norm", 0.5)),
        **options,
    }
    if job["kind"] == "sft":
        model = LanguageModelConfig(
            model_type="llama",
            backbone_config=SIZES | {"num_hidden_layers": 2, "tie_word_embeddings": True},
            tokenizer=tokenizer,
            template="raw",
            dropout=dropout,
            lora=LoraConfig(rank=2) if lora else None,
        )
        result: Any = sft.main(
            SftConfig(model=model, **common), train=demonstrations(37, 0), held_out=demonstrations(9, 1)
        )
    else:
        reward_model = tiny_model(tokenizer, lora=lora, dropout=dropout, num_hidden_layers=2)
        if job["kind"] == "encoder":
            sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
            reward_model = reward_model.model_copy(update={"model_type": "bert", "backbone_config": sizes})
        config = RewardTrainingConfig(model=reward_model, **common)
        result = reward.main(
            config, train=comparisons(37, 0), held_out=comparisons(9, 1), demonstrations=demonstrations(5, 2)
        )
    outcome = {"steps": result.steps, "stopped_by": result.stopped_by, "metrics": result.metrics}
    if job["kind"] != "sft" and result.normalisation is not None:
        outcome |= {"mean": list(result.normalisation.mean), "tie": result.tie_parameter}
    return outcome


def watched(job: dict[str, Any], rank: int, seen: dict[str, Any]) -> Any:
    """Patch the loop: note what the parameters are while it runs, and strike where the job says so."""
    original = run.Run.update

    def update(self: run.Run, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        parameters = list(self.session.trained["model"].parameters())  # type: ignore[index]
        seen["sharded"] = [isinstance(each, DTensor) for each in parameters]
        seen["whole"] = sum(each.numel() for each in parameters)
        seen["here"] = sum(
            each.to_local().numel() if isinstance(each, DTensor) else each.numel() for each in parameters
        )
        if job.get("terminate") == [rank, self.state.step]:
            os.kill(os.getpid(), signal.SIGTERM)

    return mock.patch.object(run.Run, "update", update)


def killed(folder: Path, moment: list[int] | None, rank: int) -> Any:
    """Patch the network: process `moment[0]` dies by SIGKILL in its `moment[1]`-th pass, in the middle of a step."""
    original, count = Network.__call__, itertools.count(1)

    def call(self: Network, batch: Any) -> Any:
        if moment == [rank, next(count)]:
            (folder / "died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, batch)

    return mock.patch.object(Network, "__call__", call)


def main() -> None:
    """Run all jobs of the file; every process writes `outcome-RANK.json` into each job's folder."""
    torch.set_num_threads(1)
    file = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank == 0:
        save_tokenizer(file.parent / "tokenizer")
    dist.barrier()
    for job in json.loads(file.read_text()):
        folder = file.parent / job["name"]
        if rank == 0:
            folder.mkdir()
            if "goes_on_from" in job:
                shutil.copytree(file.parent / job["goes_on_from"] / "run", folder / "run")
        dist.barrier()
        alone = job.get("processes", 2) == 1
        if not alone or rank == 0:
            seen: dict[str, Any] = {}
            environment = {name: value for name, value in os.environ.items() if not alone or name not in LAUNCHER}
            with (
                mock.patch.dict(os.environ, environment, clear=True),
                watched(job, rank, seen),
                killed(folder, job.get("kill"), rank),
            ):
                outcome = train(folder, job)
            (folder / f"outcome-{rank}.json").write_text(json.dumps(outcome | seen))
        dist.barrier()
    if rank == 0:
        check_saved(file.parent)
    dist.destroy_process_group()


def check_saved(folder: Path) -> None:
    """Scores of every saved reward model on the same texts."""
    scores = {}
    for path in sorted(folder.glob("*/run/model/plaudit.json")):
        model = RewardModel.from_pretrained(path.parent)
        scores[path.parents[2].name] = model.score(["why is it"], [["so good", "very bad", "yes"]])[0].raw.tolist()
    (folder / "scores.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
