"""Imported once by the process that ranks of tests are forked from: what every rank imports."""

import gc
import importlib
import os

# As a rank of `lumina train` does before it imports DeepSpeed; asking the driver would leave a state that no fork can use.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

from lumina_ds.engine.resources import name_accelerator

name_accelerator(os.environ)
for name in ("deepspeed", "lumina_ds.train.start", "lumina_ds.engine.build", "lumina_ds.cli.main"):
    importlib.import_module(name)
# No collection of a rank looks through what was imported, or copies its pages.
gc.collect()
gc.freeze()
