"""Who the rendered people are: the person of a seed.

Seeds from `EVALUATION_PEOPLE` are held out: training refuses them.
"""

import numpy as np

from facesnap.synthetic.parameters import (
    BACKDROPS,
    BACKGROUNDS,
    CLOTHES,
    EVALUATION_PEOPLE,
    EXPRESSION,
    EXPRESSIONS,
    GLASSES,
    HAIR,
    HATS,
    IDENTITY,
    IRIS,
    LIGHTS,
    LIPSTICK,
    PARAMETERS,
    PATTERNS,
    SKIN,
    STYLES,
    VERSION,
    Person,
    Picture,
    between,
    choice,
)
from facesnap.synthetic.pictures import sample_picture

__all__ = [
    "BACKDROPS", "BACKGROUNDS", "CLOTHES", "EVALUATION_PEOPLE", "EXPRESSION", "EXPRESSIONS", "GLASSES", "HATS",
    "IDENTITY", "LIGHTS", "PATTERNS", "STYLES", "VERSION", "Person", "Picture", "sample_person", "sample_picture",
]  # fmt: skip

# Ranges of men and of women, in head units (half a head is about 1). Where the two differ they overlap little: the
# jaw, the brow, the lips and the neck say it before the hair does.
SHAPE = {
    "face_width": ((0.69, 0.81), (0.65, 0.76)),
    "jaw_ratio": ((0.82, 0.96), (0.70, 0.84)),
    "jaw_angle": ((0.2, 1.1), (0.00, 0.25)),
    "chin_roundness": ((2.4, 3.8), (2.0, 3.0)),
    "lower_height": ((0.94, 1.09), (0.86, 0.99)),
    "upper_height": ((1.00, 1.12), (1.00, 1.12)),
    "cheekbone": ((0.0, 0.9), (0.2, 1.1)),
    "cheek_fullness": ((-0.6, 1.0), (-0.3, 1.1)),
    "eye_spacing": ((0.275, 0.340), (0.275, 0.340)),
    "eye_width": ((0.143, 0.178), (0.154, 0.194)),
    "eye_open": ((0.064, 0.096), (0.080, 0.116)),
    "eye_tilt": ((-0.30, 0.30), (-0.15, 0.45)),
    "eye_y": ((-0.03, 0.06), (-0.03, 0.06)),
    "brow_height": ((0.150, 0.205), (0.195, 0.260)),
    "brow_thickness": ((0.036, 0.064), (0.016, 0.034)),
    "brow_arch": ((-0.15, 0.40), (0.35, 1.05)),
    "brow_tilt": ((-0.6, 0.7), (-0.5, 0.8)),
    "brow_length": ((0.32, 0.40), (0.29, 0.38)),
    "brow_ridge": ((0.45, 1.25), (0.0, 0.30)),
    "nose_length": ((0.31, 0.42), (0.28, 0.37)),
    "nose_width": ((0.092, 0.150), (0.076, 0.122)),
    "nose_projection": ((0.15, 0.25), (0.12, 0.21)),
    "nose_bridge": ((0.2, 1.1), (0.0, 0.8)),
    "nose_upturn": ((-1.0, 0.7), (-0.6, 1.0)),
    "mouth_width": ((0.190, 0.265), (0.175, 0.245)),
    "upper_lip": ((0.016, 0.044), (0.030, 0.062)),
    "lower_lip": ((0.030, 0.064), (0.044, 0.086)),
    "cupid_bow": ((-0.2, 0.8), (0.0, 1.0)),
    "chin_projection": ((0.02, 0.12), (-0.01, 0.06)),
    "ear_size": ((0.88, 1.25), (0.78, 1.08)),
    "iris_radius": ((0.073, 0.086), (0.077, 0.092)),
    "neck_width": ((0.41, 0.50), (0.29, 0.37)),
    "shoulders": ((1.42, 1.66), (1.12, 1.34)),
}

