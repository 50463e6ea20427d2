"""Block configurations: tables, rules, and the search on pretended times."""

import json
from types import SimpleNamespace

import jax
import pytest

from pallas_kernels import device_time
from pallas_kernels.svsk_matmul import search, tuning
from pallas_kernels.svsk_matmul.figures import abstract_weight
from pallas_kernels.svsk_matmul.shapes import MODELS, unique_shapes
from pallas_kernels.svsk_matmul.tuning import Blocks, candidates, configuration, heuristic, table, table_path
from svsk_jax.cli.tune_kernels import shape_of

H100 = "NVIDIA H100 80GB HBM3"


def pretend(monkeypatch, kind):
    device = SimpleNamespace(device_kind=kind, compute_capability="9.0")
    monkeypatch.setattr(tuning, "target_device", lambda: device)


@pytest.mark.parametrize("path", sorted(tuning.TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_committed_tables_fit_their_shapes(path):
    document = json.loads(path.read_text(encoding="utf-8"))
    assert table_path(document["device"]) == path
    found = table(document["device"])
    for shape, batches in document["blocks"].items():
        weight = abstract_weight(*shape_of(shape))
        for batch in map(int, batches):
            blocks = found[tuning.shape_key(weight)][batch]
            assert blocks == Blocks(**batches[str(batch)], batch=batch)
            assert blocks.misfits(weight, batch) == []


def test_shapes_of_known_models_are_tuned():
    keys = {tuning.shape_key(abstract_weight(*shape)) for shape in unique_shapes()}
    assert sum(len(table(H100).get(key, {})) for key in keys) >= 12


def test_a_table_goes_before_the_rule_where_it_fits(monkeypatch):
    weight = abstract_weight(6144, 4096)
    pretend(monkeypatch, H100)
    assert configuration(weight, 1) == table(H100)["6144x4096"][1] != heuristic(weight, 1)
    # A launch with several matrices needs fewer programs of each.
    assert configuration(weight, 1, matrices=8) == heuristic(weight, 1, matrices=8)
    assert heuristic(weight, 1, matrices=8).superblocks > heuristic(weight, 1).superblocks
    assert configuration(weight, 60) == table(H100)["6144x4096"][64]
    # No entry for 20 rows of x, none for another shape, none for another device.
    assert configuration(weight, 20) == heuristic(weight, 20)
    other = abstract_weight(6144, 512)
    assert configuration(other, 1) == heuristic(other, 1)
    pretend(monkeypatch, "NVIDIA of tomorrow")
    assert configuration(weight, 1) == heuristic(weight, 1)


def test_a_folder_of_the_user_goes_first(monkeypatch, tmp_path):
    weight = abstract_weight(64, 256)
    blocks = {"rows": 64, "superblocks": 1, "warps": 4, "stages": 2}
    table_path("a kind of the user", tmp_path).write_text(
        json.dumps({"blocks": {tuning.shape_key(weight): {"1": blocks}}})
    )
    monkeypatch.setenv(tuning.FOLDER_VARIABLE, str(tmp_path))
    pretend(monkeypatch, "a kind of the user")
    assert configuration(weight, 1) == Blocks(**blocks)


def test_kin_of_a_tuned_gpu_take_its_blocks(monkeypatch, tmp_path):
    assert table("NVIDIA H200") == table(H100) != {}
    assert table("NVIDIA A100-SXM4-80GB") == {}
    blocks = {"rows": 64, "superblocks": 1, "warps": 4, "stages": 2}
    kind = "NVIDIA H200 of the user"
    table_path(kind, tmp_path).write_text(json.dumps({"blocks": {"64x256": {"1": blocks}}}))
    monkeypatch.setenv(tuning.FOLDER_VARIABLE, str(tmp_path))
    assert table(kind) == table("NVIDIA H200") | {"64x256": {1: Blocks(**blocks)}}


def test_own_blocks_go_before_those_of_kin(monkeypatch, tmp_path):
    kinds = dict(zip(("NVIDIA H200", H100), (32, 64), strict=True))
    for rows in kinds.values():
        blocks = {"rows": rows, "superblocks": 1, "warps": 4, "stages": 2}
        document = {"blocks": {"64x256": {"1": blocks}, f"{rows}x512": {"1": blocks}}}
        (tmp_path / f"{rows}.json").write_text(json.dumps(document))
    monkeypatch.setattr(tuning, "table_path", lambda kind: tmp_path / f"{kinds.get(kind)}.json")
    # What was read of the real tables stays with them.
    for kind, rows in kinds.items():
        found = tuning.table.__wrapped__(kind)
        assert found.keys() == {"64x256", "32x512", "64x512"}
        assert found["64x256"][1].rows == rows


def test_a_table_that_does_not_fit_is_passed_over(monkeypatch, tmp_path):
    weight = abstract_weight(96, 256)
    document = {
        "blocks": {tuning.shape_key(weight): {"1": {"rows": 96, "superblocks": 1, "warps": 2, "stages": 2}}}
    }
    monkeypatch.setattr(tuning, "table_path", lambda kind, folder=None: tmp_path / "table.json")
    (tmp_path / "table.json").write_text(json.dumps(document))
    pretend(monkeypatch, "a kind that only this test names")
    assert configuration(weight, 1) == heuristic(weight, 1)


@pytest.mark.parametrize("batch", search.BATCHES)
@pytest.mark.parametrize("shape", unique_shapes())
def test_candidates(shape, batch):
    weight = abstract_weight(*shape)
    found = candidates(weight, batch)
    assert found[0] == heuristic(weight, batch)
    assert len(set(found)) == len(found)
    assert all(blocks.misfits(weight, batch) == [] for blocks in found)


def test_the_search_keeps_the_fastest(monkeypatch):
    timed = []

    def pretended(weights, m, choices):
        timed.append((m, choices))
        return [10.0 if blocks != choices[-1] else 5.0 for blocks in choices]

    monkeypatch.setattr(search, "blocks_times", pretended)
    told = []
    found = search.search([(128, 512)], (1, 16), lambda *args: told.append(args))
    assert list(found) == ["128x512"]
    assert [m for m, _ in timed] == [1, 16]
    for (m, choices), (shape, batch, blocks, time) in zip(timed, told, strict=True):
        assert (shape, batch, blocks, time) == ((128, 512), m, choices[-1], 5.0)
        assert Blocks(**found["128x512"][str(m)], batch=m) == choices[-1]


def test_times_of_a_call_are_medians_by_kernel():
    launches = [("product", 1.0), ("sum", 4.0), ("sum", 4.0), ("product", 3.0), ("sum", 6.0), ("sum", 4.0)]
    assert device_time._of_a_call([*launches, ("product", 2.0), ("sum", 4.0), ("sum", 4.0)], 3) == {
        "product": 2.0,
        "sum": 8.0,
    }


def test_a_chain_calls_on_every_operand():
    run = device_time.chain(
        lambda x, y: x * y, [(jax.numpy.float32(i), jax.numpy.float32(2)) for i in range(3)]
    )
    assert [float(value) for value in run.run()] == [0.0, 2.0, 4.0]
    assert run.length == 3
    with pytest.raises(RuntimeError, match="timed on a GPU, this is cpu"):
        device_time.call_times([run])


def test_shapes_of_models():
    assert all(set(shapes) == {"qkv", "o", "gate_up", "down"} for shapes in MODELS.values())


def test_shapes_given_by_hand():
    assert shape_of("3072x4096") == (3072, 4096)
    for wrong in ("3072", "3072x", "0x4096", "3072x4096x1"):
        with pytest.raises(ValueError, match="expected rows x columns"):
            shape_of(wrong)
