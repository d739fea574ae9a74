"""Pictures of all kinds, folders of all kinds, and what is said about those that are no use."""

import numpy as np
import pytest
import torch
from libraries import library

for needed in ("torchvision", "timm"):
    library(needed)
Image = library("PIL.Image")

from fastmbconv.training.config import Config, read_toml, resumed, toml  # noqa: E402
from fastmbconv.training.data import open_data, read_folder, split  # noqa: E402
from fastmbconv.training.errors import TrainingError  # noqa: E402
from fastmbconv.training.loader import Order, Pictures, collate, look, shard, train_transform  # noqa: E402
from fastmbconv.training.pictures import PictureError, open_picture  # noqa: E402

RED = Image.new("RGB", (6, 4), (255, 0, 0))
MODES = {
    "grayscale.png": (RED.convert("L"), (76, 76, 76)),
    "cmyk.tif": (RED.convert("CMYK"), (255, 0, 0)),
    "palette.gif": (RED.convert("P"), (255, 0, 0)),
    "clear.png": (Image.new("RGBA", (6, 4), (255, 0, 0, 0)), (255, 255, 255)),
    "gray-alpha.png": (Image.new("LA", (6, 4), (10, 255)), (10, 10, 10)),
    "sixteen.png": (Image.fromarray(np.full((4, 6), 32768, np.uint16)), (128, 128, 128)),
    "bit.png": (Image.new("1", (6, 4), 1), (255, 255, 255)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(name, tmp_path):
    image, colour = MODES[name]
    image.save(tmp_path / name)
    picture = open_picture(tmp_path / name)
    assert picture.mode == "RGB" and picture.size == (6, 4)
    assert np.abs(np.asarray(picture).astype(int) - colour).max() <= 1


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    RED.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (4, 6)


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "not a picture"), (b"words", "not a picture"), ("cut", "trunc"), ("dot", "1 x 1 pixels")],
)
def test_a_broken_picture_says_why(content, told, tmp_path):
    path = tmp_path / "a.png"
    if content == "dot":
        RED.crop((0, 0, 1, 1)).save(path)
    elif content == "cut":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    else:
        path.write_bytes(content)
    with pytest.raises(PictureError, match=told):
        open_picture(path)


@pytest.fixture
def folder(tmp_path):
    """{"class": pictures} -> files, at a place below the test's folder."""

    def make(where, **classes):
        for name, count in classes.items():
            (tmp_path / where / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (8, 8), (index, len(where), 0)).save(tmp_path / where / name / f"{index}.png")
        return tmp_path

    return make


def test_a_split_holds_out_the_same_part_of_each_class(folder):
    root = folder(".", cat=10, dog=20)
    train, val = open_data(Config(data=str(root), val_fraction=0.3, seed=3))
    assert train.classes == val.classes == ("cat", "dog")
    assert np.bincount(val.labels).tolist() == [3, 6] and np.bincount(train.labels).tolist() == [7, 14]
    assert not set(train.pictures) & set(val.pictures)
    again = open_data(Config(data=str(root), val_fraction=0.3, seed=3))
    assert again[1].pictures == val.pictures
    assert open_data(Config(data=str(root), val_fraction=0.3, seed=4))[1].pictures != val.pictures


def test_train_and_val_folders_are_taken_as_they_are(folder):
    folder("train", a=3, b=2)
    train, val = open_data(Config(data=str(folder("val", a=1, b=1))))
    assert (len(train), len(val)) == (5, 2) and all("val" in str(path) for path in val.pictures)


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        ({}, "no folder with pictures"),
        ({"train/a": 2, "train/b": 2, "val/a": 1, "val/c": 1}, "val lacks 'b' and .*train lacks 'c'"),
        ({"a": 3}, "one class, 'a'"),
        ({"a": 3, "b": 0}, "b holds no picture"),
        ({"a": 3, "b": 1}, "class 'b' has 1 picture"),
    ],
    ids=["empty", "classes differ", "one class", "an empty class", "a single picture"],
)
def test_a_folder_that_is_no_use_says_what_to_do(folder, tmp_path, classes, told):
    for name, count in classes.items():
        folder(".", **{name: count})
    with pytest.raises(TrainingError, match=told):
        open_data(Config(data=str(tmp_path)))


