"""`python -m metalora.miniature world-check`: what is trained on photographs, tried on the portrait world.

The detector is MTCNN of facenet-pytorch, the recogniser dlib's. Both come with their weights:

    pip install --no-deps facenet-pytorch==2.6.0 face_recognition_models==0.3.0 dlib-bin==20.0.1.post1 && pip install "setuptools<81" torchvision==0.28.0

With `--pack` it is the miniature's own detector and recogniser, as InsightFace runs them, that are tried on people they never saw.

Hair, glasses, hats, clothes, light and place are drawn anew for every picture, so that faces alone tell the people apart.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metalora.errors import MetaLoraError
from metalora.face import FaceFinder
from metalora.miniature.facepack import auc, identification
from metalora.miniature.people import HELD_OUT, Person, Scene, person, scene, seeds
from metalora.miniature.render import render

SEEN_AT = 384  # px: both expect faces larger than those of small pictures
INSTALL = __doc__.split("\n\n")[2].strip()


class PhotoTools:
    """A detector and a recogniser that were trained on photographs."""

    def __init__(self) -> None:
        try:
            import dlib
            import face_recognition_models as models
            from facenet_pytorch import MTCNN
        except ImportError as error:
            raise MetaLoraError(f"world-check needs {error.name}, which is not installed: {INSTALL}") from error
        self.detector = MTCNN(min_face_size=20, post_process=False)
        self.landmarks = dlib.shape_predictor(models.pose_predictor_five_point_model_location())
        self.recogniser = dlib.face_recognition_model_v1(models.face_recognition_model_location())
        self.rectangle = dlib.rectangle

    def embed(self, picture: Image.Image) -> np.ndarray | None:
        """The embedding (128,) of the largest face in a picture; None where no face is found."""
        large = np.asarray(picture.resize((SEEN_AT, SEEN_AT), Image.Resampling.BICUBIC))
        boxes, _ = self.detector.detect(Image.fromarray(large))
        if boxes is None:
            return None
        shape = self.landmarks(large, self.rectangle(*(int(v) for v in boxes[0])))
        return np.array(self.recogniser.compute_face_descriptor(large, shape))


def check(tools: PhotoTools | FaceFinder, people: range, scenes: int, size: int) -> dict[str, Any]:
    """Share of faces found, and how well embeddings tell the people apart: `identification`, and the harder `nearest_is_the_same`, among all the other pictures."""
    faces, persons, pictures = [], [], 0
    for seed in people:
        for image in render([shuffled(person(seed), k) for k in range(scenes)], size)[0]:
            pictures += 1
            if (face := tools.embed(Image.fromarray(image.permute(1, 2, 0).numpy()))) is not None:
                faces.append(face)
                persons.append(seed)
    who = np.array(persons)
    apart = np.linalg.norm(np.stack(faces)[:, None] - np.stack(faces)[None], axis=-1)
    same = np.equal.outer(who, who)
    known = identification(-apart, who)
    above = np.triu(np.ones_like(same), 1)
    mine, others = apart[same & above], apart[~same & above]
    np.fill_diagonal(apart, np.inf)
    return {"pictures": pictures, "people": len(people), "found": round(len(faces) / pictures, 4),
            "auc": round(auc(-mine, -others), 4),
            **known, "nearest_is_the_same": round(float((who[apart.argmin(1)] == who).mean()), 4),
            "distance": {"same": round(float(mine.mean()), 3), "others": round(float(others.mean()), 3)}}


def shuffled(who: Person, number: int) -> tuple[Person, Scene]:
    """A photo of somebody with nothing of what they usually wear."""
    return who, dataclasses.replace(scene(who, number, usual_looks=0.0), style="photo")


def main(arguments: list[str]) -> None:
    """`python -m metalora.miniature world-check`: see --help."""
    parser = argparse.ArgumentParser(prog="python -m metalora.miniature world-check", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", default=f"{HELD_OUT + 400}:{HELD_OUT + 464}", metavar="FIRST:END", help="seeds (%(default)s)")
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="a face pack to try in the place of what was trained on photographs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    tools = FaceFinder(given.pack, given.size) if given.pack else PhotoTools()
    found = check(tools, seeds(given.people), given.scenes, given.size)
    print(json.dumps(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
