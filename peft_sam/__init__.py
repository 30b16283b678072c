"""peft_sam: sparse fine-tuning for Hugging Face PEFT.

SAM, the Second-order Approximation Method (Fu et al. 2022, arXiv 2211.15583), trains only the ⌊p·m⌋ parameters of a
pretrained model with the largest squared gradient of the task's mean loss. It is neither sharpness-aware
minimisation nor Segment Anything; `transformers.SamConfig` is something else.

Importing the package registers the PEFT type SAM_SPARSE:

    model = get_peft_model(base_model, SamConfig(task_type="SEQ_CLS", density=0.005))
    trainer = Trainer(model=model, ...)
    select_parameters(trainer)
    trainer.train()
    model.save_pretrained("my-adapter")
"""

from peft_sam import _peft
from peft_sam.choosing.choose import choose
from peft_sam.choosing.gradients import GradientStatistics, Loss, accumulate
from peft_sam.config import SamConfig
from peft_sam.export import (
    ExportReport,
    RoundingReport,
    WeightPatch,
    WeightReceiver,
    WeightStream,
    export_adapter,
    rounding_report,
)
from peft_sam.files.fingerprint import OtherBaseWarning
from peft_sam.layers.base import SamLayer
from peft_sam.report.card import complete_card
from peft_sam.report.report import SelectionReport, selection_report
from peft_sam.selecting.rates import RateWarning
from peft_sam.selecting.select import FewerEntriesWarning, choose_for, select_parameters
from peft_sam.selection import Selection
from peft_sam.sparse.delta import PendingAdapterError, SparseDelta
from peft_sam.tuner.hotswap import register_swap
from peft_sam.tuner.merged import merged
from peft_sam.tuner.model import SamModel
from peft_sam.tuner.moved import MovedBuffersWarning
from peft_sam.tuner.optimizer import create_sam_optimizer

__version__ = "0.1.0"

__all__ = [
    "ExportReport",
    "FewerEntriesWarning",
    "GradientStatistics",
    "Loss",
    "MovedBuffersWarning",
    "OtherBaseWarning",
    "PendingAdapterError",
    "RateWarning",
    "RoundingReport",
    "SamConfig",
    "SamModel",
    "Selection",
    "SelectionReport",
    "SparseDelta",
    "WeightPatch",
    "WeightReceiver",
    "WeightStream",
    "accumulate",
    "choose",
    "create_sam_optimizer",
    "export_adapter",
    "merged",
    "rounding_report",
    "select_parameters",
    "selection_report",
]

SamModel.chooser = staticmethod(choose_for)
_peft.register(SamConfig, SamModel, SamLayer, complete_card, OtherBaseWarning)
register_swap()
