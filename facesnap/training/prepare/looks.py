"""What large models see in the pictures of a part: a face parser the heads, BLIP-2 what to say.

They come after the faces, one process to a GPU, so that each model is loaded once for it, however many processes
find faces.
"""

import io
from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np

from facesnap.errors import InputError
from facesnap.training.prepare.headmask import FaceParser, landmark_mask
from facesnap.training.prepare.options import Options, Rejected
from facesnap.training.prepare.parts import PartFiles, PartJob, explained, read_members, write_part
from facesnap.training.prepare.samples import encoded


class Captioner:
    """BLIP-2 through transformers; `model` is its folder or its id on the Hub."""

    def __init__(self, model: str, device: str = "cpu", batch_size: int = 8) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoTokenizer, Blip2ForConditionalGeneration

        self.dtype = torch.float32 if device == "cpu" else torch.float16
        self.model = (
            Blip2ForConditionalGeneration.from_pretrained(model, dtype=self.dtype, use_safetensors=True)
            .to(device)
            .eval()
        )
        self.processor = AutoImageProcessor.from_pretrained(model, backend="pil")  # the other needs torchvision
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.batch_size = batch_size

    def __call__(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """A caption for each RGB uint8 picture (H, W, 3)."""
        import torch

        captions: list[str] = []
        for start in range(0, len(pictures), self.batch_size):
            batch = list(pictures[start : start + self.batch_size])
            pixels = self.processor(images=batch, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                ids = self.model.generate(
                    pixel_values=pixels.to(self.model.device, self.dtype), max_new_tokens=40, do_sample=False
                )
            captions += [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return captions


@lru_cache(1)
def load_models(options: Options, device: str) -> tuple[FaceParser | None, Captioner | None]:
    """Those that the options ask for, once in a process; raises InputError where one cannot be loaded."""
    try:
        parser = FaceParser(options.parser, device) if options.parser else None
        captioner = Captioner(options.caption_model, device) if options.captions == "blip2" else None
    except (ValueError, OSError) as error:  # of transformers
        raise InputError(str(error)) from error
    return parser, captioner


def look(job: PartJob) -> None:
    """The part of what `parts.find` found, with masks by the face parser and captions by BLIP-2."""
    found, part = (PartFiles.of(job.out, job.number, kind) for kind in ("found", "part"))
    if job.done:
        return
    with explained(job.out):
        parser, captioner = load_models(job.options, job.device)
        told = found.read()
        embeddings = np.load(found.embeddings)
        members = [read_members(found, sample) for sample in told["samples"]]
        pictures = [_picture(files[job.options.format]) for files in members]
        kept, rejects = [], list(told["rejects"])
        for row, (sample, files, picture) in enumerate(zip(told["samples"], members, pictures, strict=True)):
            try:
                if parser:
                    files["mask.png"] = encoded(parsed(parser, picture, files["npz"]), "png")
                kept.append(row)
            except Rejected as why:
                about = {"source": sample["source"], "face": sample["face"]}
                rejects.append(about | {"reason": why.reason, "figure": why.figure})
        if captioner:
            for row, caption in zip(kept, captioner([pictures[row] for row in kept]), strict=True):
                told["samples"][row]["caption"] = caption
        write_part(
            part,
            members=[members[row] for row in kept],
            embeddings=[embeddings[row] for row in kept],
            abouts=[{k: v for k, v in told["samples"][row].items() if k != "places"} for row in kept],
            photos=told["photos"],
            rejects=rejects,
        )
        for path in (found.list, found.embeddings, found.samples):
            path.unlink(missing_ok=True)


def parsed(parser: FaceParser, picture: np.ndarray, arrays: bytes) -> np.ndarray:
    """The head (H, W) in a sample's picture (H, W, 3); raises Rejected where the parser took it for something else."""
    with np.load(io.BytesIO(arrays)) as file:
        box, landmarks = file["box"], file["landmarks68"]
    mask = parser.mask(picture, box, landmarks)
    hull = landmark_mask(landmarks, picture.shape[:2])
    covered = float((mask & hull).sum() / max(hull.sum(), 1))
    if covered < 0.5:
        raise Rejected("no mask", round(covered, 2))
    return mask


def _picture(data: bytes) -> np.ndarray:
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
