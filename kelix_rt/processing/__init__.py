"""Inputs: images to patches, messages to token ids, and token ids back to text."""

from kelix_rt.processing.chat import ChatProcessor, EncodedPrompt, PositionMarkers, SpecialIds
from kelix_rt.processing.images import ImageProcessor
from kelix_rt.processing.sources import ImageSource, load_image
from kelix_rt.processing.text import StreamDecoder, TextTokenizer

__all__ = [
    "ChatProcessor",
    "EncodedPrompt",
    "ImageProcessor",
    "ImageSource",
    "PositionMarkers",
    "SpecialIds",
    "StreamDecoder",
    "TextTokenizer",
    "load_image",
]
