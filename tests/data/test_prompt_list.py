"""Lists of prompts in I2P's format: seeds and guidance scales, invalid rows, resuming after an interruption."""

import csv
import gzip
import json

import pytest
from hydra.utils import instantiate
from PIL import Image

from tests.composed import config
from unlearning.data.captions import captions
from unlearning.data.prompt_list import prompt_list
from unlearning.errors import UserError
from unlearning.sampling.sampler import Sampler
from unlearning.store.manifest import read_manifest

HEADER = "prompt,categories,evaluation_seed,evaluation_guidance\n"
ROWS = ['"a cat, asleep",x,11,7.5', "a dog,x,12,5", "a cat,x,13.0,7"]


@pytest.fixture
def listed(tmp_path):
    def write(*rows: str, header: str = HEADER):
        path = tmp_path / "list.csv"
        path.write_text(header + "".join(f"{row}\n" for row in rows))
        return path

    return write


def test_every_row_brings_its_seed_and_its_scale(listed):
    task = prompt_list("cat", listed(*ROWS))
    assert not task.skipped and {p.concept for p in task.prompts} == {"cat"}
    assert [(p.text, p.seed, p.guidance_scale) for p in task.prompts] == [
        ("a cat, asleep", 11, 7.5),
        ("a dog", 12, 5.0),
        ("a cat", 13, 7.0),
    ]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("  ,x,1,7", "prompt"),
        ("a dog,x,one,7", "evaluation_seed is 'one'"),
        ("a dog,x,1.5,7", "evaluation_seed is 1.5"),
        ("a dog,x,-1,7", "evaluation_seed is -1"),
        ("a dog,x,1e30,7", "evaluation_seed is 1e30"),
        ("a dog,x,1,nan", "evaluation_guidance is 'nan'"),
        ("a dog,x,1", "evaluation_guidance is None"),
        ("a dog, asleep,x,1,7", "5 cells, the header 4"),
    ],
)
def test_a_bad_row_is_named_by_its_line_and_skipped(listed, row, why):
    task = prompt_list("cat", listed(ROWS[0], row, ROWS[1]))
    assert [p.text for p in task.prompts] == ["a cat, asleep", "a dog"]
    [skipped] = task.skipped
    assert "line 3" in skipped and why in skipped


def test_a_prompt_is_never_cut_at_its_commas(listed):
    task = prompt_list("cat", listed("a cat, asleep", '"a cat, awake"', "a dog,, ", header="prompt\n"))
    assert [p.text for p in task.prompts] == ["a cat, awake", "a dog"]
    assert len(task.skipped) == 1 and "line 2" in task.skipped[0] and "quotes" in task.skipped[0]
    with pytest.raises(UserError, match=r"line 6: .*\n\.\.\. and 35 more rows$"):
        prompt_list("cat", listed(*["a cat, asleep"] * 40, header="prompt\n"))


def test_a_seed_that_no_float_holds_is_kept(listed):
    task = prompt_list("cat", listed(f"a cat,x,{2**53 + 1},7", "a dog,x,12.0,7"))
    assert [p.seed for p in task.prompts] == [2**53 + 1, 12]


def test_rows_belong_to_the_concept_that_their_column_names(listed):
    header, rows = f"concept,{HEADER}", [f"cat,{ROWS[0]}", f"dog,{ROWS[1]}", f",{ROWS[2]}", f"sky,{ROWS[2]}"]
    task = prompt_list(["cat", "dog"], listed(*rows, header=header))
    assert [p.concept for p in task.prompts] == ["cat", "dog", ""] and {p.role for p in task.prompts} == {"erase"}
    [skipped] = task.skipped
    assert "line 5" in skipped and "'sky'" in skipped
    assert {p.concept for p in prompt_list(["cat", "dog"], listed(*ROWS)).prompts} == {""}