# What a child's head is of an adult's, at youth 1 (about four years): a factor and an offset. The brain's case is
# nearly grown, the face below it is not.
CHILD = {
    "face_width": (0.8, 0.145),
    "jaw_ratio": (0.75, 0.235),
    "jaw_angle": (0.0, 0.0),
    "chin_roundness": (0.4, 1.45),
    "lower_height": (0.73, 0.0),
    "upper_height": (1.10, 0.0),
    "cheekbone": (0.4, 0.0),
    "cheek_fullness": (0.4, 1.2),
    "eye_spacing": (1.02, 0.0),
    "eye_width": (1.10, 0.0),
    "eye_open": (0.60, 0.064),
    "eye_y": (1.0, -0.075),
    "brow_thickness": (0.50, 0.004),
    "brow_ridge": (0.0, 0.0),
    "brow_height": (0.5, 0.115),
    "brow_arch": (0.5, 0.1),
    "upper_lip": (0.6, 0.012),
    "lower_lip": (0.6, 0.020),
    "nose_length": (0.60, 0.0),
    "nose_width": (0.80, 0.0),
    "nose_projection": (0.55, 0.0),
    "nose_bridge": (0.1, 0.0),
    "nose_upturn": (0.5, 0.5),
    "mouth_width": (0.86, 0.0),
    "chin_projection": (0.3, 0.0),
    "ear_size": (1.0, 0.05),
    "iris_radius": (1.18, 0.0),
    "neck_width": (0.40, 0.135),
    "shoulders": (0.30, 0.58),
}

CUTS = {  # haircut: weight, weight among `varied` people
    "man": {
        "bald": (0.9, 0.6), "buzzed": (1.6, 1.4), "short": (4.8, 7.5), "fringe": (0.8, 1.2), "curly": (1.3, 1.0),
        "long": (0.5, 0.6), "balding": (0.5, 0.7),
    },
    "woman": {
        "long": (3.0, 2.2), "bob": (2.2, 2.2), "bun": (1.3, 2.2), "curly": (1.2, 1.0), "long curly": (1.4, 1.2),
        "short": (1.4, 3.2),
    },
    "boy": {"buzzed": (0.7, 0.7), "short": (4.0, 7.0), "fringe": (2.4, 2.0), "curly": (1.2, 1.0)},
    "girl": {
        "long": (3.4, 2.4), "bob": (2.4, 2.2), "bun": (1.0, 2.0), "curly": (0.8, 0.8), "long curly": (1.2, 1.0),
        "short": (0.5, 1.6),
    },
}  # fmt: skip


def sample_person(seed: int, *, varied: bool = False) -> Person:
    """The person of a seed; the same seed is always the same person.

    `varied` draws hair beyond the proportions that the evaluation's people have, and short hair more often: real
    heads of hair are fuller, looser, or closer to the skull.
    """
    rng = np.random.default_rng([seed, 0])
    p = np.zeros((), PARAMETERS)
    woman = bool(rng.random() < 0.5)
    _draw_shape(p, woman, rng)
    _draw_age(p, rng)
    child = bool(p["youth"] > 0)
    skin, iris = _draw_skin(p, woman, rng)
    hair, graying = _draw_hair_colour(p, skin, rng)
    beard = _draw_beard(p, rng) if not woman and not child else "none"
    kind = ("girl" if woman else "boy") if child else ("woman" if woman else "man")
    cut = _draw_haircut(p, kind, varied, rng)
    if varied:
        cut = _vary_hair(p, cut, np.random.default_rng([seed, 5]))
    age = "child" if child else "old" if p["age"] > 0.65 else "mature" if p["age"] > 0.35 else "adult"
    attributes = {
        "gender": "woman" if woman else "man",
        "age": age,
        "skin": skin,
        "hair": "none" if cut == "bald" else hair,
        "graying": "none" if cut == "bald" else graying,
        "haircut": cut,
        "eyes": iris,
        "beard": beard,
        "freckles": bool(p["freckles"] > 0),
        "mole": bool(p["mole"] > 0),
    }
    return Person(seed, p, attributes)


def _draw_shape(p: np.ndarray, woman: bool, rng: np.random.Generator) -> None:
    for name, ranges in SHAPE.items():
        p[name] = between(rng, *ranges[woman])
    p["chin_cleft"] = float(rng.random() < (0.06 if woman else 0.18))
    p["mouth_y"] = between(rng, 0.33, 0.41)  # of the way from the nose to the chin, until the nose has its place
    if not woman:
        p["mouth_y"] -= 0.01


