import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv

from plaudit.core.returns import discounted_returns
from plaudit.models.control import ActorCriticNetwork
from plaudit.rollout.control import ControlPolicy
from plaudit.rollout.dialogue import DialogueMDP
from plaudit.rollout.environments import (
    Collector,
    DialogueEnvironment,
    TokenMDPEnvironment,
    evaluate_policy,
    make_environments,
)
from plaudit.rollout.tabular import TabularPolicy
from plaudit.rollout.token_mdp import TokenMDP
from plaudit.rollout.trajectory import Sampled


class Clock(gymnasium.Env):
    """Counts its steps; action 1 terminates, and the limit truncates. The observation tells episode and step."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, limit=4):
        self.limit, self.episode = limit, -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action):
        self.time += 1
        observation = np.array([self.episode, self.time], np.float32)
        return observation, 10.0 * self.episode + self.time, bool(action), self.time >= self.limit, {}


class Script:
    """Plays fixed actions, one list per environment; the value of an observation is 100 episode + step."""

    def __init__(self, *actions):
        self.actions, self.turn = torch.tensor(actions), 0

    def sample(self, observations, *, generator=None):
        actions = self.actions[:, self.turn]
        self.turn += 1
        return Sampled(actions, torch.zeros(len(actions)), self.values(observations))

    def values(self, observations):
        return observations @ torch.tensor([100.0, 1.0])


class Counter(Script):
    """Remembers how many steps its episode has had, and hands that out as the option in force."""

    def __init__(self, *actions):
        super().__init__(*actions)
        self.count = torch.zeros(len(actions), dtype=torch.int64)

    def sample(self, observations, *, generator=None):
        found = super().sample(observations)._replace(columns={"options": self.count.clone()})
        self.count += 1
        return found

    def memory(self, num_rows):
        return self.count

    def end_episodes(self, ended):
        self.count[ended] = 0


def test_a_policy_with_a_memory_begins_every_episode_afresh_and_its_columns_are_kept():
    policy = Counter([0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1, 0])
    collector = Collector(make_environments(Clock, 2))
    found = collector.collect(policy, 3)
    assert found.options.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert found.state.tolist() == [0, 0]
    found = collector.collect(policy, 4)
    assert found.state.tolist() == [3, 1]
    assert found.options.tolist() == [[3, 0, 1, 2], [1, 2, 3, 0]]


def test_terminations_and_truncations_are_kept_apart_by_hand():
    # Environment 0 is cut off at step 4; environment 1 terminates at step 2, and at the very step of its limit.
    policy = Script([0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1])
    collector = Collector(make_environments(Clock, 2))
    found = collector.collect(policy, 6)
    assert found.truncated.tolist() == [[False, False, False, True, False, False], [False] * 6]
    assert found.continues.tolist() == [[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 0]]
    assert found.observations[0, :, 0].tolist() == [0, 0, 0, 0, 1, 1]
    assert found.observations[0, :, 1].tolist() == [0, 1, 2, 3, 0, 1]
    # What follows an end is the final observation of the old episode, not the first of the next.
    assert found.next_observations[0].tolist() == [[0, 1], [0, 2], [0, 3], [0, 4], [1, 1], [1, 2]]
    assert found.next_observations[1].tolist() == [[0, 1], [0, 2], [1, 1], [1, 2], [1, 3], [1, 4]]
    assert found.next_values[0].tolist() == [1, 2, 3, 4, 101, 102]
    assert found.values[0].tolist() == [0, 1, 2, 3, 100, 101]
    assert found.rewards[0].tolist() == [1, 2, 3, 4, 11, 12]
    assert collector.episode_returns == [3, 10, 50]
    assert collector.episode_lengths == [2, 4, 4]
    assert collector.num_steps_taken == 12
    # Bootstraps: 4 + 4 at the truncation, 12 + 102 where the data breaks off, nothing at the ends.
    data = (found.rewards, found.next_values, found.continues, found.truncated, found.mask)
    returns = discounted_returns(*data, discount=1.0)
    assert returns.tolist() == [[14, 13, 11, 8, 125, 114], [3, 2, 50, 39, 27, 14]]
    # The next call goes on where this one stopped: with the third step of the second episode.
    policy.turn = 0
    assert collector.collect(policy, 2).observations[0].tolist() == [[1, 2], [1, 3]]


@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "FrozenLake-v1"])
def test_collected_steps_equal_those_of_single_environments(name):
    """Each environment of the vector is replayed alone with the same seed and actions."""
    length = 120
    environments = make_environments(name, 3, max_episode_steps=50)
    size = environments.single_action_space.n

    class Random:
        def sample(self, observations, *, generator=None):
            return Sampled(torch.randint(size, (3,), generator=generator), torch.zeros(3), torch.zeros(3))

        def values(self, observations):
            return torch.zeros(observations.shape[:2])

    found = Collector(environments, seed=7).collect(Random(), length)
    assert found.observations.dtype == (torch.int64 if name == "FrozenLake-v1" else torch.float32)
    for row in range(3):
        alone = gymnasium.make(name, max_episode_steps=50)
        observation, _ = alone.reset(seed=7 + row)
        for t in range(length):
            np.testing.assert_array_equal(found.observations[row, t].numpy(), observation)
            observation, reward, terminated, truncated, _ = alone.step(int(found.actions[row, t]))
            np.testing.assert_array_equal(found.next_observations[row, t].numpy(), observation)
            assert found.rewards[row, t].item() == pytest.approx(reward)
            assert bool(found.continues[row, t] == 0) is bool(terminated)
            assert bool(found.truncated[row, t]) is bool(truncated and not terminated)
            if terminated or truncated:
                observation, _ = alone.reset()
    ended = (found.continues == 0) | found.truncated
    assert ended.any()
    assert found.mask.all()


def test_collecting_is_repeatable():
    policy = TabularPolicy(torch.zeros(16, 4))
    first, second = (Collector(make_environments("FrozenLake-v1", 2), seed=3).collect(policy, 40) for _ in range(2))
    other = Collector(make_environments("FrozenLake-v1", 2), seed=4).collect(policy, 40)
    assert torch.equal(first.actions, second.actions)
    assert torch.equal(first.observations, second.observations)
    assert not torch.equal(first.actions, other.actions)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{}, {"num_prompts": 3}, {"reward": "key_and_door", "vocabulary": 3}])
def test_token_mdp_passes_gymnasium_s_own_check(options):
    check_env(TokenMDPEnvironment(TokenMDP(**options)), skip_render_check=True)


def test_token_mdp_as_an_environment_is_the_same_problem():
    mdp = TokenMDP(vocabulary=3, max_length=3, num_prompts=2)
    environment = TokenMDPEnvironment(mdp)
    for prompt in range(2):
        for string, reward in zip(mdp.strings, mdp.string_rewards[prompt].tolist(), strict=True):
            observation, info = environment.reset(options={"prompt": prompt})
            assert (observation, info["prompt"]) == (prompt * mdp.num_prefixes, prompt)
            for place, token in enumerate(string):
                assert observation == prompt * mdp.num_prefixes + mdp.prefixes.index(string[:place])
                observation, earned, terminated, truncated, _ = environment.step(np.int64(token))
                assert terminated is (place + 1 == len(string))
                assert not truncated
            assert earned == reward


def test_evaluation_of_the_exact_optimum_matches_its_expected_reward():
    mdp = TokenMDP()
    policy = mdp.policy()
    optimum = mdp.optimal_solution().logprobs
    with torch.no_grad():
        policy.logits.copy_(optimum.flatten(0, 1))
    returns = evaluate_policy(lambda: TokenMDPEnvironment(mdp), policy, num_episodes=800, num_environments=32)
    assert len(returns) == 800
    error = torch.tensor(returns).std().item() / 800**0.5
    assert np.mean(returns) == pytest.approx(mdp.expected_reward(optimum).item(), abs=4 * error)
    assert 0 < error < 0.1


def test_evaluation_counts_long_and_short_environments_alike():
    """Taking the episodes that end first would favour short ones: of 2 environments each plays its share."""
    policy = Script([1] * 40, [0] * 40)
    returns = evaluate_policy(Clock, policy, num_episodes=5, num_environments=2)
    assert returns == [1, 10, 11, 50, 21]


class Round(gymnasium.Env):
    """Pays 1 a step and never ends."""

    observation_space, action_space = spaces.Discrete(1), spaces.Discrete(2)

    def reset(self, **options):
        super().reset(**options)
        return np.int64(0), {}

    def step(self, action):
        return np.int64(0), 1.0, False, False, {}


def test_an_evaluation_ends_where_episodes_do_not():
    policy = ControlPolicy(ActorCriticNetwork(1, 2), greedy=True)
    assert evaluate_policy(Round, policy, num_episodes=3, num_environments=2, episode_limit=7) == [7.0, 7.0, 7.0]
    cart = ControlPolicy(ActorCriticNetwork(4, 2), greedy=True)
    plain = evaluate_policy("CartPole-v1", cart, num_episodes=4)
    # A limit of its own stands, whatever is said of environments without one.
    assert evaluate_policy("CartPole-v1", cart, num_episodes=4, episode_limit=5) == plain
    assert min(plain) > 5
    assert evaluate_policy("CartPole-v1", cart, num_episodes=2, max_episode_steps=3) == [3.0, 3.0]


def test_faults_are_named():
    with pytest.raises(ValueError, match="num_environments must be at least 1"):
        make_environments("CartPole-v1", 0)
    with pytest.raises(ValueError, match="Discrete actions are needed"):
        make_environments("Pendulum-v1", 1)
    with pytest.raises(ValueError, match="SAME_STEP"):
        Collector(SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")]))


def test_a_dialogue_as_an_environment_has_the_exact_value_and_the_user_of_the_problem():
    mdp = DialogueMDP(seed=1)
    check_env(DialogueEnvironment(mdp), skip_render_check=True)
    policy = mdp.policy()
    exact = mdp.objective(mdp.reference_logprobs, coefficient=0.0).item()
    played = evaluate_policy(lambda: DialogueEnvironment(mdp), policy, num_episodes=4000, seed=3)
    deviation = torch.tensor(played).std().item()
    assert np.mean(played) == pytest.approx(exact, abs=4 * deviation / 4000**0.5)
    # The first reply, given the first word, against its exact chances.
    environments = make_environments(lambda: DialogueEnvironment(mdp), 8)
    found = Collector(environments, seed=0).collect(policy, 999)
    first = found.observations == 0
    for word in range(mdp.num_words):
        following = found.next_observations[first & (found.actions == word)]
        for reply in range(mdp.num_replies):
            share = (following == mdp.next_state[0, word, reply]).double().mean().item()
            chance = mdp.reply_probabilities[0, word, reply].item()
            assert share == pytest.approx(chance, abs=4 * (chance * (1 - chance) / len(following)) ** 0.5)
