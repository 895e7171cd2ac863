"""SIGKILL at random moments of real two-rank runs, each resumed until it ends: nothing lost, nothing changed.

    python tests/train/kill_trials.py --trials 50 [--minutes 12] [--seed 1] [--folder FOLDER] [--launchers]

Every trial starts `lumina train` on the deepspeed runner, kills a rank, both, or every process of it somewhere between
its start and its end, and starts it again. At the end of a run losses, gradient norms and samples of every step must be
those of an uninterrupted one to the last digit, and no kill may have cost a checkpoint that was published before it.
Prints one line a trial and the counts; the exit code is 1 when anything was lost. With --folder, every kill and every
run that came to its end stands in FOLDER/trials.jsonl: a call that ended early, by --minutes or by a signal, is gone on
with by the same command, an unfinished run first. With --launchers only `lumina train`, the deepspeed runner or its
launch module is killed, from the first moment on: the ranks must then end by themselves, every step that they did saved.
"""

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from place_tracing import place_file, read_place
from two_rank_run import Run

from lumina_ds.checkpoint.format import checkpoint_faults, pointer_target, step_folders
from lumina_ds.monitor.writers import append_record, read_records

STEPS = 16
OPTIONS = ("--max-steps", str(STEPS), "--save-every-n-batches", "2")
MOMENTS = ("start-up", "between steps", "in a micro-batch", "mid-accumulation", "mid-save")
VICTIMS = ("rank 0", "rank 1", "both ranks", "every process")
# By how far each stands below `lumina train`.
LAUNCHERS = {"lumina train": 0, "the runner": 1, "the launch module": 2}
# From the kill to the end of the last process: it is noticed, the step in hand is done, and the state is saved.
SECONDS_TO_END = 30


class Trials:
    """Runs in folders of their own, killed by a random plan that follows from the seed and the number of the kill."""

    def __init__(self, folder, shards, reference, seed=1, kills_per_run=8, options=OPTIONS, victims=VICTIMS):
        self.folder = folder
        self.shards = shards
        self.reference = reference
        self.seed = seed
        self.kills_per_run = kills_per_run
        self.options = options
        self.victims = tuple(victims)
        self.start_seconds = 15.0

    @property
    def kills(self):
        return self._records("victim")

    @property
    def finished(self):
        return self._records("steps")

    @property
    def losses(self):
        return self._records("lost")

    def _records(self, key):
        return [record for record in read_records(self.folder / "trials.jsonl") if key in record]

    def run(self, trials, end=float("inf"), say=print):
        """Kill `trials` times, or until the clock says `end`; every run that was begun is brought to its end."""
        while True:
            begun = {kill["run"] for kill in self.kills} - {run["run"] for run in self.finished}
            if not begun and (len(self.kills) >= trials or time.monotonic() >= end):
                return
            name = min(begun, default=f"run-{len(self.finished)}")
            before = len([kill for kill in self.kills if kill["run"] == name])
            wanted = before < self.kills_per_run and len(self.kills) < trials and time.monotonic() < end
            try:
                found = {"run": name} | self.life(self.folder / name, wanted)
            except AssertionError as error:
                append_record(self.folder / "trials.jsonl", {"run": name, "lost": str(error)})
                raise
            append_record(self.folder / "trials.jsonl", found)
            if "victim" in found:
                say(f"{len(self.kills):3} {name}: {found['victim']} killed in {found['moment']} ({found['place']}); "
                    f"newest checkpoint: {found['checkpoint'] or 'none'}", flush=True)  # fmt: skip
            else:
                say(f"    {name}: ended after {before} kills, all {found['steps']} steps identical to the last digit")

    def life(self, folder, kill):
        """Start the run once, and kill it if wanted; where that was, or the steps of a run that came to its end."""
        before = sound_steps(folder / "runs/r/checkpoints")
        for rank in (0, 1):
            place_file(folder, rank).unlink(missing_ok=True)
        started = time.monotonic()
        environment = {"LUMINA_TEST_HOOK": "place_tracing", "LUMINA_TEST_PLACES": str(folder)}
        run = Run(folder, self.shards, options=self.options, environment=environment)
        killed = self.kill(run, folder, started) if kill else None
        seconds = wait_for_nobody(run) if killed is not None and killed["victim"] in LAUNCHERS else None
        code = run.wait()
        after = sound_steps(folder / "runs/r/checkpoints")
        assert not before or (after and after[-1] >= before[-1]), f"lost: {before} before the kill, {after} after it"
        pointed = pointer_target(folder / "runs/r/checkpoints", "latest")
        assert pointed is None or not checkpoint_faults(pointed), checkpoint_faults(pointed)
        if seconds is not None and code != 0:
            done, saved = run.records[-1:], after[-1] if after else 0
            assert not done or done[0]["step"] == saved, f"lost: step {done[0]['step']} was done, {saved} is saved"
            killed |= {"seconds": round(seconds, 1)}
        if killed is None or code == 0:
            assert code == 0, run.printed
            assert run.exact == self.reference, "not the losses, gradient norms and samples of the uninterrupted run"
            return {"steps": len(run.exact), "resumed": bool(before)}
        return killed | {"checkpoint": f"step {after[-1]}" if after else None, "resumed": bool(before)}

    def kill(self, run, folder, started):
        """Wait for the planned moment and kill; None when the run was over before it came."""
        draw = random.Random(f"{self.seed} {len(self.kills)}")
        moment, victim = draw.choice(MOMENTS), draw.choice(self.victims)
        watched = 1 if victim == "rank 1" else 0
        not_before = draw.uniform(0.02 if victim in LAUNCHERS else 0.5, 1.0) * self.start_seconds
        skipped = draw.randrange(1, 12)
        seen, last = 0, None
        while run.process.poll() is None:
            place = read_place(folder, watched)
            if place[0] and last is None:
                self.start_seconds = time.monotonic() - started
            if moment == "start-up" and (time.monotonic() - started >= not_before or place[0]):
                break
            if place != last and holds(moment, place):
                seen += 1
                if seen >= (skipped + 1) // 2:
                    break
            last = place if place[0] else None
            time.sleep(0.0005)
        else:
            return None
        time.sleep(draw.uniform(0, 0.003))
        if not strike(run, victim):
            return None
        place = read_place(folder, watched)
        return {"victim": victim, "moment": moment_of(place), "place": "; ".join(filter(None, place)) or "start-up"}


