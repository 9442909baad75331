"""The configuration of a run: one dataclass, the whole truth of it.

The command line is generated from it, a recipe is a value of it, and a run saves it as JSON that
can start the same run again. Groups are nested dataclasses; every field has its unit in its
description. ``None`` stands for "decided from the model, the data or the machine"; what a run saves
is :func:`resolved <resfast.training.resolve.resolve>`, without such a ``None``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
import tyro

from resfast.data.augment import POLICIES, Augment, parse_augment
from resfast.errors import ResfastError
from resfast.models.presets import DEFAULT_MODEL
from resfast.models.resnet import Activation, Block, Shortcut
from resfast.models.speednet import FinalPool, Padding


@dataclass(frozen=True)
class Expected:
    """What the error for a value out of range asks for, where the bounds alone do not say it."""

    text: str


# Ranges. resfast.config.validate checks them and words the error.
NonNegativeInt = Annotated[int, pydantic.Field(ge=0)]
PositiveInt = Annotated[int, pydantic.Field(ge=1)]
NonNegative = Annotated[float, pydantic.Field(ge=0)]
Positive = Annotated[float, pydantic.Field(gt=0)]
AtLeastOne = Annotated[float, pydantic.Field(ge=1)]
Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]
PositiveFraction = Annotated[float, pydantic.Field(gt=0, le=1)]
BelowOne = Annotated[float, pydantic.Field(ge=0, lt=1)]
OpenFraction = Annotated[float, pydantic.Field(gt=0, lt=1)]
Accuracy = Annotated[float, pydantic.Field(gt=0, le=1), Expected("an accuracy, 0.94 for 94 %")]


def _written(
    metavar: str, parse: Callable[[str], Any], kind: type, show: Callable[[Any], str]
) -> tyro.constructors.PrimitiveConstructorSpec:
    """An option of one argument that ``parse`` reads, with a ValueError, and ``show`` writes."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda argument: parse(argument[0]),
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [show(value)],
    )


def _choice(kind: Any) -> tyro.constructors.PrimitiveConstructorSpec:
    """An option that is None or one of the values of ``kind``, a Literal or bool.

    tyro keeps the choices of ``Literal[...] | None`` in a set, so its own messages list them in an
    order that changes from run to run.
    """
    values = {str(value): value for value in (get_args(kind) or (True, False))}
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{None,{','.join(values)}}}",
        instance_from_str=lambda argument: values.get(argument[0]),
        is_instance=lambda value: value is None or value in values.values(),
        str_from_instance=lambda value: [str(value)],
        choices=("None", *values),
    )


def _int_list(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part != "")
    except ValueError:
        raise ValueError(f"{text!r} is not a comma-separated list of whole numbers") from None


IntList = Annotated[
    tuple[int, ...],
    _written("N,N,…", _int_list, tuple, lambda values: ",".join(map(str, values))),
]
"""``2,1,1,1`` on the command line, a tuple of integers in Python."""

OptionalBool = Annotated[bool | None, _choice(bool)]

Phases = tuple[tuple[PositiveInt, PositiveFraction], ...]
"""Values with the fraction of the training, 0 to 1, up to which each holds."""


def _phases(text: str) -> Phases:
    try:
        items = (part.split(":") for part in text.split(",") if part != "")
        return tuple((int(value), float(end)) for value, end in items)
    except ValueError:
        raise ValueError(f"{text!r} is not a list of VALUE:PART such as 24:0.5,28:0.8") from None


def phases_text(phases: Phases) -> str:
    """Phases as the command line has them."""
    return ",".join(f"{value}:{end:g}" for value, end in phases)


PhaseList = Annotated[
    Phases,
    _written("N:PART,…", _phases, tuple, phases_text),
    Expected(
        "VALUE:PART,… with whole values of at least 1 and rising parts of the training, above 0 "
        "and at most 1"
    ),
]
"""``24:0.5,28:0.8`` on the command line, ``((24, 0.5), (28, 0.8))`` in Python."""


def _augment(text: str) -> Augment:
    try:
        return parse_augment(text)
    except ResfastError as error:
        raise ValueError(str(error)) from None


AugmentOption = Annotated[Augment, _written("POLICY", _augment, Augment, str)]
"""``standard,mixup=0.2`` on the command line, an ``Augment`` in Python."""

_STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class ModelConfig:
    """The network. A value left at None or empty is the preset's."""

    __pydantic_config__ = _STRICT

    model: str = DEFAULT_MODEL
    """Name of a preset (--list shows them), or 'resnet' with --blocks and --channels, or 'speednet'
    with --convolutions and --channels."""
    blocks: IntList = ()
    """Residual blocks of each stage."""
    convolutions: IntList = ()
    """Speednet: convolutions of each stage."""
    channels: IntList = ()
    """Channels of each stage."""
    strides: IntList = ()
    """Stride of each stage (1, then 2 for each later one; in a speednet 2 is a max pool)."""
    stem: int | None = None
    """Channels of the first convolution."""
    block: Annotated[Block | None, _choice(Block)] = None
    """Residual block: two 3x3 convolutions, or 1x1, 3x3 and 1x1."""
    shortcut: Annotated[Shortcut | None, _choice(Shortcut)] = None
    """Where the shape changes: 1x1 or 3x3 convolution, or average pool + zero channels."""
    activation: Annotated[Activation | None, _choice(Activation)] = None
    """Activation after each norm and dense layer."""
    head: IntList = ()
    """Sizes of dense layers before the logits."""
    dropout: float | None = None
    """Probability of dropping a feature before each dense layer."""
    zero_init_residual: bool = False
    """Start the last norm of each block at zero."""
    dirac_init: OptionalBool = None
    """Start convolutions as the identity on their first channels."""
    freeze_norm_scale: OptionalBool = None
    """Leave the scale of batch norms at 1 instead of training it."""
    residual: OptionalBool = None
    """Speednet: identity shortcut around all but the first convolution of a stage of three up."""
    whitening: OptionalBool = None
    """Speednet: first convolution frozen, its filters computed from training images so that what
    they put out is uncorrelated; otherwise learned, with a batch norm."""
    whitening_kernel: int | None = None
    """Speednet: height and width of the first convolution, in pixels."""
    whitening_padding: Annotated[Padding | None, _choice(Padding)] = None
    """Speednet: zeros around the image before the first convolution."""
    whitening_width: int | None = None
    """Speednet: eigenvectors kept in the first convolution, each as two filters (0: all)."""
    final_pool: Annotated[FinalPool | None, _choice(FinalPool)] = None
    """Speednet: maximum or average of each channel before the logits."""
    logit_scale: float | None = None
    """Speednet: factor of the logits."""
    head_std: float | None = None
    """Speednet: standard deviation of the first weight of the last layer (0: torch's own)."""
    norm_momentum: float | None = None
    """Speednet: weight of a batch in the running statistics of batch norms."""
    norm_eps: float | None = None
    """Speednet: added to the variance in batch norms."""
    param_budget: NonNegativeInt = 0
    """Refuse a network with more parameters than this (0: no budget)."""


