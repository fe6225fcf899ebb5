r"""The variance of DPPO's gradient at equal numbers of (decision, denoising step) pairs, for the suite ``rl-update``.

A policy of Push-T's keypoints is trained for some hundred imitation steps on the demonstrations that come with the
package. N observations of theirs are its decisions: it draws a chain for each, with DPPO's exploration noise. A
decision's advantage is half luck, half merit: the sum of a unit normal and of how much nearer than others its actions
are to the demonstrated ones (standardised), standardised again over all N, so that minibatches share one scale.

Of these N K stored pairs, both sides draw minibatches of the same number of pairs without replacement, as the shuffle
of an epoch does: ``level2`` B decisions with all their K steps, ``flat`` B K pairs, whatever decision they are of.
With G the gradient of a minibatch for the actor's parameters and :math:`\bar G` that of all N K pairs, computed
exactly and the mean of either side's, the variance is

.. math:: \operatorname{tr} \operatorname{Cov}(G) = \mathrm{mean}_m \lVert G_m - \bar G \rVert^2

and what is reported is level2's over flat's; the interval is the 2.5 and 97.5 percentiles of 2,000 bootstrap samples
of the minibatches. The value's gradient needs no measurement: it is the same for all steps of a decision, so that at
equal numbers of pairs its variance is K times flat's a minibatch.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from torch import Tensor

from minidiff_fast.level2 import Level2Batch
from minidiff_fast.objectives.dppo import DPPO
from minidiff_fast.objectives.imitation import DenoisingLoss
from minidiff_fast.policy import DiffusionPolicy
from minidiff_fast.tasks.pusht.data import PushTWindows, load_pusht
from minidiff_fast.tasks.pusht.policy import PolicyConfig, build_policy, build_process, build_scheduler
from minidiff_fast.transitions import DDIMTransitions

CONFIG = PolicyConfig(obs="keypoints", denoiser="mlp")
DECISIONS = 2000
"""N."""
PAIRS = 200
"""Of a minibatch: B K. The ratio does not depend on it, as both gradients are means over draws: small minibatches give
more of them in the same time."""
MINIBATCHES = 500
"""Of each side."""
IMITATION_STEPS = 400
BOOTSTRAP = 2000


@cache
def imitated(steps: int, device: torch.device) -> tuple[DiffusionPolicy, PushTWindows, float]:
    """A policy after some imitation steps, what it was shown, and its mean loss over the last tenth of the steps."""
    torch.manual_seed(0)
    windows = PushTWindows(
        load_pusht(), CONFIG.obs, CONFIG.horizon, CONFIG.n_obs_steps, CONFIG.n_action_steps
    ).to(device)  # fmt: skip
    normalizers = windows.normalizers()
    policy = build_policy(CONFIG, normalizers.obs, normalizers.action).to(device)
    objective = DenoisingLoss(build_process(CONFIG))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        batch = windows.batch(torch.randint(len(windows), (64,)))
        drawn = Level2Batch.draw(batch["obs"], policy.normalize_actions(batch["action"]), 8, objective)
        loss = objective.per_sample(policy.denoise, policy.encode(drawn.obs), drawn).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    last = torch.stack(losses[-max(1, steps // 10) :]).mean()
    return policy.eval(), windows, float(last)


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std()


def actor_gradient(
    policy: DiffusionPolicy,
    algorithm: DPPO,
    obs: dict[str, Tensor],  # name -> [R, To, ...]
    batch: dict[str, Tensor],  # [R, k, ...]
    advantage: Tensor,  # [R]
) -> Tensor:  # [P]
    """Of the surrogate, for all parameters of the actor in one vector."""
    loss = algorithm.loss(policy, policy.encode(obs), batch, advantage).loss
    parameters = [p for p in policy.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def estimate(
    k: int,
    device: torch.device,
    *,
    decisions: int = DECISIONS,
    pairs: int = PAIRS,
    minibatches: int = MINIBATCHES,
    imitation_steps: int = IMITATION_STEPS,
) -> dict[str, Any]:
    """Squared distances of minibatch gradients from the full one, both sides, and their ratio."""
    started = time.perf_counter()
    policy, windows, imitation = imitated(imitation_steps, device)
    torch.manual_seed(1)
    shown = windows.batch(torch.randperm(len(windows))[:decisions])
    obs, executed = shown["obs"], slice(CONFIG.n_obs_steps - 1, CONFIG.n_obs_steps - 1 + CONFIG.n_action_steps)
    transitions = DDIMTransitions.from_scheduler(build_scheduler(CONFIG), k)
    algorithm = DPPO(transitions, (CONFIG.horizon, 2), act_steps=(executed.start, executed.stop))
    with torch.no_grad():
        decision = algorithm.act(policy, policy.encode(obs))
        wanted = policy.normalize_actions(shown["action"])
        merit = -(decision.actions - wanted)[:, executed].square().mean((-2, -1))
    advantage = standardised(standardised(merit) + torch.randn(decisions, device=device))
    everything = algorithm.minibatch(decision.record)
    full = actor_gradient(policy, algorithm, obs, everything, advantage)

    def side(rows: Tensor, steps: Tensor | None) -> float:
        batch = {name: v[rows] if steps is None else v[rows, steps][:, None] for name, v in everything.items()}
        found = actor_gradient(policy, algorithm, {n: v[rows] for n, v in obs.items()}, batch, advantage[rows])
        return float((found - full).square().sum())

    distances: dict[str, list[float]] = {"level2": [], "flat": []}
    for _ in range(minibatches):
        distances["level2"].append(side(torch.randperm(decisions, device=device)[: pairs // k], None))
        drawn = torch.randperm(decisions * k, device=device)[: pairs // k * k]
        distances["flat"].append(side(drawn // k, drawn % k))
    ours, flat = (torch.tensor(distances[name]) for name in ("level2", "flat"))
    picks = torch.randint(minibatches, (2, BOOTSTRAP, minibatches))
    spread = (ours[picks[0]].mean(1) / flat[picks[1]].mean(1)).quantile(torch.tensor([0.025, 0.975]))
    return {
        "K": k, "B": pairs // k, "pairs": pairs // k * k, "decisions": decisions, "imitation_steps": imitation_steps,
        "imitation_loss": imitation, "ratio": float(ours.mean() / flat.mean()), "interval": spread.tolist(),
        "full_gradient_squared": float(full.square().sum()), "squared_distances": distances,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def render(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table: a row per K."""
    first = next(iter(results.values()))
    lines = [
        f"\n**Variance of the actor's gradient at equal pairs**: keypoints policy after {first['imitation_steps']} "
        f"imitation steps, {first['decisions']} stored decisions, {len(first['squared_distances']['flat'])} "
        f"minibatches of {first['pairs']} pairs a side",
        "| minibatch | level2 / flat | 95 % interval |",
        "|---|---|---|",
    ]
    for cell in results.values():
        low, high = cell["interval"]
        lines.append(f"| {cell['B']} x {cell['K']} | **{cell['ratio']:.3f}** | {low:.3f} to {high:.3f} |")
    return "\n".join(lines)
