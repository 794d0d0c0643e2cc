from __future__ import annotations

import dataclasses

import pytest

from lemo_trainer import LemoConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "drop"),
        ("selector", "best"),
        ("shared_blocks", 1),
        ("keep_ratio", 0),
        ("keep_ratio", 2),
        ("keep_ratio", "half"),
        ("keep_ratio", True),
        ("block_size", 0),
        ("block_size", 1.5),
        ("sink_blocks", -1),
        ("recent_blocks", -1),
        ("mlp_score_tokens", 0),
        ("warmup_steps", -1),
        ("loss_segment", -1),
        ("layers", "most"),
        ("layers", "5-3,7"),
        ("layers", ()),
        ("layers", None),
        ("label_weights", "some"),
        ("protect_labels", 1),
        ("save_attention", "yes"),
        ("thresholds", "3"),
        ("thresholds", "3:-1"),
        ("ramp_steps", 0.5),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(
        ValueError, match=f"`{name}` must .*got {value!r}".replace("(", r"\(").replace(")", r"\)")
    ):
        LemoConfig(**{name: value})


def test_an_unknown_key_names_the_closest():
    with pytest.raises(ValueError, match=r"'keep_ration'.*keep_ratio"):
        LemoConfig.from_dict({"keep_ration": 0.5})


@pytest.mark.parametrize(
    ("layers", "total", "wanted"),
    [
        ("auto", 30, tuple(range(15, 29))),
        ("auto", 3, (1,)),
        ("all", 3, (0, 1, 2)),
        ("1,3-5", 8, (1, 3, 4, 5)),
        ("2", 3, (2,)),
        ([4, 0], 5, (0, 4)),
    ],
)
def test_layers_resolve_to_indices(layers, total, wanted):
    assert LemoConfig(mode="eliminate", layers=layers).resolve_layers(total) == wanted


def test_detaching_leaves_the_first_and_the_last_layer_dense():
    assert LemoConfig(mode="detach").resolve_layers(30) == tuple(range(1, 29))


def test_a_layer_that_the_model_has_not_is_named():
    with pytest.raises(ValueError, match=r"from 0 to 3 .*'2-4'"):
        LemoConfig(mode="detach", layers="2-4").resolve_layers(4)


def test_the_saved_json_reads_back_as_the_same_config(tmp_path):
    config = LemoConfig(keep_ratio=0.25, layers=(1, 2), block_size=32)
    path = tmp_path / "lemo_config.json"
    path.write_text(config.to_json())
    assert LemoConfig.from_yaml(path) == config


def test_yaml_that_is_no_mapping_or_no_yaml_is_refused(tmp_path):
    path = tmp_path / "lemo.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="mapping"):
        LemoConfig.from_yaml(path)
    path.write_text("keep_ratio: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        LemoConfig.from_yaml(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        LemoConfig.from_yaml(tmp_path / "absent.yaml")


def test_thresholds_read_as_text_and_as_a_mapping():
    config = LemoConfig(mode="eliminate", thresholds={16: 1, 3: 0.25})
    assert config.thresholds == "3:0.25,16:1"
    config = LemoConfig(mode="eliminate", thresholds="3:0.25,15-16:1")
    assert config.layer_thresholds == {3: 0.25, 15: 1, 16: 1}
    assert config.resolve_layers(20) == (3, 15, 16)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("protect_labels", True),
        ("thresholds", "3:1"),
        ("label_weights", "kept"),
        ("layers", "3"),
        ("selector", "norm"),
        ("segment_tokens", 0),
    ],
)
def test_what_means_nothing_for_segments_is_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        LemoConfig(mode="segments", **{name: value})


def test_label_weights_need_the_segmented_loss():
    with pytest.raises(ValueError, match="loss_segment=0"):
        LemoConfig(mode="detach", label_weights="kept", loss_segment=0)


def test_the_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LemoConfig().keep_ratio = 0.1


def test_eliminating_layers_choose_for_themselves():
    with pytest.raises(ValueError, match=r"`shared_blocks` must be .*'eliminate'"):
        LemoConfig(mode="eliminate", shared_blocks=True)


@pytest.mark.parametrize(("name", "value"), [("shared_blocks", True), ("ramp_steps", 5)])
def test_thresholds_leave_no_room_for_a_kept_share(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be left out with `thresholds`.*got {value}"):
        LemoConfig(thresholds="3:0.8", **{name: value})


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({}, "auto"),
        ({"memory": "1GiB", "segment_tokens": 64, "loss_segment": 0}, "auto"),
        ({"keep_ratio": 0.5, "fused_kernels": False}, "detach"),
        ({"thresholds": "3:1"}, "detach"),
        ({"selector": "recency", "warmup_steps": 2}, "detach"),
        ({"scheme": "layers", "selective_checkpointing": False}, "exact"),
        ({"boundaries": "disk", "segment_tokens": 64}, "exact"),
    ],
)
def test_without_a_mode_the_options_select_one(options, mode):
    assert LemoConfig(**options).mode == mode


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fused_kernels": False}, r'mode="auto" \(the default\), .* \(detach and eliminate do\), got False'),
        ({"layers": "0-1"}, r'mode="auto" \(the default\), .* \(detach and eliminate do\), got'),
        ({"warmup_steps": 3}, r"\(segments, detach and eliminate do\), got 3"),
        ({"save_attention": True}, r'mode="auto" \(the default\)'),
        ({"keep_ratio": 0.5, "memory": "1GiB"}, r"mode=\"detach\" \(which `keep_ratio` selects\), .*'1GiB'"),
        ({"boundaries": "disk", "block_size": 8}, r'mode="exact" \(which `boundaries` selects\)'),
        ({"keep_ratio": 0.5, "boundaries": "disk"}, r"\(which `keep_ratio` selects\), .* \(exact does\)"),
    ],
)
def test_options_that_the_selected_mode_does_not_read(options, message):
    name = list(options)[-1]
    with pytest.raises(ValueError, match=f"`{name}` must be left out with .*{message}"):
        LemoConfig(**options)