@dataclass(frozen=True)
class DataConfig:
    """Images, and how they are augmented."""

    __pydantic_config__ = _STRICT

    data: str = "auto"
    """cifar10, cifar100, digits, folder:PATH (an image folder or a tar of one), shards:PATH
    (WebDataset shards), or auto: CIFAR-10 if it is on disk or can be fetched, otherwise digits."""
    data_dir: Path = Path("data")
    """Where data sets are looked for, downloaded to and cached."""
    image_size: int = 32
    """Height and width that folder and digits images are resized to, in pixels."""
    skip_corrupt: bool = False
    """Leave out images that cannot be decoded instead of stopping."""
    val_fraction: BelowOne = 0.0
    """Part of the training set held out for validation, best weights and early stopping."""
    hold_out: NonNegativeInt = 0
    """Training images held out for the same, instead of a part: the last of each class, as many of
    each, whatever the seed (0: none)."""
    sizes: PhaseList = ()
    """Progressive image size: heights and widths to train at, in pixels, each up to a part of the
    training; 24:0.5,28:0.8 is 24 in the first half, 28 up to 80 % and then the images' own."""
    resize_by: Literal["resize", "crop"] = "resize"
    """How augmented images get a size of --sizes: antialiased bilinear, or a random crop."""
    filter_start: Fraction = 1.0
    """Part of the training from which epochs leave out the images with the lowest loss."""
    filter_keep: PositiveFraction = 1.0
    """Part of the images that those epochs keep (1: all)."""
    augment: AugmentOption = POLICIES["light"]
    """Augmentation: a policy (none, light, standard, strong, report-001), values of its own such
    as crop=4,flip=alternating,cutout=8,mixup=0.2, or a policy and values that override its."""
    loader: Literal["auto", "resident", "dali"] = "auto"
    """Where batches come from: the whole set decoded on the device, a DALI pipeline that decodes
    as it goes, or auto: resident where the set fits half of the free memory."""
    prefetch: PositiveInt = 2
    """DALI: batches prepared ahead."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule and regularization."""

    __pydantic_config__ = _STRICT

    epochs: PositiveInt | AtLeastOne | None = None
    """Passes over the training set, of which the last may be cut short, as in 5.5 (None: 70, or 14
    for a data set below 10,000 images)."""
    batch_size: PositiveInt | None = None
    """Images a step (None: 128, or 64 for a data set below 10,000 images)."""
    batch_sizes: PhaseList = ()
    """Batch sizes before that one, each up to a part of the training, as in 256:0.3,512:0.7."""
    accumulate: PositiveInt = 1
    """Parts that a batch goes through the network in, one after the other, their gradients added:
    less memory; batch norm then sees a part at a time."""
    optimizer: Literal["sgd", "adam", "adamw", "muon"] = "sgd"
    """Optimizer; sgd is Nesterov's; muon orthogonalises the updates of convolution filters and
    leaves all else to sgd."""
    lr: Positive = 0.1
    """Peak learning rate, of convolution filters where others are given; an adapted batch size
    scales all of them."""
    head_lr: Positive | None = None
    """Peak learning rate of dense layers' weights (None: --lr)."""
    bias_lr: Positive | None = None
    """Peak learning rate of norm parameters and biases (None: --lr)."""
    momentum: BelowOne = 0.9
    """Momentum of sgd and muon, beta1 of adam and adamw."""
    sgd_momentum: BelowOne | None = None
    """Muon: momentum of what is left to sgd (None: --momentum)."""
    weight_decay: NonNegative = 5e-4
    """Weight decay: L2 for sgd and adam, decoupled for adamw and muon's filters. Per step it takes
    learning rate times this off a weight."""
    head_weight_decay: NonNegative | None = None
    """Weight decay of dense layers' weights (None: --weight-decay)."""
    bias_weight_decay: NonNegative | None = None
    """Weight decay of norm parameters and biases (None: 0, or --weight-decay with
    --decay-norm-bias)."""
    decay_norm_bias: bool = False
    """Decay norm parameters and biases too."""
    newton_schulz_steps: PositiveInt = 5
    """Muon: iterations of the orthogonalisation."""
    normalize_filters: bool = False
    """Muon: before each step scale every convolution's weight to the norm sqrt(filters)."""
    whitening_bias_epochs: NonNegative = 0.0
    """Epochs in which the bias of a whitening first layer is trained, its learning rate falling
    from --bias-lr to 0 (0: never)."""
    schedule: Literal["onecycle", "cosine", "linear", "plateau", "multistep", "constant"] = (
        "onecycle"
    )
    """Learning rate over time; all but plateau step once a batch."""
    anneal: Literal["cos", "linear"] = "cos"
    """Shape of the one-cycle's two legs."""
    cycle_momentum: bool = False
    """One-cycle: move momentum from 0.95 to 0.85 and back, against the learning rate."""
    warmup: Fraction = 0.3
    """Part of the training spent raising the learning rate, from 0 to 1."""
    start_factor: PositiveFraction = 0.04
    """First learning rate as a part of the peak."""
    end_factor: Fraction = 1e-4
    """Last learning rate of one-cycle, cosine, linear and plateau as a part of the peak."""
    milestones: IntList = ()
    """Multistep: epochs at which the learning rate is multiplied by --gamma."""
    gamma: OpenFraction = 0.1
    """Factor of multistep and plateau."""
    patience: NonNegativeInt = 5
    """Plateau: epochs without a better accuracy before the learning rate falls."""
    clip_value: NonNegative = 0.0
    """Clip each gradient to this absolute value (0: off)."""
    clip_norm: NonNegative = 0.0
    """Clip the norm of all gradients to this (0: off)."""
    label_smoothing: BelowOne = 0.0
    """Probability mass spread over all classes."""
    ema: BelowOne = 0.0
    """Decay per step of an exponential moving average of the weights, which is then what is
    evaluated and saved (0: off)."""
    lookahead: NonNegativeInt = 0
    """Steps after which slow weights move towards the trained ones, which then go on from there;
    the slow ones are evaluated and saved (0: off)."""
    lookahead_decay: BelowOne = 0.95
    """Lookahead: what the slow weights keep a step at the end of the training."""
    lookahead_power: NonNegative = 3.0
    """Lookahead: at a part t of the training they keep t to this power of that (0: all of it)."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation and stopping."""

    __pydantic_config__ = _STRICT

    tta: Literal["none", "flip", "shift", "multi-crop"] = "shift"
    """Test-time augmentation of the final evaluation: mean of the image and its mirror, with
    'shift' also both translated by 1 pixel along one diagonal, with 'multi-crop' along both."""
    tta_select: PositiveFraction = 1.0
    """Part of the images that get the translated views: those with the least confident prediction
    under the image and its mirror (1: all)."""
    tta_mirror: PositiveFraction = 1.0
    """Part of the images that get the mirrored view, of which are those that get the translated
    ones: those with the least confident prediction by themselves (1: all)."""
    score_test: bool = True
    """Score the test images; without, choices are made on a held-out part and the test images are
    not looked at."""
    fuse: bool = False
    """Evaluate a fused copy of the network (resfast.fuse) in the compute dtype. Its making counts
    as evaluation, the timing of its kernels before the training as compilation."""
    eval_every: NonNegativeInt = 1
    """Epochs between evaluations (0: only after the last)."""
    eval_batch_size: PositiveInt = 1000
    """Images a step in evaluation."""
    target: Accuracy | None = None
    """Stop once this accuracy is reached (0.94 for 94 %); with --runs what the mean is tested
    against; with --max-seconds and no recipe what a known recipe is looked for by."""
    early_stop: NonNegativeInt = 0
    """Stop after this many evaluations without a better accuracy (0: off)."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Hardware and numerics."""

    __pydantic_config__ = _STRICT

    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: CUDA if there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Compute dtype under autocast; auto: bf16 where the hardware has it, else fp16 on CUDA and
    fp32 on the CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: where a compiler is present and the run is long enough to gain."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Capture the training step as one CUDA graph; auto: where device and options allow it."""
    tf32: bool = True
    """Let fp32 matrix products and convolutions use TF32 on CUDA."""
    threads: NonNegativeInt = 0
    """CPU threads (0: torch's default)."""
    winograd_tile: Literal[2, 3, 4] = 2
    """Bf16 training on the CPU: side of the largest tiles in which 3x3 convolutions compute their
    results; 4 takes about half as many multiplications and rounds off 3 times as much. Smaller
    ones are taken for image sizes that they fit better."""
    tune_allocator: bool = True
    """Keep freed memory in the process instead of returning it to the kernel every step."""
    seed: NonNegativeInt = 0
    """Seed of weights, order, augmentation, dropout and the held-out part."""


@dataclass(frozen=True)
class RunConfig:
    """What the run leaves behind. Does not change its result."""

    __pydantic_config__ = _STRICT

    name: str | None = None
    """Name of the run's folder (None: recipe, model, data, seed and time)."""
    out: Path = Path("runs")
    """Folder that holds the runs."""
    runs: PositiveInt = 1
    """Trainings with the seeds --seed, --seed + 1, …, each in a folder of its own below the run's,
    and statistics of them."""
    max_seconds: Positive | None = None
    """Stop after this many seconds of training, saved; compiling and loading do not count."""
    save_seconds: NonNegative = 15.0
    """Least time between two checkpoints, in seconds; the last epoch always saves."""
    tensorboard: bool = False
    """Write TensorBoard events to the run's folder."""
    wandb: bool = False
    """Log to Weights & Biases (its own environment variables apply)."""


@dataclass(frozen=True)
class Config:
    """A run."""

    __pydantic_config__ = _STRICT

    recipe: tyro.conf.Suppress[str] = "default"
    """Named set of values that the run started from (a record: the values stand below)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    run: RunConfig = field(default_factory=RunConfig)
