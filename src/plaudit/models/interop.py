"""What other tools need to score as Plaudit does: reward functions, and what texts must look like."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plaudit.data.records import Message, Prompt
from plaudit.data.tokenising import TextTooLongError, TokenisedGroup
from plaudit.models.scoring import score_groups

if TYPE_CHECKING:
    from plaudit.models.reward_model import RewardModel


def trl_reward_function(
    model: "RewardModel | str | Path",
    *,
    normalised: bool = False,
    end_token_ids: Collection[int] | None = None,
    token_budget: int = 8192,
    name: str = "plaudit_reward",
) -> Callable[..., list[float | None]]:
    """A reward function for TRL's `GRPOTrainer` and `RLOOTrainer` (`reward_funcs=`) that scores as in training.

    Given a folder, these trainers render texts by themselves: plain prompts without template, bos and end token,
    conversations with whatever the chat template puts behind the end token. This function renders with the model's
    own template and reads the score at the completion's own last token. Each distinct prompt is processed once, however
    many completions were sampled from it.

    Args:
        model: the reward model, or its folder.
        normalised: return normalised scores (0 is an average demonstration) instead of raw ones.
        end_token_ids: the policy's end tokens. Where given, completions whose ids do not end in one were cut off by the
            length limit, and are scored at their final token; by default every completion gets its end token.
        token_budget: most tokens in one forward.
        name: the name under which trainers log the reward.

    Returns:
        `f(prompts, completions, completion_ids=None, **columns)`. Prompts are texts or conversations, completions texts
        or lists of messages. One number per completion, the weighted total where there are several attributes; None
        (which trainers leave out, never 0) where a text is too long or nothing was said at all.
    """
    if isinstance(model, str | Path):
        from plaudit.models.reward_model import RewardModel

        model = RewardModel.from_pretrained(model)
    scorer = model
    ends = None if end_token_ids is None else frozenset(end_token_ids)

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions")
        if ends is not None and completion_ids is None:
            raise ValueError("end_token_ids were given, but the trainer hands over no completion_ids")
        groups: list[TokenisedGroup] = []
        places: list[int] = []
        for place, pair in enumerate(zip(prompts, completions, strict=True)):
            ids = completion_ids[place] if ends is not None and completion_ids is not None else None
            cut_off = ids is not None and (not len(ids) or ids[-1] not in (ends or ()))
            group = _tokenise(scorer, *pair, cut_off=cut_off)
            if group is not None:
                groups.append(group)
                places.append(place)
        rewards: list[float | None] = [None] * len(prompts)
        for place, raw in zip(places, score_groups(scorer, groups, token_budget=token_budget), strict=True):
            scores = scorer.normalise(raw) if normalised else raw
            rewards[place] = float(scorer.total(scores)[0])
        return rewards

    reward.__name__ = reward.__qualname__ = name
    return reward


def _tokenise(model: "RewardModel", prompt: Any, completion: Any, *, cut_off: bool) -> TokenisedGroup | None:
    """The one completion as a group; None where it has no reward."""
    before, text = as_prompt_and_text(prompt, completion)
    if text is None or (cut_off and not text):
        return None
    try:
        return model.text_tokeniser.group(before, [text], cut_off=[cut_off])
    except TextTooLongError:
        return None


def as_prompt_and_text(prompt: Any, completion: Any) -> tuple[Prompt, str | None]:
    """A prompt and a completion as trainers hand them over, as Plaudit's prompt and text.

    Args:
        prompt: text, or a conversation `[{"role", "content"}, …]`.
        completion: text, or the messages that followed; all but the last of them (tool calls and their results) belong
            to what the last one answers.

    Returns:
        The prompt, and the text; None for a completion without an assistant's text at its end.
    """
    if isinstance(completion, str):
        return (prompt if isinstance(prompt, str) else _messages(prompt)), completion
    if not completion:
        return (prompt if isinstance(prompt, str) else _messages(prompt)), None
    *earlier, last = _messages(completion)
    before = [Message("user", prompt)] if isinstance(prompt, str) else _messages(prompt)
    return (*before, *earlier), last.content if last.role == "assistant" else None


def _messages(conversation: Sequence[Any]) -> tuple[Message, ...]:
    return tuple(Message(str(turn["role"]), _content(turn.get("content"))) for turn in conversation)


def _content(content: Any) -> str:
    """Text of a turn: a string, nothing (a mere tool call), or a list of text parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        return "".join(str(part["text"]) for part in content)
    raise ValueError(f"a turn holds {str(content)[:80]!r}; expected text (images are not scored)")


def text_notes(model: "RewardModel") -> list[str]:
    """What whoever hands texts to plain tools must know, in sentences; empty for encoders.

    Tools read the score at the rightmost token that is not padding. They add no end token, some add a bos token that
    the text has already, and what a chat template writes behind its end token is where they would read.
    """
    end = model.text_tokeniser.end_token
    if end is None:
        return []
    notes = [f"texts must end in {end!r}, which other tools do not append"]
    block = model.text_tokeniser.group("a", ["b"]).blocks[0]
    ids = block.prefix + block.completions[0]
    text = model.tokenizer.decode(ids)
    if list(model.tokenizer(text)["input_ids"]) != ids:
        if list(model.tokenizer(text, add_special_tokens=False)["input_ids"]) == ids:
            notes.append("rendered texts hold every special token already: tokenise them with add_special_tokens=False")
        else:
            notes.append("this tokenizer reads rendered texts differently from prompt and completion apart: pass ids")
    if model.text_tokeniser.template == "chat":
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rendered = str(model.tokenizer.apply_chat_template(turns, tokenize=False))
        if not rendered.endswith(end):
            behind = rendered[rendered.rfind(end) + len(end) :] if end in rendered else "no end token"
            notes.append(
                f"its chat template writes {behind!r} where an answer ends, and tools that render conversations by "
                "themselves read there: use plaudit.models.interop.trl_reward_function"
            )
    return notes