def _draw_age(p: np.ndarray, rng: np.random.Generator) -> None:
    """How young or old, and what that does to the shape of the head."""
    youth, age = between(rng, 0.50, 1.0, 0.4), float(max(0.0, rng.uniform(-0.5, 1.0)))
    if rng.random() < 0.12:
        p["youth"], age = youth, 0.0
        for name, (factor, offset) in CHILD.items():
            p[name] += youth * (p[name] * (factor - 1) + offset)
    p["age"] = age
    p["wrinkles"] = age * rng.uniform(0.75, 1.15)
    p["jowls"] = max(age - 0.3, 0.0) * rng.uniform(0.3, 1.4)
    p["eye_open"] *= 1 - 0.16 * age
    p["eye_tilt"] -= 0.22 * age
    p["upper_lip"] *= 1 - 0.35 * age
    p["lower_lip"] *= 1 - 0.22 * age
    p["ear_size"] += 0.14 * age
    p["nose_length"] += 0.02 * age
    p["brow_height"] -= 0.018 * age
    tip, chin = p["eye_y"] - p["nose_length"], -p["lower_height"]
    p["mouth_y"] = tip + (chin - tip) * p["mouth_y"]


def _mix(rng, pair, low=0.94, high=1.06):
    a, b = np.asarray(pair)
    return (a + (b - a) * rng.random()) * rng.uniform(low, high)


def _draw_skin(p: np.ndarray, woman: bool, rng: np.random.Generator) -> tuple[str, str]:
    """Skin, eyes, lips and marks; returns the words for skin and eyes."""
    skin = choice(rng, SKIN, (1, 1.2, 1, 0.9, 0.9))
    p["skin"] = _mix(rng, SKIN[skin]) * (1.0, rng.uniform(0.91, 1.05), rng.uniform(0.86, 1.08))
    deep = skin in ("brown", "dark")
    iris = choice(rng, IRIS, (5, 1, 0.3, 0.2, 0.2) if deep else (2, 1.2, 1.3, 2, 1))
    p["iris"] = _mix(rng, IRIS[iris])
    lip = p["skin"] * np.array([rng.uniform(0.78, 0.97), rng.uniform(0.44, 0.64), rng.uniform(0.48, 0.70)])
    paint, strength = np.array(choice(rng, LIPSTICK)), float(rng.random())
    if woman and p["youth"] == 0 and strength < 0.6:
        lip = 0.45 * lip + 0.55 * paint * (0.6 + 0.5 * p["skin"].mean())
    elif not woman or p["youth"] > 0:
        lip = lip + 0.35 * (p["skin"] * (0.86, 0.66, 0.66) - lip)  # paler against the skin
    p["lip"] = lip
    p["freckles"] = between(rng, 0.5, 1.0) if rng.random() < 0.15 and not deep else 0.0
    p["blush"] = between(rng, 0.1, 0.6)
    p["lashes"] = between(rng, 0.45, 0.95) if woman else between(rng, 0.0, 0.25)
    if p["youth"] > 0:
        p["lashes"] *= 0.6
        p["blush"] += 0.15
    if rng.random() < 0.12:
        p["mole"] = 1.0
        p["mole_x"], p["mole_y"] = rng.uniform(0.16, 0.4) * rng.choice((-1, 1)), rng.uniform(-0.55, -0.15)
    return skin, iris


