"""ConditionalUnet1D against lerobot's DiffusionConditionalUnet1d, the real one, from its wheel.

The wheel is looked for in $MINIDIFF_FAST_PEERS (default ~/.cache/minidiff_fast/peers) and downloaded there by pip where
it is missing; without it the tests are skipped. Nothing of it is installed: its policies are plain PyTorch, and the
packages around them, which want other versions of everything, are entered as empty modules.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minidiff_fast.models import ConditionalUnet1D

VERSION = "0.6.1"
FOLDER = Path(os.environ.get("MINIDIFF_FAST_PEERS", "~/.cache/minidiff_fast/peers")).expanduser()
PACKAGES = ["lerobot", "lerobot.configs", "lerobot.policies", "lerobot.policies.diffusion", "lerobot.utils"]
"""Packages whose __init__ is not run; their modules are found through __path__."""
STUBS = {
    "torchvision": {},
    "lerobot.policies.pretrained": {"PreTrainedPolicy": torch.nn.Module},
    "lerobot.policies.utils": dict.fromkeys(
        ("get_device_from_parameters", "get_dtype_from_parameters", "get_output_shape", "populate_queues")
    ),
    "lerobot.policies.diffusion.configuration_diffusion": {"DiffusionConfig": SimpleNamespace},
}
"""Modules that the U-Net does not use but the file that it is in imports."""


def unpacked() -> Path:
    """The folder of the unpacked wheel, or a skip that says why there is none."""
    target = FOLDER / f"lerobot-{VERSION}"
    if (target / "lerobot").is_dir():
        return target
    wheels = list(FOLDER.glob(f"lerobot-{VERSION}-*.whl"))
    if not wheels:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--ignore-requires-python"]
        command += ["--retries", "0", "--timeout", "20", "-d", str(FOLDER), f"lerobot=={VERSION}"]
        try:
            FOLDER.mkdir(parents=True, exist_ok=True)
            done = subprocess.run(command, capture_output=True, text=True, timeout=90)
            reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = [str(error)]
        wheels = list(FOLDER.glob(f"lerobot-{VERSION}-*.whl"))
        if not wheels:
            pytest.skip(f"lerobot {VERSION} is not in {FOLDER} and could not be downloaded: {reason[0]}")
    unfinished = FOLDER / f"lerobot-{VERSION}.{os.getpid()}"
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(unfinished)
    try:
        unfinished.rename(target)
    except OSError:  # another process was first
        assert (target / "lerobot").is_dir()
    return target


@pytest.fixture(scope="module")
def peer():
    """The module lerobot.policies.diffusion.modeling_diffusion; sys.modules is as before afterwards."""
    root = unpacked()
    before = dict(sys.modules)
    try:
        for name in PACKAGES:
            package = types.ModuleType(name)
            package.__path__ = [str(root / name.replace(".", "/"))]
            sys.modules[name] = package
        for name, contents in STUBS.items():
            module = types.ModuleType(name)
            vars(module).update(contents)
            sys.modules[name] = module
        imports = types.ModuleType("lerobot.utils.import_utils")
        vars(imports).update(_diffusers_available=False, require_package=lambda *_: None)
        sys.modules[imports.__name__] = imports
        yield importlib.import_module("lerobot.policies.diffusion.modeling_diffusion")
    finally:
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in ("lerobot", "torchvision"):
                del sys.modules[name]
        sys.modules.update(before)


def lerobot_keys(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our (and diffusion_policy's) names -> lerobot's."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"\.blocks\.([01])\.", lambda match: f".conv{int(match[1]) + 1}.", name)
        renamed[re.sub(r"(modules\.\d+\.2)\.conv\.", r"\1.", name)] = value
    return renamed


def build(peer, scale, dims=(16, 32, 24), kernel=5, dtype=torch.float64):
    torch.manual_seed(0)
    ours = ConditionalUnet1D(
        3, global_cond_dim=9, diffusion_step_embed_dim=16, down_dims=dims, kernel_size=kernel, n_groups=8,
        cond_predict_scale=scale, impl="reference",
    )  # fmt: skip
    config = SimpleNamespace(
        diffusion_step_embed_dim=16, down_dims=dims, kernel_size=kernel, n_groups=8, use_film_scale_modulation=scale,
        action_feature=SimpleNamespace(shape=(3,)), gradient_checkpointing=False,
    )  # fmt: skip
    theirs = peer.DiffusionConditionalUnet1d(config, global_cond_dim=9)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.load_state_dict(lerobot_keys(ours.state_dict()), strict=True)
    return ours.to(dtype), theirs.to(dtype)


def run(model, sample, timestep, cond, dtype):
    # Their embedding of the timestep is float32 for integers, and their layers take their own dtype.
    if dtype == torch.float64:
        timestep = timestep.double()
    return model(sample.to(dtype), timestep, global_cond=cond.to(dtype))


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize(("dims", "kernel"), [((16, 32, 24), 5), ((8, 16), 3), ((32,), 3)])
def test_outputs_and_every_gradient(peer, scale, k, dims, kernel):
    ours, theirs = build(peer, scale, dims, kernel)
    torch.manual_seed(1)
    sample, timestep, cond = torch.randn(2 * k, 8, 3), torch.randint(0, 100, (2 * k,)), torch.randn(2, 9)
    mine = run(ours, sample, timestep, cond, torch.float64)
    peers = run(theirs, sample, timestep, cond.repeat_interleave(k, 0), torch.float64)
    print(f"largest difference of the outputs: {(mine - peers).abs().max():.1e}")
    torch.testing.assert_close(mine, peers, rtol=1e-10, atol=1e-11)
    cotangent = torch.randn(mine.shape, dtype=mine.dtype)
    mine.backward(cotangent)
    peers.backward(cotangent)
    gradients = lerobot_keys({name: p.grad for name, p in ours.named_parameters()})
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("scale", [False, True])
def test_float32(peer, scale):
    ours, theirs = build(peer, scale, dtype=torch.float32)
    torch.manual_seed(1)
    sample, timestep, cond = torch.randn(10, 16, 3), torch.randint(0, 100, (10,)), torch.randn(2, 9)
    with torch.no_grad():
        mine = run(ours, sample, timestep, cond, torch.float32)
        peers = run(theirs, sample, timestep, cond.repeat_interleave(5, 0), torch.float32)
        true = run(ours.double(), sample, timestep.float(), cond, torch.float64)
    print(f"largest difference: {(mine - peers).abs().max():.1e}; from float64: {(mine - true).abs().max():.1e} "
          f"(theirs {(peers - true).abs().max():.1e})")  # fmt: skip
    assert (mine - peers).abs().max() <= 1e-5 * true.abs().max()


def test_key_names_map_both_ways(peer):
    ours, theirs = build(peer, True)
    assert lerobot_keys(ours.state_dict()).keys() == theirs.state_dict().keys()
