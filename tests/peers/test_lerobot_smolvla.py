"""Level2SmolVLA against lerobot's SmolVLAPolicy, the real one, small, with random weights."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
from pathlib import Path

import pytest
import torch

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.lerobot import level2
from minidiff_fast.integrations.lerobot.smolvla import Level2SmolVLA

B, K = 3, 5
ALL = {"train_expert_only": False, "freeze_vision_encoder": False}


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
        return tiny.smolvla(lerobot, **options)

    return made


@pytest.fixture
def inputs(tiny):
    batch = tiny.batch(conditions=B)
    batch["action_is_pad"] = torch.arange(6) >= torch.tensor([6, 4, 0])[:, None]
    return batch


def peers_loss(policy, batch, drawn):
    """The peer's own loss on the batch repeated K times, with our noise and times."""
    k = drawn.samples
    rows = {name: value.repeat_interleave(k, 0) for name, value in batch.items()}
    return policy.forward(rows, noise=drawn.noise.flatten(0, 1), time=drawn.timesteps.flatten())[0]


def gradients(module):
    """None where nothing depends on a parameter; the peer has zeros for some of these."""
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
    [
        {},
        ALL,
        {**ALL, "attention_mode": "self_attn"},
        {**ALL, "self_attn_every_n_layers": -1, "num_expert_layers": 2},
        {**ALL, "add_image_special_tokens": True, "prefix_length": 40},
        {**ALL, "train_state_proj": False, "freeze_vision_encoder": True},
    ],
    ids=["expert only", "all", "self_attn", "half the layers", "special tokens", "frozen vision"],
)
def test_loss_and_every_gradient(build, inputs, options, k):
    policy = build(**options)
    found = check_against_peer(policy, inputs, k)
    names = {name.split("vlm_with_expert.")[-1].split(".")[0] for name in found}
    assert {"lm_expert", "model"} <= names and ("vlm" in names) == (options != {})


@pytest.mark.parametrize("padded", [True, False])
def test_cameras_that_miss(build, inputs, padded):
    policy = build(**ALL, empty_cameras=1)
    if not padded:
        del inputs["action_is_pad"]
    inputs["observation.images.camera0_padding_mask"] = torch.tensor([True, False, True])
    check_against_peer(policy, inputs, K)
    del inputs["observation.images.camera1"]
    check_against_peer(policy, inputs, K)


def test_the_loss_that_users_call(build, inputs):
    policy = build()
    adapter = level2(policy)
    drawn = adapter.draw(inputs, K, generator=torch.Generator().manual_seed(3))
    loss = adapter.loss(inputs, K, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss, peers_loss(policy, inputs, drawn), rtol=1e-6, atol=1e-6)
    assert drawn.timesteps.min() >= 0.001 and drawn.timesteps.max() <= 1.0
    inputs["action_is_pad"][:] = True
    assert adapter.loss(inputs, K).item() == 0.0


def test_one_pass_of_the_prefix_whatever_the_chunks(build, inputs):
    policy = build(**ALL)
    adapter = level2(policy)
    both = policy.model.vlm_with_expert
    calls = {"vision": 0, "vlm": 0}

    def counted(name):
        def hook(*_):
            calls[name] += 1

        return hook

    both.get_vlm_model().vision_model.register_forward_hook(counted("vision"))
    both.get_vlm_model().text_model.layers[0].mlp.register_forward_hook(counted("vlm"))
    adapter.step(inputs, K, generator=torch.Generator().manual_seed(2))
    assert calls == {"vision": 2, "vlm": 1}  # two cameras
    whole = gradients(policy)
    adapter.step(inputs, K, chunk=2, generator=torch.Generator().manual_seed(2))
    assert calls == {"vision": 4, "vlm": 2}
    parts = gradients(policy)
    assert whole.keys() == parts.keys()
    for name, gradient in parts.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def crops(lerobot, monkeypatch):
    """transformers 5.23 refuses the number of tokens to keep, which lerobot 0.6 gives, and takes one to remove."""
    module = lerobot("policies.smolvla.smolvlm_with_expert")

    class Cache(module.DynamicCache):
        def crop(self, length):
            for layer in self.layers:
                over = layer.get_seq_length() - length
                if over > 0:
                    layer.crop(-over)

    monkeypatch.setattr(module, "DynamicCache", Cache)
    return lerobot("policies.common.vla_utils").make_att_2d_masks


@pytest.mark.parametrize("options", [{}, {"attention_mode": "self_attn"}])
def test_denoising_is_the_peers_denoise_step(build, inputs, crops, options):
    policy = build(**options)
    adapter, model = level2(policy), policy.model
    x, t = torch.randn(B, 1, 6, 5), torch.rand(B, 1)
    with torch.no_grad():
        mine = adapter.denoise(adapter.encode(inputs), x, t)
        images, masks = policy.prepare_images(inputs)
        words, seen = inputs["observation.language.tokens"], inputs["observation.language.attention_mask"]
        embedded, pad, order = model.embed_prefix(images, masks, words, seen, state=policy.prepare_state(inputs))
        _, keys = model.vlm_with_expert.forward(
            attention_mask=crops(pad, order), position_ids=pad.cumsum(1) - 1, inputs_embeds=[embedded, None],
            use_cache=True,
        )  # fmt: skip
        theirs = model.denoise_step(pad, keys, x[:, 0], t[:, 0])
    torch.testing.assert_close(mine[:, 0], theirs, rtol=1e-5, atol=1e-5)


