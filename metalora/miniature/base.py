"""Trains the miniature's transformer together with its T5 encoder, on cached latents of the portrait world.

Flow matching as FLUX does it: noisy = (1 - sigma) x + sigma n, target n - x. Attention over some ninety tokens is
quickest as plain products on a CPU, and the blocks are compiled. The cells of the face count more in the loss than the rest: detail of hair and
places, of which there is more, would be learnt before the face.

What the transformer has made of the picture after its double-stream blocks is aligned with what the miniature's CLIP sees in the
clean picture: "Representation Alignment for Generation" (Yu et al. 2024, section 3). Measured at equal steps, the validation loss
was .7095 with it and .7215 without.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache, partial
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5EncoderModel

from metalora.generate import seeded
from metalora.miniature.captions import vocabulary
from metalora.miniature.clip import trained_clip
from metalora.miniature.features import Latents, cached, encode_latents, encode_patches
from metalora.miniature.pipeline import Spelling, build_pipeline
from metalora.miniature.shards import Batch, Shards, draw_captioned, load_shards
from metalora.miniature.training import Job, Trainer, compile_options, generator_on, products, read_result, write_result
from metalora.miniature.vae import trained_vae
from metalora.train import send

TRIGGER_SHARE = 0.15  # so that "sks woman" means nobody in particular before it is bound to a person
DROPPED_SHARE = 0.1
GUIDANCE_RANGE = (1.0, 4.0)
GUIDED_BELOW = 0.85  # the noise level under which the teacher is guided
TRUE_SHARE = 0.3  # of the rows of a guidance batch, those that go on learning from pictures at guidance 1
VALIDATION_PICTURES, VALIDATION_SIGMAS = 256, 4
ALIGNMENT_WEIGHT = 0.5
FACE_WEIGHT = 4.0  # of a face's cells in the loss: hair, cloth and places are most of a picture and of its detail
PREVIEW_STEPS = 20
PREVIEW_PROMPTS = (
    "a photo of a woman", "a photo of a man", "a photo of sks woman, in a green park", "a photo of sks man, at the beach",
    "a portrait of an old man with a full beard, smiling, in an office",
    "a portrait of a young woman with long red hair, wearing glasses, in front of a brick wall",
    "a photo of a woman with dark skin and short black hair, laughing, in front of a blue wall",
    "a picture of a man, wearing a red cap and a white t-shirt, in the city at night",
    "a photo of a woman, wearing a green beanie, looking left, in the snow",
    "a photo of a man with a bald head, wearing a suit, with an angry face, in a library",
    "an oil painting of an old woman with grey hair, looking sad, in a park",
    "a pencil drawing of a young man with short hair, wearing a striped shirt, looking surprised")


class Alignment(nn.Module):
    """A small network from the transformer's picture tokens to CLIP's patches, and the loss between the two."""

    def __init__(self, transformer: FluxTransformer2DModel, views: torch.Tensor):
        super().__init__()
        width = transformer.inner_dim
        self.project = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, views.shape[-1]))
        self._views, self._seen = [views.to(transformer.device)], []  # in lists: neither trains nor is kept in a checkpoint
        transformer.transformer_blocks[-1].register_forward_hook(self._see)

    def _see(self, block: nn.Module, given: tuple, made: tuple[torch.Tensor, torch.Tensor]) -> None:
        if torch.is_grad_enabled():  # a validation or a preview leaves nothing behind
            self._seen.append(made[1])

    def loss(self, batch: Batch) -> torch.Tensor:
        """One less the mean cosine of the tokens of the last forward pass and the patches of the batch's pictures."""
        tokens = self._seen.pop()
        views = self._views[0][batch.rows].float()
        return 1 - torch.cosine_similarity(self.project(tokens).float(), views, dim=-1).mean()


