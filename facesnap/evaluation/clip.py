"""CLIP-T and CLIP-face, by any CLIP of transformers: its name and revision go into the report.

CLIP-T is 100 times the cosine of a picture and its prompt, CLIP-face 100 times that of two faces, each cut out around
the detector's box. The paper does not name its CLIP; `laion/CLIP-ViT-H-14-laion2B-s32B-b79K` is the one its mixer
reads faces with, `openai/clip-vit-large-patch14` the one that most papers score with. Figures of two CLIPs cannot be
compared.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from facesnap.errors import reading
from facesnap.provenance import fingerprint

FACE = 1.3  # detector's boxes: the face with its hairline, without much background (our choice)


class Clip:
    """A CLIP by folder or Hub id, optionally "id@revision"."""

    def __init__(self, name: str, device: str = "cpu"):
        place, _, revision = name.partition("@")
        options = {"revision": revision} if revision else {}
        self.device, self.name = device, Path(place).name if Path(place).is_dir() else place
        with reading(f"The CLIP '{self.name}'", "give a folder, or a Hub id such as openai/clip-vit-large-patch14"):
            if (kind := AutoConfig.from_pretrained(place, **options).model_type) != "clip":
                raise ValueError(kind)
            model, told = CLIPModel.from_pretrained(place, output_loading_info=True, **options, use_safetensors=True)
            if told["missing_keys"]:  # transformers would fill the gaps with random numbers
                raise ValueError("another architecture")
            self.model = model.to(device).eval()
            self.processor = CLIPImageProcessorPil.from_pretrained(place, **options)
            self.tokenizer = AutoTokenizer.from_pretrained(place, **options)
        commit = getattr(self.model.config, "_commit_hash", None)
        self.about = f"{self.name}, {commit[:12] if commit else fingerprint(Path(place))}"

    @torch.no_grad()
    def image(self, picture: np.ndarray) -> np.ndarray:
        """RGB uint8 (H, W, 3) → (D,), not normalised."""
        pixels = self.processor(Image.fromarray(picture), return_tensors="pt").pixel_values.to(self.device)
        return self.model.get_image_features(pixels).pooler_output[0].float().cpu().numpy()

    @torch.no_grad()
    def text(self, prompt: str) -> np.ndarray:
        """A prompt → (D,), not normalised; what is longer than CLIP reads is cut off."""
        words = self.tokenizer([prompt], padding=True, truncation=True, return_tensors="pt").to(self.device)
        return self.model.get_text_features(**words).pooler_output[0].float().cpu().numpy()


def face_region(picture: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The square around a detector's box (4,), `FACE` times its longer side; black where the picture ends."""
    side = FACE * float(max(box[2] - box[0], box[3] - box[1]))
    middle = (box[:2] + box[2:]) / 2
    corners = np.concatenate([middle - side / 2, middle + side / 2]).round().astype(int)
    return np.asarray(Image.fromarray(picture).crop(tuple(corners.tolist())))
