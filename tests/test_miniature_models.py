"""The miniature's parts at toy size: pipeline, shards, the training loop, and every training through to the assets."""

from __future__ import annotations

import metalora  # noqa: F401  before torch: it sets how threads wait
import json
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

from metalora.base import Base
from metalora.dino import Dino
from metalora.errors import MetaLoraError
from metalora.face import FaceFinder
from metalora.miniature import assemble as assembly
from metalora.miniature import base as base_training
from metalora.miniature import detector, recogniser
from metalora.miniature.__main__ import main
from metalora.miniature.captions import TRIGGER, asked_phrases, caption_phrases, vocabulary
from metalora.miniature.clip import train_clip
from metalora.miniature.facepack import separation
from metalora.miniature.features import Latents, cached, encode_latents
from metalora.miniature.likeness import build_dino
from metalora.miniature.meta_down import People
from metalora.miniature.optimizer import Muon, Optimizer
from metalora.miniature.people import HELD_OUT, person, scene
from metalora.miniature.pipeline import MiniatureConfig, Spelling, build_pipeline, clip_tokenizer, save_pipeline, t5_tokenizer
from metalora.miniature.shards import draw_captioned, load_shards
from metalora.miniature.training import Draws, Job, Trainer, TrainingConfig, in_bfloat16, write_result
from metalora.miniature.vae import deeper, encode, random_crops, train_refined, train_vae, trained_vae, vae_loss
from metalora.prompts import Captioner
from tests.conftest import TINY, in_processes, state_hash

SIZE = 64
TOY = replace(TINY, size=SIZE)
PEOPLE = [*range(6), 24, 49, HELD_OUT]  # 24 and 49 are for validation, the last is held out


