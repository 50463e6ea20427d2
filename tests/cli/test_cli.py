"""The command line on a small checkpoint: every verb, and bad input with its exit code and next step."""

import json
import logging
import os
import shutil

import numpy as np
import pytest
from cli_support import CALIB, svsk
from safetensors.numpy import load_file, save_file
from support import SQUARE, write_checkpoint

from svsk_jax.cli import explain


def test_quantize_inspect_and_evaluate_agree_on_bits(checkpoint, quantized, tmp_path):
    folder, result = quantized
    assert result["recipe"] == "classic-r8"
    assert svsk("inspect", "--model", folder, "--json", tmp_path / "i.json") == 0
    totals = json.loads((tmp_path / "i.json").read_text())["totals"]
    assert totals["decoder_linear_bits"] == result["linear_bits_per_weight"]
    assert totals["bytes"] == result["bytes"]
    command = [
        "evaluate",
        "--model",
        folder,
        "--reference",
        checkpoint,
        "--tokens",
        2048,
        "--json",
        tmp_path / "e.json",
    ]
    assert svsk(*command) == 0
    rows = json.dumps(json.loads((tmp_path / "e.json").read_text()))
    assert "gptq" in rows
    assert "llama.cpp" in rows
    assert str(result["linear_bits_per_weight"]) in rows


def test_calibrate_then_quantize(checkpoint, quantized, tmp_path, capsys):
    calibrate = ["calibrate", "--model", checkpoint, "--output", tmp_path / "stats", *CALIB]
    for resumed in range(2):
        assert svsk(*calibrate, "--resume", "--json", tmp_path / f"{resumed}.json") == 0
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()
    assert svsk(*calibrate) == 2
    assert "exists already" in capsys.readouterr().err.replace("\n", " ")
    command = ["quantize", "--model", checkpoint, "--output", tmp_path / "out", "--recipe", "classic-r8"]
    assert svsk(*command, "--calib-stats", tmp_path / "stats", "--json", tmp_path / "q.json") == 0
    assert json.loads((tmp_path / "q.json").read_text())["layer_errors"] == quantized[1]["layer_errors"]


@pytest.mark.filterwarnings("ignore:quantizing without the Fisher pass")
def test_autotune_writes_a_recipe_that_quantize_takes(tmp_path_factory, tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("square"), 0, SQUARE)
    stats, out, file = tmp_path / "stats", tmp_path / "out", tmp_path / "tuned.json"
    full = [*CALIB[:-1], "full", "--fisher", "off"]
    assert svsk("calibrate", "--model", checkpoint, "--output", stats, *full) == 0
    tune = ["autotune", "--model", checkpoint, "--calib-stats", stats, "--bits", 5.5, "--measure", "off"]
    assert svsk(*tune, "--output", file, "--json", tmp_path / "a.json") == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert 0 < found["predicted_nats"]["tuned"] < found["predicted_nats"]["default"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "stats", "tuned.json"]
    quantize = ["quantize", "--model", checkpoint, "--calib-stats", stats, "--recipe", file]
    assert svsk(*quantize, "--output", out, "--json", tmp_path / "q.json") == 0
    result = json.loads((tmp_path / "q.json").read_text())
    assert result["recipe"] == "svsk-r16 tuned"
    assert 5.4 < result["linear_bits_per_weight"] <= 5.5
    before = file.read_bytes()
    for output, word in ((file, "--overwrite"), (tmp_path / "tuned", ".json")):
        assert svsk(*tune, "--output", output) == 2
        assert word in capsys.readouterr().err.replace("\n", " ")
    assert file.read_bytes() == before
    assert not (tmp_path / "tuned").exists()


def test_generate_is_seeded(quantized, tmp_path, capsys):
    texts = []
    for seed in (1, 1, 2):
        command = ["generate", "--model", quantized[0], "--prompt", "Hello", "--raw", "--max-tokens", 24]
        assert svsk(*command, "--temperature", 1.0, "--seed", seed, "--json", tmp_path / "g.json") == 0
        texts.append(capsys.readouterr().out)
        assert json.loads((tmp_path / "g.json").read_text())["text"] + "\n" == texts[-1]
    assert texts[0] == texts[1] != texts[2]


def test_several_prompts_are_answered_as_each_alone(quantized, tmp_path):
    prompts, alone = ["Hello", "To be"], []
    command = [
        "generate",
        "--model",
        quantized[0],
        "--raw",
        "--max-tokens",
        12,
        "--json",
        tmp_path / "g.json",
    ]
    for prompt in prompts:
        assert svsk(*command, "--prompt", prompt) == 0
        alone.append(json.loads((tmp_path / "g.json").read_text())["text"])
    assert svsk(*command, "--prompt", *prompts) == 0
    together = json.loads((tmp_path / "g.json").read_text())["texts"]
    assert [result["text"] for result in together] == alone


def test_generate_over_a_mesh(quantized, capsys):
    command = ["generate", "--model", quantized[0], "--prompt", "Hello", "--raw", "--max-tokens", 12]
    texts = []
    for more in ([], ["--mesh", "data=1,model=2"]):
        assert svsk(*command, *more) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert svsk(*command, "--mesh", "data=1,model=4") == 2
    assert "attention.k.weight" in capsys.readouterr().err.replace("\n", " ")


