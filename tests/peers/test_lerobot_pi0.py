"""Level2PI0 against lerobot's PI0Policy, the real one, small, with random weights."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.lerobot import level2
from minidiff_fast.integrations.lerobot._flow_vla import Turns
from minidiff_fast.integrations.lerobot.pi0 import Level2PI0

B, K = 3, 5


@pytest.fixture(autouse=True)
def plain_ops(monkeypatch):
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")


@pytest.fixture(scope="module")
def tiny():
    path = Path(__file__).resolve().parents[2] / "bench" / "tiny_vla.py"
    spec = importlib.util.spec_from_file_location("tiny_vla", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_vla"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tiny_vla"]


@pytest.fixture
def build(lerobot, tiny):
    def made(**options):
        torch.manual_seed(0)
        return tiny.pi0(lerobot, **options)

    return made


@pytest.fixture
def inputs(tiny):
    return tiny.batch(conditions=B)


def peers_loss(policy, batch, drawn):
    """The peer's own loss on the batch repeated K times, with our noise and times."""
    k = drawn.samples
    rows = {name: value.repeat_interleave(k, 0) for name, value in batch.items()}
    with (
        mock.patch.object(policy.model, "sample_noise", lambda *_: drawn.noise.flatten(0, 1)),
        mock.patch.object(policy.model, "sample_time", lambda *_: drawn.timesteps.flatten()),
    ):
        return policy.forward(rows)[0]


def gradients(module):
    """None where nothing depends on a parameter; the peer has zeros for the last queries of the language model."""
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def check_against_peer(policy, batch, k, tolerance=1e-5):
    adapter = level2(policy)
    drawn = adapter.draw(batch, k, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn.actions[..., :3], batch["action"]) and drawn.noise.shape == (B, k, 6, 5)
    loss = adapter.objective.per_sample(adapter, adapter.encode(batch), drawn).mean()
    loss.backward()
    mine = gradients(policy)
    wanted = peers_loss(policy, batch, drawn)
    wanted.backward()
    theirs = gradients(policy)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    largest = max(g.abs().max() for g in theirs.values())
    for name in mine.keys() | theirs.keys():
        a, b = (g.get(name, torch.zeros(())) for g in (mine, theirs))
        assert (a - b).abs().max() <= tolerance * max(b.abs().max(), 0.01 * largest), name
    return mine


@pytest.mark.parametrize("k", [1, K])
@pytest.mark.parametrize(
    "options",
    [{}, {"freeze_vision_encoder": True}, {"train_expert_only": True}, {"time_sampling_beta_alpha": 2.0}],
    ids=["all", "frozen vision", "expert only", "other times"],
)
def test_loss_and_every_gradient(build, inputs, options, k):
    found = check_against_peer(build(**options), inputs, k)
    names = {name.removeprefix("model.").removeprefix("paligemma_with_expert.").split(".")[0] for name in found}
    assert {"gemma_expert", "state_proj"} <= names and ("paligemma" in names) == ("train_expert_only" not in options)


def test_a_camera_that_misses_and_padded_actions(build, inputs):
    """The peer masks the camera, and counts actions beyond the episode's end."""
    policy = build()
    whole = level2(policy).loss(inputs, K, generator=torch.Generator().manual_seed(1))
    inputs["action_is_pad"] = torch.arange(6) >= torch.tensor([6, 4, 0])[:, None]
    check_against_peer(policy, inputs, K)
    assert torch.equal(level2(policy).loss(inputs, K, generator=torch.Generator().manual_seed(1)), whole)
    del inputs["observation.images.camera1"]
    check_against_peer(policy, inputs, K)


def test_gradient_checkpointing(build, inputs):
    policy = build(gradient_checkpointing=True)
    check_against_peer(policy, inputs, K)
    check_against_peer(policy.train(), inputs, K)


class Adapted(torch.nn.Module):
    """A linear layer with LoRA and its dropout."""

    def __init__(self, base):
        super().__init__()
        self.base, self.drop = base, torch.nn.Dropout(0.5)
        self.down, self.up = torch.nn.Linear(base.in_features, 4), torch.nn.Linear(4, base.out_features)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.drop(x)))