def test_an_unusable_list_gives_an_error(listed, tmp_path):
    with pytest.raises(UserError, match="no column 'prompt'.*caption.*promt,evaluation_seed".replace(",", ", ")):
        prompt_list("cat", listed("a cat,1", header="promt,evaluation_seed\n"))
    with pytest.raises(UserError, match="line 2"):
        prompt_list("cat", listed(",x,1,7"))
    for unclosed in (['"a cat,x,1,7', *ROWS[1:]], ['"a cat,x,1,7', *ROWS], ['a ""cat"",x,1,7', '"a dog" or two,x,1,7']):
        with pytest.raises(UserError, match=r"list\.csv, line \d: its quotes"):
            prompt_list("cat", listed(*unclosed))
    with pytest.raises(UserError, match="line 2: its quotes"):
        prompt_list("cat", listed('"a cat,x,1,7', *ROWS[1:]))
    with pytest.raises(UserError, match=r"none\.csv"):
        prompt_list("cat", tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("header", "row", "seed", "scale"),
    [
        ("prompt", "a cat", None, None),
        ("prompt,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height", "a cat,7,8.5,512,768", 7, 8.5),
        ("case_number,prompt,evaluation_seed,evaluation_guidance", "3,a cat,7,8.5", 7, 8.5),
        (" Prompt , Seed ,Guidance Scale", "a cat,7,8.5", 7, 8.5),
        ("Sensitive Prompt", "a cat", None, None),
        ("id;caption;seed", "1;a cat;7", 7, None),
        ("id\ttext", "1\ta cat", None, None),
        ("target_prompt,adv_prompt", "x,a cat", None, None),
        ("evaluation_seed,sd_seed,prompt", "7,8,a cat", 7, None),
    ],
)
def test_lists_of_the_field_are_read(listed, header, row, seed, scale):
    [prompt] = prompt_list("cat", listed(row, header=f"{header}\n")).prompts
    assert (prompt.text, prompt.seed, prompt.guidance_scale) == ("a cat", seed, scale)


SIZED = "prompt,sd_seed,sd_image_width,Height\n"


def test_every_row_brings_its_size(listed):
    path = listed("a cat,1,512,768", "a dog,2,640.0,", "a fox,3, ,", header=SIZED)
    assert [(p.height, p.width) for p in prompt_list("cat", path).prompts] == [(768, 512), (None, 640), (None, None)]
    assert {(p.height, p.width) for p in prompt_list("cat", path, sizes=False).prompts} == {(None, None)}
    assert {(p.height, p.width) for p in captions("cat", path).prompts} == {(None, None)}, "those of photographs"


@pytest.mark.parametrize("width", ["wide", "0", "-64", "12.5", "1e9", "nan"])
def test_an_invalid_size_is_reported_with_its_line(listed, width):
    task = prompt_list("cat", listed("a cat,1,512,768", f"a dog,2,{width},768", header=SIZED))
    [skipped] = task.skipped
    assert len(task.prompts) == 1 and "line 3" in skipped and "sd_image_width is" in skipped


def test_rows_of_several_sizes_are_drawn_and_measured(unlearn, listed):
    rows = ["a cat,1,16,16", "a dog,2,24,32", "a cat,3,,", "a dog,4,24,32", "a fox,5,,48"]
    chosen = ["dataset=prompt_list", f"dataset.path={listed(*rows, header=SIZED)}", "dataset.anchor=sky"]
    run = unlearn(*chosen, "method=uce", "evaluator=[clip_score]")
    assert "efficacy/clip_score_e" in json.loads((run / "metrics.json").read_text()) and (run / "report.html").exists()
    for name in ("base", "erased"):
        drawn = [(r.seed, Image.open(r.path).size) for r in read_manifest(run / "images" / f"{name}.csv")]
        assert drawn == [(1, (16, 16)), (2, (24, 32)), (3, (16, 16)), (4, (24, 32)), (5, (16, 48))]


def test_an_attack_on_images_of_other_sizes_is_refused_before_anything_is_fitted(error_of, tmp_path, listed):
    chosen = ["dataset=prompt_list", f"dataset.path={listed('a cat,1,24,32', header=SIZED)}", "attack=[completion]"]
    said = error_of(*chosen, "method=uce")
    assert "24×32" in said and "dataset.sizes=false" in said and not (tmp_path / "run" / "erasure").exists()


