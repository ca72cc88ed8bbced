"""Image encoder: equal to timm on normalised pixels, for every kind of backbone; what timm cannot do is said in one line."""

import pytest
import timm
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from mm.encoders.image import PYRAMID_SIDE, ImageEncoder, ImageEncoderConfig, build_image_encoder
from mm.errors import UserError
from mm.nn.experts import Experts
from mm.types import System, auxiliary_losses

SMALL_VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2}
BACKBONES = {
    "convnext": {"backbone": "convnext_atto", "patch_size": 2, "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}},
    "resnet": {"backbone": "resnet18", "options": {"channels": [8, 8, 16, 16], "zero_init_last": False}},
    "wide pooling": {"backbone": "mobilenetv3_small_050"},
    "vit": {"backbone": "vit_tiny_patch16_224", "patch_size": 8, "options": SMALL_VIT},
    "registers": {"backbone": "vit_medium_patch16_reg4_gap_256", "patch_size": 8, "options": SMALL_VIT},
    "attention pooling": {"backbone": "vit_base_patch16_siglip_256", "patch_size": 8, "options": SMALL_VIT},
    "channels last": {
        "backbone": "swin_tiny_patch4_window7_224",
        "options": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    },
    "hybrid": {"backbone": "test_vit3"},
}
VITS = ("vit", "registers", "attention pooling")


def encoder(kind: str, **options: object) -> ImageEncoder:
    torch.manual_seed(0)
    return build_image_encoder(ImageEncoderConfig.model_validate({"image_size": 32} | BACKBONES[kind] | options)).eval()


def objective(pooled: Tensor) -> Tensor:
    """Depends on every component; a plain sum or a sum of squares is constant behind a norm."""
    return (pooled * torch.randn(pooled.shape, generator=torch.Generator().manual_seed(3))).sum()


def pictures(batch_size: int = 2, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("kind", BACKBONES)
def test_equals_timm_on_normalised_pixels(kind: str) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    model, image = encoder(kind, mean=mean, std=std), pictures()
    encoded = model(image)
    pixels = (image / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    features = model.trunk.forward_features(pixels)
    torch.testing.assert_close(encoded.pooled, model.trunk(pixels), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(image / 255).pooled, encoded.pooled, atol=1e-5, rtol=1e-4)
    assert encoded.tokens.numel() == features.numel()
    assert encoded.tokens.shape[2] == model.token_width
    assert encoded.pooled.shape == (2, model.width)
    assert encoded.mask.shape == encoded.tokens.shape[:2]
    assert encoded.mask.all()
    rows, columns = encoded.extras["grid"]
    assert rows * columns + encoded.extras["prefix"] == encoded.tokens.shape[1]


@pytest.mark.parametrize("kind", ["convnext", "resnet", "channels last"])
def test_tokens_are_row_by_row(kind: str) -> None:
    model = encoder(kind, image_size=64)
    features = model.trunk.forward_features(model._normalise(pictures(size=64)))
    tokens, extras = model._flatten(features)
    _, columns = extras["grid"]
    position = features[:, 1, 0] if kind == "channels last" else features[:, :, 1, 0]
    assert torch.equal(tokens[:, columns], position)


@pytest.mark.parametrize("kind", ["resnet", "convnext", "vit"])
def test_pyramid_holds_pixels_and_every_stage(kind: str) -> None:
    model = encoder(kind, pool="pyramid", image_size=64)
    image = pictures(size=64)
    encoded = model(image)
    size = 3 * PYRAMID_SIDE**2
    cells = F.adaptive_avg_pool2d(image.float() / 127.5 - 1, PYRAMID_SIDE).flatten(1)
    assert_close(encoded.pooled[:, :size], F.layer_norm(cells, (size,)), rtol=1e-4, atol=1e-4)
    assert encoded.pooled.shape == (2, model.width)
    assert_close(encoded.tokens, encoder(kind, image_size=64)(image).tokens)
    model.train()
    objective(model(image).pooled).backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent, "what is not pooled must not be trainable"


@pytest.mark.parametrize(
    ("values", "message"),
    [({"pool": "pyramid", "patch_dropout": 0.5}, "needs every patch"), ({"std": [0.5, 0, 0.5]}, "above 0")],
)
def test_impossible_configurations_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ImageEncoderConfig.model_validate(values)


@pytest.mark.parametrize("kind", VITS)
def test_patch_dropout_shortens_training_only(kind: str) -> None:
    model, image = encoder(kind, patch_dropout=0.5), pictures()
    whole = model(image)
    model.train()
    part = model(image)
    prefix = whole.extras["prefix"]
    assert part.tokens.shape[1] - prefix == (whole.tokens.shape[1] - prefix) // 2
    assert part.pooled.shape == whole.pooled.shape
    assert "grid" not in part.extras


@pytest.mark.parametrize("kind", ["convnext", "vit"])
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = encoder(kind, gradient_checkpointing=checkpointing).train()
        objective(model(pictures()).pooled).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("kind", ["convnext", "resnet", "vit"])
def test_gradients_reach_every_parameter(kind: str) -> None:
    model = encoder(kind).train()
    objective(model(pictures(4)).pooled).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12] == []


def test_what_timm_exempts_does_not_decay() -> None:
    system = System()
    system.image = encoder("vit")
    plain = {id(p) for p in system.parameter_groups()[1]["params"]}
    assert {id(system.image.trunk.pos_embed), id(system.image.trunk.cls_token)} <= plain
    assert id(system.image.trunk.patch_embed.proj.weight) not in plain


def test_normalisation_is_not_in_the_checkpoint() -> None:
    model = encoder("convnext")
    assert all(name.startswith("trunk.") for name in model.state_dict())


@pytest.mark.parametrize("kind", ["convnext", "vit"])
def test_bf16_stays_close(kind: str) -> None:
    model, image = encoder(kind), pictures()
    exact = model(image).pooled
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(image).pooled
    for pooled in (autocast, model.bfloat16()(image).pooled):
        assert torch.nn.functional.cosine_similarity(pooled.float(), exact).min() > 0.99


def test_compiles_as_one_graph() -> None:
    model, image = encoder("vit"), pictures()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image).pooled, model(image).pooled)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 32, 48), (2, 4, 32, 32)])
