"""Any picture a user may hand in → an upright RGB picture, or one sentence that says what is wrong with it."""

from __future__ import annotations

import io
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from .errors import MetaLoraError

LEAST_SIDE = 16  # px; below, no face can be made out
MOST_PIXELS = 120_000_000  # width times height in the file's header; more is not decoded
WORKING_SIDE = 4096  # px; longer sides are scaled down to it, so that what follows stays quick
# Only these decoders are let near a file: some of Pillow's others start programs (EPS) or read further files. MPO comes with JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF", "HEIF")
ADVICE = "give a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC picture"
# What Pillow raises on files that are cut off, damaged or made to harm.
FAULTS = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, MemoryError, OverflowError, struct.error, RuntimeError)


def load_photo(source: Any) -> Image.Image:
    """An upright RGB picture from a path, bytes, a PIL picture or an array (height, width[, 1, 3 or 4]).

    Turned as its EXIF says, wide-gamut and CMYK colours to sRGB, 16 bits to 8 by scaling, transparency onto white, the first
    frame of an animation, sides over 4096 px scaled down. Arrays are uint8, uint16 or floats in [0, 1].
    Raises MetaLoraError for what is no picture, damaged, too small, or too large to be decoded safely.
    """
    name = Path(source).name if isinstance(source, str | os.PathLike) else "The picture"
    if isinstance(source, np.ndarray):
        image = _from_array(source)
    elif isinstance(source, Image.Image):
        image = source
    else:
        image = _open(_read(source), name)
    _check_size(image.size, name)
    if min(image.size) * WORKING_SIDE < max(image.size) * LEAST_SIDE:
        raise MetaLoraError(f"{name} is {image.width}x{image.height} px, too long and thin to show a face; cut it to what is to be seen.")
    return _decode(image, name)


def _read(source: Any) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if not isinstance(source, str | os.PathLike):
        raise MetaLoraError(f"A {type(source).__name__} is no picture; {ADVICE}.")
    path = Path(source).expanduser()
    if path.is_dir():
        raise MetaLoraError(f"{path} is a folder; give a picture file in it.")
    if not path.is_file():
        raise MetaLoraError(f"There is no picture {path}; check the name.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise MetaLoraError(f"{path} cannot be read ({error.strerror}); check who may read it.") from error


def _open(data: bytes, name: str) -> Image.Image:
    """Read the header only."""
    if not data:
        raise MetaLoraError(f"{name} is empty; copy it again from where it comes.")
    heif = _register_heif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have a limit of our own
            return Image.open(io.BytesIO(data), formats=[f for f in FORMATS if f != "HEIF" or heif])
    except Image.DecompressionBombError as error:
        raise MetaLoraError(f"{name} is too large to be opened safely; scale it down to less than {MOST_PIXELS // 10**6} megapixels.") from error
    except UnidentifiedImageError as error:
        if data[4:8] == b"ftyp" and not heif:
            raise MetaLoraError(f"{name} is a HEIC picture, which needs the package pillow-heif; install it, or save the picture as JPEG.") from error
        raise MetaLoraError(f"{name} is not a picture that can be read; {ADVICE}.") from error
    except FAULTS as error:
        raise _damaged(name) from error


def _register_heif() -> bool:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _damaged(name: str) -> MetaLoraError:
    return MetaLoraError(f"{name} is cut off or damaged; copy it again from where it comes.")


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if min(size) < LEAST_SIDE:
        raise MetaLoraError(f"{name} is {width}x{height} px, too small to show a face; give a picture of at least {LEAST_SIDE} px each side, better 512.")
    if width * height > MOST_PIXELS:
        raise MetaLoraError(f"{name} is {width}x{height} px, too large to be opened safely; scale it down to less than {MOST_PIXELS // 10**6} megapixels.")


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        if image.format in ("JPEG", "MPO"):
            image.draft(None, (WORKING_SIDE, WORKING_SIDE))  # a large JPEG is decoded at half, a quarter or an eighth at once
        if getattr(image, "is_animated", False):
            image.seek(0)
        image.load()
        image = _to_srgb(_onto_white(_upright(image)))
    except FAULTS as error:
        raise _damaged(name) from error
    if max(image.size) > WORKING_SIDE:
        image.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.LANCZOS)
    image.info = {}
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except FAULTS:  # damaged EXIF: the pixels are worth more than the tag
        return image.copy()


def _onto_white(image: Image.Image) -> Image.Image:
    """Lay what is transparent onto white; the colour profile stays."""
    if not image.has_transparency_data:
        return image
    profile = image.info.get("icc_profile")
    rgba = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if profile:
        flat.info["icc_profile"] = profile
    return flat


def _to_srgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass  # a broken profile, or one of another mode: the plain conversion is close
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale numbers of more than 8 bits to 0 … 255; Pillow itself would clip them.

    Integers count as 16 bits. Floats are taken as [0, 1], as [0, 255] or as [0, their maximum], the first that holds them.
    """
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0) if values.dtype.kind == "f" else values
    top = values.max(initial=0)
    if values.dtype.kind == "f":
        full = 1.0 if top <= 1 else max(255.0, float(top))
    else:
        full = max(65535.0, float(top))
    return np.clip(np.rint(values / full * 255), 0, 255).astype(np.uint8)


def _from_array(values: np.ndarray) -> Image.Image:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)) or values.dtype.kind not in "uif" or 0 in values.shape:
        raise MetaLoraError(f"An array of shape {values.shape} and type {values.dtype} is no picture; give (height, width, 3) of uint8.")
    return Image.fromarray(np.ascontiguousarray(values if values.dtype == np.uint8 else _to_8_bits(values)))
