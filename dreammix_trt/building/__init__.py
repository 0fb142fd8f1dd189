"""Build: base checkpoint -> parts in the store; LoRAs -> subject; both -> engine directory.

The only place that knows the exporter and the engine. Every network is a part with a key of its own, so that a build
goes on where another ended, and bases share what they have in common. After a base's parts are there, a subject costs
seconds and needs no torch.
"""

from dreammix_trt.building.defaults import Defaults
from dreammix_trt.building.engine_options import EngineOptions
from dreammix_trt.building.one_build import build, carry_out
from dreammix_trt.building.order import BaseSources, BuildOrder

__all__ = ["BaseSources", "BuildOrder", "Defaults", "EngineOptions", "build", "carry_out"]
