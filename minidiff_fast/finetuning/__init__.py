"""Fine-tuning of a trained policy by reinforcement learning. Importing this package imports nothing."""
