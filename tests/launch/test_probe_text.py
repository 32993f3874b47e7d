"""What a weight sync is checked on: the environment's own text, which holds the tokens that matter."""

from __future__ import annotations

import pytest

from spearrl.config import load_config
from spearrl.launch import assembly, factories
from spearrl.models import build_tiny
from spearrl.models.formats import open_format


@pytest.mark.parametrize("broken", [False, True])
def test_the_probe_is_the_environments_text(tmp_path, monkeypatch, broken):
    config = load_config(None, ["env.name=webshop", f"run.output_dir={tmp_path}"])
    environment, said = factories.make_environment(config), []
    _, tokenizer = build_tiny(["find a red lamp"], config.model.tiny, seed=0)
    encoder = open_format(tokenizer, config.model, environment.tools())
    if broken:
        monkeypatch.setattr(type(environment), "reset", lambda self, task, seed: 1 / 0)
    text = tokenizer.decode(assembly.probe_text(config, environment, encoder, said.append))
    assert ("rug" in text) != broken and ["ZeroDivisionError" in line for line in said] == [True] * broken