def _draw_hair_colour(p: np.ndarray, skin: str, rng: np.random.Generator) -> tuple[str, str]:
    """Hair, brows and how far they have gone grey; returns the words for the hair and for where it is graying."""
    weights = dict(zip(HAIR, (3.0, 2.6, 2.3, 2.1, 2.0, 0.15, 0.1, 0.25, 0.2), strict=True))
    age, deep = float(p["age"]), skin in ("brown", "dark")
    if deep:
        weights.update({"blond": 0.15, "red": 0.15, "brown": 0.6})
    if age > 0.6:
        weights.update({"gray": 6.0, "white": 4.5, "blue": 0.03, "pink": 0.03})
    elif age > 0.4:
        weights.update({"gray": 2.0, "white": 0.2})
    if p["youth"] > 0:
        weights.update({"gray": 0.0, "white": 0.0, "blue": 0.0, "pink": 0.0, "blond": weights["blond"] * 1.6})
    hair = choice(rng, HAIR, list(weights.values()))
    p["hair"] = _mix(rng, HAIR[hair])
    p["grey_hair"] = _mix(rng, (HAIR["gray"][0], np.array(HAIR["gray"][1]) * 1.15))
    kind, amount, more = rng.random(), rng.random(), rng.random()
    graying = "none"
    if hair == "gray":  # never one even grey: some dark hair is left on top, or the sides are nearly white
        p["grey_hair"] = _mix(rng, HAIR["white"])
        p["grey_temple"] = 0.8 * amount
        p["grey"] = 0.25 * more
    elif hair in ("black", "dark brown", "brown", "red", "blond") and age > 0.35 and kind < 0.75:
        graying = "temples" if kind < 0.4 else "salt and pepper"
        p["grey"] = 0.12 * more if graying == "temples" else 0.28 + 0.32 * more
        p["grey_temple"] = 0.45 + 0.45 * amount
    p["grey_beard"] = np.clip(p["grey"] + p["grey_temple"] * 0.9, 0, 1)
    p["brow"] = p["hair"] * (0.40 if p["hair"].mean() > 0.35 else 0.55)
    if hair in ("gray", "white"):
        p["brow"] = p["hair"] * rng.uniform(0.30, 0.75)  # brows go grey late
    darker = rng.uniform(0.35, 0.95)
    p["beard_hair"] = p["hair"] * (darker if hair not in ("white", "gray") else 1.0)
    return hair, graying


def _draw_beard(p: np.ndarray, rng: np.random.Generator) -> str:
    """A man's beard; shaven cheeks keep a shadow of it."""
    beard = choice(rng, ("none", "stubble", "beard", "moustache", "goatee"), (4.4, 1.8, 2.4, 0.8, 1.0))
    short, shadow = rng.random() < 0.5, between(rng, 0.06, 0.30)
    if beard in ("none", "moustache", "goatee"):
        p["stubble"] = shadow
    if beard == "stubble":
        p["stubble"] = between(rng, 0.55, 1.0)
    elif beard == "beard":
        p["beard"] = p["moustache"] = p["goatee"] = between(rng, 0.78, 0.95) if short else 1.0
        p["beard_length"] = between(rng, 0.004, 0.035) if short else between(rng, 0.05, 0.16)
    elif beard == "moustache":
        p["moustache"] = 1.0
    elif beard == "goatee":
        p["goatee"] = p["moustache"] = 1.0
        p["beard_length"] = between(rng, 0.01, 0.07)
    return beard


def _draw_haircut(p: np.ndarray, kind: str, varied: bool, rng: np.random.Generator) -> str:
    """The haircut of a man, woman, boy or girl."""
    weights = {name: both[varied] for name, both in CUTS[kind].items()}
    male, age = kind in ("man", "boy"), float(p["age"])
    if age > 0.5 and kind == "man":
        weights["balding"] *= 5
        weights["bald"] *= 1.6
    p["hairline"], p["temple"] = between(rng, 0.58, 0.72), between(rng, 0.24, 0.40)
    p["hair_side"], p["hair_back"] = between(rng, -0.08, 0.10), between(rng, -0.55, -0.30)
    p["hair_part"], p["hair_seed"] = between(rng, -0.6, 0.6), rng.random()
    recede, fade, bald_top = rng.random(), between(rng, 0.3, 0.85), between(rng, 0.30, 0.72)
    if kind == "man":
        p["recede"] = recede * (0.25 + 0.9 * age)
        p["hairline"] += 0.06 * age * recede
    cut = choice(rng, weights, list(weights.values()))
    thickness, volume = (0.05, 0.11), (0.04, 0.24)
    if cut in ("long", "bob", "long curly"):
        thickness, volume = _draw_curtain(p, cut, male, rng)
    elif cut == "bun":
        p["bun"] = between(rng, 0.8, 1.15)
        thickness, volume = (0.04, 0.08), (0.0, 0.06)
    elif cut == "short" and male:
        volume = (0.0, 0.15)
    elif cut == "curly":
        p["curl"] = between(rng, 0.6, 1.2)
        p["hair_side"] = p["hair_side"] if male else -0.30
        thickness, volume = ((0.08, 0.22), (0.05, 0.22)) if male else ((0.18, 0.38), (0.08, 0.26))
    elif cut == "fringe":
        p["fringe"] = between(rng, 0.08, 0.24)
        thickness, volume = (0.06, 0.11), (0.0, 0.14) if male else volume
    elif cut == "buzzed":
        thickness, volume = (0.020, 0.034), (0.0, 0.0)
    elif cut == "bald":
        thickness, volume = (0.0, 0.0), (0.0, 0.0)
    elif cut == "balding":
        p["bald_top"] = bald_top
        thickness, volume = (0.03, 0.08), (0.0, 0.0)
    p["hair_thickness"], p["hair_volume"] = between(rng, *thickness), between(rng, *volume)
    if male and cut in ("short", "curly", "fringe"):
        p["hair_fade"] = fade
    return cut


