r"""The variance of DPPO's gradient at equal numbers of (decision, denoising step) pairs, for the suite ``rl-update``.

A policy of Push-T's keypoints is trained for some hundred imitation steps on the demonstrations that come with the
package. N observations of theirs are its decisions: it draws a chain for each, with DPPO's exploration noise. A
decision's advantage is half luck, half merit: the sum of a unit normal and of how much nearer than others its actions
are to the demonstrated ones (standardised), standardised again over all N, so that minibatches share one scale.

Of these N K stored pairs, both sides draw minibatches of the same number of pairs without replacement, as the shuffle
of an epoch does: ``level2`` B decisions with all their K steps, ``flat`` B K pairs, whatever decision they are of. The
gradient of a minibatch is a mean over what was drawn, so its variance (the trace of its covariance, over all parameters
of the actor) follows from that of single draws, and no minibatch needs to be drawn. With g_bk the gradient of one pair:

.. math::
    V_{level2} = \tfrac{1}{B}\,(1 - \tfrac{B}{N})\,\mathrm{Var}_b(\mathrm{mean}_k g_{bk}), \quad
    V_{flat} = \tfrac{1}{BK}\,(1 - \tfrac{BK}{NK})\,\mathrm{Var}_{bk}(g_{bk})

The ratio of the two depends on neither B nor on the share of the store that a minibatch is. It is exact for these N
decisions; the interval, 2.5 and 97.5 percentiles of 2,000 bootstrap samples of decisions, is for others like them. The
value's gradient needs no measurement: it is the same for all steps of a decision, so that at equal numbers of pairs its
variance is K times flat's a minibatch.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from minidiff_fast.level2 import Level2Batch
from minidiff_fast.objectives.dppo import DPPO
from minidiff_fast.objectives.imitation import DenoisingLoss
from minidiff_fast.policy import DiffusionPolicy
from minidiff_fast.tasks.pusht.data import PushTWindows, load_pusht
from minidiff_fast.tasks.pusht.policy import PolicyConfig, build_policy, build_process, build_scheduler
from minidiff_fast.transitions import DDIMTransitions

CONFIG = PolicyConfig(obs="keypoints", denoiser="mlp")
DECISIONS = 500
"""N."""
IMITATION_STEPS = 400
BOOTSTRAP = 2000
CHUNK = 80
"""Pairs whose gradients are held at once."""


@cache
def imitated(steps: int, device: torch.device) -> tuple[DiffusionPolicy, PushTWindows, float]:
    """A policy after some imitation steps, what it was shown, and its mean loss over the last tenth of the steps."""
    torch.manual_seed(0)
    windows = PushTWindows(load_pusht(), CONFIG.obs, CONFIG.horizon, CONFIG.n_obs_steps, CONFIG.n_action_steps)
    windows = windows.to(device)
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


class Store(NamedTuple):
    """Decisions of a policy."""

    policy: DiffusionPolicy
    algorithm: DPPO
    obs: dict[str, Tensor]
    """name -> [N, To, ...]"""
    steps: dict[str, Tensor]
    """What DPPO.minibatch gives for all of them, [N, K, ...]."""
    advantage: Tensor
    """[N]"""


def decide(k: int, decisions: int, imitation_steps: int, device: torch.device) -> Store:
    """N decisions of the imitated policy at observations of the demonstrations."""
    policy, windows, _ = imitated(imitation_steps, device)
    torch.manual_seed(1)
    shown = windows.batch(torch.randperm(len(windows))[:decisions])
    executed = slice(CONFIG.n_obs_steps - 1, CONFIG.n_obs_steps - 1 + CONFIG.n_action_steps)
    transitions = DDIMTransitions.from_scheduler(build_scheduler(CONFIG), k)
    algorithm = DPPO(transitions, (CONFIG.horizon, 2), act_steps=(executed.start, executed.stop))
    with torch.no_grad():
        decision = algorithm.act(policy, policy.encode(shown["obs"]))
        wanted = policy.normalize_actions(shown["action"])
    merit = -(decision.actions - wanted)[:, executed].square().mean((-2, -1)).sqrt()
    advantage = standardised(standardised(merit) + torch.randn(decisions, device=device))
    return Store(policy, algorithm, shown["obs"], algorithm.minibatch(decision.record), advantage)


class PairLoss(nn.Module):
    """The surrogate of one pair."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.policy, self.algorithm = store.policy, store.algorithm

    def forward(
        self,
        obs: dict[str, Tensor],  # name -> [To, ...]
        step: dict[str, Tensor],  # [...] each
        advantage: Tensor,  # []
    ) -> Tensor:  # []
        cache = self.policy.encode({name: value[None] for name, value in obs.items()})
        batch = {name: value[None, None] for name, value in step.items()}
        return self.algorithm.loss(self.policy, cache, batch, advantage[None]).loss


