"""The start of a process: a lone one's environment, launcher against recipe, DeepSpeed's configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mirage.config import load_recipe
from mirage.errors import UserError
from mirage.training.launch import (
    Launch,
    Setting,
    check_launch,
    configure_libraries,
    deepspeed_config,
    fill_environment,
    find_launch,
)

TINY = "recipe=tiny_internvl_mis"
ACCELERATE = ["/usr/bin/python", "/venv/bin/accelerate", "launch"]


# One process


def test_lone_process_is_rank_0_of_1_on_a_free_port() -> None:
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    fill_environment(environ)
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == ("0", "1", "0")
    assert environ["MASTER_PORT"] != "29500" and int(environ["MASTER_PORT"]) > 1023


def test_ranks_of_a_launcher_are_left_alone() -> None:
    environ = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
    before = dict(environ)
    fill_environment(environ)
    assert environ == before


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"WORLD_SIZE": "2"}, "the environment has WORLD_SIZE but not RANK, LOCAL_RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2 is not one of the 2 ranks"),
        ({"RANK": "a", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "must be numbers"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "not MASTER_ADDR and MASTER_PORT"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 copies of this command (SLURM_STEP_NUM_TASKS=4)"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 copies"),
    ],
)
def test_half_an_environment_is_refused(environ: dict[str, str], said: str) -> None:
    before = dict(environ)
    with pytest.raises(UserError) as caught:
        fill_environment(environ)
    assert said in str(caught.value) and environ == before


def test_one_task_under_slurm_is_one_process() -> None:
    environ = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}
    fill_environment(environ)
    assert environ["WORLD_SIZE"] == "1"


# What was asked for


@pytest.mark.parametrize(
    "prefix",
    [
        ACCELERATE,
        ["accelerate", "launch"],
        ["/venv/bin/accelerate-launch"],
        ["python", "-m", "accelerate.commands.launch"],
        ["python", "/lib/accelerate/commands/launch.py"],
        ["python", "-m", "accelerate.commands.accelerate_cli", "launch"],
        ["timeout", "60", "/venv/bin/accelerate", "launch"],
    ],
)
def test_launch_is_found_among_ancestors(prefix: list[str]) -> None:
    command = [*prefix, "--num_processes", "2", "--zero_stage", "1", "mirage/train.py", TINY, "--num_processes=9"]
    launch = find_launch([["python", "worker.py"], command, ["bash", "-c", "accelerate launch --num_processes 4 x"]])
    assert launch is not None
    assert launch.value("num_processes") == 2 and launch.settings["zero_stage"].where == "--zero_stage 1"
    assert (launch.script, launch.script_args) == ("mirage/train.py", (TINY, "--num_processes=9"))
    assert launch.value("mixed_precision") is None


def test_no_launch_no_comparison() -> None:
    assert find_launch([["bash"], ["accelerate", "env"], ["vim", "accelerate"], ["python", "launch.py"], []]) is None


def test_only_what_somebody_wrote_counts(repo_root: Path) -> None:
    plain = find_launch([[*ACCELERATE, "mirage/train.py"]])
    assert plain is not None and plain.settings == {}
    config = repo_root / "recipes" / "accelerate" / "zero3_8gpu.yaml"
    launch = find_launch([[*ACCELERATE, "--config_file", str(config), "--num_processes", "4", "x.py"]])
    assert launch is not None
    assert launch.settings["zero_stage"] == Setting(3, f"zero_stage: 3 in {config}")
    assert launch.settings["num_processes"] == Setting(4, "--num_processes 4")
    assert launch.value("mixed_precision") == "bf16" and launch.value("use_deepspeed") is True


def test_switches_count_when_they_are_set() -> None:
    launch = find_launch([[*ACCELERATE, "--cpu", "x.py"]])
    assert launch is not None and launch.settings == {"cpu": Setting(True, "--cpu")}


def test_auto_in_a_config_file_is_no_statement(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_processes: 1\nmixed_precision: 'no'\n"
        "deepspeed_config: {zero_stage: 2, gradient_clipping: auto, deepspeed_config_file: ds.json}\n"
    )
    launch = find_launch([[*ACCELERATE, "--config_file", str(config), "x.py"]])
    assert launch is not None and launch.value("gradient_clipping") is None
    with pytest.raises(UserError) as caught:
        check_launch(load_recipe([TINY]), launch, world_size=1)
    assert str(caught.value).splitlines()[1:] == [
        f"  zero_stage: 2 in {config}, but the recipe says train.zero_stage=3; change one of them",
        f"  deepspeed_config_file: ds.json in {config} has no effect: DeepSpeed is configured from the recipe; "
        "leave it out",
    ]


# Launcher against recipe


def asked(**settings: Any) -> Launch:
    return Launch(
        {name: Setting(value, f"--{name} {value}") for name, value in settings.items()}, "mirage/train.py", (TINY,)
    )


def test_missing_processes_are_noticed_with_the_command_to_run() -> None:
    with pytest.raises(UserError) as caught:
        check_launch(load_recipe([TINY]), asked(num_processes=2), world_size=1)
    assert str(caught.value) == (
        "the launcher and the recipe disagree\n"
        "  --num_processes 2: accelerate was asked for 2 processes and 1 is running (accelerate starts one process in "
        "silence on a machine without GPUs unless DeepSpeed is asked for).\n"
        "    Run: accelerate launch --config_file recipes/accelerate/cpu2.yaml mirage/train.py recipe=tiny_internvl_mis"
    )
    with pytest.raises(UserError, match=r"--use_deepspeed --num_machines 1 --num_processes 4 mirage/train\.py"):
        check_launch(load_recipe([TINY]), asked(num_processes=4), world_size=1)
    with pytest.raises(UserError, match="asked for 1 process and 2 are running"):
        check_launch(load_recipe([TINY]), asked(num_processes=1), world_size=2)


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("zero_stage", 2, "--zero_stage 2, but the recipe says train.zero_stage=3"),
        ("mixed_precision", "bf16", "--mixed_precision bf16, but the recipe says train.precision=fp32"),
        ("mixed_precision", "fp16", "train.precision=fp32"),
        ("gradient_clipping", "0.5", "train.clip_norm=1"),
        ("offload_optimizer_device", "cpu", "train.offload_optimizer=false"),
        ("offload_param_device", "nvme", "train.offload_parameters=false"),
        ("gradient_accumulation_steps", "4", "has no effect: train.batch_samples sets the batch"),
        ("dynamo_backend", "inductor", "has no effect"),
        ("cpu", True, "it turns DeepSpeed off"),
        ("use_fsdp", True, "MIRage runs on DeepSpeed"),
    ],
)
def test_contradictions_name_both_places(setting: str, value: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_launch(load_recipe([TINY, "train.precision=fp32"]), asked(**{setting: value}), world_size=1)
    assert said in str(caught.value) and f"--{setting}" in str(caught.value)


def test_agreement_is_silent() -> None:
    agreeing = asked(
        num_processes=2,
        zero_stage="3",
        mixed_precision="no",
        gradient_clipping="1.0",
        gradient_accumulation_steps="1",
        offload_optimizer_device="none",
        dynamo_backend="no",
        use_deepspeed=True,
    )
    check_launch(load_recipe([TINY]), agreeing, world_size=2)
    check_launch(load_recipe([TINY, "train.precision=bf16"]), asked(mixed_precision="bf16"), world_size=1)


# For real: the child of a real launcher


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ([], 0, "world size 1"),
        (["--num_processes", "2"], 2, "--config_file recipes/accelerate/cpu2.yaml"),
    ],
)
def test_under_a_real_launcher(tmp_path: Path, repo_root: Path, flags: list[str], code: int, said: str) -> None:
    script = tmp_path / "probe.py"
    script.write_text(
        "import sys\n"
        "from mirage.config import load_recipe\n"
        "from mirage.errors import run_main\n"
        "from mirage.training import launch\n"
        "launch.configure_libraries = lambda *a, **k: None\n"
        "run_main(lambda: print('world size', launch.prepare_process(load_recipe(sys.argv[1:]))))\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, str(script), TINY]
    # As on a machine without GPUs, where the trap is.
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=repo_root, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode != 0) == (code != 0)
    assert said in done.stdout + done.stderr


# DeepSpeed


def test_deepspeed_configuration_of_a_full_run() -> None:
    config = deepspeed_config(load_recipe(["recipe=internvl_mis"]), world_size=8, hidden_size=4096, has_gpu=True)
    assert config["train_batch_size"] == 8 and config["train_micro_batch_size_per_gpu"] == 1
    assert config["gradient_accumulation_steps"] == 1 and config["gradient_clipping"] == 1.0
    assert config["bf16"] == {"enabled": True}
    # bf16 weights, but gradients are summed in fp32 over packs and ranks.
    assert config["data_types"] == {"grad_accum_dtype": "fp32"} and config["communication_data_type"] == "fp32"
    zero = config["zero_optimization"]
    assert zero["stage"] == 3 and zero["overlap_comm"] and zero["contiguous_gradients"]
    assert config["zero_allow_untested_optimizer"]
    assert zero["reduce_bucket_size"] == zero["stage3_prefetch_bucket_size"] == 4096**2
    json.dumps(config)


def test_deepspeed_configuration_follows_the_recipe() -> None:
    settings = ["train.precision=fp32", "train.zero_stage=2", "train.offload_optimizer=true", "train.clip_norm=0.5"]
    recipe = load_recipe([TINY, *settings])
    config = deepspeed_config(recipe, world_size=2, hidden_size=128, has_gpu=False)
    assert config["gradient_clipping"] == 0.5 and config["bf16"] == {"enabled": False} and "data_types" not in config
    zero = config["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False} and not zero["overlap_comm"]
    assert not any(key.startswith("stage3") for key in zero)
    # Buffers of a tiny run stay small beside its weights.
    assert zero["reduce_bucket_size"] * 4 < 10e6


def test_libraries_are_set_up_for_a_machine_without_gpu() -> None:
    environ: dict[str, str] = {"TRANSFORMERS_VERBOSITY": "debug"}
    configure_libraries(environ, has_gpu=False)
    import deepspeed.ops

    assert environ["DS_ACCELERATOR"] == "cpu" and environ["TRANSFORMERS_VERBOSITY"] == "debug"
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_a_rank_that_is_done_leaves_with_its_code_and_its_exit_functions() -> None:
    program = (
        "import atexit, sys; from mirage.train import leave\n"
        "atexit.register(print, 'said goodbye'); sys.stdout.write('done '); leave(5)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (5, "done said goodbye\n")
