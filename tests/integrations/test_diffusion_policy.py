"""diffusion_policy's networks and policies, by a plain construction of their interface: losses and every gradient.

Models are float64; noise is float32 on both sides, so figures agree to float32 of the noised actions.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations import diffusion_policy as dp

PATH = Path(__file__).resolve().parents[2] / "examples" / "diffusion_policy_plain.py"
B, K, T, TO, A, D = 3, 5, 8, 2, 2, 4
CLOSE = {"rtol": 1e-5, "atol": 1e-7}
KINDS = ["global", "local", "steps", "images", "transformer", "causal", "transformer images"]


@pytest.fixture(scope="module")
def peer() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("diffusion_policy_plain", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for pickle
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops' definitions; their kernels have tests of their own."""
    monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")


class Encoder(nn.Module):
    """{name: [rows, ...]} -> [rows, D]; remembers how many rows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rows = nn.Conv2d(3, D - 1, 4, 4), []

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        self.rows.append(len(obs["state"]))
        return torch.cat([self.conv(obs["image"]).amax((2, 3)), obs["state"]], -1)


class Half(nn.Module):
    """The embedding of integer timesteps is float32 in the peer, whatever its layers are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).double()


def build(
    peer: Any,
    kind: str,
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    dims: Any = (8, 16, 24),
    **changes: Any,
) -> Any:
    torch.manual_seed(0)
    sizes = {"n_obs_steps": TO, "horizon": T, "action_dim": A, "n_action_steps": 4}
    options: dict[str, Any] = dict(sizes)
    if "images" in kind:
        options["obs_encoder"] = Encoder()
    else:
        options["obs_dim"] = D
    if "transformer" in kind or kind == "causal":
        # Masks of the peer fit the tokens that are predicted.
        model = peer.TransformerForDiffusion(
            A, 4 if kind == "causal" else T, TO, D, n_layer=2, n_head=2, n_emb=16, causal_attn=kind == "causal",
            dropout=dropout,
        )  # fmt: skip
        options |= {"obs_as_cond": True, "pred_action_steps_only": kind == "causal"}
    else:
        local = kind == "local"
        model = peer.ConditionalUnet1D(
            A, local_cond_dim=D if local else None, global_cond_dim=None if local else TO * D, down_dims=dims,
            diffusion_step_embed_dim=12, n_groups=4, kernel_size=5, cond_predict_scale=kind != "images",
        )  # fmt: skip
        options |= {"obs_as_global_cond": not local, "pred_action_steps_only": kind == "steps"}
        if "images" not in kind:
            options |= {"obs_as_local_cond": local, "oa_step_convention": kind == "steps"}
        if dtype == torch.float64:
            model.diffusion_step_encoder[0] = Half(model.diffusion_step_encoder[0])
    fields = {"action": peer.Field(torch.tensor([2.0, 0.5]), torch.tensor([0.1, -0.3]))}
    if "images" in kind:
        fields |= {"image": peer.Field(torch.tensor(2.0), torch.tensor(-1.0))}
        fields |= {"state": peer.Field(torch.tensor(0.5), torch.tensor(0.0))}
    else:
        fields |= {"obs": peer.Field(torch.rand(D) + 0.5, torch.rand(D))}
    scheduler = DDPMScheduler(50, beta_schedule="squaredcos_cap_v2", prediction_type=changes.pop("predicts", "epsilon"))
    scheduler = changes.pop("noise_scheduler", scheduler)
    return peer.Policy(model, scheduler, peer.LinearNormalizer(fields), **{**options, **changes}).to(dtype)


