"""A fresh process restores a saved codebook edit exactly, and refuses other classes."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests import processes
from unlearning.codes.erasure import CodebookEdit
from unlearning.codes.replacement import Blocks, CodeStatistics, Constant, Nearest, Neighbours, Uniform
from unlearning.detectors.boxes import Boxes
from unlearning.detectors.judge import Judge
from unlearning.detectors.nudenet import NudeNet
from unlearning.erasures.base import Erasure
from unlearning.errors import UserError

K = 5
BASE = SimpleNamespace(name="a VQ-GAN", fingerprint="0")


def edit(replacement, detector=None) -> CodebookEdit:
    across, down = torch.eye(K, dtype=torch.int32).to_sparse(), torch.ones(K, K, dtype=torch.int32).to_sparse()
    statistics = CodeStatistics(torch.tensor([4]), torch.tensor([0, 1]), torch.arange(K), across, down)
    return CodebookEdit(statistics, replacement, detector)


@pytest.mark.parametrize("replacement", [Constant(2), Uniform(), Nearest(), Blocks(), Neighbours(sweeps=2)])
@pytest.mark.parametrize("detector", [None, Boxes(), Judge("cat", "x"), NudeNet(expand=0.1)])
def test_an_edit_is_read_as_it_was_written(tmp_path, replacement, detector):
    written = edit(replacement, detector)
    written.save(tmp_path, base=BASE)
    read = Erasure.load(tmp_path)
    assert (read.replacement, read.detector) == (replacement, detector)
    assert torch.equal(read.statistics.across.to_dense(), torch.eye(K, dtype=torch.int32))
    assert torch.equal(read.statistics.explicit, written.statistics.explicit)


def test_a_fresh_process_finds_the_classes(tmp_path):
    edit(Uniform(), Judge("cat", "x")).save(tmp_path, base=BASE)
    code = "import sys; from unlearning.erasures.base import Erasure; print(Erasure.load(sys.argv[1]).detector.concept)"
    assert processes.run(code, [tmp_path]).strip() == "cat"


@pytest.mark.parametrize("kind", ["os.system", "unlearning.codes.replacement.Missing", "unlearning.errors.UserError"])
def test_other_classes_are_not_loaded(tmp_path, kind):
    edit(Uniform()).save(tmp_path, base=BASE)
    path = tmp_path / "erasure.json"
    path.write_text(json.dumps(json.loads(path.read_text())).replace("unlearning.codes.replacement.Uniform", kind))
    with pytest.raises(UserError, match="Replacement"):
        Erasure.load(tmp_path)