def write_part(folder: Path, number: int, people: list[int], scenes: int) -> None:
    """A shard of smooth noise in place of portraits, with true records."""
    views = [(person(p), scene(person(p), s)) for p in people for s in range(scenes)]
    noise = torch.rand(len(views), 3, 8, 8, generator=torch.Generator().manual_seed(number))
    images = torch.nn.functional.interpolate(noise * 255, size=(SIZE, SIZE), mode="bilinear").to(torch.uint8)
    keypoints = [[24.0, 27.0], [40.0, 27.0], [32.0, 36.0], [26.0, 43.0], [38.0, 43.0]]
    lines = [{"person": who.seed, "domain": who.sex, "scene": view.seed, "box": [16.0, 12.0, 48.0, 52.0], "keypoints": keypoints,
              "attributes": view.attributes} for who, view in views]
    save_file({"images": images}, folder / f"part-{number:05d}.safetensors")
    (folder / f"part-{number:05d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_part(folder, 0, PEOPLE[:4], scenes=3)
    write_part(folder, 1, PEOPLE[4:], scenes=3)
    return folder


@pytest.fixture(scope="module")
def work(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder in which every training took two steps."""
    folder = tmp_path_factory.mktemp("work")
    job = Job(data=(data,), work=folder, minutes=1, steps=2, batch_size=4, model=TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector, "CHECKED_CANVASES", 4)
        patch.setattr(base_training, "PREVIEW_STEPS", 1)
        train_vae(job)
        train_clip(job)
        base_training.train_base(job, compiled=False)
        detector.train_detector(job)
        recogniser.train_recogniser(job)
    return folder


@pytest.fixture(scope="module")
def assets(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    assembly.assemble(work, folder)
    return folder


# Pipeline and tokenizers


def test_the_same_seed_gives_the_same_pipeline_and_leaves_the_global_random_state():
    before = torch.get_rng_state()
    first, second, other = (build_pipeline(TINY, ["a", "photo"], seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert state_hash(first.transformer) == state_hash(second.transformer) != state_hash(other.transformer)


def test_a_pipeline_is_the_same_after_saving_and_loading(tmp_path: Path):
    pipeline = build_pipeline(TINY, ["a", "photo"], seed=5)
    save_pipeline(pipeline, tmp_path / "p", torch.float32)
    again = FluxPipeline.from_pretrained(tmp_path / "p")
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert state_hash(getattr(pipeline, name)) == state_hash(getattr(again, name)), name
    for name in ("tokenizer", "tokenizer_2"):
        text = "A photo, unheard-of"
        assert getattr(pipeline, name)(text).input_ids == getattr(again, name)(text).input_ids, name
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / "p").rglob("*") if path.is_file())


def test_every_word_of_the_world_is_one_token_of_t5():
    tokenizer = t5_tokenizer(vocabulary(), 32)
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in vocabulary()]
    assert all(len(one) == 1 for one in ids) and len({one[0] for one in ids}) == len(ids)
    assert tokenizer.unk_token_id not in tokenizer("quixotic zebra").input_ids  # spelt in letters


def test_clip_s_tokenizer_keeps_words_whole_and_spells_the_rest():
    tokenizer = clip_tokenizer(vocabulary(), 64)
    for word in (word for word in vocabulary() if word.isalpha()):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    assert tokenizer.decode(tokenizer("quixotic zebra", add_special_tokens=False).input_ids) == "quixotic zebra"


@pytest.mark.parametrize("length", [32, 9])
def test_texts_are_put_together_from_words_as_the_tokenizers_would(data: Path, length: int):
    t5, clip = t5_tokenizer(vocabulary(), 32), clip_tokenizer(vocabulary(), 77)
    texts = draw_captioned(load_shards(data).records, 200, torch.Generator().manual_seed(1), 0.2, 0.1).captions + ["", "Unheard-of: a woman's 3 zebras"]
    whole = t5(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    longest = clip(texts, padding="longest", truncation=True, max_length=length, return_tensors="pt").input_ids
    assert torch.equal(Spelling(t5, length)(texts, whole=True), whole) and torch.equal(Spelling(clip, length)(texts), longest)


# Shards


def test_shards_come_back_as_written(data: Path):
    shards = load_shards(data)
    assert len(shards) == 3 * len(PEOPLE) and shards.images.shape == (27, 3, SIZE, SIZE)
    assert torch.equal(shards.images[:12], load_file(data / "part-00000.safetensors")["images"])
    assert shards.records == [json.loads(line) for part in sorted(data.glob("*.jsonl")) for line in part.read_text().splitlines()]
    assert shards.keypoints.shape == (27, 5, 2) and shards.boxes.shape == (27, 4)


def test_no_person_is_in_training_and_validation_and_held_out_people_are_in_neither_s_way(data: Path):
    training, validation = load_shards(data).split()
    assert set(training.persons.tolist()) == set(range(6))
    assert set(validation.persons.tolist()) == {24, 49, HELD_OUT}
    assert len(training) + len(validation) == 27


def test_shards_that_do_not_fit_are_refused_with_a_sentence(tmp_path: Path):
    with pytest.raises(MetaLoraError, match="run the render command first"):
        load_shards(tmp_path)
    write_part(tmp_path, 0, [1, 2], scenes=1)
    with pytest.raises(MetaLoraError, match="too few to train and validate"):
        load_shards(tmp_path).split()
    (tmp_path / "part-00000.jsonl").write_text("")
    with pytest.raises(MetaLoraError, match="0 lines"):
        load_shards(tmp_path)


def test_captions_of_mirrored_pictures_say_left_for_right(data: Path):
    records = load_shards(data).records
    batch = draw_captioned(records, 300, torch.Generator().manual_seed(0), trigger_share=0.5, dropped_share=0.1)
    turned = {"left": 0, "right": 0}
    for index, flipped, text in zip(batch.chosen.tolist(), batch.mirrored.tolist(), batch.captions, strict=True):
        turn = records[index]["attributes"]["turn"]
        for side in turned:
            if f"looking {side}" in text:
                turned[side] += 1
                assert (turn == side) != flipped
    assert min(turned.values()) > 0
    assert batch.captions.count("") in range(10, 60) and sum(TRIGGER in text for text in batch.captions) in range(90, 180)


# The training loop


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path, data: Path):
    images = load_shards(data).images
    config = TrainingConfig(learning_rate=1e-2, batch_size=2, steps=5, warmup_steps=2, ema=0.9, save_every=0.0)

    def trainer(folder: str) -> Trainer:
        torch.manual_seed(1)
        return Trainer("toy", build_pipeline(TINY, [], seed=7).vae, tmp_path / folder, config)

    def loss_that_dies_at(step: int, of: Trainer):
        def loss(generator: torch.Generator) -> torch.Tensor:
            if of.step == step:
                raise KeyboardInterrupt
            return vae_loss(of.module, random_crops(images, 2, 32, generator), generator)
        return loss

    whole, killed = trainer("whole"), trainer("killed")
    start = state_hash(whole.module)
    result = whole.run(loss_that_dies_at(-1, whole))
    with pytest.raises(KeyboardInterrupt):
        killed.run(loss_that_dies_at(3, killed))
    resumed = trainer("killed")
    assert resumed.step == 3
    assert resumed.run(loss_that_dies_at(-1, resumed)).loss == result.loss
    assert state_hash(resumed.module) == state_hash(whole.module) != start


def test_a_thread_that_draws_ahead_draws_the_same():
    draw = lambda step: torch.rand(3, generator=torch.Generator().manual_seed(step))  # noqa: E731
    here, ahead = Draws(draw, ahead=False), Draws(draw, ahead=True)
    assert all(torch.equal(here.of(step), ahead.of(step)) for step in range(4, 9))
    ahead.close()


PROCESS = """
import sys, torch
from pathlib import Path
from metalora.miniature.training import Trainer, TrainingConfig
torch.manual_seed(0)
module = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))
trainer = Trainer("toy", module, Path(sys.argv[1]), TrainingConfig(learning_rate=0.01, batch_size=4, steps=5))
seen = []
def loss(generator):
    seen.append(torch.randn(4, 16, generator=generator))
    return (module(seen[-1]) - 1).square().mean()
