"""Best of n on the built-in world: does the reward model pick the better of a policy's own answers?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from plaudit.demo.world_gold import gold_reward
from plaudit.models.causal_lm import CausalLM
from plaudit.models.reward_model import RewardModel
from plaudit.models.states import unwrap


@dataclass(frozen=True)
class BestOf:
    """Answers to `P` prompts, `n` each, with what the reward model and the gold reward say of them.

    Attributes:
        prompts: `P` texts.
        answers: `P` lists of `n` texts.
        rewards: `P` lists of `n` normalised rewards of the model.
        gold: `P` lists of `n` gold rewards.
    """

    prompts: list[str]
    answers: list[list[str]]
    rewards: list[list[float]]
    gold: list[list[float]]

    @property
    def mean_gold(self) -> float:
        """Gold reward of a random answer."""
        return sum(sum(row) / len(row) for row in self.gold) / len(self.gold)

    @property
    def chosen_gold(self) -> float:
        """Gold reward of the answer that the reward model likes best."""
        chosen = [
            gold[max(range(len(gold)), key=rewards.__getitem__)]
            for gold, rewards in zip(self.gold, self.rewards, strict=True)
        ]
        return sum(chosen) / len(chosen)

    @property
    def best_gold(self) -> float:
        """Gold reward of the best answer there was."""
        return sum(map(max, self.gold)) / len(self.gold)


def best_of_n(
    policy: CausalLM, reward_model: RewardModel, prompts: Sequence[str], *, samples: int, seed: int = 0
) -> BestOf:
    """Sample `n` answers to every prompt at temperature 1 and score them by the reward model and by gold.

    Args:
        policy: the language model that answers.
        reward_model: the model that scores; normalised rewards are reported.
        prompts: `P` texts of the built-in world.
        samples: `n`.
        seed: of the sampling.
    """
    answers = sample_answers(policy, prompts, samples=samples, seed=seed)
    rewards = [result.normalised.tolist() for result in reward_model.score(list(prompts), answers)]
    gold = [[gold_reward(prompt, text) for text in row] for prompt, row in zip(prompts, answers, strict=True)]
    return BestOf(list(prompts), answers, rewards, gold)


@torch.no_grad()
def sample_answers(
    policy: CausalLM, prompts: Sequence[str], *, samples: int, max_new_tokens: int = 96, seed: int = 0
) -> list[list[str]]:
    """`n` answers to every prompt, sampled at temperature 1 by transformers' `generate`; `P` lists of `n` texts."""
    tokeniser = policy.text_tokeniser()
    rows = [tokeniser.prompt(prompt) for prompt in prompts]
    width = max(map(len, rows))
    pad = policy.tokenizer.pad_token_id
    device = next(policy.parameters()).device
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = unwrap(policy.model).generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            num_return_sequences=samples,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokeniser.end_token_id,
            pad_token_id=pad,
        )
    texts = [text.strip() for text in policy.tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)]
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]
