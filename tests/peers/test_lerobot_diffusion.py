"""Level2Diffusion against lerobot's DiffusionPolicy, the real one: losses, every gradient, masks, weights there and back.

Models are float64; noise is float32 on both sides, so figures agree to float32 of the noised actions.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations import _unet_keys as keys
from minidiff_fast.integrations.lerobot import level2
from minidiff_fast.integrations.lerobot.diffusion import Level2Diffusion, from_unet, to_unet

B, K, T, TO, A = 3, 5, 8, 2, 2
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


def tiny_resnet(weights: Any = None) -> nn.Module:
    """Children as those of torchvision's ResNets: the last two are the pool and the classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Identity(),
        nn.Identity(),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops' definitions; their kernels have tests of their own."""
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")


class Double(nn.Module):
    """lerobot's embedding of integer timesteps is float32, whatever its layers are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).double()


def build(lerobot: Any, images: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    modeling = lerobot("policies.diffusion.modeling_diffusion")
    types = lerobot("configs.types")
    kind, feature = types.FeatureType, types.PolicyFeature
    inputs = {"observation.state": feature(type=kind.STATE, shape=(3,))}
    for i in range(images):
        inputs[f"observation.images.{i}"] = feature(type=kind.VISUAL, shape=(3, 16, 16))
    if not images:
        inputs["observation.environment_state"] = feature(type=kind.ENV, shape=(4,))
    options = {"n_obs_steps": TO, "horizon": T, "n_action_steps": 4, "down_dims": (16, 32), **options}
    config = lerobot("policies.diffusion.configuration_diffusion").DiffusionConfig(
        input_features=inputs, output_features={"action": feature(type=kind.ACTION, shape=(A,))}, device="cpu",
        diffusion_step_embed_dim=16, pretrained_backbone_weights=None, use_group_norm=True,
        spatial_softmax_num_keypoints=4, num_inference_steps=3, **options,
    )  # fmt: skip
    models = SimpleNamespace(models=SimpleNamespace(resnet18=tiny_resnet))
    with mock.patch.object(modeling, "torchvision", models):
        policy = modeling.DiffusionPolicy(config)
    if dtype == torch.float64:
        unet = getattr(policy.diffusion.unet, "_orig_mod", policy.diffusion.unet)
        unet.diffusion_step_encoder[0] = Double(unet.diffusion_step_encoder[0])
    return policy.to(dtype)


def batch_of(policy: Any, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    made = {
        "observation.state": torch.randn(B, TO, 3), "observation.environment_state": torch.randn(B, TO, 4),
        "action": torch.randn(B, T, A),
    }  # fmt: skip
    for key in policy.config.image_features:
        made[key] = torch.rand(B, TO, 3, 16, 16)
    made = {key: value.to(dtype) for key, value in made.items()}
    made["action_is_pad"] = torch.arange(T)[None] >= torch.tensor([8, 5, 1])[:, None]
    return made


@contextmanager
def feeding(noise: Tensor, times: Tensor) -> Iterator[None]:
    """What the peer draws."""
    randn, randint = (lambda *_, value=value, **__: value.clone() for value in (noise, times))
    with mock.patch.object(torch, "randn", randn), mock.patch.object(torch, "randint", randint):
        yield


def peer_gradients(policy: Any, batch: dict[str, Tensor], drawn: Any, layout: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The peer's own loss on conditions repeated K times, and the gradients."""
    k = drawn.samples
    repeat = (lambda x: x.repeat_interleave(k, 0)) if layout == "bk" else (lambda x: x.repeat(k, *[1] * (x.dim() - 1)))
    order = (lambda x: x) if layout == "bk" else (lambda x: x.transpose(0, 1))
    policy.zero_grad()
    with feeding(order(drawn.noise).flatten(0, 1), order(drawn.timesteps).flatten()):
        loss, _ = policy.forward({name: repeat(value) for name, value in batch.items()})
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("layout", ["bk", "kb"])
@pytest.mark.parametrize("k", [1, K])
@pytest.mark.parametrize(
    ("images", "options"),
    [
        (0, {"do_mask_loss_for_padding": True}),
        (0, {"prediction_type": "sample", "use_film_scale_modulation": False, "kernel_size": 3}),
        (2, {"do_mask_loss_for_padding": True, "noise_scheduler_type": "DDIM"}),
        (2, {"use_separate_rgb_encoder_per_camera": False}),
    ],
)
def test_losses_and_every_gradient(lerobot: Any, images: int, options: Any, k: int, layout: str) -> None:
    policy = build(lerobot, images, **options)
    adapter, batch = level2(policy), batch_of(policy)
    assert isinstance(adapter, Level2Diffusion)
    drawn = adapter.draw(batch, k, generator=torch.Generator().manual_seed(1))
    wanted, gradients = peer_gradients(policy, batch, drawn, layout)
    loss = adapter.loss(batch, k, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss.double(), wanted, **CLOSE)
    loss.backward()
    # Tied: the peer's parameters have the gradients.
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_everything_padded_is_zero(lerobot: Any) -> None:
    policy = build(lerobot, do_mask_loss_for_padding=True)
    batch = batch_of(policy)
    batch["action_is_pad"][:] = True
    assert level2(policy).loss(batch, K).item() == 0.0 == policy.forward(batch)[0].item()


