"""Open a checkpoint wherever it is: a local folder or file, or a model on the hub."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from convert import hub
from convert.checkpoint import Checkpoint
from convert.gguf_config import check_metadata, generation_config, hf_config, read_config
from convert.gguf_file import read_gguf
from convert.gguf_tokenizer import gguf_tokenizer
from convert.hf_config import read_hf_config
from convert.names import match_tensors
from convert.safetensors_source import read_safetensors
from convert.tensors import RawTensor
from convert.torch_source import read_torch
from svsk_jax.config_limits import check_config
from svsk_jax.json_data import read_json_object, shown
from svsk_jax.tokenizer_files import load_tokenizer

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
AGAIN = "download it again"
MAX_NAME = 255
"""Of a file, in most file systems."""
SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")


def open_checkpoint(model: str, *, revision: str | None = None) -> Checkpoint:
    """Open a model: a folder, a single .safetensors, .bin, .pt or .gguf file, or else a hub id at `revision`.

    Reads configuration and headers only and checks every tensor's name and shape; values are read when
    asked for.

    Raises:
        ValueError: nothing there, damaged or incomplete files, or tensors that do not fit the configuration.
        ConnectionError: a hub id, not cached, and the hub cannot be reached.
        NotImplementedError: a variant of a known architecture that the decoder lacks.
    """
    path = Path(model).expanduser()
    if path.exists():
        return _open_path(path, str(path))
    if path.suffix in SUFFIXES or not hub.is_hub_id(model):
        raise ValueError(f"{model}: no such file or folder, and not the form of a hub id (owner/name)")
    folder = hub.fetch(model, revision)
    return _open_path(folder, f"{model}@{folder.name[:12]}")


def _open_path(path: Path, description: str) -> Checkpoint:
    if path.is_dir():
        found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
        ggufs = sorted(path.glob("*.gguf"))
        if found is not None:
            return _open_hf(path, found, description)
        if len(ggufs) == 1:
            return _open_gguf(ggufs[0], description)
        several = f"; it has {', '.join(file.name for file in ggufs)}: give the path of one" if ggufs else ""
        raise ValueError(
            f"{path}: no weights; looked for {', '.join(WEIGHT_FILES)} and one .gguf file{several}"
        )
    if path.suffix == ".gguf":
        return _open_gguf(path, description)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a folder or a file ending in {', '.join(SUFFIXES)}")
    return _open_hf(path, path, description)


def _open_gguf(path: Path, description: str) -> Checkpoint:
    file = read_gguf(path)
    try:
        check_metadata(file.metadata)
        config = check_config(read_config(file.metadata, file.tensors), "its metadata")
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{path}: {error}") from error
    permuted = file.metadata["general.architecture"] == "llama"
    return Checkpoint(
        description=description,
        path=path,
        files=(path,),
        config=config,
        hf_config=hf_config(config, file.metadata),
        generation_config=generation_config(file.metadata),
        sources=match_tensors(file.tensors, config, "gguf", where=str(path), permuted=permuted),
        load_tokenizer=lambda: gguf_tokenizer(file.metadata, where=str(path)),
    )


def _open_hf(path: Path, weights: Path, description: str) -> Checkpoint:
    folder = weights.parent
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: no config.json beside {weights.name}; copy the model's config.json there"
        )
    raw = read_json_object(folder / "config.json", AGAIN)
    method = raw.get("quantization_config")
    if method:
        name = method.get("quant_method", "unknown method") if isinstance(method, Mapping) else method
        raise ValueError(
            f"{folder}: config.json has quantization_config ({name}): the checkpoint is already quantized; "
            "convert from the unquantized one"
        )
    try:
        config = read_hf_config(raw)
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{folder}: {error}") from error
    expected = _read_index(weights) if weights.name.endswith(".index.json") else None
    files = sorted({folder / shard for shard in expected.values()}) if expected is not None else [weights]
    if ".safetensors" in weights.name:
        placed = [(file, tensor) for file in files for tensor in read_safetensors(file)]
    else:
        placed = read_torch(files)
    if expected is not None:
        _check_index(weights, expected, placed)
    generation = folder / "generation_config.json"
    tokens = {
        key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(key) is not None
    }
    return Checkpoint(
        description=description,
        path=path,
        files=tuple(files),
        config=config,
        hf_config=raw,
        generation_config=read_json_object(generation, AGAIN) if generation.is_file() else tokens,
        sources=match_tensors((tensor for _, tensor in placed), config, "hf", where=str(path)),
        load_tokenizer=lambda: load_tokenizer(folder),
    )


def _read_index(path: Path) -> dict[str, str]:
    """Shard file by tensor name; every shard lies in the index's own folder and is there."""
    shards = read_json_object(path, AGAIN).get("weight_map")
    if (
        not isinstance(shards, dict)
        or not shards
        or not all(isinstance(name, str) for name in shards.values())
    ):
        raise ValueError(f"{path}: expected an object under weight_map; download it again")
    for name in sorted(set(shards.values())):
        # A backslash is a separator on Windows only, and in no honest shard's name.
        if Path(name).name != name or "\\" in name or name == ".." or len(name) > MAX_NAME:
            raise ValueError(
                f"{path}: shard {shown(name)} is not a file name in the same folder; do not trust this model"
            )
        if not (path.parent / name).is_file():
            raise ValueError(f"{path}: shard {name} is missing from {path.parent}; download it")
    return shards


def _check_index(path: Path, expected: Mapping[str, str], placed: Iterable[tuple[Path, RawTensor]]) -> None:
    found = {(tensor.name, file.name) for file, tensor in placed}
    lost = [f"{name} in {shard}" for name, shard in expected.items() if (name, shard) not in found]
    if lost:
        more = f", ... and {len(lost) - 20} more" if len(lost) > 20 else ""
        raise ValueError(
            f"{path}: its shards lack {len(lost)} tensors: {', '.join(lost[:20])}{more}; download them again"
        )
