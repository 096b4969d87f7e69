"""Against TRL's `RLOOTrainer` and `GRPOTrainer`: one iteration of alignment, phase by phase.

    python benchmarks/against_trl_rl.py [ALGORITHM …] [--iterations 5] [--data FOLDER]

Both start from the same saved policy and reward model, answer 8 prompts of 125 tokens 8 times with up to 64 tokens, and
take one optimizer step on the 64 answers, with the same divergence from the same reference. Each runs in a process of
its own, one iteration in turn, on one thread; times are the processor's. The random policy hardly ever writes its end
token, and the benchmark fails if the numbers of sampled tokens differ by more than 2 %.
"""

import argparse
import json
import shutil
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from common import ROOT, median_ratio, save, table
from lockstep import Worker, take_turns
from peers import TRL, trl_python
from workloads import CACHE, DATA, FILES, LLAMA_7M, tokenizer_folder

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


def prepare(iterations: int, data: Path, *, sizes: dict[str, Any] | None = None, cache: Path = CACHE) -> Path:
    """Write the folder that both workers read: `model/`, `reward/`, `settings.json` with the prompts as text."""
    folder = cache / "rl"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = str(tokenizer_folder(data, cache))
    options: dict[str, Any] = {"model_type": "llama", "backbone_config": sizes or LLAMA_7M, "tokenizer": tokenizer}
    policy = CausalLM.from_backbone(LanguageModelConfig(**options))
    policy.save_pretrained(folder / "model")
    RewardModel.from_backbone(RewardModelConfig(aggregation="last", **options)).save_pretrained(folder / "reward")
    texts = prompts_of(policy, data, iterations * SIZES["prompts"])
    settings = SIZES | {"iterations": iterations, "texts": texts}
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


def measure(algorithm: str, iterations: int, data: Path) -> dict[str, Any]:
    """One warm-up iteration and `iterations` measured ones of each side.

    Raises:
        RuntimeError: if the two did not sample equally many tokens; then the times mean nothing.
    """
    folder = prepare(iterations + 1, data)

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
        "seconds": {name: worker.times for name, worker in workers.items()},
        "processor_seconds": {name: worker.processor_times for name, worker in workers.items()},
        "phases": {name: worker.result["phases"][1:] for name, worker in workers.items()},
        "tokens": tokens,
        "memory": {n: {k: w.result[k] for k in ("memory_before", "memory_peak")} for n, w in workers.items()},
        "threads": {name: worker.result["threads"] for name, worker in workers.items()},
    }


def phase_seconds(found: dict[str, Any], name: str) -> dict[str, list[float]]:
    """Seconds of every measured iteration by phase; the update is what is left, logging and the data included."""
    known = {phase: [each.get(phase, 0.0) for each in found["phases"][name]] for phase in PHASES[:-1]}
    whole = found["processor_seconds"][name]
    return known | {"update": [total - sum(rest) for total, *rest in zip(whole, *known.values(), strict=True)]}


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table of the page: one row per algorithm and phase, the whole iteration last."""
    shown = []
    for found in results:
        trl, ours = phase_seconds(found, "trl"), phase_seconds(found, "plaudit")
        whole = {name: found["processor_seconds"][name] for name in ("trl", "plaudit")}
        for phase in (*PHASES, "whole iteration"):
            theirs, mine = (whole["trl"], whole["plaudit"]) if phase not in trl else (trl[phase], ours[phase])
            # TRL's GRPO takes old log-probabilities from the update where there is one step per iteration.
            shown.append(
                {
                    "algorithm": found["algorithm"].upper(),
                    "phase": phase,
                    "TRL s": statistics.median(theirs),
                    "Plaudit s": statistics.median(mine),
                    "times faster": median_ratio(theirs, mine),
                    "goal": GOAL if phase == "whole iteration" else "–",
                    "tokens sampled, TRL / Plaudit": found["tokens"]["trl"] / found["tokens"]["plaudit"],
                }
            )
    return shown


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithms", nargs="*", metavar="ALGORITHM", help=", ".join(ALGORITHMS))
    parser.add_argument("--iterations", type=int, default=5, help="measured iterations of each")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the preference data")
    arguments = parser.parse_args()
    for name in arguments.algorithms or ALGORITHMS:
        found = measure(name, arguments.iterations, arguments.data)
        print(table(rows([found])), flush=True)
        command = f"python benchmarks/against_trl_rl.py {name} --iterations {arguments.iterations}"
        print(save(f"against_trl_rl-{name}", command, [found], peer=f"trl {TRL}").relative_to(ROOT))


if __name__ == "__main__":
    main()
