"""What is measured: the draws, the true pictures, and how one picture is looked at.

All people come from `EVALUATION_PEOPLE`, which training refuses. A portrait is asked for as a visitor asks:
PNG files and a sentence, through `FaceSnapPipeline` only. What the renderer knows serves to score:

reference   a photo of person i              driver   a photo of somebody else, whose pose and expression
are taken prompt      drawn independently of both      truth    person i rendered in that pose, expression
and prompt
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from facesnap import landmarks, metrics
from facesnap.errors import InputError
from facesnap.evaluation.scorer import AttributeScorer, visible
from facesnap.faces import FaceAnalyser, Recogniser
from facesnap.images import open_image
from facesnap.pipeline import FaceSnapPipeline
from facesnap.synthetic import head as heads
from facesnap.synthetic.captions import LIGHT_WORDS, STYLE_WORDS, scene_words
from facesnap.synthetic.people import (
    BACKDROPS,
    BACKGROUNDS,
    CLOTHES,
    EVALUATION_PEOPLE,
    EXPRESSION,
    GLASSES,
    HATS,
    LIGHTS,
    PATTERNS,
    STYLES,
    Picture,
    sample_person,
    sample_picture,
)
from facesnap.synthetic.render import project, render, to_world

GALLERY = 200

# ------------------------------------------------------------------------------------------- the draws


@dataclass(frozen=True)
class Request:
    """One portrait to be made: seeds of person and driver, the sentence, and what it asks for in
    attributes."""

    person: int
    driver: int
    prompt: str
    style: str
    attributes: dict
    seed: int


def people(seed: int) -> tuple[list[int], list[int]]:
    """(the gallery of 200, the drivers): disjoint held-out people, the same for every size of evaluation."""
    order = np.random.default_rng([seed, 0]).permutation(np.array(EVALUATION_PEOPLE)).tolist()
    return order[:GALLERY], order[GALLERY:]


def draw_prompt(rng: np.random.Generator) -> tuple[str, str, dict]:
    """(sentence, style, attributes): everything that a prompt controls, drawn and named in the world's own
    words."""

    def draw(options: Sequence[str], weights: Sequence[float] | None = None) -> str:
        return str(rng.choice(list(options), p=weights))

    style = draw(STYLES, (0.4, 0.15, 0.15, 0.15, 0.15))
    attributes = {
        "light": draw(LIGHTS),
        "background": draw(BACKGROUNDS, (0.35, 0.35, 0.15, 0.15)),
        "background_color": draw(list(BACKDROPS)),
        "clothes_color": draw(list(CLOTHES)),
        "pattern": draw(PATTERNS),
        "glasses": draw(GLASSES, (0.5, 0.25, 0.25)),
        "hat": draw(HATS, (0.5, 0.25, 0.25)),
        "hat_color": draw(list(CLOTHES)),
        "exposure": "normal",  # the sentence names no other
        "shadows": "soft",
    }
    words = scene_words(attributes)
    worn = ["wearing " + words[name] for name in ("glasses", "hat") if name in words]
    subject = f"{draw(STYLE_WORDS[style])} a person"
    light = draw(LIGHT_WORDS[attributes["light"]])
    return ", ".join([subject, words["clothes"], *worn, words["background"], light]), style, attributes


def requests(seed: int, num_people: int, poses: int) -> list[Request]:
    """`poses` portraits of each of the first `num_people` of the gallery, every one with a driver of its
    own."""
    gallery, drivers = people(seed)
    if not 1 <= num_people <= GALLERY:
        raise InputError(f"--people {num_people}: the gallery holds {GALLERY}, choose 1 to {GALLERY}")
    rng = np.random.default_rng([seed, 1])
    found: list[Request] = []
    for person in gallery[:num_people]:
        for _ in range(poses):
            prompt, style, attributes = draw_prompt(rng)
            driver = drivers[len(found)]
            found.append(Request(person, driver, prompt, style, attributes, int(rng.integers(2**31))))
    return found


# ---------------------------------------------------------------------------------------- the pictures


def reference_picture(person: int) -> Picture:
    """What a visitor would upload: a photo, the head turned a little at most; the rest as the world has
    it."""
    rng = np.random.default_rng([person, 10])
    yaw, pitch, roll = np.clip(rng.normal(0, (0.22, 0.10, 0.07)), (-0.5, -0.25, -0.2), (0.5, 0.25, 0.2))
    return sample_picture(sample_person(person), 0, style="photo", pose=(yaw, pitch, roll))


def driver_picture(person: int) -> Picture:
    """Any photo of the world: its poses and expressions are what the driver gives."""
    return sample_picture(sample_person(person), 1, style="photo")


def world_picture(person: int, k: int) -> Picture:
    """The person as the world has them: any pose, style, hat."""
    return sample_picture(sample_person(person), 20 + k)


def truth_picture(
    person: int, driver: Picture, *, style: str = "photo", attributes: Mapping[str, str] | None = None
) -> Picture:
    """The person before the driver's camera, in the driver's pose, expression and place."""
    picture = sample_picture(sample_person(person), 2, style=style, attributes=dict(attributes or {}))
    p, d = picture.parameters.copy(), driver.parameters
    for name in (*EXPRESSION, *"gaze_x gaze_y yaw pitch roll scale shift_x shift_y torso_yaw".split()):
        p[name] = d[name]
    return replace(picture, parameters=p)


def judged(picture: Picture) -> dict[str, str]:
    """The attributes that a true picture shows: without the clothes' colour where the head leaves them no room."""
    collar = project(np.array([[0.0, -1.45, 0.2]]), picture.parameters, 1)[0, 1]  # 1 is the lower edge
    seen = visible(picture.attributes, picture.style)
    return {name: value for name, value in seen.items() if name != "clothes_color" or collar < 1}


