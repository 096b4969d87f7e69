"""Plain reward functions, `f(prompts, completions, **columns) -> list[float | None]`, sync and async."""

import asyncio
import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from plaudit.data.records import Prompt
from plaudit.rewards.base import Sample, Score, check_score, score_values


@dataclass(frozen=True)
class FunctionReward:
    """A plain function as a reward.

    The function is called with keywords, as TRL calls its reward functions: `prompts` (texts, or lists of
    `{"role", "content"}`), `completions` (texts), `finished` (truth values) and every column of the samples as a list
    with None where a sample lacks it. Without `**columns` it gets only those that it names. It returns one number per
    sample, or None where it has no reward to give. An async function is awaited.

    Attributes:
        function: the function.
        name: what it is called in logs and errors.
        conversational: whether completions of conversations are lists of one assistant message instead of text.
    """

    function: Callable[..., Any]
    name: str
    conversational: bool = False

    is_checked = True

    @property
    def waits(self) -> bool:
        """Whether it spends its time waiting, so that others may run beside it."""
        call = getattr(self.function, "__call__", None)  # noqa: B004
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(call)

    def __call__(self, samples: Sequence[Sample]) -> Score:
        """One reward per sample.

        Raises:
            ValueError: if the function asks for a column that no sample has, or gives back something else than one
                number or None per sample.
        """
        if not samples:
            return score_values([], [], name=self.name)
        values = self.function(**self._arguments(samples))
        if inspect.isawaitable(values):
            values = run_awaitable(values)
        try:
            listed = list(values)
        except TypeError:
            raise ValueError(
                f"reward {self.name!r} returned {type(values).__name__}; it must return a list with one number or "
                "None per completion"
            ) from None
        return score_values(samples, listed, name=self.name)

    def _arguments(self, samples: Sequence[Sample]) -> dict[str, Any]:
        columns = dict.fromkeys(key for sample in samples for key in sample.columns)
        given: dict[str, Any] = {key: [sample.columns.get(key) for sample in samples] for key in columns}
        given["prompts"] = [_plain_prompt(sample.prompt) for sample in samples]
        given["completions"] = [
            [{"role": "assistant", "content": sample.completion}]
            if self.conversational and not isinstance(sample.prompt, str)
            else sample.completion
            for sample in samples
        ]
        given["finished"] = [sample.finished for sample in samples]
        taken, everything, required = _keywords_of(self.function)
        if missing := sorted(required - set(given)):
            raise ValueError(
                f"reward {self.name!r} asks for {missing}, but the data has only {sorted(set(columns))} beside the "
                f"prompts; add the column or give the argument a default"
            )
        # A keyword that was given before (an option) is not what a column of that name holds.
        options = self.function.keywords if isinstance(self.function, partial) else {}
        return {key: each for key, each in given.items() if (everything or key in taken) and key not in options}


@dataclass(frozen=True)
class CheckedReward:
    """Somebody's own `Reward` with its scores checked.

    Attributes:
        reward: from samples to a `Score`.
        name: what it is called in logs and errors.
    """

    reward: Callable[[Sequence[Sample]], Any]
    name: str

    is_checked = True

    def __call__(self, samples: Sequence[Sample]) -> Score:
        """The reward's own score.

        Raises:
            ValueError: if it is no `Score`, has the wrong length, or is not finite.
        """
        score = self.reward(samples)
        if not isinstance(score, Score):
            raise ValueError(f"reward {self.name!r} returned {type(score).__name__}; it must return a Score")
        return check_score(score, samples, name=self.name)

    def __getattr__(self, name: str) -> Any:
        # What a reward of one's own may have besides: without it, its state would be missing from checkpoints.
        if name in ("check", "state_dict", "load_state_dict", "waits"):
            return getattr(self.reward, name)
        raise AttributeError(name)


@dataclass(frozen=True)
class SampleReward:
    """A function of one sample as a reward; how the rules are written.

    Attributes:
        function: from a sample to its reward, or None where it has none.
        name: what it is called in logs and errors.
    """

    function: Callable[[Sample], float | None]
    name: str

    is_checked = True

    def __call__(self, samples: Sequence[Sample]) -> Score:
        """The function's value for each sample."""
        return score_values(samples, [self.function(sample) for sample in samples], name=self.name)


def takes_samples(function: Callable[..., Any]) -> bool:
    """Whether this is a function of `samples`, and not one of prompts and completions."""
    taken, _, required = _keywords_of(function)
    return required == {"samples"} or ("samples" in taken and not required & {"prompts", "completions"})


_FUNCTION_NAME = re.compile(r"(?:.+\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):[A-Za-z_]\w*")


def names_function(text: str) -> bool:
    """Whether this is the name of a function: `folder/file.py:function` or `module:function`."""
    return _FUNCTION_NAME.fullmatch(text) is not None


def function_named(text: str) -> Callable[..., Any]:
    """The function that `folder/file.py:function` or `module:function` names; a file's code runs once.

    Raises:
        ValueError: if there is no such file, module or function, it is no Python, or what is called so is no function.
    """
    place, _, attribute = text.rpartition(":")
    own = place.endswith(".py")
    hint = "" if own else "; a file of your own is named with its ending, file.py:function"
    try:
        module = _module_in(Path(place).resolve()) if own else importlib.import_module(place)
    except Exception as error:  # whatever the code of somebody else raises
        raise ValueError(f"{text!r}: {_said(error)}{hint}") from error
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        raise ValueError(f"{text!r}: {place} has no {attribute!r}" + (f"; did you mean {near[0]}?" if near else hint))
    found: Callable[..., Any] = getattr(module, attribute)
    if inspect.isclass(found) or not callable(found):
        what = "a class" if inspect.isclass(found) else type(found).__name__
        raise ValueError(f"{text!r} is {what}, not a function")
    return found


def _said(error: Exception) -> str:
    """What a module that could not be imported says, with the place in it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if last.filename == __file__ or last.filename.startswith("<frozen"):
        return str(error)
    return f"{Path(last.filename).name}, line {last.lineno}: {type(error).__name__}: {error}"


@cache
def _module_in(path: Path) -> ModuleType:
    if not path.is_file():
        raise ImportError(f"there is no file {path}")
    # A name of its own: a file that is called like an installed module must not take its place.
    spec = importlib.util.spec_from_file_location(f"{__name__}:{path}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the types of their fields
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def run_awaitable(awaitable: Awaitable[Any]) -> Any:
    """Wait for a result, also where a loop is running already (in a notebook): then in a thread of its own."""

    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, wait()).result()


def _keywords_of(function: Callable[..., Any]) -> tuple[set[str], bool, set[str]]:
    """Names that can be given by keyword, whether any name can, and those that have no default."""
    parameters = inspect.signature(function).parameters.values()
    fixed = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if fixed:
        raise ValueError(f"reward function {function!r} takes {fixed} by position only; rewards are called by keyword")
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {p.name for p in named}, everything, {p.name for p in named if p.default is p.empty}


def _plain_prompt(prompt: Prompt) -> Any:
    if isinstance(prompt, str):
        return prompt
    return [{"role": message.role, "content": message.content} for message in prompt]