def test_images_are_encoded_once(lerobot: Any) -> None:
    policy = build(lerobot, 2, do_mask_loss_for_padding=True)
    adapter, batch, rows = level2(policy), batch_of(policy), []
    policy.diffusion.rgb_encoder[0].register_forward_hook(lambda module, given, out: rows.append(len(given[0])))
    result = adapter.step(batch, K, chunk=2, generator=torch.Generator().manual_seed(1))
    assert rows == [B * TO]
    chunked = {name: p.grad.clone() for name, p in policy.named_parameters()}
    adapter.zero_grad()
    loss = adapter.loss(batch, K, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(result.loss, loss)
    loss.backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(chunked[name], parameter.grad, **CLOSE)


def test_one_observation_step_without_its_axis(lerobot: Any) -> None:
    policy = build(lerobot, 1, n_obs_steps=1)
    batch = batch_of(policy)
    batch = {name: value[:, :1] if name.startswith("observation") else value for name, value in batch.items()}
    bare = {name: value[:, 0] if "images" in name else value for name, value in batch.items()}
    adapter = level2(policy)
    for made in (batch, bare):
        drawn = adapter.draw(made, 1, generator=torch.Generator().manual_seed(1))
        wanted, _ = peer_gradients(policy, made, drawn, "bk")
        loss = adapter.loss(made, 1, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(loss.double(), wanted, **CLOSE)


def test_weights_go_there_and_back_bit_for_bit(lerobot: Any) -> None:
    policy = build(lerobot, dtype=torch.float32)
    unet, before = policy.diffusion.unet, copy.deepcopy(policy.diffusion.unet.state_dict())
    state = torch.get_rng_state()
    ours = from_unet(unet)
    assert torch.equal(state, torch.get_rng_state()), "a conversion draws nothing"
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
    to_unet(ours, unet)
    for name, value in unet.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_training_the_adapter_trains_the_policy(lerobot: Any) -> None:
    policy = build(lerobot, 1, dtype=torch.float32)
    adapter, batch = level2(policy), batch_of(policy, torch.float32)
    assert {id(p) for p in adapter.parameters()} == {id(p) for p in policy.get_optim_params()}
    assert not any(name.startswith("policy") for name in adapter.state_dict())
    optimizer = torch.optim.Adam(policy.get_optim_params(), 1e-2)

    def predicted(policy: Any) -> Tensor:
        torch.manual_seed(1)  # the sampler's own noise
        return policy.predict_action_chunk(batch)

    before = predicted(policy)
    adapter.step(batch, K)
    optimizer.step()
    assert adapter.to_peer() is policy
    assert not torch.equal(before, predicted(policy))
    fresh = build(lerobot, 1, dtype=torch.float32)
    fresh.load_state_dict(policy.state_dict())
    assert torch.equal(predicted(fresh), predicted(policy))


def test_weights_that_came_apart_go_to_the_policy(lerobot: Any) -> None:
    policy = build(lerobot, 1, dtype=torch.float32)
    adapter = level2(policy)
    adapter.load_state_dict({name: v + 1 for name, v in adapter.state_dict().items()}, assign=True)
    assert isinstance(adapter, Level2Diffusion)
    adapter.to_peer()
    for name, value in from_unet(policy.diffusion.unet).state_dict().items():
        assert torch.equal(value, adapter.denoiser.state_dict()[name])


def test_copies_and_state_dict(lerobot: Any) -> None:
    policy = build(lerobot, 1, dtype=torch.float32)
    adapter, batch = level2(policy), batch_of(policy, torch.float32)
    wanted = adapter.loss(batch, K, generator=torch.Generator().manual_seed(1))
    other = level2(build(lerobot, 1, dtype=torch.float32))
    other.load_state_dict(adapter.state_dict())
    copied = copy.deepcopy(adapter)
    assert copied.policy is not policy
    assert copied.denoiser.final_conv[1].weight is copied.policy.diffusion.unet.final_conv[1].weight
    for each in (other, copied, pickle.loads(pickle.dumps(adapter))):
        torch.testing.assert_close(each.loss(batch, K, generator=torch.Generator().manual_seed(1)), wanted)


def test_compiled_policies(lerobot: Any) -> None:
    policy = build(lerobot, compile_model=True)
    assert hasattr(policy.diffusion.unet, "_orig_mod")
    adapter, batch = level2(policy), batch_of(policy)
    adapter.step(batch, K)
    assert isinstance(adapter, Level2Diffusion)
    adapter.to_peer()
    assert policy.diffusion.unet._orig_mod.final_conv[1].weight is adapter.denoiser.final_conv[1].weight


def modes(policy: nn.Module) -> list[bool]:
    return [module.training for module in policy.modules()]


@pytest.mark.parametrize("compiled", [False, True])
def test_modes_follow_the_policy(lerobot: Any, compiled: bool) -> None:
    policy = build(lerobot, 1, compile_model=compiled).train()
    policy.diffusion.rgb_encoder.eval()
    before = modes(policy)
    adapter, batch = level2(policy), batch_of(policy)
    assert modes(policy) == before
    assert adapter.denoiser.training
    policy.eval()
    adapter.step(batch, K)
    assert not any(module.training for module in adapter.modules())
    adapter.train()
    assert all(modes(policy))


def lora(policy: Any) -> None:
    policy.diffusion.unet.final_conv[1].register_parameter("lora_A", nn.Parameter(torch.zeros(2)))


def assign(policy: Any) -> None:
    policy.load_state_dict(copy.deepcopy(policy.state_dict()), assign=True)


def encoded(policy: Any) -> None:
    policy.diffusion.rgb_encoder = copy.deepcopy(policy.diffusion.rgb_encoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lora, "policy.diffusion.unet must be .* parameter final_conv.1.lora_A is new"),
        (assign, "policy.diffusion.unet must be .* is another tensor"),
        (encoded, "policy.diffusion.rgb_encoder must be .* another DiffusionRgbEncoder"),
    ],
)
def test_a_changed_policy_is_noticed(lerobot: Any, change: Any, message: str) -> None:
    policy = build(lerobot, 1, use_separate_rgb_encoder_per_camera=False)
    adapter, batch = level2(policy), batch_of(policy)
    change(policy)
    with pytest.raises(InvalidArgument, match=message + r".*: call level2\(policy\) again"):
        adapter.loss(batch, K)


