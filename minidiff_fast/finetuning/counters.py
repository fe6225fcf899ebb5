"""How often the expensive parts run, counted from the tensors that pass through, and the formulas to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from minidiff_fast.errors import InvalidArgument


@dataclass
class Counters:
    """What a run has done so far. Every field only grows until :meth:`reset`."""

    encoder_passes: int = 0
    """Observations through an observation encoder, times its cameras; those of the base and the critic included."""
    base_encoder_passes: int = 0
    """Of ``encoder_passes``, those of the frozen base policy."""
    critic_encoder_passes: int = 0
    """Of ``encoder_passes``, those of a critic with an encoder of its own."""
    denoiser_rows: int = 0
    """Noised action samples through a denoiser, B * K a call; those of the base included."""
    base_denoiser_rows: int = 0
    """Of ``denoiser_rows``, those of the frozen base policy."""
    critic_rows: int = 0
    """Observations whose value was computed."""
    env_steps: int = 0
    """Environment steps; a decision takes as many as its action chunk executes."""
    chunk_steps: int = 0
    """Decisions (action chunks) of all environments together."""
    restarts: int = 0
    """Environment processes that died and were started again."""

    def add(self, **amounts: int) -> None:
        """Add to fields by name: ``counters.add(env_steps=8, chunk_steps=1)``.

        Raises:
            InvalidArgument: an unknown field, or an amount that is not an int >= 0. Nothing has been added then.
        """
        names = [field.name for field in fields(self)]
        for name, amount in amounts.items():
            if name not in names:
                raise InvalidArgument(f"Counters.add: expected fields among {names}, got {name!r}")
            if isinstance(amount, bool) or not isinstance(amount, int) or amount < 0:
                raise InvalidArgument(f"Counters.add: {name} must be an int >= 0, got {amount!r}")
        for name, amount in amounts.items():
            setattr(self, name, getattr(self, name) + amount)

    def reset(self) -> None:
        """Every field to 0."""
        for field in fields(self):
            setattr(self, field.name, 0)

    def snapshot(self) -> Counters:
        """A copy that later counts leave alone; ``counters.since(snapshot)`` is what one update did."""
        return Counters(**asdict(self))

    def since(self, earlier: Counters) -> Counters:
        """What was counted after ``earlier``, a :meth:`snapshot` of these counters."""
        return Counters(**{name: value - getattr(earlier, name) for name, value in asdict(self).items()})

    def to_dict(self) -> dict[str, int]:
        """The fields by name, for logs and checkpoints; ``Counters(**d)`` is the way back."""
        return asdict(self)


class CountedPolicy:
    """A policy that counts what passes through it; everything else is the policy's own.

    ``encode`` and ``features`` count the leading dimension of the observations (times ``cameras``), ``denoise`` (and
    calling the policy) the B * K rows of ``x``. ``condition`` encodes no observation and counts nothing. Attributes
    that are not counted (``parameters``, ``action_normalizer``, ``state_dict``, ``eval``) are those of the policy; it
    has ``features`` and ``condition`` only if the policy has them.

    Args:
        policy: has ``encode(obs)`` and ``denoise(cache, x, t)``, perhaps ``features(obs)`` and ``condition(features)``.
        counters: added to; several policies may share them.
        cameras: images of an observation that its encoder encodes, 1 for low-dimensional observations.
        kind: "base" counts in the fields of the frozen base as well.
    """

    def __init__(
        self, policy: Any, counters: Counters, cameras: int = 1, kind: Literal["actor", "base"] = "actor"
    ) -> None:
        if isinstance(cameras, bool) or not isinstance(cameras, int) or cameras < 1:
            raise InvalidArgument(f"CountedPolicy: cameras must be an int >= 1, got {cameras!r}")
        if kind not in ("actor", "base"):
            raise InvalidArgument(f"CountedPolicy: kind must be 'actor' or 'base', got {kind!r}")
        missing = [name for name in ("encode", "denoise") if not callable(getattr(policy, name, None))]
        if missing:
            raise InvalidArgument(
                f"CountedPolicy: policy must have encode(obs) and denoise(cache, x, t), "
                f"got a {type(policy).__name__} without {' and '.join(missing)}"
            )
        self.policy = policy
        self.counters = counters
        self.cameras = cameras
        self.kind = kind

    def encode(self, obs: Any) -> Any:
        """The policy's cache of the observations; B * cameras encoder passes."""
        self._encoded(obs)
        return self.policy.encode(obs)

    def denoise(
        self,
        cache: Any,
        x: Tensor,  # [B, K, T, A]
        t: Tensor,  # [B, K]
    ) -> Tensor:  # [B, K, T, A]
        """The policy's prediction; B * K denoiser rows."""
        rows = x.shape[0] * x.shape[1]
        self.counters.add(denoiser_rows=rows, base_denoiser_rows=rows if self.kind == "base" else 0)
        prediction: Tensor = self.policy.denoise(cache, x, t)
        return prediction

    __call__ = denoise

    def __getattr__(self, name: str) -> Any:
        if name in ("policy", "counters", "cameras", "kind"):  # not set yet: while copied or unpickled
            raise AttributeError(name)
        found = getattr(self.policy, name)
        return self._counting_features(found) if name == "features" else found

    def _counting_features(self, features: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def counted(obs: Any) -> Any:
            self._encoded(obs)
            return features(obs)

        return counted

    def _encoded(self, obs: Any) -> None:
        passes = rows_of(obs) * self.cameras
        self.counters.add(encoder_passes=passes, base_encoder_passes=passes if self.kind == "base" else 0)


class CountedCritic:
    """A critic that counts the values it computes; everything else is the critic's own.

    Args:
        critic: called with anything, returns the values ``[B]`` or ``[B, 1]``.
        counters: added to.
        cameras: images of an observation that an encoder of the critic's own encodes in every call; 0 for a critic
            that reads features which were encoded elsewhere.
    """

    def __init__(self, critic: Callable[..., Tensor], counters: Counters, cameras: int = 0) -> None:
        if isinstance(cameras, bool) or not isinstance(cameras, int) or cameras < 0:
            raise InvalidArgument(f"CountedCritic: cameras must be an int >= 0, got {cameras!r}")
        self.critic = critic
        self.counters = counters
        self.cameras = cameras

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:  # [B]
        """The critic's values; B critic rows, and B * cameras encoder passes."""
        values = self.critic(*args, **kwargs)
        passes = values.shape[0] * self.cameras
        self.counters.add(critic_rows=values.shape[0], encoder_passes=passes, critic_encoder_passes=passes)
        return values

    def __getattr__(self, name: str) -> Any:
        if name in ("critic", "counters", "cameras"):
            raise AttributeError(name)
        return getattr(self.critic, name)


def rows_of(obs: Any) -> int:
    """The leading dimension that all tensors of an observation (a tensor, or dicts and tuples of them) share.

    Raises:
        InvalidArgument: no tensor with a leading dimension, or tensors that disagree about it.
    """
    leading = {leaf.shape[0] for leaf in pytree.tree_leaves(obs) if isinstance(leaf, torch.Tensor) and leaf.dim() > 0}
    if len(leading) != 1:
        raise InvalidArgument(
            f"obs must hold tensors that share one leading dimension B, got leading dimensions {sorted(leading)}"
        )
    return int(leading.pop())


def flat_encoder_passes(
    chunk_steps: int,
    denoise_steps: int,
    fine_tuned: int,
    epochs: int,
    cameras: int,
    envs: int,
    *,
    critic_epochs: int | None = None,
) -> int:
    """Encoder passes of one iteration that encodes the observation for every denoising step (DPPO, Ren et al. 2024).

    ``C (S [(D + K) + 2 K + 1 + 3 E K] + n_envs)``:

    - ``D + K``: sampling. The frozen base runs at each of the D steps, the fine-tuned actor at its K, which overwrite
      the base's result.
    - ``2 K``: old log-probabilities of the K transitions, base and actor each.
    - ``1``: the value of the observation.
    - ``3 E K``: E epochs over S K (observation, step) pairs: base, actor and critic each.
    - ``n_envs``: the values of the observations after the last decision.

    Args:
        chunk_steps: S, decisions of all environments together.
        denoise_steps: D, steps of the sampler.
        fine_tuned: K, the last steps of the sampler, which are trained; at most D.
        epochs: E.
        cameras: C, images per observation.
        envs: n_envs.
        critic_epochs: passes of the critic, at least E; those beyond E add S each. None: E, as in the source.
    """
    _check_formula("flat_encoder_passes", chunk_steps, denoise_steps, fine_tuned, epochs, cameras, envs)
    more = _critic_alone("flat_encoder_passes", epochs, critic_epochs)
    each = (denoise_steps + fine_tuned) + 2 * fine_tuned + 1 + 3 * epochs * fine_tuned + more
    return cameras * (chunk_steps * each + envs)


def level2_encoder_passes(
    chunk_steps: int,
    denoise_steps: int,
    fine_tuned: int,
    epochs: int,
    cameras: int,
    envs: int,
    *,
    rescoring: bool = True,
    critic_epochs: int | None = None,
) -> int:
    """Encoder passes of one iteration that encodes an observation once for all of its denoising steps.

    ``C (S [(1 + 1{D > K}) + 1 + 1 + 2 E] + n_envs)``:

    - ``1 + 1{D > K}``: sampling. The actor, and the frozen base if it samples any step at all.
    - ``1``: old log-probabilities in a pass of their own; nothing where sampling has recorded them
      (``rescoring=False``).
    - ``1``: the value of the observation.
    - ``2 E``: E epochs over S observations: actor and critic each.
    - ``n_envs``: the values of the observations after the last decision.

    At D = K = 5 and E = 10 that is 23 per decision against 171 of :func:`flat_encoder_passes`, a factor of 7.43; at
    D = 20 and K = 10 it is 24 against 351, 14.6.

    Args:
        chunk_steps: S, decisions of all environments together.
        denoise_steps: D, steps of the sampler.
        fine_tuned: K, the last steps of the sampler, which are trained; at most D.
        epochs: E.
        cameras: C, images per observation.
        envs: n_envs.
        rescoring: whether the old log-probabilities are computed after sampling, from observations.
        critic_epochs: passes of the critic, at least E; those beyond E add S each. None: E.
    """
    _check_formula("level2_encoder_passes", chunk_steps, denoise_steps, fine_tuned, epochs, cameras, envs)
    more = _critic_alone("level2_encoder_passes", epochs, critic_epochs)
    each = (1 + int(denoise_steps > fine_tuned)) + int(rescoring) + 1 + 2 * epochs + more
    return cameras * (chunk_steps * each + envs)


def _check_formula(
    caller: str, chunk_steps: int, steps: int, fine_tuned: int, epochs: int, cameras: int, envs: int
) -> None:
    if not (0 < fine_tuned <= steps and epochs >= 0 and cameras > 0 and chunk_steps >= 0 and envs >= 0):
        raise InvalidArgument(
            f"{caller}: expected 1 <= fine_tuned <= denoise_steps, cameras >= 1 and the others >= 0, got "
            f"chunk_steps = {chunk_steps}, denoise_steps = {steps}, fine_tuned = {fine_tuned}, epochs = {epochs}, "
            f"cameras = {cameras}, envs = {envs}"
        )


def _critic_alone(caller: str, epochs: int, critic_epochs: int | None) -> int:
    """Passes of the critic beyond those that it makes with the actor."""
    if critic_epochs is not None and critic_epochs < epochs:
        raise InvalidArgument(f"{caller}: critic_epochs must be at least epochs = {epochs}, got {critic_epochs}")
    return 0 if critic_epochs is None else critic_epochs - epochs
