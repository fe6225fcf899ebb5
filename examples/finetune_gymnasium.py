"""MuJoCo's cart pole: clone a clumsy controller, then DPPO (needs gymnasium[mujoco]). python finetune_gymnasium.py"""

import gymnasium
import numpy as np
import torch
from diffusers import DDIMScheduler

from minidiff_fast.finetuning.chunk import ActionChunk
from minidiff_fast.finetuning.counters import flat_encoder_passes
from minidiff_fast.finetuning.critic import SharedCritic, ValueHead
from minidiff_fast.finetuning.loop import LoopConfig, UpdateConfig, finetune
from minidiff_fast.finetuning.vector import make_vector
from minidiff_fast.level2 import Level2Batch, level2_step
from minidiff_fast.models import DiffusionMLP, LowDimEncoder
from minidiff_fast.nn.normalizer import MinMaxNormalizer
from minidiff_fast.objectives import DenoisingLoss, DiffusionProcess
from minidiff_fast.objectives.dppo import DPPO, DPPOConfig
from minidiff_fast.policy import DiffusionPolicy
from minidiff_fast.sampling import sample_chain
from minidiff_fast.transitions import DDIMTransitions

T, K, N, S, E, ROUNDS = 4, 5, 16, 40, 5, 12  # actions a chunk, denoising steps, environments, decisions, epochs
torch.manual_seed(0)
torch.set_num_threads(1)  # as the figures in docs/
envs = make_vector([lambda: ActionChunk(gymnasium.make("InvertedPendulum-v5", max_episode_steps=200), T)] * N)


def episodes(act):  # -> what was seen [R, 1, 4] and done [R, T, 1], mean return
    seen, done, total, going, obs = [], [], 0.0, np.ones(N, bool), envs.reset(seed=0)[0]["observation"]
    while going.any():
        chunks = act(obs)
        seen, done = [*seen, obs[going]], [*done, chunks[going]]
        found, reward, terminated, truncated, _ = envs.step(chunks)
        obs, total, going = found["observation"], total + reward[going].sum() / N, going & ~(terminated | truncated)
    return torch.tensor(np.concatenate(seen)).float(), torch.tensor(np.concatenate(done)).float(), total


def noiseless(obs):
    chain = sample_chain(policy, {"observation": torch.tensor(obs)}, steps.deterministic(), shape=(T, 1), min_std=0.0)
    return policy.denormalize_actions(chain.actions).numpy()


seen, done, _ = episodes(lambda obs: (obs @ [0, 6, 0, 0.5] + torch.randn(N, T).numpy()).clip(-3, 3)[..., None])
names, force = {"observation": MinMaxNormalizer.fit(seen)}, MinMaxNormalizer.fit(torch.tensor([[-3.0], [3.0]]))
policy = DiffusionPolicy(LowDimEncoder({"observation": 4}), DiffusionMLP(1, 1, T, 1, 4, 64), names, force).eval()
scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample", timestep_spacing="trailing")
steps, optimizer = DDIMTransitions.from_scheduler(scheduler, K), torch.optim.AdamW(policy.parameters(), 1e-3)
objective = DenoisingLoss(DiffusionProcess.from_scheduler(scheduler))
for rows in torch.randint(len(seen), (500, 64)):
    actions = policy.normalize_actions(done[rows])
    level2_step(policy, objective, Level2Batch.draw({"observation": seen[rows]}, actions, 8, objective))
    optimizer.step()
    optimizer.zero_grad()
cloned = episodes(noiseless)[2]
config = LoopConfig(max_iterations=ROUNDS, chunk_steps=S, gamma=0.99, update=UpdateConfig(E, N * S // 2, actor_lr=3e-4))
dppo, critic = DPPO(steps, (T, 1), DPPOConfig(clip=0.1, clip_base=0.01)), SharedCritic(ValueHead(4, 64))
total = finetune(policy, critic, dppo, envs, config).total
print(f"mean return {cloned:.1f} cloned, {episodes(noiseless)[2]:.1f} after {total.env_steps} steps of DPPO")
ratio = flat_encoder_passes(ROUNDS * N * S, K, K, E, 1, ROUNDS * N) / total.encoder_passes
print(f"{total.encoder_passes} encoder passes, ratio of those of DPPO's own code to them: {ratio:.1f}")
