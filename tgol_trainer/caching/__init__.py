"""Encode images and prompts once, keep the result on disk, and read it back during training."""

from .encodings import EncodingCache, Workers, encode_batch

__all__ = ["EncodingCache", "Workers", "encode_batch"]
