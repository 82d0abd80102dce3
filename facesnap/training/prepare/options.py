"""Everything that decides what the shards will hold, and why a photo or a face is no sample."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from facesnap.checkpoints.plans import MINI
from facesnap.errors import InputError

MINI_PARTS = {"pack": MINI / "face_pack", "head": MINI / "head"}
BLIP2 = "Salesforce/blip2-opt-2.7b"

REASONS = (  # why a photo or a face is no sample, in the order in which they are looked at
    "unreadable picture",
    "unreadable caption",
    "no face",
    "weak detection",
    "small face",
    "unsteady landmarks",
    "blurred",
    "no mask",
    "near-duplicate",
)


@dataclass(frozen=True)
class Options:
    """What `--…` set; the defaults are for 1024². pack, head: folders, or "mini" for those of the mini."""

    pack: str = "mini"
    head: str | None = "mini"
    parser: str | None = None
    captions: str = "given"
    caption_model: str = BLIP2
    identities: str = "embedding"
    same_person: float = 0.5
    resolution: int = 1024
    max_side: int = 1536
    context: float = 4.0
    format: str = "jpg"
    min_score: float = 0.6
    min_face: int = 128
    max_unsteadiness: float = 0.1
    min_sharpness: float = 20.0
    duplicate_bits: int = 4
    duplicate_cosine: float = 0.9
    samples_per_shard: int = 500
    photos_per_part: int = 32
    seed: int = 0

    @property
    def looks(self) -> bool:
        """Whether large models look at the pictures once their faces are found."""
        return self.parser is not None or self.captions == "blip2"

    def absolute(self) -> "Options":
        """With the folders of models as any working directory finds them; Hub ids stay.

        Raises:
            InputError: the mini is meant, and this is no checkout.
        """
        names = ("pack", "head", "parser", "caption_model")
        places: dict[str, Any] = {name: getattr(self, name) for name in names}
        for name, place in MINI_PARTS.items():
            if places[name] == "mini":
                if not place.is_dir():
                    raise InputError(
                        "The mini lies in assets/mini of the repository: work in a checkout, or give --pack and "
                        "--head, the face_pack and head of another checkpoint."
                    )
                places[name] = place
        local = {name: str(Path(place).resolve()) for name, place in places.items() if place and Path(place).is_dir()}
        return replace(self, **dict[str, Any](local))


class Rejected(Exception):
    """A photo or a face that is no sample: one of REASONS, and the figure that decided."""

    def __init__(self, reason: str, figure: object) -> None:
        super().__init__(reason)
        self.reason, self.figure = reason, figure
