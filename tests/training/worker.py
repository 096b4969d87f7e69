"""Runs training jobs in forked children that really die, so that torch is imported once for all of them.

Called as `python worker.py JOBS.json`; each job is a list of runs in one folder, one after the other, each in a child
of its own. A run may be killed by SIGKILL, or asked to stop by SIGTERM, at a chosen moment.
"""

import hashlib
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import peft  # noqa: F401
import torch
from conftest import WORDS, save_tokenizer, tiny_model

from plaudit.configs.reward import RewardTrainingConfig
from plaudit.configs.training import OptimizerConfig
from plaudit.data.records import Comparison, Ranking
from plaudit.training import checkpoints, reward, run


def records(count: int, seed: int) -> list[Comparison]:
    """Rankings of four random completions."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        completions: list[str] = []
        while len(completions) < 4:
            text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 6)))
            if text not in completions:
                completions.append(text)
        order = sorted(range(4), key=lambda k: (-completions[k].count("good"), len(completions[k])))
        prompt = " ".join(draw.choice(WORDS) for _ in range(5))
        judgement = Ranking(tuple((k,) for k in order))
        made.append(Comparison(prompt=prompt, completions=tuple(completions), judgement=judgement, id=f"r{number}"))
    return made


def strike_at(moment: dict[str, Any]) -> None:
    """Send this process a signal the n-th time it passes a place: `micro_batch`, `step`, `saving` or `saved`."""
    count, number, sent = 0, moment["number"], getattr(signal, moment["signal"])

    def strike() -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), sent)

    def after(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def patched(*arguments: Any, **options: Any) -> Any:
            value = original(*arguments, **options)
            strike()
            return value

        setattr(owner, name, patched)

    if moment["place"] == "micro_batch":
        after(reward.RewardTrainer, "backward")
    elif moment["place"] == "step":
        after(run.Run, "update")
    elif moment["place"] == "saving":
        after(checkpoints, "_sha256")
    else:
        after(run.Run, "save_if_due")


def record_order(path: Path) -> None:
    """Append the records of every micro-batch to a file."""
    original = reward.RewardTrainer.backward

    def patched(self: Any, micro: Any, weight_sum: float) -> Any:
        with path.open("a") as file:
            file.write(json.dumps([weight_sum, list(micro.indices)]) + "\n")
        return original(self, micro, weight_sum)

    reward.RewardTrainer.backward = patched  # type: ignore[method-assign]


def train(folder: Path, options: dict[str, Any], moment: dict[str, Any] | None, number: int) -> None:
    """One run in this process."""
    record_order(folder / f"order-{number}.jsonl")
    if moment is not None:
        strike_at(moment)
    options = dict(options)
    model = tiny_model(str(folder.parent / "tokenizer"), lora=options.pop("lora", False), dropout=0.1)
    config = RewardTrainingConfig(
        model=model,
        output=folder / "run",
        records_per_step=8,
        tokens_per_micro_batch=64,
        device="cpu",
        optimizer=OptimizerConfig(learning_rate=3e-3),
        **{"epochs": 2, "save_every": 2, "resume": number > 0, "quiet": True, **options},
    )
    result = reward.main(config, train=records(40, 0), held_out=records(16, 1))
    assert isinstance(result, reward.RewardTrainingResult)
    digest = hashlib.sha256()
    for name, value in sorted(result.model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    outcome = {"weights": digest.hexdigest(), "stopped_by": result.stopped_by, "steps": result.steps}
    outcome |= {"metrics": result.metrics, "best_step": result.best_step, "complete": result.complete}
    (folder / f"outcome-{number}.json").write_text(json.dumps(outcome))


def in_child(folder: Path, options: dict[str, Any], moment: dict[str, Any] | None, number: int) -> int:
    """Run in a forked child; returns its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with (folder / f"stderr-{number}.txt").open("w") as stream:
                os.dup2(stream.fileno(), 2)
            train(folder, options, moment, number)
            code = 0
        finally:
            if code:
                import traceback

                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Run all jobs of the file and write each run's exit code to `codes.json` beside it."""
    torch.set_num_threads(1)
    jobs_file = Path(sys.argv[1])
    save_tokenizer(jobs_file.parent / "tokenizer")
    codes: dict[str, list[int]] = {}
    for name, job in json.loads(jobs_file.read_text()).items():
        folder = jobs_file.parent / name
        folder.mkdir()
        codes[name] = []
        for number, moment in enumerate(job["moments"]):
            codes[name].append(in_child(folder, job.get("options", {}), moment, number))
            for damaged in job.get("damage", []) if number == 0 else []:
                path = folder / "run" / "checkpoints" / damaged / "state.pt"
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= 1
                path.write_bytes(data)
    (jobs_file.parent / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
