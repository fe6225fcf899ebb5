"""Small SmolVLA and pi0 policies of lerobot with random weights, made of its real modules without any download.

Both policies look their backbones up by name: SmolVLA on the Hub, pi0 in a table of two sizes. While a policy is built
these look-ups give the small sizes below; nothing else in lerobot is touched.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Load = Callable[[str], Any]
_open = ExitStack()
_loaded: list[Load] = []


def lerobot() -> Load:
    """``load(name)`` for lerobot's modules, for as long as the process lives; see examples/lerobot_wheel.py."""
    if not _loaded:
        path = Path(__file__).resolve().parents[1] / "examples" / "lerobot_wheel.py"
        spec = importlib.util.spec_from_file_location("lerobot_wheel", path)
        assert spec is not None and spec.loader is not None
        wheel = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(wheel)
        _loaded.append(_open.enter_context(wheel.policies()))
    return _loaded[0]


@dataclass(frozen=True)
class Size:
    """How large a policy is."""

    width: int = 32
    """Of the language model; SmolVLA's expert has expert_width_multiplier of it."""
    expert_width: int = 16
    """Of pi0's expert."""
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    mlp: int = 64
    vision_layers: int = 1
    image: int = 32
    """Pixels a side, in patches of 8."""
    vocabulary: int = 100
    chunk: int = 6
    """Actions in a chunk."""
    action: int = 3
    max_action: int = 5
    """What actions are padded to."""
    state: int = 3
    max_state: int = 4
    cameras: int = 2


def _features(load: Load, size: Size) -> dict[str, Any]:
    types = load("configs.types")
    feature, kind = types.PolicyFeature, types.FeatureType
    inputs = {
        f"observation.images.camera{i}": feature(kind.VISUAL, (3, size.image, size.image)) for i in range(size.cameras)
    }
    inputs["observation.state"] = feature(kind.STATE, (size.state,))
    return {"input_features": inputs, "output_features": {"action": feature(kind.ACTION, (size.action,))}}


def smolvla(load: Load, size: Size = Size(), *, device: str = "cpu", **options: Any) -> Any:
    """lerobot's SmolVLAPolicy; ``options`` are fields of its SmolVLAConfig."""
    from transformers import SmolVLMConfig

    vlm = SmolVLMConfig(
        vision_config={
            "hidden_size": size.width, "intermediate_size": size.mlp, "num_hidden_layers": size.vision_layers,
            "num_attention_heads": 2, "image_size": size.image, "patch_size": 8,
        },
        text_config={
            "model_type": "llama", "hidden_size": size.width, "intermediate_size": size.mlp,
            "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads,
            "head_dim": size.head_dim, "vocab_size": size.vocabulary, "pad_token_id": 0,
        },
        scale_factor=2,
        image_token_id=size.vocabulary - 1,
    )  # fmt: skip
    processor = SimpleNamespace(tokenizer=SimpleNamespace(fake_image_token_id=7, global_image_token_id=8))
    fields: dict[str, Any] = {
        "chunk_size": size.chunk, "n_action_steps": size.chunk, "max_state_dim": size.max_state,
        "max_action_dim": size.max_action, "resize_imgs_with_padding": (size.image, size.image), "num_vlm_layers": -1,
        "num_steps": 3, "device": device, **_features(load, size),
    }  # fmt: skip
    module = load("policies.smolvla.smolvlm_with_expert")
    config = load("policies.smolvla.configuration_smolvla").SmolVLAConfig(**{**fields, **options})
    with (
        mock.patch.object(module.AutoConfig, "from_pretrained", lambda *_, **__: vlm),
        mock.patch.object(module.AutoProcessor, "from_pretrained", lambda *_, **__: processor),
    ):
        policy = load("policies.smolvla.modeling_smolvla").SmolVLAPolicy(config)
    return _spread(policy).to(device)


def pi0(load: Load, size: Size = Size(), *, device: str = "cpu", **options: Any) -> Any:
    """lerobot's PI0Policy; ``options`` are fields of its PI0Config. Its code fixes the number of heads at 8."""
    module = load("policies.pi0.modeling_pi0")
    sizes = {
        "gemma_2b": module.GemmaConfig(size.width, size.layers, size.mlp, 8, size.kv_heads, size.head_dim),
        "gemma_300m": module.GemmaConfig(size.expert_width, size.layers, size.mlp, 8, size.kv_heads, size.head_dim),
    }
    fields: dict[str, Any] = {
        "chunk_size": size.chunk, "n_action_steps": size.chunk, "max_state_dim": size.max_state,
        "max_action_dim": size.max_action, "image_resolution": (size.image, size.image), "num_inference_steps": 3,
        "device": device, **_features(load, size),
    }  # fmt: skip
    config = load("policies.pi0.configuration_pi0").PI0Config(**{**fields, **options})
    vlm, expert = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM

    def small_vlm(config: Any) -> Any:
        config.text_config.vocab_size = size.vocabulary
        config.text_config.pad_token_id = 0
        for name, value in _pi0_vision(size).items():
            setattr(config.vision_config, name, value)
        return vlm(config=config)

    def small_expert(config: Any) -> Any:
        config.vocab_size, config.pad_token_id = size.vocabulary, 0
        return expert(config=config)

    with (
        mock.patch.object(module, "get_gemma_config", sizes.__getitem__),
        mock.patch.object(module, "PaliGemmaForConditionalGenerationWithPiGemma", small_vlm),
        mock.patch.object(module, "PiGemmaForCausalLM", small_expert),
    ):
        policy = module.PI0Policy(config)
    return _spread(policy).to(device)


def _pi0_vision(size: Size) -> dict[str, int]:
    return {
        "hidden_size": size.width, "intermediate_size": size.mlp, "projection_dim": size.width, "patch_size": 8,
        "num_hidden_layers": size.vision_layers, "num_attention_heads": 2,
    }  # fmt: skip


@torch.no_grad()
def _spread(policy: Any) -> Any:
    """Weights away from their initial values, some of which are 0 or 1 and would hide a mistake."""
    for parameter in policy.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return policy.eval()


def batch(size: Size = Size(), conditions: int = 3, words: int = 5, *, seed: int = 0) -> dict[str, Tensor]:
    """The batch dict that lerobot's processors make: distinct conditions, prompts of different lengths, padded."""
    draw = torch.Generator().manual_seed(seed)
    lengths = words - torch.arange(conditions) % words
    made = {
        f"observation.images.camera{i}": torch.rand(conditions, 3, size.image, size.image, generator=draw)
        for i in range(size.cameras)
    }
    made["observation.state"] = torch.randn(conditions, size.state, generator=draw)
    made["observation.language.tokens"] = torch.randint(1, size.vocabulary - 1, (conditions, words), generator=draw)
    made["observation.language.attention_mask"] = torch.arange(words) < lengths[:, None]
    made["action"] = torch.randn(conditions, size.chunk, size.action, generator=draw)
    return made


def contest(losses: dict[str, Callable[[], Tensor]], policy: Any, inputs: list[Tensor], side: Any) -> dict[str, Any]:
    """Sides of a bench on one policy; a gradient that a side leaves out counts as zero."""
    parameters = list(policy.parameters())

    def gradients() -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters if p.requires_grad]

    return {name: side(loss, gradients, [*parameters, *inputs]) for name, loss in losses.items()}
