"""Where a launcher's tiles come from: the tables' order, what makes one unusable, and what the formula does instead."""

import json
import math
import re
import warnings
from functools import partial

import pytest
import torch

import fastmbconv
from fastmbconv.kernels import tables, tuning
from fastmbconv.mbconv import MBConv

HEAD = {"format": 1, "gpu": "GPU of a test", "triton": [".".join(map(str, tuning.TRITON))]}
GPUS = ("GPU of a test", "sm_90")
DEFAULT = dict(BM=64, BC=64, num_warps=4)
KEY = "pool bfloat16 rows=64- channels=8 norm"


def formula(rows, channels):
    return DEFAULT


def ask(rows=49, channels=8):
    return tables.tiles("pool", torch.empty(0, dtype=torch.bfloat16), formula, (rows, channels), norm=True, dy=False)


@pytest.fixture(autouse=True)
def nothing_remembered():
    tables.forget()
    yield
    tables.forget()


@pytest.fixture
def hold(monkeypatch):
    """Lets these tables answer for every device, the first one first."""

    def held(*content):
        found = tuple(tables.Table(HEAD, **each) for each in content)
        monkeypatch.setattr(tables, "of", partial(_same, found))
        tables._answers.clear()

    yield held
    monkeypatch.undo()


def _same(found, device):
    return found


_same.cache_clear = lambda: None


def test_the_first_table_answers_then_the_formula(hold):
    assert ask() == DEFAULT
    hold({"tiles": {KEY: {"BM": 16}}}, {"tiles": {KEY: {"BM": 32}, KEY.replace("8", "16"): {"num_warps": 8}}})
    assert ask() == DEFAULT | {"BM": 16}
    assert ask(channels=16) == DEFAULT | {"num_warps": 8}
    assert ask(channels=24) == DEFAULT


def test_a_bucket_holds_counts_that_compile_to_the_same_kernel(hold):
    hold({"tiles": {KEY: {"BM": 16}}})
    assert [ask(rows)["BM"] for rows in (33, 36, 63)] == [16, 16, 16]
    assert [ask(rows)["BM"] for rows in (32, 48, 64, 65)] == [64, 64, 64, 64]


@pytest.mark.parametrize(
    ("kernel", "entry", "sizes"),
    [
        ("depthwise_bwd", {"R": 3}, dict(stride=2, expand=0)),  # rows of half an output
        ("depthwise_fwd", {"NB": 8}, dict(stride=1, expand=16)),  # too few images for a matrix product
        ("pool", {"BK": 16}, {}),
    ],
)
def test_tiles_that_a_kernel_can_not_take_are_not_taken(hold, kernel, entry, sizes):
    default = dict(R=4, NB=16) if sizes else DEFAULT
    question = tables.Question(kernel, "key", sizes, default)
    hold({"tiles": {"key": entry}}, {"tiles": {"key": {}}})
    assert tables.answer(question, torch.device("cpu")) == default


def test_what_is_written_is_read(tmp_path):
    path = tables.user_file(GPUS[0], tmp_path / "new")
    table = tables.Table(HEAD | {"fastmbconv": fastmbconv.__version__}, {KEY: {"BM": 16}}, {"block": "lean"})
    tables.write(path, table)
    assert path.name == "gpu-of-a-test.json" and [each.name for each in path.parent.iterdir()] == [path.name]
    assert tables.usable(path, GPUS, own=True) == table


def test_a_failed_write_leaves_the_old_table(tmp_path):
    path = tmp_path / "table.json"
    tables.write(path, tables.Table(HEAD, {KEY: {"BM": 16}}))
    with pytest.raises(TypeError):
        tables.write(path, tables.Table(HEAD | {"when": object()}))
    assert json.loads(path.read_text())["tiles"] == {KEY: {"BM": 16}}
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "Expecting property name"),
        ("[1]", "no table of tile sizes"),
        ({"head": HEAD | {"format": 0}}, "format is 0, and this version reads 1"),
        ({"head": HEAD | {"gpu": "another"}}, "for 'another', and this GPU is 'GPU of a test'"),
        ({"head": HEAD | {"triton": ["2.0"]}}, "holds for Triton ['2.0']"),
        ({"head": HEAD | {"fastmbconv": "0"}}, "fastmbconv 0 wrote it"),
        ({"tiles": {"cook bfloat16": {"BM": 16}}}, "'cook bfloat16', which is no kernel's"),
        ({"tiles": {KEY: {"BM": 24}}}, "BM 24: allowed are 8, 16, 32"),
        ({"tiles": {KEY: {"BM": True}}}, "BM True"),
        ({"tiles": {KEY: {"BX": 16}}}, "BX 16: allowed are BM, BC, num_warps"),
        ({"memory": {"block": "small"}}, "'small': allowed are 'fast' and 'lean'"),
        ({"tiles": []}, "are no tables"),
    ],
)
def test_an_unusable_file_is_named_once_and_ignored(tmp_path, content, told):
    path = tmp_path / "table.json"
    if isinstance(content, dict):
        content = json.dumps({"head": HEAD | {"fastmbconv": fastmbconv.__version__}} | content)
    path.write_text(content)
    with pytest.warns(UserWarning, match=re.escape(str(path))) as caught:
        assert tables.usable(path, GPUS, own=True) is None
    assert len(caught) == 1 and told in str(caught[0].message) and "fastmbconv tune" in str(caught[0].message)


