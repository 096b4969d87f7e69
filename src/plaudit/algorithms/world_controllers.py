"""Controllers that learn in dreams of a learned world alone: by evolution, or by a policy gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from plaudit.algorithms.build import build_algorithm
from plaudit.algorithms.evolution import evolve
from plaudit.configs.algorithm import AlgorithmConfig
from plaudit.configs.world_model import WorldModelConfig
from plaudit.models.control import ActorCriticNetwork
from plaudit.models.world import RecurrentDynamics
from plaudit.rollout.control import ControlPolicy
from plaudit.rollout.imagination import LinearController, dream, dreamed_returns


def evolve_controller(
    dynamics: RecurrentDynamics,
    starts: Tensor,
    config: WorldModelConfig,
    *,
    seed: int,
    initial: Tensor | None = None,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[LinearController, dict[str, float]]:
    """A linear controller by CMA-ES, judged in dreams alone.

    Within a generation all controllers meet the same dreams; see `plaudit.algorithms.evolution`.

    Args:
        dynamics: the learned world.
        starts: codes `[N, Z]` of first observations, `config.dreams` of which are drawn in each generation.
        config: sizes.
        seed: of the strategy and of the dreams.
        initial: `[A, Z + H + 1]` to begin from; zeros without it.
        report: called with the number of the generation and its mean and best dreamed return.

    Returns:
        the controller and the last generation's metrics.
    """
    shape = (dynamics.num_actions, dynamics.feature_size + 1)
    generator = torch.Generator().manual_seed(seed)
    metrics: dict[str, float] = {}

    def judge(weights: Tensor) -> Tensor:
        chosen = starts[torch.randint(len(starts), (config.dreams,), generator=generator)]
        return dreamed_returns(
            dynamics,
            weights,
            chosen,
            horizon=config.horizon,
            temperature=config.temperature,
            generator=generator,
        ).mean(1)

    def noted(generation: int, returns: Tensor) -> None:
        metrics.update({"dream/mean_return": returns.mean().item(), "dream/best_return": returns.max().item()})
        if report is not None:
            report(generation, metrics)

    mean = evolve(
        starts.new_zeros(shape) if initial is None else initial.to(starts),
        judge,
        spread=config.initial_spread,
        population=config.population,
        generations=config.generations,
        seed=seed,
        report=noted,
    )
    return LinearController(mean), metrics


def improve_controller(
    dynamics: RecurrentDynamics,
    starts: Tensor,
    config: WorldModelConfig,
    *,
    seed: int,
    network: ActorCriticNetwork | None = None,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[ControlPolicy, dict[str, float]]:
    """A small actor and critic by PPO on dreams: the same update that learns from real steps.

    Args:
        dynamics, starts, config, seed, report: as in `evolve_controller`.
        network: to go on from; a fresh one without it.

    Returns:
        the policy (which samples) and the last batch's metrics.
    """
    network = network or ActorCriticNetwork(dynamics.feature_size, dynamics.num_actions, seed=seed)
    policy = ControlPolicy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, eps=1e-5)
    settings = AlgorithmConfig(
        name="ppo",
        discount=config.discount,
        gae_lambda=0.95,
        epochs=4,
        minibatches=4,
        value_coefficient=0.5,
        kl_placement="none",
    )
    algorithm = build_algorithm(settings, policy, optimizer, max_gradient_norm=0.5, total_updates=config.generations)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, config.generations)
    generator = torch.Generator().manual_seed(seed)
    metrics: dict[str, float] = {}
    for generation in range(config.generations):
        chosen = starts[torch.randint(len(starts), (config.population * config.dreams,), generator=generator)]
        dreamed = dream(
            dynamics,
            policy,
            chosen,
            horizon=config.horizon,
            temperature=config.temperature,
            generator=generator,
        )
        found = algorithm.update(dreamed, generator=generator)
        schedule.step()
        metrics = {"dream/mean_return": dreamed.rewards.sum(1).mean().item(), **found}
        if report is not None:
            report(generation, metrics)
    return policy, metrics
