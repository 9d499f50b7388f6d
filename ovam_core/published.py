"""The paper's own tokens: 20 classes of Pascal VOC for Stable Diffusion 1.5, published beside the authors' code (MIT).

One file of 63 kB holds them all. It is fetched when the first of them is asked for, checked by its SHA-256 and kept in
the user's cache (huggingface_hub's, which HF_HOME and HF_ASSETS_CACHE move); what is kept is checked at each reading.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from ovam_core.errors import InputError
from ovam_core.io.files import write_atomically
from ovam_core.io.token_files import MAX_BYTES, last_part
from ovam_core.models.presets import DEFAULT_HUB_MODEL
from ovam_core.tokens import Token, folder_for, import_file, save_all

URL = "https://raw.githubusercontent.com/vpulab/ovam/main/docs/assets/tokens_VOC.npy"
SHA256 = "532f05423bedaf3c2c227bfdbedab0746bccf5e52e6f7f007cda097a322a51cc"
TIMEOUT = 30.0  # seconds of silence
MAX_SECONDS = 120.0  # of the whole download

NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv"),
)


class Named(Protocol):
    """OVAM, or what else has the name of a model."""

    @property
    def name(self) -> str: ...


def published_names(ovam: Named) -> list[str]:
    """The classes that the paper published tokens of for this model, without a network; none for most models."""
    return list(NAMES) if last_part(ovam.name) == last_part(DEFAULT_HUB_MODEL) else []


def published_token(ovam: Named, name: str, *, cache: str | Path | None = None, url: str = URL) -> Token:
    """The published token of a class; fetched, if the cache does not hold it yet.

    cache: folder to keep the file in, None for the user's. Raises InputError, one sentence, for a name that is not
    among `published_names`, without a network, and for a download that is not the file that was published.
    """
    names = published_names(ovam)
    if name not in names:
        listed = f"choose among {', '.join(names)}" if names else f"there are some for {DEFAULT_HUB_MODEL}"
        raise InputError(f"There is no published token '{name[:40]}' for {ovam.name}: {listed}.")
    for token in published_tokens(cache, url):
        if token.names == (name,):
            return token
    raise InputError(f"The published file holds no token '{name}'.")


def fetch_voc_sd15(folder: str | Path | None = None, *, cache: str | Path | None = None, url: str = URL) -> list[Path]:
    """All of them as token files in a folder, default `folder_for` Stable Diffusion 1.5; returns the files. Raises
    InputError as `published_token`, and before any is written where another token lies there under a name of theirs.
    """
    return save_all(published_tokens(cache, url), folder or folder_for(DEFAULT_HUB_MODEL))


def published_tokens(cache: str | Path | None = None, url: str = URL) -> list[Token]:
    """All of them. They were found on the other half of the guided batch than the paper says, hence their branch."""
    data = _kept(cache, url)
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "tokens_VOC.npy"
        file.write_bytes(data)
        return import_file(file, DEFAULT_HUB_MODEL, branch="unconditional", steps=30)


def _kept(cache: str | Path | None, url: str) -> bytes:
    """The published file out of the cache, or fetched and kept there. A cache that cannot be written holds nothing."""
    from huggingface_hub import cached_assets_path

    data = None
    with suppress(OSError):
        folder = Path(cache) if cache is not None else cached_assets_path("ovam", "tokens")
        file = folder / "tokens_VOC.npy"
        if file.is_file() and _is_published(kept := file.read_bytes()):
            return kept
        data = _fetched(url)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, data)
    return _fetched(url) if data is None else data


def _fetched(url: str) -> bytes:
    """What lies there, if it is the published file. Raises InputError for all else."""
    import httpx

    begun, data = time.monotonic(), bytearray()
    try:
        with httpx.stream("GET", url, timeout=TIMEOUT, follow_redirects=True) as answer:
            answer.raise_for_status()
            for part in answer.iter_bytes():
                data += part
                if len(data) > MAX_BYTES:
                    break
                if time.monotonic() - begun > MAX_SECONDS:
                    raise httpx.ReadTimeout("it takes too long")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(f"The published tokens cannot be fetched from {url} ({reason}); is there a network?") from None
    if not _is_published(bytes(data)):
        raise InputError(f"What came from {url} is not the file that was published; nothing was imported.")
    return bytes(data)


def _is_published(data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == SHA256
