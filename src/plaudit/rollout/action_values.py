"""Policies whose critic has a value for each action: of a table, and of a small network that tells how it chose."""

import copy
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from plaudit.models.control import ActorActionValueNetwork
from plaudit.rollout.tabular import TabularPolicy
from plaudit.rollout.trajectory import Evaluation, Sampled, Trajectory, evaluation_of, observations_of


class ActionTables(NamedTuple):
    """What is known of every action at the `N` counted steps of a trajectory, in the order of `table[mask]`.

    Attributes:
        logprobs: `[N, A]`, `log π` with gradient.
        action_values: `[N, A]`, `Q` with gradient.
        average_logprobs: `[N, A]`, of the average policy; None without a trust region.
        reference_logprobs: `[N, A]`, where there is a penalty.
    """

    logprobs: Tensor
    action_values: Tensor
    average_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None


class ActionTablePolicy(Protocol):
    """What an update needs of a policy whose critic has a value for each action."""

    def tables(self, trajectory: Trajectory) -> ActionTables:
        """What it says of every action at the counted steps, with gradients into policy and critic."""
        ...

    def logprobs(self, trajectory: Trajectory) -> Tensor:
        """`log π` `[N, A]` of every action at the counted steps, and nothing of the others."""
        ...

    def move_average(self, decay: float) -> None:
        """`θ_average ← α θ_average + (1 - α) θ`; nothing where there is no average policy."""
        ...

    def average_state(self) -> dict[str, Tensor]:
        """Weights of the average policy, empty where there is none."""
        ...

    def load_average_state(self, state: dict[str, Tensor]) -> None:
        """Go on from `average_state`."""
        ...


class ActionValuePolicy(nn.Module):
    """`π(a|o)` by the actor and `V(o) = Σ_a π(a|o) Q(o, a)` by the critic; satisfies `StepPolicy`.

    Its whole distribution at each step goes into the trajectory as `behaviour_logits`. Discrete observations are
    one-hot vectors of the network's size.

    Attributes:
        network: actor and critic.
        greedy: whether `sample` takes the likeliest action instead of drawing one.
    """

    def __init__(self, network: ActorActionValueNetwork, *, greedy: bool = False) -> None:
        """Act by a network; `ActionValuePolicy(policy.network, greedy=True)` is the same policy for evaluation."""
        super().__init__()
        self.network = network
        self.greedy = greedy

    @torch.no_grad()
    def sample(self, observations: Tensor, *, generator: torch.Generator | None = None) -> Sampled:
        """One action for each of `[B, O]` observations (or `[B]` discrete ones), with the whole distribution."""
        logprobs, action_values = self.tables(observations)
        probabilities = logprobs.exp()
        if self.greedy:
            actions = logprobs.argmax(-1, keepdim=True)
        else:
            actions = torch.multinomial(probabilities, 1, generator=generator)
        values = (probabilities * action_values).sum(-1)
        chosen = logprobs.gather(1, actions).squeeze(1)
        return Sampled(actions.squeeze(1), chosen, values, {"behaviour_logits": logprobs})

    def tables(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and action values `[..., A]` of observations `[..., O]` (or `[...]` discrete ones)."""
        return self.network.tables(self.vectors(observations))

    def vectors(self, observations: Tensor) -> Tensor:
        """Observations `[..., O]` as they are, discrete ones `[...]` as one-hot vectors."""
        if observations.is_floating_point():
            return observations
        vectors = nn.functional.one_hot(observations, self.network.observation_size)
        return vectors.to(next(self.parameters()).dtype)

    def values(self, observations: Tensor) -> Tensor:
        """`V(o)` of observations `[..., O]`, `[...]`."""
        logprobs, action_values = self.tables(observations)
        return (logprobs.exp() * action_values).sum(-1)

    def evaluate(self, trajectory: Trajectory) -> Evaluation:
        """Log-probabilities, entropies and values `[B, T]`, with gradients.

        Raises:
            ValueError: if the trajectory has no observations.
        """
        logprobs, action_values = self.tables(observations_of(trajectory))
        return evaluation_of(logprobs, trajectory.actions, (logprobs.exp() * action_values).sum(-1))


class TabularActionValues(nn.Module):
    """A table of logits with a table of action values beside it; satisfies `StepPolicy` and `ActionTablePolicy`.

    Attributes:
        policy: the table that acts.
        action_values: `[S, A]` parameter, 0 at first.
        average: the average policy's table.
        reference: `[S, A]`, log-probabilities of the reference.
    """

    def __init__(self, policy: TabularPolicy, reference: Tensor) -> None:
        """Begin with `policy` and log-probabilities of the reference `[S, A]`."""
        super().__init__()
        self.policy = policy
        self.action_values = nn.Parameter(torch.zeros_like(policy.logits))
        self.average = copy.deepcopy(policy).requires_grad_(False)
        self.reference = reference

    def sample(self, observations: Tensor, *, generator: torch.Generator | None = None) -> Sampled:
        """Draw one action for each state `[B]` int64."""
        return self.policy.sample(observations, generator=generator)

    def values(self, observations: Tensor) -> Tensor:
        """`V(s) = Σ_a π(a|s) Q(s, a)`, without a penalty, of states of any shape `[...]`."""
        return (self.policy.logprobs().exp() * self.action_values).sum(-1)[observations]

    def evaluate(self, trajectory: Trajectory) -> Evaluation:
        """Log-probabilities, entropies and values `[B, T]`, with gradients."""
        found = self.policy.evaluate(trajectory)
        return found._replace(values=self.values(observations_of(trajectory)))

    def tables(self, trajectory: Trajectory) -> ActionTables:
        """See `ActionTablePolicy`; states are `trajectory.observations`."""
        states = observations_of(trajectory)[trajectory.mask]
        average = self.average.logprobs()[states]
        return ActionTables(self.logprobs(trajectory), self.action_values[states], average, self.reference[states])

    def logprobs(self, trajectory: Trajectory) -> Tensor:
        """See `ActionTablePolicy`."""
        return self.policy.logprobs()[observations_of(trajectory)[trajectory.mask]]

    @torch.no_grad()
    def move_average(self, decay: float) -> None:
        """See `ActionTablePolicy`."""
        self.average.logits.lerp_(self.policy.logits, 1 - decay)

    def average_state(self) -> dict[str, Tensor]:
        """See `ActionTablePolicy`."""
        return dict(self.average.state_dict())

    def load_average_state(self, state: dict[str, Tensor]) -> None:
        """See `ActionTablePolicy`."""
        self.average.load_state_dict(state)
