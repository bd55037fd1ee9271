"""Before anything distributed starts: complete the environment, refuse a launch that contradicts the recipe."""

from __future__ import annotations

import logging
import os
import shlex
import socket
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from mirage.config.schema import Recipe
from mirage.errors import UserError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# Set by launchers that start several copies of a plain command (srun, mpirun) without naming ranks as torch wants them.
_TASK_COUNTS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}
_CPU_CONFIG = "recipes/accelerate/cpu2.yaml"
# Least elements in a communication bucket: below, a collective's start costs more than what it carries.
_MIN_BUCKET_ELEMENTS = 500_000
# DeepSpeed's default: parameters that ZeRO-3 holds gathered at one time.
MAX_LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Setting:
    """One value that the launcher was given, and where."""

    value: Any
    where: str


@dataclass(frozen=True)
class Launch:
    """What `accelerate launch` was asked for: only what somebody wrote, no defaults."""

    settings: Mapping[str, Setting] = field(default_factory=dict)
    script: str = ""
    script_args: tuple[str, ...] = ()

    def value(self, name: str) -> Any:
        return self.settings[name].value if name in self.settings else None


def prepare_process(recipe: Recipe) -> int:
    """Everything a rank does before `torch.distributed` starts; returns the number of processes.

    Raises `UserError` when the launcher and the recipe disagree, or fewer processes run than were asked for.
    """
    fill_environment(os.environ)
    world_size = int(os.environ["WORLD_SIZE"])
    launch = find_launch(_ancestor_commands())
    if launch is not None:
        check_launch(recipe, launch, world_size=world_size)
    configure_libraries(os.environ, has_gpu=_has_gpu())
    if recipe.train.deterministic:
        from mirage.training.determinism import prepare_determinism

        prepare_determinism(os.environ)
    return world_size


# One process


def fill_environment(environ: MutableMapping[str, str]) -> None:
    """Describe one process to torch.distributed when no launcher did: rank 0 of 1 on a free port of this machine.

    Raises `UserError` when only some variables are there, or when another launcher started several copies.
    """
    given = [name for name in RANK_VARIABLES if environ.get(name)]
    if len(given) == len(RANK_VARIABLES):
        _check_ranks(environ)
        return
    if given:
        missing = ", ".join(name for name in RANK_VARIABLES if name not in given)
        raise UserError(
            f"the environment has {', '.join(given)} but not {missing}: a launcher sets all of them. "
            f"Unset {', '.join(given)} for one process, or start with `accelerate launch`."
        )
    for name, program in _TASK_COUNTS.items():
        if environ.get(name, "1").isdigit() and int(environ.get(name, "1")) > 1:
            raise UserError(
                f"{program} started {environ[name]} copies of this command ({name}={environ[name]}) and each would "
                f"train alone on the same data. Start one `accelerate launch` per machine: {program} with one task per "
                "node, as recipes/slurm/train.sbatch does."
            )
    environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"})
    # accelerate's fixed 29500 is often taken by another run on the machine; one process needs to agree with nobody.
    environ["MASTER_PORT"] = str(_free_port())


def _check_ranks(environ: Mapping[str, str]) -> None:
    try:
        rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    except ValueError:
        raise UserError(f"RANK={environ['RANK']!r} and WORLD_SIZE={environ['WORLD_SIZE']!r} must be numbers") from None
    if not 0 <= rank < world_size:
        raise UserError(f"RANK={rank} is not one of the {world_size} ranks that WORLD_SIZE={world_size} means")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE={world_size} is set but not {' and '.join(missing)}; start with `accelerate launch`"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# What the launcher was asked for


def _ancestor_commands() -> list[list[str]]:
    commands: list[list[str]] = []
    try:
        for process in psutil.Process().parents():
            commands.append(process.cmdline())
    except psutil.Error:
        # An ancestor that ended or belongs to another user ends the search; nothing can be compared beyond it.
        pass
    return commands


def find_launch(commands: Sequence[Sequence[str]]) -> Launch | None:
    """What the nearest `accelerate launch` among command lines (nearest first) was asked for; None without one."""
    for command in commands:
        arguments = _launch_arguments(command)
        if arguments is not None:
            return _parse_launch(arguments)
    return None


