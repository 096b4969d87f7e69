"""A value for every token: the hard backup is the best answer's, the soft one's policy the tilted optimum."""

import copy
import itertools
import math

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from plaudit.algorithms.head_q import HeadQ
from plaudit.configs.base import ConfigError, load_config
from plaudit.configs.q_learning import HeadQConfig
from plaudit.core.finite import NonFiniteError
from plaudit.core.q_learning import advantage_weighted_logprobs
from plaudit.models.causal_lm import CausalLM
from plaudit.models.policy import LanguagePolicy
from plaudit.models.q_heads import QHeads, with_action_values
from plaudit.rollout.text_policy import TextPolicy
from plaudit.rollout.token_mdp import TokenMDP
from plaudit.rollout.trajectory import new_trajectory
from tests.algorithms.problems import SMALL
from tests.training.conftest import SIZES, save_tokenizer


@pytest.mark.parametrize("backup", ["hard", "soft"])
def test_full_sweeps_reach_the_exact_values_of_every_prefix(backup):
    """Heads over one-hot states are a table: each update is a sweep, and the longest answer has three tokens."""
    mdp = TokenMDP(**SMALL)
    options = {"kl_coefficient": mdp.coefficient} if backup == "soft" else {}
    config = HeadQConfig(backup=backup, polyak=1.0, huber_threshold=1e6, discount=0.9, **options)
    heads = QHeads(mdp.num_states, mdp.vocabulary, dtype=torch.float64)
    learner = HeadQ(config, heads, torch.optim.SGD([heads.weight], lr=1.0))
    states = torch.arange(mdp.num_states).repeat_interleave(mdp.vocabulary)
    following = mdp.next_prefix.flatten()
    table, after = torch.eye(mdp.num_states, dtype=torch.float64), following.clamp(min=0)
    batch = new_trajectory(
        actions=torch.arange(mdp.vocabulary).repeat(mdp.num_states)[:, None],
        behaviour_logprobs=torch.zeros(len(states), 1, dtype=torch.float64),
        rewards=mdp.rewards.flatten()[:, None],
        continues=(following >= 0).double()[:, None],
        mask=torch.ones(len(states), 1, dtype=torch.bool),
    )
    reference = mdp.reference_logprobs[0][after][:, None] if backup == "soft" else None
    weights = torch.ones(len(states), 1, dtype=torch.float64)
    for _ in range(mdp.max_length):
        learner.update(
            table[states][:, None], table[after][:, None], batch, next_reference_logprobs=reference, weights=weights
        )
    exact = mdp.hard_solution(discount=0.9) if backup == "hard" else mdp.optimal_solution(discount=0.9)
    found = heads.action_values(table).detach()
    assert_close(found, exact.action_values[0], atol=1e-12, rtol=0)
    if backup == "soft":
        decoded = advantage_weighted_logprobs(mdp.reference_logprobs, found[None], scale=1 / mdp.coefficient)
        assert_close(decoded, exact.logprobs)