def test_loose_pictures_and_unknown_names_are_told(tmp_path):
    RED.save(tmp_path / "a.png")
    with pytest.raises(TrainingError, match="1 pictures and no folder: put each class"):
        read_folder(tmp_path)
    with pytest.raises(TrainingError, match="named sets are mnist5k, digits"):
        open_data(Config(data="nowhere"))


def samples_with_a_broken_one(folder):
    root = folder(".", a=4, b=4)
    (root / "a" / "1.png").write_bytes(b"")
    return read_folder(root)


def test_a_broken_picture_is_replaced_in_training_and_left_out_in_evaluation(folder):
    samples = samples_with_a_broken_one(folder)
    config = Config(data="-", resolution=32)
    transform = train_transform(config, look(config, 32, False))
    keys = [(index, 7) for index in range(len(samples))]
    training = collate([Pictures(samples, transform, replace=True)[key] for key in keys])
    assert len(training.labels) == 8 and torch.equal(training.images[1], training.images[2])
    evaluation = collate([Pictures(samples, transform, replace=False)[key] for key in keys])
    assert len(evaluation.labels) == 7
    for batch in (training, evaluation):
        ((name, reason),) = batch.broken
        assert name.endswith("1.png") and "not a picture" in reason


def test_augmentation_follows_from_the_seed_and_leaves_the_generator(folder):
    samples = read_folder(folder(".", a=2, b=2))
    config = Config(data="-", resolution=32, erase=0.5)
    pictures = Pictures(samples, train_transform(config, look(config, 32, False)), replace=True)
    before = torch.get_rng_state()
    first = [pictures[3, seed][0] for seed in (1, 2, 1)]
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    assert torch.equal(before, torch.get_rng_state())


def test_processes_and_passes_share_the_same_steps():
    def steps(accumulate, world, start=0):
        orders = [Order(50, 12, accumulate, seed=5, rank=rank, world=world) for rank in range(world)]
        for order in orders:
            order.epoch, order.start = 2, start
        passes = [list(order) for order in orders]
        at = range(0, len(passes[0]), accumulate)
        return [sorted(sum((sum(each[i : i + accumulate], []) for each in passes), [])) for i in at]

    alone = steps(1, 1)
    assert [len(step) for step in alone] == [12] * 4 and len({key for step in alone for key in step}) == 48
    assert steps(2, 3) == alone and steps(3, 1, start=2) == alone[2:]
    seen = sorted(key for rank in range(3) for batch in shard(50, 4, rank, 3) for key, _ in batch)
    assert seen == list(range(50))


def test_a_configuration_comes_back_from_its_file(tmp_path):
    config = Config(data='pic"s', phi=0.5, lr=1e-3, fused=False, workers=0)
    (tmp_path / "config.toml").write_text(toml(config))
    assert Config(**read_toml(tmp_path / "config.toml")) == config


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (dict(resolution=8), "--resolution is 8: allowed are 32 and more"),
        (dict(optimizer="lion"), "--optimizer is 'lion': allowed are rmsprop, adamw, sgd"),
        (dict(drop_path=1.0), "--drop-path is 1.0: allowed are 0 and more, below 1"),
        (dict(epochs=3), "--warmup-epochs is 5 and --epochs is 3"),
        (dict(phi=1.0, model="efficientnet_b3"), "give one of the two"),
    ],
)
def test_a_wrong_option_is_named(values, told):
    with pytest.raises(TrainingError, match=told):
        Config(**values)


def test_a_resumed_run_keeps_what_its_weights_depend_on():
    stored = dict(data="d", seed=1, lr=0.1, workers=2)
    values, notes = resumed(stored, dict(lr=0.01, workers=0))
    assert values == dict(data="d", seed=1, lr=0.01, workers=0) and notes == ["--lr 0.1 -> 0.01"]
    with pytest.raises(TrainingError, match="--seed is 2 and the run to resume has 1"):
        resumed(stored, dict(seed=2))


def test_a_split_of_nothing_is_refused(folder):
    with pytest.raises(TrainingError, match="--val-fraction is 0"):
        split(read_folder(folder(".", a=2, b=2)), 0.0, 0)
