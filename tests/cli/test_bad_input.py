"""Every mistake of a user: one line that says what, the value and the remedy; the documented exit code; no traceback."""

import pytest

from lumina_ds.cli.main import cli, run_command

TRAIN = ["train", "--config", "debug"]

CASES = {
    "unknown verb": (["trian"], 2, "no verb 'trian'; did you mean train?"),
    "unknown option": ([*TRAIN, "--learnin-rate", "1"], 2, "--learnin-rate; did you mean --learning-rate?"),
    "unknown field": ([*TRAIN, "--model.num_expert", "8"], 2, "did you mean model.num_experts?"),
    "unknown preset": (["train", "--config", "debgu"], 2, "did you mean debug?"),
    "value of the wrong type": ([*TRAIN, "--learning-rate", "fast"], 2, "train.learning_rate is 'fast'"),
    "no data": (TRAIN, 2, "--train-data"),
    "no such file": ([*TRAIN, "--train-data", "nowhere.jsonl"], 3, "nowhere.jsonl"),
    "not JSONL": ([*TRAIN, "--train-data", "{folder}/text.jsonl"], 3, "text.jsonl"),
    "no assistant turn": ([*TRAIN, "--train-data", "{folder}/users.jsonl"], 3, "no assistant turn"),
    "no such shards": ([*TRAIN, "--data", "nowhere"], 3, "nowhere"),
    "other tokenizer": ([*TRAIN, "--data", "{shards}", "--tokenizer", "{folder}/other.model"], 3, "another tokenizer"),
    "tokenizer of the Hub": (
        [*TRAIN, "--train-data", "{train}", "--tokenizer", "gpt2"],
        3,
        "the tokenizer gpt2: No such",
    ),
    "both lengths": ([*TRAIN, "--data", "{shards}", "--max-steps", "3", "--epochs", "2"], 2, "leave one of them out"),
    "standard input": ([*TRAIN, "--train-data", "-"], 2, "training cannot read standard input"),
    "template of nobody": (
        [
            *TRAIN,
            "--train-data",
            "{train}",
            "--tokenizer",
            "{folder}/other.model",
            "--chat-template",
            "{folder}/x.jinja",
        ],
        3,
        "x.jinja",
    ),
    "other tokenizer for evaluation": (
        [*TRAIN, "--train-data", "{train}", "--tokenizer", "{folder}/other.model", "--eval-shards", "{shards}"],
        3,
        "another tokenizer",
    ),
    "a source with another tokenizer": (
        [*TRAIN, "--source", "name=a,shards={shards}", "--tokenizer", "{folder}/other.model"],
        3,
        "another tokenizer",
    ),
    "not a tokenizer": ([*TRAIN, "--train-data", "{train}", "--tokenizer", "{train}"], 3, "SentencePiece"),
    "vocabulary too small": ([*TRAIN, "--data", "{shards}", "--model.vocab_size", "96"], 2, "model.vocab_size"),
    "row above the context": ([*TRAIN, "--data", "{shards}", "--seq-length", "512"], 2, "context of 256"),
    "batch equation": (
        [*TRAIN, "--data", "{shards}", "--train.global_batch_size", "7", "--", "--num_gpus", "2"],
        2,
        "micro_batch_size 8 x gradient_accumulation_steps 1 x 2 ranks = 16",
    ),
    "experts do not divide": (
        [*TRAIN, "--data", "{shards}", "--expert-parallel", "3", "--", "--num_gpus", "3"],
        2,
        "model.num_experts 4 is not divisible by --expert-parallel 3",
    ),
    "ranks do not divide": ([*TRAIN, "--data", "{shards}", "--expert-parallel", "2"], 2, "1 rank is not divisible"),
    "fp16 on a CPU": ([*TRAIN, "--data", "{shards}", "--precision", "fp16"], 4, "fp16 is not possible on a CPU"),
    "fused kernels": ([*TRAIN, "--data", "{shards}", "--train.fused_kernels", "rope"], 4, "rope is not possible"),
    "no such kernel": ([*TRAIN, "--data", "{shards}", "--train.fused_kernels", "rope,ropes"], 2, "'ropes'"),
    "flash attention": ([*TRAIN, "--data", "{shards}", "--flash-attention", "on"], 4, "needs a CUDA GPU"),
    "bf16 at ZeRO-0": ([*TRAIN, "--data", "{shards}", "--precision", "bf16", "--zero", "0"], 2, "--zero 1"),
    "compile on a CPU": ([*TRAIN, "--data", "{shards}", "--compile"], 2, "use --no-compile"),
    "no --config": (["train", "--data", "{shards}"], 2, "--config is missing"),
    "name with a slash": ([*TRAIN, "--data", "{shards}", "--experiment-name", "../x"], 2, "run.name"),
    "hostfile": ([*TRAIN, "--data", "{shards}", "--", "--hostfile", "nowhere"], 2, "--hostfile nowhere"),
    "DeepSpeed JSON": ([*TRAIN, "--data", "{shards}", "--deepspeed_config", "zero9"], 2, "zero9"),
    "generate without a run": (["generate", "nowhere", "--prompt", "hi"], 5, "neither a run folder nor a checkpoint"),
    "evaluate without a run": (["evaluate", "nowhere", "--data", "{shards}"], 5, "neither a run folder"),
    "verify without a run": (["checkpoint", "verify", "nowhere"], 5, "holds no checkpoint"),
    "sequence length": (["evaluate", "nowhere", "--data", "{shards}", "--seq-length", "-5"], 2, "--seq-length"),
    "dry run of nothing": ([*TRAIN, "--data", "nowhere", "--dry-run"], 3, "nowhere"),
    "endless epochs": ([*TRAIN, "--data", "{shards}", "--epochs", "inf"], 2, "train.epochs"),
    "runs folder is a file": ([*TRAIN, "--data", "{shards}", "--runs-dir", "{folder}/text.jsonl"], 2, "--runs-dir"),
    "runner arguments": ([*TRAIN, "--data", "{shards}", "--", "--num_gpus", "two"], 2, "--num_gpus two"),
    "temperature": (["generate", "nowhere", "--prompt", "hi", "--temperature", "-1"], 2, "--temperature -1.0"),
    "nothing that must be resumed": (
        [*TRAIN, "--data", "{shards}", "--resume", "must", "--experiment-name", "none-yet"],
        5,
        "holds no checkpoint",
    ),
    "resume from nowhere": ([*TRAIN, "--data", "{shards}", "--resume", "nowhere"], 5, "give --resume one of them"),
    "unknown sub-verb": (["data", "inspec", "{shards}"], 2, "Did you mean 'inspect'?"),
    "tokenizer into a folder": (
        ["tokenizer", "train", "{train}", "--vocab-size", "300", "--out", "{folder}"],
        2,
        "name a file in it with --out",
    ),
    "tokenizer into a file": (
        ["tokenizer", "train", "{train}", "--vocab-size", "300", "--out", "{folder}/text.jsonl/t.model"],
        4,
        "choose another --out",
    ),
    "replies into a folder": (
        ["generate", "nowhere", "--prompts", "{folder}/prompts.jsonl", "--out", "{folder}"],
        4,
        "choose another --out",
    ),
    "prompts from nowhere": (["generate", "nowhere", "--prompts", "none.jsonl"], 3, "cannot read none.jsonl: No such"),
    "shell": (["completion", "tcsh"], 2, "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
    "no shell": (["completion"], 2, "Choose from: bash, zsh, fish"),
    "hostfile of prose": (
        ["doctor", "--json", "--hostfile", "{folder}/text.jsonl"],
        2,
        "line 1: 'just some prose' is no host with its slots; write one line `HOST slots=N` per machine",
    ),
    "shards are a file": (["data", "stats", "{train}"], 3, "is a file, not a shard folder"),
    "--json without --dry-run": ([*TRAIN, "--json"], 2, "--json goes with --dry-run"),
}


@pytest.fixture(scope="module")
def places(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.jsonl").write_text("just some prose\nand more of it\n")
    (folder / "users.jsonl").write_text('{"messages": [{"role": "user", "content": "anyone there?"}]}\n' * 5)
    (folder / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    other = ["tokenizer", "train", str(corpus.train), "--vocab-size", "400", "--model-type", "unigram", "--out"]
    assert run_command(cli, [*other, str(folder / "other.model")]) == 0
    return {"folder": folder, "shards": corpus.shards, "train": corpus.train}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_the_documented_exit_code(case, places, capfd, monkeypatch, tmp_path):
    words, code, fragment = CASES[case]
    monkeypatch.chdir(tmp_path)
    assert run_command(cli, [word.format(**places) for word in words]) == code
    printed = capfd.readouterr()
    assert fragment in printed.err
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in printed.err
    assert printed.out == ""


# Only the run reads the conversations.
READ_BY_THE_RUN = ("not JSONL", "no assistant turn", "--json without --dry-run")
CASES_OF_RUNS = [case for case in CASES if CASES[case][0][0] == "train" and "--dry-run" not in CASES[case][0]]


@pytest.mark.parametrize("case", [case for case in CASES_OF_RUNS if case not in READ_BY_THE_RUN])
def test_a_dry_run_says_what_the_run_says_and_neither_leaves_a_folder(case, places, capfd, monkeypatch, tmp_path):
    words, code, _ = CASES[case]
    monkeypatch.chdir(tmp_path)
    words = [word.format(**places) for word in words]
    said = []
    for dry in (["--dry-run"], []):
        assert run_command(cli, [words[0], *dry, *words[1:]]) == code
        said.append([line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")])
        assert list(tmp_path.iterdir()) == []
    assert said[0] == said[1]


@pytest.mark.parametrize("group", [[], ["tokenizer"], ["data"], ["checkpoint"], ["bench"]])
def test_a_verb_without_its_sub_verb_shows_its_help(group, capsys):
    assert run_command(cli, group) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("Usage: ") and "error" not in printed.err and printed.out == ""


def test_all_faults_are_reported_together(capsys):
    assert run_command(cli, [*TRAIN, "--model.num_expert", "8", "--seed", "x", "--train.foo", "1"]) == 2
    printed = capsys.readouterr().err
    assert "3 faults:" in printed and all(part in printed for part in ("model.num_expert", "train.seed", "train.foo"))
