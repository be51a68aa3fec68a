"""DeepSpeed settings of the user's own: those of the trainer, unknown ones and wrong values are one message."""

from typing import Any

import pytest

from tests.trainer.test_config import changed
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.config.deepspeed_extra import OWNED
from threetowers.trainer.engine import deepspeed_config


def generated(extra: dict[str, Any], ranks: int = 2) -> dict[str, Any]:
    return deepspeed_config(parse(changed("engine.deepspeed_extra", extra)), ranks)


@pytest.mark.parametrize("name", OWNED)
def test_what_the_trainer_sets_is_refused_with_its_own_key(name: str) -> None:
    section, _, key = name.rpartition(".")
    extra = {section: {key: 1}} if section else {key: 1}
    with pytest.raises(
        ConfigError, match=rf"engine\.deepspeed_extra\.{name}: the trainer sets it; .* use {OWNED[name]}"
    ):
        generated(extra)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"zero_optimisation": {}},
            r"\.zero_optimisation: not a setting that is taken; did you mean zero_optimization\?",
        ),
        ({"nebula": {}}, r"\.nebula: not a setting that is taken; Taken are: comet, "),
        ({"zero_optimization": True}, r"\.zero_optimization: found True, expected a mapping .* engine\.zero_stage"),
        ({"zero_optimization": {"overlap_com": True}}, r"overlap_com Extra inputs are not permitted"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, r"reduce_bucket_size Input should be a valid integer"),
        ({"zero_optimization": {"mics_shard_size": 2}}, r"MiCS ZeRO-3 sharding has been removed"),
        ({"memory_breakdown": "yes"}, r"\.memory_breakdown: found 'yes', expected true or false"),
        ({"comms_logger": 5}, r"DeepSpeed does not take \{'comms_logger': 5\}: .* must be a mapping, not int; change"),
        ({"communication_data_type": "fp17"}, r"Invalid communication_data_type"),
    ],
)
def test_what_deepspeed_does_not_take(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        generated(extra)
    assert str(raised.value).startswith("engine.deepspeed_extra")
    assert "\n" not in str(raised.value)


def test_settings_are_merged_into_the_generated_config() -> None:
    assert generated({}, 4)["train_micro_batch_size_per_gpu"] == 2
    extra = {"zero_optimization": {"reduce_bucket_size": 1000}, "comms_logger": {"enabled": True}}
    plain, merged = generated({}), generated(extra)
    assert merged.pop("comms_logger") == {"enabled": True}
    assert merged == plain | {"zero_optimization": plain["zero_optimization"] | {"reduce_bucket_size": 1000}}


def test_deepspeed_computes_no_norm_where_it_need_not() -> None:
    """It would make the host wait for it. With an offloaded optimizer it insists."""
    assert generated({})["zero_optimization"]["compute_grad_norm"] is False
    offloaded = generated({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    assert "compute_grad_norm" not in offloaded["zero_optimization"]
    assert generated({})["gradient_clipping"] == offloaded["gradient_clipping"] == 0
