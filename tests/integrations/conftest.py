"""The policies that the tests of training systems run, every one of them small: tests take ``case`` and ``impl``.

An adapter joins by one more :class:`Case`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff_fast.level2 import Level2Batch
from minidiff_fast.models import ConditionalUnet1D, DiffusionMLP, TransformerForDiffusion
from minidiff_fast.nn import AdaLN, BroadcastCrossAttention, ConditionCache, FiLM, MinMaxNormalizer
from minidiff_fast.nn.rotary import Rotary1D
from minidiff_fast.nn.shared_prefix_attention import SharedPrefixAttention
from minidiff_fast.objectives import DenoisingLoss, DiffusionProcess
from minidiff_fast.policy import DiffusionPolicy

T, A, OBS_STEPS, STATE, WIDTH = 4, 2, 2, 5, 16


class Encoder(nn.Module):
    """Observation tokens, or with ``flat`` one vector."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.linear, self.flat = nn.Linear(STATE, 8), flat

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        features = torch.tanh(self.linear(obs["state"]))
        return features.flatten(1) if self.flat else features


class Embedding(nn.Module):
    """Of a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, WIDTH)

    def forward(self, t: Tensor) -> Tensor:  # [..., WIDTH]
        t = t.to(self.linear.weight.dtype)
        return torch.tanh(self.linear(torch.stack([torch.sin(t), torch.cos(t)], -1)))


class CrossAttentionDenoiser(nn.Module):
    """Cross-attention, FiLM and AdaLN, over keys and values projected once."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inward, self.memory, self.head = nn.Linear(A, WIDTH), nn.Linear(8, WIDTH), nn.Linear(WIDTH, A)
        self.attention = BroadcastCrossAttention(
            WIDTH, 2, dropout, batch_first=True, qk_norm="rms", rotary=Rotary1D(8), num_kv_heads=1
        )
        self.film = FiLM(WIDTH, sample_features=WIDTH, condition_features=WIDTH, norm="layer", activation="mish")
        self.adaln = AdaLN(
            WIDTH, sample_features=WIDTH, condition_features=WIDTH, encoder=Embedding(), num_train_timesteps=10,
            zero_init=False,
        )  # fmt: skip
        self.time = Embedding()

    def encode(self, tokens: Tensor) -> tuple[ConditionCache, Tensor]:
        memory = self.memory(tokens)
        positions = torch.arange(memory.shape[1], device=memory.device).expand(memory.shape[:2])
        return ConditionCache.build([self.attention], memory, positions=positions), memory.mean(1)

    def denoise(self, cache: tuple[ConditionCache, Tensor], x: Tensor, t: Tensor) -> Tensor:
        keys, pooled = cache
        h = self.inward(x)
        (branch,) = self.adaln(t, condition=pooled)
        positions = torch.arange(x.shape[2], device=x.device).expand(x.shape[:3])
        h = self.adaln.gate(
            self.attention(self.adaln.modulate(h, branch), cache=keys[0], query_positions=positions)[0], branch,
            residual=h,
        )  # fmt: skip
        return self.head(self.film(h, sample=self.time(t), condition=pooled))


