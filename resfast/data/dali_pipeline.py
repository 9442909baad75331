"""DALI's pipelines; :mod:`resfast.data.dali` feeds them and completes their batches.

``nvidia.dali`` takes a second to import, so it is imported only when a pipeline is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from resfast.data.augment import LOG_RATIO
from resfast.data.shard_listing import IMAGE_EXTENSIONS
from resfast.errors import ResfastError

_SHUFFLE_BUFFER = 1024


def import_dali() -> Any:
    """The module ``nvidia.dali``.

    Raises:
        ResfastError: it cannot be imported.
    """
    try:
        import nvidia.dali
        import nvidia.dali.fn
        import nvidia.dali.math
        import nvidia.dali.types
    except ImportError as error:
        raise ResfastError(
            f"the DALI loader needs NVIDIA DALI, which cannot be imported ({error}): install it "
            "with pip install nvidia-dali-cuda130, or use --loader resident"
        ) from error
    return nvidia.dali


def build(
    *,
    batch_size: int,
    threads: int,
    device_id: int | None,
    prefetch: int,
    seed: int,
    image_size: int,
    resized: bool,
    decoded: bool = False,
    feed: Callable[[], tuple[Any, ...]] | None = None,
    fed: Sequence[str] = (),
    reader: dict[str, Any] | None = None,
    window: float = 1.0,
    crop: int = 0,
    flip: bool = False,
    normalize: tuple[list[float], list[float], bool] | None = None,
    checkpoint: bytes | None = None,
) -> Any:
    """A pipeline that outputs images ``[B, S, S, C]`` and, for shards, what DALI calls the samples.

    Args:
        resized: whether decoded images are cropped (to the window, or to a centred square) and
            resized.
        decoded: whether the pipeline is fed images instead of file names.
        feed: returns the values of ``fed`` for a batch; raises ``StopIteration`` after the last.
        fed: ``data`` (images, or file names as bytes), ``lengths`` of the names, and the random
            parameters drawn by the caller: ``window`` (height and width as fractions of sqrt(H W),
            top and left as fractions of the remaining space), ``shift`` (pixels), ``flip``.
        reader: keyword arguments of ``fn.readers.webdataset``, instead of ``feed``.
        window: with a reader: minimum area of a random-resized crop, as a fraction of the image; 1
            for none.
        crop: with a reader: maximum random shift, in pixels, with zeros outside.
        flip: with a reader: mirror with probability 1/2.
        normalize: mean and standard deviation in units of 0 … 255, and whether to output float16;
            None for uint8.
        checkpoint: with a reader: state to start from.
    """
    dali = import_dali()
    fn, types = dali.fn, dali.types
    on_gpu = device_id is not None

    @dali.pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        seed=seed,
        enable_checkpointing=reader is not None,
        checkpoint=checkpoint,
        enable_conditionals=True,  # an `if` on a DALI value is evaluated per image
    )
    def graph() -> tuple[Any, ...]:
        outputs = []
        if reader is not None:
            encoded = fn.readers.webdataset(
                ext=[";".join(IMAGE_EXTENSIONS)],
                case_sensitive_extensions=False,
                missing_component_behavior="error",
                pad_last_batch=True,
                initial_fill=_SHUFFLE_BUFFER,
                name="reader",
                **reader,
            )
            sources = fn.pad(fn.get_property(encoded, key="source_info"), axes=[0])
            outputs = [sources]
            values = _random_values(fn, types, window, crop, flip)
        else:
            layouts = ["HWC" if decoded and name == "data" else "" for name in fed]
            nodes = fn.external_source(
                source=feed, num_outputs=len(fed), layout=layouts, batch=True
            )
            values = {name: nodes[place] for place, name in enumerate(fed)}
        if decoded:
            images = values["data"].gpu() if on_gpu else values["data"]
            if resized:
                images = _resize_decoded(dali, images, values.get("window"), image_size)
        else:
            if reader is None:
                names = fn.slice(values["data"], start=0, shape=values["lengths"], axes=[0])
                encoded = fn.io.file.read(names, dont_use_mmap=True)  # mapping costs more
            images = _decode(dali, encoded, values.get("window"), image_size, on_gpu)
        if "shift" in values:
            images = fn.slice(
                images,
                start=values["shift"],
                shape=[image_size, image_size],
                axes=[0, 1],
                out_of_bounds_policy="pad",
                fill_values=0,
            )
        if normalize is not None:
            mean, std, half = normalize
            images = fn.crop_mirror_normalize(
                images,
                mean=mean,
                std=std,
                mirror=values.get("flip", 0),
                dtype=types.FLOAT16 if half else types.FLOAT,
                output_layout="HWC",
            )
        return images, *outputs

    pipeline = graph()
    pipeline.build()
    return pipeline


def _random_values(fn: Any, types: Any, window: float, crop: int, flip: bool) -> dict[str, Any]:
    values = {}
    if window < 1:
        import nvidia.dali.math as dali_math

        half_area = 0.5 * dali_math.log(fn.random.uniform(range=[window, 1.0]))
        half_ratio = 0.5 * fn.random.uniform(range=[-LOG_RATIO, LOG_RATIO])
        position = fn.random.uniform(range=[0.0, 1.0], shape=[2])
        sides = fn.stack(
            dali_math.exp(half_area - half_ratio), dali_math.exp(half_area + half_ratio)
        )
        values["window"] = fn.cat(sides, position)
    if crop:
        shifts = [float(shift) for shift in range(-crop, crop + 1)]
        shift = fn.random.uniform(values=shifts, shape=[2])
        values["shift"] = fn.cast(shift, dtype=types.INT32)
    if flip:
        values["flip"] = fn.random.coin_flip()
    return values


def _decode(dali: Any, encoded: Any, window: Any, image_size: int, on_gpu: bool) -> Any:
    fn, types = dali.fn, dali.types
    options = {"device": "cpu", "output_type": types.RGB}
    if on_gpu:  # upsample chroma as the CPU decoders do
        options |= {"device": "mixed", "jpeg_fancy_upsampling": True}
    if window is None:
        images = fn.decoders.image(encoded, **options)
        return _resize_decoded(dali, images, None, image_size)
    sides = fn.slice(fn.peek_image_shape(encoded, dtype=types.INT32), start=0, shape=2, axes=[0])
    start, size = _window(dali, fn.cast(sides, dtype=types.FLOAT), window)
    start = fn.cast(dali.math.floor(start), dtype=types.INT32)
    size = fn.cast(dali.math.max(dali.math.floor(size + 0.5), 1), dtype=types.INT32)
    images = fn.decoders.image_slice(
        encoded,
        start=start,
        shape=dali.math.min(size, sides - start),
        axis_names="HW",
        **options,
    )
    return _to_size(dali, images, image_size)


def _resize_decoded(dali: Any, images: Any, window: Any, image_size: int) -> Any:
    fn, types = dali.fn, dali.types
    if window is not None:
        start, size = _window(dali, fn.cast(_sides(fn, images), dtype=types.FLOAT), window)
        resized = _to_size(dali, images, image_size, roi_start=start, roi_end=start + size)
    else:
        shape = images.shape()
        # Resizing takes as long as decoding a small JPEG, even if the size does not change.
        if (shape[0] == image_size) & (shape[1] == image_size):
            resized = images
        else:
            sides = fn.cast(_sides(fn, images), dtype=types.FLOAT)
            size = fn.reductions.min(sides)
            start = (sides - size) * 0.5
            resized = _to_size(dali, images, image_size, roi_start=start, roi_end=start + size)
    return resized


def _sides(fn: Any, images: Any) -> Any:
    return fn.slice(images.shape(), start=0, shape=2, axes=[0])


def _to_size(dali: Any, images: Any, image_size: int, **region: Any) -> Any:
    return dali.fn.resize(
        images,
        size=[image_size, image_size],
        interp_type=dali.types.INTERP_CUBIC,
        antialias=True,
        **region,
    )


def _window(dali: Any, sides: Any, window: Any) -> tuple[Any, Any]:
    """Start and size of a window, in pixels, float ``[2]`` each."""
    fn = dali.fn
    mean_side = dali.math.sqrt(sides[0] * sides[1])
    size = dali.math.min(fn.slice(window, start=0, shape=2, axes=[0]) * mean_side, sides)
    return (sides - size) * fn.slice(window, start=2, shape=2, axes=[0]), size


def shut_down(pipeline: Any) -> None:
    """Ends the threads of a pipeline that reported an error, whatever still refers to it.

    A second pipeline beside one that had failed has ended in a segmentation fault.
    """
    pipeline._shutdown()  # as its __del__ does, which an exception's traceback delays


def first_undecodable(images: Iterator[tuple[str, bytes]]) -> str | None:
    """The name of the first image that DALI cannot decode, or None."""
    import numpy as np

    dali = import_dali()
    pending = [b""]
    pipeline = dali.Pipeline(
        batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, seed=0
    )
    with pipeline:
        encoded = dali.fn.external_source(
            source=lambda: [np.frombuffer(pending[0], np.uint8)], batch=True
        )
        pipeline.set_outputs(dali.fn.decoders.image(encoded, output_type=dali.types.RGB))
    for name, data in images:
        if not data:
            return name
        pending[0] = data
        try:
            pipeline.run()
        except RuntimeError:
            return name
    return None
