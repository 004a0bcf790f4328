"""Implicit vision prompt tuning (LION) on frozen backbones, built on `deqcore`."""

from typing import TYPE_CHECKING

from lion_models.base.lazy import exports

if TYPE_CHECKING:
    from lion_models.backbones import FrozenBackbone as FrozenBackbone
    from lion_models.backbones import load_backbone as load_backbone
    from lion_models.base.errors import UserError as UserError
    from lion_models.data import make_task as make_task
    from lion_models.data import open_source as open_source
    from lion_models.methods.adapter import AdapterConfig as AdapterConfig
    from lion_models.methods.adapter import Adapters as Adapters
    from lion_models.methods.base import count_parameters as count_parameters
    from lion_models.methods.finetune import BiasConfig as BiasConfig
    from lion_models.methods.finetune import FineTune as FineTune
    from lion_models.methods.finetune import FullConfig as FullConfig
    from lion_models.methods.linear import LinearConfig as LinearConfig
    from lion_models.methods.linear import LinearProbe as LinearProbe
    from lion_models.methods.lion import Lion as Lion
    from lion_models.methods.lion import LionConfig as LionConfig
    from lion_models.methods.lion_ladder import LionLadder as LionLadder
    from lion_models.methods.lora import LoRA as LoRA
    from lion_models.methods.lora import LoRAConfig as LoRAConfig
    from lion_models.methods.vpt import VPTDeep as VPTDeep
    from lion_models.methods.vpt import VPTDeepConfig as VPTDeepConfig
    from lion_models.methods.vpt import VPTPad as VPTPad
    from lion_models.methods.vpt import VPTPadConfig as VPTPadConfig
    from lion_models.methods.vpt import VPTShallow as VPTShallow
    from lion_models.methods.vpt import VPTShallowConfig as VPTShallowConfig
    from lion_models.prompts.cdr import CDR as CDR
    from lion_models.prompts.cdr import RobustOptimizer as RobustOptimizer
    from lion_models.prompts.implicit_prompt import ImplicitPrompt as ImplicitPrompt
    from lion_models.prompts.ladder import ImplicitLadder as ImplicitLadder
    from lion_models.run import Run as Run
    from lion_models.run import RunConfig as RunConfig
    from lion_models.run import build_model as build_model
    from lion_models.run import fit as fit
    from lion_models.run import load_run as load_run
    from lion_models.run.training import TrainingConfig as TrainingConfig
    from lion_models.run.tuned import TunedModel as TunedModel
    from lion_models.run.tuned import tune as tune
else:  # type checkers would take any name for one that is there
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