def batch_of(policy: Any, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    made: dict[str, Any] = {"action": torch.randn(B, T, A, dtype=dtype), "obs": torch.randn(B, T, D, dtype=dtype)}
    if hasattr(policy, "obs_encoder"):
        images, state = torch.rand(B, T, 3, 8, 8, dtype=dtype), torch.randn(B, T, 1, dtype=dtype)
        made["obs"] = {"image": images, "state": state}
    return made


@contextmanager
def feeding(noise: Tensor, times: Tensor) -> Iterator[None]:
    """What the peer draws."""
    randn, randint = (lambda *_, value=value, **__: value.clone() for value in (noise, times))
    with mock.patch.object(torch, "randn", randn), mock.patch.object(torch, "randint", randint):
        yield


def repeated(value: Any, k: int, layout: str) -> Any:
    if isinstance(value, dict):
        return {name: repeated(each, k, layout) for name, each in value.items()}
    return value.repeat_interleave(k, 0) if layout == "bk" else value.repeat(k, *[1] * (value.dim() - 1))


def peer_gradients(policy: Any, batch: dict[str, Any], drawn: Any, layout: str) -> tuple[Tensor, dict[str, Any]]:
    """The peer's own loss on conditions repeated K times, and the gradients."""
    noise, times = drawn.noise, drawn.timesteps
    if layout == "kb":
        noise, times = noise.transpose(0, 1), times.transpose(0, 1)
    policy.zero_grad()
    with feeding(noise.flatten(0, 1), times.flatten()):
        loss = policy.compute_loss(repeated(batch, drawn.samples, layout))
    loss.backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("layout", ["bk", "kb"])
@pytest.mark.parametrize("k", [1, K])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_every_gradient(peer: Any, kind: str, k: int, layout: str) -> None:
    policy = build(peer, kind, predicts="sample" if kind in ("local", "transformer") else "epsilon")
    adapter, batch = dp.level2(policy), batch_of(policy)
    drawn = adapter.draw(batch, k, generator=torch.Generator().manual_seed(1))
    wanted, gradients = peer_gradients(policy, batch, drawn, layout)
    loss = adapter.loss(batch, k, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss.double(), wanted, **CLOSE)
    loss.backward()
    # Tied: the peer's parameters have the gradients. The second local encoder has no effect, there and here.
    assert sum(g is not None for g in gradients.values()) > 10
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["images", "transformer images"])
def test_images_are_encoded_once(peer: Any, kind: str) -> None:
    policy = build(peer, kind)
    adapter, batch = dp.level2(policy), batch_of(policy)
    result = adapter.step(batch, K, chunk=2, generator=torch.Generator().manual_seed(1))
    assert policy.obs_encoder.rows == [B * TO]
    chunked = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    adapter.zero_grad()
    loss = adapter.loss(batch, K, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(result.loss, loss)
    loss.backward()
    for name, gradient in chunked.items():
        torch.testing.assert_close(gradient, policy.get_parameter(name).grad, **CLOSE)


@pytest.mark.parametrize("kind", ["global", "local", "causal"])
def test_weights_go_there_and_back_bit_for_bit(peer: Any, kind: str) -> None:
    model = build(peer, kind, torch.float32).model
    before = copy.deepcopy(model.state_dict())
    take, give = (dp.from_transformer, dp.to_transformer) if kind == "causal" else (dp.from_unet, dp.to_unet)
    state = torch.get_rng_state()
    ours = take(model)  # type: ignore[operator]
    assert torch.equal(state, torch.get_rng_state()), "a conversion draws nothing"
    assert ours.state_dict().keys() == before.keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    give(ours, model)  # type: ignore[operator]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", ["images", "causal"])
def test_copies_and_state_dict(peer: Any, kind: str) -> None:
    policy = build(peer, kind, torch.float32)
    adapter, batch = dp.level2(policy), batch_of(policy, torch.float32)
    assert {id(p) for p in adapter.parameters()} == {id(p) for p in policy.parameters()}
    wanted = adapter.loss(batch, K, generator=torch.Generator().manual_seed(1))
    other = dp.level2(build(peer, kind, torch.float32))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(adapter.state_dict())
    copied = copy.deepcopy(adapter)
    assert copied.policy is not policy and copied.policy.get_parameter("model.head.weight" if kind == "causal" else
        "model.final_conv.1.weight") in set(copied.parameters())  # fmt: skip
    for each in (other, copied, pickle.loads(pickle.dumps(adapter))):
        torch.testing.assert_close(each.loss(batch, K, generator=torch.Generator().manual_seed(1)), wanted)
    adapter.load_state_dict({name: v + 1 for name, v in adapter.state_dict().items()}, assign=True)
    adapter.to_peer()
    for name, value in policy.model.state_dict().items():
        assert torch.equal(value, adapter.denoiser.state_dict()[name])


@pytest.mark.parametrize("kind", ["images", "causal"])
def test_compiled_and_under_autocast(peer: Any, kind: str) -> None:
    policy = build(peer, kind, torch.float32, dims=(8,))
    adapter, batch = dp.level2(policy), batch_of(policy, torch.float32)
    wanted = adapter.step(batch, K, generator=torch.Generator().manual_seed(1)).loss
    compiled = torch.compile(adapter, backend="eager", fullgraph=True)
    found = adapter.step(batch, K, wrapped=compiled, generator=torch.Generator().manual_seed(1)).loss
    torch.testing.assert_close(found, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        found = adapter.loss(batch, K, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", ["global", "causal"])
def test_sixteen_bit_weights_are_carried_over(peer: Any, kind: str) -> None:
    model = build(peer, kind, torch.float32).model.bfloat16()
    ours = (dp.from_transformer if kind == "causal" else dp.from_unet)(model)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}


def test_dropout_trains(peer: Any) -> None:
    policy = build(peer, "transformer", torch.float32, dropout=0.3)
    adapter, batch = dp.level2(policy), batch_of(policy, torch.float32)
    losses = [adapter.loss(batch, K, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert losses[0] != losses[1]
    adapter.eval()
    assert not policy.model.training
    losses = [adapter.loss(batch, K, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert losses[0] == losses[1]


def test_users_of_the_network_alone(peer: Any) -> None:
    model = build(peer, "global").model
    sample, times, cond = torch.randn(B * K, T, A).double(), torch.arange(B * K), torch.randn(B, TO * D).double()
    for layout in ("bk", "kb"):
        ours = dp.from_unet(torch.compile(model), layout=layout, num_train_timesteps=50)  # type: ignore[arg-type]
        wanted = model(sample, times, global_cond=repeated(cond, K, layout))
        torch.testing.assert_close(ours(sample, times, global_cond=cond), wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cond_dim": 0}, "left as is, because with cond_dim = 0 it reads no observations"),
        (
            {"n_cond_layers": 2},
            "left as is, because with n_cond_layers = 2 self-attention mixes each sample's timestep",
        ),
        ({"decoder": None}, "left as is, because with time_as_cond=False"),
    ],
)
def test_transformers_that_cannot_share(peer: Any, changes: dict[str, Any], message: str) -> None:
    sizes = {"cond_dim": D, "n_layer": 1, "n_head": 2, "n_emb": 16}
    model = peer.TransformerForDiffusion(A, T, TO, **{**sizes, **{k: v for k, v in changes.items() if k != "decoder"}})
    if "decoder" in changes:
        model.decoder = None
    with pytest.raises(InvalidArgument, match=message):
        dp.from_transformer(model)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("global", {"obs_as_global_cond": False}, "left as is, because with observations inside the trajectory"),
        ("causal", {"obs_as_cond": False}, "left as is, because with observations inside the trajectory"),
        ("global", {"predicts": "v_prediction"}, "must be one of epsilon, sample.*got 'v_prediction'"),
        ("global", {"noise_scheduler": EulerDiscreteScheduler(50)}, "EulerDiscreteScheduler.add_noise must give"),
    ],
)
def test_policies_that_cannot_share(peer: Any, kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        dp.level2(build(peer, kind, torch.float32, **changes))


def test_other_interfaces_are_refused(peer: Any) -> None:
    policy = build(peer, "global", torch.float32)
    batch = batch_of(policy, torch.float32)
    with pytest.raises(InvalidArgument, match="must hold action, and no valid_mask"):
        dp.level2(policy).loss({**batch, "valid_mask": batch["obs"]}, K)
    policy.mask_generator.action_visible = True
    with pytest.raises(InvalidArgument, match="left as is, because LowdimMaskGenerator"):
        dp.level2(policy)
    del policy.obs_dim
    with pytest.raises(InvalidArgument, match="with obs_dim .* or obs_encoder"):
        dp.level2(policy)
    del policy.normalizer
    with pytest.raises(InvalidArgument, match="with attribute normalizer, got Policy"):
        dp.level2(policy)
    policy.model = nn.Linear(2, 2)
    with pytest.raises(InvalidArgument, match=r"must be ConditionalUnet1D .* got Linear"):
        dp.level2(policy)
    model = build(peer, "causal", torch.float32).model
    with pytest.raises(InvalidArgument, match="lacks diffusion_step_encoder.1.bias, .* and has _dummy_variable"):
        dp.to_unet(dp.from_unet(build(peer, "global", torch.float32).model), model)
    model.decoder.layers[1].norm_first = False
    with pytest.raises(InvalidArgument, match="decoder.layers.1 must have norm_first = True, got False"):
        dp.from_transformer(model)


def test_other_embeddings_and_activations_are_refused(peer: Any) -> None:
    model = build(peer, "global", torch.float32).model
    model.diffusion_step_encoder[0] = nn.Identity()
    with pytest.raises(InvalidArgument, match="diffusion_step_encoder.0 must be the sinusoidal embedding"):
        dp.from_unet(model)
    model.mid_modules[0].blocks[1].block[2] = nn.SiLU()
    with pytest.raises(InvalidArgument, match="mid_modules.0.blocks.1.block.2 must be Mish, got SiLU"):
        dp.from_unet(model)
    transformer = build(peer, "transformer", torch.float32).model
    tanh = functools.partial(F.gelu, approximate="tanh")
    for activation in (torch.relu, tanh):
        transformer.decoder.layers[1].activation = activation
        with pytest.raises(InvalidArgument, match="decoder.layers.1.activation must be GELU"):
            dp.from_transformer(transformer)


@pytest.mark.parametrize("head", ["as it is", "zero", "large bias"])
@pytest.mark.parametrize(
    "change", ["sample * 3", "timestep + 40", "timestep * 1.01", "timestep <= 10", "sample <= 1.5"]
)
@pytest.mark.parametrize("kind", ["global", "causal"])
def test_other_forwards_are_refused(peer: Any, kind: str, change: str, head: str) -> None:
    model = build(peer, kind, torch.float32).model
    last = model.head if kind == "causal" else model.final_conv[1]
    with torch.no_grad():
        if head == "zero":
            last.weight.zero_()
        last.bias.fill_(50.0 if head == "large bias" else 0.0)
    assert (dp.from_transformer if kind == "causal" else dp.from_unet)(model).training

    class Other(type(model)):  # type: ignore[misc]
        def forward(self, sample: Tensor, timestep: Tensor, **named: Any) -> Tensor:
            sample = {"sample * 3": sample * 3, "sample <= 1.5": sample.clamp(-1.5, 1.5)}.get(change, sample)
            times = {"timestep + 40": timestep + 40, "timestep * 1.01": timestep * 1.01}
            times["timestep <= 10"] = timestep.clamp(max=10)
            return super().forward(sample, times.get(change, timestep), **named)

    model.__class__ = Other
    with pytest.raises(InvalidArgument, match="left as is, because it is not the network"):
        (dp.from_transformer if kind == "causal" else dp.from_unet)(model)


def test_the_last_timestep_is_tried(peer: Any) -> None:
    policy = build(peer, "causal", torch.float32, noise_scheduler=DDPMScheduler(300))

    class Other(type(policy.model)):  # type: ignore[misc]
        def forward(self, sample: Tensor, timestep: Tensor, **named: Any) -> Tensor:
            return super().forward(sample, timestep.clamp(max=200), **named)

    policy.model.__class__ = Other
    with pytest.raises(InvalidArgument, match="left as is, because it is not the network"):
        dp.level2(policy)


def test_weights_that_are_not_finite_are_refused(peer: Any) -> None:
    model = build(peer, "global", torch.float32).model
    with torch.no_grad():
        model.final_conv[1].bias.fill_(float("nan"))
    with pytest.raises(InvalidArgument, match="output must be finite, got inf or nan"):
        dp.from_unet(model)


def modes(policy: nn.Module) -> list[bool]:
    return [module.training for module in policy.modules()]


@pytest.mark.parametrize("kind", ["images", "transformer images"])
@pytest.mark.parametrize("training", [True, False])
def test_modes_follow_the_policy(peer: Any, kind: str, training: bool) -> None:
    policy = build(peer, kind, torch.float32, dropout=0.3, dims=(8,)).train(training)
    policy.obs_encoder.conv.train(not training)
    before = modes(policy)
    adapter, batch = dp.level2(policy), batch_of(policy, torch.float32)
    assert modes(policy) == before
    assert adapter.training == adapter.denoiser.training == training
    policy.train(not training)
    policy.obs_encoder.eval()
    before = modes(policy)
    compiled = torch.compile(adapter, backend="eager", fullgraph=True)
    losses = [
        adapter.step(batch, K, wrapped=wrapped, generator=torch.Generator().manual_seed(1)).loss
        for wrapped in (compiled, compiled, None)
    ]
    assert modes(policy) == before
    assert {module.training for module in adapter.denoiser.modules()} == {adapter.training} == {not training}
    if training:
        assert losses[0] == losses[1]
    elif "transformer" in kind:
        assert losses[0] != losses[1]
    adapter.eval()
    assert not any(modes(policy))


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.down = base, nn.Linear(base.in_features, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.down(x)


def adapt(policy: Any) -> None:
    policy.model.decoder.layers[0].linear1 = Lora(policy.model.decoder.layers[0].linear1)


def assign(policy: Any) -> None:
    policy.load_state_dict(copy.deepcopy(policy.state_dict()), assign=True)


def freshen(policy: Any) -> None:
    policy.model = copy.deepcopy(policy.model)


def normalise(policy: Any) -> None:
    policy.normalizer = copy.deepcopy(policy.normalizer)


def encoded(policy: Any) -> None:
    policy.obs_encoder = nn.Sequential(policy.obs_encoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (adapt, r"policy.model must be .* parameter decoder.layers.0.linear1.base_layer.bias is new"),
        (assign, r"policy.model must be .* parameter _dummy_variable is another tensor"),
        (freshen, r"policy.model must be .* parameter _dummy_variable is another tensor"),
        (normalise, r"policy.normalizer must be .* another LinearNormalizer"),
        (encoded, r"policy.obs_encoder must be .* another Sequential"),
    ],
)
def test_a_changed_policy_is_noticed(peer: Any, change: Any, message: str) -> None:
    policy = build(peer, "transformer images")
    adapter, batch = dp.level2(policy), batch_of(policy)
    change(policy)
    with pytest.raises(InvalidArgument, match=message + r".*: call level2\(policy\) again"):
        adapter.loss(batch, K)
    if change is not adapt:
        dp.level2(policy).loss(batch, K)


def test_what_does_not_replace_parameters_goes_on(peer: Any) -> None:
    policy = build(peer, "transformer images", torch.float32)
    adapter, batch = dp.level2(policy), batch_of(policy, torch.float32)
    wanted = adapter.loss(batch, K, generator=torch.Generator().manual_seed(1))
    policy.model = torch.compile(policy.model, backend="eager")
    policy.load_state_dict(policy.state_dict())
    assert torch.equal(adapter.loss(batch, K, generator=torch.Generator().manual_seed(1)), wanted)
    adapter.load_state_dict({name: v.clone() for name, v in adapter.state_dict().items()}, assign=True)
    assert torch.equal(adapter.loss(batch, K, generator=torch.Generator().manual_seed(1)), wanted)
    policy.double()
    adapter.double()
    adapter.loss(batch_of(policy), K)


@pytest.mark.parametrize("kind", KINDS)
def test_observations_alone_are_encoded(peer: Any, kind: str) -> None:
    policy = build(peer, kind)
    adapter, batch = dp.level2(policy), batch_of(policy)
    found, wanted = adapter.encode({"obs": batch["obs"]}), adapter.encode(batch)
    for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["images", "causal"])
def test_sharded_weights_go_to_the_policy(peer: Any, kind: str, tmp_path: Path) -> None:
    policy = build(peer, kind, torch.float32)
    adapter, batch = dp.level2(policy), batch_of(policy, torch.float32)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(adapter, ignored_params=set(policy.normalizer.parameters()))
        optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
        before = copy.deepcopy(policy.model.state_dict())
        adapter.step(batch, K)
        optimizer.step()
        adapter.to_peer()
        state = adapter.denoiser.state_dict()
        trained = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}
    finally:
        torch.distributed.destroy_process_group()
    assert trained.keys() == before.keys()
    for name, value in policy.model.state_dict().items():
        assert torch.equal(value, trained[name])
    assert any(not torch.equal(value, before[name]) for name, value in trained.items())
