"""Level2ActionHead and Level2VLAJEPA against lerobot's VLAJEPAActionHead and VLAJEPAPolicy, the real ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.integrations.diffusers import apply_broadcast_attention
from minidiff_fast.integrations.lerobot import level2
from minidiff_fast.integrations.lerobot.vla_jepa import Level2ActionHead, Level2VLAJEPA
from minidiff_fast.level2 import Level2Batch
from minidiff_fast.shapes import Layout, merge_samples

B, K, T, A, S, C = 3, 5, 7, 4, 6, 12
WORDS = 40


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user's CPU runs: not Triton's interpreter, which is slow."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def options(**changes: Any) -> dict[str, Any]:
    sizes = {"action_dim": A, "state_dim": 3, "chunk_size": T, "n_action_steps": 2, "action_num_layers": 4}
    sizes |= {"action_hidden_size": 16, "num_embodied_action_tokens_per_instruction": 2}
    return {"device": "cpu", "action_model_type": "DiT-test", **sizes, **changes}


@pytest.fixture
def head(lerobot: Callable[[str], Any]) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        configuration = lerobot("policies.vla_jepa.configuration_vla_jepa").VLAJEPAConfig(**options(**changes))
        torch.manual_seed(0)
        return lerobot("policies.vla_jepa.action_head").VLAJEPAActionHead(configuration, cross_attention_dim=C).eval()

    return make


def batch(dtype: torch.dtype = torch.float32, **without: None) -> dict[str, Tensor]:
    torch.manual_seed(1)
    made = {
        "conditioning_tokens": torch.randn(B, S, C, dtype=dtype),
        "actions": torch.randn(B, T, A, dtype=dtype),
        "state": torch.randn(B, 1, 3, dtype=dtype),
        "action_is_pad": torch.arange(T)[None] >= torch.tensor([7, 4, 1])[:, None],
    }
    return {name: x for name, x in made.items() if name not in without}


@contextmanager
def drawing(noise: Tensor, times: Tensor) -> Iterator[None]:
    """torch draws these in place of its own; times as the head's sample_time gives them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda like: noise.to(like.dtype))
        patch.setattr(torch.distributions.Beta, "sample", lambda *_: 0.999 * (1 - times))
        yield


def peer_loss(head: Any, values: dict[str, Tensor], drawn: Level2Batch, layout: Layout) -> Tensor:
    rows = {
        name: merge_samples(x[:, None].expand(-1, drawn.samples, *x.shape[1:]), layout) for name, x in values.items()
    }
    with drawing(merge_samples(drawn.noise, layout), merge_samples(drawn.timesteps, layout)):
        loss: Tensor = head(**rows)
    return loss


