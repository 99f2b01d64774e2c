# SPDX-License-Identifier: Apache-2.0
"""When each token of a request will be there, and which way of sending its KV brings it soonest.

Pure Python: the scheduler halves and `lynx plan` use the same model.
"""

from lynx_connector.plan.errors import PlanError
from lynx_connector.plan.model import FirstToken, Mode, Prediction, Setting, predict
from lynx_connector.plan.shape import KVShape

__all__ = ["FirstToken", "KVShape", "Mode", "PlanError", "Prediction", "Setting", "predict"]
