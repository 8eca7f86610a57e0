"""Encode images and prompts once, keep the result on disk, and read it back during training."""

from .encodings import EncodingCache, encode_batch, encode_images
from .filling import Workers
from .references import ReferenceErrors

__all__ = ["EncodingCache", "ReferenceErrors", "Workers", "encode_batch", "encode_images"]
