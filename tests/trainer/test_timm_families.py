"""One small model of every family of timm: its own saved weights as a teacher's and as a tower's, and its cost."""

import pkgutil
from pathlib import Path

import pytest
import timm
import torch

from tests.trainer.test_config import changed
from threetowers.cache.encoders.encoder import state_digest
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.trainer.config import ImageTower, parse
from threetowers.trainer.estimate.cost import TeacherCost, activation_bytes, meta_model, tower_costs
from threetowers.trainer.model.initial.initial_weights import load_initial
from threetowers.trainer.model.towers.timm_tower import TimmTower

# The smallest of each family, and of each kind of classifier within it: several in models that were distilled.
MODELS = """
beit_base_patch16_224 caformer_s18 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 cpubone_nano
crossvit_tiny_240 cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny deepseek_vit_412m
deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvim_m1_dist efficientvit_b0 efficientvit_l1
efficientvit_m0 ese_vovnet19b_slim_dw fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m
ghostnet_050 gmlp_ti16_224 halonet_h1 hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small
iformer_m_distilled iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4
lcnetv2_small legacy_seresnet18 legacy_xception levit_128s levit_256d levit_384_s8 lowformer_b0
mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap
nasnetalarge nest_tiny nextvit_small pit_ti_224 pit_ti_distilled_224 pnasnet5large poolformerv2_s12
pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d resnet50_clip
resnetv2_18 rexnet_100 sam2_hiera_tiny samvit_base_patch16_224 selecsls42 sequencer2d_s shvit_s1 skresnet18
starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window16_256
test_byobnet test_coatnet test_convnext test_efficientnet test_mambaout test_nfnet test_resnet test_vit
test_vit_relpos tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny
vit_tiny_patch16_dinov3_qkvb vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xception41p
xcit_nano_12_p8_224
""".split()  # noqa: SIM905
ENCODERS = ("deepseek_vit_412m_enc", "gemma4_vit_167m_enc", "mobilenetv5_300m_enc", "qwen3_vit_88m_enc")  # of tokens
QUICK = ("deit_tiny_distilled_patch16_224", "levit_128s", "test_efficientnet")


def own_size(name: str) -> int:
    return int(timm.get_pretrained_cfg(name).input_size[1])


def check_round_trip(name: str, path: Path) -> None:
    """Load a model's complete state dict as a teacher, and without the classifier into a tower."""
    torch.manual_seed(0)
    state = timm.create_model(name).state_dict()
    torch.save(state, path)
    assert load_frozen_encoder(f"timm:{name}:{path}").weights_digest == state_digest(state)
    config = ImageTower("timm", name, init=str(path))
    tower = TimmTower(config, own_size(name))
    load_initial(tower, config, "init")
    for key, tensor in tower.model.state_dict().items():
        assert tensor.equal(state[key]), key


def check_cost(name: str) -> None:
    """Build the tower without numbers, as the page at the start of a run does, and count."""
    tree = changed("towers.image", {"kind": "timm", "model": name})
    tree["data"]["image_size"] = own_size(name)
    model = meta_model(parse(tree), 30, {"third": TeacherCost("b", 20, 40, None)})
    cost = tower_costs(model)["image"]
    assert cost.parameters > 0
    assert cost.flops is None or cost.flops > 0
    activation_bytes(model)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_a_model_loads_what_it_saved(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    check_round_trip(name, path)
    path.unlink()  # the larger ones fill a disk


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_cost_of_a_family_is_counted(name: str) -> None:
    check_cost(name)


@pytest.mark.parametrize("name", ENCODERS)
def test_models_that_give_tokens_alone_are_refused(name: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=r"gives \(1, .* for an image, expected one vector"):
        TimmTower(ImageTower("timm", name), own_size(name))


def test_every_family_is_among_them() -> None:
    own = {module.name for module in pkgutil.iter_modules(timm.models.__path__)}  # other tests register more
    families = {module: set(timm.list_models(module=module)) for module in timm.list_modules() if module in own}
    assert [module for module, names in families.items() if names and not names.intersection(MODELS)] == []
