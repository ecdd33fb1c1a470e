"""Checkpoints of taming-transformers, compared with a reimplementation of its architecture."""

import pytest
import safetensors.torch
import torch

from tests.taming import VQGAN, Gumbel, Nearest
from unlearning.errors import UserError
from unlearning.models import vqgan as models
from unlearning.models.taming import convert, load

SMALL = {"ch": 32, "mult": (1, 1, 2), "attention": (8,), "resolution": 32, "codes": 300}


def network(quantizer, **sizes):
    """A network with random weights, norms and codebook; its codes vary as in a trained network."""
    torch.manual_seed(0)
    net = VQGAN(quantizer, **{**SMALL, "z": 48, "width": 48, **sizes}).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight.normal_(1, 0.3)
                module.bias.normal_(0, 0.3)
        net.encoder.conv_out.weight *= 10
    return net


def codes(model, logits, images):
    latents = model.encode(images).latents
    if logits is not None:
        return logits(latents).argmax(1)
    return model.quantize(latents)[2][2].view(len(latents), *latents.shape[-2:])


@pytest.mark.parametrize(
    "quantizer, sizes",
    [
        (Gumbel, {}),
        (Nearest, {}),
        (Nearest, {"width": 24}),  # a codebook that is narrower than the encoder's output
        (Nearest, {"attention": (16, 8), "blocks": 1}),
        (Nearest, {"mult": (1, 2), "attention": (), "blocks": 3}),
    ],
)
@torch.no_grad()
def test_codes_are_equal_and_images_are_close(quantizer, sizes):
    net = network(quantizer, **sizes)
    model, logits = convert(net.state_dict())
    assert (logits is not None) == (quantizer is Gumbel)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    expected = net.codes(images)
    assert expected.unique().numel() > 20
    assert torch.equal(codes(model, logits, images), expected)
    z_q = model.quantize.get_codebook_entry(expected.flatten(), (*expected.shape, net.quant_conv.out_channels))
    shown = model.decode(z_q, force_not_quantize=True).sample
    assert shown.std() > 0.05 and torch.allclose(shown, net.decode(expected), atol=1e-5)


@pytest.mark.parametrize(
    "sizes, cells", [({}, 32), ({"mult": (1, 1, 2, 2, 4), "attention": (16,), "codes": 16384}, 16)]
)
def test_full_sizes(sizes, cells):
    quantizer = Gumbel if not sizes else Nearest
    with torch.device("meta"):
        state = VQGAN(quantizer, **sizes).state_dict()
        model, logits = convert(state)
        latents = model.encode(torch.zeros(1, 3, 256, 256)).latents
        assert latents.shape == (1, 256, cells, cells)
        assert model.decode(latents, force_not_quantize=True).sample.shape == (1, 3, 256, 256)
        if logits:
            assert logits(latents).shape == (1, 8192, 32, 32)
    assert model.config.sample_size == 256
    count = sum(p.numel() for p in [*model.parameters(), *(logits.parameters() if logits else ())])
    assert count == sum(tensor.numel() for tensor in state.values())


def test_every_kind_of_file(tmp_path):
    net = network(Gumbel)
    state = {**net.state_dict(), "loss.discriminator.main.0.weight": torch.zeros(3)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    torch.save(state, tmp_path / "state.pth")
    safetensors.torch.save_file(state, tmp_path / "state.safetensors")
    expected = convert(net.state_dict())[0].state_dict()
    for file in ("last.ckpt", "state.pth", "state.safetensors"):
        model, logits = load(tmp_path / file)
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        assert torch.equal(logits.weight, net.quantize.proj.weight)
        assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("quantizer", [Gumbel, Nearest])
@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"autocast": "bfloat16"}])
def test_a_loaded_model_gives_codes_in_every_precision(tmp_path, quantizer, settings):
    """In float32 they are diffusers' codes of single images, for any batch."""
    torch.save(network(quantizer).state_dict(), tmp_path / "state.pth")
    model = models.VQGAN.load(str(tmp_path / "state.pth"), device="cpu", **settings)
    images = torch.rand(4, 3, 32, 32)
    found = model.encode(images)
    assert found.shape == (4, 8, 8) and len(found.unique()) > 20
    assert model.decode(found).isfinite().all()
    if not settings:
        stock = load(tmp_path / "state.pth")
        with torch.no_grad():
            alone = torch.cat([codes(*stock, 2 * picture - 1) for picture in images.split(1)])
        assert torch.equal(found, alone) and torch.equal(found[:1], model.encode(images[:1]))


def test_half_precision_is_read_as_float32(tmp_path):
    torch.save({name: value.half() for name, value in network(Nearest).state_dict().items()}, tmp_path / "half.pth")
    assert load(tmp_path / "half.pth")[0].dtype == torch.float32


class Callback:
    """An object like those in old checkpoints of Lightning."""


def test_objects_are_not_unpickled_and_the_error_says_how_to_extract_the_tensors(tmp_path):
    torch.save({"state_dict": network(Gumbel).state_dict(), "callbacks": {Callback: {}}}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt.*\['state_dict'\].*last\.pth"):
        load(tmp_path / "last.ckpt")


def broken(**changes):
    """A state dict with some keys removed (None) or added."""
    state = {**network(Gumbel).state_dict(), **{key.replace("__", "."): value for key, value in changes.items()}}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    "state, message",
    [
        (broken(decoder__up__1__block__2__conv1__bias=None), r"decoder\.up\.1\.block\.2\.conv1\.bias"),
        (broken(quantize__embed__weight=None), r"quantize\.embed\.weight"),
        (broken(quantize__proj__bias=None), r"quantize\.proj\.bias"),
        (broken(colorize=torch.zeros(1)), r"colorize"),
        (broken(post_quant_conv__weight=torch.zeros(7, 48, 1, 1)), r"post_quant_conv\.weight.*\(7, 48, 1, 1\)"),
        ({"unet.weight": torch.zeros(1)}, "there is no"),
        ({"state_dict": 3}, "holds no state dict"),
        ([torch.zeros(1)], "holds no state dict"),
    ],
)
def test_the_error_for_a_foreign_checkpoint_names_the_file_and_the_key(tmp_path, state, message):
    torch.save(state, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match=rf"foreign\.ckpt.*{message}"):
        load(tmp_path / "foreign.ckpt")


@pytest.mark.parametrize("name", ["last.ckpt", "last.safetensors"])
@pytest.mark.parametrize("share", [0.5, 0.0])
def test_a_damaged_file_is_an_error(tmp_path, name, share):
    save = safetensors.torch.save_file if name.endswith("safetensors") else torch.save
    save(network(Nearest).state_dict(), tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=rf"{name}.*cannot be read"):
        load(tmp_path / name)


def test_the_error_for_a_missing_file_names_its_source(tmp_path):
    with pytest.raises(UserError, match=r"last\.ckpt.*CompVis/taming-transformers.*vqgan_gumbel_f8"):
        load(tmp_path / "last.ckpt")
