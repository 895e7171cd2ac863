"""Which GPUs ranks take: from the environment to the names, through DeepSpeed's slots, and back in a rank."""

from __future__ import annotations

import pytest

from lumina_ds.engine.cards import (
    CARDS,
    card_name,
    cards_line,
    carry_cards,
    check_reach,
    choose_cards,
    device_index,
    obey_cards,
)
from lumina_ds.engine.launchers import Launch
from lumina_ds.engine.rendezvous import Arrival, _card_faults
from lumina_ds.errors import MachineError
from lumina_ds.ranks.runner import complete_runner_arguments, rank_environment, say_cards, shown_command

CUDA, HIP = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("environment", "num_devices", "slots", "cards"),
    [
        ({}, 4, [0, 1], ["0", "1"]),
        ({}, 4, [2, 3], ["2", "3"]),
        ({CUDA: "2,3"}, 2, [0, 1], ["2", "3"]),
        ({CUDA: " 3, 2 "}, 2, [0, 1], ["3", "2"]),
        ({CUDA: "5,6,7"}, 3, [0], ["5"]),
        ({CUDA: "GPU-a,GPU-b"}, 2, [0, 1], ["GPU-a", "GPU-b"]),
        ({CUDA: "MIG-a"}, 1, [0], ["MIG-a"]),
        ({CUDA: ""}, 0, [0, 1], []),
        ({CUDA: "2,3"}, 0, [0, 1, 2, 3], []),  # a CPU
        ({"ROCR_VISIBLE_DEVICES": "4,5"}, 2, [0, 1], ["0", "1"]),
        ({HIP: "2,3"}, 8, [0, 1], ["0", "1"]),  # which NVIDIA's driver does not read
    ],
)
def test_the_cards_of_ranks(environment: dict[str, str], num_devices: int, slots: list[int], cards: list[str]) -> None:
    assert choose_cards(environment, num_devices, slots) == cards


def test_amd_reads_hip_first() -> None:
    assert choose_cards({HIP: "2,3", CUDA: "0"}, 2, [0, 1], is_amd=True) == ["2", "3"]
    assert choose_cards({CUDA: "2,3"}, 2, [0, 1], is_amd=True) == ["2", "3"]


@pytest.mark.parametrize(
    ("environment", "num_devices", "slots", "by_number", "says"),
    [
        ({}, 2, [0, 1, 2, 3], False, "4 ranks up to slot 3 were asked for, and 2 cards can be used here; give"),
        ({CUDA: "2,3"}, 2, [0, 1, 2], False, "and 2 cards can be used here (CUDA_VISIBLE_DEVICES=2,3); give --num_gpus 2"),
        ({CUDA: "0,1,9,3"}, 2, [0, 1], False, "4 cards are named (CUDA_VISIBLE_DEVICES=0,1,9,3), and 2 can be used"),
        ({CUDA: "MIG-a,MIG-b"}, 1, [0], False, "a process sees one MIG slice only; name MIG-a"),
        ({CUDA: "4,5,6,7"}, 4, [2, 3], True, "--include or --exclude and CUDA_VISIBLE_DEVICES=4,5,6,7 choose different"),
    ],
)  # fmt: skip
def test_what_no_rank_could_have_is_refused_with_the_numbers(
    environment: dict[str, str], num_devices: int, slots: list[int], by_number: bool, says: str
) -> None:
    with pytest.raises(MachineError) as caught:
        choose_cards(environment, num_devices, slots, by_number)
    assert says in str(caught.value)


def test_include_beside_a_variable_that_only_counts_is_fine() -> None:
    assert choose_cards({CUDA: "0,1,2,3"}, 4, [2, 3], by_number=True) == ["2", "3"]


def test_a_choice_that_ssh_would_lose_is_refused() -> None:
    for harmless in ({}, {CUDA: ""}, {CUDA: "0,1"}):
        check_reach(harmless)
    with pytest.raises(MachineError, match="CUDA_VISIBLE_DEVICES=2,3 does not reach"):
        check_reach({CUDA: "2,3"})


@pytest.mark.parametrize(
    ("before", "slots", "after"),
    [
        ({CUDA: "2,3"}, "0,1", {CUDA: "2,3"}),
        ({CUDA: "4,5,6,7"}, "0,1", {CUDA: "4,5"}),
        ({CUDA: "4,5,6,7"}, "1,3", {CUDA: "5,7"}),
        ({CUDA: "GPU-a, GPU-b"}, "1", {CUDA: "GPU-b"}),
        ({CUDA: ""}, "0,1", {CUDA: ""}),
        ({CUDA: "-1"}, "0,1", {CUDA: "-1"}),
        ({}, "0,1", {CUDA: "0,1"}),
        ({}, None, {}),
        ({CUDA: "GPU-a"}, None, {CUDA: "GPU-a"}),
    ],
)
def test_the_choice_survives_deepspeeds_slots(before: dict[str, str], slots: str | None, after: dict[str, str]) -> None:
    """launch.py overwrites the variable with its slots; None: it was not there."""
    environment = dict(before)
    carry_cards(environment)
    assert CUDA not in environment and (CARDS in environment) == bool(before)
    environment |= {} if slots is None else {CUDA: slots}
    obey_cards(environment)
    assert environment == after


