"""Weights in the form of the model directory: for each family, written, read back, and taken in pieces."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file

from spearrl.config.sections import LearnerSection
from spearrl.errors import CheckpointError
from spearrl.learner import LocalLearner
from spearrl.models import load_model
from spearrl.models.weights import WeightLoader, load_weights
from tests.support.families import FAMILIES, build_family, family_directory
from tests.support.small_run import fingerprint

EXPERT = "model.layers.1.mlp.experts.2.gate_proj.weight"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A family's name, a directory that transformers wrote, and the model read from it."""
    folder = family_directory(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, folder, load_model(str(folder))


def test_a_learner_names_weights_as_the_directory_does(family):
    _, folder, model = family
    stored, sent = (
        load_file(folder / "model.safetensors"),
        dict(LocalLearner(model, LearnerSection()).full_parameters()),
    )
    assert sent.keys() == stored.keys() and all(torch.equal(sent[name], stored[name]) for name in stored)


def test_weights_are_read_back_as_transformers_reads_them(family):
    name, folder, model = family
    other = build_family(name, seed=1)[0]
    assert fingerprint(other) != fingerprint(model)
    load_weights(other, folder)
    assert fingerprint(other) == fingerprint(model)


def test_weights_arrive_in_any_order_and_in_pieces(family):
    name, folder, model = family
    other, stored = build_family(name, seed=1)[0], load_file(folder / "model.safetensors")
    loader, names = WeightLoader(other), random.Random(0).sample(sorted(stored), len(stored))
    for key in names:
        assert key in loader.missing and loader.fits(key, stored[key].shape)
        loader.take({key: stored[key]})
    assert not loader.missing and fingerprint(other) == fingerprint(model)


def test_a_file_that_lacks_an_expert_is_refused_and_nothing_is_copied(tmp_path):
    from safetensors.torch import save_file

    folder, other = family_directory("qwen3_moe", tmp_path), build_family("qwen3_moe", seed=1)[0]
    before, stored = fingerprint(other), load_file(folder / "model.safetensors")
    del stored[EXPERT]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing \['model.layers.1.mlp.experts.2.gate_proj.weight'\]"):
        load_weights(other, folder)
    assert fingerprint(other) == before
