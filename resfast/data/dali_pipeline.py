"""DALI's pipelines; :mod:`resfast.data.dali` feeds them and completes their batches.

``nvidia.dali`` takes a second to import, so it is imported only when a pipeline is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from resfast.data import dali_formats
from resfast.data.augment import LOG_RATIO
from resfast.data.dali_pillow import Pillow
from resfast.data.shard_listing import IMAGE_EXTENSIONS
from resfast.errors import ResfastError

_SHUFFLE_BUFFER = 1024
Headers = tuple[Any, Any]  # of dali_formats.headers


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
    pillow: Pillow,
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
        pillow: what decodes the images that DALI does not decode, and resizes those that are not
            cropped to a window.
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
    fitting, known = dali_formats.headers(image_size), dali_formats.headers()

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
            images = values["data"]
            if resized and "window" not in values:
                images = _call(fn, pillow.fit, images)
            images = images.gpu() if on_gpu else images
            if resized and "window" in values:
                images = _resize_window(dali, images, values["window"], image_size)
        else:
            if reader is None:
                names = fn.slice(values["data"], start=0, shape=values["lengths"], axes=[0])
                encoded = fn.io.file.read(names, dont_use_mmap=True)  # mapping costs more
            if "window" in values:
                images = _decode_window(
                    dali, encoded, values["window"], image_size, on_gpu, known, pillow
                )
            else:
                images = _decode(dali, encoded, fitting, known, pillow)
                images = images.gpu() if on_gpu else images
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


def _call(fn: Any, function: Callable[..., Any], images: Any) -> Any:
    """``function`` of all images of a batch."""
    return fn.python_function(
        images, function=function, batch_processing=True, output_layouts="HWC"
    )


def _decode(dali: Any, encoded: Any, fitting: Headers, known: Headers, pillow: Pillow) -> Any:
    """Images ``[S, S, 3]`` on the CPU, with the pixels of Pillow."""
    fn, types = dali.fn, dali.types
    if pillow.everything:
        return _call(fn, pillow.decode, encoded)
    start = _start(fn, encoded)
    fits = _has_header(dali, start, fitting)
    if fits:
        sized = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
    else:
        agrees = _has_header(dali, start, known)
        if agrees:
            images = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
            sized = _call(fn, pillow.fit, images)
        else:
            sized = _call(fn, pillow.decode, encoded)
    return sized


def _decode_window(
    dali: Any,
    encoded: Any,
    window: Any,
    image_size: int,
    on_gpu: bool,
    known: Headers,
    pillow: Pillow,
) -> Any:
    """Windows of images as ``[S, S, 3]``; DALI decodes no more than the window."""
    fn = dali.fn
    if pillow.everything:
        whole = _call(fn, pillow.decode_whole, encoded)
        whole = whole.gpu() if on_gpu else whole
        return _resize_window(dali, whole, window, image_size)
    agrees = _has_header(dali, _start(fn, encoded), known)
    if agrees:
        sized = _decode_only_window(dali, encoded, window, image_size, on_gpu)
    else:
        whole = _call(fn, pillow.decode_whole, encoded)
        whole = whole.gpu() if on_gpu else whole
        sized = _resize_window(dali, whole, window, image_size)
    return sized


def _start(fn: Any, encoded: Any) -> Any:
    length = dali_formats.LENGTH
    return fn.slice(
        encoded, start=0, shape=length, axes=[0], out_of_bounds_policy="pad", fill_values=0
    )


def _has_header(dali: Any, start: Any, headers: Headers) -> Any:
    """Whether the first bytes of a file are one of :func:`dali_formats.headers`.

    Few operations on arrays: each takes 2 µs per file, however small.
    """
    fn, types = dali.fn, dali.types
    values, masks = types.Constant(headers[0]), types.Constant(headers[1])
    differs = fn.reductions.max((start ^ values) & masks, axes=[1])
    return fn.reductions.min(differs) == 0


def _decode_only_window(dali: Any, encoded: Any, window: Any, image_size: int, on_gpu: bool) -> Any:
    fn, types = dali.fn, dali.types
    options = {"device": "cpu", "output_type": types.RGB}
    if on_gpu:  # upsample chroma as the CPU decoders do
        options |= {"device": "mixed", "jpeg_fancy_upsampling": True}
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


def _resize_window(dali: Any, images: Any, window: Any, image_size: int) -> Any:
    fn, types = dali.fn, dali.types
    start, size = _window(dali, fn.cast(_sides(fn, images), dtype=types.FLOAT), window)
    return _to_size(dali, images, image_size, roi_start=start, roi_end=start + size)


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