def test_gradient_checkpointing_with_dropout(build, inputs):
    """Layers that run again drop what they dropped."""
    policy = build().train()
    for layer in policy.model.paligemma_with_expert.gemma_expert.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
    adapter, found = level2(policy), []
    for saves in (False, True):
        policy.model.gradient_checkpointing_enabled = saves
        torch.manual_seed(3)
        adapter.loss(inputs, K, generator=torch.Generator().manual_seed(1)).backward()
        found.append(gradients(policy))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_one_pass_of_the_prefix_whatever_the_chunks(build, inputs):
    policy = build()
    adapter, both = level2(policy), policy.model.paligemma_with_expert
    calls = {"vision": 0, "vlm": 0, "state": 0}

    def counted(name):
        def hook(*_):
            calls[name] += 1

        return hook

    both.paligemma.model.vision_tower.register_forward_hook(counted("vision"))
    both.paligemma.model.language_model.layers[0].mlp.register_forward_hook(counted("vlm"))
    policy.model.state_proj.register_forward_hook(counted("state"))
    adapter.step(inputs, K, generator=torch.Generator().manual_seed(2))
    assert calls == {"vision": 2, "vlm": 1, "state": 1}  # two cameras
    whole = gradients(policy)
    adapter.step(inputs, K, chunk=2, generator=torch.Generator().manual_seed(2))
    assert calls == {"vision": 4, "vlm": 2, "state": 2}
    parts = gradients(policy)
    assert whole.keys() == parts.keys()
    for name, gradient in parts.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def masks(lerobot, monkeypatch):
    """transformers 5.23 takes no cache_position, which lerobot 0.6 hands over."""
    module = lerobot("policies.pi_gemma")
    made = module.create_causal_mask
    monkeypatch.setattr(module, "create_causal_mask", lambda cache_position=None, **arguments: made(**arguments))


def test_sampling_and_the_policys_own_sampling(build, inputs, masks):
    policy = build()
    adapter = level2(policy)
    mine = adapter.sample(inputs, K, generator=torch.Generator().manual_seed(5))
    assert mine.shape == (B, K, 6, 3)
    noise = torch.randn(B, K, 6, 5, generator=torch.Generator().manual_seed(5))
    for sample in (0, K - 1):
        theirs = policy.predict_action_chunk(dict(inputs), noise=noise[:, sample])
        torch.testing.assert_close(mine[:, sample], theirs, rtol=1e-4, atol=1e-5)
    with mock.patch.object(policy.model, "sample_noise", lambda *_: noise[:, 0]):
        chosen = policy.select_action(dict(inputs))
    torch.testing.assert_close(chosen, mine[:, 0, 0], rtol=1e-4, atol=1e-5)
    policy.train()
    with pytest.raises(InvalidArgument, match="training mode"):
        adapter.sample(inputs)


def test_denoising_is_the_peers_denoise_step(build, inputs, masks):
    policy = build()
    adapter, model = level2(policy), policy.model
    x, t = torch.randn(B, K, 6, 5), torch.rand(B, K)
    caught = []

    def stop(*_, **arguments):
        caught.append(arguments)
        return torch.zeros(B, 6, 5)

    with mock.patch.object(model, "denoise_step", stop):
        policy.predict_action_chunk(dict(inputs))
    with torch.no_grad():
        mine = adapter.denoise(adapter.encode(inputs), x, t)
        for k in range(K):
            theirs = model.denoise_step(**{**caught[0], "x_t": x[:, k], "timestep": t[:, k]})
            torch.testing.assert_close(mine[:, k], theirs, rtol=1e-5, atol=1e-5)


def test_16_bit_weights(build, inputs):
    policy = build(dtype="bfloat16")
    adapter = level2(policy)
    drawn = adapter.draw(inputs, K, generator=torch.Generator().manual_seed(1))
    loss = adapter.objective.per_sample(adapter, adapter.encode(inputs), drawn).mean()
    wanted = peers_loss(policy, inputs, drawn)
    assert loss.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=5e-3, atol=0)
    loss.backward()
    assert all(torch.isfinite(g).all() for g in gradients(policy).values())


def test_16_bit_frequencies(lerobot, tiny):
    """bfloat16 rounds the peer's rotary frequencies: far along a prefix that makes another network, which is trained."""
    size = tiny.Size(image=104, head_dim=64, layers=2, expert_width=32)  # 338 tokens of images
    torch.manual_seed(0)
    policy = tiny.pi0(lerobot, size, dtype="bfloat16")
    both = policy.model.paligemma_with_expert
    with torch.no_grad():
        for layer in [*both.paligemma.model.language_model.layers, *both.gemma_expert.model.layers]:
            layer.self_attn.q_proj.weight.mul_(4)
            layer.self_attn.k_proj.weight.mul_(4)
    batch = tiny.batch(size, 1)
    adapter = level2(policy)
    drawn = adapter.draw(batch, 2, generator=torch.Generator().manual_seed(1))
    noised = adapter.objective.process.noised(drawn.actions, drawn.noise, drawn.timesteps)

    def peers():
        """The peer's loss and velocity."""
        found = []
        hook = policy.model.action_out_proj.register_forward_hook(lambda *a: found.append(a[-1]))
        with torch.no_grad():
            loss = peers_loss(policy, batch, drawn)
        hook.remove()
        return loss, found[0]

    def ours(adapter):
        with torch.no_grad():
            cache = adapter.encode(batch)
            loss = adapter.objective.per_sample(adapter, cache, drawn).mean()
            return loss, adapter.denoise(cache, noised.x, noised.t).flatten(0, 1)

    (wanted_loss, wanted), (loss, velocity) = peers(), ours(adapter)
    rotary = both.paligemma.model.language_model.rotary_emb
    rounded = rotary.inv_freq.clone()
    rotary.inv_freq = 10_000.0 ** -(torch.arange(0, 64, 2).float() / 64)
    _, exact = peers()
    rotary.inv_freq = rounded
    both.float()  # the same values, computed in float32
    policy.float()
    (true_loss, true), (wide_loss, wide) = peers(), ours(level2(policy))
    torch.testing.assert_close(wide, true, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wide_loss, true_loss, rtol=1e-5, atol=0)
    noise = (wanted - true).norm()
    assert (velocity - wanted).norm() < 1.5 * noise and (velocity - true).norm() < 1.5 * noise
    assert (exact - wanted).norm() > 3 * noise
    torch.testing.assert_close(loss, wanted_loss, rtol=5e-3, atol=0)


