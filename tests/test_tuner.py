"""The search behind `fastmbconv tune`, with a compiler and a clock of the test's own, and the command around it."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fastmbconv import dispatch, tuner
from fastmbconv.cli import main, models
from fastmbconv.cli import tune as command
from fastmbconv.kernels import tables, tuning
from fastmbconv.mbconv import MBConv

GPU = torch.cuda.is_available()
CPU = torch.device("cpu")
NAME = "GPU of a test"


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), MBConv(8, 8, expand_ratio=2), MBConv(8, 8, expand_ratio=2))


@pytest.fixture(scope="module")
def found():
    blocks = tuner.cases(small(), (2, 3, 8, 8))
    return blocks, tuner.launches(blocks, torch.float32, ("fast", "lean"))


@pytest.fixture
def asked():
    """A launch that stands alone: pool's tiles start at [32 x 64], 4 warps."""
    question = tables.Question("pool", "key", dict(rows=400, channels=96), dict(BM=32, BC=64, num_warps=4))
    return tuner.Launch(question, lambda: tables.tiles, ())


def clock(question, cost):
    """A clock that asks, as a launcher would, which tiles are set, and charges `cost(tiles)` for them."""
    seen = []

    def measure(step):
        seen.append(tables._listener(question))
        return cost(seen[-1])

    return measure, seen


def far(tiles):
    """Milliseconds with a single best place: 128 x 16, 2 warps."""
    best = dict(BM=128, BC=16, num_warps=2)
    return 1 + sum(abs(tiles[name].bit_length() - best[name].bit_length()) for name in best)


def test_the_search_walks_to_the_fastest_tiles(asked):
    measure, seen = clock(asked.question, far)
    result = tuner.search(asked, lambda: None, spills=lambda step: 0, measure=measure)
    assert result.tiles == dict(BM=128, BC=16, num_warps=2)
    assert (result.ms, result.default_ms, result.timed) == (1, 6, len(seen)) and not result.rejected
    assert seen[0] == asked.question.default and len(seen) < 20


@pytest.mark.parametrize(("verdict", "reason"), [(4, "spills"), (None, "does not compile")])
def test_what_spills_is_never_timed_and_never_chosen(asked, verdict, reason):
    def spills(step):
        return verdict if tables._listener(asked.question)["BM"] > 32 else 0

    measure, seen = clock(asked.question, far)
    result = tuner.search(asked, lambda: None, spills=spills, measure=measure)
    assert result.tiles == dict(BM=32, BC=16, num_warps=2)
    assert result.rejected[reason] >= 1 and all(tiles["BM"] <= 32 for tiles in seen)


def test_a_default_that_spills_is_left(asked):
    def spills(step):
        return 2 if tables._listener(asked.question)["BM"] > 16 else 0

    measure, _ = clock(asked.question, far)
    result = tuner.search(asked, lambda: None, spills=spills, measure=measure)
    assert result.tiles["BM"] == 16 and result.default_ms == float("inf") > result.ms
    assert tuner.search(asked, lambda: None, spills=lambda step: 1, measure=measure).tiles is None


def test_noise_changes_nothing_and_time_that_is_up_ends_it(asked):
    times = iter([1.0, *[0.995] * 100])
    result = tuner.search(asked, lambda: None, spills=lambda step: 0, measure=lambda step: next(times))
    assert result.tiles == asked.question.default
    measure, seen = clock(asked.question, far)
    left = iter([1.0, 1.0, 1.0, 0.0])
    result = tuner.search(asked, lambda: None, spills=lambda step: 0, measure=measure, left=lambda: next(left, 0.0))
    assert len(seen) == 3 and result.ms == min(map(far, seen)) < result.default_ms


@pytest.mark.parametrize(
    ("kernel", "name", "sizes", "larger", "smaller"),
    [
        ("pool", "BM", dict(rows=49, channels=96), [64], [16, 8]),  # 64 rows hold 49
        ("depthwise_bwd", "R", dict(height=9, stride=2, expand=0), [6, 8], [2]),  # whole outputs
        ("depthwise_fwd", "NB", dict(images=128, stride=1, expand=24), [], []),  # a matrix product's least
    ],
)
def test_only_tiles_that_the_kernel_can_take_are_tried(kernel, name, sizes, larger, smaller):
    default = dict(BM=32, R=4, NB=16)
    assert tuner.neighbours(tables.Question(kernel, "key", sizes, default), default, name) == (larger, smaller)


