"""Who finds the objects of a picture, and names their colors: Mask2Former and CLIP, both of Transformers."""

import numpy as np
import torch
from PIL import Image

from .geneval import COLORS, Detection
from .judges import load_judge

# Of a color and a class; the mean of their embeddings stands for the color
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
# What lies around an object
GROUND = "#999"


class Mask2FormerDetector:
    """Objects of COCO's classes, with their masks and of any score.

    Args:
        name: folder or Hub name of a `Mask2FormerForUniversalSegmentation`.
        device: to run it on.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        self.processor = AutoImageProcessor.from_pretrained(name)
        self.model = load_judge(Mask2FormerForUniversalSegmentation, name, "--detector").to(device)
        self.labels = self.model.config.id2label

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> list[Detection]:
        inputs = self.processor(image, return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs)
        sizes = [image.size[::-1]]
        (found,) = self.processor.post_process_instance_segmentation(
            outputs, threshold=0.0, target_sizes=sizes, return_binary_maps=True
        )
        masks = found["segmentation"]
        detections = []
        for mask, info in zip(masks if masks is not None else [], found["segments_info"]):
            mask = mask.cpu().numpy() > 0
            if mask.any():
                label = self.labels[info["label_id"]]
                detections.append(Detection(label, float(info["score"]), find_box(mask), mask))
        return detections


def find_labels(name: str) -> set[str]:
    """The classes that a detector knows. Raises `ValueError` when it is no Mask2Former."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    if config.model_type != "mask2former":
        raise ValueError(f"--detector {name} is a {config.model_type}; give a Mask2Former.")
    return {*config.id2label.values()}


def find_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The box around a mask, bool `(height, width)`, whose ends are outside of it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class ColorNamer:
    """The color of an object, by a CLIP on its crop in front of grey.

    Args:
        name: folder or Hub name of a `CLIPModel`.
        device: to run it on.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        from transformers import AutoProcessor, CLIPModel

        self.processor = AutoProcessor.from_pretrained(name)
        self.model, self.known = load_judge(CLIPModel, name, "--clip").to(device), {}

    @torch.no_grad()
    def embed_colors(self, label: str) -> torch.Tensor:
        """Unit vectors of all colors of objects of a class, `(num_colors, projection_dim)`."""
        if label not in self.known:
            texts = [one.format(color=color, label=label) for color in COLORS for one in TEMPLATES]
            inputs = self.processor(text=texts, padding=True, truncation=True, return_tensors="pt")
            embeds = as_tensor(self.model.get_text_features(**inputs.to(self.model.device)))
            embeds = torch.nn.functional.normalize(embeds, dim=-1).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self.known[label] = torch.nn.functional.normalize(embeds.mean(1), dim=-1)
        return self.known[label]

    @torch.no_grad()
    def __call__(self, image: Image.Image, detection: Detection, label: str) -> str:
        if detection.mask is not None:
            ground = Image.new("RGB", image.size, GROUND)
            image = Image.composite(image, ground, Image.fromarray(detection.mask))
        crop = image.crop(tuple(round(value) for value in detection.box))
        inputs = self.processor(images=crop, return_tensors="pt").to(self.model.device)
        embeds = as_tensor(self.model.get_image_features(**inputs))
        likeness = torch.nn.functional.normalize(embeds, dim=-1) @ self.embed_colors(label).T  # (1, num_colors)
        return COLORS[int(likeness.argmax())]


def as_tensor(output) -> torch.Tensor:
    """What a tower of CLIP gives; newer versions wrap it."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
