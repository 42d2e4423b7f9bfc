"""A picture of a sample, opened when it is looked at."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

__all__ = ["DataError", "Picture"]


class DataError(ValueError):
    """A file of samples cannot be used; the message names the file, the sample and what was expected."""


@dataclass(frozen=True)
class Picture:
    """Where a picture is: a file, or the bytes of one.  ``np.asarray`` gives ``uint8 [height, width, 3]``.

    Attributes:
        source: path or bytes.
        where: file and sample that name the picture, for messages.
    """

    source: Path | bytes = field(repr=False)
    where: str

    @classmethod
    def of(cls, held: Any, where: str, root: Path) -> Picture:
        """The picture that a record holds: a path below ``root``, bytes, ``{"bytes": ...}`` or a data URL.

        ``root`` is resolved; nothing outside it is read, and nothing is downloaded.

        Raises:
            DataError: none of these.
        """
        if isinstance(held, Mapping):
            held = held["bytes"] if held.get("bytes") else held.get("path")
        if isinstance(held, bytes):
            return cls(held, where)
        if not isinstance(held, str):
            raise DataError(f"{where}: a picture is {type(held).__name__}; expected a path, bytes or a data URL")
        if held.startswith("data:"):
            try:
                return cls(base64.b64decode(held.partition(",")[2], validate=True), where)
            except binascii.Error:
                raise DataError(f"{where}: a picture's data URL is not base64") from None
        if held.startswith(("http://", "https://")):
            raise DataError(f"{where}: a picture is a web address; nothing is downloaded, put the file beside the data")
        path = (root / held.removeprefix("file://")).resolve()
        if root not in path.parents:
            raise DataError(f"{where}: the picture '{held}' lies outside {root}")
        return cls(path, where)

    def check(self) -> Picture:
        """Itself.

        Raises:
            DataError: its file is not there.
        """
        if isinstance(self.source, Path) and not self.source.is_file():
            raise DataError(f"{self.where}: no picture at {self.source}")
        return self

    def fingerprint(self) -> bytes:
        """Of a file its name and its size (-1: not there); else a digest of the bytes."""
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).digest()
        size = self.source.stat().st_size if self.source.is_file() else -1
        return f"{self.source.name} {size}".encode()

    def open(self) -> Image.Image:
        """The picture in RGB.

        Raises:
            DataError: no file there, or no picture in it.
        """
        data = self.source if isinstance(self.source, bytes) else self.check().source.read_bytes()  # type: ignore[union-attr]
        try:
            return Image.open(io.BytesIO(data)).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{self.where}: a picture cannot be read ({error})") from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # it is always a new one
        return np.asarray(self.open(), dtype=dtype)
