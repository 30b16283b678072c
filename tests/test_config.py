"""Laws of `SamConfig` and of its place among PEFT's types."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import PeftConfig, PeftType

import peft_sam
from peft_sam import SamConfig, SamModel
from peft_sam._peft import SAM_SPARSE
from peft_sam.recorded import FORMAT


def test_the_type_is_a_real_member_of_peft_s_enum() -> None:
    assert PeftType("SAM_SPARSE") is PeftType["SAM_SPARSE"] is PeftType.SAM_SPARSE is SAM_SPARSE
    assert SAM_SPARSE in list(PeftType)
    assert SAM_SPARSE.value == SAM_SPARSE.name == "SAM_SPARSE"
    assert "SAM_SPARSE" in list(PeftType)
    assert json.dumps(SAM_SPARSE) == '"SAM_SPARSE"'
    for copied in (copy.deepcopy(SAM_SPARSE), pickle.loads(pickle.dumps(SAM_SPARSE))):
        assert copied is SAM_SPARSE


def test_importing_twice_and_reloading_register_once() -> None:
    before = list(PeftType)
    importlib.reload(peft_sam._peft)
    importlib.reload(peft_sam)
    assert list(PeftType) == before
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[SAM_SPARSE] is SamConfig
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING[SAM_SPARSE] is SamModel


def test_transformers_own_samconfig_is_not_shadowed() -> None:
    import transformers

    assert transformers.SamConfig is not SamConfig
    assert transformers.SamConfig.model_type == "sam"


def test_a_moved_private_name_of_peft_fails_with_the_supported_range() -> None:
    code = "import peft.tuners.tuners_utils as t; del t.check_adapters_to_merge\nimport peft_sam"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "peft_sam supports peft>=" in done.stderr
    assert "check_adapters_to_merge" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, r"0 < density <= 1; got 0"),
        ({"density": -0.1}, r"got -0.1"),
        ({"density": 1.5}, r"got 1.5"),
        ({"density": float("nan")}, r"got nan"),
        ({"density": "many"}, r"got 'many'"),
        ({"density": True}, r"got True"),
        (
            {"score": "sharpness"},
            r"one of \['bias', 'fisher', 'magnitude', 'movement', 'random', 'sam', 'sam_curvature'\]; got 'sharpness'",
        ),
        ({"score": ["sam"]}, r"got \['sam'\]"),
        ({"budget": "layer"}, r"one of \['global', 'tensor'\]; got 'layer'"),
        ({"seed": -1}, r"non-negative integer; got -1"),
        ({"target_modules": ".*query", "layers_to_transform": [0]}, r"does not work with a regular expression"),
        ({"layers_pattern": "layer"}, r"needs layers_to_transform"),
        ({"selection": {}}, r"must hold 'counts'"),
        ({"selection": {"counts": {"a": -1}}}, r"-1 entries for parameter 'a'"),
        ({"selection": {"counts": {"a": 1.5}}}, r"1.5 entries for parameter 'a'"),
        ({"selection": [1]}, r"must hold 'counts'"),
        ({"task_type": "DANCING"}, r"Invalid task type"),
    ],
)
def test_a_wrong_option_is_refused_with_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamConfig(**options)


def test_a_config_survives_json(tmp_path: Path) -> None:
    config = SamConfig(
        task_type="SEQ_CLS",
        density=0.01,
        score="fisher",
        budget="tensor",
        target_modules=["query", "value"],
        exclude_modules=["key"],
        layers_to_transform=[0, 1],
        layers_pattern="layer",
        modules_to_save=["classifier"],
        seed=3,
        save_dtype="bfloat16",
        selection={"k": 2, "counts": {"a.weight": 2}, "format": FORMAT},
    )
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, SamConfig)
    assert loaded == config
    assert loaded.counts == {"a.weight": 2}


def test_unknown_fields_of_a_newer_version_load_with_peft_s_warning(tmp_path: Path) -> None:
    SamConfig(density=0.02).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hovering": True}))
    with pytest.warns(UserWarning, match="hovering"):
        assert PeftConfig.from_pretrained(str(tmp_path)).density == 0.02