@pytest.mark.parametrize("images", [0, 2])
def test_observations_alone_are_encoded(lerobot: Any, images: int) -> None:
    policy = build(lerobot, images)
    adapter, batch = level2(policy), batch_of(policy)
    found = adapter.encode({name: value for name, value in batch.items() if name.startswith("observation")})
    for one, other in zip(found.film, adapter.encode(batch).film, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(InvalidArgument, match=r"must hold .*'observation.state'.*missing"):
        adapter.encode({"action": batch["action"]})
    with pytest.raises(InvalidArgument, match="observation.state must have n_obs_steps = 2 steps"):
        adapter.encode({**batch, "observation.state": batch["observation.state"][:, :1]})


def test_sharded_weights_go_to_the_policy(lerobot: Any, tmp_path: Path) -> None:
    policy = build(lerobot, 1, dtype=torch.float32)
    adapter, batch = level2(policy), batch_of(policy, torch.float32)
    assert isinstance(adapter, Level2Diffusion)
    before = copy.deepcopy(policy.diffusion.unet.state_dict())
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(adapter)
        optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
        adapter.step(batch, K)
        optimizer.step()
        adapter.to_peer()
        trained = {name: x.full_tensor() for name, x in adapter.denoiser.state_dict().items()}
    finally:
        torch.distributed.destroy_process_group()
    for name, value in trained.items():
        assert torch.equal(value, policy.diffusion.unet.state_dict()[keys.lerobot(name)])
    assert any(not torch.equal(value, before[keys.lerobot(name)]) for name, value in trained.items())


def test_other_interfaces_are_refused(lerobot: Any) -> None:
    policy = build(lerobot, dtype=torch.float32)
    batch = batch_of(policy, torch.float32)
    with pytest.raises(InvalidArgument, match=r"action_is_pad.*missing"):
        level2(policy).loss({name: batch[name] for name in ("observation.state", "action")}, K)
    with pytest.raises(InvalidArgument, match=r"horizon = 8 steps, got"):
        level2(policy).loss({**batch, "action": batch["action"][:, :4]}, K)
    with pytest.raises(InvalidArgument, match=r"DiffusionPolicy, .*PI0Policy, got torch.nn.modules.linear.Linear"):
        level2(nn.Linear(2, 2))
    changed = build(lerobot, dtype=torch.float32)
    changed.diffusion.unet.mid_modules[0].conv1.block[1].eps = 1e-3
    with pytest.raises(InvalidArgument, match=r"mid_modules.0.conv1.block.1 must have eps = 1e-05, got 0.001"):
        level2(changed)
    changed.diffusion.unet.mid_modules[0].conv1 = nn.Identity()
    with pytest.raises(InvalidArgument, match=r"lacks mid_modules.0.conv1.block.0.bias"):
        level2(changed)
    del changed.diffusion.unet.diffusion_step_encoder
    with pytest.raises(InvalidArgument, match=r"with module diffusion_step_encoder.1, got DiffusionConditionalUnet1d"):
        level2(changed)
    del changed.diffusion.noise_scheduler
    with pytest.raises(InvalidArgument, match=r"lerobot 0.6, with attribute noise_scheduler, got DiffusionModel"):
        level2(changed)


def test_another_forward_is_refused(lerobot: Any) -> None:
    policy = build(lerobot, dtype=torch.float32)
    kind = type(policy.diffusion.unet)

    class Doubled(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **named: Any) -> Tensor:
            return 2 * super().forward(*args, **named)

    policy.diffusion.unet.__class__ = Doubled
    with pytest.raises(InvalidArgument, match="left as is, because it is not the network"):
        level2(policy)
    with pytest.raises(InvalidArgument, match="dtype, torch.float64"):
        to_unet(from_unet(build(lerobot, dtype=torch.float32).diffusion.unet), build(lerobot).diffusion.unet)


def test_both_layouts_of_rows(lerobot: Any) -> None:
    unet = build(lerobot).diffusion.unet
    sample, times = torch.randn(B * K, T, A).double(), torch.randint(0, 100, (B * K,))
    cond = torch.randn(B, 14).double()
    for layout, rows in (("bk", cond.repeat_interleave(K, 0)), ("kb", cond.repeat(K, 1))):
        ours = from_unet(unet, layout=layout, num_train_timesteps=100)  # type: ignore[arg-type]
        torch.testing.assert_close(
            ours(sample, times, global_cond=cond), unet(sample, times, global_cond=rows), rtol=1e-9, atol=1e-10
        )
