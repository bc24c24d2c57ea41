"""Who is in a picture and how it is taken: people and scenes drawn from integer seeds, each seed always the same."""

import math
import random
import re
from dataclasses import dataclass, field

from metalora.errors import MetaLoraError
from metalora.miniature import captions
from metalora.miniature.backdrop import PLACES

HELD_OUT = 1_000_000  # people from this seed on are never trained on

# sRGB skin tones from fair to dark, and where the caption's words begin along them.
SKIN_TONES = ((240, 204, 180), (232, 188, 156), (218, 168, 132), (204, 152, 112), (176, 122, 84), (140, 94, 62),
              (118, 80, 58), (98, 66, 50))
HAIR_RGB = {"black": (26, 22, 22), "brown": (84, 54, 36), "blond": (202, 166, 106), "red": (150, 72, 38),
            "grey": (146, 144, 142), "white": (222, 220, 216)}
EYE_RGB = {"brown": (72, 44, 26), "hazel": (112, 80, 42), "green": (86, 106, 62), "blue": (88, 124, 160),
           "grey": (122, 134, 144)}
CLOTH_RGB = {"red": (196, 30, 36), "blue": (36, 70, 168), "green": (34, 118, 64), "yellow": (232, 202, 60),
             "white": (234, 234, 230), "black": (26, 26, 30), "grey": (120, 122, 126), "purple": (112, 50, 144),
             "orange": (226, 122, 40), "pink": (238, 160, 182)}
MALE_HAIR = ("bald", "buzz-cut", "short", "short", "side-parted", "swept-back", "curly", "afro", "long")
GLASSES = ("round", "square", "oval")
FEMALE_HAIR = ("short", "curly", "afro", "chin-length", "fringed", "long", "long", "wavy", "tied-up")
SEXES = (-0.05, 1.2)  # of a man, a woman, along the head model's axis: a little beyond its own ends, which lie near each other
SPREAD = 1.1  # of people's shapes, in the head model's deviations
TURNED_SHARE, TURNED_YAW, FRONTAL_YAW = 0.25, (16.0, 32.0), 4.5  # degrees; most portraits face the camera, and a caption names a turn
STYLES = {"photo": 0.7, "pencil": 0.1, "oil": 0.1, "bw": 0.1}  # how a picture is made, and how often
EXPRESSION_WEIGHTS = {"neutral": 0.3, "smile": 0.26, "laugh": 0.14, "surprised": 0.1, "angry": 0.1, "sad": 0.1}


@dataclass(frozen=True)
class Person:
    """All that stays the same from picture to picture, and the looks (hair, glasses) a person usually wears."""

    seed: int
    sex: str  # "woman" | "man"
    age: float  # 0.5 (young adult) .. 1.0 (old)
    attributes: tuple[float, ...]  # sex, age, weight, african, asian, caucasian, for the head model
    shape: tuple[float, ...]  # 64 standard deviations
    tone: float  # 0 .. 7 along SKIN_TONES
    eye: str
    hair: str
    hair_colour: str
    beard: str | None
    brow: tuple[float, float, float, float]  # thickness, arch, height, slant
    lips: float
    blush: float
    freckles: float
    moles: tuple[tuple[float, float], ...]
    glasses: str | None

    @property
    def age_word(self) -> str:
        return captions.AGES[(self.age > 0.68) + (self.age > 0.84)]

    @property
    def skin_word(self) -> str:
        return captions.SKINS[min(4, int(self.tone / 1.4))]


@dataclass(frozen=True)
class Scene:
    """One picture of a person: pose, expression, light, what is worn, where. Angles in degrees, lengths in metres."""

    seed: int
    expression: str
    yaw: float
    pitch: float
    roll: float
    gaze: tuple[float, float]  # radians right and up, relative to the head
    background: str
    light: str
    top: str
    top_colour: str
    second_colour: str
    hat: str | None
    hat_colour: str
    hair: str
    hair_colour: str
    glasses: str | None
    zoom: float
    shift: tuple[float, float]
    exposure: float
    style: str = "photo"  # one of STYLES
    attributes: dict = field(hash=False, compare=False, default_factory=dict)


def seeds(text: str) -> range:
    """The seeds that FIRST:END stands for on the command line. MetaLoraError where it does not read so."""
    if not (match := re.fullmatch(r"(\d+):(\d+)", text)):
        raise MetaLoraError(f"{text} is no range of seeds; write it like 0:6, the first and the one after the last.")
    return range(int(match[1]), int(match[2]))


