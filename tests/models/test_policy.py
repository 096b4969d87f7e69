"""Policies over packed samples against plain rows; critics; references."""

import copy

import pytest
import torch

from plaudit.configs.model import LoraConfig, RewardModelConfig
from plaudit.core.layout import PackedBatch
from plaudit.models.causal_lm import CausalLM
from plaudit.models.lora import wrap_lora
from plaudit.models.policy import LanguagePolicy, ReferencePolicy, from_steps, steps_mask, to_steps
from plaudit.models.reward_model import RewardModel
from tests.models.conftest import random_batch, texts_of, word_tokenizer
from tests.rollout.language_models import tiny_lm

SHAPES = [(5, [3, 1, 6]), (2, [4])]


def by_hand(model: CausalLM, batch: PackedBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies from plain rows of one text each, in the order of the packed row."""
    logprobs, entropies = [], []
    layout = batch.layout
    for text, start, end in zip(texts_of(batch), layout.completion_starts, layout.completion_ends, strict=True):
        table = (model.model(text[None]).logits[0] / temperature).log_softmax(-1)  # type: ignore[operator]
        length = int(end - start)
        rows = table[-length - 1 : -1]
        logprobs.append(rows.gather(1, text[-length:, None]).squeeze(1))
        entropies.append(-(rows.exp() * rows).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


@pytest.mark.parametrize(("name", "packed"), [("llama", "auto"), ("gpt2", "padded"), ("gemma2-window-softcap", "auto")])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_terms_are_those_of_plain_rows(name: str, packed: str, temperature: float) -> None:
    model = tiny_lm(name, attn_implementation=packed)
    batch = random_batch(SHAPES)
    output = LanguagePolicy(model).evaluate(batch, temperature)
    logprobs, entropy = by_hand(model, batch, temperature)
    torch.testing.assert_close(output.logprobs, logprobs, atol=2e-5, rtol=0)
    torch.testing.assert_close(output.entropy, entropy, atol=2e-5, rtol=0)
    assert output.values is None


def test_tables() -> None:
    output = LanguagePolicy(tiny_lm()).evaluate(random_batch(SHAPES))
    table, mask = to_steps(output.logprobs, output.spans, fill=-9.0), steps_mask(output.spans)
    assert table.shape == (4, 6)
    assert mask.sum(1).tolist() == [3, 1, 6, 4]
    assert bool((table[~mask] == -9.0).all())
    assert torch.equal(from_steps(table, output.spans), output.logprobs)


def test_gradients_reach_policy_and_critic() -> None:
    policy = LanguagePolicy.build(tiny_lm(), critic="separate")
    output = policy.evaluate(random_batch(SHAPES))
    assert output.values is not None
    (output.logprobs.mean() + output.entropy.mean() + (output.values - 1).square().mean()).backward()
    assert policy.critic is not None
    gradient = policy.critic.head.weight.grad
    assert gradient is not None
    assert bool((gradient != 0).any())
    assert all(parameter.grad is not None for parameter in policy.language_model.parameters())


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_values_start_at_zero_and_read_the_predicting_state(kind: str) -> None:
    policy = LanguagePolicy.build(tiny_lm(), critic=kind)  # type: ignore[arg-type]
    batch = random_batch(SHAPES)
    assert policy.critic is not None
    assert bool((policy.values(batch) == 0).all())
    torch.nn.init.normal_(policy.critic.head.weight)
    values = policy.values(batch)
    output = policy.evaluate(batch)
    assert output.values is not None
    torch.testing.assert_close(values, output.values)
    layout = batch.layout
    wanted = []
    for text, start, end in zip(texts_of(batch), layout.completion_starts, layout.completion_ends, strict=True):
        states = policy.language_model.base(input_ids=text[None]).last_hidden_state[0]
        wanted.append(policy.critic(states)[-int(end - start) - 1 : -1])
    torch.testing.assert_close(values, torch.cat(wanted), atol=2e-5, rtol=0)
    # The value is of the state before the token: the token itself does not change it.
    changed = copy.deepcopy(batch)
    changed.input_ids[layout.completion_ends - 1] = 3
    last = output.spans.lengths.cumsum(0) - 1
    torch.testing.assert_close(policy.values(changed)[last], values[last], atol=1e-6, rtol=0)


def test_a_separate_critic_shares_no_weight() -> None:
    policy = LanguagePolicy.build(tiny_lm(), critic="separate")
    assert policy.critic is not None
    mine = {parameter.data_ptr() for parameter in policy.language_model.parameters()}
    assert not mine & {parameter.data_ptr() for parameter in policy.critic.parameters()}
    shared = LanguagePolicy.build(tiny_lm(), critic="shared")
    assert shared.critic is not None
    assert sum(parameter.numel() for parameter in shared.critic.parameters()) == 33


def reward_model(tokenizer_folder: str) -> RewardModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return RewardModel.from_backbone(
        RewardModelConfig(
            model_type="llama",
            backbone_config={"vocab_size": 64, "max_position_embeddings": 64, **sizes},
            tokenizer=tokenizer_folder,
        )
    )


def test_a_critic_starts_from_the_reward_model(decoder_folder: str) -> None:
    rewards = reward_model(decoder_folder)
    policy = LanguagePolicy.build(tiny_lm(), critic="separate", reward_model=rewards)
    assert policy.critic is not None
    batch = random_batch(SHAPES)
    torch.testing.assert_close(policy.critic.states(batch), rewards.states(batch))
    assert policy.evaluate(batch).values is not None
    with pytest.raises(ValueError, match="separate critic"):
        LanguagePolicy.build(tiny_lm(), critic="shared", reward_model=rewards)
    other = word_tokenizer()
    other.add_tokens(["more"])
    rewards.tokenizer = other
    with pytest.raises(ValueError, match="tokenizer is not the policy's"):
        LanguagePolicy.build(tiny_lm(), critic="separate", reward_model=rewards)


def test_a_copied_reference_stays() -> None:
    model = tiny_lm()
    reference = ReferencePolicy(model)
    policy = LanguagePolicy(model)
    batch = random_batch(SHAPES)
    before = policy.evaluate(batch, 0.8).logprobs.detach()
    torch.testing.assert_close(reference.logprobs(batch, 0.8), before)
    with torch.no_grad():
        model.model.lm_head.weight.add_(0.1 * torch.randn(model.model.lm_head.weight.shape))  # type: ignore[union-attr, operator]
    torch.testing.assert_close(reference.logprobs(batch, 0.8), before)
    assert not torch.allclose(policy.evaluate(batch, 0.8).logprobs, before)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert not reference.train().training


def test_under_adapters_the_base_is_the_reference() -> None:
    pytest.importorskip("peft")
    model = tiny_lm()
    batch = random_batch(SHAPES)
    before = LanguagePolicy(model).evaluate(batch).logprobs.detach()
    model.model = wrap_lora(model.model, LoraConfig(rank=2))
    reference = ReferencePolicy(model)
    assert not list(reference.parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.train()
    torch.testing.assert_close(reference.logprobs(batch), before)
    assert model.training
    assert not torch.allclose(LanguagePolicy(model).evaluate(batch).logprobs, before, atol=1e-3)
    # A separate critic gets the adapters' weights merged into its own backbone, all of them trainable.
    critic = LanguagePolicy.build(model, critic="separate").critic
    assert critic is not None
    torch.testing.assert_close(critic.states(batch), model.eval()(batch), atol=1e-4, rtol=0)
    assert all(parameter.requires_grad for parameter in critic.parameters())


def test_an_empty_prompt_predicts_no_first_token() -> None:
    policy = LanguagePolicy.build(tiny_lm(), critic="shared")
    output = policy.evaluate(random_batch([(0, [3])]))
    assert output.logprobs[0] == output.entropy[0] == 0
    assert bool((output.logprobs[1:] < 0).all())
