"""`plaudit score`: stream completions through a reward model."""

import sys
from pathlib import Path
from typing import Literal

from plaudit.configs.data import OnError


def score(
    model: str | None = None,
    *,
    reward: tuple[str, ...] = (),
    input: str | None = None,
    output: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    probabilities: bool = False,
    on_error: OnError = "refuse",
    too_long: Literal["refuse", "truncate_prompt", "truncate"] | None = None,
    max_length: int | None = None,
    token_budget: int = 8192,
    window: int = 256,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Score completions: `plaudit score MODEL < completions.jsonl > scores.jsonl`, or by rules: `plaudit score --reward
    length_penalty=0.01 --reward repetition < completions.jsonl`.

    Each input line holds `prompt` and `completion` (or `completions`, a list), and may hold `id`. Each gives one output
    line, in order: `{"id", "raw", "normalised"}`, or `{"id", "error"}` under `--on-error skip`. Memory does not grow
    with the number of lines. With `--reward` a line gets `"rewards": {name: number}`; its other keys are columns that
    rules may read (`answer`).

    Parameters
    ----------
    model
        Folder (or Hugging Face name) of a reward model, Plaudit's or somebody else's. Not needed with `--reward`.
    reward
        A rule (`length_penalty=0.01`, `target_length=50,unit=characters`, `numeric_match`, …), another reward model's
        folder, a server's address, or a function by name (`my_rewards.py:polite`); give the flag once for each.
    input
        Read this file or folder instead of the standard input: JSON Lines (also .gz), Parquet, CSV.
    output
        Write this file instead of the standard output.
    resume
        Go on behind the lines that `--output` holds already, after an interruption. Give the same input again.
    overwrite
        Replace a file that exists.
    probabilities
        Add `P(y_i|x)` over the completions of each line.
    on_error
        At a line that cannot be scored: `refuse` stops there, `skip` writes its error in its place and goes on.
    too_long
        Texts longer than the model reads: `refuse` them, `truncate_prompt` from the left, or `truncate` completions
        too. By default as saved with the model.
    max_length
        Most tokens of a text. By default as saved with the model.
    token_budget
        Most tokens in one forward pass.
    window
        Lines that are read, sorted by length and scored together.
    device
        `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
    dtype
        Number type of the backbone: float32, bfloat16 or float16. By default as saved.
    trust_remote_code
        Let code in the model's folder run.
    """
    if window < 1 or token_budget < 1:
        raise ValueError(f"--window {window} --token-budget {token_budget}: both must be at least 1")
    if input is None and sys.stdin.isatty():
        raise ValueError("nothing to score: plaudit score MODEL < completions.jsonl, or --input FILE")
    if model is None and not reward:
        raise ValueError("nothing to score with: plaudit score MODEL, or --reward RULE")
    if model is None and probabilities:
        raise ValueError("--probabilities needs a reward model: P(y|x) is made from its scores")
    if model is None and (too_long, max_length, dtype) != (None, None, None):
        raise ValueError("--too-long, --max-length and --dtype say how MODEL is opened, not what --reward names")
    from plaudit.evaluation.score_job import load_scoring_model, say, score_job

    rewards = None
    if reward:
        from plaudit.evaluation.score_rewards import build_rewards

        rewards = build_rewards(reward)
    loaded = None
    if model is not None:
        loaded = load_scoring_model(
            model,
            device=device,
            dtype=dtype,
            too_long=too_long,
            max_length=max_length,
            trust_remote_code=trust_remote_code,
        )
    tally = score_job(
        loaded,
        sys.stdin.buffer if input is None else input,
        None if output is not None else sys.stdout.buffer,
        output=output,
        resume=resume,
        overwrite=overwrite,
        on_error=on_error,
        probabilities=probabilities,
        token_budget=token_budget,
        window_rows=window,
        rewards=rewards,
        terminal=sys.stderr if sys.stderr.isatty() else None,
    )
    say(f"scored {tally.summary()}")
