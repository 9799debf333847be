"""The bitwise visual tokenizer: an image into bits, coarse to fine, and back."""

__version__ = "0.1.0"

from bitvae import bitstream, checkpoints  # add methods to Bits and BitVAE  # noqa: F401
from bitvae.bits import Bits, BitsError
from bitvae.images import load_image, save_image, show_images
from bitvae.tokenizer import BitVAE, BitVAEConfig

__all__ = ["Bits", "BitsError", "BitVAE", "BitVAEConfig", "load_image", "save_image", "show_images"]
