"""CIFAR-10.1, CIFAR-10-C, ciFAIR-10 and CIFAR-10-N in their published formats, and their scores."""

from __future__ import annotations

import csv
import json
import pickle
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import resfast
from resfast.cli.evaluate import main as evaluate_command
from resfast.cli.train import main as train_command
from resfast.config.network import network
from resfast.config.schema import Config, DataConfig, ModelConfig, RuntimeConfig
from resfast.data.cifar_names import CIFAR10, CIFAR100
from resfast.data.noisy_labels import read_noisy
from resfast.data.sources import load_dataset, open_data
from resfast.errors import ResfastError
from resfast.inference import load as inference
from resfast.inference.corruption import evaluate_corrupted, mean_error
from resfast.models.presets import build_model
from resfast.runs.checkpoint import save_weights

TINY = (
    "--model resnet --blocks 1 --channels 8 --stem 8 --augment none --batch-size 10 --epochs 1 "
    "--compile off --precision fp32 --threads 1 --no-plots --name noisy"
).split()
RANDOM = np.random.default_rng(3)


def pixels(count: int) -> np.ndarray:
    return RANDOM.integers(0, 256, (count, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained run with the classes of CIFAR-10."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    config = Config(
        model=ModelConfig(model="resnet", blocks=(1,), channels=(8,), stem=8),
        data=DataConfig(data="digits", data_dir=folder / "data"),
        runtime=RuntimeConfig(device="cpu", precision="fp32", compile="off"),
    )
    torch.manual_seed(0)
    model = build_model(network(config.model), 10, 32)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    save_weights(folder / "model.safetensors", model, config, CIFAR10, mean, std)
    return folder


def score(run: Path, images: np.ndarray, labels: np.ndarray) -> float:
    logits = resfast.load(run).logits(torch.from_numpy(images))
    return float((logits.argmax(1) == torch.from_numpy(labels.astype(np.int64))).double().mean())


def pack(folder: Path, kind: str) -> Path:
    """A folder as it is, or as a tar or zip that holds it."""
    if kind == "folder":
        return folder
    path = folder.with_name(f"{folder.name}.{kind}")
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(folder.iterdir()):
                archive.write(file, f"{folder.name}/{file.name}")
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            archive.add(folder, folder.name)
    return path


# -- CIFAR-10.1 ------------------------------------------------------------------------------------


def write_cifar10_1(folder: Path, *versions: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder.mkdir(exist_ok=True)
    written = {}
    for number, version in enumerate(versions):
        images, labels = pixels(20 + number), RANDOM.integers(0, 10, 20 + number).astype(np.int32)
        np.save(folder / f"cifar10.1_{version}_data.npy", images)
        np.save(folder / f"cifar10.1_{version}_labels.npy", labels)
        written[version] = images, labels
    return written


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_cifar10_1_is_scored(kind: str, run: Path, tmp_path: Path, capsys):
    written = write_cifar10_1(tmp_path / "CIFAR-10.1", "v4", "v6")
    path = pack(tmp_path / "CIFAR-10.1", kind)
    for part, version in (("", "v6"), ("#v4", "v4"), ("#v6", "v6")):
        result = resfast.evaluate(run, f"cifar10.1:{path}{part}")
        assert result.accuracy == pytest.approx(score(run, *written[version]))
        assert result.record["test_images"] == len(written[version][0])
        assert f"CIFAR-10.1 {version}: " in capsys.readouterr().err
    if kind == "folder":
        file = path / "cifar10.1_v4_data.npy"
        assert resfast.evaluate(run, f"cifar10.1:{file}").record["test_images"] == 20


def test_data_without_training_images_are_not_trained_on(tmp_path: Path, capsys):
    write_cifar10_1(tmp_path / "a", "v6")
    data = f"cifar10.1:{tmp_path / 'a'}"
    with pytest.raises(ResfastError, match=r"has test images only: train on other data, and score"):
        open_data(data, data_dir=tmp_path)
    assert train_command([*TINY, "--data", data, "--out", str(tmp_path / "runs")]) == 2
    assert "has test images only" in capsys.readouterr().err


def test_damaged_files_of_cifar10_1_are_one_sentence(tmp_path: Path):
    folder = tmp_path / "a"
    write_cifar10_1(folder, "v6")
    data, labels = folder / "cifar10.1_v6_data.npy", folder / "cifar10.1_v6_labels.npy"

    def error() -> str:
        with pytest.raises(ResfastError) as caught:
            load_dataset(f"cifar10.1:{folder}", data_dir=tmp_path, test_only=True)
        return str(caught.value)

    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    assert "is cut off after 0 of 20 rows" in error()
    data.write_bytes(b"nothing at all")
    assert "cifar10.1_v6_data.npy cannot be read (the magic string" in error()
    with open(data, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 32, 32, 3)}
        np.lib.format.write_array_header_1_0(file, header)
    assert "cifar10.1_v6_data.npy cannot be read (" in error()
    np.save(data, np.zeros((20, 32, 32), np.uint8))
    assert "is uint8 [20, 32, 32]; expected uint8 [N, 32, 32, 3]" in error()
    data.write_bytes(whole)
    np.save(labels, np.arange(19) % 10)
    assert "has 20 images and 19 labels" in error()
    np.save(labels, np.full(20, 10))
    assert "go from 10 to 10; expected 0 to 9" in error()
    labels.unlink()
    assert "has no cifar10.1_v6_labels.npy: it holds cifar10.1_v6_data.npy" in error()
    with pytest.raises(ResfastError, match=r"gone cannot be read \(No such file"):
        load_dataset(f"cifar10.1:{tmp_path / 'gone'}", data_dir=tmp_path, test_only=True)
    with pytest.raises(ResfastError, match="asks for 'v5', expected one of v4, v6"):
        load_dataset(f"cifar10.1:{folder}#v5", data_dir=tmp_path, test_only=True)
    with pytest.raises(ResfastError, match=r"has no path, expected cifar10.1:PATH"):
        load_dataset("cifar10.1:", data_dir=tmp_path, test_only=True)


@pytest.mark.parametrize("kind", ["tar", "zip", "tar.gz"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_an_archive_that_is_cut_off_is_one_sentence(kind: str, part: float, tmp_path: Path):
    write_cifar10_1(tmp_path / "a", "v6")
    path = pack(tmp_path / "a", kind)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ResfastError, match=r"cannot be read \(|has no cifar10.1_v6_labels.npy"):
        load_dataset(f"cifar10.1:{path}", data_dir=tmp_path, test_only=True)


# -- CIFAR-10-C ------------------------------------------------------------------------------------

EACH = 6


def write_cifar_c(folder: Path, *kinds: str, repeated: bool = True) -> dict[str, np.ndarray]:
    """Kinds of five severities of EACH images; the labels repeat five times, as published."""
    folder.mkdir()
    images = {kind: pixels(5 * EACH) for kind in kinds}
    for kind, array in images.items():
        np.save(folder / f"{kind}.npy", array)
    labels = RANDOM.integers(0, 10, EACH).astype(np.uint8)
    images["labels"] = np.tile(labels, 5)
    np.save(folder / "labels.npy", images["labels"] if repeated else labels)
    return images


@pytest.mark.parametrize(
    ("kind", "repeated"), [("folder", True), ("tar", True), ("tar.gz", False), ("zip", True)]
)
def test_cifar10_c_is_scored(kind: str, repeated: bool, run: Path, tmp_path: Path, capsys):
    names = ("fog", "saturate", "gaussian_noise")
    written = write_cifar_c(tmp_path / "CIFAR-10-C", *names, repeated=repeated)
    path, out = pack(tmp_path / "CIFAR-10-C", kind), tmp_path / "out"
    assert evaluate_command([str(run), "--data", f"cifar10-c:{path}", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    with open(out / "corruptions.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows[::5]] == ["gaussian_noise", "fog", "saturate"]
    errors = []
    for row in rows:
        part = slice((int(row["severity"]) - 1) * EACH, int(row["severity"]) * EACH)
        expected = 1 - score(run, written[row["kind"]][part], written["labels"][part])
        assert float(row["error"]) == pytest.approx(expected)
        assert row["images"] == str(EACH)
        errors += [expected] if row["kind"] != "saturate" else []
    record = json.loads((out / "corruptions.json").read_text())
    assert record["mean_accuracy"] == pytest.approx(1 - np.mean(errors))
    assert record["clean_accuracy"] is None
    assert f"mean accuracy under corruption {1 - np.mean(errors):.2%}" in printed
    assert "(the 2 of 3 corruptions in the paper)" in printed
    with Image.open(out / "corruptions.png") as plot:
        assert plot.width > 600


def test_cifar100_c_has_the_classes_of_cifar100(run: Path, tmp_path: Path):
    write_cifar_c(tmp_path / "CIFAR-100-C", "fog")
    trained = replace(inference.load(run), classes=CIFAR100)
    trained.model.eval().register_forward_hook(
        lambda module, args, out: torch.nn.functional.pad(out, (0, 90), value=-1e9)
    )
    result = evaluate_corrupted(trained, f"cifar100-c:{tmp_path / 'CIFAR-100-C'}", kinds=["fog"])
    assert len(result.rows) == 5
    with pytest.raises(ResfastError, match="differ from those"):
        evaluate_corrupted(inference.load(run), f"cifar100-c:{tmp_path / 'CIFAR-100-C'}")


def test_wrong_files_of_cifar10_c_are_one_sentence(run: Path, tmp_path: Path, capsys):
    folder = tmp_path / "c"
    write_cifar_c(folder, "fog", "snow")
    data = f"cifar10-c:{folder}"

    def error(*options: str) -> str:
        assert evaluate_command([str(run), "--data", data, "--out", str(tmp_path), *options]) == 2
        return capsys.readouterr().err

    assert "has no corruption 'fgo'; it has fog, snow; did you mean 'fog'?" in error(
        "--corrupt", "fgo"
    )
    np.save(folder / "fog.npy", pixels(29))
    assert "fog.npy has 29 images and labels.npy 30 labels; expected as many" in error()
    np.save(folder / "fog.npy", np.asfortranarray(pixels(30)))
    assert "in Fortran order; expected uint8 [N, 32, 32, 3]" in error()
    (folder / "labels.npy").unlink()
    assert "has no labels.npy" in error()
    for file in folder.iterdir():
        file.unlink()
    assert "has no .npy file of a corruption" in error()
    with pytest.raises(ResfastError, match="is a test set for each corruption and severity"):
        resfast.evaluate(run, data)


# -- ciFAIR ----------------------------------------------------------------------------------------


def write_cifair(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder.mkdir()
    written = {}
    for split, files in (
        ("train", [f"data_batch_{number}" for number in range(1, 6)]),
        ("test", ["test_batch"]),
    ):
        images, labels = pixels(4 * len(files)), RANDOM.integers(0, 10, 4 * len(files))
        for number, file in enumerate(files):
            rows = slice(4 * number, 4 * number + 4)
            flat = images[rows].transpose(0, 3, 1, 2).reshape(4, 3072)
            content = {b"batch_label": b"x", b"labels": labels[rows].tolist(), b"data": flat}
            (folder / file).write_bytes(pickle.dumps(content, protocol=2))
        written[split] = images, labels
    return written


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_cifair10_is_read(kind: str, run: Path, tmp_path: Path):
    written = write_cifair(tmp_path / "ciFAIR-10")
    data = f"cifair10:{pack(tmp_path / 'ciFAIR-10', kind)}"
    found = load_dataset(data, data_dir=tmp_path)
    assert found.classes == CIFAR10
    for split, (images, labels) in written.items():
        assert np.array_equal(getattr(found, f"{split}_images").numpy(), images)
        assert getattr(found, f"{split}_labels").tolist() == labels.tolist()
    assert resfast.evaluate(run, data).accuracy == pytest.approx(score(run, *written["test"]))


class Exploit:
    def __reduce__(self):
        return (pytest.fail, ("code in a file was run",))


def test_a_batch_of_cifair_cannot_run_code(tmp_path: Path):
    write_cifair(tmp_path / "a")
    (tmp_path / "a" / "test_batch").write_bytes(pickle.dumps({"data": Exploit()}))
    with pytest.raises(ResfastError, match="test_batch is not a pickle in CIFAR's format"):
        load_dataset(f"cifair10:{tmp_path / 'a'}", data_dir=tmp_path)
    (tmp_path / "a" / "test_batch").write_bytes(pickle.dumps({"data": [1]}))
    with pytest.raises(ResfastError, match=r"test_batch holds 'data'; expected 'data', uint8"):
        load_dataset(f"cifair10:{tmp_path / 'a'}", data_dir=tmp_path)


# -- CIFAR-10-N ------------------------------------------------------------------------------------

SETS = ("aggre", "worse", "random1", "random2", "random3")
KEYS = ("aggre_label", "worse_label", "random_label1", "random_label2", "random_label3")


def write_cifar10_n(tmp_path: Path) -> dict[str, np.ndarray]:
    """CIFAR-10's binary version with 50 training images, and the labels as .pt and .npy."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    clean = np.arange(50) % 10
    RANDOM.shuffle(clean)
    for file, labels in [
        *((f"data_batch_{n + 1}.bin", clean[10 * n : 10 * n + 10]) for n in range(5)),
        ("test_batch.bin", np.arange(10)),
    ]:
        flat = pixels(10).reshape(10, 3072)
        np.concatenate([labels[:, None], flat], 1).astype(np.uint8).tofile(folder / file)
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10))
    written = {"clean_label": clean}
    for number, key in enumerate(KEYS):
        noisy = clean.copy()
        noisy[: 5 + number] = (noisy[: 5 + number] + 1) % 10
        written[key] = noisy
    torch.save(written, tmp_path / "CIFAR-10_human.pt")
    lists = {key: labels.tolist() for key, labels in written.items()}
    np.save(tmp_path / "CIFAR-10_human.npy", np.array(lists, dtype=object))
    return written


@pytest.mark.parametrize("kind", ["pt", "npy", "arrays.npy", "tensors.pt", "folder", "zip"])
def test_noisy_labels_are_put_on_the_images_of_cifar10(kind: str, tmp_path: Path, capsys):
    written = write_cifar10_n(tmp_path)
    path = tmp_path / f"CIFAR-10_human.{kind.rpartition('.')[2]}"
    if kind == "arrays.npy":
        np.save(path, np.array(written, dtype=object))
    elif kind == "tensors.pt":
        torch.save({key: torch.from_numpy(value) for key, value in written.items()}, path)
    elif kind in ("folder", "zip"):
        folder = tmp_path / "CIFAR-N"
        folder.mkdir()
        path = (tmp_path / "CIFAR-10_human.pt").rename(folder / "CIFAR-10_human.pt")
        path = pack(folder, kind)
    plain = load_dataset("cifar10", data_dir=tmp_path)
    for number, (name, key) in enumerate(zip(SETS, KEYS, strict=True)):
        found = load_dataset(f"cifar10-n:{path}#{name}", data_dir=tmp_path)
        assert found.train_labels.tolist() == written[key].tolist()
        assert torch.equal(found.train_images, plain.train_images)
        assert torch.equal(found.test_labels, plain.test_labels)
        assert f"{10 + 2 * number}.00% of 50 training labels differ" in capsys.readouterr().err
    with pytest.raises(ResfastError, match=r"several sets .*, aggre \(10.0% noise\), .*#agg"):
        load_dataset(f"cifar10-n:{path}", data_dir=tmp_path)
    with pytest.raises(ResfastError, match=r"asks for 'worst', .*; did you mean 'worse'"):
        load_dataset(f"cifar10-n:{path}#worst", data_dir=tmp_path)


def test_a_run_is_compared_with_noisy_labels(run: Path, tmp_path: Path, capsys):
    written = write_cifar10_n(tmp_path)
    data = f"cifar10-n:{tmp_path / 'CIFAR-10_human.pt'}"
    options = [str(run), "--data-dir", str(tmp_path), "--out", str(tmp_path / "out"), "--data"]
    assert evaluate_command([*options, data]) == 0
    assert "worse      12.00%" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "noisy-labels.json").read_text())
    images = load_dataset("cifar10", data_dir=tmp_path).train_images
    guess = resfast.load(run).logits(images).argmax(1).numpy()
    assert record["train_accuracy"] == pytest.approx((guess == written["clean_label"]).mean())
    for entry, key in zip(record["labels"], KEYS, strict=True):
        wrong = written[key] != written["clean_label"]
        assert entry["accuracy"] == pytest.approx((guess == written[key]).mean())
        assert entry["repeated"] == pytest.approx((guess == written[key])[wrong].mean())
        assert entry["corrected"] == pytest.approx((guess == written["clean_label"])[wrong].mean())
    assert evaluate_command([*options, data, "--corrupt"]) == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_labels_of_other_images_are_refused(tmp_path: Path):
    written = write_cifar10_n(tmp_path)
    path = tmp_path / "CIFAR-10_human.pt"
    data = f"cifar10-n:{path}#worse"

    def error(content: object) -> str:
        torch.save(content, path)
        with pytest.raises(ResfastError) as caught:
            load_dataset(data, data_dir=tmp_path)
        return str(caught.value)

    shuffled = {key: np.roll(labels, 1) for key, labels in written.items()}
    assert "clean labels" in error(shuffled)
    assert "in the order of CIFAR's own files" in error(shuffled)
    short = {key: labels[:-1] for key, labels in written.items()}
    assert "clean_label in" in error(short)
    assert "is int64 [49]; expected 50 whole numbers" in error(short)
    assert "has no clean_label: it holds worse_label" in error({"worse_label": written[KEYS[1]]})
    assert "has no worse_label" in error({"clean_label": written["clean_label"]})
    large = {**written, "worse_label": np.full(50, 11)}
    assert "worse_label" in error(large)
    assert "labels from 11 to 11; expected 0 to 9" in error(large)
    assert "cannot be read" in error({"clean_label": Exploit()})
    assert "nothing that could run code" in error({"clean_label": Exploit()})
    for name in ("pt", "npy"):
        (tmp_path / f"x.{name}").write_bytes(b"nothing at all")
        with pytest.raises(ResfastError, match=r"x\..* cannot be read"):
            load_dataset(f"cifar10-n:{tmp_path}/x.{name}#worse", data_dir=tmp_path)
    np.save(tmp_path / "x.npy", np.array({"clean_label": Exploit()}, dtype=object))
    with pytest.raises(ResfastError, match=r"x\.npy cannot be read \(_pytest"):
        load_dataset(f"cifar10-n:{tmp_path}/x.npy#worse", data_dir=tmp_path)


def test_training_on_noisy_labels_says_how_noisy_they_are(tmp_path: Path, capsys):
    write_cifar10_n(tmp_path)
    data = ["--data", f"cifar10-n:{tmp_path / 'CIFAR-10_human.pt'}#worse"]
    where = ["--data-dir", str(tmp_path), "--out", str(tmp_path / "runs")]
    assert train_command([*TINY, *data, *where]) == 0
    captured = capsys.readouterr()
    assert "12.00% of 50 training labels differ" in captured.out + captured.err
    saved = json.loads((tmp_path / "runs" / "noisy" / "config.json").read_text())
    assert saved["data"]["data"].endswith("CIFAR-10_human.pt#worse")


def test_sets_of_which_nothing_counts_in_the_paper_have_a_mean_of_their_own():
    from resfast.inference.corruption import Row

    rows = [Row("saturate", severity, 10, 0.1 * severity, 0.0, 0.0) for severity in (1, 2, 3)]
    assert mean_error(rows) == pytest.approx(0.2)
    assert mean_error([*rows, Row("fog", 1, 10, 0.9, 0.0, 0.0)]) == pytest.approx(0.9)


def test_seeds_are_not_scored_together_on_corrupted_images(run: Path, tmp_path: Path, capsys):
    folder = tmp_path / "seeds"
    for seed in (0, 1):
        (folder / f"seed{seed}").mkdir(parents=True)
        (folder / f"seed{seed}" / "config.json").write_text("{}")
        (folder / f"seed{seed}" / "model.safetensors").write_bytes(
            (run / "model.safetensors").read_bytes()
        )
    assert evaluate_command([str(folder), "--corrupt"]) == 2
    assert f"one run at a time, and {folder} has 2: choose one" in capsys.readouterr().err


def test_read_noisy_reads_one_set_if_one_is_named(tmp_path: Path):
    write_cifar10_n(tmp_path)
    from resfast.data.dataset import Request

    request = Request(
        f"cifar10-n:{tmp_path / 'CIFAR-10_human.pt'}#worse", "", tmp_path, 32, False, "resident",
        torch.device("cpu"), lambda line: None,
    )  # fmt: skip
    assert list(read_noisy(request).sets) == ["worse"]
    assert read_noisy(request).noise_rate("worse") == pytest.approx(0.12)