def test_other_pictures_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"expected; prepare them"):
        encoder("resnet")(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone": "convnext_ato"}, "no such model; did you mean .*convnext_atto"),
        ({"backbone": "hf-hub:someone/model"}, "no such model"),
        ({"backbone": "local-dir:/tmp"}, "no such model"),
        ({"backbone": "convnext_atto", "patch_dropout": 0.5}, "takes no patch_dropout"),
        ({"backbone": "resnet18", "patch_size": 4}, "takes no patch_size"),
        ({"backbone": "resnet18", "options": {"colour": 3}}, "takes no colour"),
        ({"backbone": "resnet18", "options": {"pretrained": True}}, "'pretrained' may not be one of the options"),
        ({"backbone": "resnet18", "options": {"checkpoint_path": "x.pth"}}, "'checkpoint_path' may not"),
        ({"backbone": "vit_tiny_patch16_224", "options": {"patch_drop_rate": 0.5}}, "set patch_dropout instead"),
        ({"backbone": "vit_tiny_patch16_224", "options": {"num_heads": 5}}, "cannot be made"),
        ({"backbone": "vit_tiny_patch16_224", "pool": "median"}, "cannot be made|cannot encode"),
        ({"backbone": "vit_tiny_patch16_224", "image_size": 20}, "not a multiple of the patch size 16"),
        ({"backbone": "efficientformer_l1", "image_size": 32}, "cannot encode 32 px"),
        ({"backbone": "dla46_c", "gradient_checkpointing": True}, "no gradient checkpointing"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_image_encoder(ImageEncoderConfig.model_validate({"image_size": 32} | values))
    assert "\n" not in str(caught.value)


def test_names_of_published_weights_are_understood() -> None:
    tagged = next(name for name in timm.list_pretrained("vit_tiny_patch16_224"))
    assert "." in tagged
    model = build_image_encoder(ImageEncoderConfig(backbone=tagged, image_size=32, options=dict(SMALL_VIT)))
    assert model.width == SMALL_VIT["embed_dim"]


def test_building_leaves_randomness_and_mode_alone() -> None:
    config = ImageEncoderConfig.model_validate({"image_size": 32} | BACKBONES["vit"] | {"patch_dropout": 0.5})
    torch.manual_seed(3)
    built = build_image_encoder(config)
    after = torch.rand(1)
    torch.manual_seed(3)
    timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, patch_drop_rate=0.5, **SMALL_VIT)
    assert torch.equal(after, torch.rand(1))
    assert built.training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_experts_of_a_vit_learn_and_are_used_evenly(checkpointing: bool) -> None:
    """In every other block; their own loss reaches the router when activations are computed again, too."""
    torch.manual_seed(0)
    sizes = {"backbone": "vit_tiny_patch16_224", "image_size": 32, "options": {"embed_dim": 24, "depth": 4, "num_heads": 3}}
    options = {**sizes, "experts": {"count": 3, "balance_weight": 1.0}, "gradient_checkpointing": checkpointing}
    model = build_image_encoder(ImageEncoderConfig.model_validate(options)).train()
    layers = [part for part in model.modules() if isinstance(part, Experts)]
    assert [isinstance(block.mlp, Experts) for block in model.trunk.blocks] == [False, True, False, True]
    first, second = (layers[0].experts[i].fc1.weight for i in (0, 1))  # pyright: ignore[reportAttributeAccessIssue]
    assert not torch.equal(first, second)  # pyright: ignore[reportArgumentType]
    with auxiliary_losses(model) as told:
        model(torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8))
        found = told()
    assert found is not None
    found.total.backward()
    for layer in layers:
        assert layer.router is not None
        assert layer.router.weight.grad is not None
        assert layer.router.weight.grad.any()


def test_experts_are_for_vits() -> None:
    with pytest.raises(UserError, match="no plain ViT"):
        build_image_encoder(ImageEncoderConfig.model_validate({"experts": {"count": 2}}))
