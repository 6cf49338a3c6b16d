"""What a piece of code allocates."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MadeTensors(TorchDispatchMode):
    """Notes the floating-point tensors that operations make: `largest`, in elements, and `num_bytes` of all of them."""

    def __init__(self):
        super().__init__()
        self.largest, self.storages = 0, {}

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
                # Held, so that no other tensor gets its place.
                self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return output