class PrefixDenoiser(nn.Module):
    """The scene's self-attention once, then samples that see the scene and themselves."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inward, self.memory, self.head = nn.Linear(A, WIDTH), nn.Linear(8, WIDTH), nn.Linear(WIDTH, A)
        self.attention = SharedPrefixAttention(WIDTH, 2, dropout, qk_norm="layer", own_causal=True)
        self.time = Embedding()

    def encode(self, tokens: Tensor) -> ConditionCache:
        scene = self.memory(tokens)
        _, pair = self.attention.encode(scene)
        return ConditionCache.of([pair])

    def denoise(self, cache: ConditionCache, x: Tensor, t: Tensor) -> Tensor:
        own = self.inward(x) + self.time(t)[:, :, None]
        return self.head(torch.tanh(own + self.attention.denoise(own, cache[0])))


class DiffusersHead(nn.Module):
    """A block of diffusers whose cross-attention reads memory that is not repeated."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.attention import BasicTransformerBlock

        from minidiff_fast.integrations import apply_broadcast_attention

        self.inward, self.time, self.head = nn.Linear(A, WIDTH), Embedding(), nn.Linear(WIDTH, A)
        self.block = BasicTransformerBlock(WIDTH, 2, 8, cross_attention_dim=8)
        apply_broadcast_attention(self.block)

    def encode(self, tokens: Tensor) -> Tensor:
        return tokens

    def denoise(self, cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
        rows = (self.inward(x) + self.time(t)[:, :, None]).flatten(0, 1)
        return self.head(self.block(rows, encoder_hidden_states=cache)).unflatten(0, x.shape[:2])


def policy_of(denoiser: nn.Module, flat: bool = False) -> DiffusionPolicy:
    ranges = MinMaxNormalizer(-torch.ones(STATE), torch.ones(STATE))
    actions = MinMaxNormalizer(-torch.ones(A), torch.ones(A))
    return DiffusionPolicy(Encoder(flat), denoiser, {"state": ranges}, actions)


def unet() -> DiffusionPolicy:
    return policy_of(
        ConditionalUnet1D(A, None, OBS_STEPS * 8, 8, (8, 16), 3, 4, cond_predict_scale=True, num_train_timesteps=10),
        flat=True,
    )


def shallow_unet() -> DiffusionPolicy:
    """One resolution, which compilers get through soon."""
    return policy_of(ConditionalUnet1D(A, None, OBS_STEPS * 8, 8, (8,), 3, 4, num_train_timesteps=10), flat=True)


def transformer(dropout: float = 0.0) -> DiffusionPolicy:
    return policy_of(
        TransformerForDiffusion(
            A, A, T, OBS_STEPS, 8, n_layer=2, n_head=2, n_emb=16, p_drop_emb=dropout, p_drop_attn=dropout,
            causal_attn=True, time_as_cond=True, obs_as_cond=True, n_cond_layers=0,
        )
    )  # fmt: skip


def mlp() -> DiffusionPolicy:
    return policy_of(DiffusionMLP(A, A, T, OBS_STEPS, 8, hidden_dim=16, n_blocks=2, time_dim=8))


def cross_attention(dropout: float = 0.0) -> DiffusionPolicy:
    return policy_of(CrossAttentionDenoiser(dropout))


def prefix(dropout: float = 0.0) -> DiffusionPolicy:
    return policy_of(PrefixDenoiser(dropout))


def diffusers_head() -> DiffusionPolicy:
    return policy_of(DiffusersHead())


@dataclass(frozen=True)
class Case:
    """A policy and what it is trained on."""

    name: str
    make: Callable[..., DiffusionPolicy]
    dropout: bool = False
    """Whether ``make(dropout)`` makes one with dropout."""
    shape: tuple[int, int] = (T, A)
    """Of the actions of a sample."""

    def build(self, *args: Any, seed: int = 0) -> Any:
        """The policy; the same weights from the same seed."""
        torch.manual_seed(seed)
        return self.make(*args)

    def obs(self, batch: int = 4, seed: int = 1) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return {"state": torch.rand(batch, OBS_STEPS, STATE, generator=generator)}

    def batch(self, batch: int = 4, k: int = 6, seed: int = 1) -> Level2Batch:
        generator = torch.Generator().manual_seed(seed)
        actions = torch.randn(batch, *self.shape, generator=generator)
        return Level2Batch.draw(self.obs(batch), actions, k, OBJECTIVE, generator=generator)

    def inputs(self, batch: int = 4, k: int = 6) -> tuple[Tensor, Tensor]:
        """x and t for ``denoise``."""
        drawn = self.batch(batch, k)
        return drawn.noise, drawn.timesteps


OBJECTIVE = DenoisingLoss(DiffusionProcess(torch.linspace(0.99, 0.01, 10)))
SHALLOW_UNET = Case("shallow_unet", shallow_unet)
CASES = [
    Case("unet", unet),
    Case("transformer", transformer, dropout=True),
    Case("mlp", mlp),
    Case("cross_attention", cross_attention, dropout=True),
    Case("prefix", prefix, dropout=True),
    Case("diffusers_head", diffusers_head),
]


def _params(cases: list[Case], slow: str = "") -> list[Any]:
    return [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.name == slow else []) for c in cases]


@pytest.fixture(params=_params(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Every policy."""
    return request.param


@pytest.fixture(params=_params([SHALLOW_UNET, *CASES], slow="unet"))
def traced_case(request: pytest.FixtureRequest) -> Case:
    """Every policy, for tests that trace it: a shallow U-Net beside the whole one, which takes long."""
    return request.param


@pytest.fixture(params=_params([SHALLOW_UNET, *CASES[1:]]))
def shallow_case(request: pytest.FixtureRequest) -> Case:
    """Every policy, with the shallow U-Net alone."""
    return request.param


@pytest.fixture(params=_params([case for case in CASES if case.dropout]))
def dropout_case(request: pytest.FixtureRequest) -> Case:
    """Every policy with dropout."""
    return request.param


@pytest.fixture(scope="session")
def objective() -> DenoisingLoss:
    return OBJECTIVE


@pytest.fixture(scope="session")
def cases() -> list[Case]:
    return CASES


@pytest.fixture(params=["reference", "native"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ops of the test run this implementation, where they have it; without a GPU tests run Triton's interpreter."""
    if request.param == "reference":
        monkeypatch.setenv("MINIDIFF_FAST_IMPL", "reference")
    else:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    return str(request.param)