def gradients(model: nn.Module, loss: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    found = {name: p for name, p in model.named_parameters()}
    found |= {f"input {i}": x for i, x in enumerate(inputs)}
    grads = torch.autograd.grad(loss, list(found.values()), allow_unused=True)
    return {name: g for name, g in zip(found, grads, strict=True) if g is not None}


def seeded(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def safe(times: Tensor) -> Tensor:
    """Away from the borders of the steps, which 0.999 (1 - t) and back might cross."""
    return ((times * 1000).floor() + 0.5) / 1000


def drawn_by(adapter: Any, values: Any, k: int) -> Level2Batch:
    drawn = adapter.draw(values, k, generator=seeded())
    return replace(drawn, timesteps=safe(drawn.timesteps))


def our_loss(adapter: Any, drawn: Level2Batch) -> Tensor:
    return adapter.objective.per_sample(adapter, adapter.encode(drawn.obs), drawn).mean()


@pytest.mark.parametrize("without", [{}, {"action_is_pad": None}, {"state": None}])
@pytest.mark.parametrize(("k", "layout"), [(1, "bk"), (K, "bk"), (K, "kb")])
def test_loss_and_gradients_are_the_peers(head: Any, without: dict[str, None], k: int, layout: Layout) -> None:
    peer, values = head(), batch(**without)
    tokens = values["conditioning_tokens"].requires_grad_()
    adapter = Level2ActionHead(copy.deepcopy(peer))
    drawn = drawn_by(adapter, values, k)
    wanted = peer_loss(peer, values, drawn, layout)
    loss = our_loss(adapter, drawn)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    expected = gradients(peer, wanted, tokens)
    assert len(expected) > 50
    torch.testing.assert_close(gradients(adapter.head, loss, tokens), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("layout", ["bk", "kb"])
def test_transformer_takes_unrepeated_memory_in_both_layouts(head: Any, layout: Layout) -> None:
    peer = head().double().model
    converted = copy.deepcopy(peer)
    apply_broadcast_attention(converted, layout=layout)
    x, memory = (torch.randn(*shape, dtype=torch.float64) for shape in ((B * K, 4, 16), (B, S, C)))
    t = torch.arange(B * K)
    rows = merge_samples(memory[:, None].expand(-1, K, -1, -1), layout)
    torch.testing.assert_close(converted(x, memory, t), peer(x, rows, t), rtol=1e-9, atol=1e-9)


def test_times_are_distributed_as_the_peers(head: Any) -> None:
    peer = head()
    adapter = Level2ActionHead(peer)
    values = {**batch(), "actions": torch.zeros(200, T, A)}
    times = adapter.objective.process.draw(values["actions"], 256, seed=torch.tensor([3])).timesteps.flatten()
    torch.manual_seed(0)
    theirs = peer.sample_time(times.numel(), times.device, times.dtype)
    at = torch.linspace(0.05, 0.95, 7)
    torch.testing.assert_close(times.quantile(at), theirs.quantile(at), rtol=0, atol=0.01)
    assert times.min() >= theirs.new_tensor(-0.001 / 0.999) - 1e-6 and times.max() <= 1


def test_chunked_steps_encode_once(head: Any) -> None:
    adapter, values = Level2ActionHead(head()), batch()
    wanted = gradients(adapter.head, adapter.loss(values, K, generator=seeded()))
    calls: list[int] = []
    adapter.head.state_encoder.register_forward_hook(lambda *_: calls.append(1))
    adapter.step(values, K, chunk=2, generator=seeded())
    assert len(calls) == 1
    found = {name: p.grad for name, p in adapter.head.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)


def test_the_head_still_acts_and_reverts(head: Any) -> None:
    peer, values = head(), batch()

    def act() -> Tensor:
        torch.manual_seed(5)
        return peer.predict_action(values["conditioning_tokens"], values["state"])

    before, processors = act(), [m.attn1.processor for m in peer.model.transformer_blocks]
    adapter = Level2ActionHead(peer)
    assert len(adapter.report.replaced) == 4 and "attn1" in str(adapter.report)
    torch.testing.assert_close(act(), before, rtol=0, atol=1e-6)
    adapter.revert()
    assert [m.attn1.processor for m in peer.model.transformer_blocks] == processors
    torch.testing.assert_close(act(), before, rtol=0, atol=0)


def test_copies_and_checkpoints(head: Any) -> None:
    adapter, values = Level2ActionHead(head()), batch()
    wanted = adapter.loss(values, 2, generator=seeded())
    other = Level2ActionHead(head())
    nn.init.normal_(other.head.future_tokens.weight)
    other.load_state_dict(adapter.state_dict())
    kept = {name.removeprefix("head.") for name in adapter.state_dict()}
    assert kept == set(head().state_dict())
    for same in (other, copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        torch.testing.assert_close(same.loss(values, 2, generator=seeded()), wanted, rtol=0, atol=0)


def test_denoise_compiles_in_one_graph(head: Any) -> None:
    adapter, values = Level2ActionHead(head(action_num_layers=2)), batch()
    wanted = gradients(adapter.head, adapter.loss(values, K, generator=seeded()))
    compiled: Any = torch.compile(adapter, backend="eager", fullgraph=True)
    adapter.step(values, K, wrapped=compiled, generator=seeded())
    found = {name: p.grad for name, p in adapter.head.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)


def test_autocast(head: Any) -> None:
    adapter, values = Level2ActionHead(head()), batch()
    wanted = adapter.loss(values, K, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        loss = adapter.loss(values, K, generator=seeded())
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=0.03, atol=0.0)


def test_dropout_runs(head: Any) -> None:
    adapter, values = Level2ActionHead(head()).train(), batch()
    first, second = (adapter.loss(values, 2, generator=seeded()) for _ in range(2))
    assert first.isfinite() and first != second


def test_other_heads_are_refused(head: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"must be VLAJEPAActionHead as in lerobot 0\.6, with head\.config\.act"):
        Level2ActionHead(nn.Linear(1, 1))
    peer = head(action_noise_beta_beta=2.0)
    with pytest.raises(InvalidArgument, match="one of them 1"):
        Level2ActionHead(peer)
    assert type(peer.model.transformer_blocks[0].attn1.processor).__name__ == "AttnProcessor2_0"


# -------------------------------------------------------------------- the policy, on a stand-in for the VLM


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(C, C) / C**0.5)

    def forward(self, x: Tensor) -> Tensor:  # no autocast: the head's peer runs in float32 on a CPU
        return x + (x.cumsum(1)[..., None] * self.mix).sum(-2)


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer()])


class VLM(nn.Module):
    """What the policy touches of Qwen3-VL."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=C)
        self.model = nn.Module()
        self.model.language_model = Language()
        self.embedding = nn.Embedding(WORDS, C)
        self.seen = 0

    def forward(self, input_ids: Tensor, pictures: Tensor, **_: Any) -> None:
        self.seen += 1
        x = self.embedding(input_ids) + pictures[:, None, None]
        for layer in self.model.language_model.layers:
            x = layer(x)


class Interface(nn.Module):
    """The policy's interface to it: prompts become a row of numbers, the last of which are the action tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = VLM()

    def expand_tokenizer(self) -> tuple[list[str], list[int], int]:
        return [f"<{i}>" for i in range(28)], list(range(28)), 30

    def build_inputs(self, images: Any, instructions: list[str], **_: Any) -> dict[str, Tensor]:
        ids = torch.tensor([[31 + len(text) % 5, 0, 1, 30, 30] for text in instructions])
        return {"input_ids": ids, "pictures": torch.stack([torch.stack(views).mean() for views in images])}

    to_pixel_values = staticmethod(lambda image: image.detach().float())


class World(nn.Module):
    """What the policy touches of V-JEPA and its processor."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(tubelet_size=2, hidden_size=4, image_size=16)
        self.device = torch.device("cpu")

    def get_vision_features(self, pixel_values_videos: Tensor) -> Tensor:
        return pixel_values_videos.mean(2).flatten(1)[:, :16].reshape(-1, 4, 4)


def process(videos: list[Tensor], **_: Any) -> dict[str, Tensor]:
    return {"pixel_values_videos": torch.stack(videos)}


class Predictor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.states, self.moves = nn.Linear(8, 8), nn.Linear(C, 8)

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        return self.states(states) + self.moves(actions).mean(1, keepdim=True)


@pytest.fixture
def policy(lerobot: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    module = lerobot("policies.vla_jepa.modeling_vla_jepa")
    types = lerobot("configs.types")
    monkeypatch.setattr(module, "Qwen3VLInterface", Interface)
    monkeypatch.setattr(module, "AutoModel", SimpleNamespace(from_pretrained=lambda *_, **__: World()))
    monkeypatch.setattr(module, "AutoVideoProcessor", SimpleNamespace(from_pretrained=lambda *_: process))
    monkeypatch.setattr(module, "ActionConditionedVideoPredictor", lambda **_: Predictor())
    monkeypatch.setattr(Interface, "_get_torch_dtype", staticmethod(lambda _: torch.float32), raising=False)

    def make(**changes: Any) -> Any:
        torch.manual_seed(0)
        configuration = lerobot("policies.vla_jepa.configuration_vla_jepa").VLAJEPAConfig(
            **options(num_video_frames=8, num_action_tokens_per_timestep=1, **changes),
            input_features={
                "observation.images.front": types.PolicyFeature(types.FeatureType.VISUAL, (3, 16, 16)),
                "observation.state": types.PolicyFeature(types.FeatureType.STATE, (3,)),
            },
            output_features={"action": types.PolicyFeature(types.FeatureType.ACTION, (A,))},
        )
        return module.VLAJEPAPolicy(configuration).eval()

    return make


def observed() -> dict[str, Any]:
    torch.manual_seed(3)
    return {
        "observation.images.front": torch.rand(B, 8, 3, 16, 16),
        "observation.state": torch.randn(B, 1, 3),
        "task": ["lift", "push it", "turn around"],
        "action": torch.randn(B, T, A),
        "action_is_pad": torch.arange(T)[None] >= torch.tensor([7, 4, 1])[:, None],
    }


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("k", [1, K])
@pytest.mark.parametrize("world", [True, False])
def test_policy_loss_and_gradients_are_the_peers(policy: Any, k: int, world: bool) -> None:
    peer, values = policy(repeated_diffusion_steps=k, enable_world_model=world), observed()
    reference = copy.deepcopy(peer)
    adapter = level2(peer)
    assert isinstance(adapter, Level2VLAJEPA)
    drawn = drawn_by(adapter, values, k)
    with drawing(merge_samples(drawn.noise, "kb"), merge_samples(drawn.timesteps, "kb")):
        wanted, logs = reference.forward(values)
    assert (logs["wm_loss"] > 0.01) == world
    torch.testing.assert_close(our_loss(adapter, drawn), wanted, rtol=1e-5, atol=1e-6)
    peer.model.qwen.model.seen = 0
    adapter.step(values, k, chunk=2, generator=seeded())
    assert peer.model.qwen.model.seen == 1
    same = adapter.draw(values, k, generator=seeded())
    with drawing(merge_samples(same.noise, "kb"), merge_samples(same.timesteps, "kb")):
        expected = gradients(reference, reference.forward(values)[0])
    found = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    assert any("qwen" in name for name in found) and any("video_predictor" in name for name in found) == world
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-6)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("chunk", [None, 2])
def test_the_world_models_loss_under_ddp(policy: Any, process_group: None, chunk: int | None) -> None:
    """Its parameters are behind the loss alone; others, as the last of a language model, are behind nothing."""
    adapter = level2(policy(enable_world_model=True).train())
    adapter.policy.model.qwen.model.lm_head = nn.Linear(4, 4)
    alone, values = copy.deepcopy(adapter), observed()
    ddp = nn.parallel.DistributedDataParallel(adapter, find_unused_parameters=True)
    for seed in (1, 2):
        for module, wrapped in ((adapter, ddp), (alone, None)):
            module.zero_grad()
            torch.manual_seed(0)
            module.step(values, K, chunk=chunk, wrapped=wrapped, generator=seeded(seed))
        found, wanted = (
            {name: p.grad for name, p in module.named_parameters() if p.grad is not None} for module in (adapter, alone)
        )
        assert any("video_predictor" in name for name in found)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_the_policys_mode_is_the_adapters(policy: Any, head: Any) -> None:
    for wrap, peer in ((level2, policy()), (Level2ActionHead, head().eval())):
        assert not wrap(peer).training and wrap(peer.train()).training


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_the_policy_still_acts(policy: Any) -> None:
    peer, values = policy(resize_images_to=(8, 8)), observed()
    del values["action"], values["action_is_pad"]
    values["observation.images.front"] = values["observation.images.front"][:, 0]
    peer.reset()
    torch.manual_seed(5)
    before = peer.predict_action_chunk(dict(values))
    adapter = level2(peer)
    torch.manual_seed(5)
    torch.testing.assert_close(peer.predict_action_chunk(dict(values)), before, rtol=0, atol=1e-6)
    tokens = adapter.encode(values)
    assert tokens.added_loss is None and tokens.tokens.shape == (B, 2, C)
    with pytest.raises(InvalidArgument, match="batch must hold 'action'"):
        adapter.loss(values, 2)