def test_spills_are_read_off_the_compiled_kernels(found, monkeypatch, device):
    kernels = iter([3, 7])

    def run(kernel, *args, warmup, **kwargs):
        assert warmup  # compiled, not launched
        return SimpleNamespace(n_spills=next(kernels), _init_handles=lambda: None)

    for owner in (JITFunction, InterpretedFunction):
        monkeypatch.setattr(owner, "run", run)
    step = next(launch for launch in found[1] if launch.question.kernel == "pool").step(device)
    assert tuner.compiled_spills(lambda: (step(), step())) == 7
    assert tuner.compiled_spills(step) is None  # the iterator's end: a compiler that fails


def test_the_launches_of_a_model(found):
    blocks, launches = found
    assert [(case.size, case.count) for case in blocks] == [((2, 8, 4, 4), 2)]
    assert len({launch.question.key for launch in launches}) == len(launches)
    kernels = {launch.question.kernel for launch in launches}
    # Of a dense convolution, and of a model's ends.
    others = {"moments", "pointwise_pool"}
    assert set(tuning.SPACE) - kernels <= others
    walks = [launch.question.sizes["expand"] for launch in launches if launch.question.kernel == "depthwise_bwd"]
    assert sorted(walks) == [0, 8]
    pool = next(launch for launch in launches if launch.question.kernel == "pool")
    assert pool.count == 4  # two blocks, two plans; inference pools in its depthwise kernel
    assert pool.moved > pool.count * 2 * 16 * 4 * 4 * 4
    assert [launch.moved for launch in launches] == sorted((launch.moved for launch in launches), reverse=True)


def test_a_launch_keeps_no_tensor(found):
    """They are made again on the GPU: one of the CPU's would be refused there."""
    for launch in found[1]:
        parts = [p for a in launch.arguments for p in (a if isinstance(a, tuple) else (a,))]
        described = tuner.BlockCase if launch.question.kernel == "project_bwd" else tuner.Spec
        assert any(isinstance(part, described) for part in parts), launch.question.key
        assert not any(torch.is_tensor(part) for part in parts), launch.question.key


def test_a_launch_can_be_repeated_with_other_tiles(found, device):
    kinds = {launch.question.kernel: launch for launch in found[1]}
    for launch in kinds.values():
        taken = []

        def answer(question, taken=taken):
            taken.append(question.key)
            return question.default

        with tables.answered_by(answer):
            results = launch.step(device)()
        if launch.question.kernel in ("pointwise", "project_bwd", "expand_bwd"):  # a choice between launchers
            assert launch.question.key in taken
            continue
        first = results[0] if isinstance(results, tuple) else results
        assert taken[-1] == launch.question.key and torch.isfinite(first).all()


@pytest.fixture
def fake(monkeypatch):
    """A GPU's name, a compiler that never complains, and a clock that says 1 ms, or what the test appends."""
    times = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: NAME)
    monkeypatch.setattr(tuner, "compiled_spills", lambda step: 0)

    def device_ms(step):
        time = times.pop(0) if times else 1.0
        if time is None:
            raise KeyboardInterrupt
        return time

    monkeypatch.setattr(tuner, "device_ms", device_ms)
    return times


def stored(folder):
    return json.loads((folder / "gpu-of-a-test.json").read_text())