def test_no_file_is_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tables.usable(tmp_path / "none.json", GPUS, own=True) is None


def test_the_user_file_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tables.user_file("NVIDIA H100 80GB HBM3") == tmp_path / "fastmbconv" / "nvidia-h100-80gb-hbm3.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tables.user_file("x").parent == tmp_path / "home" / ".cache" / "fastmbconv"


def test_shipped_tables_are_usable_and_say_how_they_came_to_be():
    shipped = sorted(tables.SHIPPED.glob("*.json"))
    for path in shipped:
        head = json.loads(path.read_text())["head"]
        table = tables.read(path, (head["gpu"],), own=False)
        assert path.stem in (head["gpu"], tables.slug(head["gpu"])) and (table.tiles or table.memory)
        assert head["source"] in ("static", "measured")
        assert {"commit", "torch", "triton"} <= set(head)


def test_tiles_shrink_where_the_compiler_would_spill_them():
    def asked(kernel, tiles, capability, **sizes):
        return tuning.relieved(kernel, tiles, sizes, capability)

    resident, streamed = (
        dict(RESIDENT=1, BM=64, BK=64, BO=64, STAGES=3),
        dict(RESIDENT=0, BM=64, BK=64, BO=64, STAGES=3),
    )
    assert [asked("pointwise_fwd", resident, chip, reduce=384)["STAGES"] for chip in (80, 86, 90, 100)] == [2, 1, 3, 3]
    assert [asked("pointwise_fwd", streamed, chip, reduce=384)["STAGES"] for chip in (80, 86, 90)] == [3, 3, 3]
    full = dict(BM=64, BE=64, STAGES=3)
    chips = (80, 86, 89, 90, 100, 120)
    few, some, many = ([asked("expand_pass", full, chip, channels=c) for chip in chips] for c in (16, 24, 40))
    assert [tiles["STAGES"] for tiles in few] == [3, 2, 2, 3, 3, 2]
    assert [tiles["BM"] for tiles in few] == [64] * 6 and [tiles["BE"] for tiles in some] == [64] * 6
    assert [tiles["BM"] for tiles in some] == [64, 64, 64, 64, 32, 32]
    assert [(tiles["BM"], tiles["BE"]) for tiles in many] == [(32, 32)] * 3 + [(64, 64), (32, 64), (32, 32)]


WALKS = {  # images, height, channels, kernel size, stride, backward
    "large": (128, 56, 144, 3, 1, False),
    "large-back": (128, 28, 240, 5, 1, True),
    "eight": (8, 14, 672, 5, 1, False),
    "eight-back": (8, 14, 672, 5, 2, True),
    "one": (1, 7, 1152, 5, 1, False),
    "one-back": (1, 14, 480, 3, 2, True),
    "narrow": (1, 112, 16, 3, 1, True),
}


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_walks_of_small_batches_are_cut_into_more_programs(monkeypatch, walk):
    """As many as a GPU runs side by side, or as there can be; whole strides, and two elements a thread for cp.async."""
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    images, height, channels, kernel_size, stride, backward = walk
    tiles = tuning.walk_tiles(images, height, channels, kernel_size, stride, torch.bfloat16, backward)
    parts = images / tiles["NB"], height / tiles["R"], channels / tiles["BC"]
    step = stride if backward else 1
    smallest = tiles["num_warps"] == 1 and tiles["R"] < 4 * step
    assert math.prod(map(math.ceil, parts)) >= tuning.PROGRAMS or smallest
    assert tiles["R"] % step == 0 and tiles["BC"] >= tuning.MIN_DOT
    assert tiles["NB"] * tiles["BC"] == 64 * tiles["num_warps"] or tiles["num_warps"] == 1


@pytest.mark.usefixtures("triton_backend")
def test_fast_is_lean_where_a_table_says_so_in_training(hold, device):
    def kept(x, block):
        """Sizes of what the block saves for its backward."""
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            block(x)
        return sizes

    block = MBConv(8, 8, expand_ratio=2).to(device)
    x = torch.randn(2, 8, 4, 4, device=device, requires_grad=True)
    fast, lean = kept(x, block), kept(x, fastmbconv.fuse(block, memory="lean"))
    key = tables.memory_key(x.dtype, x.shape, 16, 3, 1, "silu")
    shape = "images=2- height=4 width=4 channels=8 hidden=16 kernel_size=3 stride=1 activation=silu"
    assert key == f"block float32 {shape}"
    hold({"memory": {key: "lean"}})
    fastmbconv.fuse(block, memory="fast")
    assert kept(x, block) == lean != fast
    assert kept(x[:, :, :3], block) != lean  # another bucket
    assert len(kept(x, block.eval())) == len(fast)
    hold({"memory": {key: "fast"}}, {"memory": {key: "lean"}})
    assert kept(x, block.train()) == fast


def test_either_way_to_choose_tf32_is_followed(monkeypatch):
    """torch raises where `allow_tf32` is asked for after `fp32_precision` was set."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for chosen in ("ieee", "tf32"):
            conv.fp32_precision = chosen
            assert tuning.precision(torch.float32) == chosen
    finally:
        conv.fp32_precision = before
    assert tuning.precision(torch.bfloat16) == "ieee"
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert tuning.precision(torch.float32) == ("tf32" if allowed else "ieee")
