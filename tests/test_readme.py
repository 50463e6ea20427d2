"""What the README shows works: its Python runs, its commands parse."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import tyro
from support import TINY, write_checkpoint

from svsk_jax.cli import CONFIG, VERBS

README = Path(__file__).parent.parent / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore:calibrating on only:UserWarning")
def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "my-model").mkdir()
    # One shape of matrix, large enough for the default recipe's budget.
    config = dataclasses.replace(
        TINY, hidden_size=256, intermediate_size=256, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=64
    )
    write_checkpoint(tmp_path / "my-model", 0, config)
    monkeypatch.chdir(tmp_path)
    sources = blocks("python")
    assert sources
    for source in sources:
        exec(compile(source, "README.md", "exec"), {})
    assert "bits/weight" in capsys.readouterr().out


def test_commands_parse():
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("svsk ")]
    assert {shlex.split(command)[1] for command in commands} == set(VERBS) - {"demo"}
    for command in commands:
        parsed = tyro.extras.subcommand_cli_from_dict(VERBS, args=shlex.split(command)[1:], config=CONFIG)
        assert type(parsed) is VERBS[shlex.split(command)[1]]
