"""Level2MultiTaskDiT against lerobot's MultiTaskDiTPolicy, the real one, on batches repeated K times."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.lerobot import level2
from minidiff_fast.integrations.lerobot.multi_task_dit import Level2MultiTaskDiT, NarrowingFlow
from minidiff_fast.level2 import Level2Batch
from minidiff_fast.shapes import Layout, merge_samples

B, K, T, A = 3, 5, 8, 2
KINDS: dict[str, dict[str, Any]] = {
    "diffusion": {},
    "sample, attention without rotary": {"prediction_type": "sample", "use_rope": False, "use_positional_encoding": True},
    "flow": {"objective": "flow_matching"},
    "flow, uniform, narrowing": {
        "objective": "flow_matching", "timestep_sampling_strategy": "uniform", "sigma_min": 0.1,
        "do_mask_loss_for_padding": True,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user's CPU runs: not Triton's interpreter, which is slow."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP of random weights in a folder, from which the peer loads it as it loads any."""
    from transformers import CLIPConfig, CLIPModel

    folder = str(tmp_path_factory.mktemp("clip"))
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 2}
    vision = {**size, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    return folder


@pytest.fixture
def policy(lerobot: Callable[[str], Any], clip: str) -> Callable[..., Any]:
    def make(**options: Any) -> Any:
        types = lerobot("configs.types")
        configuration = lerobot("policies.multi_task_dit.configuration_multi_task_dit").MultiTaskDiTConfig(
            device="cpu", n_obs_steps=2, horizon=T, n_action_steps=4, hidden_dim=16, num_layers=2, num_heads=2,
            timestep_embed_dim=8, vision_encoder_name=clip, text_encoder_name=clip, image_crop_shape=None,
            num_train_timesteps=10, num_inference_steps=2, num_integration_steps=2,
            input_features={
                "observation.state": types.PolicyFeature(types.FeatureType.STATE, (3,)),
                "observation.images.front": types.PolicyFeature(types.FeatureType.VISUAL, (3, 16, 16)),
            },
            output_features={"action": types.PolicyFeature(types.FeatureType.ACTION, (A,))},
            **options,
        )  # fmt: skip
        torch.manual_seed(0)
        made = lerobot("policies.multi_task_dit.modeling_multi_task_dit").MultiTaskDiTPolicy(configuration)
        for block in made.noise_predictor.transformer_blocks:  # they start as zeros, through which nothing passes
            nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
            nn.init.normal_(block.adaLN_modulation[1].bias, std=0.1)
        return made.eval()

    return make


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "observation.state": torch.randn(B, 2, 3, generator=generator),
        "observation.images.front": torch.rand(B, 2, 3, 16, 16, generator=generator),
        "observation.language.tokens": torch.randint(3, 50, (B, 8), generator=generator),
        "observation.language.attention_mask": torch.ones(B, 8, dtype=torch.long),
        "action": torch.randn(B, T, A, generator=generator),
        "action_is_pad": torch.arange(T)[None] >= torch.tensor([8, 5, 1])[:, None],
    }


def repeated(values: dict[str, Tensor], k: int, layout: Layout) -> dict[str, Tensor]:
    return {name: merge_samples(x[:, None].expand(-1, k, *x.shape[1:]), layout) for name, x in values.items()}


