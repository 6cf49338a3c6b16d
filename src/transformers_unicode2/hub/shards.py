"""The weights of a checkpoint, written shard by shard."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


class ShardWriter:
    """Writes the weights of a checkpoint file by file and checks them against the names and shapes that the model has.

    Args:
        output (`Path`): empty folder to write to.
        expected (`dict[str, torch.Size]`): name to shape of everything in the model's state dict.

    Attributes:
        report (`list[dict]`): one `{"part", "parameters", "bytes"}` for each part, in the order of writing.
    """

    def __init__(self, output: Path, expected: dict[str, torch.Size]):
        self.folder, self.expected, self.report, self.weight_map = output, dict(expected), [], {}
        self.num_files = 0

    def write(self, part: str, state: dict[str, torch.Tensor]) -> None:
        """Writes one file. Raises `ValueError` on a weight that the model does not have, or has in another shape."""
        for name, value in state.items():
            if name not in self.expected:
                raise ValueError(f"The {part} has a weight {name} that the model does not have.")
            if value.shape != self.expected[name]:
                raise ValueError(
                    f"{name} of the {part} is {tuple(value.shape)}; the model has {tuple(self.expected[name])}."
                )
        self.num_files += 1
        file = f"part-{self.num_files:05d}.safetensors"
        save_file({n: v.contiguous() for n, v in state.items()}, self.folder / file, metadata={"format": "pt"})
        self.weight_map |= dict.fromkeys(state, file)
        if not self.report or self.report[-1]["part"] != part:
            self.report.append({"part": part, "parameters": 0, "bytes": 0})
        self.report[-1]["parameters"] += sum(value.numel() for value in state.values())
        self.report[-1]["bytes"] += sum(value.nbytes for value in state.values())

    def finish(self, may_lack: set[str]) -> None:
        """Gives the files their final names and writes the index. Raises `ValueError` when a weight never came."""
        missing = sorted(self.expected.keys() - self.weight_map.keys() - may_lack)
        if missing:
            raise ValueError(f"{len(missing)} of {len(self.expected)} weights are missing, the first is {missing[0]}.")
        names = {
            f"part-{i:05d}.safetensors": f"model-{i:05d}-of-{self.num_files:05d}.safetensors"
            for i in range(1, self.num_files + 1)
        }
        for old, new in names.items():
            (self.folder / old).rename(self.folder / new)
        index = {
            "metadata": {"total_size": sum(part["bytes"] for part in self.report)},
            "weight_map": {name: names[file] for name, file in sorted(self.weight_map.items())},
        }
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


__all__ = ["ShardWriter"]