def test_on_amd_the_rank_keeps_one_variable() -> None:
    environment = {HIP: "2,3"}
    carry_cards(environment, is_amd=True)
    environment[CUDA] = "1"
    obey_cards(environment)
    assert environment == {HIP: "3"}


@pytest.mark.parametrize(
    ("launch", "num_devices", "index"),
    [
        (Launch("deepspeed", 3, 1, 4, 2), 2, 1),
        (Launch("srun", 3, 3, 4), 1, 0),  # --gpus-per-task=1: each task sees its own
        (Launch("srun", 3, 3, 4), 4, 3),
        (Launch("the environment", 1, 0, 2, 1, one_per_host=True), 1, 0),
    ],
)
def test_a_rank_takes_a_card_that_it_sees(launch: Launch, num_devices: int, index: int) -> None:
    assert device_index(launch, num_devices) == index


@pytest.mark.parametrize(
    ("launch", "num_devices", "says"),
    [
        (Launch("torchrun", 0, 0, 4, 4), 2, "torchrun started 4 ranks on this host, and 2 GPUs are visible"),
        (Launch("srun", 3, 3, 4), 2, "srun started 4 ranks on this host, and 2 GPUs"),
        (Launch("the environment", 1, 0, 2, 1, one_per_host=True), 8, "mean one rank per host, and 8 GPUs are visible"),
    ],
)
def test_a_host_with_fewer_or_idle_cards_is_refused(launch: Launch, num_devices: int, says: str) -> None:
    with pytest.raises(MachineError, match=says):
        device_index(launch, num_devices)


def test_ranks_on_one_card_and_ranks_without_one_are_named() -> None:
    def faults(*cards: str) -> list[str]:
        return list(_card_faults([Arrival(rank, "h", "10.0.0.1", 1, {}, card) for rank, card in enumerate(cards)]))

    assert faults("", "") == faults("a", "b") == []
    assert faults("a", "a", "b") == ["ranks 0-1 on h have the same GPU a; start one rank per visible GPU"]
    assert faults("a", "")[0].startswith("rank 1 on h see no GPU, and the others do")


def test_the_line_that_starts_names_cards_as_the_environment_does() -> None:
    assert [card_name({CUDA: "GPU-a,GPU-b"}, index) for index in (0, 1)] == ["GPU-a", "GPU-b"]
    assert card_name({}, 3) == card_name({CUDA: ""}, 3) == card_name({HIP: "5,6"}, 3) == "3"
    assert card_name({HIP: "5,6", CUDA: "0"}, 1, is_amd=True) == "6"
    places = [("a", "2"), ("a", "3"), ("b", "0")]
    assert cards_line(places) == "GPUs, rank by rank: 2, 3 on a; 0 on b"


def test_the_runner_is_asked_for_what_is_visible(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The count of GPUs is the only thing that this machine does not have."""
    monkeypatch.setattr("lumina_ds.engine.resources.num_local_gpus", lambda: 2)
    monkeypatch.setenv(CUDA, "GPU-a,GPU-b")
    assert complete_runner_arguments([])[-2:] == ["--num_gpus", "2"]
    for arguments in (["--num_gpus", "4"], ["--num_gpus", "4", "--master_port", "7"]):
        with pytest.raises(MachineError, match="4 ranks up to slot 3"):
            complete_runner_arguments(arguments)
    with pytest.raises(MachineError, match="choose different cards"):
        complete_runner_arguments(["--include", "localhost:1"])
    environment = rank_environment()
    assert CUDA not in environment
    say_cards([])
    assert capfd.readouterr().err == "the ranks of this host take, in their order, GPU GPU-a, GPU-b\n"
    shown = shown_command(["python", "-m", "runner", "--num_gpus", "2", "two words"], environment)
    assert shown == "LUMINA_CARDS=CUDA_VISIBLE_DEVICES=GPU-a,GPU-b deepspeed --num_gpus 2 'two words'"


def test_hosts_of_a_hostfile_get_their_own_slots_or_a_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr("lumina_ds.engine.resources.num_local_gpus", lambda: 4)
    monkeypatch.setenv(CUDA, "4,5,6,7")
    (tmp_path / "hosts").write_text("one slots=4\ntwo slots=8\n")
    hosts = ["--hostfile", str(tmp_path / "hosts")]
    with pytest.raises(MachineError, match="does not reach ranks that are started through ssh"):
        complete_runner_arguments(hosts)
    complete_runner_arguments([*hosts, "--no_ssh", "--node_rank", "0"])
    with pytest.raises(MachineError, match="8 ranks up to slot 7 were asked for, and 4 cards"):
        complete_runner_arguments([*hosts, "--no_ssh", "--node_rank", "1"])
