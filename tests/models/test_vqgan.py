"""VQ-GANs: codes and images equal diffusers', in any batch."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from unlearning.errors import UserError
from unlearning.models.vqgan import VQGAN

IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_codes_and_images_are_those_of_diffusers(vqgan):
    model, vq = VQGAN.load(str(vqgan), device="cpu"), tiny.vqgan().eval()
    with torch.no_grad():
        z, _, (_, _, codes) = vq.quantize(vq.encode(2 * IMAGES - 1).latents)
        pictures = (vq.decode(z, force_not_quantize=True).sample / 2 + 0.5).clamp(0, 1)
    assert model.grid == (16, 16) and model.size == 64 and model.codebook.shape == (32, 4)
    assert torch.equal(model.encode(IMAGES).flatten(), codes)
    assert len(codes.unique()) > 4, "otherwise the test shows nothing"
    torch.testing.assert_close(model.decode(model.encode(IMAGES)), pictures)


def test_a_batch_changes_no_code(vqgan):
    model = VQGAN.load(str(vqgan), device="cpu")
    alone = torch.cat([model.encode(image[None]) for image in IMAGES])
    assert torch.equal(model.encode(IMAGES), alone)


def test_group_norms_round_no_more_than_pytorchs(vqgan):
    """For nearly constant input, where E[x²] - E[x]² would lose most digits."""
    norm = next(m for m in VQGAN.load(str(vqgan), device="cpu").encoder.modules() if isinstance(m, torch.nn.GroupNorm))
    x = 10 + 0.01 * torch.randn(2, norm.num_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = copy.deepcopy(norm).double()
        del exact.forward
        exact, stock = exact(x.double()), F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        ours = norm(x.to(memory_format=torch.channels_last))
    assert (ours - exact).abs().max() <= 2 * (stock - exact).abs().max()


def test_codes_of_a_gumbel_quantizer_are_the_argmax_of_its_logits():
    torch.manual_seed(1)
    vq, logits = tiny.vqgan(), torch.nn.Conv2d(4, 32, 1)
    model = VQGAN(vq, logits=logits, name="x", fingerprint="y", device=torch.device("cpu"))
    with torch.no_grad():
        expected = logits(vq.encode(2 * IMAGES - 1).latents).argmax(1)
    assert torch.equal(model.encode(IMAGES), expected) and torch.equal(model.encode(IMAGES), expected)


def test_an_image_smaller_than_a_code_is_refused(vqgan):
    with pytest.raises(UserError, match=r"dataset\.size=64"):
        VQGAN.load(str(vqgan), device="cpu").encode(IMAGES[..., :3, :3])


def test_half_precision_by_dtype(vqgan):
    assert VQGAN.load(str(vqgan), device="cpu", dtype="bfloat16").codebook.dtype == torch.bfloat16


def test_a_missing_or_broken_model_is_an_error(vqgan, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        VQGAN.load(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        VQGAN.load(str(tmp_path / "empty"))
    broken = tmp_path / "broken"
    tiny.vqgan().save_pretrained(broken)
    weights = broken / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=re.escape(tiny.lose_a_weight(weights))):
        VQGAN.load(str(broken))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="broken"):
        VQGAN.load(str(broken))


@pytest.mark.parametrize("part", ["encoder.conv_in.weight", "quantize.embedding.weight"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_values_that_are_not_finite_have_no_codes(vqgan, part, value):
    model = VQGAN.load(str(vqgan), device="cpu")
    model.vq.get_parameter(part).data.view(-1)[0] = float(value)
    model.encoder = model.vq.encoder
    with pytest.raises(UserError, match="not finite"):
        model.encode(IMAGES)
