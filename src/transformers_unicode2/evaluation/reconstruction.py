"""How much of a picture its codes keep: pictures are redrawn from their own codes and compared with the originals.

    unicode2 evaluate reconstruction --model pipe --images photos --output redrawn
    unicode2 evaluate reconstruction --model pipe --images photos --output redrawn --clip openai/clip-vit-base-patch32

Metrics come from torchmetrics and are updated picture by picture, so memory does not grow with their number. PSNR and
SSIM compare pixels; codes keep what a picture shows, not its pixels, so both are low. Equal pictures count with a PSNR
of 100 dB, and the card says how many there are. With --clip, `likeness` is the cosine of the CLIP embeddings of
original and redrawn picture, and `frechet_clip` the Fréchet distance of the two sets of embeddings. `fid` is that of
Inception features and needs the packages torch-fidelity and torchvision; `lpips` needs torchvision.

Each original is resized and center-cropped to the painted square; this crop is encoded and compared. Redrawn pictures
stay in OUTPUT, and a run that was killed resumes. Picture i has a seed of its own, made of --seed and i.
"""

import argparse
import hashlib
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ..checkpoints import check_checkpoint
from ..cli import SEED, at_least
from ..codebook.images import ImageSource
from ..files import explained
from ..images_unicode2 import load_image
from ..record import Record, hash_source
from .card_files import check_foreign, check_replaced
from .generation import DECODER, describe_decoder, load_pipeline, save_picture
from .judges import load_judge
from .score_card import ScoreCard, describe_run, describe_subject

# The fewest pictures of which a Fréchet distance is computed, beside the width of the embeddings
LEAST = 2
# Most of a PSNR in dB, which is infinite of equal pictures
MAX_PSNR = 100.0
FID_NEEDS = "--fid needs torch-fidelity and torchvision"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 evaluate reconstruction", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add, natural = parser.add_argument, at_least(1)
    add("--model", required=True, help="assembled pipeline: folder or Hub name")
    add("--images", required=True, help="folder, glob, table or tar of images")
    add("--output", required=True, help="folder for the redrawn pictures and the score card")
    add("--num-images", type=natural, help="use only the first N (default: all)")
    add("--image-size", type=natural, help="pixels of a side (default: the pipeline's)")
    add("--steps", type=natural, help="diffusion steps (default: the pipeline's)")
    add("--guidance", type=at_least(0.0), help="guidance_scale of the decoder (default: the pipeline's)")
    add("--true-cfg-scale", type=at_least(1.0), help="classifier-free guidance of FLUX (default: the pipeline's)")
    add("--clip", help="CLIP image tower for likeness and a Fréchet distance: folder or Hub name")
    add("--fid", action="store_true", help="also the FID of Inception features")
    add("--lpips", action="store_true", help="also LPIPS, by AlexNet")
    add("--seed", type=SEED, default=0, help="default: %(default)s")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of all weights (default: bfloat16 on a GPU)")
    return parser


def main(args: argparse.Namespace) -> ScoreCard:
    start = time.perf_counter()
    check_checkpoint(args.model, "model_index.json")
    check_foreign(Path(args.output) / "card.json", "evaluate reconstruction")
    source = ImageSource(args.images, args.num_images)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    metrics = Metrics(args, device)
    pipe, output = load_pipeline(args, device), Path(args.output)
    card = describe(args, pipe, source)
    # The pictures do not depend on what compares them
    made_of = {name: value for name, value in card.protocol.items() if name != "metrics"}
    record = Record(output, {"protocol": made_of, "subject": card.subject}, ("[0-9]*.png",))
    with explained(output), ExitStack() as stack:
        if not stack.enter_context(record.making()):
            redraw(args, pipe, source, output)
    compare(args, source, output, metrics, card)
    check_replaced(output / "card.json", card)
    card.run = describe_run(str(device), start)
    card.write(output / "card.json")
    print(card.make_page())
    return card


def describe(args: argparse.Namespace, pipe, source: ImageSource) -> ScoreCard:
    protocol = {"benchmark": "reconstruction", "task_type": "image-to-image", "seed": args.seed}
    protocol |= {"images": hash_images(source), "num_images": len(source)}
    protocol["decoder"] = describe_decoder(args, pipe)
    protocol["image_size"] = args.image_size or pipe.config.image_size
    protocol["dtype"] = str(pipe.condition_mapper.dtype)
    # They decide how sums are rounded
    protocol |= {"threads": torch.get_num_threads()} if pipe.device.type == "cpu" else {}
    protocol["metrics"] = {"clip": args.clip and hash_source(args.clip), "fid": args.fid, "lpips": args.lpips}
    return ScoreCard("evaluate reconstruction", protocol, describe_subject(args.model, deep=True))


def hash_images(source: ImageSource) -> str:
    """SHA-256 of the contents of all pictures, in their order."""
    digest = hashlib.sha256()
    for _, content in source.read(0, len(source)):
        digest.update(hashlib.sha256(content if isinstance(content, bytes) else b"").digest())
    return digest.hexdigest()


def list_originals(source: ImageSource) -> Iterator[tuple[int, Image.Image]]:
    """The pictures that can be read, by their numbers."""
    for number, (_, content) in enumerate(source.read(0, len(source))):
        try:
            yield number, source.decode(content)
        except ValueError:
            continue