@contextmanager
def drawing(noise: Tensor, times: Tensor) -> Iterator[None]:
    """torch draws these in place of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda _: noise)
        patch.setattr(torch, "randint", lambda **_: times)
        patch.setattr(torch, "rand", lambda *_, **__: times)
        patch.setattr(torch.distributions.Beta, "sample", lambda *_: 1 - times / 0.999)
        yield


def peer_loss(policy: Any, values: dict[str, Tensor], drawn: Level2Batch, layout: Layout) -> Tensor:
    rows = repeated(values, drawn.samples, layout)
    with drawing(merge_samples(drawn.noise, layout), merge_samples(drawn.timesteps, layout)):
        loss: Tensor = policy.forward(rows)[0]
    return loss


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "layout"), [(1, "bk"), (K, "bk"), (K, "kb")])
def test_loss_and_gradients_are_the_peers(policy: Any, kind: str, k: int, layout: Layout) -> None:
    peer, values = policy(**KINDS[kind]), batch()
    adapter = level2(peer)
    assert isinstance(adapter, Level2MultiTaskDiT)
    drawn = adapter.draw(values, k, generator=torch.Generator().manual_seed(2))
    wanted_loss = peer_loss(peer, values, drawn, layout)
    wanted = gradients(peer, wanted_loss)
    assert len(wanted) > 30
    loss = adapter.loss(values, k, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(peer, loss), wanted, rtol=1e-4, atol=2e-6)


def test_predictions_are_the_peers(policy: Any) -> None:
    peer, values = policy(), batch()
    adapter = Level2MultiTaskDiT(peer)
    drawn = adapter.draw(values, K)
    x, t, _ = drawn.noised_by(adapter.objective.process)
    condition = peer.observation_encoder.encode(peer._prepare_batch(values))
    wanted = peer.noise_predictor(x.flatten(0, 1), t.flatten(), condition.repeat_interleave(K, 0))
    torch.testing.assert_close(adapter(adapter.encode(values), x, t).flatten(0, 1), wanted, rtol=1e-5, atol=1e-5)


def test_chunked_steps_encode_once(policy: Any) -> None:
    peer, values = policy(), batch()
    adapter = Level2MultiTaskDiT(peer)
    wanted = gradients(peer, adapter.loss(values, K, generator=torch.Generator().manual_seed(3)))
    calls: list[int] = []
    peer.observation_encoder.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    peer.zero_grad()
    adapter.step(values, K, chunk=2, generator=torch.Generator().manual_seed(3))
    assert len(calls) == 1
    found = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)


def test_copies_and_checkpoints(policy: Any) -> None:
    peer, values = policy(), batch()
    adapter = Level2MultiTaskDiT(peer)
    wanted = adapter.loss(values, 2, generator=torch.Generator().manual_seed(4))
    other = Level2MultiTaskDiT(policy(prediction_type="epsilon"))
    nn.init.normal_(other.policy.noise_predictor.output_proj.weight)
    other.load_state_dict(adapter.state_dict())
    assert {name.removeprefix("policy.") for name in adapter.state_dict()} == set(peer.state_dict())
    adapter.policy.noise_predictor, kept = pickle.loads(pickle.dumps(peer.noise_predictor)), peer.noise_predictor
    for same in (copy.deepcopy(adapter), other, adapter):
        loss = same.loss(values, 2, generator=torch.Generator().manual_seed(4))
        torch.testing.assert_close(loss, wanted, rtol=0, atol=0)
    peer.noise_predictor = kept
    assert (
        adapter.objective.process.prediction_type
        == pickle.loads(pickle.dumps(adapter.objective)).process.prediction_type
    )


def test_the_policy_still_acts(policy: Any) -> None:
    peer, values = policy(), batch()
    observation = {name: x[:, -1] for name, x in values.items() if "images" in name or "state" in name}
    observation |= {name: x for name, x in values.items() if "language" in name}

    def act() -> Tensor:
        peer.reset()
        torch.manual_seed(5)
        return peer.select_action(dict(observation))

    before = act()
    Level2MultiTaskDiT(peer).step(values, 2)
    torch.testing.assert_close(act(), before, rtol=0, atol=0)


def test_denoise_compiles_in_one_graph(policy: Any) -> None:
    peer, values = policy(), batch()
    adapter = Level2MultiTaskDiT(peer)
    wanted = gradients(peer, adapter.loss(values, K, generator=torch.Generator().manual_seed(3)))
    compiled: Any = torch.compile(adapter, backend="eager", fullgraph=True)
    peer.zero_grad()
    adapter.step(values, K, wrapped=compiled, generator=torch.Generator().manual_seed(3))
    found = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)


def test_autocast(policy: Any) -> None:
    adapter, values = Level2MultiTaskDiT(policy()), batch()
    wanted = adapter.loss(values, K, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        loss = adapter.loss(values, K, generator=torch.Generator().manual_seed(3))
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=0.03, atol=0.0)


def test_dropout_runs(policy: Any) -> None:
    adapter, values = Level2MultiTaskDiT(policy(dropout=0.5)), batch()
    adapter.train()
    first, second = (adapter.loss(values, 2, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert first.isfinite() and first != second


def test_other_policies_are_refused(policy: Any) -> None:
    with pytest.raises(
        InvalidArgument, match=r"must be MultiTaskDiTPolicy as in lerobot 0\.6, with policy\.observation_e"
    ):
        Level2MultiTaskDiT(nn.Linear(1, 1))
    with pytest.raises(InvalidArgument, match="one of them 1"):
        Level2MultiTaskDiT(policy(objective="flow_matching", timestep_sampling_beta=2.0))
    peer = policy()
    peer.noise_predictor.transformer_blocks[1].adaLN_modulation[0] = nn.GELU()
    with pytest.raises(InvalidArgument, match=r"blocks\[1\]\.adaLN_modulation must be SiLU and Linear"):
        Level2MultiTaskDiT(peer)


class Adapted(nn.Module):
    """As peft's layers: it has the base layer's weight and does more than it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


def test_layers_adapted_later_are_not_ignored(policy: Any) -> None:
    adapter, values = Level2MultiTaskDiT(policy()), batch()
    modulation = adapter.policy.noise_predictor.transformer_blocks[1].adaLN_modulation
    modulation[1] = Adapted(modulation[1])
    with pytest.raises(InvalidArgument, match=r"Level2MultiTaskDiT: reads the parameters .*Adapted.*merge_and_unload"):
        adapter.loss(values, 2)


def test_the_policys_mode_is_the_adapters(policy: Any) -> None:
    assert not level2(policy()).training and level2(policy().train()).training


def test_narrowing_flow() -> None:
    with pytest.raises(InvalidArgument, match="sigma_min in"):
        NarrowingFlow(sigma_min=1.5)
    x0, noise, t = torch.randn(1, 2, 3), torch.randn(1, 1, 2, 3), torch.ones(1, 1)
    torch.testing.assert_close(NarrowingFlow(sigma_min=0.1).noised(x0, noise, t).x, x0[:, None] + 0.1 * noise)
