"""Files that LeMo wrote while its modules lay flat, before they moved into folders.

`written_before_the_move/` holds a pickled `LemoConfig`, a `lemo_config.json`, predictors of `tiny_model()`
and the saved state of an unfinished `train_predictors`.
"""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from lemo_trainer import LemoConfig
from lemo_trainer.informativeness.predictor_files import load_predictors
from lemo_trainer.offline.predictor_training import STATE_NAME, PredictorTraining, train_predictors

from .test_predictor_training import CONFIG, held_out, samples
from .tiny import tiny_model

OLD = Path(__file__).parent / "written_before_the_move"
TRAINING = PredictorTraining(steps=4, ranks=(2, 2, 2), save_steps=2)


def test_an_old_pickle_of_a_configuration_loads():
    wanted = LemoConfig(mode="eliminate", thresholds="1:0.8", block_size=4, layers="1")
    assert pickle.loads((OLD / "config.pickle").read_bytes()) == wanted
    assert LemoConfig.from_yaml(OLD / "lemo_config.json") == wanted


def test_old_predictors_load():
    predictors = load_predictors(OLD, tiny_model())
    assert predictors.layers == (1,)
    assert predictors.recall == {1: 1.0}
    assert predictors.pooled_map(1, torch.randn(1, 12, 32), None).shape == (1, 3, 3)


def test_an_unfinished_training_of_predictors_resumes_with_the_same_result(tmp_path):
    config = dataclasses.replace(CONFIG, layers="1")
    shutil.copy(OLD / "unfinished" / STATE_NAME, tmp_path)
    resumed = train_predictors(tiny_model(), samples(2), held_out(), config, TRAINING, tmp_path)
    torch.testing.assert_close(dict(resumed.nets.state_dict()), dict(load_predictors(OLD).nets.state_dict()))


def test_a_pickle_of_a_private_class_that_moved_fails_with_pythons_own_error():
    new, old = b"lemo_trainer.offline.predictor_training", b"lemo_trainer.predictor_training"
    moved = pickle.dumps(TRAINING, protocol=0).replace(new, old)
    with pytest.raises(ModuleNotFoundError, match=r"lemo_trainer\.predictor_training"):
        pickle.loads(moved)
