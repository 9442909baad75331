"""The configuration of a run: one dataclass with every option, its range and its description.

The command line is generated from it, a recipe is an instance of it, and a run saves it as JSON
that can start the same run again. Groups are nested dataclasses. ``None`` means "decided from the
model, the data or the machine"; :func:`resfast.training.resolve.resolve` fills in what depends on
data and machine before a run saves it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import tyro

from resfast.config.options import (
    Accuracy,
    AtLeastOne,
    AugmentOption,
    BelowOne,
    Deviations,
    Fraction,
    IntList,
    Means,
    NameList,
    NonNegative,
    NonNegativeInt,
    OpenFraction,
    OptionalBool,
    PhaseList,
    Positive,
    PositiveFraction,
    PositiveInt,
    choice,
)
from resfast.data.augment import POLICIES
from resfast.models.presets import DEFAULT_MODEL
from resfast.models.resnet import Activation, Block, Init, Norm, Shortcut, Stem
from resfast.models.speednet import FinalPool, Padding

_STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class ModelConfig:
    """The network. A value that is None or empty is taken from the preset."""

    __pydantic_config__ = _STRICT

    model: str = DEFAULT_MODEL
    """Name of a preset (--list shows them), or 'resnet' with --blocks and --channels, or 'speednet'
    or 'vgg' with --convolutions and --channels; or anyone's network: torchvision:NAME, timm:NAME,
    or FILE.py:FUNCTION, which is given the number of classes as num_classes."""
    blocks: IntList = ()
    """Residual blocks of each stage."""
    convolutions: IntList = ()
    """Speednet and VGG: convolutions of each stage."""
    channels: IntList = ()
    """Channels of each stage."""
    strides: IntList = ()
    """Stride of each stage (empty: 1 for the first, 2 for the others; in a speednet, 2 is a max
    pool)."""
    stem: int | None = None
    """Channels of the first convolution."""
    block: Annotated[Block | None, choice(Block)] = None
    """Residual block: two 3x3 convolutions (basic), or 1x1, 3x3 and 1x1 (bottleneck)."""
    shortcut: Annotated[Shortcut | None, choice(Shortcut)] = None
    """Shortcut where the shape changes: a 1x1 or 3x3 convolution, or average pooling with zeros for
    the new channels."""
    activation: Annotated[Activation | None, choice(Activation)] = None
    """Activation after each norm and dense layer."""
    negative_slope: float | None = None
    """Slope of leaky_relu for negative values."""
    norm: Annotated[Norm | None, choice(Norm)] = None
    """Norm after each convolution: batch norm, or none, with a bias instead."""
    stem_kind: Annotated[Stem | None, choice(Stem)] = None
    """First layers: a 3x3 convolution (cifar), or a 7x7 convolution of stride 2 and a 3x3 max pool
    (imagenet)."""
    head: IntList = ()
    """Sizes of dense layers before the logits."""
    dropout: float | None = None
    """Probability of dropping a feature before each dense layer."""
    zero_init_residual: bool = False
    """Initialize the scale of the last norm of each block to zero."""
    init: Annotated[Init | None, choice(Init)] = None
    """ResNet: initial convolutions by He et al. (he), or as torch draws them (torch)."""
    dirac_init: OptionalBool = None
    """Initialize convolutions to the identity on their first channels."""
    freeze_norm_scale: OptionalBool = None
    """Keep the scale of batch norms at 1 instead of training it."""
    residual: OptionalBool = None
    """Speednet: identity shortcut around all but the first convolution of stages with three or
    more."""
    whitening: OptionalBool = None
    """Speednet: freeze the first convolution, with filters computed from training images so that
    its outputs are uncorrelated; otherwise it is learned and followed by a batch norm."""
    whitening_kernel: int | None = None
    """Speednet: height and width of the first convolution, in pixels."""
    whitening_padding: Annotated[Padding | None, choice(Padding)] = None
    """Speednet: zero padding of the first convolution."""
    whitening_width: int | None = None
    """Speednet: eigenvectors kept in the first convolution, each as two filters (0: all)."""
    final_pool: Annotated[FinalPool | None, choice(FinalPool)] = None
    """Speednet: global max or average pooling before the logits, or both."""
    logit_scale: float | None = None
    """Speednet: factor applied to the logits."""
    head_std: float | None = None
    """Speednet: standard deviation of the last layer's initial weights (0: torch's default)."""
    norm_momentum: float | None = None
    """Speednet: weight of the current batch in the running statistics of batch norms."""
    norm_eps: float | None = None
    """Speednet: epsilon of batch norms, added to the variance."""
    param_budget: NonNegativeInt = 0
    """Reject a network with more parameters than this (0: no budget)."""


@dataclass(frozen=True)
class DataConfig:
    """Images and their augmentation."""

    __pydantic_config__ = _STRICT

    data: str = "auto"
    """cifar10, cifar100, svhn, fashion-mnist, stl10, digits, folder:PATH (an image folder or a tar
    of one), shards:PATH (WebDataset shards), arrays:PATH (a .npz file or a folder of .npy files),
    csv:PATH (images with labels in a CSV file), parquet:PATH (a folder of Parquet files),
    cifair10:PATH, cifair100:PATH, cifar10-n:PATH#SET (noisy labels), or auto: CIFAR-10 if it is on
    disk or can be fetched, otherwise digits."""
    data_dir: Path = Path("data")
    """Where data sets are looked for, downloaded to and cached."""
    classes: Path | None = None
    """File with the names of the classes, one per line, for shards of others."""
    image_size: int = 32
    """Height and width that all images are resized to, in pixels."""
    skip_corrupt: bool = False
    """Skip images that cannot be decoded instead of stopping."""
    max_images: NonNegativeInt = 0
    """Use only this many training images: the first ones of each class, the same number per class.
    Images are held out from these (0: all)."""
    val_fraction: BelowOne = 0.0
    """Fraction of the training set held out for validation, best weights and early stopping."""
    hold_out: NonNegativeInt = 0
    """Training images to hold out, as a number instead of a fraction: the last ones of each class,
    the same number per class, independent of the seed (0: none)."""
    normalize: bool = True
    """Subtract the mean of each channel and divide by its standard deviation; otherwise pixels are
    only divided by 255."""
    mean: Means = ()
    """Means of the channels, of pixels / 255 (empty: those of the training images)."""
    std: Deviations = ()
    """Standard deviations of the channels, of pixels / 255 (empty: those of the training
    images)."""
    label_noise: BelowOne = 0.0
    """Fraction of the training images whose label is replaced by another class, both drawn by the
    seed; held-out and test labels stay."""
    sizes: PhaseList = ()
    """Progressive image sizes: heights and widths in pixels, each used up to a fraction of
    training. 24:0.5,28:0.8 trains at 24 for the first half, at 28 up to 80 % and at full size after
    that."""
    resize_by: Literal["resize", "crop"] = "resize"
    """How augmented images are brought to a size of --sizes: antialiased bilinear resizing, or a
    random crop."""
    filter_start: Fraction = 1.0
    """Fraction of training after which epochs skip the images with the lowest loss."""
    filter_keep: PositiveFraction = 1.0
    """Fraction of the images that those epochs keep (1: all)."""
    augment: AugmentOption = POLICIES["light"]
    """Augmentation: a policy (none, light, standard, strong, report-001), values such as
    crop=4,flip=alternating,cutout=8,mixup=0.2, or a policy followed by values that override it."""
    loader: Literal["auto", "resident", "dali"] = "auto"
    """Where batches come from: the data set decoded on the device (resident), a DALI pipeline
    that decodes during training (dali), or auto: resident if the data set fits in half of the free
    memory."""
    prefetch: PositiveInt = 2
    """DALI: batches prepared in advance."""
    drop_last: bool = True
    """Leave out the incomplete last batch of an epoch; the images in it differ from epoch to epoch.
    Otherwise it is trained on as a smaller batch."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule and regularization."""

    __pydantic_config__ = _STRICT

    epochs: PositiveInt | AtLeastOne | None = None
    """Passes over the training set; with a fraction, as in 5.5, the last one ends early (None:
    70, or 14 for a data set below 10,000 images)."""
    batch_size: PositiveInt | None = None
    """Images per step (None: 128, or 64 for a data set below 10,000 images)."""
    batch_sizes: PhaseList = ()
    """Batch sizes used before --batch-size, each up to a fraction of training, as in
    256:0.3,512:0.7."""
    accumulate: PositiveInt = 1
    """Parts that a batch is split into to save memory; their gradients are added. Batch norm sees
    one part at a time."""
    loss: Literal["cross_entropy", "mse", "smooth_l1", "bce_with_logits"] = "cross_entropy"
    """Training loss. All but cross_entropy compare each logit with its one-hot label, and take the
    mean over the classes."""
    optimizer: Literal["sgd", "adam", "adamw", "muon", "adagrad", "adadelta", "rmsprop"] = "sgd"
    """Optimizer; muon orthogonalizes the updates of convolution filters and trains everything else
    with sgd."""
    lr: Positive = 0.1
    """Peak learning rate of all parameters for which --head-lr and --bias-lr give no other. When
    the batch size is adapted to a small data set, all learning rates are scaled with it."""
    head_lr: Positive | None = None
    """Peak learning rate of the weights of dense layers (None: --lr)."""
    bias_lr: Positive | None = None
    """Peak learning rate of norm parameters and biases (None: --lr)."""
    momentum: BelowOne = 0.9
    """Momentum of sgd and muon, beta1 of adam and adamw; the others have none."""
    nesterov: bool = True
    """Sgd: Nesterov's momentum."""
    sgd_momentum: BelowOne | None = None
    """Muon: momentum of the parameters trained with sgd (None: --momentum)."""
    weight_decay: NonNegative = 5e-4
    """Weight decay: L2 for sgd and adam, decoupled for adamw and muon's filters. Each step
    subtracts this times the learning rate times the weight."""
    head_weight_decay: NonNegative | None = None
    """Weight decay of the weights of dense layers (None: --weight-decay)."""
    bias_weight_decay: NonNegative | None = None
    """Weight decay of norm parameters and biases (None: 0, or --weight-decay with
    --decay-norm-bias)."""
    decay_norm_bias: bool = False
    """Decay norm parameters and biases too."""
    newton_schulz_steps: PositiveInt = 5
    """Muon: Newton-Schulz iterations of the orthogonalization."""
    normalize_filters: bool = False
    """Muon: before each step, rescale the weight of every convolution to the norm sqrt(filters)."""
    whitening_bias_epochs: NonNegative = 0.0
    """Epochs during which the bias of a whitening first layer is trained, with a learning rate that
    falls from --bias-lr to 0 (0: never)."""
    schedule: Literal["onecycle", "cosine", "linear", "plateau", "multistep", "constant"] = (
        "onecycle"
    )
    """Learning rate schedule; all but plateau change the rate every batch."""
    rate_per_epoch: bool = False
    """Change the learning rate at the beginning of each epoch instead of every batch."""
    schedule_epochs: NonNegative = 0.0
    """Cosine and linear: epochs after which the final rate is reached and kept; with more than
    --epochs, it is not reached (0: --epochs)."""
    anneal: Literal["cos", "linear"] = "cos"
    """Shape of one-cycle's rise and fall."""
    cycle_momentum: bool = False
    """One-cycle: lower momentum from 0.95 to 0.85 while the learning rate rises, then raise it
    again."""
    warmup: Fraction = 0.3
    """Fraction of training during which the learning rate rises."""
    start_factor: PositiveFraction = 0.04
    """Initial learning rate as a fraction of the peak."""
    end_factor: Fraction = 1e-4
    """Final learning rate of onecycle, cosine, linear and plateau as a fraction of the peak."""
    milestones: IntList = ()
    """Multistep: epochs at which the learning rate is multiplied by --gamma."""
    milestone_steps: IntList = ()
    """Multistep: the same in steps (iterations) instead of epochs."""
    gamma: OpenFraction = 0.1
    """Factor by which multistep and plateau multiply the learning rate."""
    patience: NonNegativeInt = 5
    """Plateau: epochs without a better accuracy before the learning rate falls."""
    clip_value: NonNegative = 0.0
    """Clip each gradient to this absolute value (0: off)."""
    clip_norm: NonNegative = 0.0
    """Clip the norm of all gradients together to this (0: off)."""
    label_smoothing: BelowOne = 0.0
    """Probability mass spread evenly over all classes."""
    ema: BelowOne = 0.0
    """Decay per step of an exponential moving average of the weights, which is then evaluated and
    saved (0: off)."""
    lookahead: NonNegativeInt = 0
    """Steps between moves of the slow weights towards the trained ones. Training then continues
    from the slow weights, which are evaluated and saved (0: off)."""
    lookahead_decay: BelowOne = 0.95
    """Lookahead: fraction of the slow weights kept per step at the end of training."""
    lookahead_power: NonNegative = 3.0
    """Lookahead: at a fraction t of training, the fraction kept is multiplied by t to this power
    (0: constant)."""