class Norms(NamedTuple):
    """Squared norms of gradients."""

    pair: Tensor
    """[N]: mean over a decision's K pairs."""
    decision: Tensor
    """[N]: of the mean over its K pairs."""
    full: Tensor
    """[]: of the mean over everything."""


def gradient_norms(store: Store) -> Norms:
    """Of every pair, every decision and all of them."""
    module = PairLoss(store)
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(chosen: dict[str, Tensor], *arguments: Any) -> Tensor:
        value: Tensor = functional_call(module, chosen, arguments)
        return value

    each = vmap(vmap(grad(loss), (None, None, 0, None)), (None, 0, 0, 0))
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    pair, decision = [], []
    size = max(1, CHUNK // store.algorithm.steps)
    for start in range(0, len(store.advantage), size):
        rows = slice(start, start + size)
        obs = {name: value[rows] for name, value in store.obs.items()}
        steps = {name: value[rows] for name, value in store.steps.items()}
        found = each(weights, obs, steps, store.advantage[rows])  # name -> [rows, K, ...]
        means = {name: gradient.mean(1) for name, gradient in found.items()}
        pair.append(sum((g.flatten(2).square().sum(2).mean(1) for g in found.values()), torch.zeros(())))
        decision.append(sum((g.flatten(1).square().sum(1) for g in means.values()), torch.zeros(())))
        for name, gradient in means.items():
            total[name] += gradient.sum(0) / len(store.advantage)
    full = sum((gradient.square().sum() for gradient in total.values()), torch.zeros(()))
    return Norms(torch.cat(pair), torch.cat(decision), full)


def variance_ratio(norms: Norms, k: int) -> float:
    """V_level2 / V_flat."""
    n = len(norms.pair)
    decision = (norms.decision.mean() - norms.full) * n / (n - 1)
    pair = (norms.pair.mean() - norms.full) * n * k / (n * k - 1)
    return float(k * decision / pair)


def estimate(
    k: int, device: torch.device, *, decisions: int = DECISIONS, imitation_steps: int = IMITATION_STEPS
) -> dict[str, Any]:
    """The ratio of the variances, its interval, and every decision's norms."""
    started = time.perf_counter()
    store = decide(k, decisions, imitation_steps, device)
    norms = gradient_norms(store)
    # The full gradient's share is a thousandth: the bootstrap leaves it as it is.
    picks = torch.randint(decisions, (BOOTSTRAP, decisions), device=device)
    spread = k * (norms.decision[picks].mean(1) - norms.full) / (norms.pair[picks].mean(1) - norms.full)
    return {
        "K": k, "decisions": decisions, "imitation_steps": imitation_steps,
        "imitation_loss": imitated(imitation_steps, device)[2], "ratio": variance_ratio(norms, k),
        "interval": [float(spread.quantile(q)) for q in (0.025, 0.975)],
        "squared_norms": {name: getattr(norms, name).tolist() for name in Norms._fields},
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
