"""The internals of DeepSpeed that this package leans on. Another version fails here, by name, not in a run."""

import inspect

import pytest

from lumina_ds.engine import distributed
from lumina_ds.errors import MachineError


def test_the_tested_version_is_installed():
    distributed.check_deepspeed_version()


@pytest.mark.parametrize("found", ["0.19.7", "0.20.0"])
def test_another_version_is_refused_with_the_remedy(monkeypatch, found):
    monkeypatch.setattr(distributed, "version", lambda name: found)
    with pytest.raises(MachineError, match=rf"deepspeed {found} is installed.*pip install deepspeed==0.19.8"):
        distributed.check_deepspeed_version()


def test_autoep_router_and_layer_are_as_expected():
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.moe.ep_experts import GroupedExperts
    from deepspeed.moe.ep_router import TokenChoiceTopKRouter

    assert list(inspect.signature(TokenChoiceTopKRouter.forward).parameters) == ["self", "x", "expert_bias"]
    source = inspect.getsource(AutoEPMoELayer._forward)
    assert "RouterOutput(*self.router(x, self.expert_bias))" in source
    assert [name for name, _ in GroupedExperts(4, 8, 2).named_parameters()] == ["w1", "w2", "w3"]


def test_engine_and_group_functions_are_as_expected():
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import groups

    assert "deepspeed_shm_comm" in __compatible_ops__
    assert "scale_wrt_gas=True" in inspect.getsource(deepspeed.DeepSpeedEngine)
    assert "save_latest=True" in inspect.getsource(deepspeed.DeepSpeedEngine)
    assert callable(groups._get_expert_parallel_group)
    from lumina_ds.train.checkpoint import _safe_classes

    assert len(_safe_classes()) == 4


def test_world_is_read_from_every_launcher():
    read = distributed.launched_world
    assert read({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}) == (3, 1, 4)
    open_mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    assert read(open_mpi) == (1, 1, 2)
    batch = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
    assert read(batch) is None  # a batch script, not a task that srun started
    assert read(batch | {"SLURM_STEP_ID": "0"}) == (5, 1, 8)
    assert read({"RANK": "0"}) is None
    assert read({}) is None
