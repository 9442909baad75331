"""A trained network as a chain of fused convolutions: :func:`fuse`.

The network is traced with ``torch.fx``, or with ``torch.export`` where Python's control flow looks
at the data, and its in-place operations are made out of place, so that an operation can move to
where its operands are ready. Every convolution then takes in what follows it and nobody else
reads: the batch norm (folded into the weights, Jacob et al., arXiv:1712.05877, section 3.2), the
addition of a residual and the activation. A max pool moves behind a norm and an activation that
keep the order of numbers, so that these stand behind the convolution.
"""

from resfast.inference.fuse.model import FusedModel
from resfast.inference.fuse.nodes import DTYPES
from resfast.inference.fuse.pipeline import fuse
from resfast.inference.fuse.report import FusionReport

__all__ = ["DTYPES", "FusedModel", "FusionReport", "fuse"]
