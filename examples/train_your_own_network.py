"""Your own network, block by block, with local losses; one process, or several with DDP:

python examples/train_your_own_network.py
torchrun --nproc-per-node 2 examples/train_your_own_network.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lgkernels.nn as lnn
from lgkernels.recipes import data
from lgkernels.training import BlockwiseTrainer

ranks = int(os.environ.get("WORLD_SIZE", 1))
if ranks > 1:
    dist.init_process_group("gloo")
rank = dist.get_rank() if ranks > 1 else 0

torch.manual_seed(0)
head = dict(num_classes=10)
blocks = [
    lnn.LLSConvBlock(1, 32, 3, padding=1, pool_size=4, max_pool=True, **head),  # fused: the fast way
    lnn.LLSHead(nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU()), pool_size=2, **head),  # any block
    nn.Flatten(),
    lnn.ClassifierBlock(nn.Linear(64 * 7 * 7, 10)),
]
if ranks > 1:  # each block for itself: its gradients are exchanged while it is trained
    blocks = [DistributedDataParallel(block) if list(block.parameters()) else block for block in blocks]
trainer = BlockwiseTrainer(blocks, lambda parameters: torch.optim.Adam(parameters, 1e-3), clip_grad_norm=1.0)

images = data.load("fashion-mnist", augmentation="none")
generator = torch.Generator().manual_seed(rank)  # every rank draws its own batches
for step in range(100):
    indices = torch.randint(0, len(images.train[1]), (64,), generator=generator)
    losses = trainer.step(*images.training_batch(indices, generator))
    if step % 20 == 0 and rank == 0:
        print(f"step {step:3d}: " + ", ".join(f"{loss:.3f}" for loss in losses.tolist()))

trainer.eval()
x, target = next(images.test_batches(2000))
if rank == 0:
    print(f"test accuracy {100 * (trainer.predict(x).argmax(1) == target).float().mean():.1f} %")
if ranks > 1:
    dist.destroy_process_group()
