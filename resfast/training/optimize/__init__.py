"""Faster training of anyone's network: :func:`optimize`."""

from resfast.training.optimize.network import optimization_report as optimization_report
from resfast.training.optimize.network import optimize as optimize
from resfast.training.optimize.network import restore as restore
from resfast.training.optimize.report import OptimizationReport as OptimizationReport
