"""docs/training_systems.md: every block of it runs."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training_systems.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(), flags=re.M)


def prepared(case: Any) -> dict[str, Any]:
    """The names that the page takes for granted."""
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.checkpoint import checkpoint

    from minidiff_fast.level2 import Level2Batch, level2_step
    from minidiff_fast.objectives import DenoisingLoss, DiffusionProcess

    policy = case.build()
    x, t = case.inputs(4, 8)
    names = {
        "torch": torch, "policy": policy, "obs": case.obs(), "actions": case.batch().actions, "x": x, "t": t,
        "optimizer": torch.optim.SGD(policy.parameters(), lr=0.1), "backend": "eager", "checkpoint": checkpoint,
        "alphas_cumprod": torch.linspace(0.99, 0.01, 10), "fully_shard": fully_shard, "EMAModel": EMAModel,
        "DistributedDataParallel": DistributedDataParallel, "DenoisingLoss": DenoisingLoss, "Level2Batch": Level2Batch,
        "DiffusionProcess": DiffusionProcess, "level2_step": level2_step,
        "accelerator": Accelerator(cpu=True, gradient_accumulation_steps=2),
    }  # fmt: skip
    exec(blocks(SECTIONS[0])[0], names)
    policy.zero_grad()
    return {**names, "batches": [names["batch"]] * 2}


def blocks(section: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", section, flags=re.M | re.S)


def run(sections: list[str], case: Any, folder: str, port: int, results: Any) -> None:
    os.chdir(folder)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    os.environ["MINIDIFF_FAST_IMPL"] = "reference"
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    for section in sections:
        try:
            names = prepared(case)
            for block in blocks(section):
                exec(block, names)
            results.put((section, None))
        except Exception as error:
            results.put((section, repr(error)))
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(240)
def test_every_block(cases, tmp_path):
    """In a process of their own, one process group of one."""
    sections = [section for section in SECTIONS if blocks(section)]
    assert len(sections) == 9
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    case = next(case for case in cases if case.name == "mlp")
    worker = context.Process(target=run, args=(sections, case, str(tmp_path), port, results))
    worker.start()
    try:
        for _ in sections:
            section, error = results.get(timeout=120)
            assert error is None, f"{section.splitlines()[0]}: {error}"
    finally:
        worker.join(timeout=10)
        worker.kill()
    assert (tmp_path / "denoise.pt2").is_file()
