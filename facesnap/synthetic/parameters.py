"""The fields and words of the rendered world: what a person and a picture are made of.

A person is a draw of the identity fields (head shape, colours, hair, beard, marks); a picture adds expression, pose,
light, background, clothes, glasses, hat and style. Both are fields of one record, `PARAMETERS`, so that a picture's
record says everything about it. Colours are linear-light RGB.
"""

from dataclasses import dataclass, field

import numpy as np

VERSION = "3"  # of the rendered world; stored with every weight trained on it
EVALUATION_PEOPLE = range(1_000_000, 1_010_000)

IDENTITY_SHAPE = (
    "face_width jaw_ratio jaw_angle jowls chin_roundness lower_height upper_height cheekbone cheek_fullness "
    "eye_spacing eye_width eye_open eye_tilt eye_y brow_height brow_thickness brow_arch brow_tilt brow_length "
    "brow_ridge nose_length nose_width nose_projection nose_bridge nose_upturn mouth_width upper_lip lower_lip "
    "cupid_bow mouth_y chin_projection chin_cleft ear_size neck_width shoulders iris_radius"
).split()
IDENTITY_LOOK = (
    "freckles blush youth age wrinkles lashes mole mole_x mole_y stubble moustache goatee beard beard_length hairline "
    "temple recede bald_top hair_side hair_back hair_thickness hair_fade hair_part fringe curl hair_volume hair_seed "
    "curtain_length curtain_opening curtain_width curtain_wave curtain_curl bun grey grey_temple grey_beard"
).split()
IDENTITY_COLOURS = "skin hair grey_hair beard_hair iris lip brow".split()
PICTURE = (
    "smile mouth_open eyelids brow_raise gaze_x gaze_y yaw pitch roll scale shift_x shift_y torso_yaw "
    "light_azimuth light_elevation key ambient fill rim rim_azimuth exposure back_level background back_seed pattern "
    "neckline glasses sunglasses hat hand hand_x hand_y hand_turn"
).split()
PICTURE_COLOURS = "key_colour back_a back_b clothes clothes_b glasses_colour hat_colour".split()

IDENTITY = IDENTITY_SHAPE + IDENTITY_LOOK + IDENTITY_COLOURS
EXPRESSION = ("smile", "mouth_open", "eyelids", "brow_raise")
PARAMETERS = np.dtype(
    [(n, "f8") for n in IDENTITY_SHAPE + IDENTITY_LOOK]
    + [(n, "f8", (3,)) for n in IDENTITY_COLOURS]
    + [(n, "f8") for n in PICTURE]
    + [(n, "f8", (3,)) for n in PICTURE_COLOURS]
)

SKIN = {
    "fair": ((0.76, 0.52, 0.42), (0.72, 0.47, 0.36)),
    "light": ((0.67, 0.42, 0.30), (0.60, 0.36, 0.24)),
    "tan": ((0.53, 0.32, 0.20), (0.46, 0.27, 0.16)),
    "brown": ((0.37, 0.21, 0.125), (0.29, 0.16, 0.095)),
    "dark": ((0.21, 0.115, 0.075), (0.14, 0.075, 0.048)),
}
HAIR = {
    "black": ((0.016, 0.013, 0.012), (0.028, 0.022, 0.020)),
    "dark brown": ((0.050, 0.027, 0.016), (0.075, 0.040, 0.022)),
    "brown": ((0.13, 0.065, 0.030), (0.19, 0.095, 0.042)),
    "blond": ((0.52, 0.34, 0.14), (0.72, 0.54, 0.28)),
    "red": ((0.34, 0.090, 0.025), (0.50, 0.16, 0.045)),
    "gray": ((0.19, 0.19, 0.19), (0.35, 0.345, 0.34)),
    "white": ((0.70, 0.69, 0.67), (0.80, 0.79, 0.77)),
    "blue": ((0.08, 0.17, 0.50), (0.12, 0.24, 0.58)),
    "pink": ((0.60, 0.14, 0.32), (0.70, 0.22, 0.40)),
}
IRIS = {
    "brown": ((0.10, 0.045, 0.018), (0.18, 0.085, 0.032)),
    "hazel": ((0.26, 0.16, 0.05), (0.30, 0.20, 0.07)),
    "green": ((0.12, 0.28, 0.09), (0.16, 0.34, 0.14)),
    "blue": ((0.09, 0.25, 0.48), (0.18, 0.38, 0.58)),
    "gray": ((0.28, 0.33, 0.36), (0.34, 0.38, 0.41)),
}
CLOTHES = {
    "black": (0.02, 0.02, 0.025), "white": (0.85, 0.85, 0.85), "red": (0.55, 0.04, 0.05), "blue": (0.04, 0.12, 0.46),
    "green": (0.05, 0.30, 0.12), "yellow": (0.82, 0.58, 0.07), "purple": (0.30, 0.07, 0.40), "pink": (0.85, 0.35, 0.47),
    "gray": (0.35, 0.35, 0.37), "orange": (0.78, 0.27, 0.05),
}  # fmt: skip
BACKDROPS = {
    "gray": (0.28, 0.28, 0.30), "black": (0.03, 0.03, 0.04), "white": (0.80, 0.80, 0.80), "blue": (0.09, 0.24, 0.55),
    "red": (0.52, 0.09, 0.08), "green": (0.10, 0.34, 0.14), "yellow": (0.78, 0.56, 0.16), "purple": (0.32, 0.13, 0.45),
    "pink": (0.80, 0.43, 0.50),
}  # fmt: skip
SKIES = ((0.35, 0.60, 0.95), (0.95, 0.62, 0.40), (0.75, 0.80, 0.85))
FRAMES = ((0.02, 0.02, 0.02), (0.30, 0.10, 0.03), (0.55, 0.40, 0.12), (0.40, 0.03, 0.04))
LIPSTICK = ((0.55, 0.05, 0.08), (0.60, 0.20, 0.25), (0.40, 0.04, 0.12), (0.62, 0.14, 0.08))

BACKGROUNDS = ("studio", "plain", "bokeh", "hills")
LIGHTS = ("soft", "left", "right", "warm", "cool")
EXPOSURES = ("normal", "dark", "bright")
STYLES = ("photo", "pencil sketch", "watercolor", "oil painting", "black and white")
EXPRESSIONS = ("neutral", "smiling", "laughing", "surprised", "serious")
PATTERNS = ("plain", "striped", "jacket")
GLASSES = ("none", "round", "square")
HATS = ("none", "beanie", "cap")


@dataclass(frozen=True)
class Person:
    """One rendered person: `parameters` holds the identity fields, `attributes` what words can say of them."""

    seed: int
    parameters: np.ndarray  # () of PARAMETERS
    attributes: dict = field(hash=False)


@dataclass(frozen=True)
class Picture:
    """Everything that one rendered picture needs."""

    person: Person
    parameters: np.ndarray  # () of PARAMETERS, identity and picture fields
    attributes: dict = field(hash=False)  # what the prompt controls, in words
    style: str = "photo"


def between(rng: np.random.Generator, low: float, high: float, spread: float = 0.27) -> float:
    """A draw that favours the middle: caricatures come from many extremes at once."""
    return float(np.clip(rng.normal((low + high) / 2, (high - low) * spread), low, high))


def choice(rng: np.random.Generator, options, weights=None):
    """One of `options`, evenly or by weight."""
    options = list(options)
    if weights is None:
        return options[int(rng.integers(len(options)))]
    weights = np.asarray(weights, float)
    return options[int(rng.choice(len(options), p=weights / weights.sum()))]