def _hair_colour(rng: random.Random, age: float, dark: bool) -> str:
    if age > 0.86 and rng.random() < 0.75:
        return rng.choice(("grey", "white"))
    if age > 0.76 and rng.random() < 0.25:
        return "grey"
    return rng.choice(("black", "black", "brown") if dark else ("black", "brown", "brown", "blond", "blond", "red"))


def person(seed: int) -> Person:
    """The person of a seed."""
    rng = random.Random(f"person {seed}")
    woman = rng.random() < 0.5
    age = rng.uniform(0.52, 1.0)
    tone = rng.uniform(0, 7)  # every word for skin gets its even share, and the features that go with it
    leaning = max(0.0, tone / 7 - 0.35) * 1.3, 0.55 - abs(tone / 7 - 0.35), max(0.05, 0.75 - tone / 7)
    draws = [rng.gammavariate(0.3 + 1.5 * share, 1) for share in leaning]
    african, asian, caucasian = (d / sum(draws) for d in draws)
    dark = tone > 3.2 or asian > 0.5
    styles = FEMALE_HAIR if woman else MALE_HAIR
    return Person(
        seed=seed, sex="woman" if woman else "man", age=age,
        attributes=(SEXES[woman], age, min(0.85, max(0.2, rng.gauss(0.48, 0.14))), african, asian, caucasian),
        shape=tuple(SPREAD * max(-2.4, min(2.4, rng.gauss(0, 1))) for _ in range(64)), tone=tone,
        eye=rng.choice(("brown", "brown", "hazel") if dark else ("brown", "hazel", "green", "blue", "blue", "grey")),
        hair=rng.choice(styles), hair_colour=_hair_colour(rng, age, dark),
        beard=None if woman else rng.choice((None, None, None, "stubble", "moustache", "short", "full")),
        brow=(rng.uniform(0.6, 1.05) if woman else rng.uniform(0.85, 1.5), rng.uniform(-0.2, 1.0), rng.gauss(0, 0.0016),
              rng.uniform(-0.6, 0.6)),
        lips=rng.uniform(0.35, 0.9) if woman else rng.uniform(0.05, 0.35), blush=rng.uniform(0.2, 1.0),
        freckles=rng.uniform(0.4, 1.0) if tone < 1.8 and rng.random() < 0.35 else 0.0,
        moles=tuple((rng.uniform(-0.05, 0.05), rng.uniform(0.61, 0.74)) for _ in range(rng.choice((0, 0, 1, 2)))),
        glasses=rng.choice(GLASSES) if rng.random() < 0.2 else None)


def scene(who: Person, seed: int, usual_looks: float = 0.65) -> Scene:
    """Picture number `seed` of a person; with probability `usual_looks` in the person's own hair and glasses.

    Otherwise hair and glasses are drawn anew, so that what makes a person is the face.
    """
    rng = random.Random(f"scene {who.seed} {seed}")
    usual = rng.random() < usual_looks
    styles = FEMALE_HAIR if who.sex == "woman" else MALE_HAIR
    hair = who.hair if usual else rng.choice(styles)
    hair_colour = who.hair_colour if usual else rng.choice(captions.HAIR_COLOURS)
    glasses = who.glasses if usual else (rng.choice(GLASSES) if rng.random() < 0.2 else None)
    expression = rng.choices(list(EXPRESSION_WEIGHTS), list(EXPRESSION_WEIGHTS.values()))[0]
    turned = rng.random() < TURNED_SHARE
    yaw = rng.choice((-1, 1)) * rng.uniform(*TURNED_YAW) if turned else max(-2 * FRONTAL_YAW, min(2 * FRONTAL_YAW, rng.gauss(0, FRONTAL_YAW)))
    hat = rng.choice(list(captions.HATS)) if rng.random() < 0.25 else None
    top, top_colour, second = rng.choice(list(captions.TOPS)), *rng.sample(captions.CLOTH_COLOURS, 2)
    place = rng.choice(PLACES)
    made = Scene(seed=seed, expression=expression, yaw=yaw, pitch=max(-10.0, min(10.0, rng.gauss(0, 4))),
                 roll=rng.gauss(0, 3), background=place,
                 gaze=(-math.radians(yaw) * 0.6 if rng.random() < 0.6 else rng.gauss(0, 0.14), rng.gauss(0, 0.05)),
                 light=rng.choice(PLACE_LIGHTS[place]), top=top, top_colour=top_colour, second_colour=second, hat=hat,
                 hat_colour=rng.choice(captions.CLOTH_COLOURS), hair=hair, hair_colour=hair_colour, glasses=glasses,
                 zoom=rng.uniform(0.93, 1.06), shift=(rng.gauss(0, 0.008), rng.gauss(0, 0.004)),
                 exposure=rng.uniform(0.92, 1.12), style=rng.choices(list(STYLES), list(STYLES.values()))[0])
    made.attributes.update(_visible(who, made))
    return made


