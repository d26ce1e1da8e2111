from lowmem import convert as convert
from lowmem.api import load as load
from lowmem.api import make_plan as make_plan
from lowmem.api import open_model as open_model
from lowmem.config import Grammar as Grammar
from lowmem.config import QuantConfig as QuantConfig
from lowmem.config import SamplingParams as SamplingParams
from lowmem.errors import LowmemError as LowmemError
from lowmem.plan.request import ModelRequest as ModelRequest
from lowmem.session import Session as Session
from lowmem.transformers_patch import patch_transformers as patch_transformers

__version__: str
