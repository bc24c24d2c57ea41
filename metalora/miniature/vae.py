"""Trains the miniature's AutoencoderKL.

It is convolutional, so random crops stand for whole pictures at first: more of them a second, and no two alike. But its norms and its
attention take what is in sight into account, so whole pictures come out 0.6 dB worse than crops; `vae-refined` goes on with whole ones.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from metalora.miniature.pipeline import MiniatureConfig, build_vae
from metalora.miniature.shards import Shards, load_shards
from metalora.miniature.training import Job, Trainer, compile_options, generator_on, products, read_result, write_result
from metalora.train import send

CROP = 64
KL_WEIGHT = 1e-5  # of the mean over latent numbers; keeps the latents near a unit ball, not a prior to sample from
VALIDATION_PICTURES = 256
REFINED = "vae-refined"  # the name of that training
ANCHOR = 0.02  # of the squared distance, in deviations, that the latents move from where they were


def to_floats(images: torch.Tensor) -> torch.Tensor:
    """(n, 3, h, w) uint8 to floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def random_crops(images: torch.Tensor, batch: int, size: int, generator: torch.Generator, device: torch.device = torch.device("cpu")) -> torch.Tensor:
    """Crops of random pictures, half of them mirrored: (batch, 3, size, size) in [-1, 1], on the device."""
    chosen = torch.randint(len(images), (batch,), generator=generator)
    corners = torch.randint(images.shape[-1] - size + 1, (batch, 2), generator=generator).tolist()
    mirror = (torch.rand(batch, generator=generator) < 0.5).tolist()
    crops = [images[index, :, y:y + size, x:x + size] for index, (y, x) in zip(chosen.tolist(), corners, strict=True)]
    crops = torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, mirror, strict=True)])
    return to_floats(send(crops, device))  # a byte a number is sent