def test_an_attack_by_prompts_alone_takes_any_size(unlearn, listed):
    rows = listed("a cat,1,24,32", "a cat,2,,", header=SIZED)
    run = unlearn("dataset=prompt_list", f"dataset.path={rows}", "attack=[paraphrase]", "stages=[fit,attack,generate]")
    sizes = [Image.open(row.path).size for row in read_manifest(run / "images" / "attacked-paraphrase.csv")]
    assert sizes == [(24, 32), (16, 16)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "latin-1"])
@pytest.mark.parametrize("packed", [False, True])
def test_lists_of_any_encoding_are_read(tmp_path, encoding, packed):
    text = 'prompt;seed\r\na café;1\r\n\r\n"two\r\nlines";2\r\n'.encode(encoding)
    path = tmp_path / ("list.csv.gz" if packed else "list.csv")
    path.write_bytes(gzip.compress(text) if packed else text)
    assert [(p.text, p.seed) for p in prompt_list("cat", path).prompts] == [("a café", 1), ("two\r\nlines", 2)]


def test_a_file_that_is_not_utf_8_is_said_to_be_read_as_another(listed, tmp_path, caplog):
    (tmp_path / "list.csv").write_bytes("prompt\na cat\na café\n".encode("latin-1"))
    prompt_list("cat", tmp_path / "list.csv")
    assert "line 3" in caplog.text and "utf-8" in caplog.text


def test_a_long_prompt_is_read(listed):
    task = prompt_list("cat", listed(f"{'cat ' * 50_000},1", header="prompt,seed\n"))
    assert len(task.prompts[0].text) == 199_999


def test_a_binary_file_is_reported(tmp_path):
    utf_32, binary = "prompt\na cat\n".encode("utf-32"), bytes(range(256))
    for name, content in (("a.csv.gz", b"no gzip"), ("b.csv", b"\xff\xfea"), ("c.csv", b""), ("d.csv", utf_32),
                          ("e.csv", binary), ("f.csv", b"prompt\na cat\na \0dog\n")):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name) as caught:
            prompt_list("cat", tmp_path / name)
        assert str(caught.value).isprintable()


def test_the_i2p_error_names_the_source(tmp_path):
    with pytest.raises(Exception, match=r"AIML-TUDA/i2p") as caught:
        instantiate(config(tmp_path, "dataset=i2p").dataset)
    assert "dataset.path=" in str(caught.value)


def test_the_included_list_is_complete(tmp_path):
    task = instantiate(config(tmp_path, "dataset=prompt_list").dataset)
    assert len(task.prompts) == 20 and not task.skipped and task.name == "cat"


SHORT = ["method=unguide", "method.iterations=1", "method.trajectory=exact", "method.batch_size=1", "method.repeats=1"]


def test_the_exit_message_counts_the_rows_that_were_skipped(error_of, listed):
    path = listed(*ROWS, "a dog,x,one,7")
    assert "rows that were skipped: 1" in error_of("dataset=prompt_list", f"dataset.path={path}", "method=none")


def rows_of(run) -> list[dict]:
    with (run / "images" / "erased.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_killed_and_resumed_run_gives_the_same_result(unlearn, listed, tmp_path, monkeypatch):
    """An interrupted and resumed run gives the same images and manifest as an uninterrupted one."""
    overrides = ["dataset=prompt_list", f"dataset.path={listed(*ROWS)}", *SHORT, "stages=[fit,generate]"]
    whole = unlearn(*overrides, "sampler.batch_size=1", f"paths.store={tmp_path}/other", run="whole")
    draw, calls = Sampler.draw, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return draw(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "draw", interrupted)
        with pytest.raises(SystemExit, match="goes on from here"):
            unlearn(*overrides, "sampler.batch_size=1")
    again = unlearn(*overrides, "sampler.batch_size=1")
    before, after = (read_manifest(run / "images" / "erased.csv") for run in (whole, again))
    assert [(r.prompt, r.seed, r.guidance_scale, r.decided) for r in after] == [
        (r.prompt, r.seed, r.guidance_scale, r.decided) for r in before
    ]
    assert [r.path.read_bytes() for r in after] == [r.path.read_bytes() for r in before]
    assert all({"D", "w"} == set(r.decided) for r in after)
    assert [row["seed"] for row in rows_of(again)] == ["11", "12", "13"]
