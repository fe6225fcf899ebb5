"""DPPO on Level-2 batches against the same loss written for flat pairs, each of which encodes its own image."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.models import ConditionalUnet1D, DiffusionMLP
from minidiff_fast.nn.normalizer import MinMaxNormalizer
from minidiff_fast.objectives import DPPO, DPPOConfig, normalize_advantage, value_loss
from minidiff_fast.objectives import dppo as dppo_module
from minidiff_fast.objectives.dppo import pick_steps
from minidiff_fast.policy import DiffusionPolicy
from minidiff_fast.sampling import sample_chain
from minidiff_fast.transitions import DDIMTransitions, DDPMTransitions, FlowTransitions

diffusers = pytest.importorskip("diffusers")

B, T, A, TO, DC = 3, 4, 2, 2, 6
LOOSE = DPPOConfig(clip=0.02, clip_base=0.004, gamma_denoising=0.9)


class TinyCamera(nn.Module):
    """[B, To, 8, 8, 3] uint8 -> [B, To, Dc]; counts the images it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out, self.images = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4 * 9, DC), 0

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        image = obs["image"]
        self.images += image.shape[0] * image.shape[1]
        pixels = image.flatten(0, 1).permute(0, 3, 1, 2).to(self.conv.weight.dtype) / 255.0
        return self.out(self.conv(pixels).tanh().flatten(1)).unflatten(0, image.shape[:2])


class InDouble:
    """A float64 policy that takes the float32 samples of a chain."""

    training = False

    def __init__(self, policy: DiffusionPolicy) -> None:
        self.policy = policy

    def encode(self, obs):
        return self.policy.encode(obs)

    def denoise(self, cache, x, t):
        return self.policy.denoise(cache, x.double(), t)


def make_policy(seed: int, encoder: nn.Module | None = None, dc: int = DC) -> DiffusionPolicy:
    torch.manual_seed(seed)
    return DiffusionPolicy(
        TinyCamera() if encoder is None else encoder,
        DiffusionMLP(A, A, T, TO, dc, hidden_dim=16, n_blocks=1, time_dim=8),
        {},
        MinMaxNormalizer(torch.full((A,), -1.0), torch.full((A,), 1.0)),
    ).eval()


def images(seed: int = 0, size: int = 8, batch: int = B) -> dict[str, Tensor]:
    shape = (batch, TO, size, size, 3)
    return {"image": torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))}


class Case:
    """A sampler, and the same sampler in plain numbers."""

    def __init__(self, name: str) -> None:
        self.kind, _, self.prediction = name.partition("-")
        self.std = 0.15
        if self.kind == "flow":
            self.transitions, self.steps = FlowTransitions(4, std=self.std), 4
            self.times = [1000.0, 750.0, 500.0, 250.0]
            return
        trained, self.steps = {"ddim": (100, 5), "ddpm": (20, 10)}[self.kind]
        cls = diffusers.DDIMScheduler if self.kind == "ddim" else diffusers.DDPMScheduler
        scheduler = cls(trained, beta_schedule="squaredcos_cap_v2", prediction_type=self.prediction)
        if self.kind == "ddim":
            self.transitions, self.times = DDIMTransitions.from_scheduler(scheduler, 5), [80, 60, 40, 20, 0]
        else:
            self.transitions, self.times = DDPMTransitions.from_scheduler(scheduler), list(range(19, -1, -1))
        self.alphas = [float(scheduler.alphas_cumprod[t]) for t in self.times] + [1.0]

    def moments(self, x: Tensor, output: Tensor, step: int) -> tuple[Tensor, float]:
        if self.kind == "flow":
            return x - output / len(self.times), self.std
        ab, after = self.alphas[step], self.alphas[step + 1]
        clean = (x - math.sqrt(1 - ab) * output) / math.sqrt(ab) if self.prediction == "epsilon" else output
        clean = clean.clamp(-1, 1)
        variance = (1 - after) / (1 - ab) * (1 - ab / after)
        if self.kind == "ddpm":  # the posterior's mean, as in Ho et al., equation 7
            beta = 1 - ab / after
            mean = math.sqrt(after) * beta / (1 - ab) * clean + math.sqrt(ab / after) * (1 - after) / (1 - ab) * x
        else:
            noise = (x - math.sqrt(ab) * clean) / math.sqrt(1 - ab)
            mean = math.sqrt(after) * clean + math.sqrt(max(1 - after - variance, 0.0)) * noise
        return mean, math.sqrt(max(variance, 0.0))