def sampled(mean: torch.Tensor, log_variance: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A draw of the latents that have this mean and variance."""
    return mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator_on(mean.device, generator), device=mean.device)


def vae_loss(vae: AutoencoderKL, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Squared error, which is what PSNR measures, and a small KL term, both in float32."""
    images = images.to(vae.device)
    with products(vae.device):
        moments = vae.encoder(images)
    mean, log_variance = moments.float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    with products(vae.device):
        output = vae.decoder(sampled(mean, log_variance, generator))
    output = output.float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return F.mse_loss(output, images) + KL_WEIGHT * kl


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents of uint8 pictures, unscaled: 2 x (n, channels, h / 8, w / 8), on the CPU."""
    batch = 16 if vae.device.type == "cpu" else 64  # a processor's cache is small
    parts = (to_floats(part.to(vae.device)).contiguous(memory_format=torch.channels_last) for part in images.split(batch))
    posteriors = [vae.encode(part).latent_dist for part in parts]
    return torch.cat([p.mean.cpu() for p in posteriors]), torch.cat([p.std.cpu() for p in posteriors])


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: torch.Tensor, batch: int = 64) -> float:
    """Peak signal to noise, in dB, of whole pictures through encoder and decoder, from the mean squared error of all."""
    errors = []
    with torch.compiler.set_stance("force_eager"):  # in training other kernels are compiled, which these sizes would not be worth
        for part in images.split(batch):
            floats = to_floats(part.to(vae.device))
            output = vae.decode(vae.encode(floats).latent_dist.mode()).sample.clamp(-1, 1)
            errors.append((output - floats).square().mean(dim=(1, 2, 3)) / 4)  # the range is 2 wide
    return -10 * math.log10(torch.cat(errors).mean().item())


def measure_latents(vae: AutoencoderKL, images: torch.Tensor) -> tuple[float, float]:
    """Scaling and shift that give the latents of `images` mean 0 and deviation 1."""
    mean, deviation = encode(vae, images)
    sample = mean + deviation * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    return 1 / sample.std().item(), sample.mean().item()


def load_vae(weights: dict[str, torch.Tensor], figures: dict) -> AutoencoderKL:
    """The trained autoencoder with its measured scaling and shift."""
    vae = build_vae(MiniatureConfig.of(figures["model"]))
    vae.load_state_dict(weights)
    vae.register_to_config(scaling_factor=figures["scaling_factor"], shift_factor=figures["shift_factor"])
    return vae.eval()


def trained_vae(job: Job) -> AutoencoderKL:
    """The autoencoder of this work folder, as far as `vae-refined` where that has been trained."""
    better = job.work / REFINED
    return load_vae(*read_result(better if (better / "result.json").exists() else job.work / "vae"))


def deeper(vae: AutoencoderKL, config: MiniatureConfig) -> AutoencoderKL:
    """The same autoencoder with as many layers a block as `config` says: those that are new add nothing yet."""
    new, known = build_vae(config), vae.state_dict()
    new.load_state_dict(known, strict=False)
    for name, module in new.named_modules():
        if isinstance(module, ResnetBlock2D) and f"{name}.conv2.weight" not in known:
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    return new


def train_vae(job: Job) -> dict:
    """Trains the autoencoder and writes work/vae; the figure is PSNR on whole pictures of unseen people."""
    torch.manual_seed(job.seed)
    vae = build_vae(job.model).to(job.device, memory_format=torch.channels_last)

    def measure(training: Shards) -> dict[str, float]:
        scaling, shift = measure_latents(vae, training.images[:: max(1, len(training) // 512)])
        return {"scaling_factor": scaling, "shift_factor": shift}

    return _train(job, "vae", vae, 4e-3, lambda images, generator: vae_loss(vae, images, generator), measure)


def train_refined(job: Job, compiled: bool = True) -> dict:
    """Goes on from work/vae with whole pictures, with more layers where the job's sizes have them, and writes work/vae-refined.

    The latents stay where they were but for little, and with them whatever was trained on them.
    """
    first = load_vae(*read_result(job.work / "vae"))
    vae = deeper(first, job.model).to(job.device, memory_format=torch.channels_last)
    first.to(job.device, memory_format=torch.channels_last).requires_grad_(False)
    if compiled:
        for part in (vae.encoder, vae.decoder):
            part.compile(options=compile_options(vae.device))
    scaling = first.config.scaling_factor

    def loss(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        with products(vae.device):
            with torch.no_grad():
                before = first.encoder(images).float()
            moments = vae.encoder(images).float()
            (mean, _), (_, log_variance) = moments.chunk(2, dim=1), before.chunk(2, dim=1)
            output = vae.decoder(sampled(mean, log_variance, generator))
        moved = scaling * (moments - before)
        return F.mse_loss(output.float(), images) + ANCHOR * moved.square().mean()

    return _train(job, REFINED, vae, 2e-3, loss, lambda _: {"scaling_factor": scaling, "shift_factor": first.config.shift_factor}, crop=job.model.size)


def _train(job: Job, name: str, vae: AutoencoderKL, learning_rate: float, loss: Callable[[torch.Tensor, torch.Generator], torch.Tensor],
           measure: Callable[[Shards], dict[str, float]], crop: int = CROP) -> dict:
    """Minimises `loss` of crops of `crop` px and writes work/`name`; `measure` gives the scaling and shift that go with the weights."""
    training, validation = load_shards(*job.data).split()
    config = job.training(learning_rate=learning_rate, batch_size=8, anneal_from=0.2, ema=0.995, warmup_steps=50)
    trainer = Trainer(name, vae, job.work / name, config)
    sample = validation.images[:: max(1, len(validation) // VALIDATION_PICTURES)][:VALIDATION_PICTURES]
    result = trainer.run(lambda drawn: loss(*drawn), lambda t: print(f"{name}: step {t.step}, {psnr(vae, sample[:64]):.2f} dB", flush=True),
                         lambda generator: (random_crops(training.images, config.batch_size, min(crop, job.model.size), generator, vae.device), generator))
    figures = job.figures(result, config) | measure(training) | {"psnr_db": round(psnr(vae, sample), 2), "validation_pictures": len(sample)}
    write_result(job.work / name, vae, figures)
    return figures