def listed(tmp_path, *, longest=2):
    """A Llama of 20 tokens, every answer to one prompt, and its states before and after each token."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(save_tokenizer(tmp_path))
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), **SIZES | {"hidden_size": 32})
    inner = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in inner.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model = CausalLM(inner, tokenizer, max_length=32).eval()
    end, count = tokenizer.eos_token_id, len(tokenizer)
    others = [token for token in range(count) if token != end]
    answers = [[*ids, end] for length in range(longest) for ids in itertools.product(others, repeat=length)]
    answers += [list(ids) for ids in itertools.product(others, repeat=longest)]
    mask = torch.arange(longest) < torch.tensor([len(ids) for ids in answers])[:, None]
    rewards = torch.zeros(len(answers), longest)
    rewards[torch.arange(len(answers)), mask.sum(1) - 1] = torch.randn(
        len(answers), generator=torch.Generator().manual_seed(1)
    )
    batch = new_trajectory(
        actions=torch.tensor([ids + [0] * (longest - len(ids)) for ids in answers]),
        behaviour_logprobs=torch.zeros(mask.shape),
        rewards=rewards,
        continues=(torch.arange(longest) < mask.sum(1, keepdim=True) - 1).float(),
        mask=mask,
        group_ids=torch.zeros(len(answers), dtype=torch.int64),
    )
    policy = TextPolicy(LanguagePolicy.build(model), prompts=[[5, 6]])
    states = policy.states(batch)
    return model, batch, states, torch.cat([states[:, 1:], torch.zeros_like(states[:, :1])], 1)


def answer_logprobs(model, batch):
    with torch.no_grad():
        found = TextPolicy(LanguagePolicy.build(model), prompts=[[5, 6]]).evaluate_all(batch).logprobs
    return found.masked_fill(~batch.mask, 0.0).sum(1).double()


@pytest.mark.parametrize("backup", ["hard", "soft"])
def test_a_head_on_a_language_model_finds_the_best_answer_or_the_tilted_policy(backup, tmp_path):
    """Two full sweeps over whitened states, which are as good as a table: the longest answer has two tokens."""
    model, batch, states, following = listed(tmp_path)
    beta, rewards = 0.5, batch.rewards.sum(1).double()
    seen = torch.cat([states[:1, 0], states[batch.mask[:, 1], 1].unique(dim=0)]).double()
    _, sizes, directions = torch.linalg.svd(seen, full_matrices=False)
    whiten = directions.T / sizes
    heads = QHeads(len(seen), model.head[0].shape[0], dtype=torch.float64)
    options = {"kl_coefficient": beta} if backup == "soft" else {}
    config = HeadQConfig(backup=backup, polyak=1.0, huber_threshold=1e6, **options)
    learner = HeadQ(config, heads, torch.optim.SGD([heads.weight], lr=1.0))
    # A first token stands in as many answers as begin with it.
    weights = batch.mask.double()
    weights[:, 0] /= torch.bincount(batch.actions[:, 0])[batch.actions[:, 0]]
    with torch.no_grad():
        reference = torch.log_softmax(following.double() @ model.head[0].double().T, -1) if backup == "soft" else None
    exact = batch.with_fields(rewards=batch.rewards.double(), continues=batch.continues.double())
    before, after = states.double() @ whiten, following.double() @ whiten
    for _ in range(2):
        learner.update(before, after, exact, next_reference_logprobs=reference, weights=weights)
    whole = QHeads(states.shape[2], len(heads.weight))
    with torch.no_grad():
        whole.weight.copy_(heads.weight @ whiten.T)
    first = whole.action_values(states[0, 0]).detach()
    if backup == "hard":
        assert first.max().item() == pytest.approx(rewards.max().item(), abs=1e-4)
        best = int(rewards.argmax())
        then = whole.action_values(states[best]).argmax(-1)
        assert torch.equal(then[batch.mask[best]], batch.actions[best][batch.mask[best]])
        return
    start = answer_logprobs(model, batch)
    assert start.exp().sum() == pytest.approx(1, abs=1e-5)
    own = answer_logprobs(with_action_values(model, whole, scale=1 / beta), batch)
    assert_close(own, torch.log_softmax(start + rewards / beta, 0), atol=1e-3, rtol=0)


def test_one_step_by_hand_and_what_is_refused():
    """`Q` and `Q⁻` differ, one step of two counts, and a large error is linear."""
    heads = QHeads(2, 2)
    with torch.no_grad():
        heads.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 4.0]]))
    learner = HeadQ(HeadQConfig(backup="hard", discount=0.5, polyak=0.25), heads, torch.optim.SGD([heads.weight], lr=1))
    with torch.no_grad():
        learner.learned.target.weight.copy_(torch.tensor([[0.0, 3.0], [0.0, 1.0]]))
    batch = new_trajectory(
        actions=torch.tensor([[0, 1]]),
        behaviour_logprobs=torch.zeros(1, 2),
        rewards=torch.tensor([[0.2, 9.0]]),
        continues=torch.ones(1, 2),
        mask=torch.tensor([[True, False]]),
    )
    states = torch.eye(2)[None]
    metrics = learner.update(states, states.flip(1), batch)
    # y = 0.2 + 0.5 · max(3, 1) = 1.7, Q = 1, so δ = -0.7.
    assert metrics == pytest.approx({"value/loss": 0.245, "value/absolute_error": 0.7, "value/mean_value": 1.0})
    assert_close(heads.weight.detach(), torch.tensor([[1.7, 0.0], [2.0, 4.0]]))
    assert_close(learner.learned.target.weight, torch.tensor([[0.425, 2.25], [0.5, 1.75]]))
    other = HeadQ(learner.config, QHeads(2, 2))
    other.learned.optimizer = torch.optim.SGD(other.learned.heads.parameters(), lr=1)
    other.load_state_dict(copy.deepcopy(learner.state_dict()) | {"optimizer": other.learned.optimizer.state_dict()})
    assert torch.equal(other.learned.target.weight, learner.learned.target.weight)
    with pytest.raises(NonFiniteError, match="Q-learning with a head"):
        learner.update(states, states, batch.with_fields(rewards=torch.full((1, 2), math.inf)))
    with pytest.raises(ValueError, match="the soft backup, and it alone"):
        learner.update(states, states, batch, next_reference_logprobs=torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="the soft backup, and it alone"):
        HeadQ(HeadQConfig(), heads).update(states, states, batch)
    with pytest.raises(ConfigError, match=r"kl_coefficient: 0\.1 is for backup: soft"):
        load_config(HeadQConfig, overrides={"backup": "hard", "kl_coefficient": 0.1})
