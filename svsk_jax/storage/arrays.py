"""One orbax checkpoint of named parameters. Its custom metadata hold a description of each (`tensors`) and a
SHA-256 of each (`sha256`), from which it is restored and checked."""

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding

from svsk_jax.parallel.parameters import leaf_sharding
from svsk_jax.storage.durable import rename, sync_tree
from svsk_jax.storage.packing import abstract, describe, from_plain, to_plain


def _checkpointer() -> ocp.Checkpointer:
    """One that does not wait for other processes: the first writes by itself, each reads by itself."""
    here = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=here,
        active_processes={here} if jax.process_count() > 1 else None,
        barrier_sync_key_prefix=str(here),
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def save(path: Path, parameters: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Write a checkpoint to the folder `path`, replacing one that is there. It gets its name when it is whole
    and on the disk; what a process killed meanwhile leaves is named `.<name>…` and goes at the next try."""
    custom_metadata: Any = {
        "tensors": {name: describe(value) for name, value in parameters.items()},
        "sha256": {name: sha256(value) for name, value in parameters.items()},
        **metadata,
    }
    plain = {name: to_plain(value) for name, value in parameters.items()}
    if jax.process_count() > 1:
        # orbax takes a jax.Array there for a part of one that all processes hold.
        plain = jax.tree.map(np.asarray, plain)
    staged = path.with_name(f".{path.name}")
    for left in path.parent.glob(f"{staged.name}*"):
        shutil.rmtree(left)
    with _checkpointer() as checkpointer:
        checkpointer.save(staged.absolute(), args=ocp.args.PyTreeSave(plain, custom_metadata=custom_metadata))
    sync_tree(staged)
    shutil.rmtree(path, ignore_errors=True)
    rename(staged, path)


def sha256(parameter: Any) -> str:
    """Hex digest over name, dtype, shape and bytes (row by row, little-endian) of each of a parameter's
    arrays, in the order of their names."""
    digest = hashlib.sha256()
    for name, leaf in jax.tree_util.tree_leaves_with_path(to_plain(parameter)):
        value = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(name)} {value.dtype.name} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def read_metadata(path: Path) -> dict[str, Any]:
    """The custom metadata of a checkpoint.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        with _checkpointer() as checkpointer:
            # Of a relative path orbax finds nothing.
            metadata = checkpointer.metadata(path.absolute()).item_metadata.custom_metadata
    except Exception as error:  # orbax raises many kinds on damaged files
        raise ValueError(
            f"{path}: no readable metadata ({error!r}); the model is damaged, make it again"
        ) from error
    if not isinstance(metadata, dict) or "tensors" not in metadata:
        raise ValueError(
            f"{path}: no metadata of svsk in the checkpoint; the model is damaged, make it again"
        )
    return metadata


def restore(
    path: Path, metadata: Mapping[str, Any], names: Iterable[str] | None = None, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Parameters of a checkpoint, as they are stored.

    Args:
        path: the checkpoint's folder.
        metadata: from `read_metadata`.
        names: which parameters; default all.
        mesh: restore onto these devices, divided as `parallel.parameters.leaf_sharding` says, however many
            there were when it was saved; default one device.

    Raises:
        ValueError: files are missing or damaged. Damage that leaves them readable is not noticed: see
            `differing`.
    """
    wanted = metadata["tensors"] if names is None else names
    try:
        likes = {name: abstract(metadata["tensors"][name]) for name in wanted}
        plain = {name: to_plain(like) for name, like in likes.items()}
        target = {
            name: jax.tree.map(lambda leaf, name=name: _placed(leaf, name, mesh), each)
            for name, each in plain.items()
        }
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        with _checkpointer() as checkpointer:
            restored = checkpointer.restore(
                path.absolute(),
                args=ocp.args.PyTreeRestore(
                    item=target, restore_args=restore_args, partial_restore=names is not None
                ),
            )
        values = {name: from_plain(restored[name], like) for name, like in likes.items()}
        jax.tree.map(_check, values, likes)
    except jax.errors.JaxRuntimeError:  # the device's trouble, not the files'
        raise
    except Exception as error:  # orbax raises many kinds on damaged files, Exception itself among them
        summary = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(
            f"{path}: cannot be restored ({summary}); the model is damaged, make it again"
        ) from error
    return values


def _check(value: Any, like: jax.ShapeDtypeStruct) -> None:
    """Damaged metadata may make orbax restore something else than was asked for."""
    if not isinstance(value, jax.Array) or (value.shape, value.dtype) != (like.shape, like.dtype):
        raise ValueError(f"expected {like}, found {value!r}")


def differing(parameters: Mapping[str, Any], metadata: Mapping[str, Any]) -> list[str]:
    """Names of the parameters whose digest is not the one that was stored with them."""
    stored = metadata.get("sha256", {})
    return [name for name, value in parameters.items() if sha256(value) != stored.get(name)]


def _placed(leaf: jax.ShapeDtypeStruct, name: str, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    """The leaf of a parameter with the devices it is restored onto."""
    one = SingleDeviceSharding(jax.local_devices()[0])
    where = one if mesh is None else leaf_sharding(mesh, name, leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
