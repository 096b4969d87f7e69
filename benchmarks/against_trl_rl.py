"""Against TRL's `RLOOTrainer` and `GRPOTrainer`: one iteration of alignment, phase by phase.

    python benchmarks/against_trl_rl.py [ALGORITHM …] [--iterations 5] [--device cpu] [--size 7m] [--data FOLDER]

Both start from the same saved policy and reward model, answer 8 prompts of 125 tokens 8 times with up to 64 tokens, and
take one optimizer step on the 64 answers, with the same divergence from the same reference. Each runs in a process of
its own, one iteration in turn, on one thread; times are the processor's, on a GPU those on the wall. The random policy
hardly ever writes its end token, and the benchmark fails if the numbers of sampled tokens differ by more than 2 %.
Before that both make rewards, advantages, loss and gradient of the same answers, by a policy that has left the
reference, and the benchmark fails where loss or gradient differ by more than rounding.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from agreement_rl import agreement
from common import ROOT, median_ratio, save, table
from flops import attended_pairs
from lockstep import Worker, take_turns
from peers import trl_python, trl_version
from work_plaudit_rl import align_config
from workloads import CACHE, DATA, FILES, LLAMA_7M, VOCABULARY, tokenizer_folder
from workloads import SIZES as DECODERS

from plaudit.configs.model import RewardModelConfig
from plaudit.configs.sft import LanguageModelConfig
from plaudit.data.io import read_comparisons
from plaudit.data.records import prompt_text
from plaudit.models.causal_lm import CausalLM
from plaudit.models.reward_model import RewardModel

HERE = Path(__file__).parent
ALGORITHMS = ("rloo", "grpo")
GOAL = 3.0
PHASES = ("generation", "scoring", "evaluation", "update")
SIZES = {"prompts": 8, "samples": 8, "new_tokens": 64, "kl_coefficient": 0.05, "learning_rate": 1e-6}
PROMPT_TOKENS = 125
TOKEN_TOLERANCE = 0.02
AGREEMENT = {"advantages": 1e-4, "loss": 1e-6, "gradient": 1e-4}
"""How far the two may differ on the same answers, see `agreement_rl.agreement`."""


def prepare(
    iterations: int, data: Path, *, sizes: dict[str, Any] | None = None, device: str = "cpu", cache: Path = CACHE
) -> Path:
    """Write the folder that both workers read: `model/`, `reward/`, `settings.json` with the prompts as text."""
    folder = cache / "rl"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = str(tokenizer_folder(data, cache))
    options: dict[str, Any] = {"model_type": "llama", "backbone_config": sizes or LLAMA_7M, "tokenizer": tokenizer}
    policy = CausalLM.from_backbone(LanguageModelConfig(**options))
    policy.save_pretrained(folder / "model")
    RewardModel.from_backbone(RewardModelConfig(aggregation="last", template="raw", **options)).save_pretrained(
        folder / "reward"
    )
    texts = prompts_of(policy, data, iterations * SIZES["prompts"])
    settings = SIZES | {"iterations": iterations, "texts": texts, "device": device}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def prompts_of(policy: CausalLM, data: Path, count: int) -> list[str]:
    """Real prompts, cut to exactly `PROMPT_TOKENS` tokens that both sides read alike.

    Raises:
        SystemExit: if the data does not hold so many.
    """
    tokeniser, tokenizer = policy.text_tokeniser(template="raw"), policy.tokenizer
    found: list[str] = []
    for record in read_comparisons(data / FILES["hh"], on_error="skip").records:
        ids = tokenizer(prompt_text(record.prompt))["input_ids"]
        text = tokenizer.decode(ids[:PROMPT_TOKENS], skip_special_tokens=True)
        again = tokenizer(text)["input_ids"]
        if len(again) == PROMPT_TOKENS and tokeniser.prompt(text) == again and text not in found:
            found.append(text)
        if len(found) == count:
            return found
    raise SystemExit(f"{data}: {len(found)} prompts of {PROMPT_TOKENS} tokens, {count} wanted")


def measure(algorithm: str, iterations: int, data: Path, *, device: str = "cpu", size: str = "7m") -> dict[str, Any]:
    """One warm-up iteration and `iterations` measured ones of each side.

    Raises:
        RuntimeError: if the two did not sample equally many tokens; then the times mean nothing.
    """
    folder = prepare(iterations + 1, data, sizes=DECODERS[size], device=device)
    agreed = compare(folder, algorithm)

    def start(name: str) -> Worker:
        python = trl_python() if name == "trl" else Path(sys.executable)
        # The worker's log is named after the last word.
        return Worker(name, [str(python), str(HERE / f"work_{name}_rl.py"), str(folder), algorithm, str(folder / name)])

    workers = take_turns({name: partial(start, name) for name in ("trl", "plaudit")}, iterations)
    tokens = {name: sum(worker.result["tokens"][1:]) for name, worker in workers.items()}
    if abs(tokens["trl"] / tokens["plaudit"] - 1) > TOKEN_TOLERANCE:
        raise RuntimeError(f"{algorithm}: the two sides did not sample equally many tokens: {tokens}")
    return {
        "algorithm": algorithm,
        "device": device,
        "size": size,
        "clock": "processor_seconds" if device == "cpu" else "seconds",
        "seconds": {name: worker.times for name, worker in workers.items()},
        "processor_seconds": {name: worker.processor_times for name, worker in workers.items()},
        "phases": {name: worker.result["phases"][1:] for name, worker in workers.items()},
        "tokens": tokens,
        "agreement": agreed,
        "memory": {n: {k: w.result[k] for k in ("memory_before", "memory_peak")} for n, w in workers.items()},
        "threads": {name: worker.result["threads"] for name, worker in workers.items()},
    }


def compare(folder: Path, algorithm: str) -> dict[str, float]:
    """What the two make of the same answers.

    Raises:
        RuntimeError: if they differ; then they do not learn the same, and their times mean nothing.
    """
    kept = folder / f"kept-{algorithm}.pt"
    command = [str(trl_python()), str(HERE / "work_trl_rl.py"), str(folder), algorithm, "--keep", str(kept)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{algorithm}: TRL's step ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    found = agreement(folder, kept, align_config(folder, algorithm))
    if wrong := {name: found[name] for name, limit in AGREEMENT.items() if not found[name] <= limit}:
        raise RuntimeError(f"{algorithm}: the two differ on the same answers: {wrong}")
    return found


def clocked(found: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of every measured iteration, by the clock that the result goes by."""
    seconds: dict[str, list[float]] = found[found.get("clock", "processor_seconds")]
    return seconds


