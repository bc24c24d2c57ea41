"""Cache, training loop, stage 2 and stage 1: repeatable, resumable, and without a trace when stopped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from metalora import MetaLoraError
from metalora.adapt import adapt, adapt_plain, crops
from metalora.adapter import attach, find_targets
from metalora.base import Base
from metalora.cache import captioned, encode, face_mask, join, merge, mirrored, to_tensor
from metalora.config import AdaptConfig, FlowConfig, MetaConfig
from metalora.data import Item
from metalora.face import Face, FaceFinder
from metalora.meta import _members, bucket_of_photos, meta_train
from metalora.speed import meta_lora
from metalora.standin import Case, random_pictures
from metalora.train import Clock, Share, draw, draw_rows, fit, flow_loss, loss_of, optimizer

from .conftest import in_processes, make_meta_down, run, state_hash

META = MetaConfig(rounds=3, bucket_size=2, bucket_steps=4, warmup_steps=2, batch_size=3, learning_rate=0.05, down_learning_rate=0.05)


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, y) for k in one for x, y in zip(one[k], other[k]))


# ---- cache


def test_latents_are_paired_with_their_captions_by_picture(base):
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    captions = ["a photo of sks woman", "a red cap", "a photo of sks woman", "a green park", "a red cap"]
    data = encode(base, images, captions)
    assert data.caption.tolist() == [0, 1, 0, 2, 1] and len(data.text.embeds) == 3
    alone = encode(base, images[3:4], captions[3:4])
    torch.testing.assert_close(data.mean[3:4], alone.mean)
    torch.testing.assert_close(data.text.rows(data.caption[3:4]).embeds, alone.text.embeds)


def test_selecting_subjects_renumbers_them_and_keeps_their_pictures(people):
    part = people.select([4, 1])
    assert part.subjects == 2 and len(part) == 6
    for new, old in ((0, 4), (1, 1)):
        ours, theirs = part.subject == new, people.subject == old
        assert torch.equal(part.mean[ours], people.mean[theirs])
        assert torch.equal(part.text.rows(part.caption[ours]).embeds, people.text.rows(people.caption[theirs]).embeds)


def test_subjects_one_by_one_and_joined_are_those_selected_at_once(people):
    joined, part = join([people.select([4]), people.select([1])]), people.select([4, 1])
    assert joined.subjects == 2 and joined.weight is None
    for subject in range(2):
        ours, theirs = joined.subject == subject, part.subject == subject
        assert torch.equal(joined.mean[ours], part.mean[theirs]) and torch.equal(joined.std[ours], part.std[theirs])
        assert torch.equal(joined.text.rows(joined.caption[ours]).embeds, part.text.rows(part.caption[theirs]).embeds)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(40, 200), height=st.integers(40, 200), data=st.data())
def test_crops_hold_the_face_and_lie_in_the_picture(width, height, data):
    face = data.draw(st.integers(4, min(width, height)))
    left, top = data.draw(st.integers(0, width - face)), data.draw(st.integers(0, height - face))
    image = Image.new("RGB", (width, height), (0, 0, 255))
    image.paste((255, 0, 0), (left, top, left + face, top + face))
    cut = crops(image, (left, top, left + face, top + face), 64, AdaptConfig(crops=4))
    assert len(cut) == 8 and {c.size for c in cut} == {(64, 64)}
    for crop in cut:  # the share of red says that the face is whole: at least that of the largest square
        red = sum(p[0] > 127 for p in crop.get_flattened_data()) if hasattr(crop, "get_flattened_data") else sum(p[0] > 127 for p in crop.getdata())
        assert red >= 0.7 * 64**2 * face**2 / min(width, height) ** 2 - 64
    again = crops(image, (left, top, left + face, top + face), 64, AdaptConfig(crops=4))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(cut, again))


def test_mirrored_pictures_are_mirror_images():
    image = Image.effect_noise((8, 8), 50).convert("RGB")
    one, other = to_tensor(mirrored([image]))
    assert torch.equal(one, other.flip(-1)) and one.min() >= -1 and one.max() <= 1


# ---- the loop


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 8), seed=st.integers(0, 99))
def test_batches_mix_subjects_evenly(people, batch, seed):
    rows = draw_rows(people, batch, torch.Generator().manual_seed(seed))
    seen = [int(people.subject[i]) for _ in range(12) for i in next(rows)]
    full = seen[: len(seen) // 6 * 6]
    assert all(sorted(full[i : i + 6]) == [0, 1, 2, 3, 4, 5] for i in range(0, len(full), 6))


def test_the_loss_is_that_of_a_plain_flow_step(base, photo):
    rows, g = torch.tensor([0, 2]), torch.Generator().manual_seed(5)
    with torch.no_grad():
        got = flow_loss(base, photo, rows, g, FlowConfig())
    g = torch.Generator().manual_seed(5)
    spread, noise = torch.randn(2, 2, *photo.mean.shape[1:], generator=g)
    from metalora.flow import sample_sigmas

    sigma = sample_sigmas(2, g)[:, None, None]
    x = photo.mean[rows] + photo.std[rows] * spread
    with torch.no_grad():
        v = base.velocity((1 - sigma) * x + sigma * noise, sigma.flatten(), photo.text.rows(photo.caption[rows]), photo.image_ids, 1.0)
    torch.testing.assert_close(got, (v - (noise - x)).square().mean())


@pytest.fixture
def worded(base, photo):
    """The pictures of one subject, each with two captions more."""
    return captioned(base, photo, [("a photo of sks woman", "smiling", f"in the {place}") for place in ("park", "cap", "park")])


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 8), part=st.floats(0, 1))
def test_so_much_of_a_batch_is_reworded(people, batch, part):
    data, generator = replace(people, captions=torch.arange(3).expand(len(people), 3)), torch.Generator().manual_seed(0)
    drawn = [draw(data, torch.arange(batch), generator, FlowConfig(), reworded=part).reworded for _ in range(400)]
    assert len({len(each) for each in drawn}) == 1 and set(torch.cat(drawn).tolist()) <= {0, 1, 2}
    others = sum((each > 0).sum().item() for each in drawn)
    assert others / 400 == pytest.approx(part * batch, abs=0.1)
    assert part < 0.05 or {1, 2} <= set(torch.cat(drawn).tolist())


def test_what_has_one_caption_is_not_reworded_and_nothing_else_is_drawn_for_it(photo, worded):
    one, two = (draw(data, torch.arange(3), torch.Generator().manual_seed(5), FlowConfig(), reworded=1.0) for data in (photo, worded))
    assert len(one.reworded) == 0 and len(two.reworded) == 3
    assert all(torch.equal(a, b) for a, b in zip(one[:-1], two[:-1]))


def test_a_reworded_picture_is_to_change_as_the_base_changes_its_own(base, worded, meta_down):
    rows, config = torch.tensor([0, 1, 2, 1]), FlowConfig()
    halves = [draw(worded, rows, torch.Generator().manual_seed(5), config, Share(rank, 2), reworded=0.75) for rank in (0, 1)]
    drawn = draw(worded, rows, torch.Generator().manual_seed(5), config, reworded=0.75)
    assert [len(half.reworded) for half in halves] == [2, 1] and len(drawn.reworded) == 3
    drawn = drawn._replace(reworded=torch.tensor([2, 0, 1]))
    x, sigma = worded.mean[rows] + worded.std[rows] * drawn.spread, drawn.sigma[:, None, None]
    noisy, told = (1 - sigma) * x + sigma * drawn.noise, torch.tensor([worded.captions[0, 2], worded.captions[1, 0], worded.captions[2, 1], worded.captions[1, 0]])

    def velocity(caption: torch.Tensor, guidance: float) -> torch.Tensor:
        with torch.no_grad():
            return base.velocity(noisy, drawn.sigma, worded.text.rows(caption), worded.image_ids, guidance)

    change = velocity(told, base.settings.guidance) - velocity(worded.caption[rows], base.settings.guidance)
    assert change[0].abs().max() > 0 and change[1].abs().max() < 1e-5
    with attach(base.transformer, meta_down.tensors, meta_down.adapter) as adapter, torch.no_grad():
        adapter.start(torch.Generator().manual_seed(0))
        for p in adapter.ups():
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        wanted = (velocity(told, base.settings.train_guidance) - (drawn.noise - x + change)).square().mean()
        torch.testing.assert_close(loss_of(base, worded, drawn, adapter), wanted)
        parts = sum(loss_of(base, worded, half, adapter) for half in halves)
        torch.testing.assert_close(parts, loss_of(base, worded, draw(worded, rows, torch.Generator().manual_seed(5), config, reworded=0.75), adapter))


def test_a_picture_that_keeps_its_words_costs_a_cpu_nothing_more(base, worded, monkeypatch):
    asked: list[int] = []
    velocity = base.velocity
    monkeypatch.setattr(base, "velocity", lambda tokens, *more: (asked.append(len(tokens)), velocity(tokens, *more))[1])
    drawn = draw(worded, torch.tensor([0, 1, 2, 1]), torch.Generator().manual_seed(5), FlowConfig(), reworded=0.75)
    with torch.no_grad():
        own = loss_of(base, worded, drawn._replace(reworded=drawn.reworded[:0]))
        assert torch.equal(loss_of(base, worded, drawn._replace(reworded=torch.zeros(3, dtype=torch.int64))), own) and asked == [4, 4]
        assert loss_of(base, worded, drawn._replace(reworded=torch.tensor([2, 0, 1]))) != own and asked[2:] == [4, 4]  # two pictures under two captions each, and the batch


def test_pictures_keep_their_captions_when_sets_are_merged_or_chosen_from(photo, worded):
    whole = merge([photo, worded])
    assert whole.captions.shape == (6, 3)
    for data, first in ((photo, 0), (worded, 3)):
        for n in range(3):
            own = min(n, data.captions.shape[1] - 1)
            for one, other in zip(whole.text.rows(whole.captions[first : first + 3, n]), data.text.rows(data.captions[:, own])):
                assert torch.equal(one, other)
    kept = torch.tensor([5, 0])
    for one, other in zip(whole.pictures(kept).text.rows(whole.pictures(kept).captions[:, 2]), whole.text.rows(whole.captions[kept, 2])):
        assert torch.equal(one, other)


def test_tokens_count_as_they_are_weighted(base, photo):
    def loss(weight: torch.Tensor | None, rows: list[int] = [0, 2]) -> float:
        with torch.no_grad():
            return flow_loss(base, replace(photo, weight=weight), torch.tensor(rows), torch.Generator().manual_seed(5), FlowConfig()).item()

    even = torch.full(photo.mean.shape[:2], 0.3)
    assert loss(even) == pytest.approx(loss(None), rel=1e-5)
    left, right = even.clone(), even.clone()
    left[:, ::2], right[:, 1::2] = 0, 0
    assert (loss(left) + loss(right)) / 2 == pytest.approx(loss(None), rel=1e-5) and loss(left) != pytest.approx(loss(right), rel=1e-3)
    halves = [Share(rank, 2) for rank in (0, 1)]
    parts = [flow_loss(base, replace(photo, weight=left), torch.tensor([0, 2]), torch.Generator().manual_seed(5), FlowConfig(), half) for half in halves]
    assert sum(parts).item() == pytest.approx(loss(left), rel=1e-5)


@given(left=st.integers(0, 80), top=st.integers(0, 60), face=st.integers(16, 40), background=st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_the_mask_is_cut_as_the_photo_is_and_counts_the_face_in_full(left, top, face, background):
    box, config = (left, top, left + face, top + face), AdaptConfig(crops=3)
    photo = Image.new("L", (120, 100))
    photo.putpixel((left + face // 2, top + face // 2), 255)
    for cut, mask in zip(crops(photo, box, 64, config), crops(face_mask(photo.size, box, background), box, 64, config)):
        cut, mask = (np.asarray(picture)[..., 0] for picture in (cut, mask))
        assert mask.flat[cut.argmax()] == 255
        assert mask.min() >= 255 * (background - (1 - background) / 3) - 2  # the filter swings below an edge, and twice as far at a corner


def test_a_loss_that_is_no_number_is_a_sentence(base, photo, meta_down):
    broken = replace(photo, mean=photo.mean * float("nan"))
    with attach(base.transformer, meta_down.tensors, meta_down.adapter) as adapter, pytest.raises(MetaLoraError, match="astray"):
        next(fit(base, adapter, broken, [optimizer([(adapter.heads(), 0.1)])], steps=1, batch_size=1,
                 generator=torch.Generator(), flow_config=FlowConfig(), max_grad_norm=1.0))  # fmt: skip


@pytest.mark.parametrize("steps", [1, 4])
def test_losses_that_are_read_late_are_the_same_losses(base, photo, meta_down, steps):
    def losses(late, data=photo):
        with attach(base.transformer, meta_down.tensors, meta_down.adapter) as adapter:
            adapter.start(torch.Generator().manual_seed(0))
            found = list(fit(base, adapter, data, [optimizer([(adapter.heads(), 0.05)])], steps=steps, batch_size=2, late=late,
                             generator=torch.Generator().manual_seed(1), flow_config=FlowConfig(), max_grad_norm=1.0))  # fmt: skip
            return found, adapter.factors()

    (now, learnt), (late, same) = losses(False), losses(True)
    assert late == [now[0], *now[:-1]]
    assert all(torch.equal(a, b) for name in learnt for a, b in zip(learnt[name], same[name]))
    with pytest.raises(MetaLoraError, match="astray"):
        losses(True, replace(photo, mean=photo.mean * float("nan")))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU records")
def test_steps_that_are_played_from_a_recording_are_the_same_steps():
    base = Base.open("miniature", "cuda", plan="resident")
    case = Case(base.settings.train_resolution, base.settings.max_sequence_length, batch=2)
    losses = {}
    for recorded in (False, True):
        with meta_lora(base, random_pictures(base, case), case, recorded=recorded) as steps:
            losses[recorded] = [next(steps) for _ in range(20)]
            steps.close()
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


def test_cudnn_never_meets_two_layouts_of_an_attention_s_gradient(base, monkeypatch):
    """It would take the plan that was made for one of them for the other, and read past its end."""
    attention, alike = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*given, **more):
        output, cudnn = attention(*given, **more), torch.backends.cuda.cudnn_sdp_enabled()
        output.register_hook(lambda grad: alike.append(not cudnn or grad.transpose(1, 2).is_contiguous()))
        return output

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    case = Case(base.settings.train_resolution, 5, batch=2)
    with meta_lora(base, random_pictures(base, case), case) as steps:
        next(steps)
        steps.close()
    config = base.transformer.config
    assert alike == [True] * (config.num_layers + config.num_single_layers)


def test_reports_count_up_and_time_runs_out():
    clock = Clock(3)
    reports = [clock.tick(0.5) for _ in range(3)]
    assert [r.step for r in reports] == [1, 2, 3] and reports[-1].seconds_left == 0 and all(r.steps == 3 for r in reports)


# ---- stage 2


def test_training_lowers_the_loss_on_the_photo(base, photo, meta_down, config):
    def loss(identity=None):
        total = 0.0
        with attach(base.transformer, meta_down.tensors, meta_down.adapter) as adapter, torch.no_grad():
            if identity:
                adapter.load_factors(identity.factors)
            for seed in range(20):
                total += flow_loss(base, photo, torch.arange(3), torch.Generator().manual_seed(seed), FlowConfig()).item()
        return total

    _, identity = run(adapt(base, meta_down, photo, replace(config, steps=40, learning_rate=0.02)))
    assert loss(identity) < 0.98 * loss()


def test_the_same_seed_gives_the_same_identity(base, photo, meta_down, config):
    before = state_hash(base.transformer)
    reports, one = run(adapt(base, meta_down, photo, config))
    torch.randn(7)  # the global random state plays no part
    again, two = run(adapt(base, meta_down, photo, config, preview=lambda: None, preview_every=2))
    _, other = run(adapt(base, meta_down, photo, replace(config, seed=1)))
    assert equal(one.factors, two.factors) and [r.loss for r in reports] == [r.loss for r in again]
    assert one.sha256 == two.sha256 != other.sha256
    assert [r.step for r in reports] == list(range(1, 7)) and (one.steps, one.seed, one.noun) == (6, 0, "woman")
    assert state_hash(base.transformer) == before


def test_the_baseline_is_an_ordinary_lora_and_repeatable(base, photo, config):
    before = state_hash(base.transformer)
    shape = replace(base.settings.adapter, rank=2)
    reports, person = run(adapt_plain(base, shape, "woman", photo, config))
    one, two = (each.to_lora(None) for each in (person, run(adapt_plain(base, shape, "woman", photo, config))[1]))
    assert len(reports) == 6 and all(torch.equal(one[k], two[k]) for k in one)
    assert one["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"].shape == (2, 64)
    assert all(one[k].abs().max() > 0 for k in one if "lora_B" in k)
    assert state_hash(base.transformer) == before


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_stopping_at_any_step_leaves_the_base_as_it_was(base, photo, meta_down, config, stop):
    before = state_hash(base.transformer)
    steps = adapt(base, meta_down, photo, config)
    for _ in range(stop):
        next(steps)
    assert state_hash(base.transformer) != before
    steps.close()
    assert state_hash(base.transformer) == before


def test_previews_come_when_asked_and_after_the_last_step(base, photo, meta_down, config):
    reports, _ = run(adapt(base, meta_down, photo, config, preview=lambda: "picture", preview_every=4))
    assert [r.step for r in reports if r.preview] == [4, 6]


def test_a_meta_down_of_another_base_is_refused(base, photo, meta_down, config):
    with pytest.raises(MetaLoraError, match="learnt on the base"):
        next(adapt(base, replace(meta_down, base_fingerprint="0" * 64), photo, config))


# ---- stage 1


def train_meta(base, people, config=META, **more):
    return meta_train(base, 6, people.select, "woman", config, name="t", **more)


def test_stage_one_changes_down_only_after_the_warm_up(base, people):
    before = state_hash(base.transformer)
    start = make_meta_down(base, base.settings.adapter, seed=META.seed)
    _, held = run(train_meta(base, people, replace(META, warmup_steps=4)))
    reports, free = run(train_meta(base, people))
    assert all(torch.equal(held.tensors[k], start.tensors[k]) for k in start.tensors)
    assert all(not torch.equal(free.tensors[k], start.tensors[k]) for k in start.tensors)
    assert [r.step for r in reports] == list(range(1, 13)) and free.base_fingerprint == base.fingerprint
    assert state_hash(base.transformer) == before


@pytest.mark.parametrize("stop", [1, 4, 6, 11])
def test_stage_one_goes_on_from_a_checkpoint_exactly(base, people, tmp_path, stop):
    _, whole = run(train_meta(base, people))
    broken = train_meta(base, people, folder=tmp_path)
    for _ in range(stop):
        next(broken)
    broken.close()
    reports, resumed = run(train_meta(base, people, folder=tmp_path))
    assert reports[0].step == stop // 4 * 4 + 1 if stop % 4 else True
    assert resumed.sha256 == whole.sha256


def test_stage_one_goes_on_from_another_meta_down(base, people, meta_down, tmp_path):
    """Down, ranks, start and the settings of stage 2 are at first that Meta-Down's, of whatever base of these layers it is."""
    start = {k: (torch.full((r, meta_down.adapter.meta_rank), 0.5), torch.full((n, r), 0.25)) for k, r, n in shapes_of(base, meta_down)}
    before = replace(meta_down, base_fingerprint="0" * 64, start=start, adapt={"steps": 7}, licence="mit")
    _, held = run(train_meta(base, people, replace(META, warmup_steps=4), begin=before))
    assert held.sha256 == before.sha256 and held.adapter == before.adapter and held.adapt == {"steps": 7} and held.licence == "mit"
    assert held.base_fingerprint == base.fingerprint and held.training["began at"] == f"{before.name}, {before.sha256[:8]}"
    assert held.stamp == before.stamp  # without a start rate the start stays, too
    _, moved = run(train_meta(base, people, replace(META, start_rate=0.1), begin=before))
    assert all(not torch.equal(moved.tensors[k], before.tensors[k]) and 0 < (moved.start[k][1] - 0.25).abs().max() < 0.1 for k in start)  # fresh, Up would be 0
    broken = train_meta(base, people, begin=before, folder=tmp_path)
    for _ in range(5):
        next(broken)
    broken.close()
    with pytest.raises(MetaLoraError, match="begin differ"):
        next(train_meta(base, people, begin=meta_down, folder=tmp_path))
    assert run(train_meta(base, people, begin=before, folder=tmp_path))[1].sha256 == run(train_meta(base, people, begin=before))[1].sha256
    with pytest.raises(MetaLoraError, match="learns nothing"):
        next(train_meta(base, people, replace(META, rounds=0, direction_people=3), begin=before))


