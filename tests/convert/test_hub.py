"""Hub ids, by way of a cache in the hub's layout and of a hub that fails."""

import shutil

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from support_convert import write_safetensors

from convert import hub, open_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, tiny_config, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--tiny"
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    write_safetensors(repository / "snapshots" / COMMIT, tiny_config)
    return repository


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_opens_what_is_cached(cache, tiny_config, revision):
    checkpoint = open_checkpoint("owner/tiny", revision=revision)
    assert checkpoint.config == tiny_config
    assert checkpoint.description == f"owner/tiny@{COMMIT[:12]}"


def test_a_local_path_comes_first(cache, tmp_path, monkeypatch):
    shutil.copytree(cache / "snapshots" / COMMIT, tmp_path / "here" / "owner" / "tiny")
    monkeypatch.chdir(tmp_path / "here")
    assert open_checkpoint("owner/tiny").description == "owner/tiny"


@pytest.mark.parametrize(("model", "revision"), [("owner/absent", None), ("owner/tiny", "other")])
def test_offline_and_not_cached(cache, model, revision):
    with pytest.raises(ValueError, match=f"{model}.*HF_HUB_OFFLINE is set; unset it"):
        open_checkpoint(model, revision=revision)


def test_unreachable(monkeypatch):
    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    with pytest.raises(ConnectionError, match=r"owner/tiny.*cannot be reached; check"):
        open_checkpoint("owner/tiny")


def test_falls_back_to_bin(tmp_path, monkeypatch):
    asked = []

    def download(model, *, revision, allow_patterns):
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(ValueError, match="no weights"):
        open_checkpoint("owner/tiny")
    assert ["model.safetensors" in patterns for patterns in asked] == [True, False]
    assert "pytorch_model.bin" in asked[1]


@pytest.mark.parametrize("model", ["a/b/c", "../up", "https://x/y", "", "bad name"])
def test_not_a_hub_id(model):
    assert not hub.is_hub_id(model)
