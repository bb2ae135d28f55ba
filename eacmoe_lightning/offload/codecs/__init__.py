"""Tensors as compressed, checksummed records: one interface for all codecs."""

from eacmoe_lightning.offload.codecs import bounded, entropy, lossless, nvcomp, packed  # noqa: F401  (they register themselves)
from eacmoe_lightning.offload.codecs.base import CODECS, Codec, codec, codec_of, decode
from eacmoe_lightning.offload.codecs.bound import Bound, max_error
from eacmoe_lightning.offload.codecs.packed import decode_packed
from eacmoe_lightning.offload.codecs.record import Header, RecordError, read_header

__all__ = [
    "CODECS",
    "Bound",
    "Codec",
    "Header",
    "RecordError",
    "codec",
    "codec_of",
    "decode",
    "decode_packed",
    "max_error",
    "read_header",
]
