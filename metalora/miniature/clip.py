"""Trains a small CLIP on pictures and captions of the portrait world.

Its text tower becomes the pipeline's first text encoder; the whole of it scores pictures against prompts and finds the
phrases that describe a photo.
"""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer, CLIPVisionConfig

from metalora.miniature.captions import MIRRORED, attribute_phrases, value_of, vocabulary
from metalora.miniature.pipeline import MiniatureConfig, Spelling, clip_text_config, clip_tokenizer
from metalora.miniature.shards import Batch, Shards, draw_captioned, load_shards
from metalora.miniature.training import Job, Trainer, products, read_result, write_result
from metalora.miniature.vae import to_floats
from metalora.train import send

VISION_WIDTH, VISION_LAYERS, VISION_HEADS, PATCH = 128, 4, 4, 16
MAX_LOGIT_SCALE = 4.6  # ln 100, as in CLIP
GALLERY = 100
UNSEEN = -1  # what a picture does not show


def build_clip(config: MiniatureConfig, tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIPModel of random weights with the pipeline's text tower."""
    text = clip_text_config(config, tokenizer)
    vision = CLIPVisionConfig(hidden_size=VISION_WIDTH, intermediate_size=4 * VISION_WIDTH, image_size=config.size,
                              num_hidden_layers=VISION_LAYERS, num_attention_heads=VISION_HEADS, patch_size=PATCH,
                              projection_dim=config.clip_width)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(),
                                projection_dim=config.clip_width))