def holds(moment, place):
    training, saving = place
    if moment == "mid-save":
        return bool(saving)
    return moment_of((training, "")) == moment


def moment_of(place):
    """Which of MOMENTS a place is: of what ranks tell, the save counts first."""
    training, saving = place
    if saving:
        return "mid-save"
    if not training:
        return "start-up"
    if training == "between steps":
        return training
    # The gradient of the first micro-batch is there, that of the second is not.
    return "mid-accumulation" if training.startswith("micro-batch 2 forward") else "in a micro-batch"


def strike(run, victim):
    """SIGKILL the victims; False when there was nobody left."""
    if victim in LAUNCHERS:
        victims = launcher_of(run, LAUNCHERS[victim])
    else:
        victims = run.family() if victim == "every process" else ranks_of(run, victim)
    for process in victims:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return bool(victims)


def launcher_of(run, depth):
    """[that process], or the nearest one above it that is there already."""
    found = psutil.Process(run.process.pid)
    with contextlib.suppress(psutil.Error):
        for _ in range(depth):
            found = (found.children() or [found])[0]
    return [found]


def wait_for_nobody(run):
    """Seconds until no process of the run is left."""
    began = time.monotonic()
    while run.family() and time.monotonic() - began < SECONDS_TO_END:
        time.sleep(0.1)
    left = [" ".join(process.cmdline()[:6]) for process in run.family()]
    assert not left, f"lost: after {SECONDS_TO_END} s still there: {left}"
    return time.monotonic() - began


def ranks_of(run, victim):
    """The ranks that are meant; before there are any, every process."""
    numbers = {"rank 0": "0", "rank 1": "1"}
    found = []
    for process in run.family():
        with contextlib.suppress(psutil.Error):
            rank = process.environ().get("RANK")
            if rank is not None and numbers.get(victim, rank) == rank:
                found.append(process)
    return found or run.family()


def sound_steps(checkpoints):
    """Steps of the checkpoints that verify, oldest first."""
    return [int(folder.name[-8:]) for folder in step_folders(checkpoints) if not checkpoint_faults(folder)]


def make_shards(folder):
    """The test suite's tiny corpus, made through the command line."""
    sys.path.append(str(Path(__file__).parents[1]))
    from tiny_corpus import write_conversations

    from lumina_ds.cli.main import cli, run_command

    source = write_conversations(folder / "train.jsonl", 150)
    for words in (
        ["tokenizer", "train", source, "--vocab-size", 400, "--out", folder / "tokenizer.model"],
        [
            "preprocess",
            source,
            "--tokenizer",
            folder / "tokenizer.model",
            "--seq-length",
            64,
            "--out",
            folder / "shards",
        ],
    ):
        assert run_command(cli, [str(word) for word in words]) == 0, words
    return folder / "shards"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--launchers", action="store_true")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="kill-trials-"))
    folder.mkdir(parents=True, exist_ok=True)
    shards = folder / "shards" if (folder / "shards").exists() else make_shards(folder)
    whole = Run(folder / "uninterrupted", shards, options=OPTIONS)
    assert whole.wait() == 0, whole.printed
    assert len(whole.exact) == STEPS
    trials = Trials(folder, shards, whole.exact, given.seed, victims=LAUNCHERS if given.launchers else VICTIMS)
    assert not trials.losses, trials.losses
    trials.run(given.trials, time.monotonic() + 60 * given.minutes)
    kills, finished = trials.kills, trials.finished
    print(json.dumps({
        "kills": len(kills), "moments": Counter(kill["moment"] for kill in kills),
        "victims": Counter(kill["victim"] for kill in kills), "runs finished": len(finished),
        "longest seconds to the end": max((kill["seconds"] for kill in kills if "seconds" in kill), default=None),
        "lives": len(kills) + len(finished), "resumed from a checkpoint": sum(r["resumed"] for r in kills + finished),
        "steps compared, all identical": sum(run["steps"] for run in finished), "losses": len(trials.losses),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
