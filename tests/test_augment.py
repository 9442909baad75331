from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resfast.data.augment import AugmentParams, augment, sample
from resfast.data.loader import ResidentLoader
from resfast.errors import ResfastError

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
IDENTITY = torch.zeros(3), torch.full((3,), 1 / 255)


def reference(image: np.ndarray, shift: tuple[int, int], flip: bool, padding: str) -> np.ndarray:
    """One image by numpy's own padding, cropping and mirroring."""
    height, width, _ = image.shape
    pad = max(map(abs, shift))
    mode = "reflect" if padding == "reflect" else "constant"
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode=mode)
    top, left = pad + shift[0], pad + shift[1]
    crop = padded[top : top + height, left : left + width]
    return crop[:, ::-1] if flip else crop


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_augment_equals_pad_crop_and_mirror(data: st.DataObject):
    height, width = data.draw(st.integers(5, 20)), data.draw(st.integers(5, 20))
    count, batch = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    padding = data.draw(st.sampled_from(["reflect", "zero"]))
    shifts = data.draw(
        st.lists(st.tuples(*[st.integers(-4, 4)] * 2), min_size=batch, max_size=batch)
    )
    flips = data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch))
    chosen = data.draw(st.lists(st.integers(0, count - 1), min_size=batch, max_size=batch))
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    images = random.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    result = augment(
        torch.from_numpy(images),
        torch.tensor(chosen),
        AugmentParams(torch.tensor(shifts), torch.tensor(flips)),
        *IDENTITY,
        padding=padding,
    )
    assert result.is_contiguous(memory_format=torch.channels_last)
    for out, index, shift, flip in zip(result, chosen, shifts, flips, strict=True):
        expected = reference(images[index], shift, flip, padding)
        np.testing.assert_array_equal(out.permute(1, 2, 0).round().byte().numpy(), expected)


def test_normalization_is_minus_mean_over_std():
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    result = augment(images, torch.arange(4), None, MEAN, STD)
    expected = ((images / 255.0 - MEAN) / STD).permute(0, 3, 1, 2)
    torch.testing.assert_close(result, expected)


def test_zero_padding_is_black_after_normalization():
    images = torch.full((1, 6, 6, 3), 255, dtype=torch.uint8)
    params = AugmentParams(torch.tensor([[2, 0]]), torch.tensor([False]))
    result = augment(images, torch.tensor([0]), params, MEAN, STD, padding="zero")
    torch.testing.assert_close(result[0, :, -1, 0], -MEAN / STD)
    torch.testing.assert_close(result[0, :, 0, 0], (1 - MEAN) / STD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_compute_dtype_is_put_out(dtype: torch.dtype):
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    assert augment(images, torch.arange(2), None, MEAN, STD, dtype=dtype).dtype == dtype


def test_wrong_images_and_parameters_are_refused():
    images = torch.zeros(2, 8, 8, 3)
    with pytest.raises(TypeError, match="float32; expected uint8"):
        augment(images, torch.arange(2), None, MEAN, STD)
    with pytest.raises(ValueError, match=r"expected \[N, H, W, C\]"):
        augment(images[0].byte(), torch.arange(2), None, MEAN, STD)
    params = AugmentParams(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([False]))
    with pytest.raises(ValueError, match="1 parameters for 2 images"):
        augment(images.byte(), torch.arange(2), params, MEAN, STD)


def test_shifts_are_uniform_over_the_whole_range():
    shift = sample(49_000, crop=3, flip="none", seed=1, epoch=0).shift
    counts = torch.bincount((shift[:, 0] + 3) * 7 + shift[:, 1] + 3, minlength=49)
    assert counts.min() > 850
    assert counts.max() < 1150


def test_random_flip_is_even_and_drawn_anew_each_epoch():
    first, second = (sample(10_000, crop=0, flip="random", seed=1, epoch=e).flip for e in (0, 1))
    assert 4_800 < first.sum() < 5_200
    assert 4_800 < (first ^ second).sum() < 5_200


def test_alternating_flip_mirrors_each_image_every_other_epoch():
    epochs = [sample(1000, crop=0, flip="alternating", seed=1, epoch=e).flip for e in range(4)]
    assert 400 < epochs[0].sum() < 600
    assert torch.equal(epochs[1], ~epochs[0])
    assert torch.equal(epochs[2], epochs[0])
    assert torch.equal(epochs[3], ~epochs[0])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10_000))
def test_parameters_depend_on_seed_and_epoch_alone(seed: int, epoch: int):
    def draw(s: int, e: int) -> AugmentParams:
        return sample(64, crop=4, flip="random", seed=s, epoch=e)

    torch.manual_seed(epoch)
    first = draw(seed, epoch)
    torch.manual_seed(0)
    second = draw(seed, epoch)
    assert torch.equal(first.shift, second.shift)
    assert torch.equal(first.flip, second.flip)
    assert not torch.equal(first.shift, draw(seed, epoch + 1).shift)
    assert not torch.equal(first.shift, draw(seed ^ 1, epoch).shift)


def loader(count: int = 50, batch_size: int = 8, **values: object) -> ResidentLoader:
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 8, 8, 3)
    return ResidentLoader(
        images, torch.arange(count), *IDENTITY, batch_size=batch_size, **{"crop": 2, **values}
    )


def test_an_epoch_visits_each_image_at_most_once_and_drops_the_ragged_batch():
    batches = list(loader().epoch(0))
    labels = torch.cat([labels for _, labels in batches])
    assert len(batches) == len(loader()) == 6
    assert len(labels.unique()) == 48
    for images, labels in batches:
        assert images.shape == (8, 3, 8, 8)
        torch.testing.assert_close(images[:, 0, 0, 0], labels.float())


def test_order_changes_with_epoch_and_seed_and_is_reproducible():
    def order(epoch: int, **values: object) -> list[int]:
        return torch.cat([labels for _, labels in loader(**values).epoch(epoch)]).tolist()

    assert order(3, seed=1) == order(3, seed=1)
    assert order(3, seed=1) != order(4, seed=1)
    assert order(3, seed=1) != order(3, seed=2)


@settings(deadline=None, max_examples=20)
@given(first=st.integers(0, 6), epoch=st.integers(0, 5))
def test_resuming_inside_an_epoch_gives_the_same_batches(first: int, epoch: int):
    whole = list(loader(flip="random").epoch(epoch))
    rest = list(loader(flip="random").epoch(epoch, first))
    assert len(rest) == len(whole) - first
    for (images, labels), (more, others) in zip(whole[first:], rest, strict=True):
        assert torch.equal(images, more)
        assert torch.equal(labels, others)


def test_a_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(ResfastError, match="batch size 51 does not fit 50 training images"):
        loader(batch_size=51)


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(ResfastError, match="crop 8 does not fit images of 8 pixels"):
        loader(crop=8)


@pytest.mark.gpu
def test_batches_are_the_same_on_cpu_and_cuda():
    for (images, labels), (more, others) in zip(
        loader(flip="random").epoch(1), loader(flip="random", device="cuda").epoch(1), strict=True
    ):
        torch.testing.assert_close(images, more.cpu())
        assert torch.equal(labels, others.cpu())
