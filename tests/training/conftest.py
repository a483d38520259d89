"""One thread a process: these models are too small to share, and a shared machine must not stall them."""

import torch

torch.set_num_threads(1)