def test_a_search_stores_what_it_finds_and_goes_on_where_it_ended(fake, found, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTMBCONV_COMMIT", "abc")
    blocks, launches = found
    search = command.Search(CPU, torch.float32, tmp_path / "new", 1000)
    fake += [3.0, 1.5]
    assert search.run(launches[:2], blocks) == 0
    content = stored(tmp_path / "new")
    assert list(content["tiles"]) == [launch.question.key for launch in launches[:2]]
    assert list(content["memory"].values()) == ["fast"]
    assert content["head"]["source"] == "measured" and content["head"]["gpu"] == NAME
    assert content["head"]["commit"] == "abc"
    assert "2 launches searched; faster than the default: 1" in capsys.readouterr().out
    fake += [1.0] * 1000
    assert command.Search(CPU, torch.float32, tmp_path / "new", 1000).run(launches[:3], blocks) == 0
    assert "2 are in" in capsys.readouterr().out and len(stored(tmp_path / "new")["tiles"]) == 3
    table = tables.usable(tmp_path / "new" / "gpu-of-a-test.json", (NAME,), own=True)
    assert all(table.tiles[launch.question.key].items() <= launch.question.default.items() for launch in launches[1:3])


def test_an_interrupted_search_keeps_what_it_found(fake, found, tmp_path, capsys):
    search = command.Search(CPU, torch.float32, tmp_path, 1000)
    assert search.run(found[1][:1], []) == 0
    fake.append(None)
    assert search.run(found[1][:3], []) == 130
    assert list(stored(tmp_path)["tiles"]) == [found[1][0].question.key]
    assert "interrupted: 0 launches searched, 2 are left" in capsys.readouterr().err


def test_the_faster_plan_is_stored(fake, found, tmp_path):
    search = command.Search(CPU, torch.float32, tmp_path, 1000)
    fake += [2.0, 1.0]
    assert search.run([], found[0]) == 0
    (key,) = stored(tmp_path)["memory"]
    assert stored(tmp_path)["memory"] == {key: "lean"} and key == tuner.plan_key(found[0][0], torch.float32)


def test_a_terminal_gets_a_bar_and_a_pipe_plain_lines(capsys, monkeypatch):
    with command.progress(2) as show:
        show("pool: 1 ms")
    assert capsys.readouterr().out == "pool: 1 ms\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with command.progress(2) as show:
        show("pool: 1 ms")
    printed = capsys.readouterr().out
    assert "1/2" in printed and "pool" in printed


def test_a_broken_cache_is_named_and_replaced(fake, found, tmp_path):
    (tmp_path / "gpu-of-a-test.json").write_text("{")
    with pytest.warns(UserWarning, match="gpu-of-a-test.json is ignored"):
        search = command.Search(CPU, torch.float32, tmp_path, 1000)
    assert search.run(found[1][:1], []) == 0
    assert list(stored(tmp_path)["tiles"]) == [found[1][0].question.key]


def test_a_folder_that_can_not_be_written_is_an_error_before_any_work(fake, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(command.CommandError, match=r"--cache is .*file/sub: it can't be written"):
        command.Search(CPU, torch.float32, tmp_path / "file" / "sub", 1000)


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_tuning_is_an_error(capsys, monkeypatch):
    assert main(["tune", "efficientnet_b0"]) == 2
    assert "tuning needs a CUDA GPU, and TRITON_INTERPRET=1 is set; --dry-run" in capsys.readouterr().err
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    assert main(["tune", "efficientnet_b0"]) == 2
    assert "tuning needs a CUDA GPU, and torch sees none; --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["efficientnet_b99"], "MODEL is 'efficientnet_b99'"),
        (["timm:resnet18"], "it has no MBConv block"),
        (["efficientnet_b0", "--batch", "0"], "--batch is 0: allowed are 1 and more"),
        (["efficientnet_b0", "--resolution", "8"], "--resolution is 8: allowed are 32 and more"),
    ],
)
def test_a_wrong_argument_is_named(capsys, arguments, told):
    assert main(["tune", *arguments, "--dry-run"]) == 2
    assert told in capsys.readouterr().err


def test_a_dry_run_lists_buckets_and_candidates(capsys, monkeypatch):
    monkeypatch.setattr(models, "load", lambda name: models.Model(small(), 32))
    assert main(["tune", "small", "--batch", "16", "--dtype", "float16", "--memory", "fast", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "small, 16 images of 32 px, float16: " in printed and " distinct launches of 1 distinct blocks" in printed
    assert "\ndepthwise_fwd float16 images=16 height=16 channels=16 kernel_size=3 stride=1 expand=0 width=16" in printed
    assert not re.search("^depthwise_fwd .*expand=8", printed, re.M)  # the lean plan's


def test_a_search_starts_from_its_own_gpus_formulas(capsys, fake, monkeypatch):
    """Launches are caught on CPU tensors, for which the formulas would be a Hopper's."""
    asked = []
    monkeypatch.setattr(models, "load", lambda name: models.Model(small(), 32))
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(tuner, "launches", lambda *_: asked.append(tables.capability(CPU)) or [])
    monkeypatch.setattr(command.Search, "__init__", lambda self, *_: None)
    monkeypatch.setattr(command.Search, "run", lambda self, *_: 0)
    assert main(["tune", "small"]) == 0
    assert asked == [86] and tables.capability(CPU) == 90


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_real_search_finds_tiles_that_do_not_spill(tmp_path):
    device = torch.device("cuda", torch.cuda.current_device())
    blocks = tuner.cases(small(), (16, 3, 64, 64))
    launches = [each for each in tuner.launches(blocks, torch.float16, ("fast",)) if each.question.kernel == "pool"]
    assert command.Search(device, torch.float16, tmp_path, 60).run(launches, blocks) == 0
    name = torch.cuda.get_device_name(device)
    table = tables.read(tables.user_file(name, tmp_path), (name,), own=True)
    assert list(table.tiles) == [launch.question.key for launch in launches] and len(table.memory) == 1
