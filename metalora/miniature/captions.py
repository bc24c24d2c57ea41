"""What a picture of the portrait world shows, said in words.

A caption names a random part of what can be seen and nothing else, so that a prompt may leave things open and a model
learns to fill them in. Words are few and whole: each is one token of the miniature's tokenizers.
"""

import random

HAIR_WORDS = ("bald", "buzz-cut", "short", "side-parted", "swept-back", "curly", "afro", "chin-length", "fringed",
              "long", "wavy", "tied-up")
HAIR_COLOURS = ("black", "brown", "blond", "red", "grey", "white")
CLOTH_COLOURS = ("red", "blue", "green", "yellow", "white", "black", "grey", "purple", "orange", "pink")
TOPS = {"t-shirt": "t-shirt", "turtleneck": "turtleneck", "v-neck": "v-neck sweater", "striped": "striped shirt",
        "suit": "suit", "shirt": "shirt"}
HATS = {"beanie": "beanie", "cap": "cap"}
EXPRESSIONS = {"neutral": ("with a neutral expression", "with a calm face"), "smile": ("smiling", "with a smile"),
               "laugh": ("laughing", "laughing out loud"), "surprised": ("looking surprised", "with a surprised look"),
               "angry": ("looking angry", "with an angry face"), "sad": ("looking sad", "with a sad face")}
BACKGROUNDS = {"grey": ("in front of a grey wall", "on a grey background"), "blue": ("in front of a blue wall", "on a blue background"),
               "brick": ("in front of a brick wall", "by a brick wall"), "park": ("in a green park", "in a park"),
               "office": ("in an office", "at the office"), "night": ("in the city at night", "with city lights behind"),
               "sunset": ("at sunset", "under a sunset sky"), "beach": ("at the beach", "by the sea"),
               "snow": ("in the snow", "on a snowy day"), "library": ("in a library", "in front of bookshelves")}
TURNS = {"left": "looking left", "right": "looking right"}
MIRRORED = {"left": "right", "right": "left"}  # how a turn reads in a mirrored picture
OPENINGS = {"photo": ("a photo of", "a photograph of"), "pencil": ("a pencil drawing of", "a pencil sketch of"),
            "oil": ("an oil painting of", "an oil portrait of"), "bw": ("a black-and-white photo of", "a monochrome photo of")}
ANY_STYLE = ("a portrait of", "a picture of")  # true of all, and said mostly of photos
AGES = ("young", "middle-aged", "old")
SKINS = ("fair", "light", "tan", "brown", "dark")
BEARDS = {"stubble": "stubble", "moustache": "a moustache", "short": "a short beard", "full": "a full beard"}
TRIGGER = "sks"
MAX_WORDS = 30  # commas counted: what fits the miniature's text encoders with the marks of beginning and end


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _subject(a: dict, rng: random.Random, detail: float) -> str:
    words = [a["age"]] if a["age"] and rng.random() < detail else []
    subject = _article(" ".join(words + [a["sex"]]))
    features = []
    if a["hair"] and rng.random() < detail:
        colour = [a["hair_colour"]] if a["hair_colour"] and rng.random() < 0.8 else []
        features.append(" ".join(([] if colour and rng.random() < 0.3 else [a["hair"]]) + colour + ["hair"])
                        if a["hair"] != "bald" else "a bald head")
    if a["skin"] and rng.random() < detail * 0.7:
        features.append(f"{a['skin']} skin")
    if a["beard"] and rng.random() < detail:
        features.append(BEARDS[a["beard"]])
    rng.shuffle(features)
    return subject + (" with " + " and ".join(features) if features else "")


def _worn(a: dict, rng: random.Random) -> str:
    worn = []
    for thing, colour, words, often in ((a["hat"], a["hat_colour"], HATS, 0.95), (a["top"], a["top_colour"], TOPS, 0.75)):
        if thing and rng.random() < often:
            worn.append(_article(f"{colour} {words[thing]}" if colour else words[thing]))
    if a["glasses"] and rng.random() < 0.9:
        worn.append("glasses")
    rng.shuffle(worn)
    return (rng.choice(("wearing", "in")) + " " + " and ".join(worn)) if worn else ""


