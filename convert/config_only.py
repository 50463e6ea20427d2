"""A model's configuration without its weights."""

from pathlib import Path

from convert import hub
from convert.gguf_config import check_metadata, read_config
from convert.gguf_file import read_gguf
from convert.hf_config import FILE, read_hf_config
from svsk_jax.config_limits import check_config
from svsk_jax.json_data import read_json_object
from svsk_jax.known_models import KNOWN
from svsk_jax.model.config import ModelConfig


def open_config(model: str, *, revision: str | None = None) -> ModelConfig:
    """The configuration of a model: a folder with a config.json, a .gguf file, a name in
    `known_models.KNOWN`, or else a hub id at `revision`, of which only config.json is fetched. Weights
    are not read and need not be there.

    Raises:
        ValueError: nothing there, or a configuration that is damaged or of an unknown architecture.
        NotImplementedError: a variant of a known architecture that the decoder lacks.
        ConnectionError: a hub id, not cached, and the hub cannot be reached.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        file = read_gguf(path)
        try:
            check_metadata(file.metadata)
            return check_config(read_config(file.metadata, file.tensors), "its metadata")
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{path}: {error}") from error
    if path.is_dir():
        return _read(path)
    if model in KNOWN:
        return KNOWN[model]
    if path.exists() or not hub.is_hub_id(model):
        raise ValueError(
            f"--model {model}: expected a folder with a {FILE}, a .gguf file, a hub id, or one of "
            f"{', '.join(KNOWN)}"
        )
    return _read(hub.fetch_config(model, revision))


def _read(folder: Path) -> ModelConfig:
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{folder}: no {FILE}; copy the model's there")
    raw = read_json_object(path, "download it again")
    try:
        return read_hf_config(raw)
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{folder}: {error}") from error
