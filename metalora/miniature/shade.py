"""Deferred shading: what colour each visible point is, and how the light falls on it.

Brows, beard, lips, clothes and moles are functions of the point's place on the *template* head, so they follow every face
and expression. All tensors are flat over the visible pixels of a batch; `of` looks a per-picture value up for each.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metalora.miniature import clothes
from metalora.miniature.colour import linear, step
from metalora.miniature.fused import Fused
from metalora.miniature.head import MASKS
from metalora.miniature.people import CLOTH_RGB, EYE_RGB, HAIR_RGB, LIGHTS, SKIN_TONES, Person, Scene
from metalora.miniature.props import CENTRE

SKIN, EYE, TEETH, HAIR, HAT, GLASSES, LASH, CLOTH = range(8)
EYE_RADIUS = 0.015
LIP_COLOURS = ((170, 66, 70), (158, 60, 78), (184, 96, 86), (140, 48, 56))
BEARDS = {None: (0.0, 0.0), "stubble": (0.35, 0.35), "moustache": (0.0, 0.9), "short": (0.75, 0.7), "full": (0.93, 0.93)}  # at the jaw, above the lip


@dataclass
class Surface:
    """The visible points of a batch: (m, ...) each."""

    picture: Tensor  # (m,) index of the picture
    material: Tensor  # (m,)
    position: Tensor  # (m, 3) in the posed world
    place: Tensor  # (m, 3) on the template
    normal: Tensor  # (m, 3)
    view: Tensor  # (m, 3) towards the camera
    occlusion: Tensor  # (m, 1)
    masks: Tensor  # (m, 4) of the head; of hair the direction of its strands and their tone
    along: Tensor  # (m,) coordinate of hair and hats
    lit: Tensor  # (m, 1) 0 in shadow .. 1


def hashed(x: Tensor) -> Tensor:
    """Repeatable white noise in 0..1."""
    return (torch.sin(x) * 43758.547).frac().abs()


def turned(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Each vector (n, 3) times its own matrix (n, 3, 3). A GPU is slow at a million products of matrices."""
    return matrices[..., 0] * vectors[:, :1] + matrices[..., 1] * vectors[:, 1:2] + matrices[..., 2] * vectors[:, 2:]