def test_sampling_and_the_policys_own_sampling(build, inputs, crops):
    policy = build()
    adapter = level2(policy)
    mine = adapter.sample(inputs, K, generator=torch.Generator().manual_seed(5))
    assert mine.shape == (B, K, 6, 3)
    noise = torch.randn(B, K, 6, 5, generator=torch.Generator().manual_seed(5))
    for sample in (0, K - 1):
        theirs = policy.predict_action_chunk(dict(inputs), noise=noise[:, sample])
        torch.testing.assert_close(mine[:, sample], theirs, rtol=1e-4, atol=1e-5)
    policy.reset()
    chosen = policy.select_action(dict(inputs), noise=noise[:, 0])
    torch.testing.assert_close(chosen, mine[:, 0, 0], rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidArgument, match="training mode"):
        adapter.train().sample(inputs)


def test_aloha(lerobot, tiny, crops):
    torch.manual_seed(0)
    size = tiny.Size(action=14, max_action=14, state=14, max_state=16)
    policy = tiny.smolvla(lerobot, size, adapt_to_pi_aloha=True)
    batch = tiny.batch(size, B)
    for name in ("action", "observation.state"):
        batch[name] = 0.02 + 0.03 * torch.rand(batch[name].shape)
    before = copy.deepcopy(batch)
    adapter = level2(policy)
    drawn = adapter.draw(batch, K)
    loss = adapter.objective.per_sample(adapter, adapter.encode(drawn.obs), drawn).mean()
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    torch.testing.assert_close(loss, peers_loss(policy, copy.deepcopy(batch), drawn), rtol=1e-5, atol=1e-6)
    mine = adapter.sample(batch, K, generator=torch.Generator().manual_seed(5))
    noise = torch.randn(B, K, 6, 14, generator=torch.Generator().manual_seed(5))
    theirs = policy.predict_action_chunk(copy.deepcopy(batch), noise=noise[:, 1])
    # The gripper's arcsine is steep: it has the larger error.
    torch.testing.assert_close(mine[:, 1], theirs, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_16_bit_weights(build, inputs):
    """The language model in bfloat16, as it is loaded, and the expert in float32 or bfloat16."""
    for narrow in (False, True):
        policy = build(**ALL)
        both = policy.model.vlm_with_expert
        (both if narrow else both.vlm).to(torch.bfloat16)
        adapter = level2(policy)
        drawn = adapter.draw(inputs, K, generator=torch.Generator().manual_seed(1))
        loss = adapter.objective.per_sample(adapter, adapter.encode(inputs), drawn).mean()
        wanted = peers_loss(policy, inputs, drawn)
        assert loss.dtype == wanted.dtype == torch.float32
        torch.testing.assert_close(loss, wanted, rtol=5e-3, atol=0)
        loss.backward()
        assert all(torch.isfinite(g).all() for g in gradients(policy).values())


def test_autocast(build, inputs):
    policy = build(**ALL)
    adapter = level2(policy)
    wide = adapter.loss(inputs, K, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = adapter.step(inputs, K, chunk=2, generator=torch.Generator().manual_seed(1)).loss
    torch.testing.assert_close(narrow, wide.detach(), rtol=1e-2, atol=0)


def test_compiled(lerobot, tiny, inputs):
    """The whole of a denoising pass is one graph."""
    adapter = level2(tiny.smolvla(lerobot, tiny.Size(layers=2)))
    cache = adapter.encode(inputs)
    x, t = torch.randn(B, K, 6, 5), torch.rand(B, K)
    compiled = torch.compile(adapter, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(cache, x, t), adapter(cache, x, t), rtol=1e-6, atol=1e-6)


def test_copies_pickles_and_state_dicts(build, inputs):
    policy = build()
    adapter = level2(policy)
    assert all(name.startswith("policy.") for name in adapter.state_dict())
    assert {id(p) for p in adapter.parameters()} == {id(p) for p in policy.parameters()}

    def loss(module):
        return module.loss(inputs, K, generator=torch.Generator().manual_seed(4))

    wanted = loss(adapter)
    for other in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert isinstance(other, Level2SmolVLA) and torch.equal(loss(other), wanted)
    fresh = level2(build())
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(1.0)
    fresh.load_state_dict(adapter.state_dict())
    assert torch.equal(loss(fresh), wanted)


def test_what_is_refused(build, inputs):
    with pytest.raises(InvalidArgument, match=r"Level2SmolVLA: expected Linear with model .*lerobot 0.6"):
        Level2SmolVLA(torch.nn.Linear(2, 2))
    policy = build()
    inputs["action"] = inputs["action"][:, 1:]
    with pytest.raises(InvalidArgument, match=r"\[B, chunk_size, max_action_dim\] = \[B, 6, 5\], got \[3, 5, 5\]"):
        level2(policy).draw(inputs, K)
    policy = build(num_expert_layers=2)  # layer 2 of the language model is joint, layer 1 of the expert is not
    with pytest.raises(InvalidArgument, match="layer 2 of the expert attends jointly.*must take 24 channels, got 16"):
        level2(policy)
