"""Fine-tuning of diffusion and flow policies by reinforcement learning: environments, buffer, update, loop."""