@dataclass(frozen=True)
class TransferConfig:
    """What the network learns from another one."""

    __pydantic_config__ = _STRICT

    init_from: Path | None = None
    """Initial weights: the folder of a run, or a file of weights (ours, pytorch-cifar's,
    torchvision's or timm's). Layers whose name and shape agree are taken, the others start as
    usual."""
    freeze: NameList = ()
    """Layers that are not trained, by name or pattern: stem,stages.[01] or stages.*.bn?. Frozen
    batch norms keep their statistics."""
    teacher: Path | None = None
    """Distillation: a run whose predictions on the augmented images are targets, besides labels."""
    distill_temperature: Positive = 4.0
    """Distillation: the logits of both networks are divided by this."""
    distill_weight: Fraction = 0.9
    """Distillation: weight of the teacher's predictions; that of the labels is the rest."""
    unlabelled: Path | None = None
    """Images without labels to train on too: a folder, a .npy file, or a pickle in CIFAR's
    format."""
    pseudo_from: Path | None = None
    """A run whose predictions are the labels of --unlabelled."""
    pseudo_threshold: Fraction = 0.95
    """Least probability of the predicted class; images below it are left out."""
    pretrain: Literal["none", "barlow_twins"] = "none"
    """Self-supervised pre-training on two views of each image; the accuracy is that of a linear
    classifier of its features, trained along. Fine-tune with --init-from."""
    projector: IntList = (512, 512, 512)
    """Pre-training: sizes of the dense layers between the features and the loss."""
    redundancy_weight: Positive = 0.0051
    """Barlow Twins: weight of the correlations between different dimensions."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation and stopping."""

    __pydantic_config__ = _STRICT

    tta: Literal["none", "flip", "shift", "multi-crop"] = "shift"
    """Test-time augmentation of the final evaluation: mean over the image and its mirror image;
    'shift' adds both translated by 1 pixel along one diagonal, 'multi-crop' along both
    diagonals."""
    tta_select: PositiveFraction = 1.0
    """Fraction of the images that get the translated views: those with the least confident
    prediction from the image and its mirror image (1: all)."""
    tta_mirror: PositiveFraction = 1.0
    """Fraction of the images that get the mirrored view, which includes those that get the
    translated ones: those with the least confident prediction from the image alone (1: all)."""
    score_test: bool = True
    """Score the test images. If off, choices are made on held-out images and the test images are
    not used."""
    fuse: bool = False
    """Evaluate a fused copy of the network (resfast.fuse) in the compute dtype. Fusing counts as
    evaluation time, and timing its kernels before training as compilation time."""
    eval_every: NonNegativeInt = 1
    """Epochs between evaluations (0: only after the last)."""
    eval_batch_size: PositiveInt = 1000
    """Images per evaluation step."""
    target: Accuracy | None = None
    """Stop once this accuracy is reached (0.94 for 94 %). With --runs the mean is tested against
    it; with --max-seconds and no recipe it selects a measured recipe."""
    early_stop: NonNegativeInt = 0
    """Stop after this many evaluations without a better accuracy (0: off)."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Hardware and numerics."""

    __pydantic_config__ = _STRICT

    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: CUDA if available."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Compute dtype under autocast; auto: bf16 where the hardware has it, else fp16 on CUDA and
    fp32 on the CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: if there is a compiler and the run is long enough to benefit."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Capture the training step as one CUDA graph; auto: if device and options allow it."""
    tf32: bool = True
    """Let fp32 matrix products and convolutions use TF32 on CUDA."""
    threads: NonNegativeInt = 0
    """CPU threads (0: torch's default)."""
    winograd_tile: Literal[2, 3, 4] = 2
    """Bf16 training on the CPU: output size of the largest Winograd tiles of 3x3 convolutions; 4
    takes about half as many multiplications, with 3 times the rounding error. Image sizes that
    smaller tiles fit better use those."""
    tune_allocator: bool = True
    """Keep freed memory in the process instead of returning it to the operating system every
    step."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights, the order of the images, augmentation, dropout and the choice of
    held-out images."""


