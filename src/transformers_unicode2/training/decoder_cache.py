"""What the frozen parts of a decoder make of pairs, once, in shards on disk: text embeddings, latents, and pictures.

Parts that only the cache needs are not in memory while the mapper learns.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset

from ..files import explained, whole_file, write_file
from ..processes import agree
from ..record import Record
from .pairs import decode_pictures, read_content, read_pictures

# Pairs of a shard. A run that is killed loses one shard of each process at most.
PAIRS_PER_SHARD = 256
# Captions and pictures that the frozen parts read at a time
BATCH = 8
NUMBERS = "numbers.json"


def fill_cache(
    folder: Path,
    made_of: dict,
    pairs,
    encode: Callable[[object], dict[str, torch.Tensor]],
    state,
    measure: Callable[[], dict] | None = None,
) -> dict:
    """
    Writes the shards that are not there yet, each by one of all processes.

    Args:
        folder: of one kind of tensors.
        made_of: everything that they depend on, see `Record`.
        pairs: data set, see `open_pairs`.
        encode: rows of it to tensors with one entry for each.
        state: `PartialState`.
        measure: gives numbers that are kept beside the shards.

    Returns:
        These numbers.

    Raises:
        `ValueError`: when the folder was begun with something else, and as `encode` does.
    """
    from tqdm import tqdm

    with explained(folder), ExitStack() as stack:
        record = Record(folder, made_of, ("*.safetensors", NUMBERS), option="`cache_dir`")
        if not agree(lambda: stack.enter_context(record.making())):
            if measure:
                agree(lambda: write_numbers(folder / NUMBERS, measure))
            starts = range(0, len(pairs), PAIRS_PER_SHARD)[state.process_index :: state.num_processes]
            quiet = not state.is_main_process or len(starts) < 2
            for start in tqdm(starts, unit="shard", desc=folder.name, disable=quiet):
                file = folder / name_shard(start)
                if not file.is_file():
                    made = encode(pairs.select(range(start, min(start + PAIRS_PER_SHARD, len(pairs)))))
                    with whole_file(file) as temporary:
                        save_file({name: value.cpu().contiguous() for name, value in made.items()}, temporary)
            state.wait_for_everyone()
    return json.loads((folder / NUMBERS).read_text()) if measure else {}


def write_numbers(file: Path, measure: Callable[[], dict]) -> None:
    if not file.is_file():
        write_file(file, (json.dumps(measure()) + "\n").encode())


def name_shard(start: int) -> str:
    """The file of the pairs from `start` on."""
    return f"{start:09d}.safetensors"


def encode_texts(pairs, decoder) -> dict[str, torch.Tensor]:
    """Pooled embeddings of the captions, float32 `(num_pairs, pooled_dim)`."""
    captions = pairs["caption"][:]
    batches = [captions[start : start + BATCH] for start in range(0, len(captions), BATCH)]
    return {"text": torch.cat([decoder.encode_captions(batch).cpu() for batch in batches])}


def encode_latents(pairs, decoder, sources: list, image_size: int | None, crop: bool) -> dict[str, torch.Tensor]:
    """Latents of the pictures, `(num_pairs, channels, height, width)` in the dtype of the VAE.

    See `decode_pictures`. Raises `ValueError` when they are of several sizes.
    """
    from .data import stack_pixels

    records = list(read_pictures(sources, list(zip(pairs["source"], pairs["row"]))))
    made = []
    for start in range(0, len(records), BATCH):
        pixels = stack_pixels(decode_pictures(records[start : start + BATCH], image_size, crop))
        made.append(decoder.encode_latents(pixels).cpu())
    check_shapes([value.shape for value in made])
    return {"latents": torch.cat(made)}


def check_shapes(shapes: list) -> None:
    """Raises `ValueError` on latents of several sizes, `(..., channels, height, width)`."""
    sizes = sorted({tuple(shape[-2:]) for shape in shapes})
    if len(sizes) > 1:
        (height, width), (height_2, width_2) = sizes[0], sizes[-1]
        raise ValueError(
            f"Images of one size are needed; the latents of these are {height} x {width} and {height_2} x {width_2}. "
            "Set `image_size`."
        )


def check_latents(folder: Path) -> None:
    """Raises `ValueError` when the latents of all shards are of several sizes."""
    shapes = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            shapes.append(shard.get_slice("latents").get_shape())
    check_shapes(shapes)


def copy_pictures(pairs, sources: list) -> dict[str, torch.Tensor]:
    """The compressed contents of the pictures, uint8 one after the other, and where each ends, `(num_pairs,)`."""
    places = list(zip(pairs["source"], pairs["row"]))
    contents = [read_content(record) for record in read_pictures(sources, places)]
    whole = torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8)
    return {"picture": whole, "ends": torch.tensor([len(content) for content in contents]).cumsum(0)}


class CachedPairs(Dataset):
    """Pairs with the cached tensors of each: `codes`, and the entries of `encode_texts`, `encode_latents` and
    `copy_pictures`, the last as bytes.

    Args:
        pairs: data set, see `open_pairs`.
        folders: of the kinds of tensors that are read.
    """

    def __init__(self, pairs, folders: list[Path]):
        self.pairs, self.folders, self.open = pairs, folders, {}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> dict:
        row, place = self.pairs[number], number % PAIRS_PER_SHARD
        found = {"codes": torch.tensor(row["codes"]), "caption": row["caption"]}
        for folder in self.folders:
            shard = self.find_shard(folder, number - place)
            names = set(shard.keys())
            if "ends" in names:
                ends = [0, *shard.get_tensor("ends").tolist()]
                content = shard.get_slice("picture")[ends[place] : ends[place + 1]]
                found["picture"] = content.numpy().tobytes()
            else:
                found |= {name: shard.get_slice(name)[place] for name in names}
        return found

    def find_shard(self, folder: Path, start: int):
        file = folder / name_shard(start)
        if file not in self.open:
            self.open[file] = safe_open(file, framework="pt")
        return self.open[file]

    def __getstate__(self) -> dict:
        # Open files do not go to worker processes
        return {**vars(self), "open": {}}