def initialise(transformer: FluxTransformer2DModel) -> None:
    """Starts as diffusion transformers do: every block an identity, the output zero (Peebles and Xie 2023, adaLN-Zero)."""
    for name, module in transformer.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        is_modulation = "norm" in name and name.endswith(".linear")
        if is_modulation or name == "proj_out":
            nn.init.zeros_(module.weight)
        else:
            nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Denoiser(nn.Module):
    """What trains, the transformer and the T5 encoder, and the frozen parts that feed them."""

    def __init__(self, pipeline: FluxPipeline, max_sequence_length: int):
        super().__init__()
        self.transformer: FluxTransformer2DModel = pipeline.transformer
        self.t5: T5EncoderModel = pipeline.text_encoder_2
        self._pipeline = [pipeline]  # in a list: the frozen parts are no part of the checkpoint
        self.length = max_sequence_length
        self._spellings = Spelling(pipeline.tokenizer_2, max_sequence_length), Spelling(pipeline.tokenizer, pipeline.tokenizer_max_length)

    @property
    def pipeline(self) -> FluxPipeline:
        return self._pipeline[0]

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def tokens(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """T5's (n, length) and CLIP's (n, longest)."""
        t5, clip = self._spellings
        return send(t5(captions, whole=True), self.device), send(clip(captions), self.device)

    def encode(self, ids: torch.Tensor, clip_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of tokens T5's states (n, length, width) with gradients and the CLIP tower's pooled states (n, width) without."""
        with torch.no_grad():
            pooled = self.pipeline.text_encoder(clip_ids).pooler_output
        return self.t5(ids).last_hidden_state, pooled

    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, text: tuple[torch.Tensor, torch.Tensor],
                 guidance: torch.Tensor) -> torch.Tensor:
        """Predicted n - x: (n, channels, h, w) for sigma (n,) and guidance (n,)."""
        n, channels, height, width = noisy.shape
        packed = FluxPipeline._pack_latents(noisy, n, channels, height, width)
        ids = _image_ids(height // 2, width // 2, noisy.device)
        output = self.transformer(
            hidden_states=packed, timestep=sigma, guidance=guidance, encoder_hidden_states=text[0],
            pooled_projections=text[1], txt_ids=torch.zeros(self.length, 3, device=noisy.device), img_ids=ids, return_dict=False)[0]
        grid = output.float().view(n, height // 2, width // 2, channels, 2, 2)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(noisy.shape)


@lru_cache(maxsize=8)
def _image_ids(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """The places of the picture's tokens, sent to the device once."""
    return FluxPipeline._prepare_latent_image_ids(1, rows, columns, device, torch.float32)


def noised(x: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents, their noise, and sigma (n,), logit-normal as for FLUX and Stable Diffusion 3; by a generator on the latents' device."""
    sigma = torch.sigmoid(torch.randn(len(x), generator=generator, device=x.device))
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    weight = sigma.view(-1, 1, 1, 1)
    return (1 - weight) * x + weight * noise, noise, sigma


def face_weights(boxes: torch.Tensor, mirrored: torch.Tensor, size: int, cells: int) -> torch.Tensor:
    """What each cell of the latents counts in the loss: FACE_WEIGHT times as much in the face's box, one in the mean.

    boxes: (n, 4) px in pictures of `size` px as drawn, mirrored: (n,) bool. Returns (n, 1, cells, cells).
    """
    left, top, right, bottom = boxes[:, :, None].unbind(1)  # (n, 1) each
    left, right = (torch.where(mirrored[:, None], size - other, own) for own, other in ((left, right), (right, left)))
    centre = (torch.arange(cells, device=boxes.device) + 0.5) * (size / cells)
    inside = ((centre > top) & (centre < bottom))[:, :, None] & ((centre > left) & (centre < right))[:, None]
    weights = 1 + (FACE_WEIGHT - 1) * inside[:, None].float()
    return weights / weights.mean()


@contextlib.contextmanager
def small_products(device: torch.device) -> Iterator[None]:
    """Attention over some ninety tokens is quickest as plain products on a CPU; a GPU has kernels for it."""
    with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext(), products(device):
        yield


def compile_blocks(transformer: FluxTransformer2DModel) -> None:
    """Compiles every kind of block, in one piece."""
    transformer.compile_repeated_blocks(fullgraph=True, options=compile_options(transformer.device))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a step learns from, on the denoiser's device.

    Args:
        tokens: T5's and CLIP's, of the captions.
        noisy, target: (n, channels, h, w), the latents at the noise levels sigma (n,) and what is to be predicted from them.
    """

    batch: Batch
    tokens: tuple[torch.Tensor, torch.Tensor]
    noisy: torch.Tensor
    target: torch.Tensor
    sigma: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Task:
    """What both phases learn from: captioned pictures, of which a face's cells count more than the rest."""

    denoiser: Denoiser
    shards: Shards
    latents: Latents
    batch_size: int

    @cached_property
    def boxes(self) -> torch.Tensor:
        return self.shards.boxes.to(self.denoiser.device)

    def drawn(self, batch: Batch, captions: list[str], generator: torch.Generator) -> Drawn:
        """The batch with latents and noise by a generator on the device."""
        device = self.denoiser.device
        batch = dataclasses.replace(batch, chosen=send(batch.chosen, device), mirrored=send(batch.mirrored, device))
        x = self.latents.draw(batch, generator)
        noisy, noise, sigma = noised(x, generator)
        return Drawn(batch, self.denoiser.tokens(captions), noisy, noise - x, sigma)

    def error(self, batch: Batch, velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The mean squared error of a predicted velocity, both (n, channels, h, w)."""
        weights = face_weights(self.boxes[batch.chosen], batch.mirrored, self.shards.images.shape[-1], target.shape[-1])
        return (weights * (velocity - target).square()).mean()


@dataclasses.dataclass(frozen=True)
class FlowTask(Task):
    """The first phase: guidance 1, and the alignment of what the transformer makes of the pictures."""

    alignment: Alignment

    def draw(self, generator: torch.Generator) -> Drawn:
        batch = draw_captioned(self.shards.records, self.batch_size, generator, TRIGGER_SHARE, DROPPED_SHARE)
        return self.drawn(batch, batch.captions, generator_on(self.denoiser.device, generator))

    def loss(self, drawn: Drawn) -> torch.Tensor:
        with small_products(self.denoiser.device):
            text = self.denoiser.encode(*drawn.tokens)
            velocity = self.denoiser.velocity(drawn.noisy, drawn.sigma, text, torch.ones_like(drawn.sigma))
            apart = self.alignment.loss(drawn.batch)
        return self.error(drawn.batch, velocity, drawn.target) + ALIGNMENT_WEIGHT * apart


@dataclasses.dataclass(frozen=True)
class GuidanceTask(Task):
    """The second phase: the guided velocity of a frozen teacher, for guidance that the model is told.

    Part of each batch goes on with the first phase's loss, so that guidance 1 keeps learning from pictures.
    Source: "On Distillation of Guided Diffusion Models" (Meng et al. 2023), its first stage; at the highest noise levels, where
    guidance costs variety and likeness to pictures, the teacher is not guided (arXiv 2404.07724).
    """

    teacher: Denoiser

    @property
    def true_rows(self) -> int:
        return round(TRUE_SHARE * self.batch_size)

    def draw(self, generator: torch.Generator) -> tuple[Drawn, torch.Tensor]:
        """A batch before whose captions stands an empty one, and the guidance (n,) of its rows."""
        batch = draw_captioned(self.shards.records, self.batch_size, generator, TRIGGER_SHARE)
        dropped = round(self.true_rows * DROPPED_SHARE)
        local = generator_on(self.denoiser.device, generator)
        drawn = self.drawn(batch, [""] * (1 + dropped) + batch.captions[dropped:], local)
        low, high = GUIDANCE_RANGE
        guidance = low + (high - low) * torch.rand(len(drawn.sigma), generator=local, device=drawn.sigma.device)
        guidance[: self.true_rows] = 1.0
        return drawn, guidance

    def loss(self, given: tuple[Drawn, torch.Tensor]) -> torch.Tensor:
        drawn, guidance = given
        noisy, sigma, target = drawn.noisy, drawn.sigma, drawn.target.clone()
        with small_products(self.denoiser.device):
            target[self.true_rows:] = self._guided(noisy, sigma, drawn.tokens, guidance)[self.true_rows:]
            velocity = self.denoiser.velocity(noisy, sigma, self.denoiser.encode(*(ids[1:] for ids in drawn.tokens)), guidance)
        return self.error(drawn.batch, velocity, target)

    @torch.no_grad()
    def _guided(self, noisy: torch.Tensor, sigma: torch.Tensor, tokens: tuple[torch.Tensor, torch.Tensor],
                guidance: torch.Tensor) -> torch.Tensor:
        ones = torch.ones_like(sigma)
        states, pooled = self.teacher.encode(*tokens)
        nothing = states[:1].expand_as(states[1:]), pooled[:1].expand_as(pooled[1:])
        free = self.teacher.velocity(noisy, sigma, nothing, ones)
        told = self.teacher.velocity(noisy, sigma, (states[1:], pooled[1:]), ones)
        weight = torch.where(sigma < GUIDED_BELOW, guidance, 1.0)
        return free + weight.view(-1, 1, 1, 1) * (told - free)


@torch.no_grad()
def validation_loss(denoiser: Denoiser, shards: Shards, latents: Latents) -> float:
    """Mean loss on pictures of unseen people, with the same captions, noise and sigmas at each call."""
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(VALIDATION_SIGMAS):
        batch = draw_captioned(shards.records, VALIDATION_PICTURES // VALIDATION_SIGMAS, generator)
        local = generator_on(denoiser.device, generator)
        x = latents.draw(batch, local)
        noisy, noise, sigma = noised(x, local)
        velocity = denoiser.velocity(noisy, sigma, denoiser.encode(*denoiser.tokens(batch.captions)), torch.ones_like(sigma))
        losses.append((velocity - (noise - x)).square().mean().item())
    return sum(losses) / len(losses)


def contact_sheet(images: list[Image.Image], columns: int) -> Image.Image:
    """The pictures, all of one size, in rows."""
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet


def preview(pipeline: FluxPipeline, size: int, max_sequence_length: int, guidance: float) -> Image.Image:
    """A sheet of the fixed prompts, always from the same noise."""
    with seeded(0, pipeline.device) as generator:
        images = pipeline(list(PREVIEW_PROMPTS), height=size, width=size, num_inference_steps=PREVIEW_STEPS, guidance_scale=guidance,
                          max_sequence_length=max_sequence_length, generator=generator).images
    return contact_sheet(images, columns=6)


def _watcher(denoiser: Denoiser, job: Job, folder: Path, validate: Callable[[], float],
             guidances: tuple[float, ...]) -> Callable[[Trainer], None]:
    def watch(trainer: Trainer) -> None:
        with torch.compiler.set_stance("force_eager"):  # other batch sizes would compile other kernels
            loss = validate()
            for guidance in guidances:
                sheet = preview(denoiser.pipeline, job.model.size, denoiser.length, guidance)
                sheet.save(folder / f"preview-{trainer.step:07d}-g{guidance:g}.png")
        line = {"step": trainer.step, "minutes": round(trainer.seconds / 60, 1), "train": trainer.loss, "validation": loss}
        with open(folder / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        print(f"{trainer.name}: {line}", flush=True)
    return watch


def _pipeline(job: Job) -> FluxPipeline:
    pipeline = build_pipeline(job.model, vocabulary(), job.seed)
    pipeline.vae = trained_vae(job)
    pipeline.text_encoder.load_state_dict(trained_clip(job).text_model.state_dict())
    pipeline.text_encoder.requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(job.device)


def trained_base(job: Job, name: str = "base") -> FluxPipeline:
    """The whole pipeline of this work folder, as far as the training `name`."""
    pipeline = _pipeline(job)
    Denoiser(pipeline, job.model.max_sequence_length).load_state_dict(read_result(job.work / name)[0])
    return pipeline


def train_base(job: Job, distill: bool = False, compiled: bool = True) -> dict:
    """Trains transformer and T5 and writes work/base; with `distill`, goes on from there to work/base-guided."""
    name = "base-guided" if distill else "base"
    shards = load_shards(*job.data)
    training, validation = shards.split()
    learnt = ~shards.of_validation
    pipeline = trained_base(job) if distill else _pipeline(job)
    folder = job.work / name
    with PartialState(cpu=True).main_process_first():
        everybody = Latents(**cached("latents", job, pipeline.vae.encoder.conv_in.weight, partial(encode_latents, pipeline.vae)))
    latents, unseen = (everybody.select(mask).to(pipeline.device) for mask in (learnt, ~learnt))
    denoiser = Denoiser(pipeline, job.model.max_sequence_length)
    config = job.training(learning_rate=1e-3 if distill else 4e-3, batch_size=32, anneal_from=0.3, warmup_steps=100, tasks_every=600.0)
    helper = None
    if distill:
        teacher = Denoiser(trained_base(job), job.model.max_sequence_length).requires_grad_(False)
        task = GuidanceTask(denoiser, training, latents, config.batch_size, teacher)
    else:
        torch.manual_seed(job.seed)
        initialise(pipeline.transformer)
        clip = trained_clip(job).to(job.device)
        with PartialState(cpu=True).main_process_first():
            views = cached("views", job, clip.vision_model.embeddings.patch_embedding.weight, partial(encode_patches, clip))["views"][:, learnt]
        helper = Alignment(pipeline.transformer, views).to(job.device)
        task = FlowTask(denoiser, training, latents, config.batch_size, helper)
    if compiled:
        for each in [denoiser, *([teacher] if distill else [])]:
            compile_blocks(each.transformer)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(name, denoiser, folder, config, helper, afresh=distill)  # an older result is of another first phase
    watch = _watcher(denoiser, job, folder, lambda: validation_loss(denoiser, validation, unseen),
                     (1.0, 2.5) if distill else (1.0,))
    result = trainer.run(task.loss, watch, task.draw)
    if trainer.is_first:
        watch(trainer)
    with torch.compiler.set_stance("force_eager"):
        figures = job.figures(result, config) | {
            "validation_loss": round(validation_loss(denoiser, validation, unseen), 4),
            "parameters": sum(p.numel() for p in pipeline.transformer.parameters()), "guidance": distill}
    write_result(folder, denoiser, figures)
    return figures