def build_processor(config: MiniatureConfig, tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """The preprocessing that fits: whole pictures at the model's size, in [-1, 1]."""
    size = {"height": config.size, "width": config.size}
    images = CLIPImageProcessorPil(size=size, do_center_crop=False, crop_size=size, image_mean=[0.5] * 3,
                                   image_std=[0.5] * 3)
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def softened(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A third of the batch at half or two thirds of its sharpness, as generated pictures are."""
    size = images.shape[-1]
    kind = torch.rand(len(images), generator=generator)
    for low, high, part in ((0.0, 0.17, size // 2), (0.17, 0.33, 2 * size // 3)):
        rows = send(((kind >= low) & (kind < high)).nonzero().flatten(), images.device)
        small = F.interpolate(images[rows], size=(part, part), mode="area")
        images[rows] = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
    return images


def contrast(clip: CLIPModel, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features of pictures and captions: 2 x (n, projection). Attention is causal and the end token is read, so padding beyond it changes nothing."""
    pictures = clip.visual_projection(clip.vision_model(pixel_values=pixels.to(clip.device)).pooler_output)
    captions = clip.text_projection(clip.text_model(input_ids=ids.to(clip.device)).pooler_output)
    return F.normalize(pictures.float(), dim=-1), F.normalize(captions.float(), dim=-1)


def loss_of_groups(logits: Sequence[torch.Tensor], true: torch.Tensor, **how: float) -> torch.Tensor:
    """Cross-entropy of the right class within each group, the mean over the groups that any of the pictures shows.

    logits[k]: (n, classes of group k), true: (n, groups) on the CPU, UNSEEN where a picture does not show one.
    """
    shown = (true != UNSEEN).any(0).nonzero().flatten().tolist()
    true = send(true, logits[0].device)
    return torch.stack([F.cross_entropy(logits[k], true[:, k], ignore_index=UNSEEN, **how) for k in shown]).mean()


class Phrases:
    """Which phrase of each group of `captions.attribute_phrases` is true of a picture, for a loss that asks for it."""

    def __init__(self, shards: Shards, spelling: Spelling):
        groups = attribute_phrases()
        self.ids = spelling([phrase for group in groups.values() for phrase in group.values()])  # (all phrases, longest)
        sizes = [len(group) for group in groups.values()]
        self.spans = [slice(sum(sizes[:k]), sum(sizes[:k + 1])) for k in range(len(sizes))]
        numbers = [{value: k for k, value in enumerate(group)} for group in groups.values()]
        rows = []
        for flip in (False, True):
            values = ([value_of(record["attributes"], name) for name in groups] for record in shards.records)
            rows.append([[number.get(MIRRORED.get(v, v) if flip else v, UNSEEN) for number, v in zip(numbers, each, strict=True)] for each in values])
        self.true = torch.tensor(rows)  # (2, n, groups): as drawn, mirrored

    def loss(self, pictures: torch.Tensor, phrases: torch.Tensor, scale: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Cross-entropy of the right phrase within its group, a mean over the groups; features (n, d), (all phrases, d)."""
        logits = scale * pictures @ phrases.T
        return loss_of_groups([logits[:, span] for span in self.spans], self.true[batch.rows])

    @torch.no_grad()
    def right(self, clip: CLIPModel, images: torch.Tensor) -> dict[str, float]:
        """How often the true phrase of a group comes first, by group, on the pictures that show one."""
        phrases = F.normalize(clip.text_projection(clip.text_model(input_ids=self.ids.to(clip.device)).pooler_output), dim=-1)
        parts = [clip.visual_projection(clip.vision_model(pixel_values=to_floats(part.to(clip.device))).pooler_output) for part in images.split(64)]
        logits = (torch.cat(parts) @ phrases.T).cpu()
        first = torch.stack([logits[:, span].argmax(1) for span in self.spans], 1)  # (n, groups)
        shown = self.true[0] != UNSEEN
        hits = ((first == self.true[0]) & shown).sum(0) / shown.sum(0).clamp(min=1)
        return {name: round(hit, 4) for name, hit in zip(attribute_phrases(), hits.tolist(), strict=True)}


@dataclasses.dataclass(frozen=True)
class ClipTask:
    """CLIP's symmetric loss over a batch of pictures with captions, and the loss of single phrases, for which captioning asks it."""

    clip: CLIPModel
    spelling: Spelling
    shards: Shards
    phrases: Phrases
    batch_size: int

    def draw(self, generator: torch.Generator) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        """A batch, its pictures, of which some are softened, and the tokens of its captions."""
        batch, device = draw_captioned(self.shards.records, self.batch_size, generator), self.clip.device
        images = to_floats(send(self.shards.pictures(batch.chosen, batch.mirrored), device))
        return batch, softened(images, generator), send(self.spelling(batch.captions), device)

    def loss(self, drawn: tuple[Batch, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        batch, images, ids = drawn
        with products(self.clip.device):
            pictures, captions = contrast(self.clip, images, ids)
            phrases = self.clip.text_projection(self.clip.text_model(input_ids=send(self.phrases.ids, self.clip.device)).pooler_output)
        scale = self.clip.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        named = self.phrases.loss(pictures, F.normalize(phrases.float(), dim=-1), scale, batch)
        logits = scale * pictures @ captions.T  # (n, n)
        right = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2 + named

    @torch.no_grad()
    def right_of_hundred(self, validation: Shards, galleries: int = 10) -> float:
        """How often, of 100 captions of different pictures, a picture's own comes first; equal captions are one."""
        generator, hits = torch.Generator().manual_seed(0), []
        for _ in range(galleries):
            batch = draw_captioned(validation.records, GALLERY, generator)
            images = to_floats(validation.pictures(batch.chosen, batch.mirrored))
            pictures, captions = contrast(self.clip, images, self.spelling(batch.captions))
            best = (pictures @ captions.T).argmax(dim=1).tolist()
            hits += [batch.captions[first] == own for first, own in zip(best, batch.captions, strict=True)]
        return sum(hits) / len(hits)


def trained_clip(job: Job) -> CLIPModel:
    """The CLIP model of this work folder."""
    clip = build_clip(job.model, clip_tokenizer(vocabulary(), job.model.clip_tokens))
    clip.load_state_dict(read_result(job.work / "clip")[0])
    return clip.eval()


def train_clip(job: Job) -> dict:
    """Trains CLIP and writes work/clip; the figure is how often the right one of 100 captions comes first."""
    training, validation = load_shards(*job.data).split()
    torch.manual_seed(job.seed)
    tokenizer = clip_tokenizer(vocabulary(), job.model.clip_tokens)
    clip, spelling = build_clip(job.model, tokenizer).to(job.device), Spelling(tokenizer, job.model.clip_tokens)
    config = job.training(learning_rate=3e-3, batch_size=64, weight_decay=0.05, ema=0.995)
    task = ClipTask(clip, spelling, training, Phrases(training, spelling), config.batch_size)
    trainer = Trainer("clip", clip, job.work / "clip", config)
    result = trainer.run(task.loss, lambda t: print(
        f"clip: step {t.step}, right of 100: {task.right_of_hundred(validation, 2):.1%}", flush=True), task.draw)
    figures = job.figures(result, config) | {"right_of_100_captions": round(task.right_of_hundred(validation), 4)}
    figures["right_phrase"] = Phrases(validation, spelling).right(clip, validation.images)
    write_result(job.work / "clip", clip, figures)
    return figures