def exact_landmarks(picture: Picture, size: int) -> np.ndarray:
    """The 72 landmarks (72, 2) in pixels, without rendering."""
    return exact_landmarks3d(picture, size)[:, :2]


def exact_landmarks3d(picture: Picture, size: int) -> np.ndarray:
    """The 72 landmarks (72, 3) in pixels, z towards the camera in the same unit."""
    p = picture.parameters[()]
    world = to_world(heads.landmarks(p), p)
    xy = project(world, p, size)[:, :2] - 0.5
    return np.column_stack([xy, world[:, 2] * size / 3 * p["scale"]]).astype(np.float32)


def frontal_eye_distance(picture: Picture, size: int) -> float:
    """Between the outer eye corners, in pixels, if the head looked straight ahead."""
    p = picture.parameters.copy()
    p["yaw"] = p["pitch"] = p["roll"] = 0
    return float(landmarks.eye_distance(exact_landmarks(replace(picture, parameters=p), size)))


# ----------------------------------------------------------------------------------------- the looking


class Witness:
    """Looks at PNG files and says what it sees; it never knows what should be there.

    model: checkpoint folder. Faces are found and aligned by the face pack (the Haar fallback does not
    count: that is for photographs), identity is recogniser C's, attributes are the scorer's.
    """

    def __init__(self, model: Path):
        self.analyser = FaceAnalyser(model / "face_pack")
        self.recogniser = Recogniser(model / "scorer" / "recogniser.onnx")
        self.scorer = AttributeScorer(model / "scorer")

    def look(self, path: Path) -> dict:
        """{"found", "embedding" (512,) or None, "points" (72, 2) pixels or None, "attributes", "sharpness" of a face
        that was found} as plain lists."""
        image = open_image(path)
        seen: dict = {"found": False, "embedding": None, "points": None}
        try:
            face = self.analyser.analyse(image)
        except InputError as error:
            return {**seen, "attributes": self.scorer.classify(image, None), "reason": str(error)}
        if face.found_by == "haar":
            attributes = self.scorer.classify(image, None)
            return {**seen, "attributes": attributes, "reason": "found by the Haar cascade only"}
        embedding = self.recogniser.embed(image, face.keypoints)
        points = landmarks.from_68(face.landmarks[:, :2])
        return {
            "found": True,
            "embedding": np.round(embedding / np.linalg.norm(embedding), 5).tolist(),
            "points": np.round(points, 2).tolist(),
            "sharpness": round(metrics.sharpness(image, face.box), 3),
            "attributes": self.scorer.classify(image, face.keypoints),
        }


def load_pipeline(model: Path, device: str) -> FaceSnapPipeline:
    """The checkpoint, ready and silent (the evaluation has a progress bar of its own)."""
    pipe = FaceSnapPipeline.from_pretrained(model)
    pipe.to(device)  # type: ignore[attr-defined]
    pipe.set_progress_bar_config(disable=True)  # type: ignore[attr-defined]
    return pipe


def rendered(picture: Picture, path: Path, size: int) -> Path:
    """`path`, with the picture rendered into it unless it is there already."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        Image.fromarray(render(picture, size).image).save(unfinished, format="PNG")
        unfinished.replace(path)  # a kill never leaves half a picture under its name
    return path
