"""Who the rendered people are and how each picture of them is taken.

A person is a draw of the identity fields (head shape, colours, hair, beard, marks); a picture adds expression, pose,
light, background, clothes, glasses, hat and style. Both are fields of one record, `PARAMETERS`, so that a picture's
record says everything about it. Seeds from `EVALUATION_PEOPLE` are held out: training refuses them.
"""

from dataclasses import dataclass, field

import numpy as np

VERSION = "2"  # of the rendered world; stored with every weight trained on it
EVALUATION_PEOPLE = range(1_000_000, 1_010_000)

IDENTITY_SHAPE = (
    "face_width jaw_ratio chin_roundness lower_height upper_height cheekbone cheek_fullness eye_spacing eye_width "
    "eye_open eye_tilt eye_y brow_height brow_thickness brow_arch brow_tilt brow_length brow_ridge nose_length "
    "nose_width nose_projection nose_bridge nose_upturn mouth_width upper_lip lower_lip cupid_bow mouth_y "
    "chin_projection chin_cleft ear_size neck_width iris_radius"
).split()
IDENTITY_LOOK = (
    "freckles blush age lashes mole mole_x mole_y stubble moustache goatee beard beard_length hairline temple "
    "hair_side hair_back hair_thickness hair_part fringe curl hair_volume hair_seed curtain_length curtain_opening "
    "curtain_width curtain_wave bun"
).split()
IDENTITY_COLOURS = "skin hair iris lip brow".split()
PICTURE = (
    "smile mouth_open eyelids brow_raise gaze_x gaze_y yaw pitch roll scale shift_x shift_y torso_yaw "
    "light_azimuth light_elevation key ambient rim rim_azimuth exposure background back_seed pattern neckline "
    "glasses hat"
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

# linear-light RGB
SKIN = {
    "fair": ((0.88, 0.64, 0.53), (0.86, 0.60, 0.48)),
    "light": ((0.80, 0.52, 0.38), (0.74, 0.46, 0.32)),
    "tan": ((0.64, 0.38, 0.24), (0.56, 0.33, 0.20)),
    "brown": ((0.44, 0.25, 0.15), (0.36, 0.20, 0.12)),
    "dark": ((0.26, 0.14, 0.09), (0.18, 0.095, 0.06)),
}
HAIR = {
    "black": ((0.016, 0.013, 0.012), (0.028, 0.022, 0.020)),
    "dark brown": ((0.050, 0.027, 0.016), (0.075, 0.040, 0.022)),
    "brown": ((0.13, 0.065, 0.030), (0.19, 0.095, 0.042)),
    "blond": ((0.52, 0.34, 0.14), (0.72, 0.54, 0.28)),
    "red": ((0.34, 0.090, 0.025), (0.50, 0.16, 0.045)),
    "gray": ((0.30, 0.30, 0.30), (0.44, 0.43, 0.42)),
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


def _between(rng, low, high, spread=0.27):
    """A draw that favours the middle: caricatures come from many extremes at once."""
    return float(np.clip(rng.normal((low + high) / 2, (high - low) * spread), low, high))


def _choice(rng, options, weights=None):
    options = list(options)
    if weights is None:
        return options[int(rng.integers(len(options)))]
    weights = np.asarray(weights, float)
    return options[int(rng.choice(len(options), p=weights / weights.sum()))]


def _mix(rng, pair, low=0.94, high=1.06):
    a, b = np.asarray(pair)
    return (a + (b - a) * rng.random()) * rng.uniform(low, high)


def sample_person(seed: int, *, varied: bool = False) -> Person:
    """The person of a seed; the same seed is always the same person.

    `varied` draws hair beyond the proportions that the evaluation's people have, and short hair more often: real
    heads of hair are fuller, looser, or closer to the skull.
    """
    rng = np.random.default_rng([seed, 0])
    p = np.zeros((), PARAMETERS)
    woman = bool(rng.random() < 0.5)
    f = 1.0 if woman else 0.0

    def put(name, low, high, shift=0.0):
        p[name] = _between(rng, low, high) + shift

    put("face_width", 0.66, 0.80, -0.015 * f)
    put("jaw_ratio", 0.74, 0.98, -0.05 * f)
    put("chin_roundness", 2.1, 4.8, -0.4 * f)
    put("lower_height", 0.90, 1.07, -0.03 * f)
    put("upper_height", 1.00, 1.12)
    put("cheekbone", 0.0, 1.0)
    put("cheek_fullness", -0.5, 1.1)
    put("eye_spacing", 0.275, 0.340)
    put("eye_width", 0.145, 0.188, 0.008 * f)
    put("eye_open", 0.070, 0.112, 0.006 * f)
    put("eye_tilt", -0.28, 0.42)
    put("eye_y", -0.03, 0.06)
    put("brow_height", 0.17, 0.25, 0.01 * f)
    put("brow_thickness", 0.022, 0.052, -0.010 * f)
    put("brow_arch", -0.1, 0.8, 0.2 * f)
    put("brow_tilt", -0.6, 0.8)
    put("brow_length", 0.30, 0.39)
    put("brow_ridge", 0.0, 1.0 - 0.6 * f)
    put("nose_length", 0.29, 0.41)
    put("nose_width", 0.080, 0.145, -0.008 * f)
    put("nose_projection", 0.13, 0.24, -0.01 * f)
    put("nose_bridge", 0.0, 1.0)
    put("nose_upturn", -1.0, 1.0)
    put("mouth_width", 0.18, 0.26)
    put("upper_lip", 0.020, 0.058, 0.006 * f)
    put("lower_lip", 0.034, 0.080, 0.006 * f)
    put("cupid_bow", -0.2, 1.0)
    put("chin_projection", -0.01, 0.09)
    put("ear_size", 0.8, 1.2)
    put("iris_radius", 0.074, 0.090)
    put("neck_width", 0.36, 0.45, -0.07 * f)
    p["chin_cleft"] = float(rng.random() < 0.12)
    tip, chin = p["eye_y"] - p["nose_length"], -p["lower_height"]
    p["mouth_y"] = tip + (chin - tip) * _between(rng, 0.33, 0.41)

    skin = _choice(rng, SKIN, (1, 1.2, 1, 0.9, 0.9))
    p["skin"] = _mix(rng, SKIN[skin])
    deep = skin in ("brown", "dark")
    age = float(max(0.0, rng.uniform(-0.5, 1.0)))
    hair_weights = dict(zip(HAIR, (3.2, 2.6, 2.2, 2.0, 1.3, 0.5, 0.3, 0.25, 0.2), strict=True))
    if deep:
        hair_weights.update({"blond": 0.15, "red": 0.1, "brown": 0.6})
    if age > 0.6:
        hair_weights.update({"gray": 3.0, "white": 2.0, "blue": 0.05, "pink": 0.05})
    hair = _choice(rng, HAIR, list(hair_weights.values()))
    p["hair"] = _mix(rng, HAIR[hair])
    iris = _choice(rng, IRIS, (5, 1, 0.3, 0.2, 0.2) if deep else (2, 1.2, 1.3, 2, 1))
    p["iris"] = _mix(rng, IRIS[iris])
    p["brow"] = p["hair"] * (0.40 if p["hair"].mean() > 0.35 else 0.55)
    lip = p["skin"] * np.array([rng.uniform(0.74, 0.95), rng.uniform(0.42, 0.62), rng.uniform(0.46, 0.68)])
    if woman and rng.random() < 0.5:
        lip = 0.45 * lip + 0.55 * np.array(_choice(rng, LIPSTICK)) * (0.6 + 0.5 * p["skin"].mean())
    p["lip"] = lip
    p["age"] = age
    p["freckles"] = _between(rng, 0.5, 1.0) if rng.random() < 0.15 and not deep else 0.0
    p["blush"] = _between(rng, 0.1, 0.6)
    p["lashes"] = _between(rng, 0.0, 0.35) + f * _between(rng, 0.3, 0.6)
    if rng.random() < 0.12:
        p["mole"] = 1.0
        p["mole_x"], p["mole_y"] = rng.uniform(0.16, 0.4) * rng.choice((-1, 1)), rng.uniform(-0.55, -0.15)

    beard = (
        "none" if woman else _choice(rng, ("none", "stubble", "beard", "moustache", "goatee"), (4.4, 2, 1.9, 0.8, 1.0))
    )
    if beard == "stubble":
        p["stubble"] = _between(rng, 0.5, 1.0)
    elif beard == "beard":
        p["beard"] = p["moustache"] = p["goatee"] = 1.0
        p["beard_length"] = _between(rng, 0.05, 0.16)
    elif beard == "moustache":
        p["moustache"] = 1.0
    elif beard == "goatee":
        p["goatee"] = p["moustache"] = 1.0
        p["beard_length"] = _between(rng, 0.02, 0.07)

    put("hairline", 0.58, 0.72)
    put("temple", 0.24, 0.40)
    put("hair_side", -0.08, 0.10)
    put("hair_back", -0.55, -0.30)
    put("hair_part", -0.6, 0.6)
    p["hair_seed"] = rng.random()
    styles = (
        ("long", "bob", "bun", "curly", "short") if woman else ("bald", "buzzed", "short", "fringe", "curly", "long")
    )
    weights = (3.4, 2.2, 1.4, 1.6, 1.4) if woman else (1.1, 1.8, 3.4, 1.3, 1.5, 0.9)
    if varied:
        weights = (2.4, 2.2, 2.4, 1.2, 2.4) if woman else (0.6, 1.4, 5.0, 1.6, 1.0, 0.7)
    cut = _choice(rng, styles, weights)
    thickness, volume = (0.05, 0.11), (0.04, 0.24)
    if cut in ("long", "bob"):
        length = (1.0, 1.8) if cut == "long" else (0.5, 0.9)
        p["curtain_length"] = _between(rng, *length)
        p["curtain_opening"] = _between(rng, 0.9, 1.25) + 0.12 * (1 - f)
        p["curtain_width"] = _between(rng, 0.0, 0.18)
        p["curtain_wave"] = _between(rng, 0.02, 0.05) if rng.random() < 0.35 else 0.0
        p["hair_side"] = -0.3
        thickness, volume = (0.07, 0.13), (0.0, 0.18)
        if rng.random() < 0.35:
            p["fringe"] = _between(rng, 0.14, 0.30)
    elif cut == "bun":
        p["bun"] = _between(rng, 0.8, 1.15)
        thickness, volume = (0.04, 0.08), (0.0, 0.06)
    elif cut == "curly":
        p["curl"] = _between(rng, 0.6, 1.2)
        p["hair_side"] = -0.30 if woman else p["hair_side"]
        thickness, volume = ((0.18, 0.38), (0.08, 0.26)) if woman else ((0.10, 0.28), (0.05, 0.22))
    elif cut == "fringe":
        p["fringe"] = _between(rng, 0.08, 0.24)
        thickness = (0.07, 0.12)
    elif cut == "buzzed":
        thickness, volume = (0.020, 0.034), (0.0, 0.0)
    elif cut == "bald":
        thickness, volume = (0.0, 0.0), (0.0, 0.0)
    p["hair_thickness"], p["hair_volume"] = _between(rng, *thickness), _between(rng, *volume)
    if varied:
        cut = _vary_hair(p, cut, np.random.default_rng([seed, 5]))
    attributes = {
        "gender": "woman" if woman else "man",
        "age": "old" if age > 0.65 else "adult",
        "skin": skin,
        "hair": "none" if cut == "bald" else hair,
        "haircut": cut,
        "eyes": iris,
        "beard": beard,
        "freckles": bool(p["freckles"] > 0),
        "mole": bool(p["mole"] > 0),
    }
    return Person(seed, p, attributes)


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
    elif cut in ("long", "bob"):
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


def sample_picture(
    person: Person,
    index: int,
    *,
    style: str | None = None,
    expression: str | None = None,
    pose: tuple[float, float, float] | None = None,
    scale: float | None = None,
    shift: tuple[float, float] | None = None,
    attributes: dict | None = None,
    wide: bool = False,
) -> Picture:
    """The index-th picture of a person: expression, pose, light, background, clothes, glasses, hat, style.

    Anything given is used instead of drawn: `pose` as (yaw, pitch, roll) in radians, `scale` (1 = the head fills about
    two thirds of the height), `shift` in half picture heights, and any of `attributes` (see `Picture.attributes`).
    `wide` draws scale and shift for a picture from afar, the head anywhere in its upper part.
    """
    rng = np.random.default_rng([person.seed, 1, index])
    given = attributes or {}
    p = person.parameters.copy()

    def draw(key, options, weights):
        value = _choice(rng, options, weights)  # always drawn, so that giving one thing leaves the rest as it was
        return given.get(key, value)

    what = {
        "expression": draw("expression", EXPRESSIONS, (0.30, 0.30, 0.15, 0.10, 0.15)),
        "light": draw("light", LIGHTS, (0.40, 0.17, 0.17, 0.13, 0.13)),
        "background": draw("background", BACKGROUNDS, (0.35, 0.35, 0.15, 0.15)),
        "background_color": draw("background_color", BACKDROPS, None),
        "clothes_color": draw("clothes_color", CLOTHES, None),
        "pattern": draw("pattern", PATTERNS, (0.60, 0.20, 0.20)),
        "glasses": draw("glasses", GLASSES, (0.76, 0.12, 0.12)),
        "hat": draw("hat", HATS, (0.84, 0.08, 0.08)),
        "hat_color": draw("hat_color", CLOTHES, None),
    }
    drawn_style = _choice(rng, STYLES, (0.72, 0.07, 0.07, 0.07, 0.07))
    style = style or drawn_style
    if expression is not None:
        what["expression"] = expression

    def put(name, low, high):
        p[name] = rng.uniform(low, high)

    mood = np.random.default_rng([person.seed, 2, index])  # of its own, for the same reason
    for name, (low, high) in {
        "smile": (-0.1, 0.2),
        "eyelids": (0.9, 1.05),
        "brow_raise": (-0.3, 0.3),
    }.items():
        p[name] = mood.uniform(low, high)
    ranges = {
        "neutral": {},
        "smiling": {"smile": (0.45, 0.80), "eyelids": (0.82, 1.0)},
        "laughing": {"smile": (0.80, 1.05), "mouth_open": (0.35, 0.75), "eyelids": (0.65, 0.9)},
        "surprised": {
            "smile": (-0.3, 0.0),
            "mouth_open": (0.45, 0.9),
            "eyelids": (1.15, 1.32),
            "brow_raise": (0.7, 1.2),
        },
        "serious": {"smile": (-0.7, -0.3), "eyelids": (0.72, 0.9), "brow_raise": (-1.2, -0.5)},
    }
    for name, (low, high) in ranges[what["expression"]].items():
        p[name] = mood.uniform(low, high)
    p["gaze_x"], p["gaze_y"] = np.clip(rng.normal(0, (0.35, 0.25)), -1, 1)
    angles = np.clip(rng.normal(0, (0.40, 0.16, 0.12)), (-0.95, -0.42, -0.4), (0.95, 0.42, 0.4))
    p["yaw"], p["pitch"], p["roll"] = angles if pose is None else pose
    drawn_scale, drawn_shift = rng.uniform(0.72, 1.10), rng.uniform(-1, 1, 2) * (0.22, 0.14)
    if wide:
        far = np.random.default_rng([person.seed, 4, index])
        drawn_scale = far.uniform(0.36, 0.72)
        drawn_shift = far.uniform((-0.4, -0.1), (0.4, 0.95 - 0.8 * drawn_scale))
    p["scale"] = drawn_scale if scale is None else scale
    p["shift_x"], p["shift_y"] = drawn_shift if shift is None else shift
    p["torso_yaw"] = p["yaw"] * rng.uniform(0.1, 0.6)

    light = what["light"]
    side = {"left": (-1.2, -0.8), "right": (0.8, 1.2)}.get(light, (-0.5, 0.5))
    put("light_azimuth", *side)
    put("light_elevation", 0.30, 0.85)
    p["key"] = rng.uniform(1.25, 1.55) if light in ("left", "right") else rng.uniform(1.03, 1.32)
    p["ambient"] = rng.uniform(0.28, 0.42) if light in ("left", "right") else rng.uniform(0.45, 0.63)
    p["key_colour"] = {"warm": (1.17, 0.86, 0.58), "cool": (0.73, 0.93, 1.20)}.get(light, (1.0, 0.97, 0.93))
    put("rim", 0.1, 0.7)
    p["rim_azimuth"] = 1.3 * rng.choice((-1, 1))
    put("exposure", 0.80, 0.95)

    p["background"] = BACKGROUNDS.index(what["background"])
    tone = np.array(BACKDROPS[what["background_color"]]) * rng.uniform(0.85, 1.1)
    flat = what["background"] in ("studio", "plain")
    p["back_a"] = tone * (0.6 if flat else 0.85)
    p["back_b"] = np.clip(tone * 1.3 + 0.04, 0, 1)
    sky = _choice(rng, SKIES)
    if what["background"] == "hills":
        p["back_b"] = sky
    put("back_seed", 0, 1)
    p["clothes"] = np.array(CLOTHES[what["clothes_color"]]) * rng.uniform(0.88, 1.1)
    p["clothes_b"] = CLOTHES[_choice(rng, [c for c in CLOTHES if c != what["clothes_color"]])]
    p["pattern"] = PATTERNS.index(what["pattern"])
    put("neckline", 0, 1)
    p["glasses"] = GLASSES.index(what["glasses"])
    p["glasses_colour"] = _choice(rng, FRAMES)
    p["hat"] = HATS.index(what["hat"])
    p["hat_colour"] = np.array(CLOTHES[what["hat_color"]]) * rng.uniform(0.88, 1.1)
    return Picture(person, p, what, style)