def phase_seconds(found: dict[str, Any], name: str) -> dict[str, list[float]]:
    """Seconds of every measured iteration by phase; the update is what is left, logging and the data included."""
    known = {phase: [each.get(phase, 0.0) for each in found["phases"][name]] for phase in PHASES[:-1]}
    whole = clocked(found)[name]
    return known | {"update": [total - sum(rest) for total, *rest in zip(whole, *known.values(), strict=True)]}


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table of the page: one row per algorithm and phase, the whole iteration last."""
    shown = []
    for found in results:
        trl, ours = phase_seconds(found, "trl"), phase_seconds(found, "plaudit")
        whole = {name: clocked(found)[name] for name in ("trl", "plaudit")}
        for name, seconds in (("trl", trl), ("plaudit", ours)):
            scored = zip(whole[name], seconds["scoring"], strict=True)
            seconds["iteration without scoring"] = [total - scoring for total, scoring in scored]
            seconds["whole iteration"] = whole[name]
        for phase in trl:
            shown.append(
                {
                    "algorithm": found["algorithm"].upper(),
                    "phase": phase,
                    "TRL s": statistics.median(trl[phase]),
                    "Plaudit s": statistics.median(ours[phase]),
                    "times faster": median_ratio(trl[phase], ours[phase]),
                    "goal": GOAL if phase == "whole iteration" else "–",
                }
            )
    return shown


def operations(*, packed: bool, evaluations: int) -> float:
    """Floating-point operations that an iteration needs at least, recomputation and small operations not counted.

    A pass takes `2 · tokens · weights + 4 · layers · width · attended pairs` in the layers and `2 · completion tokens ·
    width · vocabulary` in the head; sampling and each evaluation are one pass, scoring one without the head, the update
    three.

    Args:
        packed: a prompt goes through once, not once for each of its answers.
        evaluations: passes without gradients for log-probabilities.
    """
    width, layers = LLAMA_7M["hidden_size"], LLAMA_7M["num_hidden_layers"]
    weights = layers * (4 * width**2 + 3 * width * LLAMA_7M["intermediate_size"])
    answers = SIZES["prompts"] * SIZES["samples"]
    readings, completion = SIZES["prompts"] if packed else answers, answers * SIZES["new_tokens"]
    pairs = readings * attended_pairs(PROMPT_TOKENS, [], causal=True)
    pairs += answers * (SIZES["new_tokens"] * PROMPT_TOKENS + SIZES["new_tokens"] * (SIZES["new_tokens"] + 1) // 2)
    inside = 2.0 * (readings * PROMPT_TOKENS + completion) * weights + 4.0 * layers * width * pairs
    head = 2.0 * completion * width * VOCABULARY
    return (5 + evaluations) * inside + (4 + evaluations) * head


def agreement_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The second table: what the two made of the same answers, tokens sampled, and memory."""
    shown = []
    for found in results:
        agreed, memory = found["agreement"], found["memory"]
        row: dict[str, Any] = {"algorithm": found["algorithm"].upper(), "loss": agreed["loss_value"]}
        row |= {f"difference, {name}": agreed[name] for name in ("loss", "gradient", "advantages", "rewards")}
        row |= {"tokens sampled, TRL / Plaudit": found["tokens"]["trl"] / found["tokens"]["plaudit"]}
        evaluations = 2 if found["algorithm"] == "rloo" else 1
        ratio = operations(packed=False, evaluations=evaluations) / operations(packed=True, evaluations=1)
        row |= {"operations, TRL / Plaudit": ratio}
        row |= {f"{name} GiB at its peak": memory[name]["memory_peak"] / 2**30 for name in ("trl", "plaudit")}
        shown.append(row)
    return shown


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithms", nargs="*", metavar="ALGORITHM", help=", ".join(ALGORITHMS))
    parser.add_argument("--iterations", type=int, default=5, help="measured iterations of each")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where both train")
    parser.add_argument("--size", default="7m", choices=tuple(DECODERS), help="of policy and reward model")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the preference data")
    parser.add_argument("--save-as", default="against_trl_rl", help="start of names in results; empty: not saved")
    arguments = parser.parse_args()
    for name in arguments.algorithms or ALGORITHMS:
        found = measure(name, arguments.iterations, arguments.data, device=arguments.device, size=arguments.size)
        print(table(rows([found])), flush=True)
        if arguments.save_as:
            command = f"python benchmarks/against_trl_rl.py {name} --iterations {arguments.iterations}"
            command += f" --device {arguments.device} --size {arguments.size}" * (arguments.device != "cpu")
            print(save(f"{arguments.save_as}-{name}", command, [found], peer=f"trl {trl_version()}").relative_to(ROOT))


if __name__ == "__main__":
    main()
