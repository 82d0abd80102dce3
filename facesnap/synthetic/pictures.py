"""How each picture of a rendered person is taken: expression, pose, light, background, clothes, accessories, style."""

import numpy as np

from facesnap.synthetic.parameters import (
    BACKDROPS,
    BACKGROUNDS,
    CLOTHES,
    EXPRESSIONS,
    FRAMES,
    GLASSES,
    HATS,
    LIGHTS,
    PATTERNS,
    SKIES,
    STYLES,
    Person,
    Picture,
    choice,
)

MOOD = {  # expression: ranges of the fields that differ from a neutral face
    "neutral": {"smile": (-0.1, 0.2), "eyelids": (0.9, 1.05), "brow_raise": (-0.3, 0.3)},
    "smiling": {"smile": (0.45, 0.80), "eyelids": (0.82, 1.0)},
    "laughing": {"smile": (0.80, 1.05), "mouth_open": (0.35, 0.75), "eyelids": (0.65, 0.9)},
    "surprised": {
        "smile": (-0.3, 0.0), "mouth_open": (0.45, 0.9), "eyelids": (1.15, 1.32), "brow_raise": (0.7, 1.2),
    },
    "serious": {"smile": (-0.7, -0.3), "eyelids": (0.72, 0.9), "brow_raise": (-1.2, -0.5)},
}  # fmt: skip
STOPS = {"dark": (-2.0, -0.6), "bright": (0.6, 2.0)}  # of exposure, beside about 0.4 around the usual


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
    `wide` draws scale and shift for a picture from afar, the head anywhere in its upper part. Two attributes are never
    drawn, only given, for references of poor quality: `sunglasses` and `hand` (before the mouth), both True.
    """
    rng = np.random.default_rng([person.seed, 1, index])
    p = person.parameters.copy()
    what, style = _draw_attributes(person, attributes or {}, style, rng)
    if expression is not None:
        what["expression"] = expression
    # A generator of its own for each group of fields, so that giving one thing leaves the rest as it was.
    mood = np.random.default_rng([person.seed, 2, index])
    for ranges in (MOOD["neutral"], MOOD[what["expression"]]):
        for name, (low, high) in ranges.items():
            p[name] = mood.uniform(low, high)
    _put_pose(p, rng, pose, scale, shift, np.random.default_rng([person.seed, 4, index]) if wide else None)
    _put_light(p, what, rng)
    _put_exposure(p, what, np.random.default_rng([person.seed, 6, index]))
    _put_things(p, what, rng)
    _put_occluders(p, what, np.random.default_rng([person.seed, 7, index]))
    return Picture(person, p, what, style)


def _draw_attributes(person: Person, given: dict, style: str | None, rng) -> tuple[dict, str]:
    def draw(key, options, weights):
        value = choice(rng, options, weights)  # always drawn, so that giving one thing leaves the rest as it was
        return given.get(key, value)

    walls = dict.fromkeys(BACKDROPS, 1.0)
    who = person.attributes
    if who["haircut"] in ("short", "buzzed", "balding", "curly") and (who["hair"] in ("gray", "white")):
        walls.update(white=4.0, gray=2.5)  # pale hair before pale walls: neither may be taken for the other
    what = {
        "expression": draw("expression", EXPRESSIONS, (0.30, 0.30, 0.15, 0.10, 0.15)),
        "light": draw("light", LIGHTS, (0.40, 0.17, 0.17, 0.13, 0.13)),
        "background": draw("background", BACKGROUNDS, (0.35, 0.35, 0.15, 0.15)),
        "background_color": draw("background_color", BACKDROPS, list(walls.values())),
        "clothes_color": draw("clothes_color", CLOTHES, None),
        "pattern": draw("pattern", PATTERNS, (0.60, 0.20, 0.20)),
        "glasses": draw("glasses", GLASSES, (0.76, 0.12, 0.12)),
        "hat": draw("hat", HATS, (0.84, 0.08, 0.08)),
        "hat_color": draw("hat_color", CLOTHES, None),
        "exposure": draw("exposure", ("normal", "dark", "bright"), (0.76, 0.12, 0.12)),
        "shadows": draw("shadows", ("soft", "hard"), (0.70, 0.30)),
    }
    if what["light"] not in ("left", "right"):
        what["shadows"] = "soft"  # only light from a side casts hard ones
    for name in ("sunglasses", "hand"):
        if given.get(name):
            what[name] = True
    drawn = choice(rng, STYLES, (0.72, 0.07, 0.07, 0.07, 0.07))
    return what, style or drawn


def _put_pose(p, rng, pose, scale, shift, far) -> None:
    p["gaze_x"], p["gaze_y"] = np.clip(rng.normal(0, (0.35, 0.25)), -1, 1)
    angles = np.clip(rng.normal(0, (0.40, 0.16, 0.12)), (-0.95, -0.42, -0.4), (0.95, 0.42, 0.4))
    p["yaw"], p["pitch"], p["roll"] = angles if pose is None else pose
    drawn_scale, drawn_shift = rng.uniform(0.72, 1.10), rng.uniform(-1, 1, 2) * (0.22, 0.14)
    if far is not None:
        drawn_scale = far.uniform(0.36, 0.72)
        drawn_shift = far.uniform((-0.4, -0.1), (0.4, 0.95 - 0.8 * drawn_scale))
    p["scale"] = drawn_scale if scale is None else scale
    p["shift_x"], p["shift_y"] = drawn_shift if shift is None else shift
    p["torso_yaw"] = p["yaw"] * rng.uniform(0.1, 0.6)


def _put_light(p, what, rng) -> None:
    light, hard = what["light"], what["shadows"] == "hard"
    sided = light in ("left", "right")
    side = {"left": (-1.2, -0.8), "right": (0.8, 1.2)}.get(light, (-0.5, 0.5))
    p["light_azimuth"] = rng.uniform(*side) * (1.12 if hard else 1.0)
    p["light_elevation"] = rng.uniform(0.30, 0.85)
    p["key"] = rng.uniform(1.25, 1.55) if sided else rng.uniform(1.03, 1.32)
    p["ambient"] = (rng.uniform(0.28, 0.42) if sided else rng.uniform(0.45, 0.63)) * (0.45 if hard else 1.0)
    p["fill"] = 0.12 if hard else 0.42
    p["key_colour"] = {"warm": (1.17, 0.86, 0.58), "cool": (0.73, 0.93, 1.20)}.get(light, (1.0, 0.97, 0.93))
    p["rim"] = rng.uniform(0.1, 0.7)
    p["rim_azimuth"] = 1.3 * rng.choice((-1, 1))


def _put_exposure(p, what, rng) -> None:
    """How bright the picture is, in stops: rarely far from usual, and never so that the skin drowns or burns out.

    The white of the eyes and the clothes follow the face, so that skin and light can be told apart; a background is
    lit by itself and follows by a third, so that its colour keeps its name.
    """
    usual = rng.uniform(0.82, 0.97)
    stops, share = float(np.clip(rng.normal(0, 0.22), -0.45, 0.45)), rng.random()
    if what["exposure"] != "normal":
        low, high = STOPS[what["exposure"]]
        stops = low + (high - low) * share
    fair = np.clip((p["skin"].mean() - 0.10) / 0.40, 0, 1)
    stops = float(np.clip(stops, -2.0 + 0.8 * (1 - fair), 2.0 - 1.35 * fair))
    if what["shadows"] == "hard":
        stops *= 0.6
    p["exposure"] = usual * 2**stops
    p["back_level"] = 2 ** (-0.67 * stops)


def _put_things(p, what, rng) -> None:
    """Background, clothes, glasses and hat."""
    p["background"] = BACKGROUNDS.index(what["background"])
    tone = np.array(BACKDROPS[what["background_color"]]) * rng.uniform(0.85, 1.1)
    flat = what["background"] in ("studio", "plain")
    p["back_a"] = tone * (0.6 if flat else 0.85)
    p["back_b"] = np.clip(tone * 1.3 + 0.04, 0, 1)
    sky = choice(rng, SKIES)
    if what["background"] == "hills":
        p["back_b"] = sky
    p["back_seed"] = rng.uniform(0, 1)
    p["clothes"] = np.array(CLOTHES[what["clothes_color"]]) * rng.uniform(0.88, 1.1)
    p["clothes_b"] = CLOTHES[choice(rng, [c for c in CLOTHES if c != what["clothes_color"]])]
    p["pattern"] = PATTERNS.index(what["pattern"])
    p["neckline"] = rng.uniform(0, 1)
    p["glasses"] = GLASSES.index(what["glasses"])
    p["glasses_colour"] = choice(rng, FRAMES)
    p["hat"] = HATS.index(what["hat"])
    p["hat_colour"] = np.array(CLOTHES[what["hat_color"]]) * rng.uniform(0.88, 1.1)


def _put_occluders(p, what, rng) -> None:
    """Sunglasses and a hand before the mouth, where they are asked for."""
    place = rng.uniform((-0.18, -0.12, -0.8), (0.18, 0.12, 0.8))
    if what.get("sunglasses"):
        p["sunglasses"] = 1.0
        p["glasses"] = max(p["glasses"], 1.0 + (place[0] > 0))  # lenses need a frame
        what["glasses"] = GLASSES[int(p["glasses"])]
    if what.get("hand"):
        p["hand"] = 1.0
        p["hand_x"], p["hand_y"], p["hand_turn"] = place
