"""What every method declares, and the predictions that they hand out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from stexp.config.compose import compose
from stexp.construct import get_object
from stexp.files import CONF
from stexp.models.method import Method, Prediction

NAMES = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
CLASSES = {name: get_object(compose("train", [f"model={name}"]).model._target_) for name in NAMES}


@pytest.mark.parametrize("name", CLASSES)
def test_every_method_of_conf_is_a_method(name):
    method = CLASSES[name]
    assert issubclass(method, Method) and not method.__abstractmethods__
    assert method.batching in ("spots", "section")
    # a slide is read tile by tile
    assert not (method.batching == "section" and method.predicts_slides)
    # a batch that is one section, or a calculation of all spots at once, is not split among devices
    assert not (method.several_devices and (method.batching == "section" or method.closed_form))


def test_slides_are_predicted_by_methods_that_read_tiles_alone():
    assert {name for name, method in CLASSES.items() if method.predicts_slides} == {
        *("bleep", "consensus", "heclip", "hest_ridge", "m2ort", "mclstexp", "mclstexp_plus", "mean", "stnet")
    }


def test_a_method_without_predictions_cannot_be_built():
    class Silent(Method):
        pass

    with pytest.raises(TypeError, match="predict_step"):
        Silent()


def test_predictions_of_batches_are_joined_in_their_order():
    made = [
        Prediction(
            torch.full((n, 3), float(n), dtype=torch.bfloat16),
            obs=pd.DataFrame({"neighbour_section": [f"S{n}"] * n}),
            neighbours=torch.full((n, 2), n),
        )
        for n in (2, 1)
    ]
    whole = Prediction.concatenate(made)
    np.testing.assert_array_equal(whole.predicted.numpy(), np.repeat([[2.0], [1.0]], [2, 1], axis=0).repeat(3, axis=1))
    assert whole.predicted.dtype == torch.float32 and whole.neighbours.dtype == torch.int64
    assert list(whole.obs["neighbour_section"]) == ["S2", "S2", "S1"] and list(whole.obs.index) == [0, 1, 2]
    assert whole.uncertainty is None and whole.image_embedding is None and whole.neighbour_weights is None