def _visible(who: Person, made: Scene) -> dict:
    """What a caption may say: the flat record of all that can be seen."""
    covered = made.hat is not None and made.hair not in ("chin-length", "long", "wavy")
    colourless = made.style in ("pencil", "bw")
    colours = {"skin": who.skin_word, "hair_colour": None if covered or made.hair in ("bald", "buzz-cut") else made.hair_colour,
               "hat_colour": made.hat_colour if made.hat else None, "top_colour": made.top_colour}
    plain_wall = made.background in ("grey", "blue")  # known by its colour alone
    return {"sex": who.sex, "age": who.age_word, "beard": who.beard, "hair": None if covered else made.hair, "glasses": made.glasses,
            "hat": made.hat, "top": made.top, "expression": made.expression,
            "turn": "left" if made.yaw <= -TURNED_YAW[0] else "right" if made.yaw >= TURNED_YAW[0] else None,
            "background": None if colourless and plain_wall else made.background, "light": made.light, "style": made.style,
            **(dict.fromkeys(colours) if colourless else colours)}


@dataclass(frozen=True)
class Light:
    """Direction towards the key light, its colour times its strength, the light of the sky and of the ground, and a rim from behind.

    The person looks along -y, x is to the picture's right, z up. `rim` comes from the side that `rim_side` names, -1 or 1.
    """

    direction: tuple[float, float, float]
    key: tuple[float, float, float]
    sky: tuple[float, float, float]
    ground: tuple[float, float, float]
    rim: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rim_side: float = 1.0


LIGHTS = {
    "soft": Light((0.35, -0.9, 0.5), (1.10, 1.07, 1.02), (0.55, 0.55, 0.56), (0.46, 0.44, 0.42), (0.30, 0.30, 0.32), -1),
    "left": Light((-0.9, -0.65, 0.35), (1.40, 1.34, 1.26), (0.36, 0.37, 0.40), (0.33, 0.31, 0.29), (0.30, 0.32, 0.36), 1),
    "right": Light((0.9, -0.65, 0.35), (1.40, 1.34, 1.26), (0.36, 0.37, 0.40), (0.33, 0.31, 0.29), (0.30, 0.32, 0.36), -1),
    "above": Light((0.15, -0.7, 0.8), (1.28, 1.25, 1.20), (0.44, 0.46, 0.48), (0.38, 0.36, 0.34), (0.25, 0.25, 0.25), 1),
    "window": Light((-0.85, -0.7, 0.30), (1.25, 1.28, 1.34), (0.42, 0.44, 0.48), (0.42, 0.39, 0.35), (0.55, 0.48, 0.38), 1),
    "leaves": Light((0.4, -0.7, 0.7), (1.22, 1.18, 0.96), (0.44, 0.50, 0.42), (0.34, 0.42, 0.26), (0.75, 0.80, 0.50), -1),
    "sun": Light((-0.5, -0.75, 0.65), (1.48, 1.40, 1.22), (0.44, 0.52, 0.62), (0.52, 0.46, 0.36), (0.60, 0.56, 0.46), 1),
    "warm": Light((0.6, -0.85, 0.25), (1.36, 1.08, 0.82), (0.44, 0.42, 0.50), (0.46, 0.38, 0.32), (1.70, 0.86, 0.34), -1),
    "lamp": Light((-0.6, -0.8, 0.4), (1.15, 0.98, 0.78), (0.36, 0.34, 0.32), (0.38, 0.32, 0.26), (0.50, 0.38, 0.22), 1),
    "cool": Light((-0.45, -0.85, 0.35), (0.86, 0.94, 1.06), (0.32, 0.36, 0.46), (0.30, 0.28, 0.36), (0.26, 0.52, 1.10), 1),
    "neon": Light((0.5, -0.85, 0.25), (0.98, 0.86, 0.84), (0.32, 0.32, 0.46), (0.34, 0.26, 0.36), (1.00, 0.20, 0.62), -1),
    "snow": Light((0.45, -0.8, 0.5), (1.04, 1.05, 1.05), (0.44, 0.50, 0.60), (0.50, 0.55, 0.66), (0.70, 0.76, 0.86), -1)}
PLACE_LIGHTS = {"grey": ("soft", "left", "right", "above"), "blue": ("soft", "left", "right", "above"), "brick": ("soft", "left", "right", "sun"),
                "park": ("leaves", "leaves", "sun"), "office": ("window", "soft", "right"), "night": ("cool", "neon"), "sunset": ("warm",),
                "beach": ("sun", "sun", "right"), "snow": ("snow",), "library": ("lamp", "soft", "window")}