def test_gradients_with_rounded_frequencies(build, inputs):
    """As above in float32, where the peer's rotation can be compared exactly."""
    for options in ({}, {"gradient_checkpointing": True}):
        policy = build(dtype="bfloat16", **options).float()
        check_against_peer(policy.train(), inputs, K)
    adapter = level2(policy.eval())
    x, t = torch.randn(B, K, 6, 5), torch.rand(B, K)
    with torch.no_grad():
        cache = adapter.encode(inputs)
        compiled = torch.compile(adapter, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(cache, x, t), adapter(cache, x, t), rtol=1e-6, atol=1e-6)
        exact = level2(build())
        exact.load_state_dict(adapter.state_dict())
        assert not torch.allclose(exact(exact.encode(inputs), x, t), adapter(cache, x, t), rtol=1e-6, atol=1e-6)
        narrowed = copy.deepcopy(exact).to(torch.bfloat16)  # after the adapter was made
        assert isinstance(narrowed._turns(torch.zeros(B, 1, 6)), Turns)


def test_autocast(build, inputs):
    adapter = level2(build())
    wide = adapter.loss(inputs, K, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = adapter.step(inputs, K, chunk=2, generator=torch.Generator().manual_seed(1)).loss
    torch.testing.assert_close(narrow, wide.detach(), rtol=1e-2, atol=0)


def test_compiled(lerobot, tiny, inputs):
    """The whole of a denoising pass is one graph."""
    adapter = level2(tiny.pi0(lerobot, tiny.Size(layers=2)))
    cache = adapter.encode(inputs)
    x, t = torch.randn(B, K, 6, 5), torch.rand(B, K)
    compiled = torch.compile(adapter, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(cache, x, t), adapter(cache, x, t), rtol=1e-6, atol=1e-6)


def test_copies_and_state_dicts(build, inputs):
    policy = build()
    adapter = level2(policy)
    assert all(name.startswith("policy.") for name in adapter.state_dict())
    assert {id(p) for p in adapter.parameters()} == {id(p) for p in policy.parameters()}

    def loss(module):
        return module.loss(inputs, K, generator=torch.Generator().manual_seed(4))

    wanted = loss(adapter)
    other = copy.deepcopy(adapter)
    assert isinstance(other, Level2PI0) and torch.equal(loss(other), wanted)
    fresh = level2(build())
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(1.0)
    fresh.load_state_dict(adapter.state_dict())
    assert torch.equal(loss(fresh), wanted)


def test_what_the_adapter_adds_can_be_pickled(build):
    """The peer's policy cannot: the class of its layers is local to a function."""
    policy = build()
    with pytest.raises((AttributeError, pickle.PicklingError), match="_get_pi_gemma_decoder_layer_base"):
        pickle.dumps(policy)
    adapter = level2(policy)
    adapter.policy = torch.nn.Linear(2, 2)
    other = pickle.loads(pickle.dumps(adapter))
    assert isinstance(other, Level2PI0) and other.objective.width == 3
    assert other._decoder == adapter._decoder


def test_what_is_refused(build, inputs):
    with pytest.raises(InvalidArgument, match=r"Level2PI0: expected Linear with model .*lerobot 0.6"):
        Level2PI0(torch.nn.Linear(2, 2))
    with pytest.raises(InvalidArgument, match=r"one of them 1.*alpha = 1.5, beta = 2.0"):
        level2(build(time_sampling_beta_beta=2.0))
    policy = build()
    inputs["action"] = inputs["action"][:, 1:]
    with pytest.raises(InvalidArgument, match=r"\[B, chunk_size, max_action_dim\] = \[B, 6, 5\], got \[3, 5, 5\]"):
        level2(policy).draw(inputs, K)
    rotary = policy.model.paligemma_with_expert.paligemma.model.language_model.rotary_emb
    rotary.inv_freq.mul_(2.0)
    with pytest.raises(InvalidArgument, match="rotary embedding must turn all 8 channels"):
        level2(policy)
