"""The process of a peer's diffusers scheduler, checked against the scheduler's own add_noise."""

from __future__ import annotations

from typing import Any

import torch

from minidiff_fast.errors import InvalidArgument
from minidiff_fast.objectives import DiffusionProcess

PREDICTIONS = ("epsilon", "sample")


def process_of(caller: str, scheduler: Any) -> DiffusionProcess:
    """The process by which the scheduler noises, for the prediction types whose target the U-Net policies know."""
    process = DiffusionProcess.from_scheduler(scheduler)
    if process.prediction_type not in PREDICTIONS:
        raise InvalidArgument(
            f"{caller}: the noise scheduler's prediction_type must be one of {', '.join(PREDICTIONS)}, as in the "
            f"policy's loss, got {process.prediction_type!r}"
        )
    steps = process.num_train_timesteps
    times = torch.tensor([0, steps // 2, steps - 1])
    clean, noise = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), -2.0)
    found = scheduler.add_noise(clean, noise, times)
    wanted = process.noised(clean, noise[:, None], times[:, None]).x[:, 0]
    if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-5):
        raise InvalidArgument(
            f"{caller}: {type(scheduler).__name__}.add_noise must give sqrt(ab_t) x0 + sqrt(1 - ab_t) noise, as DDPM "
            f"does; at t = {times.tolist()} it gives {found.flatten().tolist()}, not {wanted.flatten().tolist()}"
        )
    return process