def _draw_curtain(p: np.ndarray, cut: str, male: bool, rng: np.random.Generator) -> tuple:
    """Hair that hangs; returns the ranges of the cap's thickness and volume."""
    length = {"long": (1.0, 1.8), "bob": (0.5, 0.9), "long curly": (0.7, 1.6)}[cut]
    p["curtain_length"] = between(rng, *length)
    p["curtain_opening"] = between(rng, 0.9, 1.25) + 0.12 * male
    p["curtain_width"] = between(rng, 0.0, 0.18)
    p["curtain_wave"] = between(rng, 0.02, 0.05) if rng.random() < 0.35 else 0.0
    p["hair_side"] = -0.3
    p["grey"] = min(p["grey"] + 0.35 * p["grey_temple"], 0.9)  # strands of every zone hang together
    p["grey_temple"] = 0.0
    fringe = between(rng, 0.14, 0.30)
    if cut == "long curly":
        p["curl"], p["curtain_curl"] = between(rng, 0.45, 0.9), between(rng, 0.6, 1.2)
        p["curtain_width"] += 0.10
        return (0.10, 0.20), (0.02, 0.18)
    if rng.random() < 0.35:
        p["fringe"] = fringe
    return (0.07, 0.13), (0.0, 0.18)


def _vary_hair(p: np.ndarray, cut: str, rng: np.random.Generator) -> str:
    """Other proportions of the same haircut, evenly drawn: the rare ones are what these people are for.

    Returns the haircut: a bun may be out of sight behind the head, which leaves short hair.
    """
    p["hairline"], p["temple"] = rng.uniform(0.48, 0.82), rng.uniform(0.15, 0.50)
    p["hair_back"] = rng.uniform(-0.75, -0.30)
    tousled = float(rng.random() < 0.5)
    if cut in ("short", "fringe"):
        p["hair_side"] = rng.uniform(-0.25, 0.25)
        p["hair_thickness"], p["hair_volume"] = rng.uniform(0.03, 0.16), rng.uniform(0.0, 0.42)
        p["curl"] = tousled * rng.uniform(0.1, 0.45)
    elif cut in ("long", "bob", "long curly"):
        p["hair_thickness"], p["hair_volume"] = rng.uniform(0.03, 0.16), rng.uniform(0.0, 0.30)
        p["curtain_opening"], p["curtain_width"] = rng.uniform(0.75, 1.4), rng.uniform(-0.05, 0.30)
    elif cut == "bun":
        p["bun"] *= rng.uniform(0.6, 1.2)
        p["hair_side"] = rng.uniform(-0.30, 0.15)
        p["hair_thickness"], p["hair_volume"] = rng.uniform(0.03, 0.12), rng.uniform(0.0, 0.20)
        p["curl"] = tousled * rng.uniform(0.1, 0.3)
        if rng.random() < 0.4:
            p["bun"], cut = 0.0, "short"
    return cut