def blend(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    share = share[:, None] if share.dim() == 1 else share
    return a + (b - a) * share


class Palette:
    """Per-picture colours and numbers of a batch as tensors, to be looked up per pixel."""

    def __init__(self, pairs: list[tuple[Person, Scene]], device: torch.device):
        self.pairs, self.device = pairs, device
        tones = self._colours(SKIN_TONES)
        tone = torch.tensor([who.tone for who, _ in pairs], device=device)
        low = tone.long().clamp(max=len(SKIN_TONES) - 2)
        self.skin = torch.lerp(tones[low], tones[low + 1], (tone - low)[:, None]) * 0.80
        self.eye = self._colours(EYE_RGB[who.eye] for who, _ in pairs)
        self.hair = self._colours(HAIR_RGB[s.hair_colour] for _, s in pairs)
        self.brow_hair = self._colours(HAIR_RGB[who.hair_colour] for who, _ in pairs)
        self.lip = self._colours(LIP_COLOURS[who.seed % 4] for who, _ in pairs)
        self.top = self._colours(CLOTH_RGB[s.top_colour] for _, s in pairs)
        self.second = self._colours(CLOTH_RGB[s.second_colour] for _, s in pairs)
        self.hat = self._colours(CLOTH_RGB[s.hat_colour] for _, s in pairs)
        self.frame = self._colours(((24, 22, 22), (92, 54, 30), (130, 24, 28))[(who.seed + s.seed) % 3] for who, s in pairs)
        self.looks = self.numbers(lambda w, _: (w.blush, w.lips, w.freckles, max(0.0, (w.age - 0.78) * 5), *w.brow, w.sex == "woman"))
        self.moles = self.numbers(lambda w, _: (*w.moles, (9.0, 9.0), (9.0, 9.0))[:2])
        self.beard = self.numbers(lambda w, _: BEARDS[w.beard])
        self.scalp = self.numbers(lambda _, s: {"bald": 0.0, "buzz-cut": 0.72}.get(s.hair, 0.95))
        read = lambda name: self.numbers(lambda w, s: getattr(LIGHTS[s.light], name))
        self.light_direction = torch.nn.functional.normalize(read("direction"), dim=1)
        self.light_colour, self.sky, self.ground, self.rim = read("key"), read("sky"), read("ground"), read("rim")
        self.rim_direction = torch.nn.functional.normalize(self.numbers(lambda w, s: (LIGHTS[s.light].rim_side, 0.75, 0.35)), dim=1)

    def _colours(self, colours) -> Tensor:
        return torch.stack([linear(c) for c in colours]).to(self.device)  # one copy, not one a colour

    def numbers(self, read) -> Tensor:
        return torch.tensor([read(who, s) for who, s in self.pairs], dtype=torch.float32, device=self.device)


@Fused
def skin(s: Surface, p: Palette) -> tuple[Tensor, Tensor]:
    """Albedo (m, 3) and gloss (m,) of skin, with all that grows on it and is worn on it."""
    of = lambda table: table[s.picture]
    x, y, z = s.place.unbind(1)
    across, front = x.abs(), step(-0.06, -0.10, y)
    base = of(p.skin)
    dark = base.mean(1, keepdim=True)
    blush, lips, freckles, wrinkled, thick, arch, height, slant, woman = of(p.looks).unbind(1)
    cheek = torch.exp(-(((across - 0.043) / 0.018) ** 2 + ((z - 0.668) / 0.016) ** 2)) * front
    nose = torch.exp(-((x / 0.016) ** 2 + ((z - 0.662) / 0.014) ** 2)) * step(-0.13, -0.15, y)
    red = torch.tensor([0.22, -0.12, -0.10], device=x.device)
    colour = base * (1 + (0.5 * cheek * blush + 0.35 * nose)[:, None] * red * (0.4 + dark))
    under = torch.exp(-(((across - 0.028) / 0.016) ** 2 + ((z - 0.681) / 0.006) ** 2)) * front
    colour = colour * (1 - under * (0.10 + 0.22 * wrinkled))[:, None]
    colour = colour * (1 - wrinkled * _wrinkles(across, z, front))[:, None]
    freckle = step(0.62, 0.8, hashed((x * 420).floor() * 12.9 + (z * 420).floor() * 78.2)) * freckles
    freckle = freckle * torch.exp(-((across / 0.055) ** 4 + ((z - 0.675) / 0.025) ** 4)) * front
    colour = colour * (1 - 0.4 * freckle[:, None] * torch.tensor([0.6, 1.0, 1.2], device=x.device))
    colour = _moles(colour, s, p, x, z, front)
    mouth = s.masks[:, MASKS.index("lips")]
    natural = base * torch.tensor([0.82, 0.55, 0.53], device=x.device)
    painted = of(p.lip) * (0.35 + 0.65 * (dark * 3).clamp(max=1))
    colour = blend(colour, blend(natural, painted, lips), mouth)
    lid = s.masks[:, MASKS.index("eyelids")] * (0.18 + 0.22 * woman)
    colour = colour * (1 - lid[:, None] * torch.tensor([0.4, 0.5, 0.45], device=x.device))
    colour = blend(colour, of(p.brow_hair) * 0.7, 0.9 * _brow(across, y, z, thick, arch, height, slant, x))
    inside = s.masks[:, MASKS.index("inside-mouth")]
    colour = blend(colour, torch.tensor([0.20, 0.04, 0.04], device=x.device) * (0.25 + 0.75 * s.occlusion), inside)
    ears = s.masks[:, MASKS.index("ears")]
    colour = _beard(colour, s, p, across, y, z, mouth, ears)
    colour = _scalp(colour, s, p, x, y, z, ears)
    return colour, 0.05 + 0.10 * mouth


def _wrinkles(across, z, front):
    brow = (torch.sin(z * 820) * 0.5 + 0.5) ** 3 * step(0.727, 0.735, z) * step(0.055, 0.03, across) * front
    crow = (torch.sin(z * 1100 + across * 500) * 0.5 + 0.5) ** 3 * torch.exp(-(((across - 0.060) / 0.010) ** 2 + ((z - 0.694) / 0.012) ** 2))
    fold = torch.exp(-(((across - 0.020 - 0.30 * (0.662 - z).clamp(0, 0.04)) / 0.0026) ** 2)) * step(0.625, 0.635, z) * step(0.664, 0.656, z) * front
    return 0.14 * brow + 0.16 * crow + 0.28 * fold


def _moles(colour, s, p, x, z, front):
    for spot in p.moles[s.picture].unbind(1):
        distance = ((x - spot[:, 0]) ** 2 + (z - spot[:, 1]) ** 2).sqrt()
        colour = colour * (1 - 0.75 * (step(0.0028, 0.0014, distance) * front)[:, None])
    return colour


def _brow(across, y, z, thick, arch, height, slant, x):
    t = ((across - 0.011) / 0.038)
    inside = t.clamp(0, 1)
    centre = 0.7195 + height + 0.0065 * (0.55 + 0.45 * arch) * torch.sin(inside * 2.35) - 0.0045 * inside**2 + slant * (t - 0.5) * 0.004
    half = 0.0044 * thick * (1.05 - 0.75 * inside**1.5)
    hairs = hashed((x * 900 + z * 400).floor()) - 0.5
    return step(half * 1.3, half * 0.5, (z - centre).abs() + hairs * 0.0014) * step(-0.06, 0.22, t) * step(1.05, 0.8, t) * step(-0.07, -0.10, y)


def _beard(colour, s, p, across, y, z, mouth, ears):
    amount = p.beard[s.picture]
    jaw = step(0.012, -0.006, z - (0.620 + 0.060 * step(0.028, 0.078, across))) * step(0.565, 0.590, z) * step(-0.015, -0.055, y)
    lip = torch.exp(-(((across - 0.010) / 0.017) ** 4 + ((z - 0.6415) / 0.0058) ** 4)) * step(-0.06, -0.10, y)
    grain = 0.75 + 0.5 * hashed((s.place * 500).floor() @ torch.tensor([12.9, 78.2, 37.7], device=z.device))
    share = (torch.maximum(jaw * amount[:, 0], lip * amount[:, 1]) * (1 - mouth) * (1 - ears) * grain).clamp(0, 1)
    return blend(colour, p.brow_hair[s.picture] * (0.6 + 0.4 * grain)[:, None], share)


def _scalp(colour, s, p, x, y, z, ears):
    kind = p.scalp[s.picture]
    degrees = torch.atan2(x, -(y + 0.02)).abs() * (180 / math.pi)
    knots = torch.tensor([0, 42, 58, 72, 84, 90, 112, 122, 140, 180.0], device=x.device)
    heights = torch.tensor([.766, .760, .748, .730, .700, .724, .727, .69, .65, .625], device=x.device)
    k = torch.bucketize(degrees, knots).clamp(1, len(knots) - 1)
    line = torch.lerp(heights[k - 1], heights[k], (degrees - knots[k - 1]) / (knots[k] - knots[k - 1]))
    share = step(-0.004, 0.008, z - line) * (1 - ears) * kind
    return blend(colour, p.hair[s.picture] * 0.75, share)


def dressed(place: Tensor, picture: Tensor, material: Tensor, tops: list[str]) -> Tensor:
    """Materials (m,) where skin below the neckline of each picture's garment has become cloth."""
    material = material.clone()
    wearing = torch.tensor([list(clothes.THICKNESS).index(top) for top in tops], device=place.device)[picture]
    for number, top in enumerate(clothes.THICKNESS):
        low = ((wearing == number) & (material == SKIN) & (place[:, 2] < 0.61)).nonzero()[:, 0]
        material[low[place[low, 2] < clothes.neckline(top, place[low])]] = CLOTH
    return material


def cloth(s: Surface, p: Palette) -> tuple[Tensor, Tensor]:
    """Albedo (m, 3) and normal (m, 3) of clothes: colour, weave, seams, ribs, and folds as a tilt of the normal."""
    x, y, z = s.place.unbind(1)
    kind, t = s.along.floor(), s.along.frac()
    colour, normal = p.top[s.picture].clone(), s.normal + _folds(s, p)
    for top in {scene.top for _, scene in p.pairs}:
        on = p.numbers(lambda _, scene: scene.top == top)[s.picture] > 0
        body = (on & (kind == clothes.BODY)).nonzero()[:, 0]
        colour[body] = _front(top, colour[body], p.second[s.picture[body]], x[body], y[body], z[body], clothes.neckline(top, s.place[body]))
        if top == "suit":
            colour = torch.where((on & (kind == clothes.COLLAR))[:, None], torch.full_like(colour, 0.80), colour)
    silk = p.second[s.picture] * (0.85 + 0.3 * (torch.sin((x + z) * 700) > 0.3))[:, None]
    colour = torch.where((kind == clothes.TIE)[:, None], silk, colour)
    edge = step(0.80, 0.90, (2 * t - 1).abs())
    collar, lapel = (kind == clothes.COLLAR).float(), (kind == clothes.LAPEL).float()
    colour = colour * (1 - edge * (0.30 * collar + 0.45 * lapel) - 0.16 * lapel)[:, None]
    angle = torch.atan2(x, clothes.NECK_AXIS - y)
    rib = torch.where(kind == clothes.ROLL, torch.sin(angle * 44), torch.sin(x * 700))
    knit = p.numbers(lambda _, scene: {"turtleneck": 1.0, "v-neck": 0.5}.get(scene.top, 0.0))[s.picture] * torch.where(kind == clothes.ROLL, 1.0, 0.45)
    weave = 0.96 + 0.08 * hashed((s.place * 1400).floor() @ torch.tensor([12.9, 78.2, 37.7], device=x.device))
    return colour * (weave * (1 + 0.13 * knit * rib))[:, None], torch.nn.functional.normalize(normal, dim=1)


def _folds(s: Surface, p: Palette) -> Tensor:
    """Slopes (m, 3) of folds that run from the shoulders to the middle; each picture's its own. Stiff cloth and small pieces have less."""
    phase = p.numbers(lambda who, scene: (who.seed * 1.7 + scene.seed * 2.3) % 6.28)[s.picture]
    limp = p.numbers(lambda _, scene: {"suit": 0.5, "turtleneck": 0.8, "v-neck": 0.9}.get(scene.top, 1.1))[s.picture]
    x, _, z = s.place.unbind(1)
    across = x.abs()
    warp = 1.6 * torch.sin(x * 31 + phase) + 1.2 * torch.sin(z * 43 + 2 * phase)
    first, second = torch.cos(across * 62 + z * 95 + warp + phase), torch.cos(across * 120 - z * 70 - warp)
    slope = torch.stack([x.sign() * (0.55 * first + 0.6 * second), 0 * x, 0.8 * first - 0.35 * second], 1)
    return slope * (0.22 * limp * step(0.575, 0.52, z) * torch.where(s.along >= 1, 0.25, 1.0))[:, None]


def _front(top, cloth, second, x, y, z, edge):
    """What is sewn, knitted or printed on the body of a garment: colours (m, 3)."""
    below, front = edge - z, y < 0
    if top == "striped":
        cloth = torch.where((torch.sin(z * 330) > 0)[:, None], cloth, second)
    if top in ("t-shirt", "striped", "v-neck"):
        wide = 0.016 if top == "v-neck" else 0.010
        band = step(wide, wide - 0.001, below)
        seam = torch.exp(-((below - wide) / 0.0014) ** 2)
        return cloth * (1 - 0.14 * band - 0.40 * seam)[:, None]
    if top == "shirt":
        placket = ((x - 0.013).abs() < 0.0012) & front
        button = ((x**2 + ((z - 0.459) % 0.032 - 0.016) ** 2).sqrt() < 0.0042) & front & (z < 0.470)
        cloth = torch.where(placket[:, None], cloth * 0.6, cloth)
        return torch.where(button[:, None], 0.75 - 0.6 * cloth.mean(1, keepdim=True).round(), cloth)
    if top == "suit":
        shirt = (x.abs() < clothes.opening(z) + 0.003) & front
        return torch.where(shirt[:, None], torch.full_like(cloth, 0.80), cloth * (0.93 + 0.07 * torch.sin(x * 1500))[:, None])
    return cloth


@Fused
def eyes(s: Surface, p: Palette, centres: Tensor, gaze: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Albedo, normal and catch-light of eyeballs. centres: (pictures, 2, 3) left and right; gaze, up: (pictures, 3)."""
    left = (s.place[:, 0] > 0).long()
    centre = centres[s.picture, 1 - left]
    towards = torch.nn.functional.normalize(s.position - centre, dim=1)
    angle = torch.acos((towards * gaze[s.picture]).sum(1).clamp(-1, 1))
    white = torch.tensor([0.70, 0.67, 0.64], device=angle.device).expand(len(angle), 3)
    ring = 1.2 - 0.8 * step(0.30, 0.46, angle)
    colour = blend(white, p.eye[s.picture] * 1.3 * ring[:, None], step(0.48, 0.44, angle))
    colour = colour * (1 - 0.97 * step(0.22, 0.17, angle))[:, None]
    height = ((s.position - centre) * up[s.picture]).sum(1) / EYE_RADIUS
    colour = colour * (0.3 + 0.7 * step(0.62, 0.10, height))[:, None]
    glint = torch.nn.functional.normalize(p.light_direction + torch.tensor([0.0, -0.8, 0.25], device=angle.device), dim=1)
    shine = (towards * glint[s.picture]).sum(1).clamp(min=0) ** 220
    return colour, towards, shine[:, None] * 0.9 * p.light_colour[s.picture] * 0.6


@Fused
def hair(s: Surface, p: Palette, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Albedo, normal and direction of strands. A strand's normal is the head's, leant away from its own direction, so that hair
    is shaded as one body; turn: (pictures, 3, 3) rotates the template into the world."""
    outward = s.place - torch.as_tensor(CENTRE, device=s.place.device, dtype=s.place.dtype)
    outward = torch.cat([outward[:, :2], outward[:, 2:].clamp(min=-0.02)], 1)
    along, outward = (turned(turn[s.picture], v) for v in (s.masks[:, :3], outward))
    along, outward = (torch.nn.functional.normalize(v, dim=1) for v in (along, outward))
    normal = torch.nn.functional.normalize(outward - 0.6 * (outward * along).sum(1, keepdim=True) * along, dim=1)
    behind = (normal * s.view).sum(1) < 0  # the inside of hair that hangs behind the neck: in the shade
    normal = torch.where(behind[:, None], -normal, normal)
    tone = (0.50 + 0.45 * s.along.clamp(0, 1) ** 0.7) * (0.62 + 0.76 * s.masks[:, 3]) * torch.where(behind, 0.55, 1.0)
    return p.hair[s.picture] * tone[:, None] * 1.25, normal, torch.cat([along, s.masks[:, 3:]], 1)


def albedo(s: Surface, p: Palette, centres: Tensor, gaze: Tensor, up: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Albedo (m, 3), gloss (m,) and own light (m, 3) of every point; eye normals are set on the surface."""
    colour = torch.zeros_like(s.position)
    gloss, glow = torch.zeros(len(colour), device=colour.device), torch.zeros_like(colour)
    for material in range(8):
        chosen = (s.material == material).nonzero()[:, 0]
        if not len(chosen):
            continue
        part = Surface(**{name: value[chosen] for name, value in vars(s).items()})
        if material == SKIN:
            colour[chosen], gloss[chosen] = skin(part, p)
        elif material == EYE:
            colour[chosen], s.normal[chosen], glow[chosen] = eyes(part, p, centres, gaze, up)
        elif material == TEETH:
            s.occlusion[chosen] = part.occlusion.clamp(min=0.8)
            inside = step(-0.07, -0.10, part.place[:, 1]) * step(0.022, 0.014, part.place[:, 0].abs())  # dark towards the throat and the cheeks
            colour[chosen] = torch.tensor([0.80, 0.76, 0.68], device=colour.device) * inside[:, None]
        elif material == HAIR:
            colour[chosen], s.normal[chosen], s.masks[chosen] = hair(part, p, turn)
            gloss[chosen] = 0.16
        elif material == CLOTH:
            colour[chosen], s.normal[chosen] = cloth(part, p)
            gloss[chosen] = 0.015
        elif material == HAT:
            knit = 0.85 + 0.2 * torch.sin(part.along * 60)
            colour[chosen] = p.hat[part.picture] * knit[:, None]
        elif material == LASH:
            colour[chosen] = torch.tensor([0.02, 0.016, 0.014], device=colour.device)
        else:
            colour[chosen], gloss[chosen] = p.frame[part.picture], 0.4
    return colour, gloss, glow


@Fused
def illuminate(s: Surface, p: Palette, colour: Tensor, gloss: Tensor, glow: Tensor) -> Tensor:
    """Linear light (m, 3) that reaches the camera: wrapped, reddened diffuse for skin, soft fill, gloss, rim."""
    soft = torch.where(s.material == SKIN, 1.0, 0.0)[:, None] + torch.where(s.material == HAIR, 0.35, 0.0)[:, None]
    towards = p.light_direction[s.picture]
    facing = (s.normal * towards).sum(1, keepdim=True)
    wrap = soft * torch.tensor([0.32, 0.18, 0.12], device=colour.device)
    diffuse = ((facing + wrap) / (1 + wrap)).clamp(min=0)
    lit = s.lit + (1 - s.lit) * soft * torch.tensor([0.10, 0.04, 0.03], device=colour.device)
    lit = torch.where((s.material == TEETH)[:, None], lit.clamp(min=0.75), lit)  # a coarse shadow map would leave mouths without teeth
    # From all around: the sky above and the ground below, more of it from the camera's side, so that no face drowns in shade.
    upward = (s.normal[:, 2:] * 0.5 + 0.5)
    fill = (0.5 - 0.5 * s.normal[:, 1:2]) ** 1.5
    around = (p.ground[s.picture] + (p.sky - p.ground)[s.picture] * upward) * s.occlusion * (0.42 + 0.75 * fill)
    half = torch.nn.functional.normalize(towards + s.view, dim=1)
    highlight = (s.normal * half).sum(1).clamp(min=0) ** 18 * gloss * (facing[:, 0] > 0)
    # Hair shines in a band across its strands (Kajiya and Kay 1989, section 4), in its own colour.
    band = (1 - (s.masks[:, :3] * half).sum(1).square()).clamp(min=0).sqrt() ** 60 * (s.normal * towards).sum(1).clamp(min=0)
    highlight = torch.where(s.material == HAIR, band * gloss * (0.3 + s.masks[:, 3]), highlight)
    sheen = (1 - (s.normal * s.view).sum(1).clamp(0, 1)) ** 4 * 0.08 * (s.material == SKIN)
    light = colour * (p.light_colour[s.picture] * diffuse * lit * (0.55 + 0.45 * s.occlusion) + around)
    light = light + glow + (highlight[:, None] * 1.6 * s.lit + sheen[:, None]) * p.light_colour[s.picture] * 0.5
    behind = (s.normal * p.rim_direction[s.picture]).sum(1, keepdim=True).clamp(min=0)
    grazing = (1 - (s.normal * s.view).sum(1, keepdim=True).clamp(0, 1)) ** 3
    return light + p.rim[s.picture] * behind * grazing * s.occlusion * (0.12 + 0.9 * colour)
