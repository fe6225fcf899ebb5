"""A reward to fine-tune on: progress towards the goal and a bonus at success.

The stock reward is the coverage at every step, until success ends the episode: hovering at a coverage of 94 %
earns more than solving the task. Train on :class:`ShapedReward` and evaluate on the stock score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from minidiff_fast.errors import InvalidArgument, require
from minidiff_fast.tasks.pusht.env import PushTEnv
from minidiff_fast.tasks.pusht.expert import pose_error

if TYPE_CHECKING:
    from gymnasium import Env
    from gymnasium import Wrapper as _Wrapper

    Wrapper = _Wrapper[Any, Any, Any, Any]
else:
    Wrapper = require("gymnasium", extra="pusht").Wrapper


@dataclass(frozen=True)
class ShapedRewardConfig:
    """Weights of the shaped reward."""

    coverage: float = 1.0
    """Reward for covering the whole goal, coming from nothing."""
    pose: float = 1.0
    """Reward for 100 px less of pose error."""
    angle_radius: float = 45.0
    """Pixels of pose error that one radian counts for."""
    success: float = 2.0
    """Reward at success, once: the task is then over."""
    discount: float = 1.0
    """Factor of the potential after a step, in (0, 1]; see :class:`ShapedReward`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0.0):
                raise InvalidArgument(f"ShapedRewardConfig: {field.name} must be finite and >= 0, got {value}")
        if not 0.0 < self.discount <= 1.0:
            raise InvalidArgument(f"ShapedRewardConfig: discount must be in (0, 1], got {self.discount}")


class ShapedReward(Wrapper):
    """Potential-based reward in place of the stock one.

    ``r = discount Phi(s') - Phi(s) + success [solved] - step_cost``, with the potential

    ``Phi(s) = -coverage_weight (1 - coverage) - pose_weight pose_error / 100 px <= 0``, and 0 once solved,

    where ``pose_error = hypot(|c - c_goal|, angle_radius |angle - angle_goal|)`` between the centres of gravity
    c, and ``step_cost`` is what the variant charges for a step.

    With ``discount = 1`` (the default) the reward of an episode telescopes to ``Phi(end) - Phi(start)`` plus the
    bonus, and hovering earns nothing. The best policy is that of the bare bonus if the learner does not
    discount either. For a learner with discount g < 1 every step that does not solve costs
    ``(1 - g) |Phi(s)|`` beyond the bare bonus: not invariant, but biased towards being near the goal early,
    and never against finishing. With ``discount = g`` the best policy is that of the bare bonus exactly
    (Ng et al., 1999), but standing still earns ``(1 - g) |Phi|``, so it needs an exact value function to see
    that. A step is then a call of ``step``: put this wrapper around
    :class:`~minidiff_fast.finetuning.chunk.ActionChunk` if the learner discounts per chunk. That is also the
    cheaper order; with ``discount = 1`` both orders give the same sums.

    A truncated episode keeps the potential of its last state, so that a value function can go on from there.

    ``info`` gains ``stock_reward`` (the stock reward of the call, without the step cost) and ``potential``.

    Args:
        env: Push-T (:class:`~minidiff_fast.tasks.pusht.env.PushTEnv` at its core), wrapped as you like.
        config: the weights.

    Raises:
        InvalidArgument: ``env`` is not Push-T; in ``step``, the reward is NaN or infinite, or no ``reset`` came
            before.

    Source: Ng, Harada and Russell, Policy invariance under reward transformations, ICML 1999.
    """

    def __init__(self, env: Env[Any, Any], config: ShapedRewardConfig | None = None) -> None:
        core = env.unwrapped
        if not isinstance(core, PushTEnv):
            raise InvalidArgument(f"ShapedReward: env must be Push-T (PushTEnv), got {type(core).__name__}")
        super().__init__(env)
        self.config = config or ShapedRewardConfig()
        self._core, self._potential = core, math.nan
        self._step_cost = core.step_cost

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._potential = self.potential()
        return observation, {**info, "potential": self._potential}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step and shape."""
        if math.isnan(self._potential):
            raise InvalidArgument("ShapedReward.step: call reset first")
        observation, stock, terminated, truncated, info = self.env.step(action)
        cost = self._step_cost * info.get("env_steps", 1)
        after = 0.0 if terminated else self.potential()
        reward = self.config.discount * after - self._potential - cost
        if info["is_success"]:
            reward += self.config.success
        if not (math.isfinite(reward) and math.isfinite(stock)):
            raise InvalidArgument(
                f"ShapedReward.step: rewards must be finite, got {reward} (stock {stock}), state {self._core.get_obs()}"
            )
        self._potential = after
        info["stock_reward"], info["potential"] = float(stock) + cost, after
        return observation, reward, terminated, truncated, info

    def potential(self) -> float:
        """Phi of the state now, as long as it is not solved."""
        config, block = self.config, self._core.block
        x, y = block.position
        error = pose_error(x, y, block.angle, config.angle_radius)
        return -config.coverage * (1.0 - self._core.coverage()) - config.pose * error / 100.0
