"""World models: play, learn the world, then learn to act without touching it.

    1. play with random controllers;  2. V: encode what was seen;  3. M: `p(z', r, c | z, a, h)`;
    4. C: the controller that does best in M's dreams;  5. play with it, and again from 2 where there are rounds left.

Source: Ha and Schmidhuber, "World models" (arXiv:1803.10122). Departures: see `plaudit.models.world`; play is mixed
(`plaudit.rollout.mixed_play`) instead of purely random; dreams pay what the reward head foretells, but never more or
less than was seen in play, and end where going on is less likely than not; a memory begins anew with each segment; the
encoder learns in the first round alone, from every observation of it.
"""

from typing import Any

import torch
from torch import Tensor

from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.world_controllers import evolve_controller, improve_controller
from plaudit.algorithms.world_learning import fit_dynamics, fit_encoder, segments
from plaudit.configs.world_model import WorldModelConfig
from plaudit.models.control import ActorCriticNetwork
from plaudit.models.world import PlainEncoder, RecurrentDynamics, VariationalEncoder
from plaudit.rollout.control import ControlPolicy
from plaudit.rollout.imagination import LinearController, ObservationShape, World, WorldPolicy
from plaudit.rollout.mixed_play import MixedPlay
from plaudit.rollout.trajectory import StepPolicy, Trajectory

LONGEST_BATCH = 32
"""Most steps of each environment between two updates."""
KEPT = ("observations", "next_observations", "actions", "rewards", "continues", "truncated", "mask")
"""What of real steps is kept."""


