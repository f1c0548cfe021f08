"""Images from disk: decoded to RGB, whole, and known by what they show.

An image's digest is of its decoded pixels, so that the same picture under another name, or compressed without loss by
another program, is recognised; promise 9 of no leakage rests on it.
"""

import hashlib
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from vlmq.exporter.errors import VlmqError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def open_image(path: Path) -> Image.Image:
    """The decoded image in RGB; VlmqError where it is missing, cut short, no image, or larger than PIL deems safe."""
    try:
        with warnings.catch_warnings():
            # PIL only warns of what may be a decompression bomb of up to twice its limit; a line of its own is kinder.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.convert("RGB")
    except FileNotFoundError:
        raise VlmqError(f"{path}: no such image; check the path") from None
    except UnidentifiedImageError:
        raise VlmqError(f"{path}: not an image that PIL can read; replace or remove it") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise VlmqError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale the image down") from None
    except (OSError, SyntaxError, ValueError) as fault:  # what PIL's decoders raise for cut or garbled files
        raise VlmqError(f"{path}: damaged image ({_one_line(fault)}); replace or remove it") from None


def digest(path: Path) -> str:
    """SHA-256, in hexadecimal, of the size and the RGB pixels."""
    image = open_image(path)
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()


def _one_line(fault: BaseException) -> str:
    return " ".join(str(fault).split()) or type(fault).__name__
