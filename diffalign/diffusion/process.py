"""Noise processes: the one object that hides parameterisation, schedule and scheduler from everything else."""

from diffalign.diffusion.base import NoiseProcess
from diffalign.diffusion.discrete import DiscreteProcess
from diffalign.diffusion.flow import DynamicShift, FlowProcess
from diffalign.diffusion.level import Grid, Level
from diffalign.diffusion.schedulers import process_from_scheduler

__all__ = [
    "DiscreteProcess",
    "DynamicShift",
    "FlowProcess",
    "Grid",
    "Level",
    "NoiseProcess",
    "process_from_scheduler",
]