@dataclass(frozen=True)
class RunConfig:
    """What the run writes. Does not change its result."""

    __pydantic_config__ = _STRICT

    name: str | None = None
    """Name of the run's folder (None: recipe, model, data, seed and time)."""
    out: Path = Path("runs")
    """Folder that holds the runs."""
    runs: PositiveInt = 1
    """Number of training runs, with the seeds --seed, --seed + 1, …, each in its own folder inside
    the run's, and statistics over them."""
    max_seconds: Positive | None = None
    """Stop and save after this many seconds of training; compiling and loading do not count."""
    save_seconds: NonNegative = 15.0
    """Minimum time between checkpoints, in seconds; the last epoch is always saved."""
    record: NameList = ()
    """Write a row for each step to steps.csv: loss (and learning rate), gradients (norm and change
    of the last layer's gradient), smoothness (beta-smoothness and the loss along the gradient;
    takes five more passes per step)."""
    plots: bool = True
    """Draw curves.png and confusion.png, which takes about a second."""
    tensorboard: bool = False
    """Write TensorBoard events to the run's folder."""
    wandb: bool = False
    """Log to Weights & Biases, which is configured by its own environment variables."""


@dataclass(frozen=True)
class Config:
    """A run."""

    __pydantic_config__ = _STRICT

    recipe: tyro.conf.Suppress[str] = "default"
    """Recipe that the run started from, for the record only; the values are below."""
    undecided: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Fields that the recipe will set, because they depend on epochs, network or data that are not
    known yet; empty in a run's config.json. See :func:`resfast.config.recipes.decide`."""
    recipe_epochs: tyro.conf.Suppress[float | None] = None
    """Number of epochs that the recipe's values are for, if they depend on it. A run that was
    resumed with more epochs keeps its values."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    run: RunConfig = field(default_factory=RunConfig)


ADAPTER = pydantic.TypeAdapter(Config)
"""Validates configurations from any source."""