def redraw(args: argparse.Namespace, pipe, source: ImageSource, output: Path) -> None:
    """Writes OUTPUT/{number:06d}.png of each picture that is not there yet. Its middle is redrawn."""
    from tqdm import tqdm

    given = {name: getattr(args, option) for option, name in DECODER.items()}
    given |= {"height": args.image_size, "width": args.image_size}
    given = {name: value for name, value in given.items() if value is not None}
    for number, image in tqdm(list_originals(source), total=len(source), unit="picture", desc="redrawing"):
        file = output / f"{number:06d}.png"
        if not file.is_file():
            seed = int(np.random.SeedSequence([args.seed, number]).generate_state(1, np.uint64)[0] >> 1)
            image = fit(image, args.image_size or pipe.config.image_size)
            save_picture(file, pipe(image=image, generator=torch.Generator().manual_seed(seed), **given).images[0])


def fit(image: Image.Image, size: int) -> Image.Image:
    """The middle of a picture, `size` pixels wide and high."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


class Metrics:
    """The metrics of torchmetrics that were asked for.

    Raises:
        `ValueError`: when a package that one of them needs is missing.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.device, self.sets, self.clip = device, {}, None
        self.pairs = {
            "psnr": PeakSignalNoiseRatio(data_range=1.0),
            "ssim": StructuralSimilarityIndexMeasure(data_range=1.0),
        }
        try:
            if args.lpips:
                from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

                self.pairs["lpips"] = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
            if args.fid:
                self.sets["fid"] = FrechetInceptionDistance(2048, normalize=True)
        except (ImportError, ModuleNotFoundError) as error:
            needs = "--lpips needs torchvision" if "lpips" not in self.pairs and args.lpips else FID_NEEDS
            raise ValueError(f"{needs}: {str(error).splitlines()[0]}") from error
        if args.clip:
            self.clip = ClipEmbeddings(args.clip).to(device).eval()
            self.sets["frechet_clip"] = FrechetInceptionDistance(self.clip, normalize=False, input_img_size=(3, 64, 64))
        for metric in (*self.pairs.values(), *self.sets.values()):
            metric.to(device)

    def compare(self, original: torch.Tensor, redrawn: torch.Tensor) -> dict[str, float]:
        """Figures of one pair, float32 `(1, 3, height, width)` in [0, 1]."""
        pair = original.to(self.device), redrawn.to(self.device)
        figures = {name: metric(pair[1], pair[0]).item() for name, metric in self.pairs.items()}
        figures["psnr"] = min(figures["psnr"], MAX_PSNR)
        for name, metric in self.sets.items():
            for image, real in zip(pair, (True, False)):
                # A CLIP reads bytes, as its image processor does
                metric.update(image if name == "fid" else (255 * image).round().byte(), real=real)
        if self.clip is not None:
            embeds = [torch.nn.functional.normalize(self.clip((255 * image).round().byte()), dim=-1) for image in pair]
            figures["likeness"] = (embeds[0] * embeds[1]).sum().item()
        return figures


class ClipEmbeddings(torch.nn.Module):
    """Bytes `(batch_size, 3, height, width)` to CLIP embeddings `(batch_size, projection_dim)`."""

    def __init__(self, name: str):
        from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

        super().__init__()
        self.processor = AutoImageProcessor.from_pretrained(name)
        self.model = load_judge(CLIPVisionModelWithProjection, name, "--clip")
        self.num_features = self.model.config.projection_dim

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        images = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in pixels]
        inputs = self.processor(images, return_tensors="pt")["pixel_values"].to(self.model.device)
        return self.model(inputs).image_embeds.float()


def compare(args: argparse.Namespace, source: ImageSource, output: Path, metrics: Metrics, card: ScoreCard) -> None:
    """Adds the figures of all pictures to a card. Raises `ValueError` when none could be read."""
    from tqdm import tqdm

    values, equal = {}, 0
    for number, image in tqdm(list_originals(source), total=len(source), unit="picture", desc="comparing"):
        redrawn = load_image(output / f"{number:06d}.png")
        # Decoders round the size that they are asked for
        original = fit(image, redrawn.width)
        equal += original.tobytes() == redrawn.tobytes()
        for name, value in metrics.compare(to_tensor(original), to_tensor(redrawn)).items():
            values.setdefault(name, {})[str(number)] = value
    if not values:
        raise ValueError(f"None of {len(source)} pictures in {args.images} can be read.")
    units = {"psnr": "dB"}
    for name, items in values.items():
        card.add_mean(name, items, units.get(name, ""))
    count = len(values["psnr"])
    for name, metric in metrics.sets.items():
        if count >= LEAST:
            card.add_figure(name, metric.compute().item(), count, "")
        width = len(metric.real_features_sum)
        if count < width:
            print(
                f"{name} is of {count} pictures, fewer than the {width} dimensions of its features; it "
                "depends on their number."
            )
    for what, number in (("pictures redrawn exactly", equal), ("pictures that cannot be read", len(source) - count)):
        if number:
            card.add_figure(what, number, len(source), "pictures")
    if count < len(source):
        print(f"{len(source) - count} of {len(source)} pictures cannot be read, and are left out.")


def to_tensor(image: Image.Image) -> torch.Tensor:
    """float32 `(1, 3, height, width)` in [0, 1]."""
    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None]
