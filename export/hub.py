"""Where a checkpoint comes from: a local folder, or the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from meiqa.errors import PackageNotFound

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ("*.json", "*.safetensors")
"""Never code, never pickled weights."""


def local_folder(checkpoint: str) -> Path:
    """The folder of a checkpoint, downloaded if it is a hub id.

    Raises:
        PackageNotFound: there is no such folder, and nothing of that name can be downloaded.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(checkpoint):
        raise PackageNotFound(
            "there is no such checkpoint",
            seen=checkpoint,
            allowed="a folder, or a hub id like Qwen/Qwen2.5-VL-3B-Instruct",
        )
    try:
        return Path(snapshot_download(checkpoint, allow_patterns=list(WANTED)))
    except (HFValidationError, OSError) as error:
        raise PackageNotFound(
            f"{checkpoint} is no local folder and can't be downloaded",
            seen=str(error).splitlines()[0].removeprefix("Got: "),
            hint="check its name and the network, or download it and give the folder",
        ) from error