def shapes_of(base, meta_down):
    """Layer, the rank of people, the outputs of the layer."""
    targets = find_targets(base.transformer, meta_down.adapter.targets)
    return [(name, meta_down.adapter.rank, layer.out_features) for name, layer in targets.items()]


PROCESS = """
import sys, torch
from dataclasses import replace
from metalora.base import Base
from metalora.cache import encode
from metalora.config import MetaConfig
from metalora.meta import meta_train
base = Base.open(sys.argv[1], "cpu")
images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
people = encode(base, images, ["a photo of sks woman"] * 4, [0, 1, 2, 3])
run = meta_train(base, 4, people.select, "woman", MetaConfig(rounds=2, bucket_size=2, bucket_steps=3, warmup_steps=1, batch_size=2, start_rate=0.5), name="t")
while True:
    try:
        report = next(run)
    except StopIteration as end:
        start = [t for pair in end.value.start.values() for t in pair]
        print(report.loss, *(sum(t.abs().sum().item() for t in kind) for kind in (end.value.tensors.values(), start)), end.value.stamp)
        break
"""


@pytest.mark.one_family
def test_several_processes_learn_what_one_does(tiny_base, tmp_path):
    """The same losses, Down and start, to rounding; the two processes hold the very same ones."""
    (_, size, start, sha), (*_, other) = shared = in_processes(2, tmp_path, PROCESS, str(tiny_base))
    (tmp_path / "alone").mkdir()
    (alone,) = in_processes(1, tmp_path / "alone", PROCESS, str(tiny_base))
    assert sha == other
    assert [float(words[0]) for words in shared] == pytest.approx([float(alone[0])] * 2, rel=1e-5)
    assert float(size) == pytest.approx(float(alone[1]), rel=1e-6) and float(start) == pytest.approx(float(alone[2]), rel=1e-4)