def _launch_arguments(command: Sequence[str]) -> list[str] | None:
    """The arguments after `accelerate launch`, in any of the ways to call it; None for another command."""
    words = list(command)
    for i, word in enumerate(words):
        name = Path(word).name
        if name == "accelerate-launch" or (word == "accelerate.commands.launch" and words[i - 1] == "-m"):
            return words[i + 1 :]
        # `python -m accelerate.commands.launch` shows the file once it runs.
        if name == "launch.py" and Path(word).parent.name == "commands" and "accelerate" in word:
            return words[i + 1 :]
        cli = name == "accelerate" or word == "accelerate.commands.accelerate_cli" or name == "accelerate_cli.py"
        if cli and words[i + 1 : i + 2] == ["launch"]:
            return words[i + 2 :]
    return None


def _parse_launch(arguments: Sequence[str]) -> Launch | None:
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        args, _ = launch_command_parser().parse_known_args(list(arguments))
    except SystemExit:
        return None
    settings: dict[str, Setting] = {}
    default_counts = Path(default_config_file).is_file() and not args.cpu
    if args.config_file is not None or default_counts:
        settings.update(
            _config_settings(load_config_from_file(args.config_file), args.config_file or default_config_file)
        )
    for name in _VALUE_FLAGS:
        if (value := getattr(args, name, None)) is not None:
            settings[name] = Setting(value, f"--{name} {value}")
    for name in _SWITCHES:
        if getattr(args, name, False):
            settings[name] = Setting(True, f"--{name}")
    return Launch(settings, args.training_script, tuple(args.training_script_args))


_VALUE_FLAGS = (
    "num_processes",
    "mixed_precision",
    "zero_stage",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "offload_optimizer_device",
    "offload_param_device",
    "deepspeed_config_file",
    "dynamo_backend",
)
_SWITCHES = ("cpu", "use_deepspeed", "use_fsdp", "use_megatron_lm")


def _config_settings(config: Any, path: str) -> dict[str, Setting]:
    """The settings of an accelerate config file that a recipe may contradict."""
    values = {name: getattr(config, name, None) for name in ("num_processes", "mixed_precision")}
    values.update({name: value for name, value in (config.deepspeed_config or {}).items() if name in _VALUE_FLAGS})
    values["dynamo_backend"] = (getattr(config, "dynamo_config", None) or {}).get("dynamo_backend")
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    values["use_deepspeed"] = kind == "DEEPSPEED" or None
    values["use_fsdp"] = kind == "FSDP" or None
    values["use_megatron_lm"] = kind == "MEGATRON_LM" or None
    return {
        name: Setting(value, f"{name}: {value} in {path}")
        for name, value in values.items()
        if value not in (None, "auto", -1)
    }


# Recipe against launcher


def check_launch(recipe: Recipe, launch: Launch, *, world_size: int) -> None:
    """Raise one `UserError` that lists every setting on which the launcher and the recipe (or what runs) disagree."""
    problems = [*_process_problems(launch, world_size), *_setting_problems(recipe, launch)]
    if problems:
        raise UserError("the launcher and the recipe disagree\n" + "\n".join(f"  {problem}" for problem in problems))


def _process_problems(launch: Launch, world_size: int) -> list[str]:
    asked = launch.settings.get("num_processes")
    if asked is None or int(asked.value) == world_size or int(asked.value) == 0:
        return []
    count = f"{asked.value} processes" if int(asked.value) != 1 else "1 process"
    running = f"{world_size} {'is' if world_size == 1 else 'are'} running"
    why = ""
    if world_size == 1 and not launch.value("use_deepspeed"):
        why = " (accelerate starts one process in silence on a machine without GPUs unless DeepSpeed is asked for)"
    return [f"{asked.where}: accelerate was asked for {count} and {running}{why}.\n    Run: {_right_command(launch)}"]


def _right_command(launch: Launch) -> str:
    num_processes = int(launch.value("num_processes"))
    flags = (
        ["--config_file", _CPU_CONFIG]
        if num_processes == 2
        else ["--use_deepspeed", "--num_machines", "1", "--num_processes", str(num_processes)]
    )
    return shlex.join(["accelerate", "launch", *flags, launch.script, *launch.script_args])


