"""Frozen blocks whose weights stay in CPU memory, and are on the device only while they compute.

Accelerate and Diffusers offload for inference: their hooks take the weights away after the forward pass, and the
backward pass then misses them. Here each block is a checkpoint of `torch.utils.checkpoint`, so its backward pass
brings its weights again.
"""

import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


class OffloadedBlock(torch.nn.Module):
    """A frozen block in CPU memory. Its inputs and outputs are on the device.

    Args:
        block: as a model has it. Its weights are not registered here, so the model's `to` leaves them where they are.
        device: where it computes.
    """

    def __init__(self, block: torch.nn.Module, device: torch.device):
        super().__init__()
        self.held, self.device = [block.cpu()], device
        if device.type == "cuda":
            # Pinned memory is copied while the block before computes
            for weight in (*block.parameters(), *block.buffers()):
                weight.data = weight.data.pin_memory()

    def forward(self, *args, **kwargs):
        return checkpoint(self.compute, *args, use_reentrant=False, **kwargs)

    def compute(self, *args, **kwargs):
        block = self.held[0]
        weights = (*block.named_parameters(), *block.named_buffers())
        placed = {name: weight.to(self.device, non_blocking=True) for name, weight in weights}
        return functional_call(block, placed, args, kwargs)


def offload_blocks(model: torch.nn.Module, device: torch.device | str) -> int:
    """
    Moves a frozen model to a device, but for its repeated blocks, see `OffloadedBlock`.

    Args:
        model: of Diffusers, which names the classes of its blocks in `_repeated_blocks`.
        device: where it computes.

    Returns:
        The number of blocks.

    Raises:
        `ValueError`: when it names none.
    """
    names, device = getattr(model, "_repeated_blocks", None) or (), torch.device(device)
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__ in names
    ]
    if not places:
        raise ValueError(f"{type(model).__name__} names no repeated blocks that could be offloaded.")
    for parent, name, child in places:
        setattr(parent, name, OffloadedBlock(child, device))
    model.to(device)
    return len(places)