def caption(attributes: dict, rng: random.Random, person: str | None = None) -> str:
    """A caption of one picture, at most MAX_WORDS words and commas.

    `attributes` is the flat record that the renderer writes beside a picture; a value of None means "cannot be seen".
    With `person` (for instance "sks woman") the looks of the person go unnamed and that phrase stands for them.
    """
    a = attributes
    subject = person if person is not None else _subject(a, rng, detail=rng.choice((0.0, 0.5, 0.8)))
    openings = ANY_STYLE if rng.random() < (0.5 if a["style"] == "photo" else 0.1) else OPENINGS[a["style"]]
    parts = [f"{rng.choice(openings)} {subject}"]
    rest = [_worn(a, rng)]
    if a["expression"] and rng.random() < 0.75:
        rest.append(rng.choice(EXPRESSIONS[a["expression"]]))
    if a["turn"] and rng.random() < 0.9:
        rest.append(TURNS[a["turn"]])
    if a["background"] and rng.random() < 0.85:
        rest.append(rng.choice(BACKGROUNDS[a["background"]]))
    rng.shuffle(rest)
    parts += [phrase for phrase in rest if phrase]
    while sum(len(part.split()) + 1 for part in parts) > MAX_WORDS:
        parts.pop()
    return ", ".join(parts)


def vocabulary() -> list[str]:
    """All words that captions and sample prompts are made of, sorted; the miniature's tokenizers know exactly these."""
    phrases = [*HAIR_WORDS, *HAIR_COLOURS, *CLOTH_COLOURS, *TOPS.values(), *HATS.values(), *TURNS.values(), *ANY_STYLE,
               *AGES, *SKINS, *BEARDS.values(), TRIGGER, "a an and in with wearing hair skin head face glasses ,",
               "woman man person of the at on by his her hat photo picture portrait"]
    phrases += [p for group in (*EXPRESSIONS.values(), *BACKGROUNDS.values(), *OPENINGS.values()) for p in group]
    return sorted({word for phrase in phrases for word in phrase.split()})


def _wearing(things: dict[str, str]) -> list[str]:
    return [f"wearing {_article(f'{colour} {thing}')}" for thing in things.values() for colour in CLOTH_COLOURS]


def attribute_phrases() -> dict[str, dict[str, str]]:
    """For what a picture may show, a phrase for each way that it may: group, value, phrase. `value_of` reads the value from a record."""
    first = {name: {value: phrases[0] for value, phrases in each.items()} for name, each in
             (("expression", EXPRESSIONS), ("background", BACKGROUNDS), ("style", OPENINGS))}
    worn = {name: {f"{colour} {thing}": f"wearing {_article(f'{colour} {words}')}" for thing, words in things.items() for colour in CLOTH_COLOURS}
            for name, things in (("top", TOPS), ("hat", HATS))}
    hair = {f"{colour} {style}": f"{style} {colour} hair" for style in HAIR_WORDS if style not in ("bald", "buzz-cut") for colour in HAIR_COLOURS}
    return first | worn | {"turn": TURNS, "hair": hair, "sex": {sex: f"a {sex}" for sex in ("woman", "man")},
                           "age": {age: f"{_article(age)} person" for age in AGES}}


def value_of(attributes: dict, group: str) -> str | None:
    """The value of a group of `attribute_phrases` in a picture's record; None where it cannot be seen or has no phrase."""
    value, colour = attributes[group], attributes.get(f"{group}_colour", "")
    return value if colour == "" or value is None else colour and f"{colour} {value}"


def caption_phrases() -> list[list[str]]:
    """Groups of phrases for what is not the person, by which a photo is described for adaptation.

    Clothes and places only: expressions and glasses are too small for the miniature's CLIP, and a wrong word is worse than none.
    """
    return [_wearing(TOPS | HATS), *thing_phrases()]


def asked_phrases() -> list[list[str]]:
    """The same for which the base itself is asked, which knows expressions."""
    return [[first for first, *_ in EXPRESSIONS.values()]]


def thing_phrases() -> list[list[str]]:
    """The same for a thing, which wears nothing."""
    return [[first for first, *_ in BACKGROUNDS.values()]]


def prompt_phrases() -> list[list[str]]:
    """Groups of phrases that a prompt may use."""
    return [*asked_phrases(), *thing_phrases(), list(TURNS.values()), _wearing(TOPS), [*_wearing(HATS), "wearing glasses"]]
