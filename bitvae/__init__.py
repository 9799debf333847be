"""The bitwise visual tokenizer: an image into bits, coarse to fine, and back."""

__version__ = "0.1.0"

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitvae.bits import Bits, BitsError
    from bitvae.config import BitVAEConfig
    from bitvae.images import load_image, save_image, show_images
    from bitvae.tokenizer import BitVAE

__all__ = ["Bits", "BitsError", "BitVAE", "BitVAEConfig", "load_image", "save_image", "show_images"]
MODULES = {"Bits": "bits", "BitsError": "bits", "BitVAE": "tokenizer", "BitVAEConfig": "config",
           "load_image": "images", "save_image": "images", "show_images": "images"}


def __getattr__(name: str) -> object:
    "Import a name or a module on first use, so that `bitvae --help` does not wait for PyTorch."
    if name in MODULES:
        return getattr(import_module(f"bitvae.{MODULES[name]}"), name)
    if find_spec(f"bitvae.{name}"):
        return import_module(f"bitvae.{name}")
    raise AttributeError(f"module 'bitvae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
