"""The person in a prompt, and settings files."""

from __future__ import annotations

import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalora import MetaLoraError
from metalora.config import AdaptConfig, BaseSettings, overlay
from metalora.prompts import Caption, fill, mirrored


def test_the_person_stands_where_the_prompt_says_or_in_front():
    assert fill("a photo of {person} in a cap", "sks woman") == "a photo of sks woman in a cap"
    assert fill("in a red cap", "sks man") == "sks man, in a red cap"
    assert fill("a park", "") == "a park"


@given(st.text().filter(str.strip))
def test_any_prompt_gets_the_person_and_no_place_is_left(prompt):
    filled = fill(prompt, "sks woman")
    assert "sks woman" in filled and "{person}" not in filled.replace("sks woman", "")


@given(st.text(alphabet=" ,leftrigh"))
def test_a_mirror_seen_in_a_mirror_is_the_picture(text):
    assert mirrored(mirrored(text)) == text
    assert mirrored("looking left, bright, right") == "looking right, bright, left"


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(prompt):
    with pytest.raises(MetaLoraError, match="empty"):
        fill(prompt, "sks woman")


def test_settings_come_from_the_file_beside_the_base(tmp_path):
    (tmp_path / "face").mkdir()
    folder = tmp_path / "base"
    folder.mkdir()
    assert BaseSettings.load(folder) == BaseSettings()
    values = {"resolution": 96, "guidance": 1, "adapter": {"rank": 2}, "face_pack": "../face", "caption_phrases": [["a", "b"]]}
    (folder / "metalora.json").write_text(json.dumps(values))
    got = BaseSettings.load(folder)
    assert (got.resolution, got.train_resolution, got.guidance, got.adapter.rank, got.adapter.meta_rank) == (96, 96, 1.0, 2, 16)
    assert got.face_pack == str((tmp_path / "face").resolve()) and got.caption_phrases == (("a", "b"),)
    for text, words in (("{", "not valid JSON"), ("[]", "one JSON object"), ('{"ranks": 1}', "no setting named ranks"), ('{"resolution": "x"}', "must be a int"),
                        ('{"adapt": {"ema": 1}}', "adapt in .* stage 2 is out of range"), ('{"meta": {"start_rate": 2}}', "meta in .* stage 1 is out of range")):
        (folder / "metalora.json").write_text(text)
        with pytest.raises(MetaLoraError, match=words):
            BaseSettings.load(folder)


def test_an_overlay_changes_what_it_names_only():
    got = overlay(AdaptConfig(), {"steps": 9, "flow": {"logit_mean": 1}})
    assert got.steps == 9 and got.flow.logit_mean == 1.0 and got.flow.logit_std == AdaptConfig().flow.logit_std
    assert overlay(AdaptConfig(), {}) == AdaptConfig()


GROUPS = [["smiling", "sad"], [f"in place {n}" for n in range(9)]]


def test_a_caption_is_reworded_in_one_group_at_a_time():
    caption = Caption("a photo of sks woman").saying("smiling", GROUPS[0]).saying("in place 3", GROUPS[1])
    assert str(caption) == "a photo of sks woman, smiling, in place 3"
    found = [str(other) for other in caption.reworded(4, random.Random(0))]
    assert len(set(found)) == len(found) == 5 and str(caption) not in found
    assert found[0] == "a photo of sks woman, sad, in place 3" and all(re.fullmatch(r"a photo of sks woman, smiling, in place [0-24-8]", text) for text in found[1:])
    assert found == [str(other) for other in caption.reworded(4, random.Random(0))] != [str(other) for other in caption.reworded(4, random.Random(1))]