def test_convert_is_lossless(checkpoint, tmp_path):
    assert svsk("convert", "--model", checkpoint, "--output", tmp_path / "dense", "--dtype", "float32") == 0
    assert svsk("export", "--model", tmp_path / "dense", "--output", tmp_path / "hf") == 0
    original, back = (
        load_file(checkpoint / "model.safetensors"),
        load_file(tmp_path / "hf" / "model-00001-of-00001.safetensors"),
    )
    assert original.keys() == back.keys()
    for name, value in original.items():
        np.testing.assert_array_equal(value, back[name])


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_export_gives_transformers_the_same_logits(quantized, tmp_path):
    torch = pytest.importorskip("torch")
    import jax.numpy as jnp
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from svsk_jax import load_model, open_model

    assert svsk("export", "--model", quantized[0], "--output", tmp_path / "hf", "--to", "dense") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tmp_path / "hf")("Some text to read.")["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits.numpy()
    actual = load_model(open_model(str(quantized[0])))(jnp.asarray([ids], jnp.int32))
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def broken(checkpoint, tmp_path, change):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    change(folder)
    return folder


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def edit_tensor(name, edit):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = edit(tensors[name].copy())
        save_file(tensors, folder / "model.safetensors")

    return change


def put_nan(value):
    value[0, 0] = np.nan
    return value


def rename_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))


def remove_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (truncate, ["model.safetensors", "truncated"]),
        # In the first layer: the statistics of those before it are kept.
        (edit_tensor("model.layers.0.mlp.up_proj.weight", put_nan), ["model.layers.0.mlp.up_proj.weight"]),
        (edit_tensor("model.norm.weight", lambda value: value.astype(np.int32)), ["model.norm.weight"]),
        (edit_tensor("model.norm.weight", lambda value: value[:3].copy()), ["model.norm.weight", "3", "48"]),
        (rename_architecture, ["MambaForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
        (remove_tokenizer, ["tokenizer"]),
    ],
)
def test_bad_checkpoints(checkpoint, tmp_path, capsys, change, words):
    folder = broken(checkpoint, tmp_path, change)
    assert svsk("quantize", "--model", folder, "--output", tmp_path / "out", *CALIB) == 2
    message = capsys.readouterr().err
    assert "error:" in message
    assert "Traceback" not in message
    for word in words:
        assert word in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_bad_arguments(checkpoint, quantized, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short")
    base = ["quantize", "--model", checkpoint, "--output", tmp_path / "out"]
    for command, words in [
        ([*base, "--calib", tmp_path / "short.txt"], ["9 tokens", "longer text"]),
        ([*base, "--calib", "nowhere.txt"], ["nowhere.txt", "builtin"]),
        ([*base, "--calib-stats", tmp_path], ["svsk calibrate"]),
        ([*base, "--rank", "1000", *CALIB], ["rank", "128"]),
        (["quantize", "--model", checkpoint, "--output", quantized[0], *CALIB], ["--overwrite"]),
        (["quantize", "--model", quantized[0], "--output", tmp_path / "out", *CALIB], ["already quantized"]),
        (["generate", "--model", quantized[0], "--prompt", "x", "--temperature", "-1"], ["temperature"]),
        (["generate", "--model", tmp_path / "nothing", "--prompt", "x"], ["nothing"]),
    ]:
        assert svsk(*command) == 2, command
        message = capsys.readouterr().err
        for word in words:
            assert word in message.replace("\n", " "), (command, message)
    assert os.listdir(tmp_path) == ["short.txt"]


def test_other_errors_have_their_own_status():
    assert explain(KeyboardInterrupt())[0] == 1
    assert explain(OSError(28, "No space left on device")) == explain(OSError(28, "No space left on device"))
    status, message = explain(RuntimeError("INTERNAL: No space left on device"))
    assert (status, "disk is full" in message) == (1, True)
    assert explain(ConnectionError("hub"))[0] == 1
    assert explain(ValueError("yours"))[0] == 2
    full = OSError(28, "No space left on device")
    full.add_note("what is finished is kept in .out.unfinished: go on")
    status, message = explain(full)
    assert (status, message.count("is kept in .out.unfinished")) == (1, 1)
    assert "no output was left" not in message
    status, message = explain(RuntimeError("ours"))
    assert status == 1
    assert "--debug" in message


def test_tune_kernels_without_a_gpu_or_its_compiler(capsys):
    assert svsk("tune-kernels", "--models", "Qwen3-0.6B", "--batches", 1) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "nothing can be timed here (it needs an NVIDIA GPU, this is cpu)" in said
    assert "`make gate` installs" in said
    assert svsk("tune-kernels", "--models", "GPT-2") == 2
    assert "--models GPT-2: known are SmolLM2-135M, Qwen3-0.6B" in capsys.readouterr().err.replace("\n", " ")
    assert svsk("tune-kernels", "--batches", 7) == 2
    assert "--batches [7]: choose from 1, 8, 16, 32, 64" in capsys.readouterr().err


def test_plan_reads_no_weights(tmp_path, capsys):
    assert svsk("plan", "--model", "Qwen3-0.6B", "--json", tmp_path / "p.json") == 0
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["parameters"] == 596_049_920
    assert not found["bytes_are_exact"]
    said = " ".join(capsys.readouterr().err.split())
    assert "times are an estimate" in said
    assert found["estimate"]["costs_of"] in said
    assert svsk("plan", "--model", "Qwen3-235B-A22B") == 0
    assert "235,093,634,560" in capsys.readouterr().err
    assert svsk("plan", "--model", "SmolLM2-135M", "--costs", tmp_path / "p.json") == 2
    assert "--costs" in capsys.readouterr().err


def test_what_the_hub_retries_is_told_once(monkeypatch):
    hub = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(hub, "propagate", True)
    svsk("plan", "--model", "no such model")
    assert hub.handlers
    assert not hub.propagate