def _setting_problems(recipe: Recipe, launch: Launch) -> list[str]:
    train = recipe.train
    offload = "cpu" if train.offload_optimizer else "none"
    offload_param = "cpu" if train.offload_parameters else "none"
    accepted: dict[str, tuple[tuple[Any, ...], str]] = {
        "zero_stage": ((train.zero_stage,), f"train.zero_stage={train.zero_stage}"),
        # "no" is what accelerate writes into every config file; it leaves the type to the recipe.
        "mixed_precision": (("no", train.precision), f"train.precision={train.precision}"),
        "gradient_clipping": ((train.clip_norm,), f"train.clip_norm={train.clip_norm:g}"),
        "offload_optimizer_device": ((offload,), f"train.offload_optimizer={str(train.offload_optimizer).lower()}"),
        "offload_param_device": ((offload_param,), f"train.offload_parameters={str(train.offload_parameters).lower()}"),
    }
    no_effect = {
        "gradient_accumulation_steps": ((1,), "train.batch_samples sets the batch, whatever the number of GPUs"),
        "deepspeed_config_file": ((), "DeepSpeed is configured from the recipe"),
        "dynamo_backend": (("no", "NO"), "what is compiled is train.compile's to say"),
        "cpu": ((), "it turns DeepSpeed off; without a GPU the CPU is used anyway"),
        "use_fsdp": ((), "MIRage runs on DeepSpeed; see train.zero_stage"),
        "use_megatron_lm": ((), "MIRage runs on DeepSpeed; see train.zero_stage"),
    }
    problems = []
    for name, setting in launch.settings.items():
        if name in accepted and not _among(setting.value, accepted[name][0]):
            problems.append(f"{setting.where}, but the recipe says {accepted[name][1]}; change one of them")
        elif name in no_effect and not _among(setting.value, no_effect[name][0]):
            problems.append(f"{setting.where} has no effect: {no_effect[name][1]}; leave it out")
    return problems


def _among(value: Any, accepted: Sequence[Any]) -> bool:
    """Whether a launcher's value, text or number, is one of the accepted ones."""
    for other in accepted:
        if str(value) == str(other):
            return True
        if isinstance(other, int | float) and not isinstance(other, bool):
            try:
                if float(value) == other:
                    return True
            except (TypeError, ValueError):
                continue
    return False


# Libraries


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def configure_libraries(environ: MutableMapping[str, str], *, has_gpu: bool) -> None:
    """Choose DeepSpeed's device, keep it from compiling on the CPU and keep the libraries' chatter off the console."""
    environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not has_gpu:
        environ["DS_ACCELERATOR"] = "cpu"
    # Libraries call each other by names that are about to be retired: hundreds of lines, none of them the user's.
    for message in (r".*is deprecated\. Please use `torch\.distributed", r"`is_gradient_checkpointing` is deprecated"):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    # The rank's device is the current one, which is what this says.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    import deepspeed.ops
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if not has_gpu:
        # Its shared-memory collectives are compiled at first use (about a minute); gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        handler.setLevel(logging.ERROR)


def deepspeed_config(
    recipe: Recipe, *, world_size: int, hidden_size: int, has_gpu: bool | None = None
) -> dict[str, Any]:
    """DeepSpeed's configuration for the recipe.

    One pack is one micro-step; the trainer counts them itself (`engine.set_gradient_accumulation_boundary`), so
    accumulation is 1 here. Gradients are summed in fp32, over micro-steps and over ranks: in bf16 a sum over many packs
    loses the small ones, and the gradient would depend on how the batch is cut. Clipping is DeepSpeed's. Buffers follow
    the language model's `hidden_size`, as those of transformers' "auto" do (integrations/deepspeed.py). `has_gpu` is
    found out when None.
    """
    train = recipe.train
    has_gpu = _has_gpu() if has_gpu is None else has_gpu
    config: dict[str, Any] = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.clip_norm,
        "bf16": {"enabled": train.precision == "bf16"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        # torch's AdamW also steps offloaded state; DeepSpeed's own would be compiled at first use.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "zero_optimization": _zero_config(recipe, hidden_size=hidden_size, has_gpu=has_gpu),
    }
    if train.precision == "bf16":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _zero_config(recipe: Recipe, *, hidden_size: int, has_gpu: bool) -> dict[str, Any]:
    # A square matrix of the model: what is reduced or gathered at one time.
    train, bucket = recipe.train, max(hidden_size**2, _MIN_BUCKET_ELEMENTS)
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": has_gpu,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": has_gpu}
    if train.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": has_gpu}
    if train.zero_stage == 3:
        zero.update(
            stage3_prefetch_bucket_size=bucket,
            # Norms and biases stay whole on every rank.
            stage3_param_persistence_threshold=10 * hidden_size,
            stage3_max_live_parameters=MAX_LIVE_PARAMETERS,
            stage3_max_reuse_distance=MAX_LIVE_PARAMETERS,
        )
    return zero