def test_a_checkpoint_of_another_training_is_refused(base, people, tmp_path):
    run(train_meta(base, people, replace(META, rounds=1), folder=tmp_path))
    with pytest.raises(MetaLoraError, match="another training .config differ"):
        next(train_meta(base, people, replace(META, seed=4), folder=tmp_path))


def test_a_checkpoint_of_other_people_is_refused(base, people, tmp_path):
    """As many as before, whose photos are others."""
    run(train_meta(base, people, replace(META, rounds=1), folder=tmp_path, digest="these"))
    run(train_meta(base, people, replace(META, rounds=2), folder=tmp_path, digest="these"))
    with pytest.raises(MetaLoraError, match="another training .people differ"):
        next(train_meta(base, people, folder=tmp_path, digest="those"))


APART = """
import torch
from metalora.errors import MetaLoraError
from metalora.processes import here
process = here().join(cpu=True)
process.agree(7, "never said")
try:
    process.agree(process.rank, "They differ")
except MetaLoraError as error:
    print(str(error).replace(" ", "_"))
torch.distributed.destroy_process_group()
"""


@pytest.mark.one_family
def test_processes_that_do_not_see_the_same_say_so(tmp_path):
    assert in_processes(2, tmp_path, APART) == [["They_differ_(they_have_0,_1)."]] * 2