result = trainer.run(loss)
print(torch.stack(seen).sum().item(), result.samples, sum(p.sum() for p in module.parameters()).item(), flush=True)
"""


def test_several_processes_train_one_model(tmp_path: Path):
    """Each on its own batches; they end with the same weights, and one of them has written the checkpoint."""
    one, other = in_processes(2, tmp_path, PROCESS, str(tmp_path / "toy"))
    assert one[0] != other[0] and one[1:] == other[1:] and one[1] == "40"
    assert (tmp_path / "toy" / "checkpoint.pt").exists()


def test_muon_moves_the_matrices_and_adamw_the_rest():
    module = torch.nn.Sequential(torch.nn.Embedding(20, 32), torch.nn.Linear(32, 48), torch.nn.LayerNorm(48), torch.nn.Linear(48, 2))
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = Optimizer(module, TrainingConfig(learning_rate=0.01, batch_size=1, weight_decay=0.0))
    module(torch.arange(20)).square().sum().backward()
    optimizer.step(0.01)
    steps = [p.detach() - old for p, old in zip(module.parameters(), before, strict=True)]
    values = torch.linalg.svdvals(steps[1])  # an update of Muon's has singular values near one another
    assert values[15] > 0.5 * values[0] and len(optimizer.muon.matrices) == 1
    assert all(0 < step.abs().max() < 0.0101 for index, step in enumerate(steps) if index != 1)
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("shape", [(24, 32), (32, 24), (24, 96), (96, 24)])
def test_muon_steps_as_torchs_own_does(shape: tuple[int, int]):
    """To the rounding of bfloat16, in which torch computes it, and with singular values that are just as even."""
    torch.manual_seed(0)
    ours, theirs = torch.randn(shape), torch.nn.Parameter(torch.empty(shape))
    theirs.data.copy_(ours)
    muon, reference = Muon([ours], weight_decay=0.1), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        gradient = torch.randn(shape)
        before, theirs.grad = ours.clone(), gradient.clone()
        muon.step([gradient], 0.1)
        reference.step()
    torch.testing.assert_close(ours, theirs.data, atol=0.02, rtol=0.02)
    values = torch.linalg.svdvals(ours - 0.99 * before) / (0.1 * 0.2 * max(shape) ** 0.5)
    assert 0.6 < values.min() and values.max() < 1.3


def test_muon_steps_matrices_together_as_it_does_one_by_one():
    """As on a GPU: those of a shape at once."""
    torch.manual_seed(0)
    shapes = [(24, 32), (32, 24), (24, 96), (24, 32), (96, 24), (24, 24), (32, 24)]
    one, together = (Muon([torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in shapes], weight_decay=0.1) for _ in range(2))
    for _ in range(3):
        gradients = [torch.randn(shape) for shape in shapes]
        one.step(gradients, 0.1)
        together.step_together(gradients, 0.1)
    torch.testing.assert_close(together.matrices, one.matrices, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.moments, one.moments)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernels_of_either_layout_train(layout: torch.memory_format):
    layer = torch.nn.Conv2d(16, 24, 3, bias=False).to(memory_format=layout)
    optimizer, before = Optimizer(layer, TrainingConfig(learning_rate=0.01, batch_size=1, weight_decay=0.0)), layer.weight.detach().clone()
    layer(torch.randn(2, 16, 8, 8).to(memory_format=layout)).square().mean().backward()
    optimizer.step(0.01)
    assert (layer.weight - before).square().mean().sqrt() > 0.001


def test_a_checkpoint_of_another_model_is_refused_with_a_sentence(tmp_path: Path):
    config = TrainingConfig(learning_rate=1.0, batch_size=1, steps=1)
    Trainer("toy", torch.nn.Linear(2, 2), tmp_path, config).save()
    with pytest.raises(MetaLoraError, match="remove it to begin anew"):
        Trainer("toy", torch.nn.Linear(2, 3), tmp_path, config)


def test_a_loss_that_is_no_number_stops_the_training(tmp_path: Path):
    module = torch.nn.Linear(2, 2)
    trainer = Trainer("toy", module, tmp_path, TrainingConfig(learning_rate=1.0, batch_size=1, steps=3))
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        trainer.run(lambda generator: module.weight.sum() * float("nan"))


# The face models


def test_crops_are_cut_as_insightface_cuts_them(data: Path):
    from insightface.utils.face_align import norm_crop

    images = load_shards(data).images[:4]
    generator = torch.Generator().manual_seed(0)
    points = load_shards(data).keypoints[:4] * 1.1 + 3 * torch.randn(4, 5, 2, generator=generator)
    crops = recogniser.aligned(images.float(), points)
    halves = recogniser.aligned(images.float(), points, step=2)
    for image, keypoints, crop in zip(images, points, crops, strict=True):
        reference = norm_crop(image.permute(1, 2, 0).numpy(), keypoints.numpy()).astype(np.float32)
        inside = (reference > 0).all(axis=2)  # OpenCV fades to black at a picture's edge over another width
        assert np.abs(crop.permute(1, 2, 0).numpy() - reference)[inside].mean() < 1.0
    assert (torch.nn.functional.avg_pool2d(crops, 2) - halves).abs().mean() < 3


def test_separation_of_perfect_and_of_useless_embeddings():
    persons = np.repeat(np.arange(8), 4)
    perfect = np.eye(8, dtype=np.float32)[persons]
    assert separation(perfect, persons) == {"auc": 1.0, "rank_1": 1.0, "gallery": 8, "same": 1.0, "different": 0.0}
    noise = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    assert 0.3 < separation(noise, persons)["auc"] < 0.7
    assert separation(perfect[:1], persons[:1]) == {}


def test_stock_insightface_runs_the_pack_as_pytorch_does(work: Path, assets: Path, data: Path):
    from insightface.app import FaceAnalysis

    app = FaceAnalysis(name=str(assets / "face"), providers=["CPUExecutionProvider"])
    assert set(app.models) == {"detection", "recognition"}
    model = app.models["recognition"]
    assert (model.input_size, model.input_mean, model.input_std) == ((112, 112), 127.5, 127.5)
    crop = np.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=np.uint8)  # BGR
    ours = recogniser.Recogniser()
    ours.load_state_dict(load_file(work / "face-recogniser" / "model.safetensors"))
    pixels = torch.from_numpy(crop[..., ::-1].copy()).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        np.testing.assert_allclose(model.get_feat(crop)[0], ours.eval()((pixels - 127.5) / 127.5)[0], atol=1e-4)


def test_a_folder_of_data_is_encoded_once(data: Path, tmp_path: Path):
    """Another folder beside it leaves its file alone; other pictures or another network do not."""
    write_part(tmp_path, 0, PEOPLE[:2], scenes=1)
    encoded: list[int] = []

    def shades(images: torch.Tensor) -> dict[str, torch.Tensor]:
        encoded.append(len(images))
        return {"left": images[..., :SIZE // 2].float().mean(dim=(1, 2, 3))}

    def made(*folders: Path, weight: float = 1.0) -> torch.Tensor:
        return cached("shades", Job(data=folders, work=tmp_path / "work", minutes=1), torch.tensor(weight), shades)["left"]

    first, both, again = made(data), made(data, tmp_path), made(data, tmp_path)
    assert encoded == [27, 27, 2, 2] and torch.equal(both, again) and torch.equal(both[:, :27], first)
    images = load_shards(data, tmp_path).images
    assert torch.equal(both, torch.stack([shades(each)["left"].half() for each in (images, images.flip(-1))]))
    encoded.clear()
    made(data, tmp_path, weight=2.0)
    write_part(tmp_path, 1, PEOPLE[:1], scenes=1)
    made(data, tmp_path, weight=2.0)
    assert encoded == [27, 27, 2, 2, 3, 3]


def test_the_alignment_sees_the_clean_picture_of_its_row_and_only_where_there_are_gradients(data: Path, work: Path):
    job = Job(data=(data,), work=work, minutes=1, model=TOY)
    pipeline = base_training.trained_base(job)
    denoiser = base_training.Denoiser(pipeline, TOY.max_sequence_length)
    shards = load_shards(data)
    latents = Latents(**cached("latents", job, pipeline.vae.encoder.conv_in.weight, partial(encode_latents, pipeline.vae)))
    views = torch.randn(2, len(shards), (TOY.latent_size // 2) ** 2, 8)
    alignment = base_training.Alignment(pipeline.transformer, views)
    base_training.validation_loss(denoiser, shards, latents)
    batch = draw_captioned(shards.records, 4, torch.Generator().manual_seed(0))
    text = denoiser.encode(*denoiser.tokens(batch.captions))
    denoiser.velocity(latents.draw(batch, torch.Generator()), torch.full((4,), 0.5), text, torch.ones(4))
    (tokens,) = alignment._seen
    views[batch.mirrored.long(), batch.chosen] = alignment.project(tokens).detach()
    alignment.loss(batch).backward()
    assert not alignment._seen and pipeline.transformer.x_embedder.weight.grad is not None
    denoiser.velocity(latents.draw(batch, torch.Generator()), torch.full((4,), 0.5), denoiser.encode(*denoiser.tokens(batch.captions)), torch.ones(4))
    alignment._seen[0] = tokens
    assert alignment.loss(batch) < 1e-5


@pytest.mark.skipif(not (in_bfloat16(torch.device("cpu")) and shutil.which("g++")), reason="for a CPU where products are of bfloat16, and a C++ compiler")
def test_compiled_blocks_have_the_gradients_of_those_that_are_not():
    """With the sizes that the miniature is trained at: what a compiler gets wrong it gets wrong at some sizes only."""
    transformer = build_pipeline(replace(MiniatureConfig(), double_blocks=0, single_blocks=1), vocabulary(), seed=0).transformer
    torch.manual_seed(0)
    for p in transformer.parameters():
        p.data += 0.05 * torch.randn_like(p)
    inputs = torch.randn(8, 64, 64), torch.randn(8, 32, 128), torch.randn(8, 96)
    places = FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)

    def gradients() -> torch.Tensor:
        transformer.zero_grad()
        pictures, texts, pooled = inputs
        with base_training.small_products(transformer.device):
            made = transformer(hidden_states=pictures, encoder_hidden_states=texts, pooled_projections=pooled, timestep=torch.linspace(0.1, 0.9, 8),
                               guidance=torch.ones(8), img_ids=places, txt_ids=torch.zeros(32, 3), return_dict=False)[0]
        made.float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None])

    plain = gradients()
    base_training.compile_blocks(transformer)
    compiled = gradients()
    assert (compiled - plain).norm() < 0.05 * plain.norm()


def test_a_face_s_cells_count_more_and_a_mirrored_face_s_are_mirrored():
    box, centred = [32.0, 16.0, 80.0, 100.0], [32.0, 32.0, 96.0, 96.0]
    drawn, mirrored, other = base_training.face_weights(torch.tensor([box, box, centred]), torch.tensor([False, True, True]), 128, 16)[:, 0]
    assert torch.equal(drawn, mirrored.flip(-1)) and torch.equal(other, other.flip(-1)) and drawn.mean() > 0
    high = drawn > drawn.min()
    assert high.any(1).nonzero().flatten().tolist() == [*range(2, 12)] and high.any(0).nonzero().flatten().tolist() == [*range(4, 10)]
    assert drawn.max() / drawn.min() == base_training.FACE_WEIGHT
    whole = base_training.face_weights(torch.rand(5, 4) * 128, torch.rand(5) < 0.5, 128, 16)
    assert whole.shape == (5, 1, 16, 16) and whole.mean() == pytest.approx(1, abs=1e-5)


def test_the_detector_s_onnx_finds_what_the_decoded_maps_say(work: Path, assets: Path):
    finder = FaceFinder(assets / "face", det_size=SIZE)
    assert isinstance(finder.detect(Image.new("RGB", (SIZE, SIZE), "grey")), list)
    ours = detector.Detector()
    ours.load_state_dict(load_file(work / "face-detector" / "model.safetensors"))
    model = finder._app.models["detection"]
    blob = np.random.default_rng(0).normal(size=(1, 3, 96, 128)).astype(np.float32)  # not the size it was exported at
    outputs = model.session.run(None, {model.session.get_inputs()[0].name: blob})
    with torch.no_grad():
        for theirs, mine in zip(outputs, ours.eval()(torch.from_numpy(blob)), strict=True):
            np.testing.assert_allclose(theirs, mine, atol=1e-4)


def test_a_training_without_its_checkpoint_goes_on_from_its_result(tmp_path: Path):
    config = TrainingConfig(learning_rate=0.01, batch_size=3, steps=2)
    loss = lambda generator: (trainer.module.weight - 1).square().mean()  # noqa: E731
    trainer = Trainer("toy", torch.nn.Linear(2, 2), tmp_path, config)
    write_result(tmp_path, trainer.module, {"samples": 100, "minutes": 5.0, "earlier": {"samples": 10, "minutes": 1.0}})
    other = Trainer("toy", torch.nn.Linear(2, 2), tmp_path / "elsewhere", config)
    assert not torch.equal(other.module.weight, trainer.module.weight)
    trainer = Trainer("toy", torch.nn.Linear(2, 2), tmp_path, config)
    assert torch.equal(trainer.module.weight, load_file(tmp_path / "model.safetensors")["weight"])
    assert torch.equal(trainer.averages.values[0], trainer.module.weight) and trainer.step == 0
    assert trainer.run(loss).earlier == {"samples": 110, "minutes": 6.0}
    again = Trainer("toy", torch.nn.Linear(2, 2), tmp_path, config)  # now there is a checkpoint, which knows it too
    assert again.step == 2 and again.earlier == {"samples": 110, "minutes": 6.0}


def test_a_refined_autoencoder_is_deeper_and_its_latents_stay_near(data: Path, work: Path, tmp_path: Path):
    folder = shutil.copytree(work, tmp_path / "work")
    job = Job(data=(data,), work=folder, minutes=1, steps=3, batch_size=2, model=replace(TOY, vae_layers_per_block=2))
    first, images = trained_vae(job), load_shards(data).images[:4]
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(encode(first, images), encode(deeper(first, job.model), images), strict=True))
    figures = train_refined(job, compiled=False)
    after = trained_vae(job)
    assert after.config.layers_per_block == 2 and after.config.scaling_factor == first.config.scaling_factor and figures["psnr_db"] > 0
    moved = (encode(first, images)[0] - encode(after, images)[0]).square().mean() * first.config.scaling_factor**2
    assert 0 < moved < 0.2
    assembly.assemble(folder, tmp_path / "assets")
    assert "vae-refined" in json.loads((tmp_path / "assets" / "miniature" / "training.json").read_text())
    assembly.disassemble(tmp_path / "assets", tmp_path / "again")
    assert trained_vae(replace(job, work=tmp_path / "again")).config.layers_per_block == 2


# Assets


def test_assets_come_apart_as_what_they_were_made_of(assets: Path, work: Path, tmp_path: Path):
    names = assembly.disassemble(assets, tmp_path / "again")
    assert sorted(names) == sorted(path.name for path in work.iterdir() if path.is_dir())
    for name in names:
        assert (tmp_path / "again" / name / "result.json").read_text() == (work / name / "result.json").read_text()
    for name in ("vae", "clip", "base", "face-detector", "face-recogniser"):
        mine, theirs = (load_file(folder / name / "model.safetensors") for folder in (tmp_path / "again", work))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k].float(), theirs[k].half().float()) for k in mine)
    sizes = assembly.assemble(tmp_path / "again", tmp_path / "assets")
    assert sizes["all"] == pytest.approx(sum(path.stat().st_size for path in assets.rglob("*") if path.is_file()) / 1e6, abs=0.01)
    with pytest.raises(MetaLoraError, match="has a training .* already; choose another folder"):
        assembly.disassemble(assets, tmp_path / "again")


def test_on_other_people_a_recogniser_begins_with_names_where_their_pictures_lie(data: Path):
    torch.manual_seed(0)
    shards = load_shards(data)
    task = recogniser.NamingTask(recogniser.Recogniser(), recogniser.Names(len(shards.persons.unique())), shards, batch_size=8)
    task.place_names()
    found = torch.nn.functional.normalize(task.recogniser.embed(task.crops(torch.arange(len(shards)), torch.Generator().manual_seed(1))))
    cosines = found.detach() @ torch.nn.functional.normalize(task.names.directions.detach()).T  # (pictures, people)
    own = torch.nn.functional.one_hot(task.labels).bool()
    assert cosines[own].mean() > cosines[~own].mean() + 0.05


def test_the_recogniser_goes_on_from_the_assets(assets: Path, work: Path, data: Path, tmp_path: Path):
    """With other people than it learnt to name: their directions are no part of it."""
    assembly.disassemble(assets, tmp_path / "again")
    job = Job(data=(data,), work=tmp_path / "again", minutes=1, steps=1, batch_size=4, learning_rate=0.0, model=TOY)
    figures = recogniser.train_recogniser(job)
    before, after = (load_file(folder / "face-recogniser" / "model.safetensors") for folder in (work, tmp_path / "again"))
    assert figures["earlier"]["samples"] == 8
    assert all(torch.allclose(after[name], before[name], atol=1e-3) for name in before if "running" not in name and "num_batches" not in name)


def test_a_trained_likeness_is_an_asset_more(work: Path, tmp_path: Path):
    folder = shutil.copytree(work, tmp_path / "work")
    write_result(folder / "likeness", dino := build_dino(SIZE), json.loads((work / "clip" / "result.json").read_text()))
    sizes = assembly.assemble(folder, tmp_path / "assets")
    assert {"miniature", "clip", "face", "dino", "training", "all"} == set(sizes) == {path.name for path in (tmp_path / "assets").iterdir()} | {"all"}
    assert Dino(tmp_path / "assets" / "dino").images([Image.new("RGB", (90, 60), "red")]).shape == (1, 128)
    assert "likeness" in assembly.disassemble(tmp_path / "assets", tmp_path / "again")
    again = load_file(tmp_path / "again" / "likeness" / "model.safetensors")
    assert all(torch.equal(again[name], value.half().float()) for name, value in dino.state_dict().items())


def test_the_assembled_base_opens_and_generates(assets: Path):
    base = Base.open(str(assets / "miniature"), device="cpu")
    assert base.name == "miniature" and base.settings.resolution == SIZE
    assert Path(base.settings.clip).resolve() == (assets / "clip").resolve()
    assert Path(base.settings.face_pack).resolve() == (assets / "face").resolve()
    assert base.settings.caption_phrases == tuple(tuple(group) for group in caption_phrases())
    assert base.settings.asked_phrases == tuple(tuple(group) for group in asked_phrases()) and base.settings.adapt.asked_draws == base.settings.plain.asked_draws > 0
    image = base.pipeline("a photo of a woman", height=SIZE, width=SIZE, num_inference_steps=1, max_sequence_length=16).images[0]
    assert image.size == (SIZE, SIZE)


def test_the_assembled_weights_are_the_trained_ones(assets: Path, work: Path):
    trained = load_file(work / "base" / "model.safetensors")
    saved = load_file(assets / "miniature" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {f"transformer.{name}" for name in saved} <= set(trained)
    assert all(torch.equal(value, trained[f"transformer.{name}"].half()) for name, value in saved.items())
    figures = json.loads((work / "vae" / "result.json").read_text())
    assert json.loads((assets / "miniature" / "vae" / "config.json").read_text())["scaling_factor"] == figures["scaling_factor"]


def test_clip_s_text_tower_is_the_pipeline_s_bit_for_bit(assets: Path):
    tower = load_file(assets / "miniature" / "text_encoder" / "model.safetensors")
    clip = CLIPModel.from_pretrained(assets / "clip")
    reference = FluxPipeline.from_pretrained(assets / "miniature").text_encoder
    assert state_hash(clip.text_model.float()) == state_hash(reference.float())
    assert tower and all(value.dtype == torch.float16 for value in tower.values())
    processor = CLIPProcessor.from_pretrained(assets / "clip")
    inputs = processor(text=["a photo"], images=Image.new("RGB", (200, 100), "white"), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, SIZE, SIZE) and inputs["pixel_values"].min() == 1.0


def test_the_captioner_writes_words_of_the_vocabulary(assets: Path):
    text = str(Captioner(assets / "clip", caption_phrases()).caption(Image.new("RGB", (40, 40), "red"), "sks man", "man"))
    assert text.startswith("a photo of sks man, ") and set(text.replace(",", "").split()) <= set(vocabulary())


def test_a_base_that_has_learnt_guidance_is_preferred_and_used_with_it(data: Path, work: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(base_training, "PREVIEW_STEPS", 1)
    folder = shutil.copytree(work, tmp_path / "work")

    def distilled() -> dict[str, torch.Tensor]:
        base_training.train_base(Job(data=(data,), work=folder, minutes=1, steps=1, batch_size=4, model=TOY), distill=True, compiled=False)
        return load_file(folder / "base-guided" / "model.safetensors")

    first = distilled()
    (folder / "base-guided" / "checkpoint.pt").unlink()
    save_file({name: torch.zeros_like(value) for name, value in first.items()}, folder / "base-guided" / "model.safetensors")
    again = distilled()  # it begins from the base, whatever result of an earlier one lies there
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assembly.assemble(folder, tmp_path / "assets")
    settings = json.loads((tmp_path / "assets" / "miniature" / "metalora.json").read_text())
    assert settings["guidance"] == assembly.GUIDANCE and settings["train_guidance"] == 1.0
    learnt = load_file(folder / "base-guided" / "model.safetensors")["transformer.proj_out.weight"].half()
    assert torch.equal(load_file(tmp_path / "assets" / "miniature" / "transformer" / "diffusion_pytorch_model.safetensors")["proj_out.weight"], learnt)
    assert not torch.equal(load_file(work / "base" / "model.safetensors")["transformer.proj_out.weight"].half(), learnt)
    assert {"base", "base-guided"} <= set(json.loads((tmp_path / "assets" / "miniature" / "training.json").read_text()))


def test_cards_tell_the_trainings_own_figures(assets: Path, work: Path):
    for asset, name in (("miniature", "vae"), ("clip", "clip"), ("face", "face-recogniser")):
        card = (assets / asset / "README.md").read_text()
        figures = json.loads((work / name / "result.json").read_text())
        assert card.startswith("---\nlicense: apache-2.0\n") and figures["command"] in card and "{" not in card
        assert json.loads((assets / asset / "training.json").read_text())[name] == figures
    assert f"{json.loads((work / 'vae' / 'result.json').read_text())['psnr_db']:g}" in (assets / "miniature" / "README.md").read_text()


def test_assembling_again_gives_the_same_files_and_leaves_nothing_beside(assets: Path, work: Path):
    def files() -> dict[str, bytes]:
        return {str(path.relative_to(assets)): path.read_bytes() for path in assets.rglob("*") if path.is_file()}

    before = files()
    sizes = assembly.assemble(work, assets)
    assert files() == before
    assert {path.name for path in assets.iterdir()} == {"miniature", "clip", "face", "training"}
    assert sizes["all"] == pytest.approx(sum(map(len, before.values())) / 1e6, abs=0.01)


def test_stage_1_encodes_people_when_it_meets_them(assets: Path, data: Path):
    base, shards = Base.open(str(assets / "miniature"), device="cpu"), load_shards(data)
    domain = shards.records[0]["domain"]
    people = People(base, shards, domain)
    assert len(people) == len({r["person"] for r in shards.records if r["domain"] == domain}) > 1
    one, pair, again = people.bucket([1]), people.bucket([0, 1]), people.bucket([1, 0])
    assert (len(one), len(pair), one.subjects, pair.subjects) == (6, 12, 1, 2)  # three pictures and their mirrors
    for bucket, number in ((pair, 1), (again, 0)):
        rows = bucket.subject == number
        assert torch.equal(bucket.mean[rows], one.mean)
        assert torch.equal(bucket.text.rows(bucket.caption[rows]).embeds, one.text.rows(one.caption).embeds)
    assert torch.equal(People(base, shards, domain).bucket([0, 1]).mean, pair.mean)
    assert people.bucket([0]) is not pair and set(people._encoded) == set(list(people.pictures)[:2])


def test_what_cannot_be_assembled_is_refused_and_nothing_is_left(assets: Path, work: Path, tmp_path: Path, monkeypatch, capsys):
    assert main(["assemble", "--work", str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 2
    assert "lacks the result of vae, clip, base, face-detector, face-recogniser" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    before = (assets / "miniature" / "README.md").stat().st_mtime_ns
    monkeypatch.setattr(assembly, "MOST_MEGABYTES", 0.1)
    with pytest.raises(MetaLoraError, match="train smaller parts"):
        assembly.assemble(work, assets)
    assert (assets / "miniature" / "README.md").stat().st_mtime_ns == before
    assert {path.name for path in assets.iterdir()} == {"miniature", "clip", "face", "training"}


def test_parts_of_different_sizes_are_refused(work: Path, tmp_path: Path):
    for name in ("vae", "clip", "base", "face-detector", "face-recogniser"):
        (tmp_path / name).mkdir()
        figures = json.loads((work / name / "result.json").read_text())
        if name == "clip":
            figures["model"]["clip_width"] *= 2
        (tmp_path / name / "result.json").write_text(json.dumps(figures))
    with pytest.raises(MetaLoraError, match="clip in .* was trained at other sizes than base"):
        assembly.read_parts(tmp_path)


def test_canvases_are_the_same_for_the_same_random_numbers_and_hold_their_faces(data: Path):
    shards = load_shards(data)
    for seed in range(12):
        canvas, again = (detector.draw_canvas(shards, 96, random.Random(seed)) for _ in range(2))
        assert torch.equal(canvas.image, again.image) and torch.equal(canvas.boxes, again.boxes)
        assert len(canvas.boxes) == len(canvas.keypoints)
        assert (canvas.boxes >= 0).all() and (canvas.boxes <= 96).all() and (canvas.boxes[:, 2:] > canvas.boxes[:, :2]).all()
