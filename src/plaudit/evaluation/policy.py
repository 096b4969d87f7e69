"""The job `plaudit evaluate policy`: let models answer held-out prompts, score, compare with the start, report."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from plaudit.configs.data import DataConfig
from plaudit.configs.evaluate_policy import START, EvaluatePolicyConfig
from plaudit.data.native import prompt_to_json, replacing
from plaudit.data.prompts import read_prompts, unique_prompts
from plaudit.data.records import Prompt, PromptRecord
from plaudit.evaluation.plots import slug
from plaudit.evaluation.policy_answers import (
    Answers,
    answer_prompts,
    comparable,
    given_answers,
    read_answers,
)
from plaudit.evaluation.policy_compare import CompareOptions, Scored, compare_policies, score_answers
from plaudit.evaluation.policy_report import (
    PolicyReport,
    pick_examples,
    summary_text,
    write_policy_report,
)
from plaudit.evaluation.running import Progress, pick_device, say
from plaudit.models.backbone import require_folder_or_hub_name
from plaudit.models.causal_lm import CausalLM
from plaudit.rewards.base import Reward, as_reward

Subject = CausalLM | Answers | Sequence[Sequence[str]]
"""What can be evaluated in memory: a language model, or its answers (one list of texts per prompt)."""

Item = TypeVar("Item")


def evaluate_policy(
    config: EvaluatePolicyConfig,
    *,
    dry_run: bool = False,
    policies: Mapping[str, Subject] | None = None,
    reference: Subject | None = None,
    rewards: Mapping[str, Any] | None = None,
    prompts: Sequence[Prompt | PromptRecord] | None = None,
) -> PolicyReport | None:
    """Measure policies against the model that they started from, and write `report.html`, JSON, CSV, plots, answers.

    Args:
        config: which models, prompts and rewards, and how.
        dry_run: read the prompts, say what would be done, and stop; returns None.
        policies: models or answers by name, beside those of the configuration. A model is left as it was.
        reference: the starting model or its answers; wins over the configuration's.
        rewards: by name, beside those of the configuration: whatever `as_reward` takes, such as a reward object or a
            function `f(prompts, completions, **columns) -> list[float | None]`.
        prompts: the held-out prompts; win over the configuration's data.

    Returns:
        The report, with every number as a Python object.

    Raises:
        ValueError: for prompts, models, answers or rewards that do not fit, with what to change.
    """
    records, read = _prompts(config, prompts)
    sources: dict[str, Subject | str] = {**dict(config.named_policies()), **(policies or {})}
    start: Subject | str | None = config.reference if reference is None else reference
    names = [*(name for name, _ in config.named_rewards()), *config.sums, *(rewards or {})]
    proxy, gold = _roles(config, names)
    _require(config, sources, start, names, policies or {}, rewards or {})
    if dry_run:
        _say_plan(config, records, sources, names)
        return None
    assert start is not None  # _require refuses it
    config.output.mkdir(parents=True, exist_ok=True)  # a place that cannot be written to shows before the work
    scorers = _build_rewards(config, rewards or {})
    notes: list[str] = []
    opened = _open(start, config)
    records = _fitting(opened, records, config, notes)
    scored: dict[str, Scored] = {}
    for name in (START, *sources):
        model = opened if name == START else _open(sources[name], config)
        answers = _answers(name, model, opened, records, config)
        scored[name] = score_answers(answers, records, scorers)
        say(f"{name}: {sum(map(len, answers.completions)):,} answers to {len(records):,} prompts")
        notes += [*_divergence_notes(name, model, opened, config), *_invalid_notes(name, scored[name])]
        _write_answers(config.output, name, scored[name], records)
    first = scored.pop(START)
    found = compare_policies(
        first, scored, records, start_name=START, proxy=proxy, gold=gold, options=_options(config)
    )  # fmt: skip
    report = PolicyReport(
        title="Did it help?",
        comparison=found,
        scored={START: first, **scored},
        examples=pick_examples(first, scored, records, found.judge, config.examples),
        data={**read, "prompts answered": len(records), **_settings(config, start, sources)},
        notes=[*notes, *_size_notes(records)],
        confidence=config.confidence,
    )
    path = write_policy_report(report, config.output)
    say(summary_text(report))
    say(f"report: {path}")
    return report


def _prompts(
    config: EvaluatePolicyConfig, prompts: Sequence[Prompt | PromptRecord] | None
) -> tuple[list[PromptRecord], dict[str, int]]:
    """The prompts to be answered, each once, and how many rows were read, used and refused."""
    counts = {"rows read": 0, "rows used": 0}
    if prompts is not None:
        records = [each if isinstance(each, PromptRecord) else PromptRecord(prompt=each) for each in prompts]
        counts = dict.fromkeys(counts, len(records))
    else:
        records = []
        for source in config.data:
            found = read_prompts(DataConfig(path=source) if isinstance(source, str) else source)
            records += found.records
            counts["rows read"] += found.read
            counts["rows used"] += found.used
            for reason, number in found.refused.items():
                counts[f"rows refused: {reason}"] = counts.get(f"rows refused: {reason}", 0) + number
    unique = unique_prompts(records)
    if not unique:
        raise ValueError("there is no prompt to answer: give --data with held-out prompts")
    return unique[: config.limit], {**counts, "different prompts": len(unique)}


def _roles(config: EvaluatePolicyConfig, names: Sequence[str]) -> tuple[str | None, str | None]:
    """The names of the proxy and of the gold reward among all rewards."""
    for key, wanted in (("proxy", config.proxy), ("gold", config.gold)):
        if wanted is not None and wanted not in names:
            raise ValueError(f"{key}: no reward is called {wanted!r}; the rewards are {', '.join(names) or 'none'}")
    gold = config.gold or ("gold" if "gold" in names else None)
    others = [name for name in names if name != gold] or list(names)
    proxy = config.proxy or ("proxy" if "proxy" in names else next(iter(others), None))
    return proxy, gold


def _require(
    config: EvaluatePolicyConfig,
    sources: Mapping[str, Subject | str],
    start: Subject | str | None,
    names: Sequence[str],
    policies: Mapping[str, Subject],
    rewards: Mapping[str, Any],
) -> None:
    """Find what would end the job late before it begins."""
    if not sources:
        raise ValueError("nothing to evaluate: name a policy (a folder, or JSON Lines of completions)")
    if start is None:
        raise ValueError("nothing to compare with: give --reference, the model that the policies started from")
    given = [name for name, _ in config.named_policies()]
    if twice := sorted(set(given) & set(policies)) or [name for name in policies if name == START]:
        raise ValueError(f"two policies are called {twice[0]!r}; call one of them something else")
    if repeated := sorted({name for name in names if list(names).count(name) > 1}):
        raise ValueError(f"two rewards are called {repeated[0]!r}; call one of them something else")
    if bad := [name for name in rewards if "/" in name]:
        raise ValueError(f"reward name {bad[0]!r}: it must not hold '/'")
    if config.output.exists() and not config.output.is_dir():
        raise ValueError(f"output: {config.output} is a file; name a folder")
    files = {name: slug(name) for name in (START, *sources)}
    if clash := [name for name in files if list(files.values()).count(files[name]) > 1]:
        raise ValueError(f"policies {clash[0]!r} and {clash[1]!r} would be written to one file; rename one of them")
    for place in (start, *sources.values()):
        if isinstance(place, str) and _is_file(place) and not Path(place).is_file():
            raise ValueError(f"{place}: no such file of completions")
        if isinstance(place, str) and not _is_file(place):
            require_folder_or_hub_name(place)


def _say_plan(
    config: EvaluatePolicyConfig, records: Sequence[PromptRecord], sources: Mapping[str, Any], names: Sequence[str]
) -> None:
    first, count = max(config.samples, config.best_of), len(records)
    say(
        f"would answer {count:,} prompts: {count * first:,} answers of the starting model, "
        f"{count * config.samples:,} of each of {len(sources)} policies ({', '.join(sources)}), of at most "
        f"{config.sampling.max_new_tokens} tokens; {len(names)} rewards ({', '.join(names) or 'none'})"
    )


def _build_rewards(config: EvaluatePolicyConfig, rewards: Mapping[str, Any]) -> dict[str, Reward]:
    from plaudit.rewards.build import build_reward

    found: dict[str, Reward] = {name: as_reward(text, name=name) for name, text in config.named_rewards()}
    found |= {name: build_reward(part) for name, part in config.sums.items()}
    return found | {name: as_reward(reward, name=name) for name, reward in rewards.items()}


def _is_file(place: str) -> bool:
    return place.endswith((".jsonl", ".jsonl.gz", ".ndjson", ".json"))


def _open(subject: Subject | str, config: EvaluatePolicyConfig) -> Subject | Path:
    """A model on its device, answers, or the path of a file of answers."""
    if not isinstance(subject, str):
        return subject
    if _is_file(subject):
        return Path(subject)
    model = CausalLM.from_pretrained(subject, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
    return model.to(pick_device(config.device)).eval()


def _fitting(
    start: Subject | Path, records: list[PromptRecord], config: EvaluatePolicyConfig, notes: list[str]
) -> list[PromptRecord]:
    """The prompts that leave the starting model room for an answer; the others are left out for all, and counted."""
    if not isinstance(start, CausalLM):
        return records
    tokeniser = start.text_tokeniser()
    room = start.max_length - config.sampling.max_new_tokens
    kept = [record for record in records if len(tokeniser.prompt(record.prompt)) <= room]
    if not kept:
        raise ValueError(
            f"no prompt leaves room for {config.sampling.max_new_tokens} new tokens within the {start.max_length} that "
            "the model reads; lower sampling.max_new_tokens"
        )
    if len(kept) < len(records):
        notes.append(f"{len(records) - len(kept):,} prompts are too long for the model and were left out.")
    return kept


def _answers(
    name: str,
    model: Subject | Path,
    start: Subject | Path,
    records: Sequence[PromptRecord],
    config: EvaluatePolicyConfig,
) -> Answers:
    prompts = [record.prompt for record in records]
    if isinstance(model, Path):
        return read_answers(model, prompts)
    if not isinstance(model, CausalLM):
        given = model if isinstance(model, Answers) else given_answers(model)
        if given.shape[0] != len(prompts):
            raise ValueError(
                f"{name} has answers to {given.shape[0]} prompts, but {len(prompts)} are measured (prompts are taken "
                "once each, at most `limit` of them, and those without room for an answer are left out)"
            )
        return given
    return answer_prompts(
        model,
        prompts,
        samples=max(config.samples, config.best_of) if name == START else config.samples,
        sampling=config.sampling,
        seed=config.seed,
        name=name,
        reference=start if isinstance(start, CausalLM) else None,
        token_budget=config.token_budget,
        max_rows=config.max_rows,
        progress=Progress(name, len(prompts), "prompts answered"),
    )


def _divergence_notes(
    name: str, model: Subject | Path, start: Subject | Path, config: EvaluatePolicyConfig
) -> list[str]:
    """Why a model has no divergence, where that could surprise."""
    if not isinstance(model, CausalLM) or not isinstance(start, CausalLM) or model is start:
        return []
    if comparable(model, start, config.sampling):
        return []
    if config.sampling.method != "sample" or config.sampling.filtered:
        return [f"{name} has no divergence: it can only be estimated on answers drawn from the whole distribution."]
    return [f"{name} has no divergence: its tokens are not those of the starting model."]


def _invalid_notes(name: str, scored: Scored) -> list[str]:
    notes = []
    for reward, problems in scored.problems.items():
        if total := sum(problems.values()):
            why, count = problems.most_common(1)[0]
            more = "" if count == total else f", {count:,} times"
            notes.append(f"{reward} has nothing to say about {total:,} answers of {name} ({why}{more}).")
    return notes


def _size_notes(records: Sequence[PromptRecord]) -> list[str]:
    groups = {record.group or place for place, record in enumerate(records)}
    few = f"Only {len(groups)} independent prompts: intervals from fewer than about 30 are too narrow."
    return [few] if len(groups) < 30 else []


def _options(config: EvaluatePolicyConfig) -> CompareOptions:
    return CompareOptions(
        samples=config.samples,
        best_of=config.best_of,
        length_control=config.length_control,
        resamples=config.resamples,
        confidence=config.confidence,
        seed=config.seed,
    )


def _settings(
    config: EvaluatePolicyConfig, start: Subject | str, sources: Mapping[str, Subject | str]
) -> dict[str, Any]:
    def shown(subject: Subject | str) -> str:
        if isinstance(subject, str):
            return subject
        return (subject.backbone_name or "a model") if isinstance(subject, CausalLM) else "answers made elsewhere"

    sampling = config.sampling
    return {
        "starting model": shown(start),
        **{f"policy {name}": shown(subject) for name, subject in sources.items()},
        "answers to each prompt": config.samples,
        "of the starting model": max(config.samples, config.best_of),
        "decoding": f"{sampling.method}, temperature {sampling.temperature:g}, up to {sampling.max_new_tokens} tokens",
        "seed": config.seed,
    }


def _write_answers(output: Path, name: str, scored: Scored, records: Sequence[PromptRecord]) -> None:
    """All answers of a model as JSON Lines, in the form that `policies` reads, with their rewards; invalid is null."""
    path = output / "answers" / f"{slug(name)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row, record in enumerate(records):
            texts = scored.answers.completions[row]
            rewards = {
                reward: [None if value != value else value for value in table[row, : len(texts)].tolist()]
                for reward, table in scored.rewards.items()
            }
            line = {"prompt": prompt_to_json(record.prompt), "completions": list(texts)}
            line |= {"finished": list(scored.answers.finished[row]), "rewards": rewards}
            line = line if record.id is None else {"id": record.id, **line}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