class WorldModel:
    """A learner in environments whose controller never sees a real step while it learns; satisfies `Agent`.

    Attributes:
        config: the options.
        world: what was learned of the environment.
        controller: what acts in dreams, and in the end in the environment.
        play: all real steps.
        rounds_done: how often world and controller were learned.
    """

    def __init__(self, config: WorldModelConfig, sizes: TaskSizes, *, total_steps: int, seed: int) -> None:
        """Nothing is learned before `total_steps / rounds` steps have been played.

        Raises:
            ValueError: if pictures were announced and observations have another size.
        """
        self.config, self.seed, self.num_environments = config, seed, config.environments
        self.steps_per_round = max(1, total_steps // config.rounds)
        self.num_steps = max(1, min(LONGEST_BATCH, self.steps_per_round // config.environments))
        self.prepare = ObservationShape(sizes.observation_size, config.picture, scale=config.pixel_scale)
        encoder: PlainEncoder | VariationalEncoder = PlainEncoder(sizes.observation_size)
        if config.encoder == "variational":
            encoder = VariationalEncoder(self.prepare.shape, config.code_size, seed=seed)
        dynamics = RecurrentDynamics(
            encoder.code_size,
            sizes.num_actions,
            hidden_size=config.hidden_size,
            components=config.components,
            seed=seed,
        )
        self.world = World(encoder, dynamics)
        self.controller: LinearController | ControlPolicy
        if config.controller == "cma":
            self.controller = LinearController(torch.zeros(sizes.num_actions, dynamics.feature_size + 1))
        else:
            self.controller = ControlPolicy(ActorCriticNetwork(dynamics.feature_size, sizes.num_actions, seed=seed))
        self.play: list[Trajectory] = []
        self.rounds_done, self.num_steps_seen = 0, 0
        self._mixed = MixedPlay(self.prepare, sizes.num_actions)
        self._acting = WorldPolicy(self.world, self.controller, self.prepare)

    @property
    def policy(self) -> StepPolicy:
        """Mixed play in the first round; later the controller, and mixed play by turns."""
        return self._mixed if len(self.play) % 2 or not self.rounds_done else self._acting

    def greedy_policy(self) -> StepPolicy:
        """The controller, with a memory of its own."""
        controller = self.controller
        if isinstance(controller, ControlPolicy):
            controller = ControlPolicy(controller.network, greedy=True)
        return WorldPolicy(self.world, controller, self.prepare)

    def update(self, trajectory: Trajectory) -> dict[str, float]:
        """Keep what was played `[B, T]`; learn world and controller when a round's steps are complete."""
        self._take_turns(trajectory)
        self.play.append(_played({name: getattr(trajectory, name) for name in KEPT}))
        self.num_steps_seen += trajectory.actions.numel()
        metrics = {"play/steps": float(self.num_steps_seen)}
        if (
            self.rounds_done < self.config.rounds
            and self.num_steps_seen >= (self.rounds_done + 1) * self.steps_per_round
        ):
            metrics |= self.learn_world()
            metrics |= self.learn_controller()
            self.rounds_done += 1
        return metrics

    def _take_turns(self, trajectory: Trajectory) -> None:
        """Only the player of these steps was told which episodes ended in them: the other one's memory is of old ones.

        The controller's begins anew with each of its turns, as it does in the segments that the world is learned on.
        """
        rows = self.num_environments
        if self.policy is self._acting:
            self._mixed.end_episodes(((trajectory.continues == 0) | trajectory.truncated).any(1))
        self._acting.end_episodes(torch.ones(len(self._acting.memory(rows)), dtype=torch.bool))

    def learn_world(self) -> dict[str, float]:
        """Encoder and dynamics from all play so far; the autoencoder is only learned in the first round."""
        config, encoder = self.config, self.world.encoder
        generator = torch.Generator().manual_seed(self.seed + 7919 * self.rounds_done)
        rows = segments(self.play, config.segment)
        assert rows.observations is not None
        assert rows.next_observations is not None
        seen = self.prepare(rows.observations)
        metrics: dict[str, float] = {}
        if self.rounds_done == 0 and isinstance(encoder, PlainEncoder):
            encoder.standardise(seen[rows.mask])
        elif self.rounds_done == 0 and isinstance(encoder, VariationalEncoder):
            metrics = fit_encoder(
                encoder,
                seen[rows.mask],
                epochs=config.encoder_epochs,
                learning_rate=config.learning_rate,
                noise=config.observation_noise,
                generator=generator,
            )
        return metrics | fit_dynamics(
            self.world.dynamics,
            encoder.encode(seen),
            encoder.encode(self.prepare(rows.next_observations)),
            rows,
            epochs=config.epochs,
            learning_rate=config.learning_rate,
            generator=generator,
        )

    def learn_controller(self) -> dict[str, float]:
        """The controller, in dreams that begin where real episodes began."""
        dynamics, starts = self.world.dynamics, self.starts()
        seed = self.seed + 104729 * self.rounds_done
        old: LinearController | ControlPolicy = self.controller
        metrics: dict[str, float]
        if isinstance(old, LinearController):
            self.controller, metrics = evolve_controller(dynamics, starts, self.config, seed=seed, initial=old.weights)
        else:
            self.controller, metrics = improve_controller(dynamics, starts, self.config, seed=seed, network=old.network)
        self._acting = WorldPolicy(self.world, self.controller, self.prepare)
        return metrics

    def starts(self) -> Tensor:
        """Codes `[N, Z]` of the first observations of all episodes."""
        found, begins = [], torch.ones(self.num_environments, dtype=torch.bool)
        for trajectory in self.play:
            assert trajectory.observations is not None
            ended = (trajectory.continues == 0) | trajectory.truncated
            first = torch.cat([begins.unsqueeze(1), ended[:, :-1]], 1)
            found.append(trajectory.observations[first])
            begins = ended[:, -1]
        return self.world.encoder.encode(self.prepare(torch.cat(found)))

    def state_dict(self) -> dict[str, Any]:
        """Play, world, controller and counters. What mixed play had drawn for episodes under way is forgotten."""
        return {
            "play": [{name: getattr(each, name) for name in KEPT} for each in self.play],
            "world": self.world.state_dict(),
            "controller": self.controller.state_dict(),
            "rounds_done": self.rounds_done,
            "num_steps_seen": self.num_steps_seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, in new episodes: those under way count as cut off."""
        self.play = [_played(tensors) for tensors in state["play"]]
        if self.play:
            truncated = self.play[-1].truncated.clone()
            truncated[:, -1] = True
            self.play[-1] = self.play[-1].with_fields(truncated=truncated)
        self.world.load_state_dict(state["world"])
        self.controller.load_state_dict(state["controller"])
        self.rounds_done, self.num_steps_seen = int(state["rounds_done"]), int(state["num_steps_seen"])


def _played(tensors: dict[str, Tensor]) -> Trajectory:
    """What a world is learned from as a trajectory; no policy's view of it is needed."""
    empty = torch.zeros_like(tensors["rewards"])
    names = ("behaviour_logprobs", "old_logprobs", "reference_logprobs", "values", "next_values")
    return Trajectory(**tensors, **dict.fromkeys(names, empty))