def log_density(case: Case, policy, obs_row, x, x_next, step: int, window: slice, config: DPPOConfig) -> Tensor:
    """One flat pair: encode its observation, one row through the denoiser, one Gaussian."""
    features = policy.encoder(obs_row)
    output = policy.denoiser(x[None], torch.tensor([case.times[step]]), features)[0]
    mean, std = case.moments(x, output, step)
    std = max(std, config.min_logprob_std)
    entries = -((x_next - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
    return entries.clamp(config.log_prob_low, config.log_prob_high)[window].mean()


def flat_loss(case, policy, critic, obs, chain, old, raw_advantage, returns, window, config, base_chain=None):
    """Loops over pairs; shares no line with the library."""
    batch, k = old.shape
    values = [float(a) for a in raw_advantage]
    mean = sum(values) / batch
    spread = math.sqrt(sum((a - mean) ** 2 for a in values) / batch)
    actor = critic_loss = cloning = 0.0
    for b in range(batch):
        row = {name: value[b : b + 1] for name, value in obs.items()}
        for j in range(k):
            step = len(case.times) - k + j
            new = log_density(case, policy, row, chain[b, j], chain[b, j + 1], step, window, config)
            ratio = torch.exp(new - old[b, j])
            gain = (values[b] - mean) / (spread + 1e-8) * config.gamma_denoising ** (k - 1 - j)
            rise = (math.exp(config.clip_rate * j / (k - 1)) - 1) / (math.exp(config.clip_rate) - 1)
            eps = config.clip_base + (config.clip - config.clip_base) * rise
            actor = actor + torch.max(-gain * ratio, -gain * ratio.clamp(1 - eps, 1 + eps)) / (batch * k)
            if base_chain is not None:
                pair = base_chain[b, j], base_chain[b, j + 1]
                cloning = cloning - log_density(case, policy, row, *pair, step, window, config) / (batch * k)
        value = critic(policy.encoder(row).flatten(1))[0, 0]
        critic_loss = critic_loss + 0.5 * (value - returns[b]) ** 2 / batch
    return actor, critic_loss, cloning


def collected(case: Case, policy, base, obs, act_steps=None):
    """A float32 chain as collected, old log-probabilities around the new ones, advantages and returns."""
    generator = torch.Generator().manual_seed(0)
    chain = sample_chain(
        copy.deepcopy(policy).float(), obs, case.transitions, shape=(T, A), fine_tuned=case.steps, base=base,
        act_steps=act_steps, generator=generator,
    )  # fmt: skip
    size = chain.samples.shape[0]
    old = chain.log_prob + 0.01 * torch.randn(chain.log_prob.shape, generator=generator)
    advantage, returns = torch.randn(2, size, generator=generator, dtype=torch.float64)
    return chain.samples, old, advantage * 3 + 1, returns


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    found = {f"{i}.{n}": p.grad for i, module in enumerate(modules) for n, p in module.named_parameters()}
    for module in modules:
        module.zero_grad(set_to_none=True)
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to each parameter's gradient; a bias before a group norm of its own has none."""
    assert actual.keys() == expected.keys() and len(actual) > 8
    total = float(torch.stack([grad.norm() for grad in expected.values()]).norm())
    some = {name for name, grad in expected.items() if float(grad.norm()) > 1e-12 * total}
    assert len(some) > 0.9 * len(expected) and any(name.startswith("0.encoder.conv") for name in some)
    for name, grad in expected.items():
        error = float((actual[name] - grad).norm())
        assert error < tolerance * float(grad.norm()) if name in some else error < 1e-12 * total, (name, error)


CASES = ["ddim-epsilon", "ddim-sample", "ddpm-epsilon", "ddpm-sample", "flow"]


@pytest.mark.parametrize(("name", "act_steps"), [*((n, None) for n in CASES), ("ddim-epsilon", 3), ("flow", (1, 3))])
def test_loss_and_every_gradient_are_those_of_flat_pairs(name, act_steps):
    case, policy, base, obs = Case(name), make_policy(0).double(), make_policy(1), images()
    critic = nn.Linear(TO * DC, 1).double()
    algorithm = DPPO(case.transitions, (T, A), LOOSE, fine_tuned=case.steps, act_steps=act_steps)
    chain, old, advantage, returns = collected(case, policy, base, obs, act_steps)
    window = slice(None) if act_steps is None else slice(3) if act_steps == 3 else slice(1, 3)
    base_chain = sample_chain(
        base, obs, case.transitions, shape=(T, A), generator=torch.Generator().manual_seed(5)
    ).samples[:, -case.steps - 1 :]  # fmt: skip

    encoder = policy.encoder
    encoder.images = 0
    features = policy.features(obs)
    cache = policy.condition(features)
    batch = algorithm.minibatch({"chain": chain.double(), "log_prob": old.double()})
    result = algorithm.loss(policy, cache, batch, normalize_advantage(advantage))
    value = value_loss(critic(features.flatten(1))[:, 0], returns)
    cloning = algorithm.behaviour_cloning(
        InDouble(policy), cache, base, obs, generator=torch.Generator().manual_seed(5)
    )  # fmt: skip
    assert encoder.images == B * TO  # one encode for the actor, the critic and behaviour cloning
    (result.loss + 0.7 * value + 0.3 * cloning).backward()
    ours = gradients(policy, critic)

    encoder.images = 0
    parts = flat_loss(
        case, policy, critic, obs, chain.double(), old.double(), advantage, returns, window, LOOSE, base_chain.double()
    )  # fmt: skip
    assert encoder.images == (2 * case.steps + 1) * B * TO
    for got, want in zip((result.loss, value, cloning), parts, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    (parts[0] + 0.7 * parts[1] + 0.3 * parts[2]).backward()
    assert_same(ours, gradients(policy, critic), 1e-10)
    assert 0.0 < float(result.stats["clip_fraction"]) < 1.0  # both branches of the surrogate took part


def test_a_unet_on_images_has_the_gradients_of_flat_pairs(monkeypatch):
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")
    case, obs = Case("ddim-epsilon"), images()
    torch.manual_seed(0)
    unet = ConditionalUnet1D(
        A, global_cond_dim=TO * DC, diffusion_step_embed_dim=8, down_dims=(8, 16), n_groups=4
    )  # fmt: skip

    class OfFeatures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def encode(self, features):
            return self.unet.encode(global_cond=features.flatten(1))

        def denoise(self, cache, x, t):
            return self.unet.denoise(cache, x, t)

        def forward(self, sample, timestep, features):
            return self.unet(sample, timestep, global_cond=features.flatten(1))

    policy = make_policy(0)
    policy.denoiser = OfFeatures()
    policy = policy.double().eval()
    critic = nn.Linear(TO * DC, 1).double()
    chain, old, advantage, returns = collected(case, policy, None, obs)
    algorithm = DPPO(case.transitions, (T, A), LOOSE)
    batch = algorithm.minibatch({"chain": chain.double(), "log_prob": old.double()})
    loss = algorithm.loss(policy, policy.encode(obs), batch, normalize_advantage(advantage)).loss
    loss.backward()
    ours = gradients(policy)
    want, _, _ = flat_loss(
        case, policy, critic, obs, chain.double(), old.double(), advantage, returns, slice(None), LOOSE
    )
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    want.backward()
    assert_same(ours, gradients(policy), 1e-10)


def test_resnet18_gradients_agree_to_1e_5_in_float32():
    pytest.importorskip("transformers")
    from minidiff_fast.models import ImageEncoder

    torch.manual_seed(0)
    encoder = ImageEncoder({}, image_size=(34, 34), crop_size=(32, 32), keypoints=4)
    case, policy, obs = Case("ddim-epsilon"), make_policy(0, encoder, 8), images(size=34, batch=2)
    critic = nn.Linear(TO * 8, 1)
    chain, old, advantage, returns = collected(case, policy, None, obs)
    advantage, returns = advantage.float(), returns.float()
    algorithm = DPPO(case.transitions, (T, A), LOOSE)
    features = policy.features(obs)
    batch = algorithm.minibatch({"chain": chain, "log_prob": old})
    loss = algorithm.loss(policy, policy.condition(features), batch, normalize_advantage(advantage)).loss
    (loss + value_loss(critic(features.flatten(1))[:, 0], returns)).backward()
    ours = gradients(policy, critic)
    actor, value, _ = flat_loss(case, policy, critic, obs, chain, old, advantage, returns, slice(None), LOOSE)
    (actor + value).backward()
    flat = gradients(policy, critic)
    assert ours.keys() == flat.keys()
    both = [torch.cat([g.flatten() for g in grads.values()]) for grads in (ours, flat)]
    assert float((both[0] - both[1]).norm() / both[1].norm()) < 1e-5


@pytest.mark.parametrize("name", ["ddim-epsilon", "flow"])
def test_the_flat_form_through_the_same_loss_is_the_same(name):
    case, policy, obs = Case(name), make_policy(0).double(), images()
    chain, old, advantage, _ = collected(case, policy, None, obs)
    algorithm = DPPO(case.transitions, (T, A), LOOSE)
    batch = algorithm.minibatch({"chain": chain.double(), "log_prob": old.double()})
    batch["weight"] = torch.rand(old.shape, dtype=torch.float64) + 0.5
    advantage, valid = normalize_advantage(advantage), torch.tensor([True, False, True])
    level2 = algorithm.loss(policy, policy.encode(obs), batch, advantage, valid=valid)
    level2.loss.backward()
    ours, k = gradients(policy), case.steps
    flat = {name: tensor.flatten(0, 1)[:, None] for name, tensor in batch.items()}
    rows = {"image": obs["image"].repeat_interleave(k, 0)}
    pairs = algorithm.loss(
        policy, policy.encode(rows), flat, advantage.repeat_interleave(k), valid=valid.repeat_interleave(k)
    )  # fmt: skip
    pairs.loss.backward()
    torch.testing.assert_close(level2.loss, pairs.loss, rtol=1e-12, atol=1e-14)
    assert_same(ours, gradients(policy), 1e-11)
    for stat, number in level2.stats.items():
        torch.testing.assert_close(number, pairs.stats[stat], rtol=1e-10, atol=1e-12)


def test_rows_that_do_not_count_change_nothing():
    case, policy, obs = Case("ddim-epsilon"), make_policy(0).double(), images()
    chain, old, advantage, _ = collected(case, policy, None, obs)
    algorithm, two = DPPO(case.transitions, (T, A), LOOSE), slice(0, 2)
    alone = algorithm.minibatch({"chain": chain[two].double(), "log_prob": old[two].double()})
    wanted = algorithm.loss(policy, policy.encode({"image": obs["image"][two]}), alone, advantage[two])
    wanted.loss.backward()
    expected = gradients(policy)
    old[2], advantage[2] = -1e4, math.nan  # its ratio overflows
    batch = algorithm.minibatch({"chain": chain.double(), "log_prob": old.double()})
    found = algorithm.loss(
        policy, policy.encode(obs), batch, advantage, valid=torch.tensor([True, True, False])
    )  # fmt: skip
    found.loss.backward()
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-12, atol=1e-14)
    assert_same(gradients(policy), expected, 1e-11)
    assert all(bool(torch.isfinite(number)) for number in found.stats.values())


def test_the_mean_over_subsets_of_steps_is_the_loss_of_all(monkeypatch):
    case, policy, obs = Case("ddim-epsilon"), make_policy(0).double(), images()
    chain, old, advantage, _ = collected(case, policy, None, obs)
    algorithm = DPPO(case.transitions, (T, A), LOOSE)
    record = {"chain": chain.double(), "log_prob": old.double()}
    with torch.no_grad():
        cache = policy.encode(obs)
        full = algorithm.loss(policy, cache, algorithm.minibatch(record), advantage).loss
        losses = []
        for subset in itertools.combinations(range(5), 2):
            monkeypatch.setattr(
                dppo_module, "pick_steps", lambda *_, subset=subset, **__: torch.tensor(subset).expand(B, 2)
            )  # fmt: skip
            losses.append(algorithm.loss(policy, cache, algorithm.minibatch(record, k=2), advantage).loss)
    torch.testing.assert_close(torch.stack(losses).mean(), full, rtol=1e-12, atol=1e-14)


def test_steps_are_drawn_uniformly_without_replacement():
    generator = torch.Generator().manual_seed(0)
    pick = pick_steps(20_000, 5, 2, device=torch.device("cpu"), generator=generator)
    assert bool((pick[:, 0] < pick[:, 1]).all())
    share = torch.bincount(pick.flatten(), minlength=5) / len(pick)
    torch.testing.assert_close(share, torch.full((5,), 0.4), rtol=0.0, atol=0.015)
    again = pick_steps(20_000, 5, 2, device=torch.device("cpu"), generator=generator.manual_seed(0))
    assert torch.equal(pick, again)


@pytest.mark.parametrize("name", CASES)
def test_the_first_ratio_is_1(name):
    """Sampling and scoring read the same times, moments and clamps."""
    case, policy, base, obs = Case(name), make_policy(0), make_policy(1), images()
    algorithm = DPPO(case.transitions, (T, A), fine_tuned=case.steps, act_steps=3)
    cache = policy.encode(obs)
    generator = torch.Generator().manual_seed(0)
    decision = algorithm.act(policy, cache, obs=obs, base=base, generator=generator)
    assert decision.actions.shape == (B, T, A) and float(decision.actions.abs().max()) <= 1.0
    for k in (None, 2):
        batch = algorithm.minibatch(decision.record, k=k, generator=generator)
        stats = algorithm.loss(policy, cache, batch, torch.randn(B)).stats
        assert float((stats["ratio_max"] - 1).abs()) < 1e-5 and float((stats["ratio"] - 1).abs()) < 1e-6
        assert float(stats["approx_kl"]) < 1e-10 and float(stats["clip_fraction"]) == 0.0


def test_a_single_fine_tuned_step_is_finite():
    """K = 1 has no k / (K - 1)."""
    case, policy, obs = Case("ddim-epsilon"), make_policy(0), images()
    algorithm = DPPO(case.transitions, (T, A), fine_tuned=1)
    cache = policy.encode(obs)
    decision = algorithm.act(policy, cache, obs=obs, base=make_policy(1), generator=torch.Generator().manual_seed(0))
    result = algorithm.loss(policy, cache, algorithm.minibatch(decision.record), torch.randn(B))
    result.loss.backward()
    assert math.isfinite(float(result.loss.detach()))
    assert all(bool(torch.isfinite(grad).all()) for grad in gradients(policy).values())


def test_the_shares_of_clamps_are_told():
    case, policy, obs = Case("ddim-sample"), make_policy(0), images()
    with torch.no_grad():
        policy.denoiser.head[-1].bias.fill_(5.0)  # every clean sample beyond the clamp
    algorithm = DPPO(case.transitions, (T, A))
    cache = policy.encode(obs)
    record = algorithm.act(policy, cache, generator=torch.Generator().manual_seed(0)).record
    result = algorithm.loss(policy, cache, algorithm.minibatch(record), torch.randn(B))
    assert float(result.stats["saturated"]) == 1.0
    far = {"chain": record["chain"].clone(), "log_prob": record["log_prob"]}
    far["chain"][:, -1] += 50.0
    stats = algorithm.loss(policy, cache, algorithm.minibatch(far), torch.randn(B)).stats
    assert float(stats["log_prob_clamped"]) == pytest.approx(1 / 5)


def test_nothing_waits_for_the_device():
    """No .item(), no branch on values: the loss traces into one graph."""
    case, policy, obs = Case("ddim-epsilon"), make_policy(0), images()
    algorithm = DPPO(case.transitions, (T, A))
    cache = policy.encode(obs)
    record = algorithm.act(policy, cache, generator=torch.Generator().manual_seed(0)).record
    batch, advantage, valid = algorithm.minibatch(record), torch.randn(B), torch.tensor([True, True, False])
    wanted = algorithm.loss(policy, cache, batch, advantage, valid=valid)

    def loss(cache, batch, advantage, valid):
        return algorithm.loss(policy, cache, batch, normalize_advantage(advantage), valid=valid)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    found = compiled(cache, batch, advantage, valid)
    assert found.stats.keys() == wanted.stats.keys()
    torch.testing.assert_close(found.loss, loss(cache, batch, advantage, valid).loss)


def test_bad_input():
    case, policy, obs = Case("ddim-epsilon"), make_policy(0), images()
    algorithm = DPPO(case.transitions, (T, A))
    chain, old = torch.zeros(B, 6, T, A), torch.zeros(B, 5)
    for record, message in [
        ({"chain": chain[:, 1:], "log_prob": old}, r"chain must be \[B, 6, 4, 2\] = .*got \[3, 5, 4, 2\]"),
        ({"chain": chain, "log_prob": old[:, :1]}, r"log_prob must be \[B, 5\] = \[3, 5\], got \[3, 1\]"),
        ({"chain": chain, "log_prob": old[:1]}, r"log_prob must be \[B, 5\] = \[3, 5\], got \[1, 5\]"),
        (
            {"fpo_noise": old, "fpo_loss": old},
            "must hold chain, log_prob, got fpo_loss, fpo_noise: .*another policy class",
        ),
        ({"reinflow_chain": chain, "reinflow_log_prob": old}, "got reinflow_chain, reinflow_log_prob"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            algorithm.minibatch(record)
    for k in (0, 6, True, 2.0):
        with pytest.raises(InvalidArgument, match=r"must be in \[1, 5\]"):
            algorithm.minibatch({"chain": chain, "log_prob": old}, k=k)
    batch = algorithm.minibatch({"chain": chain, "log_prob": old})
    with torch.no_grad():
        cache = policy.encode(obs)
        with pytest.raises(InvalidArgument, match=r"advantage must be \[B\] = \[3\], got \[3, 5\]"):
            algorithm.loss(policy, cache, batch, torch.zeros(B, 5))
        with pytest.raises(InvalidArgument):  # one condition too few
            algorithm.loss(policy, policy.encode({"image": obs["image"][:2]}), batch, torch.zeros(B))
        policy.train()
        for call in (
            lambda: algorithm.loss(policy, cache, batch, torch.zeros(B)),
            lambda: algorithm.behaviour_cloning(policy, cache, make_policy(1), obs),
            lambda: algorithm.act(policy, cache),
        ):
            with pytest.raises(InvalidArgument, match="policy is in training mode"):
                call()
    for options in (
        {"fine_tuned": 0},
        {"fine_tuned": 6},
        {"fine_tuned": True},
        {"act_steps": 5},
        {"act_steps": (2, 2)},
    ):
        with pytest.raises(InvalidArgument, match=f"DPPO: {next(iter(options))} must"):
            DPPO(case.transitions, (T, A), **options)
    for options in (
        {"clip": 0.0}, {"clip_base": 0.02}, {"min_logprob_std": 0.0}, {"gamma_denoising": 1.1}, {"bc_weight": -1.0},
        {"log_prob_low": 3.0}, {"noise_clip": 0.0},
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=f"DPPOConfig: {next(iter(options))} must"):
            DPPOConfig(**options)