@given(subjects=st.integers(1, 12), size=st.integers(1, 12), seed=st.integers(0, 5))
def test_every_subject_comes_once_in_a_lap_and_never_twice_in_a_bucket(subjects, size, seed):
    size = min(size, subjects)
    buckets = [_members(subjects, size, n, seed) for n in range(subjects)]
    assert all(len(set(b)) == size for b in buckets)
    whole = [s for b in buckets[: subjects // size] for s in b]
    assert len(set(whole)) == len(whole)


def test_stage_one_reads_photos_from_disk(base, tmp_path):
    shown = []
    for i in range(4):
        Image.effect_noise((40, 48), 60).convert("RGB").save(tmp_path / f"{i}.png")
        shown.append(Item(tmp_path / f"{i}.png", "{person} smiling"))
    data = bucket_of_photos(base, [shown[:1], shown[1:3], shown[3:]], "sks woman")([2, 1])
    assert data.subject.tolist() == [0, 1, 1, 0, 1, 1] and len(data.text.embeds) == 1
    assert torch.equal(data.text.embeds, base.encode_prompts(["sks woman smiling"]).embeds)


def test_stage_one_can_learn_faces_more_than_what_lies_outside_them(base, tmp_path, monkeypatch):
    Image.effect_noise((32, 32), 60).convert("RGB").save(tmp_path / "0.png")
    finder, item = FaceFinder.of(base.settings), Item(tmp_path / "0.png", "{person}")
    found = iter([[Face((0.0, 0.0, 14.0, 14.0), np.zeros((5, 2)), 1.0, np.zeros(512))], []])
    monkeypatch.setattr(finder, "detect", lambda image: next(found))
    with_face, without = (bucket_of_photos(base, [[item]], "sks woman", finder, 0.2)([0]) for _ in range(2))
    upright, mirrored = with_face.weight.view(2, *2 * [round(with_face.weight.shape[1] ** 0.5)])
    assert upright[0, 0] > 0.9 and upright[-1, -1].item() == pytest.approx(0.2, abs=0.01)
    torch.testing.assert_close(mirrored, upright.flip(-1))
    torch.testing.assert_close(without.weight, torch.full_like(without.weight, 0.2))
    assert bucket_of_photos(base, [[item]], "sks woman")([0]).weight is None


def test_stage_one_is_judged_on_people_who_were_kept_out(base, people):
    """As often as asked, always by the same draws, and without a trace in what is learnt."""
    unseen = people.select([4]).pictures(torch.tensor([0, 1])), people.select([4]).pictures(torch.tensor([2]))
    config = replace(META, validation_every=2, validation_steps=3)
    reports, judged = run(meta_train(base, 4, people.select, "woman", config, name="t", unseen=unseen))
    _, alone = run(meta_train(base, 4, people.select, "woman", config, name="t"))
    found = [report.validation for report in reports]
    assert [value is not None for value in found] == [step == 8 for step in range(1, 13)] and judged.sha256 == alone.sha256
    again, _ = run(meta_train(base, 4, people.select, "woman", config, name="t", unseen=unseen))
    assert [report.validation for report in again] == found
    of_directions = replace(config, rounds=0, direction_people=3)  # nothing is trained, but what people can learn with it is judged all the same
    reports, judged = run(meta_train(base, 4, people.select, "woman", of_directions, name="t", unseen=unseen))
    _, alone = run(meta_train(base, 4, people.select, "woman", of_directions, name="t"))
    assert [r.step for r in reports] == [1, 2, 3, 4] and reports[-1].steps == 4 and judged.sha256 == alone.sha256
    assert [r.validation is not None for r in reports] == [False] * 3 + [True] and abs(reports[-1].validation - found[7]) < 1


def test_stage_one_without_subjects_is_a_sentence(base, people):
    with pytest.raises(MetaLoraError, match="no subject"):
        next(meta_train(base, 0, people.select, "woman", META, name="t"))
